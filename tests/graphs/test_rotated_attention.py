"""``rotate_and_attend``: the op, and where its kernel is checked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from graphs.rotated_attention import NewToken, prepared
from moe_ops.errors import ShapeError
from tests.graphs.rotated_attention_checks import token, with_own_cache
from tests.moe_ops.interpreted import run_checks

op = torch.ops.moe_ep.rotate_and_attend
CHECKS = "../graphs/rotated_attention_checks.py"
ROOT = Path(__file__).resolve().parents[2]
SMALL = (2, 4, 2, 6, 8, 4, 8)


def small() -> NewToken:
    given = token(*SMALL, True)
    return given._replace(keys=given.keys.nan_to_num(0.0), values=given.values.nan_to_num(0.0))


def test_kernel_in_the_interpreter():
    run_checks(CHECKS, interpret=True)


@pytest.mark.gpu("1 H200: the compiled kernel, bf16")
def test_kernel_on_the_gpu():
    run_checks(CHECKS, interpret=False)


def test_registered_with_the_op_whose_place_it_takes():
    """Whoever can have decode attention in a graph has this op too: lowering puts it there."""
    code = "import graphs.attention, torch; torch.ops.moe_ep.rotate_and_attend.default"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


def test_literal():
    """Two columns: what the new token wrote, and one before it; both scores are 0, so the mean of the values."""
    one = torch.tensor([[[3.0, 4.0]]])
    keys, values, angle = torch.zeros(1, 1, 2, 2), torch.tensor([[[[1.0, 5.0], [9.0, 9.0]]]]), torch.zeros(1, 2)
    mask, column = torch.ones(1, 1, 1, 2, dtype=torch.bool), torch.tensor([1])
    got = op(one * 0, one, one, None, None, 0.0, 0.0, angle, angle + 1, keys, values, column, mask, 1.0)
    assert got.tolist() == [[[2.0, 4.5]]]
    assert keys.tolist() == [[[[0.0, 0.0], [-4.0, 3.0]]]] and values.tolist() == [[[[1.0, 5.0], [3.0, 4.0]]]]


def test_prepared_is_what_transformers_computes():
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm, apply_rotary_pos_emb

    x, angle = torch.randn(3, 4, 16), torch.randn(3, 1, 8).repeat(1, 1, 2)
    norm = Qwen3MoeRMSNorm(16, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    wanted, _ = apply_rotary_pos_emb(norm(x)[:, :, None], x[:, :, None], angle.cos(), angle.sin())
    got = prepared(x, norm.weight, 1e-5, angle[:, 0].cos(), angle[:, 0].sin())
    torch.testing.assert_close(got, wanted[:, :, 0])


def test_opcheck():
    torch.library.opcheck(op.default, tuple(small()))
    torch.library.opcheck(op.default, tuple(small()._replace(query_norm=None, key_norm=None)))


def test_inputs_but_the_cache_stay():
    given = small()
    before = with_own_cache(given)
    op(*given)
    for name, value in given._asdict().items():
        if isinstance(value, torch.Tensor) and name not in ("keys", "values"):
            assert torch.equal(value, getattr(before, name)), name
    assert not torch.equal(given.keys, before.keys)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("key", (2, 2, 7)), ("value", (2, 2, 8)), ("cos", (2, 7)), ("sin", (2, 6)), ("columns", (3,)), ("key_norm", (4,))],
)
def test_wrong_shapes_are_refused(name: str, shape: tuple[int, ...]):
    given = small()._replace(**{name: torch.ones(shape)})
    with pytest.raises(ShapeError, match="rotate_and_attend"):
        op(*given)


def test_an_odd_number_of_columns_does_not_turn():
    with pytest.raises(ShapeError, match="7 of 8 columns cannot be rotated"):
        op(*small()._replace(cos=torch.ones(2, 7), sin=torch.ones(2, 7)))

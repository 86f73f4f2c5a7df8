"""``fused_moe_into`` on the CPU: literals, equality with ``fused_moe``, what it leaves alone, what it refuses."""

from __future__ import annotations

import pytest
import torch

import moe_ops  # noqa: F401  registers the ops
from moe_ops.errors import DtypeError, ShapeError
from tests.moe_ops.moe_cases import FORMS, Case, build, oracle
from tests.tolerances import FUSED_MOE, relative_error

ops = torch.ops.moe_ep


def test_literals():
    # one expert, 4, that doubles relu2(3 x); row 1's id is another rank's, row 2 is not live
    out = torch.full((3, 1), 7.0)
    ops.fused_moe_into(
        torch.tensor([[2.0], [5.0], [1.0]]), torch.tensor([[4], [0], [4]]), torch.tensor([[0.5], [1.0], [1.0]]),
        torch.tensor([[[3.0]]]), torch.tensor([[[2.0]]]), torch.tensor([2], dtype=torch.int32), 4, out,
        activation="relu2", gated=False,
    )  # fmt: skip
    assert out.tolist() == [[36.0], [0.0], [7.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_equals_fused_moe_and_leaves_the_rest_of_the_buffer(form, dtype):
    case = Case(rows=19, top_k=3, live=17)
    arguments, options = build(case, FORMS[form], torch.bfloat16)
    buffer = torch.full((case.rows, case.hidden + 3), 7.0, dtype=dtype)
    out = buffer[:, : case.hidden]
    ops.fused_moe_into(*arguments, out, **options)
    wanted = ops.fused_moe(*arguments, **options, out_dtype=dtype)
    assert torch.equal(out[: case.live], wanted[: case.live])
    assert (out[case.live :] == 7).all() and (buffer[:, case.hidden :] == 7).all()
    assert relative_error(out[: case.live], oracle(arguments, options)) <= FUSED_MOE[torch.bfloat16]


def test_nothing_is_written_where_no_row_is_live():
    arguments, _ = build(Case(live=0), {}, torch.float32)
    out = torch.full((Case.rows, Case.hidden), 7.0)
    ops.fused_moe_into(*arguments, out)
    assert (out == 7).all()


@pytest.mark.parametrize(
    ("out", "error", "hint"),
    [
        (torch.zeros(6, 48), ShapeError, r"pass \(7, 48\)"),
        (torch.zeros(48, 7).T, ShapeError, "one after the other"),
        (torch.zeros(7 * 48), ShapeError, r"\(M, H\)"),
        (torch.zeros(7, 48, dtype=torch.float64), DtypeError, "out"),
    ],
    ids=["rows", "strides", "rank", "dtype"],
)
def test_refuses_buffers(out, error, hint):
    arguments, _ = build(Case(), {}, torch.float32)
    with pytest.raises(error, match=hint):
        ops.fused_moe_into(*arguments, out)

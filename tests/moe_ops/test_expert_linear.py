"""``expert_linear`` and ``topk_sum``: literals, fp64, what they never read, what they refuse, what they compile to."""

from __future__ import annotations

import pytest
import torch

import moe_ops  # noqa: F401  registers the ops
from moe_ops.errors import ArgumentError, DtypeError, ShapeError
from tests.moe_ops.expert_linear_checks import CASES, check, composed
from tests.moe_ops.interpreted import run_checks
from tests.moe_ops.moe_cases import FORMS, Case
from tests.moe_ops.test_moe_compiled import compiled

expert_linear = torch.ops.moe_ep.expert_linear
topk_sum = torch.ops.moe_ep.topk_sum
NAN = float("nan")
ONE = torch.tensor([1], dtype=torch.int32)
TWO = torch.tensor([2], dtype=torch.int32)


def test_literals():
    x, ids = torch.tensor([[2.0], [NAN]]), torch.tensor([[5, 4], [5, 5]])  # expert 4 is not here; row 1 is dead
    weight, bias = torch.tensor([[[3.0], [-1.0]]]), torch.tensor([[0.5, 0.0]])
    pairs = expert_linear(x, ids, weight, ONE, 5, bias=bias)
    assert pairs[0].tolist() == [6.5, -2.0]
    pairs[1:] = NAN
    assert topk_sum(pairs, ids, torch.tensor([[2.0, NAN], [NAN, NAN]]), ONE, 5, 1)[0].tolist() == [13.0, -4.0]


def test_a_row_a_pair():
    x, ids = torch.tensor([[1.0], [2.0], [3.0], [NAN]]), torch.tensor([[0, 1], [1, -1]])
    pairs = expert_linear(x, ids, torch.tensor([[[10.0]], [[100.0]]]), TWO, 0)
    assert pairs[:3].tolist() == [[10.0], [200.0], [300.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_against_fp64(form: str, dtype: torch.dtype):
    check(composed(expert_linear, topk_sum), Case(rows=19, live=17, top_k=3), FORMS[form], dtype)


@pytest.mark.parametrize("case", CASES)
def test_edges(case: str):
    check(composed(expert_linear, topk_sum), CASES[case], {}, torch.float32)


def arguments(transposed: bool = False) -> tuple[tuple, dict]:
    make = torch.Generator().manual_seed(0)
    x, ids = torch.randn(5, 8, generator=make), torch.randint(0, 4, (5, 2), generator=make)
    weight = torch.randn(4, *((8, 6) if transposed else (6, 8)), generator=make)
    bias = torch.randn(4, 6, generator=make)
    return (x, ids, weight, torch.tensor([5], dtype=torch.int32), 0), {"bias": bias, "transposed": transposed}


@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(transposed: bool):
    args, options = arguments(transposed)
    torch.library.opcheck(expert_linear.default, args, options)
    pairs = expert_linear(*args, **options)
    torch.library.opcheck(topk_sum.default, (pairs, args[1], torch.rand(5, 2), args[3], 0, 4))


def test_two_calls_keep_the_first_result():
    args, options = arguments()
    first = expert_linear(*args, **options)
    kept = first.clone()
    expert_linear(args[0] * 2, *args[1:], **options)
    assert torch.equal(first, kept)


BAD = [
    ({0: torch.randn(4, 8)}, {}, ShapeError, "one row of x a token or a pair"),
    ({0: torch.randn(5, 7)}, {}, ShapeError, "do not fit"),
    ({}, {"transposed": True}, ShapeError, "do not fit"),
    ({0: torch.randn(5, 8).bfloat16()}, {}, DtypeError, "both in one dtype"),
    ({2: torch.randn(4, 8, 6).mT}, {}, DtypeError, "weight contiguous"),
    ({1: torch.rand(5, 2)}, {}, DtypeError, "topk_ids"),
    ({}, {"bias": torch.randn(4, 5)}, ShapeError, "bias is"),
    ({4: -1}, {}, ArgumentError, "start of at least 0"),
]


@pytest.mark.parametrize(("changed", "options", "error", "message"), BAD, ids=[b[3] for b in BAD])
def test_wrong_arguments(changed, options, error, message):
    args, good = arguments()
    args = tuple(changed.get(i, a) for i, a in enumerate(args))
    with pytest.raises(error, match=message):
        expert_linear(*args, **good | options)


def test_sum_of_wrong_arguments():
    pairs, ids, weights = torch.randn(10, 4), torch.zeros(5, 2, dtype=torch.int64), torch.rand(5, 2)
    for changed, error in (((pairs[:9], ids, weights), ShapeError), ((pairs, ids, weights[:, :1]), ShapeError)):
        with pytest.raises(error):
            topk_sum(*changed, TWO, 0, 4)
    with pytest.raises(DtypeError, match="out_dtype"):
        topk_sum(pairs, ids, weights, TWO, 0, 4, out_dtype=torch.int32)
    with pytest.raises(ArgumentError, match="num_local_experts=0"):
        topk_sum(pairs, ids, weights, TWO, 0, 0)


def test_kernels_in_the_interpreter():
    run_checks("expert_linear_checks.py", interpret=True)


@pytest.mark.gpu("1 H200: the compiled kernels, bf16")
def test_kernels_on_the_gpu():
    run_checks("expert_linear_checks.py", interpret=False)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("transposed", [False, True])
def test_compiles_for_an_h200_without_spills(block: int, transposed: bool):
    from moe_ops.expert_linear_kernels import _expert_linear_kernel

    constants = {
        "PAIRS_PER_ROW": 8, "TRANSPOSED": transposed, "HAS_BIAS": True, "BLOCK_M": block, "BLOCK_N": 64, "BLOCK_K": 64,
    }  # fmt: skip
    box = {"depth": "i32", "width": "i32"}
    code = compiled(_expert_linear_kernel, constants, 4, 4, box)
    assert code.stack == 0
    assert code.has("wgmma.mma_async" if block == 64 else "mma.sync.aligned")

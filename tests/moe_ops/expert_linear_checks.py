"""``fused_moe`` made of ``expert_linear``, a gate in plain torch and ``topk_sum``, against fp64.

Run as a test file by ``test_expert_linear``: in Triton's interpreter (no bf16 dot there, hence fp16) or on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_ops.activations import apply_activation
from moe_ops.expert_linear import launch_expert_linear
from moe_ops.topk_sum import launch_topk_sum
from tests.moe_ops.moe_cases import FORMS, Case, build, oracle
from tests.tolerances import EXPERT_LINEAR, relative_error

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float16)
CASES = {
    "divisible": Case(rows=37, top_k=3, hidden=128, inner=64, live=35),
    "tails": Case(rows=21, top_k=3, hidden=57, inner=39, live=20),
    "idle": Case(live=0),
    "one expert": Case(rows=150, top_k=1, routing="one"),
    "none local": Case(routing="none"),
    "int32": Case(index_dtype=torch.int32, weight_dtype=torch.float16),
}


def composed(expert_linear, topk_sum):
    """``fused_moe``'s signature on these two ops, with NaN in every pair that they must not read."""

    def run(
        hidden, ids, weights, gate_up, down, valid, start, *, transposed=False, gate_up_bias=None, down_bias=None,
        activation="silu", alpha=None, limit=None, gated=True, interleaved=False,
    ) -> Tensor:  # fmt: skip
        local = (ids >= start) & (ids < start + gate_up.shape[0])
        used = (local & (torch.arange(len(ids), device=ids.device) < valid)[:, None]).reshape(-1, 1)
        projected = expert_linear(hidden, ids, gate_up, valid, start, bias=gate_up_bias, transposed=transposed)
        inner = apply_activation(
            projected.float(), activation, alpha=alpha, limit=limit, gated=gated, interleaved=interleaved
        ).to(hidden.dtype)
        inner = torch.where(used, inner, float("nan"))
        pairs = expert_linear(inner, ids, down, valid, start, bias=down_bias, transposed=transposed)
        pairs = torch.where(used, pairs, float("nan"))
        return topk_sum(pairs, ids, weights, valid, start, gate_up.shape[0])

    return run


def check(run, case: Case, form: dict, dtype: torch.dtype, device: str = "cpu") -> None:
    """One call against fp64, live rows only."""
    arguments, options = build(case, form, dtype, device)
    got, wanted = run(*arguments, **options), oracle(arguments, options)
    assert got.dtype == dtype and got.shape == arguments[0].shape
    assert torch.isfinite(got[: len(wanted)]).all()
    assert relative_error(got[: len(wanted)], wanted) <= EXPERT_LINEAR[dtype]


run_kernels = composed(launch_expert_linear, launch_topk_sum)


@pytest.mark.parametrize("form", ["swiglu", "gpt-oss", "nemotron", "ungated-transposed"])
@pytest.mark.parametrize("case", CASES)
def test_kernels(case: str, form: str):
    check(run_kernels, CASES[case], FORMS[form], DTYPE, DEVICE)


def test_strided_rows():
    x = torch.randn(5, 40, dtype=DTYPE, device=DEVICE)
    weight = torch.randn(2, 24, 32, dtype=DTYPE, device=DEVICE)
    ids = torch.tensor([[0], [1], [1], [0], [1]], device=DEVICE)
    valid = torch.tensor([5], dtype=torch.int32, device=DEVICE)
    wide, dense = (launch_expert_linear(part, ids, weight, valid, 0) for part in (x[:, 8:], x[:, 8:].contiguous()))
    assert torch.equal(wide, dense)

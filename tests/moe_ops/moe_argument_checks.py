"""What ``fused_moe``'s launcher makes of its arguments: strides, addresses, hints. Run by ``test_moe_kernels``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moe_ops import fused_moe_launch
from moe_ops.errors import ShapeError
from moe_ops.topk_sum_launch import sum_pairs
from tests.moe_ops.moe_cases import build
from tests.moe_ops.moe_kernel_checks import DEVICE, DTYPE, ODD, PLANS, SLICE, _slice, check_align, run


@pytest.mark.parametrize("plan", ["default", "few-pointers", "many", "many-rest", "many-wide"])
def test_strided_inputs(plan):
    """Rows farther apart than they are long, and elements of a row apart: the bits of contiguous tensors."""
    *dense, gate_up, down, live, start = build(ODD, {}, DTYPE, DEVICE)[0]
    rows_apart = [torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]] for tensor in dense]
    columns = [tensor.T.contiguous().T for tensor in dense]
    wanted, *got = (
        run(*tensors, gate_up, down, live, start, plan=PLANS[plan]) for tensors in (dense, rows_apart, columns)
    )
    assert not any(tensor.is_contiguous() for tensor in (*rows_apart, *columns))
    assert all(torch.equal(each[: ODD.live], wanted[: ODD.live]) for each in got)


def test_the_hint_and_the_mode_choose_the_plan(monkeypatch):
    asked = []

    def choose(shape, gpu, batch_invariant):
        asked.append((shape.tokens, batch_invariant))
        return PLANS["many"]

    monkeypatch.setattr(fused_moe_launch, "choose_plan", choose)
    arguments, _ = build(ODD, {}, DTYPE, DEVICE)
    for hint, invariant in ((None, False), (4, True), (1000, False)):
        run(*arguments, tokens_hint=hint, batch_invariant=invariant)
    assert asked == [(ODD.rows, False), (4, True), (ODD.rows, False)]


@pytest.mark.parametrize("position", [3, 4], ids=["gate_up", "down"])
@pytest.mark.parametrize("plan", ["default", "many", "many-wide"])
def test_weights_that_bulk_copies_cannot_reach_are_refused(plan, position):
    """A contiguous view that begins in the middle of 16 bytes; through pointers it is read as any other."""
    arguments, _ = build(ODD, {}, DTYPE, DEVICE)
    weight = arguments[position]
    view = torch.empty(weight.numel() + 1, dtype=DTYPE, device=DEVICE)[1:].view(weight.shape).copy_(weight)
    shifted = (*arguments[:position], view, *arguments[position + 1 :])
    with pytest.raises(ShapeError, match=r"clone\(\)"):
        run(*shifted, plan=PLANS[plan])
    pointers = PLANS["few-pointers"]
    assert torch.equal(run(*shifted, plan=pointers)[: ODD.live], run(*arguments, plan=pointers)[: ODD.live])


@pytest.mark.parametrize(
    "change", [{"rows": 300, "live": 290, "top_k": 8}, {"top_k": 17, "experts": 140, "local": 6}, {"top_k": 3}], ids=str
)
def test_where_the_sum_cannot_leave_rows_out_lone_changes_nothing(change):
    """Fewer rows than it looks at that way, more slots, fewer pairs than align tells of."""
    arguments, locals_, wanted = _slice(PLANS["many"], change)
    got, live = run(*arguments, plan=replace(PLANS["many"], lone=True)), int(arguments[5])
    assert (locals_ == 1).any() and torch.equal(got[:live], wanted[:live])


@pytest.mark.parametrize(("dtype", "first"), [(torch.float32, 0), (DTYPE, 1)], ids=["other dtype", "unaligned rows"])
def test_a_result_that_the_second_gemm_cannot_store_to_comes_from_the_sum(dtype, first, monkeypatch):
    arguments, locals_, _ = _slice(PLANS["many"], {})
    monkeypatch.setattr(fused_moe_launch, "sum_pairs", lambda *_, **__: None)
    out = torch.full((SLICE.rows, SLICE.hidden + 8), 7.0, dtype=dtype, device=DEVICE)
    run(*arguments, plan=replace(PLANS["many"], lone=True), out=out[:, first : first + SLICE.hidden])
    assert (locals_ == 1).any() and (out == 7).all()


@pytest.mark.parametrize(("rows", "local"), [(16600, 100), (32900, 3)])
def test_align_counts_shares_of_several_chunks(rows, local):
    """More than 1024 pairs a program, from 2^17 pairs on (2^18 with few experts)."""
    check_align(rows, 8, local, 1, rows - 20, 64)


@pytest.mark.parametrize("many", [False, True])
def test_slots_are_added_in_order_in_fp32(many):
    """2^24 + 1 is 2^24 in fp32: in order the first row is 0, backwards 1. 4096 + 0.5 is 4096 in 16 bits."""
    weights = torch.tensor([[2.0**24, 1, -(2.0**24), 0, 0], [4096, 0.5, 0.5, 1, -4096]], device=DEVICE)
    ids, live = torch.zeros(2, 5, dtype=torch.int64, device=DEVICE), torch.tensor([2], dtype=torch.int32, device=DEVICE)
    pairs, out = torch.ones(10, 16, dtype=DTYPE, device=DEVICE), torch.empty(2, 16, dtype=DTYPE, device=DEVICE)
    sum_pairs(pairs, ids, weights, live, out, 0, 1, {"PDL": False}, many=many)
    assert (out[0] == 0).all() and (out[1] == 2).all()

"""Host side of the ``fused_moe`` kernels: scratch buffers, grids and launches. Imports triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from .align import launch_align
from .fused_moe_config import Plan, Shape, Tiles, choose_plan
from .fused_moe_few_kernels import down_few_kernel, gate_up_few_kernel
from .fused_moe_kernels import topk_sum_kernel
from .fused_moe_many_kernels import down_many_kernel, gate_up_many_kernel

if TYPE_CHECKING:
    from .fused_moe import ExpertForm

_HOST_PROGRAMS = 4  # stands for the number of SMs where the kernels run in Triton's interpreter


class Problem(NamedTuple):
    """Arguments of one call, checked; ``out (M, H)`` is written."""

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    gate_up: Tensor
    down: Tensor
    valid_tokens: Tensor
    expert_start: int
    form: ExpertForm
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    out: Tensor

    @property
    def inner(self) -> int:
        return self.form.weight_sizes(self.gate_up, self.down)[1]

    def shape(self, tokens_hint: int | None) -> Shape:
        rows = self.hidden.shape[0]
        tokens = min(rows, tokens_hint) if tokens_hint else rows
        return Shape(self.gate_up.shape[0], self.topk_ids.shape[1], self.hidden.shape[1], self.inner, tokens)


def _device_of(tensor: Tensor) -> tuple[str, int]:
    """Name and number of SMs."""
    if tensor.device.type != "cuda":
        return "interpreter", _HOST_PROGRAMS
    properties = torch.cuda.get_device_properties(tensor.device)
    return properties.name, properties.multi_processor_count


def _or(bias: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel argument must be a tensor; with HAS_BIAS false it is not read."""
    return stand_in if bias is None else bias


def _tile_args(tiles: Tiles, depth: int) -> dict[str, Any]:
    return dict(
        BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_K=tiles.block_k, EVEN_K=depth % tiles.block_k == 0,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip


def _form_args(problem: Problem) -> dict[str, Any]:
    form = problem.form
    return dict(
        ACT=form.activation, GATED=form.gated, TRANSPOSED=form.transposed, INTERLEAVED=form.interleaved,
        HAS_BIAS=problem.gate_up_bias is not None, HAS_LIMIT=form.limit is not None,
    )  # fmt: skip


def _pdl(plan: Plan, device: torch.device) -> dict[str, Any]:
    on = plan.pdl and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9
    return dict(PDL=on, launch_pdl=on) if device.type == "cuda" else dict(PDL=False)


def _run_few(problem: Problem, plan: Plan, pairs: Tensor) -> None:
    hidden, ids, form = problem.hidden, problem.topk_ids, problem.form
    (rows, width), (experts, inner), top_k = hidden.shape, (problem.gate_up.shape[0], problem.inner), ids.shape[1]
    act = hidden.new_empty(rows * top_k, inner)
    chunk = min(plan.pairs, triton.next_power_of_2(ids.numel()))
    by_pair = chunk < experts
    slots = min(chunk, ids.numel()) if by_pair else experts
    routing = dict(TOP_K=top_k, PAIRS=chunk, BY_PAIR=by_pair, **_pdl(plan, hidden.device))
    gate_up_few_kernel[(triton.cdiv(inner, plan.gate_up.block_n), slots)](
        hidden, ids, problem.valid_tokens, problem.gate_up, _or(problem.gate_up_bias, problem.gate_up), act,
        rows, hidden.stride(0), problem.expert_start, experts, width, inner, form.alpha or 0.0, form.limit or 0.0,
        **routing, **_form_args(problem), **_tile_args(plan.gate_up, width),
    )  # fmt: skip
    down_few_kernel[(triton.cdiv(width, plan.down.block_n), slots)](
        act, ids, problem.valid_tokens, problem.down, _or(problem.down_bias, problem.down), pairs,
        rows, problem.expert_start, experts, width, inner,
        TRANSPOSED=form.transposed, HAS_BIAS=problem.down_bias is not None, **routing,
        **_tile_args(plan.down, inner),
    )  # fmt: skip


def _run_many(problem: Problem, plan: Plan, pairs: Tensor, programs: int) -> None:
    hidden, ids, form = problem.hidden, problem.topk_ids, problem.form
    width, inner, experts = hidden.shape[1], problem.inner, problem.gate_up.shape[0]
    if plan.gate_up.block_m != plan.down.block_m:
        raise AssertionError(f"both GEMMs share the blocks of align: {plan}")
    aligned = launch_align(ids, problem.valid_tokens, plan.gate_up.block_m, experts, problem.expert_start)
    act = hidden.new_empty(aligned[0].numel(), inner)
    gate_up_many_kernel[(programs,)](
        hidden, *aligned, problem.gate_up, _or(problem.gate_up_bias, problem.gate_up), act,
        ids.numel(), hidden.stride(0), width, inner, form.alpha or 0.0, form.limit or 0.0,
        TOP_K=ids.shape[1], GROUP=plan.group, **_form_args(problem), **_tile_args(plan.gate_up, width),
    )  # fmt: skip
    down_many_kernel[(programs,)](
        act, *aligned, problem.down, _or(problem.down_bias, problem.down), pairs,
        ids.numel(), width, inner,
        TRANSPOSED=form.transposed, HAS_BIAS=problem.down_bias is not None, GROUP=plan.group,
        **_tile_args(plan.down, inner),
    )  # fmt: skip


def _sum_pairs(problem: Problem, plan: Plan, pairs: Tensor, sms: int) -> None:
    (rows, width), block = problem.hidden.shape, 1024 if problem.hidden.shape[1] >= 1024 else 256
    tiles = triton.cdiv(width, block)
    pdl = _pdl(plan if plan.pairs else Plan(plan.gate_up, plan.down, pdl=False), problem.hidden.device)
    topk_sum_kernel[(min(rows, max(16 * sms // tiles, 1)), tiles)](
        pairs, problem.topk_ids, problem.topk_weights, problem.valid_tokens, problem.out, problem.out.stride(0),
        rows, width, problem.expert_start, problem.gate_up.shape[0],
        TOP_K=problem.topk_ids.shape[1], BLOCK_H=block, num_warps=4, **pdl,
    )  # fmt: skip


def run(problem: Problem, tokens_hint: int | None, batch_invariant: bool, plan: Plan | None = None) -> None:
    """Fill ``problem.out``: three launches for few rows, four for many."""
    rows, width = problem.hidden.shape
    if problem.topk_ids.numel() == 0 or width == 0:
        problem.out.zero_()
        return
    dense = (problem.hidden, problem.topk_ids, problem.topk_weights)
    hidden, ids, weights = (t if t.stride(-1) == 1 else t.contiguous() for t in dense)
    problem = problem._replace(hidden=hidden, topk_ids=ids.contiguous(), topk_weights=weights.contiguous())
    gpu, sms = _device_of(hidden)
    plan = plan or choose_plan(problem.shape(tokens_hint), gpu, batch_invariant)
    pairs = hidden.new_empty(rows * ids.shape[1], width)
    if plan.pairs:
        _run_few(problem, plan, pairs)
    else:
        _run_many(problem, plan, pairs, sms * plan.programs)
    _sum_pairs(problem, plan, pairs, sms)

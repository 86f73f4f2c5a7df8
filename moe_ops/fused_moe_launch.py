"""Host side of the ``fused_moe`` kernels: scratch buffers, grids and launches. Imports triton."""

# Triton's launcher takes plain values for constexpr parameters, and options that no kernel declares.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import fused_moe_wide
from .align import align_with_destinations, launch_align
from .align_kernels import ONE_LAUNCH_PAIRS
from .errors import ShapeError
from .fused_moe_config import WIDE_ROWS, Plan, Shape, Tiles, choose_plan
from .fused_moe_few_kernels import down_few_kernel, gate_up_few_kernel
from .fused_moe_many_kernels import down_many_kernel, gate_up_many_kernel
from .fused_moe_rest_kernels import down_rest_kernel, gate_up_rest_kernel
from .pdl import chain_link, chain_start
from .topk_sum_launch import SUM_ROWS, SUM_SLOTS, device_of, sum_pairs

if TYPE_CHECKING:
    from .fused_moe import ExpertForm

_TMA_ALIGN = 16  # bytes that every stride of a bulk-copied tensor is a multiple of


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
    behind_dispatch: bool = False  # the launch before this one is a dispatch that lets the first one start early

    @property
    def inner(self) -> int:
        return self.form.weight_sizes(self.gate_up, self.down)[1]

    def shape(self, tokens_hint: int | None) -> Shape:
        rows = self.hidden.shape[0]
        tokens = min(rows, tokens_hint) if tokens_hint else rows
        return Shape(self.gate_up.shape[0], self.topk_ids.shape[1], self.hidden.shape[1], self.inner, tokens)


def _or(bias: Tensor | None, stand_in: Tensor) -> Tensor:
    """A kernel argument must be a tensor; with HAS_BIAS false it is not read."""
    return stand_in if bias is None else bias


def _weights(weight: Tensor, parts: int, transposed: bool, tiles: Tiles, tma: bool) -> tuple[Any, dict[str, Any]]:
    """What a kernel reads the weights through, and its tile arguments. ``tiles.block_n`` columns of each part."""
    depth, cols = weight.shape[1:] if transposed else (weight.shape[2], weight.shape[1])
    tma = tma and (cols // parts if transposed else depth) * weight.element_size() % _TMA_ALIGN == 0
    if tma and weight.storage_offset() * weight.element_size() % _TMA_ALIGN:  # also known of fakes, see compile_ahead
        raise ShapeError(
            f"fused_moe: weights {tuple(weight.shape)} begin at an address that is no multiple of {_TMA_ALIGN} bytes, "
            "as a view into a flat tensor may; pass a copy of their own: weights.clone()."
        )
    if tma and transposed:
        view = weight.view(weight.shape[0], depth, parts, cols // parts)
        source = TensorDescriptor.from_tensor(view, [1, tiles.block_k, parts, tiles.block_n])
    elif tma:
        view = weight.view(weight.shape[0], parts, cols // parts, depth)
        source = TensorDescriptor.from_tensor(view, [1, parts, tiles.block_n, tiles.block_k])
    else:
        source = weight
    return source, {
        "TMA": tma, "SWAP": tma and tiles.swap, "EVEN_K": depth % tiles.block_k == 0,
        "BLOCK_M": tiles.block_m, "BLOCK_K": tiles.block_k,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages,
    }  # fmt: skip


def _gate_up(problem: Problem, plan: Plan) -> tuple[Any, dict[str, Any]]:
    form, tiles = problem.form, plan.gate_up
    parts = 2 if form.gated and not form.interleaved else 1
    wide = replace(tiles, block_n=2 * tiles.block_n) if form.interleaved else tiles
    source, args = _weights(problem.gate_up, parts, form.transposed, wide, plan.tma)
    return source, args | {
        "ACT": form.activation, "GATED": form.gated, "TRANSPOSED": form.transposed, "INTERLEAVED": form.interleaved,
        "HAS_BIAS": problem.gate_up_bias is not None, "HAS_LIMIT": form.limit is not None,
        "TOP_K": problem.topk_ids.shape[1], "BLOCK_N": tiles.block_n, "KEEP": plan.keep,
    }  # fmt: skip


def _down(problem: Problem, plan: Plan) -> tuple[Any, dict[str, Any]]:
    source, args = _weights(problem.down, 1, problem.form.transposed, plan.down, plan.tma)
    has_bias = problem.down_bias is not None
    return source, args | {
        "TRANSPOSED": problem.form.transposed, "HAS_BIAS": has_bias, "BLOCK_N": plan.down.block_n, "KEEP": plan.keep
    }  # fmt: skip


def _few_routing(problem: Problem, plan: Plan, tiles: Tiles) -> tuple[int, dict[str, Any]]:
    """Of a kernel for few rows: the programs that share its slots, and how they find their routing."""
    pairs, experts = problem.topk_ids.numel(), problem.gate_up.shape[0]
    chunk = min(plan.pairs, triton.next_power_of_2(pairs))
    by_pair = plan.slots > 0 or chunk < experts
    programs = min(plan.slots or chunk, pairs) if by_pair else experts
    return programs, {"PAIRS": max(chunk, tiles.block_m), "BY_PAIR": by_pair}  # a small chunk is taken as one block


def _gate_up_few(problem: Problem, plan: Plan) -> Tensor:
    """The inner activations, (M * K, I)."""
    hidden, ids, form = problem.hidden, problem.topk_ids, problem.form
    (rows, width), inner = hidden.shape, problem.inner
    programs, routing = _few_routing(problem, plan, plan.gate_up)
    act = hidden.new_empty(ids.numel(), inner)
    weights, args = _gate_up(problem, plan)
    gate_up_few_kernel[(triton.cdiv(inner, plan.gate_up.block_n), programs)](
        hidden, ids, problem.valid_tokens, weights, _or(problem.gate_up_bias, problem.gate_up), act,
        rows, hidden.stride(0), problem.expert_start, problem.gate_up.shape[0], width, inner,
        form.alpha or 0.0, form.limit or 0.0,
        **routing, **args, **chain_start(plan.pdl, hidden.device, problem.behind_dispatch),
    )  # fmt: skip
    return act


def _run_few(problem: Problem, plan: Plan, pairs: Tensor) -> None:
    act, width = _gate_up_few(problem, plan), problem.hidden.shape[1]
    programs, routing = _few_routing(problem, plan, plan.down)
    weights, args = _down(problem, plan)
    prefetch = plan.prefetch if args["TMA"] and not problem.form.transposed else 0  # columns one after the other
    down_few_kernel[(triton.cdiv(width, plan.down.block_n), programs)](
        act, problem.topk_ids, problem.valid_tokens, weights, problem.down, _or(problem.down_bias, problem.down), pairs,
        problem.hidden.shape[0], problem.expert_start, problem.gate_up.shape[0], width, problem.inner,
        TOP_K=problem.topk_ids.shape[1], PREFETCH=prefetch, **routing, **args,
        **chain_link(plan.pdl, problem.hidden.device),
    )  # fmt: skip


def _descriptor_memory(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where a kernel keeps the descriptors that it makes (Triton asks for an allocator, per thread)."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _power_of_two_rows(tiles: Tiles) -> Tiles:
    return replace(tiles, block_m=128) if tiles.block_m == WIDE_ROWS else tiles


def _parts(plan: Plan) -> Plan:
    """Tiles of the kernels that do what a last round leaves: half the columns, or quarters, two programs an SM."""
    rows, warps, stages = (1, 8, 6) if plan.rest == 2 else (2, 4, 4)
    gate_up, down = (
        Tiles(tiles.block_m // rows, tiles.block_n // 2, 64, num_warps=warps, num_stages=stages, swap=tiles.swap)
        for tiles in (plan.gate_up, plan.down)
    )
    return replace(plan, gate_up=gate_up, down=down)


def _run_many(problem: Problem, plan: Plan, pairs: Tensor, sms: int, lone: bool) -> None:
    plan = replace(plan, gate_up=_power_of_two_rows(plan.gate_up), down=_power_of_two_rows(plan.down))
    ids, inner, experts, block = problem.topk_ids, problem.inner, problem.gate_up.shape[0], plan.gate_up.block_m
    if block != plan.down.block_m:
        raise AssertionError(f"both GEMMs share the blocks of align: {plan}")
    places = None
    if lone:
        aligned, places = align_with_destinations(
            ids, problem.topk_weights, problem.valid_tokens, block, experts, problem.expert_start, pairs, problem.out
        )
    else:
        aligned = launch_align(
            ids, problem.valid_tokens, block, experts, problem.expert_start, problem.behind_dispatch
        )  # fmt: skip
    act = problem.hidden.new_empty(aligned[0].numel(), inner)
    boxes = all(size * act.element_size() % _TMA_ALIGN == 0 for size in (problem.hidden.shape[1], inner))
    plan = replace(plan, rest=plan.rest if plan.tma and boxes else 0, lone=lone)
    _gate_up_many(problem, plan, aligned, act, sms)
    _down_many(problem, plan, aligned, act, (pairs, *(places or aligned[:2])), sms)


def _gate_up_many(problem: Problem, plan: Plan, aligned: tuple[Tensor, ...], act: Tensor, sms: int) -> None:
    hidden, form, (positions, inner) = problem.hidden, problem.form, act.shape
    link = chain_link(plan.pdl, hidden.device)
    tiles = positions // plan.gate_up.block_m * triton.cdiv(inner, plan.gate_up.block_n)
    programs = min(tiles, sms * plan.programs)
    rest = (
        _or(problem.gate_up_bias, problem.gate_up), act, problem.topk_ids.numel(), hidden.stride(0), hidden.shape[1],
        inner, form.alpha or 0.0, form.limit or 0.0,
    )  # fmt: skip
    weights, args = _gate_up(problem, plan)
    link |= {"GROUP": plan.group}
    gate_up_many_kernel[(programs,)](
        hidden, *aligned, weights, *rest, FLAT=plan.gate_up.flat, WHOLE=plan.rest > 0, **link, **args
    )
    if plan.rest:
        weights, args = _gate_up(problem, _parts(plan))
        gate_up_rest_kernel[(2 * sms,)](hidden, *aligned, weights, *rest, programs, PARTS=plan.rest, **link, **args)


def _down_many(
    problem: Problem, plan: Plan, aligned: tuple[Tensor, ...], act: Tensor, out: tuple[Tensor, ...], sms: int
) -> None:  # fmt: skip
    (positions, inner), width, block = act.shape, problem.hidden.shape[1], plan.down.block_m
    link, bias = chain_link(plan.pdl, act.device), _or(problem.down_bias, problem.down)
    weights, args = _down(problem, plan)
    box_rows = args["TMA"] and inner * act.element_size() % _TMA_ALIGN == 0
    special = plan.down.special and box_rows and not problem.form.transposed
    if special:
        triton.set_allocator(_descriptor_memory)
    elif plan.down.special:  # the same accumulators over as many warps
        args["num_warps"] *= 2
    rows = TensorDescriptor.from_tensor(act, [block, plan.down.block_k]) if box_rows and not special else act
    programs = min(positions // block * triton.cdiv(width, plan.down.block_n), sms * plan.programs)
    count = problem.topk_ids.numel()
    link |= {"LONE": plan.lone, "GROUP": plan.group}
    down_many_kernel[(programs,)](
        rows, *aligned, weights, bias, *out, count, positions, width, inner,
        BOX_ROWS=box_rows, FLAT=plan.down.flat, SPECIAL=special, WHOLE=plan.rest > 0, **link, **args,
    )  # fmt: skip
    if plan.rest:
        tiles = _parts(plan).down
        weights, args = _down(problem, _parts(plan))
        rows = TensorDescriptor.from_tensor(act, [tiles.block_m, tiles.block_k])
        down_rest_kernel[(2 * sms,)](
            rows, *aligned, weights, bias, *out, count, width, inner, programs, PARTS=plan.rest, **link, **args
        )


def run(problem: Problem, tokens_hint: int | None, batch_invariant: bool, plan: Plan | None = None) -> None:
    """Fill ``problem.out``: three launches for few rows, four to seven for many (align in two, GEMMs with a rest)."""
    if problem.topk_ids.numel() == 0 or problem.hidden.shape[1] == 0:
        problem.out.zero_()
        return
    problem, plan = _prepare(problem, tokens_hint, batch_invariant, plan)
    problem = problem._replace(topk_weights=problem.topk_weights.contiguous())
    lone = _takes_lone(problem, plan)
    sum_pairs(
        _run_pairs(problem, plan, lone), problem.topk_ids, problem.topk_weights, problem.valid_tokens, problem.out,
        problem.expert_start, problem.gate_up.shape[0], chain_link(plan.pdl, problem.hidden.device), lone=lone,
    )  # fmt: skip


def _takes_lone(problem: Problem, plan: Plan) -> bool:
    """Whether the second GEMM writes the rows of ``out`` with one local pair, and the sum the others only."""
    if plan.pairs or not plan.lone or fused_moe_wide.suits(problem, plan):
        return False
    (rows, top_k), out = problem.topk_ids.shape, problem.out
    told = rows * top_k > ONE_LAUNCH_PAIRS and rows >= SUM_ROWS and top_k <= SUM_SLOTS
    places = out.data_ptr(), out.stride(0) * out.element_size(), out.shape[1] * out.element_size()
    return told and out.dtype == problem.hidden.dtype and all(place % _TMA_ALIGN == 0 for place in places)


def run_pairs(problem: Problem, tokens_hint: int | None, batch_invariant: bool) -> tuple[Tensor, Tensor, Tensor]:
    """All but the top-k sum, for a kernel that sums itself: pairs (M * K, H), ids (M, K) contiguous, weights (M, K).

    The weights are those of the problem where their rows are contiguous, however far apart: a copy would be a launch.
    Pairs of other ranks' experts and of dead rows are not written.
    """
    problem, plan = _prepare(problem, tokens_hint, batch_invariant, None)
    return _run_pairs(problem, plan), problem.topk_ids, problem.topk_weights


def _prepare(
    problem: Problem, tokens_hint: int | None, batch_invariant: bool, plan: Plan | None
) -> tuple[Problem, Plan]:
    dense = (problem.hidden, problem.topk_ids, problem.topk_weights)
    hidden, ids, weights = (t if t.stride(-1) == 1 else t.contiguous() for t in dense)
    problem = problem._replace(hidden=hidden, topk_ids=ids.contiguous(), topk_weights=weights)
    return problem, plan or choose_plan(problem.shape(tokens_hint), device_of(hidden)[0], batch_invariant)


def _run_pairs(problem: Problem, plan: Plan, lone: bool = False) -> Tensor:
    pairs = problem.hidden.new_empty(problem.topk_ids.numel(), problem.hidden.shape[1])
    if problem.topk_ids.numel() == 0 or problem.hidden.shape[1] == 0:
        return pairs
    if plan.pairs:
        _run_few(problem, plan, pairs)
    elif fused_moe_wide.suits(problem, plan):
        fused_moe_wide.run_wide(problem, plan, pairs, device_of(problem.hidden)[1])
    else:
        _run_many(problem, plan, pairs, device_of(problem.hidden)[1], lone)
    return pairs

"""Host side of ``fused_moe_wide_kernels``: which problems suit them, descriptors, launches. Imports triton."""

# Triton's launcher takes plain values for constexpr parameters, and options that no kernel declares.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .align import align_blocks
from .fused_moe_config import WIDE_ROWS, Plan, Tiles
from .fused_moe_wide_kernels import down_wide_kernel, gate_up_wide_kernel
from .pdl import chain_link

if TYPE_CHECKING:
    from .fused_moe_launch import Problem

_ROWS, _TAIL_ROWS = 128, 64  # WIDE_ROWS in powers of two
_TMA_ALIGN = 8  # elements of 16 bits that the rows of a bulk-copied matrix are a multiple of
_MAX_CHUNK = 64  # columns of gate, then of up, that lie side by side in a tile: half of what a warp group multiplies


def suits(problem: Problem, plan: Plan) -> bool:
    """Whether the plan asks for blocks of 192 and bulk copies can bring weights and activations."""
    aligned = problem.hidden.shape[1] % _TMA_ALIGN == 0 and problem.inner % _TMA_ALIGN == 0
    aligned = aligned and all(w.storage_offset() % _TMA_ALIGN == 0 for w in (problem.gate_up, problem.down))
    return plan.gate_up.block_m == WIDE_ROWS and plan.tma and aligned and not problem.form.transposed


def _gate_up_source(problem: Problem, tiles: Tiles) -> tuple[TensorDescriptor, int]:
    """Boxes of ``(block_n / CHUNK, parts, CHUNK, block_k)`` of ``gate_up``, and CHUNK.

    Gate and up columns take turns CHUNK by CHUNK, so that one thread holds both of a pair.
    """
    weight, form, inner = problem.gate_up, problem.form, problem.inner
    experts, rows, depth = weight.shape
    parts = form.projections()
    if parts == 1:
        return _down_source(weight, tiles), tiles.block_n
    chunk = 1 if form.interleaved else math.gcd(inner, min(_MAX_CHUNK, tiles.block_n))
    within = (2 * depth, depth) if form.interleaved else (chunk * depth, inner * depth)
    view = TensorDescriptor(
        weight, [experts, inner // chunk, parts, chunk, depth], [rows * depth, *within, depth, 1],
        [1, tiles.block_n // chunk, parts, chunk, tiles.block_k],
    )  # fmt: skip
    return view, chunk


def _down_source(weight: Tensor, tiles: Tiles) -> TensorDescriptor:
    experts, cols, depth = weight.shape
    view = weight.view(experts, 1, 1, cols, depth)
    return TensorDescriptor.from_tensor(view, [1, 1, 1, tiles.block_n, tiles.block_k])


def _row_boxes(act: Tensor, columns: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    main, tail = (TensorDescriptor.from_tensor(act, [rows, columns]) for rows in (_ROWS, _TAIL_ROWS))
    return main, tail


def _options(tiles: Tiles, plan: Plan, problem: Problem) -> dict[str, Any]:
    return {
        "ROWS": _ROWS, "TAIL_ROWS": _TAIL_ROWS, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
        "num_warps": tiles.num_warps, "num_stages": tiles.num_stages, "GROUP": plan.group,
        **chain_link(plan.pdl, problem.hidden.device),
    }  # fmt: skip


def run_wide(problem: Problem, plan: Plan, pairs: Tensor, sms: int) -> None:
    """Fill ``pairs (M * K, H)``, rows of local pairs: align and the two projections."""
    hidden, ids, form, inner = problem.hidden, problem.topk_ids, problem.form, problem.inner
    width, experts = hidden.shape[1], problem.gate_up.shape[0]
    aligned = align_blocks(ids, problem.valid_tokens, WIDE_ROWS, experts, problem.expert_start)
    positions = aligned[0].numel()
    act = hidden.new_empty(positions, inner)
    weights, chunk = _gate_up_source(problem, plan.gate_up)
    bias, blocks = problem.gate_up_bias, positions // WIDE_ROWS
    gate_up_wide_kernel[(min(blocks * triton.cdiv(inner, plan.gate_up.block_n), sms * plan.programs),)](
        hidden, *aligned, weights, problem.gate_up if bias is None else bias, *_row_boxes(act, plan.gate_up.block_n),
        ids.numel(), hidden.stride(0), width, inner, form.alpha or 0.0, form.limit or 0.0,
        TOP_K=ids.shape[1], ACT=form.activation, GATED=form.gated, INTERLEAVED=form.interleaved,
        HAS_BIAS=bias is not None, HAS_LIMIT=form.limit is not None, CHUNK=chunk,
        EVEN_K=width % plan.gate_up.block_k == 0, **_options(plan.gate_up, plan, problem),
    )  # fmt: skip
    bias = problem.down_bias
    down_wide_kernel[(min(blocks * triton.cdiv(width, plan.down.block_n), sms * plan.programs),)](
        *_row_boxes(act, plan.down.block_k), *aligned, _down_source(problem.down, plan.down),
        problem.down if bias is None else bias, pairs, ids.numel(), width, inner,
        HAS_BIAS=bias is not None, **_options(plan.down, plan, problem),
    )  # fmt: skip

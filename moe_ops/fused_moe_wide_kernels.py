"""Device code of ``fused_moe`` for many rows in blocks of 192: two row operands, 128 and 64, for one tile of weights.

For a mean of about 128 rows an expert, where half of the experts would need a second block of 128: here each reads its
weights once. Tiles of 192 rows are no power of two, so they are two products with one tile of weights. A block computes
as many of its 64-row parts as have pairs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_moe_kernels import activate, pointwise, store_tile
from .fused_moe_many_kernels import grouped_tile


@triton.jit
def _row_tile(x, where, mask, k, depth, BOX_ROWS: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr):
    """``(rows, BLOCK_K)``: columns from k on; ``where`` the first row of a box, or pointers to each row's columns."""
    if BOX_ROWS:
        return x.load([where, k])
    elif EVEN_K:
        return tl.load(where + k, mask=mask[:, None], other=0.0)
    else:
        inside = tl.arange(0, BLOCK_K) < depth - k
        return tl.load(where + k, mask=mask[:, None] & inside[None, :], other=0.0)


@triton.jit
def _products(
    x, where, mask, tail, tail_where, tail_mask, w, expert, chunk, col, depth,
    MAIN: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, TAIL_ROWS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, BOX_ROWS: tl.constexpr,
):  # fmt: skip
    """fp32 ``(ROWS, WIDTH)`` and ``(TAIL_ROWS, WIDTH)``: two row operands times one tile of weights, read once.

    MAIN, TAIL: which of the two are wanted; the other stays zero. ``w``: see ``fused_moe_wide.weight_source``.
    """
    acc = tl.zeros((ROWS, WIDTH), tl.float32)
    tail_acc = tl.zeros((TAIL_ROWS, WIDTH), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if MAIN:
            rows = _row_tile(x, where, mask, k, depth, BOX_ROWS, BLOCK_K, EVEN_K)
        if TAIL:
            tail_rows = _row_tile(tail, tail_where, tail_mask, k, depth, BOX_ROWS, BLOCK_K, EVEN_K)
        columns = w.load([expert, chunk, 0, col, k]).reshape(WIDTH, BLOCK_K).T
        if MAIN:
            acc = tl.dot(rows, columns, acc)
        if TAIL:
            tail_acc = tl.dot(tail_rows, columns, tail_acc)
    return acc, tail_acc


@triton.jit
def _activated(
    acc, bias_ptr, expert, tile, inner, alpha, limit, ACT: tl.constexpr, GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Bias and activation: CHUNK columns of gate, as many of up, the next of gate, ... to ``(ROWS, BLOCK_N)``."""
    PARTS: tl.constexpr = 2 if GATED else 1
    if HAS_BIAS:
        at = tl.arange(0, PARTS * BLOCK_N)
        col = tile * BLOCK_N + at // (PARTS * CHUNK) * CHUNK + at % CHUNK
        part = at // CHUNK % PARTS
        where = col * PARTS + part if INTERLEAVED else part * inner + col
        bias = tl.load(bias_ptr + expert * PARTS * inner + where, mask=col < inner, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if GATED:
        parts = tl.permute(tl.reshape(acc, (ROWS, BLOCK_N // CHUNK, 2, CHUNK)), (0, 1, 3, 2))
        gate, up = tl.split(parts)
        return tl.reshape(activate(gate, up, alpha, limit, ACT, HAS_LIMIT), (ROWS, BLOCK_N))
    else:
        return pointwise(acc, ACT)


@triton.jit
def _gathered_rows(x_ptr, sorted_ptr, position, num_pairs, x_stride, ROWS: tl.constexpr, TOP_K: tl.constexpr,
                   BLOCK_K: tl.constexpr):  # fmt: skip
    """Pointers to the first columns of the rows of ROWS pairs, and which of these there are."""
    pairs = tl.load(sorted_ptr + position + tl.arange(0, ROWS))
    rows = (pairs // TOP_K).to(tl.int64) * x_stride
    return x_ptr + rows[:, None] + tl.arange(0, BLOCK_K)[None, :], pairs < num_pairs


@triton.jit
def gate_up_wide_kernel(
    x_ptr, sorted_ptr, expert_ids_ptr, total_ptr, w, bias_ptr, act, tail,
    num_pairs, x_stride, hidden, inner, alpha, limit,
    TOP_K: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_LIMIT: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, TAIL_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``act[position] = act(x[sorted[position] // K] @ gate_up[expert] + bias)``. Grid: persistent.

    ``act``, ``tail``: descriptors of one tensor (S, I), boxes of ROWS and TAIL_ROWS rows. Rows of a block's parts
    without pairs are not written.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    WIDTH: tl.constexpr = 2 * BLOCK_N if GATED else BLOCK_N
    num_blocks = tl.load(total_ptr) // (ROWS + TAIL_ROWS)
    num_tiles = tl.cdiv(inner, BLOCK_N)
    for index in range(tl.program_id(0), num_blocks * num_tiles, tl.num_programs(0)):
        block, tile = grouped_tile(index, num_blocks, num_tiles, GROUP)
        expert = tl.load(expert_ids_ptr + block)
        first = block * (ROWS + TAIL_ROWS)
        chunk, col = (tile * (BLOCK_N // CHUNK), 0) if GATED else (0, tile * BLOCK_N)
        if tl.load(sorted_ptr + first + TAIL_ROWS) < num_pairs:
            where, mask = _gathered_rows(x_ptr, sorted_ptr, first, num_pairs, x_stride, ROWS, TOP_K, BLOCK_K)
            if tl.load(sorted_ptr + first + ROWS) < num_pairs:
                tail_where, tail_mask = _gathered_rows(
                    x_ptr, sorted_ptr, first + ROWS, num_pairs, x_stride, TAIL_ROWS, TOP_K, BLOCK_K
                )
                acc, tail_acc = _products(
                    x_ptr, where, mask, x_ptr, tail_where, tail_mask, w, expert, chunk, col, hidden,
                    True, True, ROWS, TAIL_ROWS, WIDTH, BLOCK_K, EVEN_K, False,
                )  # fmt: skip
                tail_value = _activated(tail_acc, bias_ptr, expert, tile, inner, alpha, limit, ACT, GATED, INTERLEAVED,
                                        HAS_BIAS, HAS_LIMIT, TAIL_ROWS, BLOCK_N, CHUNK)  # fmt: skip
                tail.store([first + ROWS, tile * BLOCK_N], tail_value.to(tail.dtype))
            else:
                acc, _ = _products(
                    x_ptr, where, mask, x_ptr, where, mask, w, expert, chunk, col, hidden,
                    True, False, ROWS, TAIL_ROWS, WIDTH, BLOCK_K, EVEN_K, False,
                )  # fmt: skip
            value = _activated(acc, bias_ptr, expert, tile, inner, alpha, limit, ACT, GATED, INTERLEAVED,
                               HAS_BIAS, HAS_LIMIT, ROWS, BLOCK_N, CHUNK)  # fmt: skip
            act.store([first, tile * BLOCK_N], value.to(act.dtype))
        else:
            few_where, few_mask = _gathered_rows(
                x_ptr, sorted_ptr, first, num_pairs, x_stride, TAIL_ROWS, TOP_K, BLOCK_K
            )
            _, few_acc = _products(
                x_ptr, few_where, few_mask, x_ptr, few_where, few_mask, w, expert, chunk, col, hidden,
                False, True, ROWS, TAIL_ROWS, WIDTH, BLOCK_K, EVEN_K, False,
            )  # fmt: skip
            few_value = _activated(few_acc, bias_ptr, expert, tile, inner, alpha, limit, ACT, GATED, INTERLEAVED,
                                   HAS_BIAS, HAS_LIMIT, TAIL_ROWS, BLOCK_N, CHUNK)  # fmt: skip
            tail.store([first, tile * BLOCK_N], few_value.to(tail.dtype))


@triton.jit
def _store_rows(
    out_ptr, sorted_ptr, first, num_pairs, acc, bias_ptr, expert, tile, hidden,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of ``acc``, plus bias, to the rows of ``out`` that their pairs name."""
    if HAS_BIAS:
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        bias = tl.load(bias_ptr + expert * hidden + cols, mask=cols < hidden, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    pairs = tl.load(sorted_ptr + first + tl.arange(0, ROWS))
    store_tile(out_ptr, pairs.to(tl.int64), pairs < num_pairs, tile, hidden, acc, BLOCK_N, False)


@triton.jit
def down_wide_kernel(
    act, tail, sorted_ptr, expert_ids_ptr, total_ptr, w, bias_ptr, out_ptr,
    num_pairs, hidden, inner,
    HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, PDL: tl.constexpr,
    ROWS: tl.constexpr, TAIL_ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[sorted[position]] = act[position] @ down[expert] + bias``. Grid: persistent.

    ``act``, ``tail``: descriptors of one tensor (S, I), boxes of ROWS and TAIL_ROWS rows.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    num_blocks = tl.load(total_ptr) // (ROWS + TAIL_ROWS)
    num_tiles = tl.cdiv(hidden, BLOCK_N)
    for index in range(tl.program_id(0), num_blocks * num_tiles, tl.num_programs(0)):
        block, tile = grouped_tile(index, num_blocks, num_tiles, GROUP)
        expert = tl.load(expert_ids_ptr + block)
        first = block * (ROWS + TAIL_ROWS)
        col = tile * BLOCK_N
        if tl.load(sorted_ptr + first + TAIL_ROWS) < num_pairs:
            if tl.load(sorted_ptr + first + ROWS) < num_pairs:
                acc, tail_acc = _products(
                    act, first, None, tail, first + ROWS, None, w, expert, 0, col, inner,
                    True, True, ROWS, TAIL_ROWS, BLOCK_N, BLOCK_K, True, True,
                )  # fmt: skip
                _store_rows(out_ptr, sorted_ptr, first + ROWS, num_pairs, tail_acc, bias_ptr, expert, tile, hidden,
                            HAS_BIAS, TAIL_ROWS, BLOCK_N)  # fmt: skip
            else:
                acc, _ = _products(
                    act, first, None, tail, first, None, w, expert, 0, col, inner,
                    True, False, ROWS, TAIL_ROWS, BLOCK_N, BLOCK_K, True, True,
                )  # fmt: skip
            _store_rows(out_ptr, sorted_ptr, first, num_pairs, acc, bias_ptr, expert, tile, hidden,
                        HAS_BIAS, ROWS, BLOCK_N)  # fmt: skip
        else:
            _, few_acc = _products(
                act, first, None, tail, first, None, w, expert, 0, col, inner,
                False, True, ROWS, TAIL_ROWS, BLOCK_N, BLOCK_K, True, True,
            )  # fmt: skip
            _store_rows(out_ptr, sorted_ptr, first, num_pairs, few_acc, bias_ptr, expert, tile, hidden,
                        HAS_BIAS, TAIL_ROWS, BLOCK_N)  # fmt: skip

"""Device code of decode attention: one query token a sequence against a static cache, spans of columns side by side."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def live_range(mask_ptr, first, length, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Columns ``[low, high)`` of ``[first, first + SPAN)`` outside which the mask is 0; ``low`` a multiple of BLOCK.

    Example: mask 0 0 0 0 0 1 0 1 1 0 0 0, first 0, SPAN 16, BLOCK 4: low 4, high 9. Without a live column: high 0.
    """
    columns = first + tl.arange(0, SPAN)
    live = tl.load(mask_ptr + columns, mask=columns < length, other=0) != 0
    low = tl.min(tl.where(live, columns, first + SPAN))
    return low // BLOCK * BLOCK, tl.max(tl.where(live, columns + 1, 0))


@triton.jit
def attend_columns(
    q, k_ptr, v_ptr, mask_ptr, pair, low, high, without, scale, length, top, total, sums,
    DEPTH: tl.constexpr, DEPTH_V: tl.constexpr, DEPTH_PAD: tl.constexpr, DEPTH_V_PAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A running softmax over the live columns in ``[low, high)`` but ``without``: ``(top, total, sums)`` after them.

    Of a row, ``top`` is the largest score so far (base 2), ``total`` the sum of weights relative to it, ``sums`` of
    weighted values. Nothing outside the live columns is read.
    Example: q 1, keys 0 and ln 3, values 0 and 4: top log2(3), total 1/3 + 1 = 4/3, sums 4; their quotient is 3.
    """
    depth, depth_v = tl.arange(0, DEPTH_PAD), tl.arange(0, DEPTH_V_PAD)
    for start in range(low, high, BLOCK):
        column = start + tl.arange(0, BLOCK)
        keep = (tl.load(mask_ptr + column, mask=column < high, other=0) != 0) & (column != without)
        at = (pair * length + column)[:, None]
        k = tl.load(k_ptr + at * DEPTH + depth[None, :], mask=keep[:, None] & (depth < DEPTH)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * (tl.cast(scale, tl.float32) * 1.4426950408889634)
        scores = tl.where(keep[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        v = tl.load(
            v_ptr + at * DEPTH_V + depth_v[None, :], mask=keep[:, None] & (depth_v < DEPTH_V)[None, :], other=0.0
        )
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total, top = total * shrink + tl.sum(weights, 1), higher
    return top, total, sums


@triton.jit
def _attend_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, stats_ptr, mask_stride, scale, kv_heads, length,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_V: tl.constexpr,
    DEPTH_PAD: tl.constexpr, DEPTH_V_PAD: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Softmax over one span of columns for the GROUP query heads of one key head. Grid: (B * kv_heads, SPANS).

    With one span the result goes to ``out (B, heads, DEPTH_V)`` as it should be; else ``out`` is
    ``(B, heads, SPANS, DEPTH_V)`` fp32, each span normalised by itself, and ``stats (B, heads, SPANS)`` fp32 holds the
    base-2 logarithm of its sum. Nothing outside the live columns is read. Rows without one become 0.
    Example: q 1, scale 1, column 0 with key 0 and value 0, column 128 with key ln 3 and value 4, no other live. SPAN
    256: out 3. SPAN 128: out 0 and 4, stats 0 and log2(3).
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    pair = tl.program_id(0).to(tl.int64)  # sequence * kv_heads + key head
    span = tl.program_id(1)
    row, depth, depth_v = tl.arange(0, ROWS), tl.arange(0, DEPTH_PAD), tl.arange(0, DEPTH_V_PAD)
    mask_ptr += pair // kv_heads * mask_stride
    low, high = live_range(mask_ptr, span * SPAN, length, SPAN, BLOCK)
    heads = pair * GROUP + row
    inside = (row < GROUP)[:, None] & (depth < DEPTH)[None, :]
    q = tl.load(q_ptr + heads[:, None] * DEPTH + depth[None, :], mask=inside, other=0.0)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    sums = tl.zeros((ROWS, DEPTH_V_PAD), tl.float32)
    top, total, sums = attend_columns(
        q, k_ptr, v_ptr, mask_ptr, pair, low, high, -1, scale, length, top, total, sums,
        DEPTH, DEPTH_V, DEPTH_PAD, DEPTH_V_PAD, BLOCK,
    )  # fmt: skip
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    place = heads * SPANS + span
    inside = (row < GROUP)[:, None] & (depth_v < DEPTH_V)[None, :]
    tl.store(out_ptr + place[:, None] * DEPTH_V + depth_v[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
    if SPANS > 1:
        tl.store(stats_ptr + place, top + tl.log2(total), mask=row < GROUP)


@triton.jit
def _merge_kernel(
    parts_ptr, stats_ptr, out_ptr,
    DEPTH_V: tl.constexpr, DEPTH_V_PAD: tl.constexpr, SPANS: tl.constexpr, SPANS_PAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one sequence from its spans, weighted by their sums. Grid: (B * heads,).

    Example: parts 0 and 4, stats 0 and log2(3): weights 1/3 and 1, out 4 / (4/3) = 3.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
    head = tl.program_id(0).to(tl.int64)
    span, depth = tl.arange(0, SPANS_PAD), tl.arange(0, DEPTH_V_PAD)
    stats = tl.load(stats_ptr + head * SPANS + span, mask=span < SPANS, other=float("-inf"))
    top = tl.max(stats, 0)
    weights = tl.exp2(stats - tl.where(top == float("-inf"), 0.0, top))
    inside = (span < SPANS)[:, None] & (depth < DEPTH_V)[None, :]
    parts = tl.load(parts_ptr + (head * SPANS + span)[:, None] * DEPTH_V + depth[None, :], mask=inside, other=0.0)
    total = tl.sum(weights, 0)
    result = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out_ptr + head * DEPTH_V + depth, result.to(out_ptr.dtype.element_ty), mask=depth < DEPTH_V)

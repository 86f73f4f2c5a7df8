"""Device code of ``rotate_and_attend``: the new token's query, key and value on their way, then decode attention."""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_kernels import attend_columns, live_range


@triton.jit
def prepared(x_ptr, inside, depth, norm_ptr, eps, cos_ptr, sin_ptr, TURNED: tl.constexpr, NORM: tl.constexpr,
             DEPTH: tl.constexpr):  # fmt: skip
    """Rows ``x_ptr (rows, 1)`` of DEPTH columns ``depth (1, columns)``, normalised and rotated, fp32.

    Example: DEPTH 4, TURNED 2, no norm, row 1 2 3 4, cos 0 0, sin 1 1: -2 1 3 4.
    """
    x = tl.load(x_ptr + depth, mask=inside, other=0.0).to(tl.float32)
    turns = depth < TURNED
    other = tl.where(depth < TURNED // 2, depth + TURNED // 2, depth - TURNED // 2)
    y = tl.load(x_ptr + other, mask=inside & turns, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.rsqrt(tl.sum(x * x, 1) / DEPTH + tl.cast(eps, tl.float32))[:, None]
        x = x * scale * tl.load(norm_ptr + depth, mask=depth < DEPTH, other=0.0).to(tl.float32)
        y = y * scale * tl.load(norm_ptr + other, mask=turns, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + depth, mask=turns, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + depth, mask=turns, other=0.0).to(tl.float32)
    return x * cos + tl.where(depth < TURNED // 2, -y, y) * sin


@triton.jit
def _rotate_and_attend_kernel(
    new, norms, query_eps, key_eps, angles, cache, columns_ptr, mask_ptr, out_ptr, stats_ptr, mask_stride, scale,
    kv_heads, length,
    GROUP: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr, DEPTH_V: tl.constexpr,
    DEPTH_PAD: tl.constexpr, DEPTH_V_PAD: tl.constexpr, TURNED: tl.constexpr, NORMS: tl.constexpr,
    BLOCK: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As ``_attend_kernel``, and the same grid, with the new token prepared first.

    ``new``: query, key, value; ``norms``: their weights, or anything where NORMS says there is none; ``angles``: cos,
    sin; ``cache``: keys, values. Every program of a key head prepares its queries. The one in whose span the new column
    lies writes key and value there and starts its softmax with them; no program reads that column.
    Example: D = 2, new column 1, cos 0 0, sin 1 1, new key and value 3 4: the cache gets -4 3 and 3 4. A query of zeros
    sees columns 0 and 1 alike: of values 1 5 and 3 4 the mean, 2 4.5.
    """
    pair = tl.program_id(0).to(tl.int64)  # sequence * kv_heads + key head
    sequence, first = pair // kv_heads, tl.program_id(1) * SPAN
    row, depth, depth_v = tl.arange(0, ROWS), tl.arange(0, DEPTH_PAD)[None, :], tl.arange(0, DEPTH_V_PAD)[None, :]
    mask_ptr += sequence * mask_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    low, high = live_range(mask_ptr, first, length, SPAN, BLOCK)
    cos_ptr, sin_ptr = angles[0] + sequence * TURNED, angles[1] + sequence * TURNED
    heads = pair * GROUP + row
    inside = (row < GROUP)[:, None] & (depth < DEPTH)
    q = prepared(
        new[0] + heads[:, None] * DEPTH, inside, depth, norms[0], query_eps, cos_ptr, sin_ptr, TURNED, NORMS[0], DEPTH
    ).to(new[0].dtype.element_ty)
    one = tl.arange(0, 1)[:, None]
    k = prepared(
        new[1] + pair * DEPTH + one, depth < DEPTH, depth, norms[1], key_eps, cos_ptr, sin_ptr, TURNED, NORMS[1], DEPTH
    ).to(new[1].dtype.element_ty)
    v = tl.load(new[2] + pair * DEPTH_V + depth_v, mask=depth_v < DEPTH_V, other=0.0)
    column = tl.load(columns_ptr + sequence)
    mine = (column >= first) & (column < first + SPAN)
    at = pair * length + column
    tl.store(cache[0] + at * DEPTH + depth, k, mask=depth < tl.where(mine, DEPTH, 0))
    tl.store(cache[1] + at * DEPTH_V + depth_v, v, mask=depth_v < tl.where(mine, DEPTH_V, 0))
    seen = mine & (tl.load(mask_ptr + column) != 0)
    score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1) * (tl.cast(scale, tl.float32) * 1.4426950408889634)
    top = tl.where(seen, score, float("-inf"))
    total = tl.where(seen, 1.0, 0.0) + tl.zeros((ROWS,), tl.float32)
    sums = tl.where(seen, v.to(tl.float32), 0.0) + tl.zeros((ROWS, DEPTH_V_PAD), tl.float32)
    top, total, sums = attend_columns(
        q, cache[0], cache[1], mask_ptr, pair, low, high, column, scale, length, top, total, sums,
        DEPTH, DEPTH_V, DEPTH_PAD, DEPTH_V_PAD, BLOCK,
    )  # fmt: skip
    result = sums / tl.where(total > 0, total, 1.0)[:, None]
    place = heads * SPANS + tl.program_id(1)
    inside = (row < GROUP)[:, None] & (depth_v < DEPTH_V)
    tl.store(out_ptr + place[:, None] * DEPTH_V + depth_v, result.to(out_ptr.dtype.element_ty), mask=inside)
    if SPANS > 1:
        tl.store(stats_ptr + place, top + tl.log2(total), mask=row < GROUP)

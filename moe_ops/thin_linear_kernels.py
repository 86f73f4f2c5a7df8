"""Device code of ``thin_linear``: few rows times several weights, bounded by reading the weights once."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product_whole(
    x_ptr, w_ptr, out_ptr, first, width, rows, depth, begin, end,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``out[:, first : first + BLOCK_N] = x @ w[first : first + BLOCK_N].T`` over depths ``begin ... end - 1``.

    The weights are the left operand.
    """
    row, column = tl.arange(0, ROWS), first + tl.arange(0, BLOCK_N)
    inside = column < width
    sums = tl.zeros((BLOCK_N, ROWS), tl.float32)
    w_ptr += column.to(tl.int64)[:, None] * depth
    x_ptr += row.to(tl.int64)[None, :] * depth
    for start in range(begin, end, PART):
        at = start + tl.arange(0, PART)
        left = inside[:, None] if EVEN_K else inside[:, None] & (at < end)[None, :]
        right = (row < rows)[None, :] if EVEN_K else (row < rows)[None, :] & (at < end)[:, None]
        w = tl.load(w_ptr + at[None, :], mask=left, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + at[:, None], mask=right, other=0.0)
        sums = tl.dot(w, x, sums, input_precision="ieee")
    place = out_ptr + row.to(tl.int64)[None, :] * width + column[:, None]
    tl.store(place, sums.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (row < rows)[None, :])


@triton.jit
def _product_in_parts(
    x_ptr, w_ptr, out_ptr, first, width, rows, depth, begin, end,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """As ``_product_whole``.

    PARTS pieces of PART are summed apart, so that no product waits for the one before; all are added at the end.
    """
    row, column = tl.arange(0, ROWS), first + tl.arange(0, BLOCK_N)
    inside = (column < width)[None, :, None]
    offset = tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    sums = tl.zeros((PARTS, BLOCK_N, ROWS), tl.float32)
    w_ptr += column.to(tl.int64)[None, :, None] * depth
    x_ptr += row.to(tl.int64)[None, None, :] * depth
    for start in range(begin, end, PARTS * PART):
        at = start + offset
        left = inside if EVEN_K else inside & (at < end)[:, None, :]
        right = (row < rows)[None, None, :] if EVEN_K else (row < rows)[None, None, :] & (at < end)[:, :, None]
        w = tl.load(w_ptr + at[:, None, :], mask=left, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + at[:, :, None], mask=right, other=0.0)
        sums = tl.dot(w, x, sums, input_precision="ieee")
    place = out_ptr + row.to(tl.int64)[None, :] * width + column[:, None]
    total = tl.sum(sums, 0).to(out_ptr.dtype.element_ty)
    tl.store(place, total, mask=(column < width)[:, None] & (row < rows)[None, :])


@triton.jit
def _thin_linear_kernel(
    x_ptr, weights, outs, widths, rows, depth, piece,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``outs[i][p] = x (rows, depth) @ weights[i] (widths[i], depth).T`` over the p-th ``piece`` of the depth.

    Grid: (BLOCK_N columns of one output each; the outputs one after the other, pieces of depth). Each output element is
    summed in the same order whatever the number of rows, so a row's result does not depend on the others.
    Example: widths (48, 16), BLOCK_N 32: programs 0 and 1 serve output 0, program 2 output 1.
    """
    tile, p = tl.program_id(0), tl.program_id(1)
    begin, end = p * piece, tl.minimum(p * piece + piece, depth)
    for i in tl.static_range(len(weights)):
        tiles = tl.cdiv(widths[i], BLOCK_N)
        if (tile >= 0) & (tile < tiles):
            first, width = tile * BLOCK_N, widths[i]
            out = outs[i] + p * rows * width
            if PARTS == 1:
                _product_whole(
                    x_ptr, weights[i], out, first, width, rows, depth, begin, end, ROWS, BLOCK_N, PART, EVEN_K
                )
            else:
                _product_in_parts(
                    x_ptr, weights[i], out, first, width, rows, depth, begin, end, ROWS, BLOCK_N, PARTS, PART, EVEN_K
                )
        tile -= tiles

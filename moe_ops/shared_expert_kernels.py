"""Device code of the shared expert: the pointwise step between its GEMMs, and both first GEMMs with it for few rows."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

BLOCK = 1024
_BLOCK = tl.constexpr(BLOCK)


@triton.jit
def silu_and_mul_kernel(gate_ptr, up_ptr, out_ptr, gate_stride, up_stride, inner, ROUND_EACH: tl.constexpr):
    """``out (T, S) = silu(gate) * up``. Grid: T x blocks of S. Example: gate 0 gives 0; gate 1, up 2 gives 1.4621.

    ``exp`` and the division are those that Inductor emits for ``silu``, so that the bits are too.
    """
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * _BLOCK + tl.arange(0, _BLOCK)
    mask = columns < inner
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    value = gate / (libdevice.exp(-gate) + 1.0)
    if ROUND_EACH:
        value = value.to(out_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + row * inner + columns, (value * up).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _in_parts(
    x_ptr, w_ptr, sums, start, column, width, rows, depth,
    ROWS: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``sums (PARTS, BLOCK_N, ROWS)`` plus products of PARTS pieces of PART from ``start`` on; w is the left operand.

    Each warp takes a piece: in one sum every product waits for the one before, and DeepSeek-V3's 448 steps took 10 us.
    """
    at = start + tl.arange(0, PARTS)[:, None] * PART + tl.arange(0, PART)[None, :]
    row, inside = tl.arange(0, ROWS), (column < width)[None, :, None]
    left = inside if EVEN else inside & (at < depth)[:, None, :]
    right = (row < rows)[None, None, :] if EVEN else (row < rows)[None, None, :] & (at < depth)[:, :, None]
    w_at = column.to(tl.int64)[None, :, None] * depth + at[:, None, :]
    w = tl.load(w_ptr + w_at, mask=left, other=0.0, eviction_policy="evict_first")
    x = tl.load(x_ptr + row.to(tl.int64)[None, None, :] * depth + at[:, :, None], mask=right, other=0.0)
    return tl.dot(w, x, sums, input_precision="ieee")


@triton.jit
def _store_tile(out_ptr, values, column, width, rows, ROWS: tl.constexpr):
    """``values (BLOCK_N, ROWS)`` to ``out[:rows, column]``, rounded."""
    row = tl.arange(0, ROWS)
    place = out_ptr + row.to(tl.int64)[None, :] * width + column[:, None]
    tl.store(place, values.to(out_ptr.dtype.element_ty), mask=(column < width)[:, None] & (row < rows)[None, :])


@triton.jit
def thin_gate_up_kernel(
    x_ptr, gate_ptr, up_ptr, out_ptr, rows, inner, depth,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``out (T, S) = silu(x @ gate.T) * (x @ up.T)``, x (T, H), weights (S, H). Grid: blocks of BLOCK_N of S.

    Both products are rounded, then their activation.
    Example: x [[1, 1]], gate [[0.5, 0.5]], up [[1, 1]]: products 1 and 2 give 1.4621.
    """
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gates, ups = tl.zeros((PARTS, BLOCK_N, ROWS), tl.float32), tl.zeros((PARTS, BLOCK_N, ROWS), tl.float32)
    for start in range(0, depth, PARTS * PART):
        gates = _in_parts(x_ptr, gate_ptr, gates, start, column, inner, rows, depth, ROWS, PARTS, PART, EVEN)
        ups = _in_parts(x_ptr, up_ptr, ups, start, column, inner, rows, depth, ROWS, PARTS, PART, EVEN)
    gate, up = tl.sum(gates, 0).to(DTYPE).to(tl.float32), tl.sum(ups, 0).to(DTYPE).to(tl.float32)
    _store_tile(out_ptr, gate / (tl.exp(-gate) + 1.0) * up, column, inner, rows, ROWS)


@triton.jit
def thin_product_kernel(
    x_ptr, w_ptr, out_ptr, rows, width, depth,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``out (T, H) = x (T, S) @ w (H, S).T``. Grid: blocks of BLOCK_N of H. Example: x [[1, 1]], w [[2, 3]] gives 5."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((PARTS, BLOCK_N, ROWS), tl.float32)
    for start in range(0, depth, PARTS * PART):
        sums = _in_parts(x_ptr, w_ptr, sums, start, column, width, rows, depth, ROWS, PARTS, PART, EVEN)
    _store_tile(out_ptr, tl.sum(sums, 0), column, width, rows, ROWS)

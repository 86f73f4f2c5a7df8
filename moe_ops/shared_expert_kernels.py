"""Device code of the shared expert: the pointwise step between its GEMMs, and both first GEMMs with it for few rows."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from .thin_linear_kernels import _product_whole

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
def thin_gate_up_kernel(
    x_ptr, gate_ptr, up_ptr, out_ptr, rows, inner, depth,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``out (T, S) = silu(x @ gate.T) * (x @ up.T)``, x (T, H), weights (S, H). Grid: blocks of BLOCK_N of S.

    Both products are rounded, then their activation. The weights, which are read once, are the left operand.
    Example: x [[1, 1]], gate [[0.5, 0.5]], up [[1, 1]]: products 1 and 2 give 1.4621.
    """
    row, column = tl.arange(0, ROWS), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside, lanes = column < inner, tl.arange(0, PART)
    weight_at = column.to(tl.int64)[:, None] * depth + lanes[None, :]
    x_at = row.to(tl.int64)[None, :] * depth + lanes[:, None]
    gate, up = tl.zeros((BLOCK_N, ROWS), tl.float32), tl.zeros((BLOCK_N, ROWS), tl.float32)
    for start in range(0, depth, PART):
        left = inside[:, None] if EVEN else inside[:, None] & (start + lanes < depth)[None, :]
        right = (row < rows)[None, :] if EVEN else (row < rows)[None, :] & (start + lanes < depth)[:, None]
        x = tl.load(x_ptr + x_at + start, mask=right, other=0.0)
        w = tl.load(gate_ptr + weight_at + start, mask=left, other=0.0, eviction_policy="evict_first")
        gate = tl.dot(w, x, gate, input_precision="ieee")
        w = tl.load(up_ptr + weight_at + start, mask=left, other=0.0, eviction_policy="evict_first")
        up = tl.dot(w, x, up, input_precision="ieee")
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    gate, up = gate.to(DTYPE).to(tl.float32), up.to(DTYPE).to(tl.float32)
    place = out_ptr + row.to(tl.int64)[None, :] * inner + column[:, None]
    value = gate / (tl.exp(-gate) + 1.0) * up
    tl.store(place, value.to(DTYPE), mask=inside[:, None] & (row < rows)[None, :])


@triton.jit
def thin_product_kernel(
    x_ptr, w_ptr, out_ptr, rows, width, depth,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PART: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """``out (T, H) = x (T, S) @ w (H, S).T``. Grid: blocks of BLOCK_N of H. Example: x [[1, 1]], w [[2, 3]] gives 5."""
    first = tl.program_id(0) * BLOCK_N
    _product_whole(x_ptr, w_ptr, out_ptr, first, width, rows, depth, ROWS, BLOCK_N, PART, EVEN)

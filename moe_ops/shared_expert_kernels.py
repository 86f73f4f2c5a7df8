"""Device code of the shared expert: the pointwise step between its GEMMs."""

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

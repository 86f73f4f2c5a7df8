"""Device code of a combine in a group of one rank: no memory to share and nobody to wait for."""

import triton
import triton.language as tl

from .chunks import row_chunks
from .combine_add_kernels import _join, _load_addends, _own_chunk, store_rows
from .combine_kernels import _floats


@triton.jit
def _local_combine_kernel(
    source, routing, out, addends, scale, norm, local_tokens_ptr, num_rows,
    N: tl.constexpr, TOP_K: tl.constexpr, ADDENDS: tl.constexpr, ROUND_EACH: tl.constexpr, NORM: tl.constexpr,
    ALIGNED_IN: tl.constexpr, ALIGNED_OUT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``combine_add_kernels._combine_add_kernel`` for W = 1. Grid: rows x blocks of N octets, one with NORM.

    Example: TOP_K 0, source [[1, ...], [5, ...]], one live row, one addend of ones: out [[2, ...], [1, ...]].
    """
    DTYPE: tl.constexpr = source.data.dtype.element_ty
    OUT: tl.constexpr = out.data.dtype.element_ty
    HALVES: tl.constexpr = 2 if DTYPE == tl.float32 else 1  # chunks of an octet
    row = tl.program_id(0).to(tl.int64)
    octet = tl.program_id(1) * N + tl.arange(0, N)
    live = row < tl.load(local_tokens_ptr)
    inside = octet < (source.length + 7) // 8
    loaded = _load_addends(addends, row, octet, inside, ADDENDS, ALIGNED_OUT)
    weight = _load_addends((norm.weight,), row * 0, octet, inside, 1 if NORM else 0, ALIGNED_OUT)
    if PDL:  # the experts' last kernel still ran: all above is older than the first one
        tl.extra.cuda.gdc_wait()
    values = ()
    for half in tl.static_range(HALVES):
        chunk = octet * HALVES + half
        inside_row = chunk < tl.where(live, row_chunks(source), 0)
        words = _own_chunk(source, routing, row, chunk, inside_row, TOP_K, ALIGNED_IN)
        part = _floats(words, 0, DTYPE)
        for i in tl.static_range(8 // HALVES):
            values = values + (tl.where(live, part[i], 0.0),)  # a dead row's weights may be anything
    values = _join(values, loaded, scale, OUT, ADDENDS, ROUND_EACH)
    store_rows(out, row, num_rows, octet, values, norm, weight, inside, NORM, ALIGNED_OUT)

"""Device code of ``rsv_combine_from``: meet, then sum own rows over all ranks' buffers where they lie."""

import triton
import triton.language as tl

from .barrier import advance, enter, leave, live_rows, load_counts, signal, wait
from .chunks import row_chunks
from .combine_add_kernels import _join, _load_addends
from .combine_kernels import _store_octet, _sum_over_ranks
from .routed_kernels import ranks_of
from .symmetric import OP_CODES

_OP = tl.constexpr(OP_CODES["rsv_combine_from"])


@triton.jit
def _place_bases(place, W: tl.constexpr, MULTICAST: tl.constexpr):
    """Addresses of row 0 to sum over: every rank's in rank order, or the one multicast address."""
    if MULTICAST:
        bases = (place.multicast + place.offset,)
    else:
        bases = ()
        for rank in tl.static_range(W):
            bases = bases + (tl.load(place.table + rank) + place.offset,)
    return bases


@triton.jit
def _shifted(bases, offset, COUNT: tl.constexpr):
    addresses = ()
    for i in tl.static_range(COUNT):
        addresses = addresses + (bases[i] + offset,)
    return addresses


@triton.jit
def _combine_from_kernel(
    peers, source, out, addends, scale, ids, experts_per_rank, local_tokens_ptr, metadata_ptr,
    row_limit, max_tokens, num_rows,
    W: tl.constexpr, N: tl.constexpr, ADDENDS: tl.constexpr, ROUND_EACH: tl.constexpr, ALIGNED: tl.constexpr,
    MULTICAST: tl.constexpr, EXIT: tl.constexpr, ROUTED: tl.constexpr,
):  # fmt: skip
    """Sum this rank's rows of ``source``, a ``chunks.Place``, over all ranks into ``out``, then as ``_join`` says.

    Grid: G programs; a unit is N octets (8 elements) of a row. The rows were written by launches before this one, so a
    unit may go to any program. Example: W = 2, counts 1 and 2; rank 1 returns ``out[0]`` = row 1 of rank 0's buffer +
    row 1 of its own, ``out[1]`` likewise from row 2, and zeros after them.
    ROUTED: not 0, a power of two >= K: pull only from ranks with an expert for the row, by its ``ids``.
    EXIT: the ranks meet again after the last load, so that later launches may overwrite the buffer.
    """
    DTYPE: tl.constexpr = source.data.dtype.element_ty
    OUT: tl.constexpr = out.data.dtype.element_ty
    COUNT: tl.constexpr = 1 if MULTICAST else W
    HALVES: tl.constexpr = 2 if DTYPE == tl.float32 else 1  # chunks of an octet
    lanes = tl.arange(0, N)
    chunks, octets = row_chunks(source), (source.length + 7) // 8
    segments = (octets + N - 1) // N
    counts = load_counts(local_tokens_ptr, metadata_ptr)
    bases = _place_bases(source, W, MULTICAST)
    call = enter(peers, W, N)
    t, _, offset, call = live_rows(peers, call, _OP, counts, row_limit, max_tokens)
    signal(peers, call, t, W, MULTICAST, RELEASE=False)
    _, ok = wait(peers, call, _OP, W, MULTICAST)
    live = tl.where(ok, t, 0)
    for unit in tl.range(tl.program_id(0), num_rows * segments, tl.num_programs(0)):
        row, octet = (unit // segments).to(tl.int64), (unit % segments) * N + lanes
        loaded = _load_addends(addends, row, octet, octet < octets, ADDENDS, ALIGNED)
        values, ranks = (), -1
        if ROUTED:
            ranks = ranks_of(ids, row, live, experts_per_rank, ROUTED)
        for half in tl.static_range(HALVES):
            chunk = octet * HALVES + half
            at = _shifted(bases, (offset + row) * source.row_stride + chunk * 16, COUNT)
            inside = (chunk < chunks) & (row < live)
            values = values + _sum_over_ranks(at, inside, ranks, COUNT, DTYPE, MULTICAST)
        values = _join(values, loaded, scale, OUT, ADDENDS, ROUND_EACH)
        _store_octet(out, row, octet, values, octet < octets, ALIGNED)
    if EXIT:
        call = advance(peers, call, ok)
        signal(peers, call, t, W, MULTICAST)
        wait(peers, call, _OP, W, MULTICAST, ACQUIRE=False)
    leave(peers, call)

"""Device code of ``rsv_combine``: own expert output into the own slot, meet, sum own rows over all ranks."""

import triton
import triton.language as tl

from .barrier import enter, leave, live_rows, load_counts, signal, wait
from .chunks import first_unit, gather_chunk, row_chunks, scatter_chunk, slot_offset
from .ptx import load_chunks, reduce_chunk, round_pair, store_chunk
from .routed_kernels import has_rank
from .symmetric import OP_CODES

_OP = tl.constexpr(OP_CODES["rsv_combine"])


@triton.jit
def _floats(words, START: tl.constexpr, DTYPE: tl.constexpr):
    """The fp32 values of the chunk ``words[START:START + 4]``: 4 of fp32, 8 of bf16 or fp16."""
    values = ()
    for i in tl.static_range(4):
        word = words[START + i]
        if DTYPE == tl.float32:
            values = values + (word.to(tl.float32, bitcast=True),)
        elif DTYPE == tl.bfloat16:
            values = values + ((word << 16).to(tl.float32, bitcast=True),)
            values = values + ((word & -65536).to(tl.float32, bitcast=True),)
        else:
            values = values + (word.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
            values = values + ((word >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32),)
    return values


@triton.jit
def _sources(peers, offset, W: tl.constexpr, MULTICAST: tl.constexpr):
    """Base addresses to sum over: every rank's in rank order, or the one multicast address."""
    if MULTICAST:
        bases = (peers.multicast + offset,)
    else:
        bases = ()
        for rank in tl.static_range(W):
            bases = bases + (tl.load(peers.table + rank) + offset,)
    return bases


@triton.jit
def _add(left, right, COUNT: tl.constexpr):
    total = ()
    for i in tl.static_range(COUNT):
        total = total + (left[i] + right[i],)
    return total


@triton.jit
def _addresses(bases, offset, own, own_rank, COUNT: tl.constexpr):
    """Addresses of one chunk on every rank; ``own`` instead for ``own_rank`` (-1: for none)."""
    addresses = ()
    for rank in tl.static_range(COUNT):
        addresses = addresses + (tl.where(own_rank == rank, own, bases[rank] + offset),)
    return addresses


@triton.jit
def _masks(mask, ranks, COUNT: tl.constexpr):
    """``mask`` for each rank, off where its bit of ``ranks`` (int32) is 0."""
    masks = ()
    for rank in tl.static_range(COUNT):
        masks = masks + ((mask & has_rank(ranks, rank)).to(tl.int32),)
    return masks


@triton.jit
def _sum_over_ranks(addresses, mask, ranks, COUNT: tl.constexpr, DTYPE: tl.constexpr, MULTICAST: tl.constexpr):
    """fp32 values of one chunk summed over ranks: in rank order, all loads in flight before the first addition.

    A rank whose bit of ``ranks`` (int32; -1: all) is off counts as zero and is not read.
    """
    if MULTICAST:
        total = _floats(reduce_chunk(addresses[0], mask, DTYPE), 0, DTYPE)
    else:
        words = load_chunks(addresses, _masks(mask, ranks, COUNT), COUNT)
        total = _floats(words, 0, DTYPE)
        for rank in tl.static_range(1, COUNT):
            total = _add(total, _floats(words, 4 * rank, DTYPE), 4 if DTYPE == tl.float32 else 8)
    return total


@triton.jit
def _store_octet(out, row, octet, values, mask, ALIGNED: tl.constexpr):
    """Eight fp32 values a lane, rounded to the output's dtype once, to elements ``8 * octet ...`` of ``row``."""
    OUT: tl.constexpr = out.data.dtype.element_ty
    words = ()
    if OUT == tl.float32:
        for i in tl.static_range(8):
            words = words + (values[i].to(tl.int32, bitcast=True),)
        for half in tl.static_range(2):
            chunk = octet * 2 + half
            inside = mask & (chunk < row_chunks(out))
            part = (words[4 * half], words[4 * half + 1], words[4 * half + 2], words[4 * half + 3])
            scatter_chunk(out, row, chunk, part, inside, ALIGNED)
    else:
        for i in tl.static_range(4):
            words = words + (round_pair(values[2 * i], values[2 * i + 1], OUT),)
        scatter_chunk(out, row, octet, words, mask, ALIGNED)


@triton.jit
def _combine_kernel(
    peers, slots, source, out, local_tokens_ptr, metadata_ptr, row_limit, max_tokens, num_rows,
    W: tl.constexpr, N: tl.constexpr, ALIGNED_IN: tl.constexpr, ALIGNED_OUT: tl.constexpr, MULTICAST: tl.constexpr,
):  # fmt: skip
    """Sum this rank's rows of ``source (M, H)`` over all ranks into ``out``. Grid: G programs.

    A unit is N octets (8 elements) of a row; unit ``u`` of the global rows is program ``u mod G``'s on every
    rank, in the copy and in the sum. Example: W = 2, counts 1 and 2; rank 1 copies its rows 0, 1, 2 into its
    slot and returns ``out[0] = row 1 of rank 0 + row 1 of rank 1``, ``out[1]`` likewise from row 2.
    Over peer pointers its own part of its own rows is read where it lies, so those rows are not copied.
    """
    IN_PLACE: tl.constexpr = ALIGNED_IN and not MULTICAST
    DTYPE: tl.constexpr = source.data.dtype.element_ty
    COUNT: tl.constexpr = 1 if MULTICAST else W
    HALVES: tl.constexpr = 2 if DTYPE == tl.float32 else 1  # chunks of an octet
    lanes = tl.arange(0, N)
    chunks = row_chunks(source)
    octets = (source.length + 7) // 8
    segments = (octets + N - 1) // N

    counts = load_counts(local_tokens_ptr, metadata_ptr)
    call = enter(peers, W, N)
    slot = slot_offset(slots, call.epoch)
    bases = _sources(peers, slot, W, MULTICAST)
    most = tl.minimum(slots.rows, max_tokens)
    t, valid, offset, call = live_rows(peers, call, _OP, counts, row_limit, most)
    own_rank = peers.rank if IN_PLACE else -1
    own_end = offset + t if IN_PLACE else offset
    for unit in tl.range(first_unit(valid * 0), valid * segments, tl.num_programs(0)):
        row, octet = (unit // segments).to(tl.int64), (unit % segments) * N + lanes
        if (row < offset) | (row >= own_end):
            for half in tl.static_range(HALVES):
                chunk = octet * HALVES + half
                data = gather_chunk(source, row, chunk, chunk < chunks, ALIGNED_IN)
                store_chunk(call.own + slot + (row * chunks + chunk) * 16, data, chunk < chunks, False)
    signal(peers, call, t, W, MULTICAST)

    _, ok = wait(peers, call, _OP, W, MULTICAST)
    live_end = tl.where(ok, offset + t, offset)
    for unit in tl.range(first_unit(offset * segments), (offset + num_rows) * segments, tl.num_programs(0)):
        row, octet = (unit // segments).to(tl.int64), (unit % segments) * N + lanes
        values = ()
        for half in tl.static_range(HALVES):
            chunk = octet * HALVES + half
            inside = (chunk < chunks) & (row < live_end)
            own = source.data.to(tl.int64) + row * source.row_stride + chunk * 16
            at = _addresses(bases, (row * chunks + chunk) * 16, own, own_rank, COUNT)
            values = values + _sum_over_ranks(at, inside, -1, COUNT, DTYPE, MULTICAST)
        _store_octet(out, row - offset, octet, values, octet < octets, ALIGNED_OUT)
    leave(peers, call)

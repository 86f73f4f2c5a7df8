"""Device code of ``rsv_combine_add`` and ``fused_moe_combine``: a combine whose ends are joined to its neighbours.

Before the meeting it may sum the experts' pairs itself (``fused_moe``'s last step, straight into the symmetric
slot: nothing is copied in). After it, it scales its rows, adds tensors to them (shared experts, residual), and may
write their RMSNorm beside them.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .barrier import enter, leave, live_rows, load_counts, signal, wait
from .chunks import Rows, first_unit, gather_chunk, row_chunks, slot_offset
from .combine_kernels import _add, _addresses, _floats, _sources, _store_octet, _sum_over_ranks
from .ptx import round_pair, store_chunk
from .routed_kernels import ranks_of
from .symmetric import OP_CODES

_OP = tl.constexpr(OP_CODES["rsv_combine"])


class Routing(NamedTuple):
    """Where each pair ``row * K + slot`` goes: ids (M, K) contiguous, weights (M, K), and this rank's experts."""

    ids: object
    weights: object
    weight_stride: int  # elements from a row of weights to the next: in the layer batch rows are padded to 16 bytes
    expert_start: int
    num_experts: int
    experts_per_rank: int  # 0: unknown


class NormRow(NamedTuple):
    """The weight of an RMSNorm, as ``chunks.Rows`` of one row, and its numbers."""

    weight: object
    eps: float
    shift: float


@triton.jit
def routing_rows(routing, TOP_K: tl.constexpr):
    """The ids as ``chunks.Rows``."""
    SIZE: tl.constexpr = routing.ids.dtype.element_ty.primitive_bitwidth // 8
    return Rows(routing.ids, TOP_K * SIZE, SIZE, TOP_K)


@triton.jit
def _words(values, DTYPE: tl.constexpr):
    """A chunk of 4 fp32 values, or of 8 rounded to bf16 or fp16."""
    words = ()
    for i in tl.static_range(4):
        if DTYPE == tl.float32:
            words = words + (values[i].to(tl.int32, bitcast=True),)
        else:
            words = words + (round_pair(values[2 * i], values[2 * i + 1], DTYPE),)
    return words


@triton.jit
def _rounded(values, DTYPE: tl.constexpr):
    """Eight fp32 values with the precision of ``DTYPE``."""
    if DTYPE == tl.float32:
        return values
    else:
        return _floats(_words(values, DTYPE), 0, DTYPE)


@triton.jit
def _scaled(values, factor, COUNT: tl.constexpr):
    result = ()
    for i in tl.static_range(COUNT):
        result = result + (values[i] * factor,)
    return result


@triton.jit
def _own_chunk(source, routing, row, chunk, mask, TOP_K: tl.constexpr, ALIGNED: tl.constexpr):
    """A chunk of this rank's partial result: a row of ``source``, or the weighted sum of its local pairs."""
    if TOP_K == 0:
        words = gather_chunk(source, row, chunk, mask, ALIGNED)
    else:
        DTYPE: tl.constexpr = source.data.dtype.element_ty
        COUNT: tl.constexpr = 4 if DTYPE == tl.float32 else 8
        total = ()
        for _ in tl.static_range(COUNT):
            total = total + ((chunk * 0).to(tl.float32),)
        for slot in tl.static_range(TOP_K):
            pair = row * TOP_K + slot
            expert = tl.load(routing.ids + pair) - routing.expert_start
            local = (expert >= 0) & (expert < routing.num_experts)
            weight = tl.load(routing.weights + row * routing.weight_stride + slot).to(tl.float32)
            weight = tl.where(local, weight, 0.0)
            inside = mask & (chunk < tl.where(local, row_chunks(source), 0))
            part = _floats(gather_chunk(source, pair, chunk, inside, ALIGNED), 0, DTYPE)
            total = _add(total, _scaled(part, weight, COUNT), COUNT)
        words = _words(total, DTYPE)
    return words


@triton.jit
def _addend(rows, row, octet, mask, ALIGNED: tl.constexpr):
    """Eight fp32 values a lane of one row of a tensor."""
    DTYPE: tl.constexpr = rows.data.dtype.element_ty
    HALVES: tl.constexpr = 2 if DTYPE == tl.float32 else 1
    values = ()
    for half in tl.static_range(HALVES):
        chunk = octet * HALVES + half
        inside = mask & (chunk < row_chunks(rows))
        values = values + _floats(gather_chunk(rows, row, chunk, inside, ALIGNED), 0, DTYPE)
    return values


@triton.jit
def _load_addends(addends, row, octet, mask, ADDENDS: tl.constexpr, ALIGNED: tl.constexpr):
    """Eight fp32 values a lane of each; asked for before the peers' rows, so that both are on their way at once."""
    loaded = ()
    for i in tl.static_range(ADDENDS):
        loaded = loaded + (_addend(addends[i], row, octet, mask, ALIGNED),)
    return loaded


@triton.jit
def _join(values, loaded, scale, DTYPE: tl.constexpr, ADDENDS: tl.constexpr, ROUND_EACH: tl.constexpr):
    """``round(sum) * scale + loaded[0] + ...`` in fp32; with ROUND_EACH rounded to DTYPE after every step."""
    values = _scaled(_rounded(values, DTYPE), scale, 8)
    if ROUND_EACH:
        values = _rounded(values, DTYPE)
    for i in tl.static_range(ADDENDS):
        values = _add(values, loaded[i], 8)
        if ROUND_EACH:
            values = _rounded(values, DTYPE)
    return values


@triton.jit
def _normalised(values, norm, weight, length, DTYPE: tl.constexpr, ROUND_FIRST: tl.constexpr):
    """RMSNorm of one row, eight values a lane as they were stored, zeros behind its ``length``; the block reduces."""
    squares = values[0] * values[0]
    for i in tl.static_range(1, 8):
        squares += values[i] * values[i]
    values = _scaled(values, tl.math.rsqrt(tl.sum(squares, axis=0) / length + norm.eps), 8)
    if ROUND_FIRST:
        values = _rounded(values, DTYPE)
    result = ()
    for i in tl.static_range(8):
        result = result + (values[i] * (weight[i] + norm.shift),)
    return result


@triton.jit
def store_rows(out, row, num_rows, octet, values, norm, weight, mask, NORM: tl.constexpr, ALIGNED: tl.constexpr):
    """Eight fp32 values a lane to ``row``; with NORM (1: rounds before the weight) their RMSNorm num_rows later."""
    OUT: tl.constexpr = out.data.dtype.element_ty
    _store_octet(out, row, octet, values, mask, ALIGNED)
    if NORM:
        values = _normalised(_rounded(values, OUT), norm, weight[0], out.length, OUT, NORM == 1)
        _store_octet(out, row + num_rows, octet, values, mask, ALIGNED)


@triton.jit
def _combine_add_kernel(
    peers, slots, source, routing, out, addends, scale, norm, local_tokens_ptr, metadata_ptr,
    row_limit, max_tokens, num_rows,
    W: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr, ADDENDS: tl.constexpr, ROUND_EACH: tl.constexpr,
    NORM: tl.constexpr, ALIGNED_IN: tl.constexpr, ALIGNED_OUT: tl.constexpr, MULTICAST: tl.constexpr,
    ROUTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``combine_kernels._combine_kernel`` with joined ends. Grid and units are the same: G programs.

    TOP_K 0: ``source (M, H)`` are rows; else ``(M * TOP_K, H)`` are pairs, summed with ``routing``'s weights.
    Example: TOP_K 2, weights [0.5, 2], ids [local, remote]: rank's row is 0.5 * pair 0, rounded; one addend [[1, ...]]
    makes a dead row 1 and a live row its sum over ranks, rounded, plus 1.
    ROUTED: not 0, a power of two >= TOP_K: pull only from ranks with an expert for the row; others have zeros there.
    NORM: not 0: N octets hold a row, and ``out (2 * num_rows, H)`` gets every row and, num_rows later, its RMSNorm.
    """
    DTYPE: tl.constexpr = source.data.dtype.element_ty
    OUT: tl.constexpr = out.data.dtype.element_ty
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
    if PDL:  # the experts' last kernel still ran: all above is older than the first one, which started behind dispatch
        tl.extra.cuda.gdc_wait()
    for unit in tl.range(first_unit(valid * 0), valid * segments, tl.num_programs(0)):
        row, octet = (unit // segments).to(tl.int64), (unit % segments) * N + lanes
        for half in tl.static_range(HALVES):
            chunk = octet * HALVES + half
            data = _own_chunk(source, routing, row, chunk, chunk < chunks, TOP_K, ALIGNED_IN)
            store_chunk(call.own + slot + (row * chunks + chunk) * 16, data, chunk < chunks, False)
    signal(peers, call, t, W, MULTICAST)

    _, ok = wait(peers, call, _OP, W, MULTICAST)
    live_end = tl.where(ok, offset + t, offset)
    for unit in tl.range(first_unit(offset * segments), (offset + num_rows) * segments, tl.num_programs(0)):
        row, octet = (unit // segments).to(tl.int64), (unit % segments) * N + lanes
        loaded = _load_addends(addends, row - offset, octet, octet < octets, ADDENDS, ALIGNED_OUT)
        values, ranks = (), -1
        if ROUTED:
            ranks = ranks_of(routing_rows(routing, TOP_K), row, live_end, routing.experts_per_rank, ROUTED)
        for half in tl.static_range(HALVES):
            chunk = octet * HALVES + half
            inside, at = (chunk < chunks) & (row < live_end), (row * chunks + chunk) * 16
            at = _addresses(bases, at, at, -1, COUNT)
            values = values + _sum_over_ranks(at, inside, ranks, COUNT, DTYPE, MULTICAST)
        # not earlier: with the rows of eight peers in flight no registers are left for it
        weight = _load_addends((norm.weight,), row * 0, octet, octet < octets, 1 if NORM else 0, ALIGNED_OUT)
        values = _join(values, loaded, scale, OUT, ADDENDS, ROUND_EACH)
        store_rows(out, row - offset, num_rows, octet, values, norm, weight, octet < octets, NORM, ALIGNED_OUT)
    leave(peers, call)

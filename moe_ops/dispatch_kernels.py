"""Device code of ``agv_dispatch``: push own rows to every other rank, meet, copy the others' rows out."""

from typing import NamedTuple

import triton
import triton.language as tl

from .barrier import enter, leave, live_rows, load_counts, signal, wait
from .chunks import first_unit, gather_chunk, row_chunks, scatter_chunk, slot_offset
from .ptx import load_chunk, store_chunk
from .symmetric import OP_CODES

_OP = tl.constexpr(OP_CODES["agv_dispatch"])


class Batch(NamedTuple):
    """``chunks.Rows`` of hidden states, ids and weights."""

    hidden: object
    ids: object
    weights: object


@triton.jit
def _destinations(peers, offset, W: tl.constexpr, MULTICAST: tl.constexpr):
    """Base addresses to store to: one multicast address, or every other rank's, starting with the next one."""
    if MULTICAST:
        bases = (peers.multicast + offset,)
    else:
        bases = ()
        for step in tl.static_range(1, W):
            bases = bases + (tl.load(peers.table + (peers.rank + step) % W) + offset,)
    return bases


@triton.jit
def _publish(bases, offset, data, mask, COUNT: tl.constexpr, MULTICAST: tl.constexpr):
    for destination in tl.static_range(COUNT):
        store_chunk(bases[destination] + offset, data, mask, MULTICAST)


@triton.jit
def _clear_ids(ids, start, stop, N: tl.constexpr):
    """-1 into elements ``[start, stop)`` (int64) of the contiguous output ``ids``."""
    lanes = tl.arange(0, N)
    for base in tl.range(start + tl.program_id(0) * N, stop, tl.num_programs(0) * N):
        element = base + lanes
        tl.store(ids.data + element, (lanes * 0 - 1).to(ids.data.dtype.element_ty), mask=element < stop)


@triton.jit
def _gather_routing(source, row, R: tl.constexpr, ALIGNED: tl.constexpr):
    """Ids, then weights, of one row as one row of chunks, and which lanes hold one."""
    lanes = tl.arange(0, R)
    id_chunks = row_chunks(source.ids)
    chunks = id_chunks + row_chunks(source.weights)
    ids = gather_chunk(source.ids, row, lanes, lanes < id_chunks, ALIGNED)
    late = (lanes >= id_chunks) & (lanes < chunks)
    weights = gather_chunk(source.weights, row, lanes - id_chunks, late, ALIGNED)
    both = (ids[0] | weights[0], ids[1] | weights[1], ids[2] | weights[2], ids[3] | weights[3])
    return both, lanes < chunks


@triton.jit
def _scatter_routing(out, row, both, R: tl.constexpr, ALIGNED: tl.constexpr):
    """The inverse."""
    lanes = tl.arange(0, R)
    id_chunks = row_chunks(out.ids)
    late = (lanes >= id_chunks) & (lanes < id_chunks + row_chunks(out.weights))
    scatter_chunk(out.ids, row, lanes, both, lanes < id_chunks, ALIGNED)
    scatter_chunk(out.weights, row, lanes - id_chunks, both, late, ALIGNED)


@triton.jit
def _dispatch_kernel(
    peers, slots, source, out, local_tokens_ptr, metadata_ptr, row_limit, max_tokens,
    W: tl.constexpr, N: tl.constexpr, R: tl.constexpr,
    ALIGNED_IN: tl.constexpr, ALIGNED_OUT: tl.constexpr, ALIGNED_ROUTING: tl.constexpr, MULTICAST: tl.constexpr,
):  # fmt: skip
    """Gather all ranks' live rows into ``out``. Grid: G programs; unit ``u`` of the global rows is ``u mod G``'s.

    A row is ``segments`` units: N chunks of hidden states each, and a last one for ids and weights (R lanes).
    Example: W = 2, counts 1 and 2, H = 16 bf16 (2 chunks), G = 4: two units a row; rank 1 pushes rows 1
    and 2 of the gathered batch as units 2, 3 (programs 2, 3) and 4, 5 (programs 0, 1).
    Over peer pointers own rows go to ``out`` at once, not through the own slot: 2 of W parts of the local traffic less.
    """
    DESTINATIONS: tl.constexpr = 1 if MULTICAST else W - 1
    lanes, routing_lanes = tl.arange(0, N), tl.arange(0, R)
    chunks = row_chunks(source.hidden)
    row_bytes = (chunks + row_chunks(source.ids) + row_chunks(source.weights)) * 16
    segments = (chunks + N - 1) // N + 1

    counts = load_counts(local_tokens_ptr, metadata_ptr)
    call = enter(peers, W, R)
    most = tl.minimum(slots.rows, max_tokens)
    t, valid, offset, call = live_rows(peers, call, _OP, counts, row_limit, most)
    slot = slot_offset(slots, call.epoch)
    bases = _destinations(peers, slot, W, MULTICAST)
    for unit in tl.range(first_unit(offset * segments), (offset + t) * segments, tl.num_programs(0)):
        row, chunk = (unit // segments).to(tl.int64), (unit % segments) * N + lanes
        if unit % segments < segments - 1:
            data = gather_chunk(source.hidden, row - offset, chunk, chunk < chunks, ALIGNED_IN)
            _publish(bases, row * row_bytes + chunk * 16, data, chunk < chunks, DESTINATIONS, MULTICAST)
            if not MULTICAST:
                scatter_chunk(out.hidden, row, chunk, data, chunk < chunks, ALIGNED_OUT)
        else:
            both, inside = _gather_routing(source, row - offset, R, ALIGNED_ROUTING)
            at = row * row_bytes + (chunks + routing_lanes) * 16
            _publish(bases, at, both, inside, DESTINATIONS, MULTICAST)
            if not MULTICAST:
                _scatter_routing(out, row, both, R, ALIGNED_ROUTING)
    signal(peers, call, t, W, MULTICAST)
    _clear_ids(out.ids, valid.to(tl.int64) * out.ids.length, (call.epoch * 0 + max_tokens) * out.ids.length, R)

    _, ok = wait(peers, call, _OP, W, MULTICAST)
    own_end = offset if MULTICAST else offset + t
    for unit in tl.range(first_unit(valid * 0), tl.where(ok, valid * segments, 0), tl.num_programs(0)):
        row, chunk = (unit // segments).to(tl.int64), (unit % segments) * N + lanes
        origin = call.own + slot + row * row_bytes
        if (row < offset) | (row >= own_end):
            if unit % segments < segments - 1:
                data = load_chunk(origin + chunk * 16, chunk < chunks)
                scatter_chunk(out.hidden, row, chunk, data, chunk < chunks, ALIGNED_OUT)
            else:
                inside = routing_lanes < row_chunks(out.ids) + row_chunks(out.weights)
                both = load_chunk(origin + (chunks + routing_lanes) * 16, inside)
                _scatter_routing(out, row, both, R, ALIGNED_ROUTING)
    leave(peers, call)

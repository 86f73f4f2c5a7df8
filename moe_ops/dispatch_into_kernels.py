"""Device code of ``agv_dispatch_into``: push own rows to their final place in every rank's buffers, and meet."""

import triton
import triton.language as tl

from .barrier import advance, enter, leave, live_rows, load_counts, signal, wait
from .chunks import gather_chunk, row_chunks
from .ptx import load_chunk, store_chunk
from .routed_kernels import has_rank, ranks_of
from .symmetric import OP_CODES

_OP = tl.constexpr(OP_CODES["agv_dispatch_into"])


@triton.jit
def _starts(peers, place, W: tl.constexpr, MULTICAST: tl.constexpr):
    """Addresses of row 0: the multicast one, or every rank's, beginning with the next one so that links share the load.

    The own one comes last.
    """
    if MULTICAST:
        starts = (place.multicast + place.offset,)
    else:
        starts = ()
        for step in tl.static_range(1, W + 1):
            starts = starts + (tl.load(place.table + (peers.rank + step) % W) + place.offset,)
    return starts


@triton.jit
def _pick(batch, chunk, hidden, ids, weights):
    """By chunk of a batch's row, which is hidden states, then ids, then weights: one of three values."""
    first = row_chunks(batch.hidden)
    second = first + row_chunks(batch.ids)
    return tl.where(chunk < first, hidden, tl.where(chunk < second, ids, weights))


@triton.jit
def _batch_chunks(batch):
    return row_chunks(batch.hidden) + row_chunks(batch.ids) + row_chunks(batch.weights)


@triton.jit
def _gather(source, row, chunk, ALIGNED: tl.constexpr):
    """Chunks ``chunk (N,)`` of a batch's row (int64), and which of them there are."""
    inside = chunk < _batch_chunks(source)
    in_ids = chunk - row_chunks(source.hidden)
    in_weights = in_ids - row_chunks(source.ids)
    if ALIGNED:
        hidden = source.hidden.data.to(tl.int64) + row * source.hidden.row_stride + chunk * 16
        ids = source.ids.data.to(tl.int64) + row * source.ids.row_stride + in_ids * 16
        weights = source.weights.data.to(tl.int64) + row * source.weights.row_stride + in_weights * 16
        return load_chunk(_pick(source, chunk, hidden, ids, weights), inside), inside
    else:
        a = gather_chunk(source.hidden, row, chunk, in_ids < 0, False)
        b = gather_chunk(source.ids, row, in_ids, (in_ids >= 0) & (in_weights < 0), False)
        c = gather_chunk(source.weights, row, in_weights, (in_weights >= 0) & inside, False)
        return (a[0] | b[0] | c[0], a[1] | b[1] | c[1], a[2] | b[2] | c[2], a[3] | b[3] | c[3]), inside


@triton.jit
def _scatter(
    peers, starts, source, out, row, chunk, data, inside, ranks,
    COUNT: tl.constexpr, W: tl.constexpr, MULTICAST: tl.constexpr,
):  # fmt: skip
    """The same chunks to row ``row`` (int64) of every destination's three buffers.

    Hidden states go only to ranks whose bit of ``ranks`` (int32; -1: all) is set.
    """
    in_ids = chunk - row_chunks(source.hidden)
    in_weights = in_ids - row_chunks(source.ids)
    offset = _pick(
        source, chunk,
        row * out.hidden.row_stride + chunk * 16,
        row * out.ids.row_stride + in_ids * 16,
        row * out.weights.row_stride + in_weights * 16,
    )  # fmt: skip
    for to in tl.static_range(COUNT):
        start = _pick(source, chunk, starts[0][to], starts[1][to], starts[2][to])
        wanted = (in_ids >= 0) | has_rank(ranks, (peers.rank + 1 + to) % W)
        store_chunk(start + offset, data, inside & wanted, MULTICAST)


@triton.jit
def _clear_ids(ids, start, stop, N: tl.constexpr):
    """-1 into rows ``[start, stop)`` (int64) of this rank's ids, padding included."""
    SIZE: tl.constexpr = ids.data.dtype.element_ty.primitive_bitwidth // 8
    width = ids.row_stride // SIZE
    lanes = tl.arange(0, N)
    for base in tl.range(start * width + tl.program_id(0) * N, stop * width, tl.num_programs(0) * N):
        element = base + lanes
        tl.store(ids.data + element, (lanes * 0 - 1).to(ids.data.dtype.element_ty), mask=element < stop * width)


@triton.jit
def _dispatch_into_kernel(
    peers, source, out, live_ptr, local_tokens_ptr, metadata_ptr, row_limit, max_tokens, experts_per_rank,
    W: tl.constexpr, N: tl.constexpr, ALIGNED: tl.constexpr, MULTICAST: tl.constexpr, ENTRY: tl.constexpr,
    ROUTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Gather all ranks' live rows into ``out``, three ``chunks.Place``. Grid: G programs, units of N chunks of a row.

    No kernel but a later one reads what arrives, so units need not go to the same program on every rank.
    Example: W = 2, counts 1 and 2, H = 16 bf16, K = 8 (2 + 2 + 2 chunks), N = 32, G = 4: one unit a row; rank 1's
    programs 0 and 1 store rows 1 and 2 on both ranks, while 2 and 3 only meet.
    ENTRY: before the first store every rank says that the launches before it are done with its buffers.
    ROUTED: not 0, a power of two >= K: hidden states go only to ranks with an expert for the row.
    ``live_ptr`` gets the gathered rows, or 0 where a rank did not come.
    """
    COUNT: tl.constexpr = 1 if MULTICAST else W
    lanes = tl.arange(0, N)
    segments = (_batch_chunks(source) + N - 1) // N
    counts = load_counts(local_tokens_ptr, metadata_ptr)
    starts = (
        _starts(peers, out.hidden, W, MULTICAST),
        _starts(peers, out.ids, W, MULTICAST),
        _starts(peers, out.weights, W, MULTICAST),
    )
    call = enter(peers, W, N)
    t, valid, offset, call = live_rows(peers, call, _OP, counts, row_limit, max_tokens)
    if ENTRY:
        signal(peers, call, t, W, MULTICAST, RELEASE=False)
        _, ready = wait(peers, call, _OP, W, MULTICAST)
        call = advance(peers, call, ready)
        t = tl.where(call.poison == 0, t, 0)
    for unit in tl.range(tl.program_id(0), t * segments, tl.num_programs(0)):
        row, chunk = (unit // segments).to(tl.int64), (unit % segments) * N + lanes
        data, inside = _gather(source, row, chunk, ALIGNED)
        ranks = -1
        if ROUTED:
            ranks = ranks_of(source.ids, row, t, experts_per_rank, ROUTED)
        _scatter(peers, starts, source, out, offset + row, chunk, data, inside, ranks, COUNT, W, MULTICAST)
    signal(peers, call, t, W, MULTICAST)
    if PDL:  # the experts' first kernel may start, and wait for this one
        tl.extra.cuda.gdc_launch_dependents()
    _clear_ids(out.ids, valid.to(tl.int64), (call.epoch * 0 + max_tokens), N)
    _, ok = wait(peers, call, _OP, W, MULTICAST, ACQUIRE=PDL)  # PDL: the next launch may be there already
    tl.store(live_ptr, tl.where(ok, valid, 0), mask=tl.program_id(0) == 0)
    leave(peers, call)

"""The barrier of the communication kernels: an all-to-all exchange of one 32-bit number per block.

What it orders. Everything a block wrote before ``signal`` (any thread, any rank's memory) is visible
to block ``b`` of a peer after the peer's ``wait`` returned ``ok``, if this is block ``b``: release and
acquire at system scope, made cumulative over the block by the barrier inside ``signal``. Each warp
acquires for itself, so no block barrier follows the wait.

What it is not. It says nothing about other blocks, of this rank or a peer: a block may read only
what its namesakes wrote. It is not a grid barrier, and it does not protect a buffer from the *next*
writer: that is what two slots are for (docs/protocol.md).

Pattern::

    call = enter(peers, W, N)
    ... write slot epoch % 2 of the peers ...
    signal(peers, call, payload, W, MULTICAST)
    ... anything that needs no peer ...
    payloads, ok = wait(peers, call, OP, W, MULTICAST)
    ... read, with trip counts that are 0 unless ok ...
    leave(peers, call)

A kernel may meet twice: ``call = advance(peers, call, ok)`` after the first ``wait``, then ``signal`` and ``wait``
again. A launch's end and the next one's start order everything (docs/protocol.md), so a ``signal`` that announces only
what earlier launches did needs no release (``RELEASE=False``), and a ``wait`` behind which only later launches read
needs no acquire (``ACQUIRE=False``).

A word on the wire is ``tag << 32 | payload``. The tag is ``epoch + 1`` in 31 bits; a rank that has
given up adds the bit ABORT and, as payload, the ranks that it missed. Words are never reset. They
alternate between two sets with the epoch's parity, so that a peer one call ahead leaves the payload of
this one alone; a peer cannot be two ahead, so the word of a rank that has arrived holds exactly
``epoch + 1``, and anything else without the bit is old, however old.

``wait`` never traps and lasts ``timeout`` at most, on the device clock. Warps may leave it with
different verdicts when the clock runs out between them; so after it no branch that contains a block
barrier may depend on ``ok``, only masks and trip counts. A warp with a bad verdict poisons the workspace.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .ptx import (
    LANES,
    abort_word,
    block_any,
    device_clock,
    fence_aliases,
    poll_word,
    record_failure,
    signal_word,
)
from .symmetric import KIND_ABORTED as _KIND_ABORTED
from .symmetric import KIND_CAPACITY as _KIND_CAPACITY
from .symmetric import KIND_TIMEOUT as _KIND_TIMEOUT
from .symmetric import MAX_BLOCKS as _MAX_BLOCKS

MAX_BLOCKS = tl.constexpr(_MAX_BLOCKS)
KIND_TIMEOUT = tl.constexpr(_KIND_TIMEOUT)
KIND_CAPACITY = tl.constexpr(_KIND_CAPACITY)
KIND_ABORTED = tl.constexpr(_KIND_ABORTED)
ABORT = tl.constexpr(1 << 31)

_HERE = tl.constexpr(0)
_LATE = tl.constexpr(1)
_ABORTED = tl.constexpr(2)


class Peers(NamedTuple):
    """What every communication kernel gets first (``symmetric.Channel.peers``)."""

    table: object  # (W,) int64 tensor: address of the symmetric buffer on each rank
    multicast: int  # multicast address of the buffer, or 0
    state: object  # (1 + MAX_BLOCKS,) int64 tensor: poison, then the epoch once for each block
    record: int  # address of the host-readable record
    timeout: int  # ns
    rank: int


class Call(NamedTuple):
    """One communication call, as its kernel knows it."""

    epoch: object  # int64
    poison: object  # int64: 0, or 1 << 32 | the ranks that were missed
    table: object  # (LANES,) int64: address of the symmetric buffer on each rank
    own: object  # int64: this rank's


@triton.jit
def load_counts(local_tokens_ptr, metadata_ptr):
    """``(t, valid, offset)`` for ``live_rows``. Before ``enter``, so that one trip to memory serves both."""
    return tl.load(local_tokens_ptr), tl.load(metadata_ptr), tl.load(metadata_ptr + 1)


@triton.jit
def enter(peers, W: tl.constexpr, N: tl.constexpr):
    """The first thing in a kernel, so that these loads are over when the barrier needs them.

    ``N``: at least the block's threads. Another block may poison the workspace at any time, so what the warps
    read is united over the block: all of it signals as poisoned, or all of it as alive.
    """
    lanes = tl.arange(0, LANES)
    epoch = tl.load(peers.state + 1 + tl.program_id(0))
    table = tl.load(peers.table + lanes, mask=lanes < W, other=0)
    own = tl.load(peers.table + peers.rank)
    poison = tl.max(tl.load(peers.state + tl.arange(0, N) * 0), axis=0)
    return Call(epoch, poison, table, own)


@triton.jit
def _tag(epoch):
    """31 bits that no earlier call of the last 2^31 used."""
    return (epoch + 1) & (ABORT - 1)


@triton.jit
def _word_offset(epoch, W: tl.constexpr):
    """Bytes from the buffer's start to the words of this block, for this epoch's parity."""
    return ((epoch & 1) * MAX_BLOCKS + tl.program_id(0)) * (W * 8)


@triton.jit
def _fail(peers, call, failed, kind, op, ranks, missed, amounts):
    """Where ``failed``, poison the workspace and tell the host, unless it is poisoned already. Returns the poison.

    ``ranks``: the ranks to report, ``missed``: those that aborts will name (int64 masks).
    """
    failed = failed & (call.poison == 0)
    poison = (1 << 32) | missed
    header = call.epoch * 0 + (kind | (op << 8))
    record_failure(
        failed.to(tl.int32), peers.state.to(tl.int64), poison, peers.record, header, call.epoch, ranks, amounts
    )
    return tl.where(failed, poison, call.poison)


@triton.jit
def check_capacity(peers, call, op, rows, limit, ranks):
    """Poison the workspace if ``rows > limit`` (scalars). ``ranks``: mask of whose rows, int64. Returns the call."""
    amounts = (rows.to(tl.int64) << 32) | limit
    poison = _fail(peers, call, rows > limit, KIND_CAPACITY, op, ranks, ranks * 0, amounts)
    return Call(call.epoch, poison, call.table, call.own)


@triton.jit
def live_rows(peers, call, op, counts, row_limit, valid_limit):
    """``(t, valid, offset, call)`` of ``load_counts``. All 0 in a poisoned workspace; too many rows poison it."""
    t, valid, offset = tl.maximum(counts[0], 0).to(tl.int64), counts[1].to(tl.int64), counts[2].to(tl.int64)
    rows = tl.where(t > row_limit, t, tl.where(valid > valid_limit, valid, offset + t))
    limit = tl.where(t > row_limit, row_limit, tl.where(valid > valid_limit, valid_limit, valid))
    call = check_capacity(peers, call, op, rows, limit, (call.epoch * 0 + 1) << peers.rank)
    alive = (call.poison == 0).to(tl.int64)
    return (t * alive).to(tl.int32), (valid * alive).to(tl.int32), (offset * alive).to(tl.int32), call


@triton.jit
def _send(peers, call, words, tag, payload, mask, W: tl.constexpr, ABORTS: tl.constexpr, RELEASE: tl.constexpr):
    """``tag`` and ``payload`` to all ranks, into the words of epoch ``words``'s parity."""
    lanes = tl.arange(0, LANES)
    address = call.table + _word_offset(words, W) + peers.rank * 8
    word = call.table * 0 + ((tag << 32) | (payload & 0xFFFFFFFF))
    if ABORTS:
        abort_word(address, word, (lanes < W) & mask)
    else:
        signal_word(address, word, (lanes < W) & mask, RELEASE)


@triton.jit
def signal(peers, call, payload, W: tl.constexpr, MULTICAST: tl.constexpr, RELEASE: tl.constexpr = True):
    """Publish what this block wrote, and ``payload`` (scalar, 32 bits), to the namesake block of every rank.

    ``RELEASE`` False: what this launch wrote is not meant, only what the launches before it did.
    """
    if MULTICAST:
        fence_aliases(tl.program_id(0))
    if RELEASE:
        tl.debug_barrier()  # the whole block's accesses come before the release below
    given_up = call.poison != 0
    tag = _tag(call.epoch) | tl.where(given_up, ABORT, 0).to(tl.int64)
    _send(peers, call, call.epoch, tag, tl.where(given_up, call.poison, payload.to(tl.int64)), True, W, False, RELEASE)


@triton.jit
def _verdict(word, epoch, live):
    """What the words say, at worst and by lane: ``_HERE``, ``_LATE`` or ``_ABORTED``."""
    tag = (word >> 32) & (2 * ABORT - 1)
    each = tl.where(tag >= ABORT, _ABORTED, tl.where(tag == _tag(epoch), _HERE, _LATE))
    each = tl.where(live, each, _HERE)
    return tl.max(each, axis=0), each


@triton.jit
def _unite(a, b):
    return a | b


@triton.jit
def _give_up(peers, call, op, verdict, each, word, W: tl.constexpr):
    """Record whom we missed (or whom the ranks that gave up missed), and let the peers know."""
    bit = (call.table * 0 + 1) << tl.arange(0, LANES).to(tl.int64)
    late = tl.reduce(tl.where(each == _LATE, bit, 0), 0, _unite)
    quitters = tl.reduce(tl.where(each == _ABORTED, bit, 0), 0, _unite)
    told = tl.reduce(tl.where(each == _ABORTED, word & 0xFFFFFFFF, 0), 0, _unite)
    missed = tl.where(verdict == _LATE, late, told)
    kind = tl.where(missed == 0, KIND_ABORTED, KIND_TIMEOUT)
    ranks = tl.where(missed == 0, quitters, missed)
    _fail(peers, call, verdict != _HERE, kind, op, ranks, missed, missed * 0)
    for ahead in tl.static_range(2):  # a peer may wait in the next call already
        words = call.epoch + ahead
        _send(peers, call, words, _tag(call.epoch) | ABORT, missed, call.poison == 0, W, True, True)


@triton.jit
def wait(peers, call, op, W: tl.constexpr, MULTICAST: tl.constexpr, ACQUIRE: tl.constexpr = True):
    """Wait for the namesake block of every rank: ``(payloads (LANES,) int64, ok)``.

    ``ok`` may differ between warps; payloads of ranks that did not arrive are unspecified. ``ACQUIRE`` False: this
    launch reads nothing of what the peers wrote, only the launches after it do.
    """
    lanes = tl.arange(0, LANES)
    live = lanes < W
    address = call.own + _word_offset(call.epoch, W) + lanes * 8
    limit = tl.where(call.poison == 0, peers.timeout, 0).to(tl.int64)
    start = device_clock()
    word = poll_word(address, live, ACQUIRE)
    verdict, each = _verdict(word, call.epoch, live)
    while (verdict == _LATE) & (device_clock() - start < limit):
        word = poll_word(address, live, ACQUIRE)
        verdict, each = _verdict(word, call.epoch, live)
    if verdict != _HERE:  # one verdict a warp, and nothing inside synchronises the block
        _give_up(peers, call, op, verdict, each, word, W)
    if MULTICAST:
        fence_aliases(tl.program_id(0))
    return word & 0xFFFFFFFF, (verdict == _HERE) & (call.poison == 0)


@triton.jit
def advance(peers, call, ok):
    """The call of this launch's next exchange; a block barrier. ``ok``: what ``wait`` said.

    Warps may differ about ``ok``, but a block signals once for all of them: where one gave up, all have from here on.
    """
    poison = call.poison
    if block_any((ok == 0).to(tl.int32)) != 0:
        poison = tl.load(peers.state, volatile=True)  # set before the barrier, by the warp that gave up or another
    return Call(call.epoch + 1, poison, call.table, call.own)


@triton.jit
def leave(peers, call):
    """Advance the epoch: block ``b`` of ``G`` writes the words of all blocks that are ``b`` modulo ``G``.

    So the words agree after any grid, without a last block that has to know it is the last. Every
    warp has read its epoch by now: ``signal`` has a block barrier.
    """
    blocks = tl.arange(0, MAX_BLOCKS)
    mine = blocks % tl.num_programs(0) == tl.program_id(0)
    tl.store(peers.state + 1 + blocks, blocks.to(tl.int64) * 0 + call.epoch + 1, mask=mine)

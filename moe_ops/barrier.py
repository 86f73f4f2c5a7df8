"""The barrier of the communication kernels: an all-to-all exchange of one 32-bit number per block.

What it orders. Everything a block wrote before ``signal`` (any thread, any rank's memory) is visible
to block ``b`` of a peer after the peer's ``wait`` returned ``ok``, if this is block ``b``: release and
acquire at system scope, made cumulative over the block by the barrier inside ``signal``. Each warp
acquires for itself, so no block barrier follows the wait.

What it is not. It says nothing about other blocks, of this rank or a peer: a block may read only
what its namesakes wrote. It is not a grid barrier, and it does not protect a buffer from the *next*
writer: that is what two slots are for (docs/protocol.md).

Pattern::

    epoch, poison = enter(peers)
    ... write slot epoch % 2 of the peers ...
    signal(peers, epoch, poison, payload, W, MULTICAST)
    ... anything that needs no peer ...
    payloads, ok = wait(peers, epoch, poison, OP, W, MULTICAST)
    ... read, with trip counts that are 0 unless ok ...
    leave(peers, epoch)

A word on the wire is ``tag << 32 | payload``. The tag is ``epoch + 1`` modulo 2^32; a rank that has
given up sends ``epoch + 1 + ABORT`` and, as payload, the ranks that it missed. Words are never reset:
a wait asks whether the tag's signed distance to ``epoch + 1`` is at least 0. They alternate between
two sets with the epoch's parity, so that a peer one call ahead leaves the payload of this one alone.

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
ABORT = tl.constexpr(1 << 30)

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


@triton.jit
def enter(peers):
    """This call's epoch, and the poison that an earlier one left (0: none). Both int64."""
    epoch = tl.load(peers.state + 1 + tl.program_id(0))
    poison = tl.load(peers.state)
    return epoch, poison


@triton.jit
def _word_offset(epoch, W: tl.constexpr):
    """Bytes from the buffer's start to the words of this block, for this epoch's parity."""
    return ((epoch & 1) * MAX_BLOCKS + tl.program_id(0)) * (W * 8)


@triton.jit
def _fail(peers, failed, kind, op, epoch, ranks, amounts):
    """Poison this workspace and tell the host, where ``failed``. Returns the poison."""
    poison = (1 << 32) | (ranks & 0xFFFFFFFF)
    header = epoch * 0 + (kind | (op << 8))
    record_failure(
        failed.to(tl.int32), peers.state.to(tl.int64), poison, peers.record, header, epoch, ranks, amounts
    )
    return tl.where(failed, poison, poison * 0)


@triton.jit
def check_capacity(peers, epoch, poison, op, rows, limit, ranks):
    """Poison the workspace if ``rows > limit`` (scalars); ``ranks`` (int64 mask): whose rows. Returns the poison."""
    failed = (rows > limit) & (poison == 0)
    amounts = (rows.to(tl.int64) << 32) | limit
    return poison | _fail(peers, failed, KIND_CAPACITY, op, epoch, ranks, amounts)


@triton.jit
def live_rows(peers, epoch, poison, op, local_tokens_ptr, metadata_ptr, row_limit, valid_limit):
    """``(t, valid, offset, poison)``, int64. All counts are 0 in a poisoned workspace, which too many rows make it."""
    t = tl.maximum(tl.load(local_tokens_ptr), 0)
    valid = tl.load(metadata_ptr)
    offset = tl.load(metadata_ptr + 1)
    ranks = (epoch * 0 + 1) << peers.rank
    poison = check_capacity(peers, epoch, poison, op, t, row_limit, ranks)
    poison = check_capacity(peers, epoch, poison, op, valid, valid_limit, ranks)
    poison = check_capacity(peers, epoch, poison, op, offset + t, valid, ranks)
    alive = (poison == 0).to(tl.int64)
    return t * alive, valid * alive, offset * alive, poison


@triton.jit
def _send(peers, epoch, tag, payload, mask, W: tl.constexpr, FIRST_WARP: tl.constexpr):
    lanes = tl.arange(0, LANES)
    live = (lanes < W) & mask
    address = tl.load(peers.table + lanes, mask=lanes < W, other=0) + _word_offset(epoch, W) + peers.rank * 8
    word = (lanes * 0).to(tl.int64) + ((tag << 32) | (payload & 0xFFFFFFFF))
    if FIRST_WARP:
        signal_word(address, word, live)
    else:
        abort_word(address, word, live)


@triton.jit
def signal(peers, epoch, poison, payload, W: tl.constexpr, MULTICAST: tl.constexpr):
    """Publish what this block wrote, and ``payload`` (scalar, 32 bits), to the namesake block of every rank."""
    if MULTICAST:
        fence_aliases(tl.program_id(0))
    tl.debug_barrier()  # the whole block's stores come before the release below
    given_up = poison != 0
    tag = epoch + 1 + tl.where(given_up, ABORT, 0).to(tl.int64)
    _send(peers, epoch, tag, tl.where(given_up, poison, payload.to(tl.int64)), True, W, True)


@triton.jit
def _verdict(word, epoch, live):
    """0 everyone is here, 1 somebody is late, 2 somebody gave up: scalar and by lane."""
    ahead = ((word >> 32) - (epoch + 1)).to(tl.int32)
    each = tl.where(ahead < 0, _LATE, tl.where(ahead >= ABORT // 2, _ABORTED, _HERE))
    each = tl.where(live, each, _HERE)
    return tl.max(each, axis=0), each


@triton.jit
def _unite(a, b):
    return a | b


@triton.jit
def _give_up(peers, epoch, poison, op, verdict, each, word, W: tl.constexpr):
    """Record whom we missed (or whom the ranks that gave up missed), and let the peers know."""
    lanes = tl.arange(0, LANES)
    bit = (lanes * 0 + 1).to(tl.int64) << lanes.to(tl.int64)
    late = tl.reduce(tl.where(each == _LATE, bit, 0), 0, _unite)
    quitters = tl.reduce(tl.where(each == _ABORTED, bit, 0), 0, _unite)
    told = tl.reduce(tl.where(each == _ABORTED, word & 0xFFFFFFFF, 0), 0, _unite)
    missed = tl.where(verdict == _LATE, late, told)
    kind = tl.where(missed == 0, KIND_ABORTED, KIND_TIMEOUT).to(tl.int64)
    fresh = poison == 0
    _fail(peers, fresh, kind, op, epoch, tl.where(missed == 0, quitters, missed), epoch * 0)
    _send(peers, epoch, epoch + 1 + ABORT, missed, fresh, W, False)


@triton.jit
def wait(peers, epoch, poison, op, W: tl.constexpr, MULTICAST: tl.constexpr):
    """Wait for the namesake block of every rank: ``(payloads (LANES,) int64, ok)``.

    ``ok`` may differ between warps; payloads of ranks that did not arrive are unspecified.
    """
    lanes = tl.arange(0, LANES)
    live = lanes < W
    address = tl.load(peers.table + peers.rank) + _word_offset(epoch, W) + lanes * 8
    limit = tl.where(poison == 0, peers.timeout, 0).to(tl.int64)
    word = poll_word(address, live)
    verdict, each = _verdict(word, epoch, live)
    start = device_clock()
    while (verdict == _LATE) & (device_clock() - start < limit):
        word = poll_word(address, live)
        verdict, each = _verdict(word, epoch, live)
    if verdict != _HERE:  # one verdict a warp, and nothing inside synchronises the block
        _give_up(peers, epoch, poison, op, verdict, each, word, W)
    if MULTICAST:
        fence_aliases(tl.program_id(0))
    return word & 0xFFFFFFFF, (verdict == _HERE) & (poison == 0)


@triton.jit
def leave(peers, epoch):
    """Advance the epoch: block ``b`` of ``G`` writes the words of all blocks that are ``b`` modulo ``G``.

    So the words agree after any grid, without a last block that has to know it is the last. Every
    warp has read its epoch by now: ``signal`` has a block barrier.
    """
    blocks = tl.arange(0, MAX_BLOCKS)
    mine = blocks % tl.num_programs(0) == tl.program_id(0)
    tl.store(peers.state + 1 + blocks, blocks.to(tl.int64) * 0 + epoch + 1, mask=mine)

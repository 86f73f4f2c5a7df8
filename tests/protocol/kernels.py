"""The communication kernels, reduced to what docs/protocol.md is about. Names follow ``moe_ops/barrier.py``.

Each kernel is a generator: it yields what one warp does to memory and is sent what it read. A unit of data is one
row, of which each warp handles its part. ``faults`` takes mechanisms out; ``FAULTS`` says what each one does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

FAULTS = {
    "no_wait": "nobody waits",
    "wait_for_one": "a block waits for the next rank only",
    "own_word_only": "a block waits for its own word only",
    "signal_first": "the barrier comes before the data is written",
    "relaxed_signal": "the signal is not a release",
    "relaxed_poll": "the poll is not an acquire",
    "no_block_barrier": "the first warp signals without waiting for the block's other warps",
    "one_warp_polls": "only the first warp polls, and no block barrier follows",
    "one_slot": "one slot in place of two",
    "slot_of_graph": "the slot is the op's place in the captured graph, not the device's epoch",
    "epoch_of_graph": "the epoch is a constant of the captured graph",
    "epoch_stays": "nobody advances the epoch",
    "own_epoch_only": "a block advances its own epoch word, not those of the blocks beyond the grid",
    "early_epoch": "the epoch advances before the block barrier, while other warps may still read it",
    "local_rows": "a block's rows are counted from the rank's own first row, not globally",
    "one_word_set": "one set of words in place of two: a peer one call ahead overwrites the payload",
    "one_word_set_equal": "the same, and a poll asks for equality",
    "unsigned": "a poll compares tags, not their signed distance",
    "signed": "a poll takes any tag that is at or ahead of its own for an arrival, not that very tag",
    "grid_of_rank": "the grid is chosen from the rank's own rows",
    "poisoned_signals": "a rank that gave up goes on signalling its arrival",
    "poisoned_writes": "a rank that gave up goes on writing rows",
    "private_poison": "giving up does not reach the launches that follow",
    "poison_by_warp": "every warp looks for itself whether the workspace is poisoned",
    "no_entry": "dispatch_into pushes without the first meeting",
    "no_exit": "combine_from ends without the second meeting",
    "entry_relaxed": "the first meeting's poll is not an acquire",
    "exit_relaxed": "the second meeting's signal is not a release",
    "from_relaxed": "combine_from's poll is not an acquire",
    "no_vote": "after the first meeting every warp goes by its own verdict",
    "second_epoch_stays": "an op that meets twice advances the epoch by one",
    "unguarded": "what writes into a buffer runs on in a workspace that gave up",
}

HERE, LATE, ABORTED = range(3)
ABORT = "abort"  # in place of a tag


class Op(NamedTuple):
    """One launch, the same on all ranks. ``counts[r]`` is rank r's number of live rows.

    "into" and "from" are ``dispatch_into`` and ``combine_from`` over the buffer in ``writes`` or ``reads``; ``alone``:
    with the second meeting. "local" (experts) reads own rows of its buffers and writes others; it meets nobody.
    """

    kind: str  # "metadata", "dispatch", "combine", "into", "from" or "local"
    counts: tuple[int, ...]
    grid: int = 1
    place: int = 0  # in the captured graph
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    alone: bool = True

    @property
    def meetings(self) -> int:
        return 0 if self.kind == "local" else 2 if self.kind in ("into", "from") and self.alone else 1

    def grid_on(self, rank: int, faults: frozenset[str]) -> int:
        if self.kind == "metadata":
            return 1
        return max(1, self.counts[rank]) if "grid_of_rank" in faults else self.grid


class Read(NamedTuple):
    """Load of a data word; ``expect`` is what the output needs, None if the kernel itself uses it."""

    word: tuple
    expect: Any = None


class Write(NamedTuple):
    word: tuple
    value: Any


class Sync(NamedTuple):
    """A block barrier; is sent whether any warp voted."""

    vote: bool = False


class Store(NamedTuple):
    """Store of a sync word at system scope."""

    word: tuple
    value: Any
    release: bool = True


class Poll(NamedTuple):
    """Load all ``words`` until they say all here, or one aborted; is sent ``(verdict, values)``."""

    words: tuple[tuple, ...]
    target: int
    compare: str  # "equal", "signed", "unsigned"
    acquire: bool

    def judge(self, value: tuple, modulus: int) -> int:
        tag = value[0]
        if tag == ABORT:
            return ABORTED
        ahead = {"equal": tag == self.target, "unsigned": tag >= self.target}
        here = ahead.get(self.compare, (tag - self.target) % modulus < modulus // 2)
        return HERE if here else LATE

    def verdict(self, values: tuple, modulus: int) -> int:
        return max((self.judge(value, modulus) for value in values), default=HERE)


class Load(NamedTuple):
    """Relaxed load of a sync word. ``once``: one thread loads for the whole block, at the block's first load."""

    word: tuple
    once: bool


class Poison(NamedTuple):
    """Compare-and-swap of the own rank's poison: the first to come sets it."""

    word: tuple
    value: Any


class Check(NamedTuple):
    """The op's output is right, or the reason why not."""

    problem: str | None


Warp = Generator[Any, Any, Any]


@dataclass(frozen=True)
class Kernel:
    """One warp of one launch."""

    rank: int
    world: int
    op: Op
    index: int
    block: int
    warp: int
    warps: int
    width: int  # epoch words of a rank
    faults: frozenset[str]
    modulus: int  # tags are counted modulo this
    filled: dict[str, tuple[int, Op]] = field(default_factory=dict)  # by buffer: who wrote it last, and its index

    @property
    def grid(self) -> int:
        return self.op.grid_on(self.rank, self.faults)

    def rows(self, first: int, count: int, origin: int = 0) -> Iterator[int]:
        """This block's share of the gathered rows ``[first, first + count)``."""
        return (row for row in range(first, first + count) if (row - origin) % self.grid == self.block)

    def own_rows(self) -> Iterator[int]:
        first = sum(self.op.counts[: self.rank])
        return self.rows(first, self.op.counts[self.rank], first if "local_rows" in self.faults else 0)

    def data(self, region: str, owner: int, epoch: int, row: int) -> tuple:
        """This warp's part of a row in a slot of ``owner``."""
        slot = (self.op.place if "slot_of_graph" in self.faults else epoch) % 2
        return (region, owner, 0 if "one_slot" in self.faults else slot, row, self.warp)

    def word(self, owner: int, sender: int, epoch: int) -> tuple:
        one_set = self.faults & {"one_word_set", "one_word_set_equal"}
        return ("word", owner, 0 if one_set else epoch % 2, self.block, sender)

    def run(self) -> Warp:
        if self.op.kind == "local":
            yield from self.local()
            return
        epoch = yield Read(("epoch", self.rank, self.block))
        if "early_epoch" in self.faults:
            yield from self.leave(epoch)
        if "epoch_of_graph" in self.faults:
            epoch = self.op.place
        poison = yield Load(("poison", self.rank), once="poison_by_warp" not in self.faults)
        if "poison_by_warp" not in self.faults:
            yield Sync()  # what unites the warps' poison; it also ends the reads of the epoch
        if "private_poison" in self.faults:
            poison = 0
        bodies = {"metadata": self.metadata, "dispatch": self.dispatch, "combine": self.combine}
        bodies |= {"into": self.into, "from": self.combine_from}
        yield from bodies[self.op.kind](epoch, poison)
        if "early_epoch" not in self.faults:
            yield from self.leave(epoch)

    def leave(self, epoch: int) -> Warp:
        """Any warp may be the one that stores a word: here the last."""
        if self.warp == self.warps - 1 and "epoch_stays" not in self.faults:
            stop = self.block + 1 if "own_epoch_only" in self.faults else self.width
            meetings = 1 if "second_epoch_stays" in self.faults else self.op.meetings
            for block in range(self.block, stop, self.grid):
                yield Write(("epoch", self.rank, block), (epoch + meetings) % self.modulus)

    def signal(self, epoch: int, poison: Any, payload: int, release: bool = True) -> Warp:
        """``release`` False: only what earlier launches did is announced."""
        if release and "no_block_barrier" not in self.faults:
            yield Sync()
        tag = ABORT if poison and "poisoned_signals" not in self.faults else (epoch + 1) % self.modulus
        if self.warp == 0:
            for peer in range(self.world):
                word = self.word(peer, self.rank, epoch)
                yield Store(word, (tag, payload), release=release and "relaxed_signal" not in self.faults)

    def wait(self, epoch: int, poison: Any, acquire: bool = True) -> Warp:
        """``(ok, payloads)``. A poisoned block looks once, and does nothing about what it sees.

        ``acquire`` False: only later launches read what the peers wrote.
        """
        if poison:
            return False, {}
        senders = range(self.world)
        if "wait_for_one" in self.faults:
            senders = [(self.rank + 1) % self.world]
        elif "own_word_only" in self.faults:
            senders = [self.rank]
        if "no_wait" in self.faults or ("one_warp_polls" in self.faults and self.warp > 0):
            senders = []
        words = tuple(self.word(self.rank, sender, epoch) for sender in senders)
        signed = "signed" in self.faults or "one_word_set" in self.faults
        compare = "unsigned" if "unsigned" in self.faults else "signed" if signed else "equal"
        poll = Poll(words, (epoch + 1) % self.modulus, compare, acquire and "relaxed_poll" not in self.faults)
        verdict, values = yield poll
        if verdict != HERE:
            yield Poison(("poison", self.rank), 1)
            for ahead, peer in product(range(2), range(self.world)):  # a peer may wait in the next call already
                yield Store(self.word(peer, self.rank, epoch + ahead), (ABORT, 0))
        return verdict == HERE, {s: v[1] for s, v in zip(senders, values)}

    def metadata(self, epoch: int, poison: Any) -> Warp:
        yield from self.signal(epoch, poison, self.op.counts[self.rank], release=False)
        _, payloads = yield from self.wait(epoch, poison, acquire=False)
        got = tuple(payloads.get(rank, 0) for rank in range(self.world))
        yield Check(None if got == self.op.counts else f"metadata gathered {got} in place of {self.op.counts}")

    def dispatch(self, epoch: int, poison: Any) -> Warp:
        ok = False
        if "signal_first" in self.faults:
            yield from self.signal(epoch, poison, 0)
            ok, _ = yield from self.wait(epoch, poison)
        for row in self.own_rows() if not poison or "poisoned_writes" in self.faults else ():
            for owner in range(self.world):
                yield Write(self.data("dispatch", owner, epoch, row), (self.index, row))
        if "signal_first" not in self.faults:
            yield from self.signal(epoch, poison, 0)
            ok, _ = yield from self.wait(epoch, poison)
        for row in self.rows(0, sum(self.op.counts)) if ok else ():
            yield Read(self.data("dispatch", self.rank, epoch, row), expect=(self.index, row))

    def combine(self, epoch: int, poison: Any) -> Warp:
        ok = False
        if "signal_first" in self.faults:
            yield from self.signal(epoch, poison, 0)
            ok, _ = yield from self.wait(epoch, poison)
        for row in self.rows(0, sum(self.op.counts)) if not poison or "poisoned_writes" in self.faults else ():
            yield Write(self.data("combine", self.rank, epoch, row), (self.index, self.rank, row))
        if "signal_first" not in self.faults:
            yield from self.signal(epoch, poison, 0)
            ok, _ = yield from self.wait(epoch, poison)
        for row in self.own_rows() if ok else ():
            for source in range(self.world):
                yield Read(self.data("combine", source, epoch, row), expect=(self.index, source, row))

    def advance(self, poison: Any, ok: bool) -> Warp:
        """The poison that holds for the second meeting: one verdict for the whole block."""
        gave_up = not ok
        if "no_vote" not in self.faults:
            gave_up = yield Sync(vote=gave_up)
        return 1 if gave_up else poison

    def into(self, epoch: int, poison: Any) -> Warp:
        (buffer,) = self.op.writes
        if self.op.alone and "no_entry" not in self.faults:
            yield from self.signal(epoch, poison, 0, release=False)
            ok, _ = yield from self.wait(epoch, poison, acquire="entry_relaxed" not in self.faults)
            poison = yield from self.advance(poison, ok)
        epoch += self.op.meetings - 1
        first = sum(self.op.counts[: self.rank])
        for row in self.rows(first, self.op.counts[self.rank], first) if not poison else ():
            for owner in range(self.world):
                yield Write((buffer, owner, row, self.warp), (self.index, row))
        yield from self.signal(epoch, poison, 0)
        ok, _ = yield from self.wait(epoch, poison, acquire=False)
        if self.block == self.warp == 0:
            yield Write(("live", self.rank), ok)

    def combine_from(self, epoch: int, poison: Any) -> Warp:
        (buffer,) = self.op.reads
        yield from self.signal(epoch, poison, 0, release=False)
        ok, _ = yield from self.wait(epoch, poison, acquire="from_relaxed" not in self.faults)
        first = sum(self.op.counts[: self.rank])
        for row in self.rows(first, self.op.counts[self.rank], first) if ok else ():
            for source in range(self.world):
                yield Read((buffer, source, row, self.warp), expect=self.content(buffer, source, row))
        if self.op.alone and "no_exit" not in self.faults:
            poison = yield from self.advance(poison, ok)
            yield from self.signal(epoch + 1, poison, 0, release="exit_relaxed" not in self.faults)
            yield from self.wait(epoch + 1, poison, acquire=False)

    def local(self) -> Warp:
        """Experts: they count rows by what the last dispatch_into left, if there was one."""
        live = yield Read(("live", self.rank))
        if live is False and "unguarded" not in self.faults:
            return
        for row in self.rows(0, sum(self.op.counts)):
            for buffer in self.op.reads:
                yield Read((buffer, self.rank, row, self.warp), expect=self.content(buffer, self.rank, row))
            for buffer in self.op.writes:
                yield Write((buffer, self.rank, row, self.warp), (self.index, self.rank, row))

    def content(self, buffer: str, owner: int, row: int) -> Any:
        """What the buffer's last writer put there; None if there was none."""
        if buffer not in self.filled:
            return None
        index, op = self.filled[buffer]
        return (index, row) if op.kind == "into" else (index, owner, row)

"""The communication kernels, reduced to what docs/protocol.md is about. Names follow ``moe_ops/barrier.py``.

Each kernel is a generator: it yields what one warp does to memory and is sent what it read. A unit of data is one
row, of which each warp handles its part. ``faults`` takes mechanisms out; ``FAULTS`` says what each one does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
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
}

HERE, LATE, ABORTED = range(3)
ABORT = "abort"  # in place of a tag


class Op(NamedTuple):
    """One communication call, the same on all ranks. ``counts[r]`` is rank r's number of live rows."""

    kind: str  # "metadata", "dispatch" or "combine"
    counts: tuple[int, ...]
    grid: int = 1
    place: int = 0  # in the captured graph

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
    """A block barrier."""


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
        epoch = yield Read(("epoch", self.rank, self.block))
        if "early_epoch" in self.faults:
            yield from self.leave(epoch)
        if "epoch_of_graph" in self.faults:
            epoch = self.op.place
        poison = yield Load(("poison", self.rank), once="poison_by_warp" not in self.faults)
        if "private_poison" in self.faults:
            poison = 0
        yield from {"metadata": self.metadata, "dispatch": self.dispatch, "combine": self.combine}[self.op.kind](
            epoch, poison
        )
        if "early_epoch" not in self.faults:
            yield from self.leave(epoch)

    def leave(self, epoch: int) -> Warp:
        """Any warp may be the one that stores a word: here the last."""
        if self.warp == self.warps - 1 and "epoch_stays" not in self.faults:
            stop = self.block + 1 if "own_epoch_only" in self.faults else self.width
            for block in range(self.block, stop, self.grid):
                yield Write(("epoch", self.rank, block), (epoch + 1) % self.modulus)

    def signal(self, epoch: int, poison: Any, payload: int) -> Warp:
        if "no_block_barrier" not in self.faults:
            yield Sync()
        tag = ABORT if poison and "poisoned_signals" not in self.faults else (epoch + 1) % self.modulus
        if self.warp == 0:
            for peer in range(self.world):
                word = self.word(peer, self.rank, epoch)
                yield Store(word, (tag, payload), release="relaxed_signal" not in self.faults)

    def wait(self, epoch: int, poison: Any) -> Warp:
        """``(ok, payloads)``. A poisoned block looks once, and does nothing about what it sees."""
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
        poll = Poll(words, (epoch + 1) % self.modulus, compare, acquire="relaxed_poll" not in self.faults)
        verdict, values = yield poll
        if verdict != HERE:
            yield Poison(("poison", self.rank), 1)
            for ahead, peer in product(range(2), range(self.world)):  # a peer may wait in the next call already
                yield Store(self.word(peer, self.rank, epoch + ahead), (ABORT, 0))
        return verdict == HERE, {s: v[1] for s, v in zip(senders, values)}

    def metadata(self, epoch: int, poison: Any) -> Warp:
        yield from self.signal(epoch, poison, self.op.counts[self.rank])
        _, payloads = yield from self.wait(epoch, poison)
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

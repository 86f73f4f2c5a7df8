"""The communication kernels, reduced to what the protocol in docs/protocol.md is about.

Each kernel is a generator: it yields what one block does to memory and is sent the value read. A unit of data is one
row. ``faults`` takes mechanisms out; ``FAULTS`` says what each one does.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

FAULTS = {
    "no_wait": "the barrier signals but does not wait",
    "wait_for_one": "the barrier waits for the next rank only",
    "signal_first": "the barrier runs before the data is written",
    "relaxed_signal": "the signal is not a release",
    "relaxed_poll": "the poll is not an acquire",
    "no_sync_before_signal": "the leader signals without waiting for its block's other threads",
    "no_sync_after_wait": "the block's other threads go on without waiting for the leader's poll",
    "one_slot": "one slot in place of two",
    "slot_of_graph": "the slot is the op's place in the captured graph, not the device's epoch",
    "epoch_of_graph": "the epoch is a constant of the captured graph",
    "epoch_stays": "nobody advances the epoch",
    "first_advances": "the first block to finish advances the epoch",
    "arrivals_stay": "the last block does not set arrivals to zero",
    "local_rows": "a block's rows are counted from the rank's own first row",
    "equal": "the poll asks for equality",
    "unsigned": "the poll compares values, not their signed difference",
    "one_count": "the count words have one slot in place of two",
    "metadata_own_count": "metadata does not wait for the counts of the others",
    "grid_of_rank": "the grid is chosen from the rank's own rows",
    "poisoned_signals": "a rank that timed out goes on signalling",
    "poisoned_writes": "a rank that timed out goes on writing, but does not signal",
    "timeout_is_private": "a time-out does not reach the launches that follow",
}


class Op(NamedTuple):
    """One communication call, the same on all ranks. ``counts[r]`` is rank r's number of live rows."""

    kind: str  # "metadata", "dispatch" or "combine"
    counts: tuple[int, ...]
    grid: int = 1
    place: int = 0  # in the captured graph


# What a block does. Data words are read and written by all lanes, sync words by the leader.
class Read(NamedTuple):
    word: tuple
    expect: Any = None


class Write(NamedTuple):
    word: tuple
    value: Any


class Sync(NamedTuple):
    """__syncthreads."""


class Store(NamedTuple):
    word: tuple
    value: Any
    release: bool


class Poll(NamedTuple):
    """Wait until ``accept(value)``; is sent the value, or None after a time-out."""

    word: tuple
    target: int
    compare: str  # "reached", "equal", "unsigned" or "tag"
    acquire: bool


class Load(NamedTuple):
    word: tuple


class Add(NamedTuple):
    """Atomic add of one, acquire and release, on a word of the own device; is sent the value before."""

    word: tuple


class Check(NamedTuple):
    """The op's output is right, or the reason why not."""

    problem: str | None


Block = Generator[Any, Any, None]


@dataclass(frozen=True)
class Kernel:
    """One block of one launch."""

    rank: int
    world: int
    op: Op
    index: int
    block: int
    faults: frozenset[str]
    modulus: int  # epochs are counted modulo this
    slots: int = 2

    @property
    def grid(self) -> int:
        return grid_of(self.op, self.rank, self.faults)

    @property
    def peers(self) -> list[int]:
        return [(self.rank + step) % self.world for step in range(1, self.world)]

    def rows(self, first: int, count: int, origin: int = 0) -> Iterator[int]:
        """This block's share of the gathered rows ``[first, first + count)``."""
        return (row for row in range(first, first + count) if (row - origin) % self.grid == self.block)

    def own_rows(self) -> Iterator[int]:
        first = sum(self.op.counts[: self.rank])
        return self.rows(first, self.op.counts[self.rank], first if "local_rows" in self.faults else 0)

    def slot(self, epoch: int) -> int:
        if "one_slot" in self.faults:
            return 0
        return (self.op.place if "slot_of_graph" in self.faults else epoch) % self.slots

    def run(self) -> Block:
        epoch = yield Read(("epoch", self.rank))
        if "epoch_of_graph" in self.faults:
            epoch = self.op.place
        poisoned = yield Load(("poisoned", self.rank))
        if "timeout_is_private" in self.faults:
            poisoned = 0
        body = {"metadata": self.metadata, "dispatch": self.dispatch, "combine": self.combine}[self.op.kind]
        if not poisoned:
            yield from body(epoch)
        elif "poisoned_signals" in self.faults:
            yield from self.signal(epoch)
        elif "poisoned_writes" in self.faults and self.op.kind == "dispatch":
            yield from self.push(epoch)
        yield from self.leave(epoch)

    def leave(self, epoch: int) -> Block:
        arrived = yield Add(("arrivals", self.rank))
        if arrived == (0 if "first_advances" in self.faults else self.grid - 1):
            if "arrivals_stay" not in self.faults:
                yield Store(("arrivals", self.rank), 0, release=False)
            if "epoch_stays" not in self.faults:
                yield Write(("epoch", self.rank), (epoch + 1) % self.modulus)

    def barrier(self, epoch: int) -> Block:
        yield from self.signal(epoch)
        yield from self.wait(epoch)

    def signal(self, epoch: int) -> Block:
        if "no_sync_before_signal" not in self.faults:
            yield Sync()
        for peer in self.peers:
            word = ("signal", peer, self.block, self.rank)
            yield Store(word, (epoch + 1) % self.modulus, release="relaxed_signal" not in self.faults)

    def wait(self, epoch: int) -> Block:
        peers = [] if "no_wait" in self.faults else self.peers[: 1 if "wait_for_one" in self.faults else None]
        compare = next((c for c in ("equal", "unsigned") if c in self.faults), "reached")
        for peer in peers:
            word = ("signal", self.rank, self.block, peer)
            seen = yield Poll(word, (epoch + 1) % self.modulus, compare, acquire="relaxed_poll" not in self.faults)
            if seen is None:
                yield Store(("poisoned", self.rank), 1, release=False)
        if "no_sync_after_wait" not in self.faults:
            yield Sync()

    def metadata(self, epoch: int) -> Block:
        slot = 0 if "one_count" in self.faults else epoch % self.slots
        counts = {self.rank: self.op.counts[self.rank]}
        for peer in self.peers:
            yield Store(("count", peer, slot, self.rank), ((epoch + 1) % self.modulus, counts[self.rank]), release=False)
        for peer in [] if "metadata_own_count" in self.faults else self.peers:
            seen = yield Poll(("count", self.rank, slot, peer), (epoch + 1) % self.modulus, "tag", acquire=False)
            if seen is None:
                yield Store(("poisoned", self.rank), 1, release=False)
            counts[peer] = seen[1] if seen else 0
        got = tuple(counts.get(rank, 0) for rank in range(self.world))
        yield Check(None if got == self.op.counts else f"metadata gathered {got} in place of {self.op.counts}")

    def push(self, epoch: int) -> Block:
        for row in self.own_rows():
            for rank in range(self.world):
                yield Write(("dispatch", rank, self.slot(epoch), row), (self.index, row))

    def dispatch(self, epoch: int) -> Block:
        if "signal_first" in self.faults:
            yield from self.barrier(epoch)
            yield from self.push(epoch)
        else:
            yield from self.push(epoch)
            yield from self.barrier(epoch)
        for row in self.rows(0, sum(self.op.counts)):
            yield Read(("dispatch", self.rank, self.slot(epoch), row), expect=(self.index, row))

    def combine(self, epoch: int) -> Block:
        if "signal_first" in self.faults:
            yield from self.barrier(epoch)
        for row in self.rows(0, sum(self.op.counts)):
            yield Write(("combine", self.rank, self.slot(epoch), row), (self.index, self.rank, row))
        if "signal_first" not in self.faults:
            yield from self.barrier(epoch)
        for row in self.own_rows():
            for rank in range(self.world):
                yield Read(("combine", rank, self.slot(epoch), row), expect=(self.index, rank, row))


def grid_of(op: Op, rank: int, faults: frozenset[str]) -> int:
    if op.kind == "metadata":
        return 1
    return max(1, op.counts[rank]) if "grid_of_rank" in faults else op.grid


def accepts(poll: Poll, value: Any, modulus: int) -> bool:
    """Whether the poll ends on this value."""
    if poll.compare == "tag":  # a count word: (epoch + 1, count)
        return value != 0 and value[0] == poll.target
    if poll.compare == "equal":
        return value == poll.target
    if poll.compare == "unsigned":
        return value >= poll.target
    return (value - poll.target) % modulus < modulus // 2

"""Memory as far as the protocol may rely on it: who provably happened before whom, and nothing more.

Every access carries a vector clock. Words come in two kinds:

* **data** words must be free of races. A read that is not ordered after the last write, or a write that is not
  ordered after an earlier read, is a fault whatever order this one run had: on real hardware a store may still be
  under way, and a load may have been done early.
* **sync** words (signals, counts, counters) keep their history. A load may return any value that is not provably
  out of date; a poll is only *sure* to end if the newest value ends it.

A release store publishes the clock of its lane; a relaxed one only what was complete when the kernel started. An
acquire load takes over the clock that it reads; what a relaxed load reads counts from the kernel's end on. (Stream
order makes a kernel's end and the next one's start fences; the proof assumes that.)
"""

from __future__ import annotations

from typing import Any, NamedTuple

Clock = tuple[int, ...]


class Stamp(NamedTuple):
    """One access: by which lane, at which of its ticks, in which op of which rank."""

    lane: int
    tick: int
    rank: int
    op: int


class Message(NamedTuple):
    """One value that a sync word had."""

    value: Any
    clock: Clock
    lane: int
    tick: int


class DataWord(NamedTuple):
    """The last value of a data word, who wrote it, and who read it since."""

    value: Any
    writer: Stamp | None
    readers: tuple[Stamp, ...]


NEVER_WRITTEN = DataWord(None, None, ())
RACED = "one of two unordered writes"


def join(*clocks: Clock) -> Clock:
    return tuple(map(max, *clocks)) if len(clocks) > 1 else clocks[0]


def tick(clock: Clock, lane: int) -> Clock:
    return (*clock[:lane], clock[lane] + 1, *clock[lane + 1 :])


def knows(clock: Clock, stamp: Stamp | Message | None) -> bool:
    """Whether the access happened before everything that a lane with this clock does next."""
    return stamp is None or clock[stamp.lane] >= stamp.tick


def readable(history: tuple[Message, ...], clock: Clock) -> tuple[Message, ...]:
    """The values that a load may return: all but those with a provably later one."""
    known = [i for i, message in enumerate(history) if knows(clock, message)]
    return history[known[-1] if known else 0 :]

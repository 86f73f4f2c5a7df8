"""The steps that warps can take: which there are, and what each does to memory and clocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

from . import kernels as k
from .memory import NEVER_WRITTEN, RACED, Clock, DataWord, Message, Stamp, join, knows, readable, tick

DONE = ("done",)
KEPT = 4  # values a sync word remembers; nobody may read an older one, as a peer is one call ahead at most


@dataclass(frozen=True)
class Case:
    """What is run: the same ``ops`` on all ranks, by ``warps`` warps a block.

    ``timeouts``: ``(rank, block)`` whose polls may end without success. ``mortal``: that rank may stop for ever.
    ``resident``: blocks of one launch that run at a time (None: all), started by index if ``in_order``.
    ``modulus``: tags wrap around there.
    """

    world: int
    ops: tuple[k.Op, ...]
    warps: int = 1
    faults: frozenset[str] = frozenset()
    timeouts: frozenset[tuple[int, int]] = frozenset()
    mortal: int | None = None
    resident: int | None = None
    in_order: bool = False
    modulus: int = 1 << 31

    @property
    def width(self) -> int:
        """Blocks of the widest launch."""
        return max((op.grid_on(rank, self.faults) for rank in range(self.world) for op in self.ops), default=1)


class Lane(NamedTuple):
    """Clocks of one warp: now, at the last release fence, and read by relaxed loads since the last acquire fence."""

    clock: Clock
    released: Clock
    pending: Clock


class Thread(NamedTuple):
    """One warp: what it was sent so far (which determines where it is), and its clocks."""

    history: tuple
    lane: Lane


class Rank(NamedTuple):
    """Warp ``w`` of block ``b`` is ``threads[b * warps + w]``."""

    op: int
    threads: tuple[Thread, ...]
    alive: bool = True


@dataclass
class State:
    ranks: list[Rank]
    sync: dict[tuple, tuple[Message, ...]] = field(default_factory=dict)
    data: dict[tuple, DataWord] = field(default_factory=dict)
    uniform: dict[tuple, Any] = field(default_factory=dict)  # (rank, block) -> what it loaded once for all warps
    taints: dict[tuple[int, int], str] = field(default_factory=dict)  # (rank, op) -> why its output is not certain
    healthy: frozenset[tuple[int, int]] = frozenset()  # (rank, op) that ended unpoisoned: its output counts

    def copy(self) -> State:
        return State(
            list(self.ranks), dict(self.sync), dict(self.data), dict(self.uniform), dict(self.taints), self.healthy
        )

    def key(self) -> int:
        parts = (self.sync.items(), self.data.items(), self.uniform.items(), self.taints.items(), self.healthy)
        return hash((tuple(self.ranks), *map(frozenset, parts)))


class Choice(NamedTuple):
    """One step that could come next. ``sure``: if nothing else happens, this will."""

    rank: int
    thread: int
    messages: tuple[Message, ...] = ()
    verdict: int = k.HERE
    dies: bool = False
    sure: bool = True


class Violation(Exception):
    """The protocol failed; ``kind`` is one of race, output, deadlock, state."""

    def __init__(self, reason: str):
        self.kind = reason.split(":")[0]
        super().__init__(reason)


class Machine:
    """Successors of a state.

    Accesses to data words never wait to be chosen: if they are free of races, their order does not matter, and
    races are found by clocks, whatever the order. ``reduced`` treats two more kinds of step so, as long as no poll
    can fail: stores of signals, which take nothing away from anybody, and polls that can succeed, which will
    still be able to later; among the values that end a poll it takes the oldest, which brings the least knowledge.
    """

    def __init__(self, case: Case, reduced: bool):
        self.case = case
        overwritten = case.faults & {"one_word_set", "one_word_set_equal"}
        self.reduced = reduced and not (case.timeouts or overwritten)
        self.zero: Clock = (0,) * (case.world * case.width * case.warps)
        self._actions: dict[tuple, Any] = {}

    def initial(self) -> State:
        state = State([Rank(0, ()) for _ in range(self.case.world)])
        for rank in range(self.case.world):
            state.sync["poison", rank] = (Message(0, self.zero, 0, 0),)
            for block in range(self.case.width):
                state.data["epoch", rank, block] = DataWord(0, None, ())
            self._launch(state, rank, 0, self.zero)
        return self._settle(state)

    def _launch(self, state: State, rank: int, op: int, base: Clock) -> None:
        """Start an op's warps; each knows what the rank knew (stream order)."""
        grid = self.case.ops[op].grid_on(rank, self.case.faults) if op < len(self.case.ops) else 0
        lanes = [Lane(tick(base, self._id(rank, i)), base, base) for i in range(grid * self.case.warps)]
        state.ranks[rank] = Rank(op, tuple(Thread((), lane) for lane in lanes))

    def _id(self, rank: int, thread: int) -> int:
        return rank * self.case.width * self.case.warps + thread

    def _history(self, state: State, word: tuple) -> tuple[Message, ...]:
        return state.sync.get(word) or (Message((0, 0), self.zero, 0, 0),)

    def action(self, state: State, rank: int, thread: int) -> Any:
        """What this warp does next; None if it is through."""
        at, case = state.ranks[rank], self.case
        history = at.threads[thread].history
        if history == DONE:
            return None
        key = (rank, at.op, thread, history)
        if key not in self._actions:
            block, warp = divmod(thread, case.warps)
            kernel = k.Kernel(
                rank, case.world, case.ops[at.op], at.op, block, warp, case.warps, case.width, case.faults,
                case.modulus, self._filled(at.op),
            ).run()  # fmt: skip
            self._actions[key] = _replay(kernel, history)
        return self._actions[key]

    def _filled(self, op: int) -> dict[str, tuple[int, k.Op]]:
        """By buffer: the last op before ``op`` that writes it."""
        before = enumerate(self.case.ops[:op])
        return {buffer: (index, writer) for index, writer in before for buffer in writer.writes}

    # -- which steps are possible

    def choices(self, state: State) -> list[Choice]:
        found: list[Choice] = []
        for rank, at in enumerate(state.ranks):
            if at.alive and at.threads:
                if self.case.mortal == rank:
                    found.append(Choice(rank, 0, dies=True, sure=False))
                found.extend(c for thread in range(len(at.threads)) for c in self._choices_of(state, rank, thread))
        return found

    def _choices_of(self, state: State, rank: int, thread: int) -> Iterator[Choice]:
        action = self.action(state, rank, thread)
        if action is None or not self._may_run(state.ranks[rank], thread):
            return
        if isinstance(action, k.Poll):
            yield from self._polls(state, rank, thread, action)
        elif isinstance(action, k.Load) and not (action.once and (rank, thread // self.case.warps) in state.uniform):
            history = self._history(state, action.word)
            for message in readable(history, state.ranks[rank].threads[thread].lane.clock):
                yield Choice(rank, thread, (message,))
        elif not isinstance(action, k.Sync) or self._all_at_barrier(state, rank, thread):
            yield Choice(rank, thread)

    def _polls(self, state: State, rank: int, thread: int, poll: k.Poll) -> Iterator[Choice]:
        """One choice for each set of values that ends the poll; the sure ones end it by the newest values."""
        clock = state.ranks[rank].threads[thread].lane.clock
        histories = [self._history(state, word) for word in poll.words]
        may_fail = (rank, thread // self.case.warps) in self.case.timeouts
        newest = poll.verdict(tuple(h[-1].value for h in histories), self.case.modulus)
        for messages in product(*(readable(h, clock) for h in histories)):
            verdict = poll.verdict(tuple(m.value for m in messages), self.case.modulus)
            if verdict != k.LATE or (newest == k.LATE and may_fail):
                yield Choice(rank, thread, messages, verdict, sure=newest != k.LATE or verdict == k.LATE)
                if self.reduced:
                    return

    def _may_run(self, at: Rank, thread: int) -> bool:
        if self.case.resident is None:
            return True
        block, running = thread // self.case.warps, self._running(at)
        if block in running:
            return True
        waiting = [i // self.case.warps for i, other in enumerate(at.threads) if other.history == ()]
        return len(running) < self.case.resident and (not self.case.in_order or block == min(waiting))

    def _running(self, at: Rank) -> set[int]:
        """Blocks of which a warp has begun and a warp has not ended."""
        blocks = range(0, len(at.threads), self.case.warps)
        histories = {i // self.case.warps: [t.history for t in at.threads[i : i + self.case.warps]] for i in blocks}
        return {b for b, found in histories.items() if any(h != () for h in found) and any(h != DONE for h in found)}

    def _all_at_barrier(self, state: State, rank: int, thread: int) -> bool:
        first = thread - thread % self.case.warps
        return all(isinstance(self.action(state, rank, first + i), k.Sync) for i in range(self.case.warps))

    # -- taking a step

    def step(self, state: State, choice: Choice) -> State:
        state = state.copy()
        if choice.dies:
            state.ranks[choice.rank] = state.ranks[choice.rank]._replace(alive=False)
            return state
        self._perform(state, choice)
        return self._settle(state)

    def _settle(self, state: State) -> State:
        """Do all that needs no choice."""
        moved = True
        while moved:
            moved = False
            for rank, at in enumerate(state.ranks):
                if not (at.alive and at.threads):
                    continue
                for thread in range(len(at.threads)):
                    while self._forced(state, rank, thread):
                        moved = True
                if all(thread.history == DONE for thread in state.ranks[rank].threads):
                    self._finish(state, rank)
                    moved = True
        return state

    def _forced(self, state: State, rank: int, thread: int) -> bool:
        action = self.action(state, rank, thread)
        if action is None or (self.case.resident is not None and state.ranks[rank].threads[thread].history == ()):
            return False  # which block starts is a choice
        own = isinstance(action, k.Read | k.Write | k.Check | k.Sync)
        unpoisoned = isinstance(action, k.Load) and not self.case.timeouts
        commutes = self.reduced and isinstance(action, k.Store | k.Poll)
        own |= isinstance(action, k.Store) and action.word[1] == rank and self.case.warps == 1
        if not (own or unpoisoned or commutes):
            return False
        choice = next((c for c in self._choices_of(state, rank, thread) if c.sure), None)
        if choice is not None:
            self._perform(state, choice)
        return choice is not None

    def _perform(self, state: State, choice: Choice) -> None:
        rank, thread = choice.rank, choice.thread
        action, lane = self.action(state, rank, thread), state.ranks[rank].threads[thread].lane
        value = None
        if isinstance(action, k.Sync):
            self._meet(state, rank, thread - thread % self.case.warps)
            return
        if isinstance(action, k.Read | k.Write):
            value = self._access(state, rank, thread, action)
        elif isinstance(action, k.Check):
            if action.problem:
                self._taint(state, rank, state.ranks[rank].op, "output: " + action.problem)
        elif isinstance(action, k.Store | k.Poison):
            lane = self._publish(state, rank, thread, action)
        elif isinstance(action, k.Poll):
            value = (choice.verdict, tuple(m.value for m in choice.messages))
            lane = _learn(lane, choice.messages, action.acquire)
        elif choice.messages:
            value, lane = choice.messages[0].value, _learn(lane, choice.messages, False)
            if action.once:
                state.uniform[rank, thread // self.case.warps] = value
        else:
            value = state.uniform[rank, thread // self.case.warps]
        self._advance(state, rank, thread, value, lane)

    def _advance(self, state: State, rank: int, thread: int, value: Any, lane: Lane) -> None:
        threads = list(state.ranks[rank].threads)
        threads[thread] = Thread((*threads[thread].history, value), lane)
        state.ranks[rank] = state.ranks[rank]._replace(threads=tuple(threads))
        if self.action(state, rank, thread) is None:
            threads[thread] = Thread(DONE, lane)
            state.ranks[rank] = state.ranks[rank]._replace(threads=tuple(threads))

    def _meet(self, state: State, rank: int, first: int) -> None:
        """A block barrier: afterwards every warp of the block knows what each knew."""
        lanes = [state.ranks[rank].threads[first + i].lane for i in range(self.case.warps)]
        vote = any(self.action(state, rank, first + i).vote for i in range(self.case.warps))
        clock, pending = join(*(lane.clock for lane in lanes)), join(*(lane.pending for lane in lanes))
        for i, lane in enumerate(lanes):
            met = Lane(tick(clock, self._id(rank, first + i)), lane.released, pending)
            self._advance(state, rank, first + i, vote, met)

    def _publish(self, state: State, rank: int, thread: int, action: k.Store | k.Poison) -> Lane:
        lane, me = state.ranks[rank].threads[thread].lane, self._id(rank, thread)
        history = self._history(state, action.word)
        if isinstance(action, k.Poison) and history[-1].value != 0:
            return lane
        released = isinstance(action, k.Store) and action.release
        message = Message(action.value, lane.clock if released else lane.released, me, lane.clock[me])
        state.sync[action.word] = (*history[1 - KEPT :], message)
        return lane._replace(clock=tick(lane.clock, me))

    def _access(self, state: State, rank: int, thread: int, action: k.Read | k.Write) -> Any:
        op, me = state.ranks[rank].op, self._id(rank, thread)
        clock = state.ranks[rank].threads[thread].lane.clock
        stamp = Stamp(me, clock[me], rank, op)
        word = state.data.get(action.word, NEVER_WRITTEN)
        ordered = knows(clock, word.writer)
        if isinstance(action, k.Read):
            state.data[action.word] = word._replace(readers=tuple(sorted({*word.readers, stamp})))
            if not ordered:
                self._taint(state, rank, op, f"race: op {op} of rank {rank} reads {action.word} while it is written")
            elif action.expect is not None and word.value != action.expect:
                self._taint(state, rank, op, f"output: {action.word} holds {word.value}, wanted {action.expect}")
            return word.value
        for reader in (r for r in word.readers if not knows(clock, r)):
            why = f"race: op {op} of rank {rank} overwrites {action.word} while rank {reader.rank} may read it"
            self._taint(state, reader.rank, reader.op, why)
        state.data[action.word] = DataWord(action.value if ordered else RACED, stamp, ())
        return None

    def _taint(self, state: State, rank: int, op: int, reason: str) -> None:
        """The op's output is not certain; that is wrong unless the rank has given up by the op's end."""
        state.taints.setdefault((rank, op), reason)
        if (rank, op) in state.healthy or not self.case.timeouts:
            raise Violation(reason)

    def _finish(self, state: State, rank: int) -> None:
        """All warps of a launch are through: the next one starts, and which warp was when is forgotten."""
        at = state.ranks[rank]
        if state.sync["poison", rank][-1].value == 0:
            state.healthy |= {(rank, at.op)}
            if (rank, at.op) in state.taints:
                raise Violation(state.taints[rank, at.op])
        base = join(*(clock for thread in at.threads for clock in (thread.lane.clock, thread.lane.pending)))
        own = range(self._id(rank, 0), self._id(rank + 1, 0))
        latest = max(base[i] for i in own)
        for block in range(self.case.width):
            state.data["epoch", rank, block] = DataWord(state.data["epoch", rank, block].value, None, ())
            state.uniform.pop((rank, block), None)
        self._launch(state, rank, at.op + 1, tuple(latest if i in own else base[i] for i in range(len(base))))

    def check_end(self, state: State) -> None:
        """Raise unless every rank that lives is through and its epochs agree."""
        for rank, at in enumerate(state.ranks):
            if at.alive and at.threads:
                waiting = [self.action(state, rank, thread) for thread in range(len(at.threads))]
                raise Violation(f"deadlock: rank {rank} stays in op {at.op}: {waiting}")
            epochs = {state.data["epoch", rank, block].value for block in range(self.case.width)}
            meetings = sum(op.meetings for op in self.case.ops)
            if at.alive and epochs != {meetings % self.case.modulus}:
                raise Violation(f"state: rank {rank} ends with epochs {epochs} after {meetings} meetings")


def _replay(kernel: k.Warp, history: tuple) -> Any:
    """The action after ``history``; None at the end."""
    try:
        action = next(kernel)
        for value in history:
            action = kernel.send(value)
    except StopIteration:
        return None
    return action


def _learn(lane: Lane, messages: tuple[Message, ...], acquire: bool) -> Lane:
    gained = join(lane.pending, *(message.clock for message in messages))
    return lane._replace(pending=gained, clock=join(lane.clock, gained) if acquire else lane.clock)

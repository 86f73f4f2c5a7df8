"""Runs the kernels of ``kernels.py`` over the memory of ``memory.py`` in every order that matters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from . import kernels as k
from .memory import NEVER_WRITTEN, RACED, Clock, DataWord, Message, Stamp, join, knows, readable, tick

DONE = ("done",)
LEADER, OTHERS = 0, 1  # of a block's threads, the one that signals and polls, and the rest


@dataclass(frozen=True)
class Case:
    """What is run: the same ``ops`` on all ranks.

    ``timeouts``: any poll may end without success. ``mortal``: that rank may stop for ever at any point.
    ``resident``: blocks of one launch that run at a time (None: all). ``modulus``: epochs wrap around there.
    """

    world: int
    ops: tuple[k.Op, ...]
    faults: frozenset[str] = frozenset()
    timeouts: bool = False
    mortal: int | None = None
    resident: int | None = None
    modulus: int = 1 << 32

    def grid(self, rank: int, op: int) -> int:
        return k.grid_of(self.ops[op], rank, self.faults)

    @property
    def width(self) -> int:
        return max((self.grid(r, i) for r in range(self.world) for i in range(len(self.ops))), default=1)


class Lane(NamedTuple):
    """Clocks of one lane: now, at the last release fence, and read by relaxed loads since the last acquire fence."""

    clock: Clock
    released: Clock
    pending: Clock


class Thread(NamedTuple):
    """One block: what it was sent so far (which determines where it is), and its lanes."""

    history: tuple
    lanes: tuple[Lane, Lane]


class Rank(NamedTuple):
    op: int
    blocks: tuple[Thread, ...]
    alive: bool = True


@dataclass
class State:
    ranks: list[Rank]
    sync: dict[tuple, tuple[Message, ...]] = field(default_factory=dict)
    data: dict[tuple, DataWord] = field(default_factory=dict)
    taints: dict[tuple[int, int], str] = field(default_factory=dict)  # (rank, op) -> why its output is not certain
    healthy: frozenset[tuple[int, int]] = frozenset()  # (rank, op) that ended without a time-out

    def copy(self) -> State:
        return State(list(self.ranks), dict(self.sync), dict(self.data), dict(self.taints), self.healthy)

    def key(self) -> int:
        parts = (self.sync.items(), self.data.items(), self.taints.items(), self.healthy)
        return hash((tuple(self.ranks), *map(frozenset, parts)))


class Choice(NamedTuple):
    """One step that could come next. ``sure``: it will happen if nothing else does."""

    rank: int
    block: int
    what: str  # "go", "timeout", "die"
    message: Message | None = None
    sure: bool = True


class Violation(Exception):
    """The protocol failed; ``kind`` is one of race, output, deadlock, state."""

    def __init__(self, kind: str, reason: str):
        self.kind = kind
        super().__init__(f"{kind}: {reason}")


class Machine:
    """Successors of a state. ``eager`` runs at once what commutes with every step of the others."""

    def __init__(self, case: Case, eager: bool = True):
        self.case, self.eager = case, eager
        self.reduced = eager and not case.timeouts and case.mortal is None and case.resident is None
        self._actions: dict[tuple, Any] = {}

    def initial(self) -> State:
        zero = (0,) * (self.case.world * self.case.width * 2)
        state = State([Rank(0, ()) for _ in range(self.case.world)])
        none = Message(0, zero, 0, 0)
        for rank in range(self.case.world):
            state.data["epoch", rank] = DataWord(0, None, ())
            state.sync["arrivals", rank] = state.sync["poisoned", rank] = (none,)
            self._launch(state, rank, 0, zero)
        return self._settle(state)

    def _launch(self, state: State, rank: int, op: int, base: Clock) -> None:
        """Start an op's blocks: all of them know what the rank knew (stream order)."""
        blocks = []
        for block in range(self.case.grid(rank, op) if op < len(self.case.ops) else 0):
            lanes = [Lane(tick(base, self._lane(rank, block, i)), base, base) for i in (LEADER, OTHERS)]
            blocks.append(Thread((), (lanes[0], lanes[1])))
        state.ranks[rank] = Rank(op, tuple(blocks))

    def _lane(self, rank: int, block: int, lane: int) -> int:
        return (rank * self.case.width + block) * 2 + lane

    def action(self, state: State, rank: int, block: int) -> Any:
        """What this block does next; None if it is through."""
        op, history = state.ranks[rank].op, state.ranks[rank].blocks[block].history
        if history == DONE:
            return None
        key = (rank, op, block, history)
        if key not in self._actions:
            case = self.case
            kernel = k.Kernel(rank, case.world, case.ops[op], op, block, case.faults, case.modulus).run()
            try:
                action = next(kernel)
                for value in history:
                    action = kernel.send(value)
            except StopIteration:
                action = None
            self._actions[key] = action
        return self._actions[key]

    # -- which steps are possible

    def choices(self, state: State) -> list[Choice]:
        found: list[Choice] = []
        for rank, at in enumerate(state.ranks):
            if not at.alive or at.op == len(self.case.ops):
                continue
            if self.case.mortal == rank:
                found.append(Choice(rank, 0, "die"))
            of_rank = [c for b in range(len(at.blocks)) if self._may_run(at, b) for c in self._choices_of(state, rank, b)]
            if self.reduced and all(isinstance(self.action(state, rank, b), k.Add | None) for b in range(len(at.blocks))):
                return of_rank  # only this rank's blocks count arrivals, and all of them are there: others commute
            found.extend(of_rank)
        return found

    def _may_run(self, at: Rank, block: int) -> bool:
        if at.blocks[block].history == DONE:
            return False
        running = [b for b in at.blocks if b.history not in ((), DONE)]
        return self.case.resident is None or at.blocks[block].history != () or len(running) < self.case.resident

    def _choices_of(self, state: State, rank: int, block: int) -> Iterator[Choice]:
        action = self.action(state, rank, block)
        if not isinstance(action, k.Poll | k.Load):
            yield Choice(rank, block, "go")
            return
        lane = state.ranks[rank].blocks[block].lanes[LEADER]
        history = state.sync.get(action.word, (Message(0, (0,) * len(lane.clock), 0, 0),))
        values = readable(history, lane.clock)
        if isinstance(action, k.Poll):
            values = tuple(m for m in values if k.accepts(action, m.value, self.case.modulus))
            if self.case.timeouts:
                yield Choice(rank, block, "timeout")
        # The oldest value brings the least knowledge, so whatever it leads to right, a newer one does too.
        for message in values[:1] if self.eager and isinstance(action, k.Poll) else values:
            yield Choice(rank, block, "go", message, sure=values[-1] is history[-1])

    # -- taking a step

    def step(self, state: State, choice: Choice) -> State:
        state = state.copy()
        if choice.what == "die":
            state.ranks[choice.rank] = state.ranks[choice.rank]._replace(alive=False)
            return state
        self._perform(state, choice)
        return self._settle(state)

    def _settle(self, state: State) -> State:
        """Do what needs no choice: data accesses, and in eager mode whatever commutes with all other steps."""
        moved = True
        while moved:
            moved = False
            for rank, at in enumerate(state.ranks):
                for block in range(len(at.blocks)) if at.alive else ():
                    while self._forced(state, rank, block):
                        moved = True
            for rank, at in enumerate(state.ranks):
                if at.blocks and at.alive and all(b.history == DONE for b in at.blocks):
                    self._finish(state, rank)
                    moved = True
        return state

    def _forced(self, state: State, rank: int, block: int) -> bool:
        at = state.ranks[rank]
        if block >= len(at.blocks) or not self._may_run(at, block):
            return False
        if self.case.resident is not None and at.blocks[block].history == ():
            return False  # which block starts is a choice
        action = self.action(state, rank, block)
        if isinstance(action, k.Load) and self.case.timeouts:
            return False
        alone = isinstance(action, k.Read | k.Write | k.Sync | k.Check | k.Load | None)
        # A poll for "reached" stays possible once it is, and a signal only makes polls possible.
        monotone = isinstance(action, k.Store) or (isinstance(action, k.Poll) and action.compare in ("reached", "tag"))
        if not alone and not (self.reduced and monotone):
            return False
        choice = next((c for c in self._choices_of(state, rank, block) if c.sure), None)
        if choice is None:
            return False
        self._perform(state, choice)
        return True

    def _perform(self, state: State, choice: Choice) -> None:
        rank, block = choice.rank, choice.block
        action = self.action(state, rank, block)
        thread = state.ranks[rank].blocks[block]
        value, lanes = None, thread.lanes
        if isinstance(action, k.Read | k.Write):
            value = self._access(state, rank, block, action)
        elif isinstance(action, k.Sync):
            both = join(lanes[0].clock, lanes[1].clock)
            lanes = tuple(lanes[i]._replace(clock=tick(both, self._lane(rank, block, i))) for i in (LEADER, OTHERS))
        elif isinstance(action, k.Check) and action.problem:
            self._taint(state, rank, state.ranks[rank].op, "output: " + action.problem)
        elif isinstance(action, k.Store | k.Add):
            value, leader = self._publish(state, rank, block, action)
            lanes = (leader, lanes[1])
        elif isinstance(action, k.Poll | k.Load) and choice.message is not None:
            value, leader = choice.message.value, lanes[LEADER]
            gained = join(leader.pending, choice.message.clock)
            acquire = isinstance(action, k.Poll) and action.acquire
            leader = leader._replace(pending=gained, clock=join(leader.clock, gained) if acquire else leader.clock)
            lanes = (leader, lanes[1])
        thread = Thread((*thread.history, value), lanes)
        blocks = list(state.ranks[rank].blocks)
        blocks[block] = thread
        state.ranks[rank] = state.ranks[rank]._replace(blocks=tuple(blocks))
        if self.action(state, rank, block) is None:
            blocks[block] = Thread(DONE, lanes)
            state.ranks[rank] = state.ranks[rank]._replace(blocks=tuple(blocks))

    def _publish(self, state: State, rank: int, block: int, action: k.Store | k.Add) -> tuple[Any, Lane]:
        lane = state.ranks[rank].blocks[block].lanes[LEADER]
        me = self._lane(rank, block, LEADER)
        history = state.sync.get(action.word, (Message(0, (0,) * len(lane.clock), 0, 0),))
        last = history[-1]
        if isinstance(action, k.Add):
            others = state.ranks[rank].blocks[block].lanes[OTHERS].clock  # its threads met at the block's end
            clock = join(lane.clock, last.clock, others)
            message, value = Message(last.value + 1, clock, me, clock[me]), last.value
            lane = lane._replace(clock=clock)
        else:
            message = Message(action.value, lane.clock if action.release else lane.released, me, lane.clock[me])
            value = None
        kept = history[-3:] if action.word[0] in ("signal", "count", "poisoned") else ()
        state.sync[action.word] = (*kept, message)
        return value, lane._replace(clock=tick(lane.clock, me))

    def _access(self, state: State, rank: int, block: int, action: k.Read | k.Write) -> Any:
        """A data access; all lanes take part (the leader's clock does not order it), but the leader sets the epoch."""
        op = state.ranks[rank].op
        which = LEADER if isinstance(action, k.Write) and action.word[0] == "epoch" else OTHERS
        me = self._lane(rank, block, which)
        clock = state.ranks[rank].blocks[block].lanes[which].clock
        stamp = Stamp(me, clock[me], rank, op)
        word = state.data.get(action.word, NEVER_WRITTEN)
        ordered = knows(clock, word.writer)
        if isinstance(action, k.Read):
            state.data[action.word] = word._replace(readers=tuple(sorted({*word.readers, stamp})))
            if not ordered:
                self._taint(state, rank, op, f"race: {action.word} read by op {op} of rank {rank} while it is written")
            elif action.expect is not None and word.value != action.expect:
                self._taint(state, rank, op, f"output: {action.word} holds {word.value}, wanted {action.expect}")
            return word.value
        for reader in word.readers:
            if not knows(clock, reader):
                why = f"race: op {op} of rank {rank} overwrites {action.word} while rank {reader.rank} may read it"
                self._taint(state, reader.rank, reader.op, why)
        state.data[action.word] = DataWord(action.value if ordered else RACED, stamp, ())
        return None

    def _taint(self, state: State, rank: int, op: int, reason: str) -> None:
        state.taints.setdefault((rank, op), reason)
        if (rank, op) in state.healthy or not (self.case.timeouts or self.case.mortal is not None):
            raise Violation(*reason.split(": ", 1))

    def _finish(self, state: State, rank: int) -> None:
        """All blocks of a launch are through: its output counts unless the rank is poisoned."""
        at = state.ranks[rank]
        if state.sync["poisoned", rank][-1].value == 0:
            state.healthy |= {(rank, at.op)}
            if (rank, at.op) in state.taints:
                raise Violation(*state.taints[rank, at.op].split(": ", 1))
        base = join(*(clock for block in at.blocks for lane in block.lanes for clock in (lane.clock, lane.pending)))
        self._forget_order(state, rank)
        own = range(self._lane(rank, 0, 0), self._lane(rank + 1, 0, 0))
        now = max(base[lane] for lane in own)
        self._launch(state, rank, at.op + 1, tuple(now if lane in own else base[lane] for lane in range(len(base))))

    def _forget_order(self, state: State, rank: int) -> None:
        """Which block was last is over with the launch; without a trace of it, more states are equal."""
        state.data["epoch", rank] = DataWord(state.data["epoch", rank].value, None, ())
        zero = (0,) * (self.case.world * self.case.width * 2)
        state.sync["arrivals", rank] = (Message(state.sync["arrivals", rank][-1].value, zero, 0, 0),)

    def check_end(self, state: State) -> None:
        """No step is left that is sure to come."""
        for rank, at in enumerate(state.ranks):
            if not at.alive:
                continue
            if at.op < len(self.case.ops):
                waiting = [self.action(state, rank, b) for b in range(len(at.blocks))]
                raise Violation("deadlock", f"rank {rank} stays in op {at.op}: {waiting}")
            epoch, arrivals = state.data["epoch", rank].value, state.sync["arrivals", rank][-1].value
            if (epoch, arrivals) != (len(self.case.ops) % self.case.modulus, 0):
                raise Violation("state", f"rank {rank} ends with epoch {epoch} and arrivals {arrivals}")


def explore(case: Case, *, eager: bool = True, limit: int = 2_000_000) -> int:
    """Visit every reachable state; returns how many. Raises ``Violation`` at the first that is wrong."""
    machine = Machine(case, eager)
    start = machine.initial()
    seen, stack = {start.key()}, [start]
    while stack:
        state = stack.pop()
        choices = machine.choices(state)
        if not any(c.sure and c.what != "die" for c in choices):
            machine.check_end(state)
        for choice in choices:
            successor = machine.step(state, choice)
            if (key := successor.key()) not in seen:
                seen.add(key)
                stack.append(successor)
        assert len(seen) <= limit, f"more than {limit} states: {replace(case)}"
    return len(seen)


def run_random(case: Case, pick: Callable[[int], int] | None = None, seed: int = 0) -> State:
    """One run; ``pick(n)`` chooses the next step. Raises ``Violation`` if it goes wrong."""
    pick = pick or random.Random(seed).randrange
    machine = Machine(case, eager=False)
    state = machine.initial()
    while choices := [c for c in machine.choices(state) if c.what != "die" or pick(8) == 0]:
        if not any(c.sure for c in choices):
            break
        state = machine.step(state, choices[pick(len(choices))])
    machine.check_end(state)
    return state

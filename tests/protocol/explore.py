"""Runs the kernels of ``kernels.py`` over the memory of ``memory.py`` in every order that matters."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from .machine import Case, Choice, Machine, State


def explore(case: Case, *, reduced: bool = True, limit: int = 400_000) -> int:
    """Visit every reachable state; returns how many. Raises ``Violation`` at the first that is wrong.

    ``reduced`` takes at once each step that commutes with all steps of the other warps (see ``Machine``).
    """
    machine = Machine(case, reduced)
    start = machine.initial()
    seen, stack = {start.key()}, [start]
    while stack:
        state = stack.pop()
        choices = machine.choices(state)
        if not any(choice.sure for choice in choices):
            machine.check_end(state)
        for choice in choices:
            successor = machine.step(state, choice)
            if (key := successor.key()) not in seen:
                seen.add(key)
                stack.append(successor)
        assert len(seen) <= limit, f"more than {limit} states: {case}"
    return len(seen)


def walk(case: Case, pick: Callable[[int], int] | None = None, seed: int = 0) -> State:
    """One run; ``pick(n)`` in ``range(n)`` chooses each step. Raises ``Violation`` if it goes wrong."""
    pick = pick or random.Random(seed).randrange
    machine = Machine(case, reduced=False)
    state = machine.initial()
    choices = machine.choices(state)
    while any(choice.sure for choice in choices):
        state = machine.step(state, choices[pick(len(choices))])
        choices = machine.choices(state)
    machine.check_end(state)
    return state


def walks(case: Case, count: int) -> Iterator[State]:
    """``count`` runs, each with its own seed."""
    return (walk(case, seed=seed) for seed in range(count))


__all__ = ["Case", "Choice", "explore", "walk", "walks"]

"""Is this order of launches safe with these meetings left out? The checker for graphs that a compiler rewrote.

    verdict = check_sequence([
        Step("metadata_update"),
        Step("dispatch_into", writes=("x",), barrier=False),
        Step("local", reads=("x",), writes=("y",)),             # experts
        Step("combine_from", reads=("y",), barrier=False),
    ])
    assert verdict.ok, verdict.counterexample

It knows nothing of how the rewrite argued: every order of the steps of two and of three ranks, over three replays of
the sequence, with one and with two blocks a launch, goes through the model of docs/protocol.md. Reductions that the
model proves to lose nothing (``machine.Machine``) keep that to seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .explore import explore
from .kernels import Op
from .machine import Case, Violation

KINDS = {
    "metadata_update": "metadata",
    "agv_dispatch": "dispatch",  # and rsv_combine: over slots of the workspace's own
    "rsv_combine": "combine",
    "dispatch_into": "into",
    "combine_from": "from",
    "local": "local",
}
COUNTS = {2: ((1, 2), (2, 1), (0, 2)), 3: ((1, 0, 1), (0, 1, 1))}
GRIDS = ((1,), (2, 1, 2))


class Step(NamedTuple):
    """One launch of the graph. ``kind``: a key of ``KINDS``.

    ``reads``, ``writes``: names of symmetric buffers. ``dispatch_into`` writes one, ``combine_from`` reads one,
    ``local`` (anything that is no communication op) any. ``barrier``: the entry or exit barrier stays.
    """

    kind: str
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    barrier: bool = True


class Verdict(NamedTuple):
    """``counterexample``: what goes wrong where, or None."""

    ok: bool
    counterexample: str | None


def check_sequence(steps: Sequence[Step], replays: int = 3, worlds: Sequence[int] = (2, 3)) -> Verdict:
    """Explore the sequence, ``replays`` times in a row (a graph's replays: the last step borders on the first)."""
    for world in worlds:
        for grids in GRIDS:
            try:
                explore(Case(world, tuple(_ops(list(steps) * replays, world, grids, len(steps)))))
            except Violation as violation:
                return Verdict(False, f"{world} ranks, grids {grids}: {_name(str(violation), steps)}")
    return Verdict(True, None)


def _ops(steps: list[Step], world: int, grids: tuple[int, ...], length: int) -> list[Op]:
    """Counts change with the replay, not within it."""
    counts = COUNTS[world]
    return [
        Op(
            KINDS[step.kind], counts[i // length % len(counts)], grids[i % len(grids)], i % length,
            step.reads, step.writes, step.barrier,
        )
        for i, step in enumerate(steps)
    ]  # fmt: skip


def _name(text: str, steps: Sequence[Step]) -> str:
    """The violation, and which steps its numbers mean."""
    listing = ", ".join(f"{number} {step.kind}" for number, step in enumerate(steps))
    return f"{text} (ops, counted modulo {len(steps)}: {listing})"

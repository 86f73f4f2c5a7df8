"""Which rank holds which experts: what the ranks of a group have told each other (``place_experts``).

A graph shows how many experts its own rank has, never how many the others have. Where all have the same number, a row's
ids name the ranks that need it, and it need not travel to the others (``lowering/route_rows.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import eq

Split = tuple[tuple[int, int], ...]  # (first expert, number of experts) of every rank


def is_even(split: Split) -> bool:
    """Whether expert ``e`` lies on rank ``e // count`` for one count."""
    count = split[0][1]
    return all(held == (rank * count, count) for rank, held in enumerate(split))


@dataclass
class Placements:
    """The splits that the ranks of one group have declared: the same list, in the same order, on every rank."""

    splits: list[Split] = field(default_factory=list)

    def add(self, split: Split) -> None:
        if split not in self.splits:
            self.splits.append(split)

    def experts_per_rank(self, rank: int, first: int, count: int) -> int:
        """``count`` if expert ``e`` of a layer with these experts on ``rank`` lies on rank ``e // count``, else 0.

        Two models may share a group. A split that is not even, but gives some rank the same experts as an even one,
        looks like that there: then neither counts as even, on any rank.
        """
        even = next((split for split in self.splits if is_even(split) and split[rank] == (first, count)), None)
        if even is None or any(split != even and any(map(eq, split, even)) for split in self.splits):
            return 0
        return count

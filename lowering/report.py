"""What the passes did to one graph, and what they refused: plain data that ``explain`` prints."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from .layer_view import LayerView


@dataclass(frozen=True)
class Refusal:
    """A place that a pass looked at and left alone."""

    node: str
    reason: str


@dataclass
class Outcome:
    """One pass on one graph."""

    name: str
    done: list[str] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    enabled: bool = True

    def refuse(self, node: object, reason: str) -> None:
        """Note that the pass left ``node`` alone, and why."""
        self.refused.append(Refusal(str(node), reason))


@dataclass
class GraphReport:
    """All passes on one graph; ops in program order, repeated ones counted."""

    ops_before: dict[str, int]
    ops_after: dict[str, int]
    groups: list[str]
    outcomes: list[Outcome]
    before: LayerView | None = None  # a layer as it was and as it is, where someone wants to see it
    after: LayerView | None = None

    def outcome(self, name: str) -> Outcome:
        """What the pass of that name did."""
        return next(outcome for outcome in self.outcomes if outcome.name == name)

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


# The newest graphs of this process; a graph that comes from the cache was rewritten by an earlier one.
RECENT: deque[GraphReport] = deque(maxlen=256)

_viewers: list[None] = []


@contextmanager
def layers_are_viewed() -> Iterator[None]:
    """Reports made inside hold a layer before and after the passes."""
    _viewers.append(None)
    try:
        yield
    finally:
        _viewers.pop()


def someone_views_layers() -> bool:
    """Whether ``layers_are_viewed``."""
    return bool(_viewers)

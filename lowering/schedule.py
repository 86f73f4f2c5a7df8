"""What each kernel of a compiled graph does to which buffers, from Inductor's schedule.

What a generated kernel does is found by running the body that Inductor writes it from on abstract values: where data
comes from, and whether anything was computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy

from .torch_compat import Buffer, Scheduled, schedules_seen_by


class Store(NamedTuple):
    """A buffer that a kernel writes: ``moved_from`` the buffers whose elements it holds now, none if computed."""

    buffer: str
    moved_from: frozenset[str]


class Launch(NamedTuple):
    """A kernel, or a call of an op (``called``, such as "moe_ep.moe_layer"; "" for a kernel that Inductor writes).

    ``origins``: the ops it came from. Buffers go by one name where several share memory; graph inputs are left out.
    """

    called: str
    origins: str
    reads: frozenset[str]
    stores: tuple[Store, ...]


@contextmanager
def scheduled_launches() -> Iterator[list[Launch]]:
    """The launches of all graphs that are compiled meanwhile, in the order in which they were scheduled."""
    launches: list[Launch] = []
    with schedules_seen_by(lambda groups: launches.extend(_launches_of(groups, _roots(groups)))):
        yield launches


@dataclass(frozen=True)
class _Value:
    """What is known of a value inside a kernel: moved from these buffers (none: a constant, an index), or computed."""

    sources: frozenset[str] = frozenset()
    computed: bool = False

    def __getitem__(self, index: int) -> _Value:  # of an op with several results
        return self


_COMPUTED = _Value(computed=True)


def _either(*values: _Value) -> _Value:
    """One of ``values``, chosen by position."""
    return _Value(frozenset().union(*(v.sources for v in values)), any(v.computed for v in values))


class _Follow:
    """Does the steps of kernel bodies on ``_Value``s; ``stored`` is what each buffer holds in the end."""

    def __init__(self) -> None:
        self.stored: dict[str, _Value] = {}

    def __call__(self, step: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = getattr(self, step, None)
        return known(*args, **kwargs) if known is not None else self.compute(*args, *kwargs.values())

    def compute(self, *args: Any) -> _Value:
        given = [value for value in args if isinstance(value, _Value)]
        nested = any(isinstance(value, tuple | list) for value in args)
        return _COMPUTED if nested or any(v.sources or v.computed for v in given) else _Value()

    def load(self, name: str, index: sympy.Expr) -> _Value:
        return self.stored.get(name, _Value(frozenset([name])))

    def to_dtype(self, x: _Value, *args: Any, **kwargs: Any) -> _Value:
        return x

    to_dtype_bitcast = identity = to_dtype

    def where(self, condition: _Value, input: _Value, other: _Value) -> _Value:
        return _either(input, other) if condition == _Value() else _COMPUTED

    def masked(self, mask: _Value, body: Any, other: Any) -> _Value:
        value = body()
        fill = other if isinstance(other, _Value) else _Value()
        return _either(value, fill) if mask == _Value() else _COMPUTED

    def indirect_indexing(self, *args: Any, **kwargs: Any) -> sympy.Symbol:  # reading where data says: a gather
        return sympy.Symbol("indirect", integer=True, nonnegative=True)

    def store(self, name: str, index: sympy.Expr, value: _Value, mode: Any = None) -> None:
        self.stored[name] = _either(value, self.stored.get(name, value)) if mode is None else _COMPUTED

    def store_reduction(self, name: str, index: sympy.Expr, value: _Value) -> None:
        self.stored[name] = _COMPUTED

    def reduction(self, *args: Any, **kwargs: Any) -> _Value:
        return _COMPUTED


def _roots(groups: Sequence[Sequence[Scheduled]]) -> dict[str, str]:
    """The name that a buffer goes by, for each that lies in another's memory or is one of its results."""
    roots: dict[str, str] = {}
    for buffer in (buffer for group in groups for member in group for buffer in member.outputs):
        if buffer.owner is not None:
            roots[buffer.name] = roots.get(buffer.owner, buffer.owner)
    return roots


def _launches_of(groups: Sequence[Sequence[Scheduled]], roots: dict[str, str]) -> Iterator[Launch]:
    """One after the other. On the CPU all loops between two calls become one function, and are one launch."""
    waiting: list[list[Scheduled]] = []
    for members in groups:
        loops = [m for m in members if m.kind == "loop"]
        calls = [m for m in members if m.kind in ("call", "name")]
        joins = not calls and (not loops or (loops[0].on_cpu and all(group[0].on_cpu for group in waiting)))
        if waiting and not joins:
            yield _generated(waiting, roots)
            waiting = []
        yield from (_extern(call, roots) for call in calls if call.kind == "call")
        waiting += [loops] if loops else []
    if waiting:
        yield _generated(waiting, roots)


def _generated(groups: list[list[Scheduled]], roots: dict[str, str]) -> Launch:
    """``groups``: the loops of one launch, those together that hand values on without storing them."""
    follow, loops = _Follow(), [loop for group in groups for loop in group]
    for loop in loops:
        if loop.run is None:  # a product, whose body is text
            follow.stored.update({buffer.name: _COMPUTED for buffer in loop.outputs})
        else:
            loop.run(follow)
    kept = {buffer.name for group in groups for buffer in _read_by_others(group)}
    stores = (_stored(name, value, roots) for name, value in follow.stored.items() if name in kept)
    reads = frozenset().union(*(loop.reads for loop in loops)) - set(follow.stored)
    origins = dict.fromkeys(origin for loop in loops for origin in loop.origins)
    return Launch("", ", ".join(origins), _named(reads, roots), tuple(stores))


def _read_by_others(group: list[Scheduled]) -> Iterator[Buffer]:
    inside = {loop.name for loop in group}
    return (buffer for loop in group for buffer in loop.outputs if buffer.users - inside)


def _stored(name: str, value: _Value, roots: dict[str, str]) -> Store:
    return Store(roots.get(name, name), frozenset() if value.computed else _named(value.sources, roots))


def _extern(call: Scheduled, roots: dict[str, str]) -> Launch:
    written = _named(frozenset(buffer.name for buffer in call.outputs), roots)
    return Launch(call.called, call.called, _named(call.reads, roots), tuple(Store(b, frozenset()) for b in written))


def _named(buffers: frozenset[str], roots: dict[str, str]) -> frozenset[str]:
    """The one name of each."""
    return frozenset(roots.get(name, name) for name in buffers)

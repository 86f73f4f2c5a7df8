"""Private torch API of Inductor's schedule: what each kernel of a compiled graph does to which buffers.

Checked with torch 2.11 (CUDA) and 2.13 (CPU), as ``torch_compat``. What a generated kernel does is found by running
the body that Inductor writes it from on abstract values: where data comes from, and whether anything was computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import sympy
from torch._inductor import config, ir
from torch._inductor.ops_handler import DefaultHandler
from torch._inductor.scheduler import BaseSchedulerNode, ExternKernelSchedulerNode, SchedulerNode
from torch._inductor.virtualized import V


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
    users_pass = config._post_fusion_custom_pass

    def look(nodes: list[BaseSchedulerNode]) -> list[BaseSchedulerNode]:
        nodes = nodes if users_pass is None else users_pass(nodes)
        roots = _roots(nodes)
        launches.extend(_launches_of(nodes, roots))
        return nodes

    with config.patch(_post_fusion_custom_pass=look):
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


class _Follow(DefaultHandler):
    """Runs kernel bodies on ``_Value``s; ``stored`` is what each buffer holds in the end."""

    def __init__(self) -> None:
        self.stored: dict[str, _Value] = {}

    def _default(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Value:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, _Value)]
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


def _members(node: BaseSchedulerNode) -> list[BaseSchedulerNode]:
    return list(getattr(node, "snodes", None) or node.get_nodes())


def _roots(nodes: Sequence[BaseSchedulerNode]) -> dict[str, str]:
    """The name that a buffer goes by, for each that lies in another's memory or is one of its results."""
    roots: dict[str, str] = {}
    for node in (member for group in nodes for member in _members(group)):
        for buffer in node.get_outputs():
            owner = _owner(buffer.node)
            if owner is not None:
                roots[buffer.get_name()] = roots.get(owner, owner)
    return roots


def _owner(buffer: Any) -> str | None:
    """The buffer that ``buffer`` is a part of, a result of, or another name for."""
    if isinstance(buffer, ir.MultiOutput):
        return buffer.inputs[0].get_name()
    layout = getattr(buffer, "layout", None)
    if isinstance(layout, ir.NonOwningLayout):
        return layout.view.get_name()
    if isinstance(layout, ir.MutationLayoutSHOULDREMOVE):
        return layout.get_buffer().get_name()
    aliases = [*buffer.get_inputs_that_alias_output(), *buffer.get_mutation_names()]
    return aliases[0] if aliases else None


def _launches_of(nodes: Sequence[BaseSchedulerNode], roots: dict[str, str]) -> Iterator[Launch]:
    """One after the other. On the CPU all loops between two calls become one function, and are one launch."""
    waiting: list[list[SchedulerNode]] = []
    for members in map(_members, nodes):
        loops = [m for m in members if isinstance(m, SchedulerNode)]
        calls = [m for m in members if isinstance(m, ExternKernelSchedulerNode)]
        joins = not calls and (not loops or (_on_cpu(loops[0]) and all(_on_cpu(group[0]) for group in waiting)))
        if waiting and not joins:
            yield _generated(waiting, roots)
            waiting = []
        yield from (_extern(call, roots) for call in calls if _runs(call.node))
        waiting += [loops] if loops else []
    if waiting:
        yield _generated(waiting, roots)


def _on_cpu(node: BaseSchedulerNode) -> bool:
    device = node.get_device()
    return device is not None and device.type == "cpu"


def _runs(kernel: Any) -> bool:
    """Whether it is a call, not a name for a result, and of an op that does more than look at its input as a view."""
    return not isinstance(kernel, ir.MultiOutput | ir.MutationOutput) and not kernel.get_inputs_that_alias_output()


def _generated(groups: list[list[SchedulerNode]], roots: dict[str, str]) -> Launch:
    """``groups``: the loops of one launch, those together that hand values on without storing them."""
    follow, loops = _Follow(), [loop for group in groups for loop in group]
    with V.set_ops_handler(follow):
        for loop in loops:
            if loop.is_template():  # a product, whose body is text
                follow.stored.update({buffer.get_name(): _COMPUTED for buffer in loop.get_outputs()})
            else:
                loop._body(loop._body.iter_vars, loop._body.reduce_vars, allow_same_symbol_in_index=True)
    kept = frozenset().union(*map(_read_by_others, groups))
    stores = (_stored(name, value, roots) for name, value in follow.stored.items() if name in kept)
    reads = frozenset().union(*(loop.used_buffer_names() for loop in loops)) - set(follow.stored)
    return Launch("", _origins(loops), _named(reads, roots), tuple(stores))


def _read_by_others(group: list[SchedulerNode]) -> set[str]:
    inside = {loop.get_name() for loop in group}
    written = [buffer for loop in group for buffer in loop.get_outputs()]
    return {buffer.get_name() for buffer in written if {user.get_name() for user in buffer.users} - inside}


def _stored(name: str, value: _Value, roots: dict[str, str]) -> Store:
    return Store(roots.get(name, name), frozenset() if value.computed else _named(value.sources, roots, inputs=True))


def _extern(node: ExternKernelSchedulerNode, roots: dict[str, str]) -> Launch:
    kernel: Any = node.node
    overload = getattr(kernel, "op_overload", None)
    called = str(getattr(overload, "name", lambda: "")()).replace("::", ".").split(".out")[0]
    name = ".".join(called.split(".")[:2]) or getattr(kernel, "python_kernel_name", None) or type(kernel).__name__
    reads = _named([dependency.name for dependency in kernel.get_read_writes().reads], roots)
    return Launch(name, name, reads, tuple(Store(root, frozenset()) for root in _named(node.get_buffer_names(), roots)))


def _named(names: Iterable[str], roots: dict[str, str], inputs: bool = False) -> frozenset[str]:
    """Buffers of the graph by their one name; with ``inputs`` also what the graph is given."""
    return frozenset(roots.get(name, name) for name in names if inputs or name in V.graph.name_to_buffer)


def _origins(loops: list[SchedulerNode]) -> str:
    origins = [origin for loop in loops if loop.node is not None for origin in loop.node.get_origins()]
    return ", ".join(dict.fromkeys(str(origin.target) for origin in origins if origin.op == "call_function"))

"""The ops of ``moe_ep`` as they look in the inference graph that passes rewrite.

The communication ops are ordered, so the graph holds each wrapped, with a token that chains it to the
ordered op before it::

    with_effects = call_function[with_effects](token, moe_ep.agv_dispatch.default, hidden, ids, ..., 'group')
    getitem      = with_effects[0]      # the token for the next ordered op
    getitem_1    = with_effects[1]      # first result; [2], [3]: the others

The chain starts with ``prims._make_token`` and ends in ``prims._sink_tokens``. Erasing one op means handing
its incoming token to whoever uses its outgoing one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from moe_ops.transports import KERNEL_TRANSPORTS, resolve_group
from moe_ops.workspace import LOCAL_GROUPS, transports_in_use

from . import torch_compat

NO_KERNEL = "the group's transport has no kernel of its own (or no workspace yet): nothing to join"


@dataclass(frozen=True)
class EffectOp:
    """One ordered op in a graph."""

    node: Node

    @property
    def op(self) -> Any:
        """Its overload, such as ``torch.ops.moe_ep.agv_dispatch.default``."""
        return self.node.args[1]

    @property
    def name(self) -> str:
        """``"agv_dispatch"`` for ``moe_ep::agv_dispatch``."""
        return short_name(self.op)

    @property
    def token(self) -> Node:
        """The incoming token."""
        token = self.node.args[0]
        assert isinstance(token, Node)
        return token

    @property
    def arguments(self) -> dict[str, Any]:
        """Argument values by name, defaults filled in."""
        return bind(self.op, self.node.args[2:], self.node.kwargs)

    def results(self, index: int) -> list[Node]:
        """The nodes that read result ``index`` (several if the graph repeats the read)."""
        return _reads(self.node, index + 1)

    def value(self, index: int) -> Any:
        """The fake tensor of result ``index``."""
        return self.node.meta["val"][index + 1]

    def erase(self, replacements: dict[int, Node]) -> None:
        """Remove the op: its token passes through, result ``i`` becomes ``replacements[i]``."""
        for read in _reads(self.node, 0):
            read.replace_all_uses_with(self.token)
        for index, value in replacements.items():
            for read in self.results(index):
                read.replace_all_uses_with(value)
        graph = self.node.graph
        for read in list(self.node.users):
            graph.erase_node(read)
        graph.erase_node(self.node)


def is_one_kernel(op: EffectOp) -> bool:
    """Whether a communication op is one launch, which other work can join: on transports with kernels, and alone.

    Collectives on CUDA are several launches, and what Inductor would fuse behind them would become more. On the CPU
    nothing is launched, so there every transport gets the same graph.
    """
    return op.value(0).device.type == "cpu" or transport_of(op.arguments["group_name"]) in (*KERNEL_TRANSPORTS, "local")


def transport_of(group: str) -> str | None:
    """The transport of the group's workspace; ``"local"`` for one rank, which needs none; None before it has one."""
    if group in transports_in_use():
        return transports_in_use()[group]
    process_group = None if group in LOCAL_GROUPS else resolve_group(group)
    alone = group in LOCAL_GROUPS or (process_group is not None and process_group.size() == 1)
    return "local" if alone else None


def short_name(op: Any) -> str:
    """``"agv_dispatch"`` for the overload ``moe_ep::agv_dispatch``; other ops keep their namespace."""
    return str(op).removeprefix("moe_ep.").removesuffix(".default")


def is_moe_op(op: Any, *names: str) -> bool:
    """Whether ``op`` is an overload of ``moe_ep``, of one of the ``names`` if any are given."""
    if not isinstance(op, torch_compat.OpOverload) or op.namespace != "moe_ep":
        return False
    return not names or short_name(op) in names


def effect_ops(graph: Graph, *names: str) -> Iterator[EffectOp]:
    """The ordered ops of ``moe_ep`` in program order, of the ``names`` if any are given."""
    for node in list(graph.nodes):
        if torch_compat.is_effect(node) and is_moe_op(node.args[1], *names):
            yield EffectOp(node)


def moe_nodes(graph: Graph) -> Iterator[tuple[str, Node]]:
    """``(op name, node)`` of every op of ``moe_ep``, wrapped or not, in program order."""
    for node in graph.nodes:
        op = node.args[1] if torch_compat.is_effect(node) else node.target
        if node.op == "call_function" and is_moe_op(op):
            yield short_name(op), node


def bind(op: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Argument values by name; what the call leaves out has its default."""
    declared = torch_compat.schema_arguments(op)
    bound = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    bound.update({argument.name: value for argument, value in zip(declared, args)})
    return bound | dict(kwargs)


def insert_effect(graph: Graph, token: Node, op: Any, args: tuple, kwargs: dict[str, Any], meta: Any) -> Node:
    """A wrapped call of ``op`` at the graph's insertion point; ``meta``: its fake results, as a tuple."""
    node = graph.call_function(torch_compat.effect_target(), (token, op, *args), kwargs)
    node.meta["val"] = (token.meta.get("val"), *meta)
    return node


def read(node: Node, index: int) -> Node:
    """A new node that reads output ``index`` of a wrapped call (0: its token)."""
    result = node.graph.call_function(operator.getitem, (node, index))
    result.meta["val"] = node.meta["val"][index]
    return result


def reaches(start: Node, goal: Callable[[Node], bool], limit: int = 100_000) -> bool:
    """Whether ``start`` depends, directly or not, on a node for which ``goal`` holds."""
    seen, stack = {start}, [start]
    while stack and len(seen) < limit:
        node = stack.pop()
        if goal(node):
            return True
        fresh = [parent for parent in node.all_input_nodes if parent not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return False


def erase_unused(node: Node, stop: Node | None = None) -> None:
    """Remove ``node`` and what it alone needed, down to ``stop``; ordered ops and inputs stay."""
    waiting = {node: None}  # each once, however many of the removed read it
    while waiting:
        node, _ = waiting.popitem()
        if node.users or node is stop or node.op != "call_function" or torch_compat.is_effect(node):
            continue
        waiting |= dict.fromkeys(node.all_input_nodes)
        node.graph.erase_node(node)


def _reads(node: Node, index: int) -> list[Node]:
    return [user for user in node.users if user.target is operator.getitem and user.args[1] == index]

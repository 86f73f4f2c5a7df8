"""What follows a router's top-k, column by column.

Before::

    values, ids = cat([v0, v1, ...], -1), cat([i0, i1, ...], -1)          # (T, K); v0, i0, ...: (T, 1)
    w = prims.convert_element_type(values / aten.sum(values, [-1], True), bfloat16)
    e = aten.where(counted, ids, -1)

After::

    total = (v0 + v1) + ...
    w = cat([prims.convert_element_type(v0 / total, bfloat16), ...], -1)
    e = cat([aten.where(counted, i0, -1), ...], -1)

Whatever reads a (T, K) tensor is a kernel of its own for Inductor, as its rows are no rows of (T, E). A column is one
number a row, and those join the kernel of the reductions that they come from: softmax, top-k, normalisation, scaling
and casts are one launch. ``aten.gather(scores, -1, ids)``, which takes the weights from other scores than those that
chose, becomes K sums over a row that is zero but for one place; ``aten.scatter(x, -1, ids, number)``, the mark of
chosen groups, becomes comparisons.

The same operations on the same values; only sums over K have another order (first to last) than Inductor's own. The
largest of the values that a top-k returned is its first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

aten, prims = torch.ops.aten, torch.ops.prims
POINTWISE = (
    prims.convert_element_type.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.mul.Scalar,
    aten.div.Tensor, aten.exp.default, aten.sigmoid.default, aten.where.self,
)  # fmt: skip
SUMS: dict[Any, Any] = {aten.sum.dim_IntList: aten.add.Tensor, aten.amax.default: aten.maximum.default}
Write = Callable[..., Node]


@dataclass
class Columns:
    """Tensors of a graph that are known by column: node (..., K) to K nodes (..., 1)."""

    graph: Graph
    write: Write
    known: dict[Node, list[Node]]
    numbers: set[Node]  # those of ``known`` that number the columns of another tensor
    descending: set[Node]  # those whose columns are ordered, the largest first
    done: list[str] = field(default_factory=list)

    def spread(self, start: Node) -> None:
        """Compute by column whatever can be; put the columns together where something else reads them.

        Columns that are known lie before their node; all that reads them lies behind ``start``.
        """
        waiting = {user for node in self.known for user in node.users}
        following = start.next
        while waiting:
            node, following = following, following.next
            if node in waiting:
                waiting.remove(node)
                with self.graph.inserting_before(node):
                    self._visit(node)
                waiting.update(node.users if node in self.known else ())
        for node, columns in reversed(self.known.items()):
            if node.users:
                with self.graph.inserting_after(node):
                    node.replace_all_uses_with(self.write(aten.cat.default, columns, -1))
            self.graph.erase_node(node)

    def _visit(self, node: Node) -> None:
        if node.target in POINTWISE and all(map(self._is_column, node.all_input_nodes)):
            count = len(next(self.known[parent] for parent in node.all_input_nodes if parent in self.known))
            self.known[node] = [self._apply(node, number) for number in range(count)]
            if node.target is prims.convert_element_type.default and node.args[0] in self.descending:
                self.descending.add(node)
        elif node.target in SUMS and _over_last(node):
            self._sum(node)
        elif node.target is aten.gather.default and node.args[2] in self.numbers and _is_last(node, node.args[1]):
            self.known[node] = self._gather(node)
        elif node.target is aten.scatter.value and node.args[2] in self.numbers and _is_last(node, node.args[1]):
            self._scatter(node)
        else:
            return
        self.done.append(node.name)

    def _is_column(self, node: Node) -> bool:
        """Whether ``node`` is known by column, or the same for all."""
        shape = node.meta["val"].shape
        return node in self.known or not shape or shape[-1] == 1

    def _apply(self, node: Node, number: int) -> Node:
        def column(value: Any) -> Any:
            return self.known[value][number] if isinstance(value, Node) and value in self.known else value

        return self.write(node.target, *map(column, node.args), **node.kwargs)

    def _sum(self, node: Node) -> None:
        """First to last; ``node`` itself is replaced, as it has no columns."""
        source: Any = node.args[0]
        total, *rest = self.known[source]
        is_first = node.target is aten.amax.default and source in self.descending
        for column in () if is_first else rest:
            total = self.write(SUMS[node.target], total, column)
        if node.args[2:3] != (True,):
            total = self.write(aten.squeeze.dim, total, -1)
        node.replace_all_uses_with(total)
        self.graph.erase_node(node)

    def _gather(self, node: Node) -> list[Node]:
        scores, ids = node.args[0], node.args[2]
        assert isinstance(scores, Node) and isinstance(ids, Node)
        zero = self._number(0, scores)
        chosen = [self.write(aten.where.self, place, scores, zero) for place in self._places(scores, ids)]
        return [self.write(aten.sum.dim_IntList, alone, [-1], True) for alone in chosen]

    def _scatter(self, node: Node) -> None:
        x, _, ids, value = node.args
        assert isinstance(x, Node) and isinstance(ids, Node)
        chosen, *rest = self._places(x, ids)
        for place in rest:
            chosen = self.write(aten.logical_or.default, chosen, place)
        node.replace_all_uses_with(self.write(aten.where.self, chosen, self._number(value, x), x))
        self.graph.erase_node(node)

    def _places(self, x: Node, ids: Node) -> list[Node]:
        """Where in a row of ``x`` each of the ``ids`` is, bool like ``x``."""
        value = x.meta["val"]
        place = self.write(prims.iota.default, value.shape[-1], start=0, step=1, dtype=torch.int64,
                           device=value.device, requires_grad=False)  # fmt: skip
        return [self.write(aten.eq.Tensor, place, column) for column in self.known[ids]]

    def _number(self, number: Any, like: Node) -> Node:
        value = like.meta["val"]
        return self.write(aten.full.default, [], number, dtype=value.dtype, device=value.device)


def _over_last(node: Node) -> bool:
    dims = node.args[1] if len(node.args) > 1 else ()
    return isinstance(dims, list | tuple) and len(dims) == 1 and _is_last(node, dims[0]) and not node.kwargs


def _is_last(node: Node, dim: Any) -> bool:
    """Whether ``dim`` is the last one of what ``node`` reads."""
    return dim in (-1, node.all_input_nodes[0].meta["val"].dim() - 1)

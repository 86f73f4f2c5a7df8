"""A router's ``topk`` becomes k maxima, which Inductor joins with the softmax before and the scaling after it.

Before::

    t = aten.topk(scores, k)                       # two launches of its own, none of which fuses with anything
    values, ids = t[0], t[1]

After, for each of the k::

    v0 = aten.amax(scores, [-1], True)
    i0 = aten.argmax(scores, -1, True)
    rest = aten.where(columns == i0, -inf, scores)
    ...
    values, ids = aten.cat([v0, ...], -1), aten.cat([i0, ...], -1)

The same values in the same order; of equal ones the first is taken, where topk promises no order. Legal where no
score is -inf (else a column that was taken could come again), so it is refused unless every score is computed from
products, exponentials and inputs by ops that make no -inf out of finite numbers. Refused for more than ``MAX_K``
of more than ``MAX_COLUMNS``, which one block of threads would not hold. On the CPU topk costs nothing and stays.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from . import torch_compat
from .report import Outcome

aten, prims = torch.ops.aten, torch.ops.prims
MAX_K, MAX_COLUMNS = 16, 1024

# Ops whose result is finite if their inputs are (a sum that overflows is a broken model, with topk too) ...
KEEP_FINITE = {
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.where.self, aten.view.default, aten.reshape.default,
    aten.squeeze.dim, aten.unsqueeze.default, aten.expand.default, aten.slice.Tensor, aten.select.int,
    aten.permute.default, aten.clone.default, aten.neg.default, prims.convert_element_type.default,
}  # fmt: skip
# ... and ops whose result cannot be -inf whatever they are given.
NEVER_MINUS_INF = {aten.sigmoid.default, aten.exp.default, aten.mm.default, aten.addmm.default}
CONSTANTS = {aten.full.default: 1, aten.scalar_tensor.default: 0}  # which argument is the number


@dataclass(frozen=True)
class RouterTopk:
    """One ``topk`` over the last dimension, with the nodes that read its values and its ids."""

    node: Node
    scores: Node
    k: int

    def replace(self) -> str:
        """Put k maxima in its place; returns what was done."""
        graph = self.node.graph
        with graph.inserting_before(self.node):
            values, ids = self._maxima(graph)
        for read in list(self.node.users):
            assert read.target is operator.getitem
            read.replace_all_uses_with((values, ids)[read.args[1]])
            graph.erase_node(read)
        graph.erase_node(self.node)
        return f"{self.node.name}: {self.k} maxima"

    def _maxima(self, graph: Graph) -> tuple[Node, Node]:
        scores, call = self.scores, torch_compat.insert_call
        sample = scores.meta["val"]
        columns = call(graph, prims.iota.default, sample.shape[-1], start=0, step=1, dtype=torch.int64,
                       device=sample.device, requires_grad=False)  # fmt: skip
        taken = call(graph, aten.full.default, [], -math.inf, dtype=sample.dtype, device=sample.device)
        values, ids = [], []
        for index in range(self.k):
            values.append(call(graph, aten.amax.default, scores, [-1], True))
            ids.append(call(graph, aten.argmax.default, scores, -1, True))
            if index < self.k - 1:
                scores = call(
                    graph, aten.where.self, call(graph, aten.eq.Tensor, columns, ids[-1]), taken, scores
                )  # fmt: skip
        return call(graph, aten.cat.default, values, -1), call(graph, aten.cat.default, ids, -1)


class UnrollTopk:
    """See the module's docstring."""

    name = "unroll_topk"

    def __init__(self, devices: tuple[str, ...] = ("cuda",)):
        self.devices = devices

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Rewrite ``graph``; the outcome lists every topk."""
        outcome = Outcome(self.name)
        for node in graph.find_nodes(op="call_function", target=aten.topk.default):
            if node.args[0].meta["val"].device.type not in self.devices:
                continue
            if reason := _reason(node):
                outcome.refuse(node, reason)
            else:
                outcome.done.append(RouterTopk(node, node.args[0], node.args[1]).replace())
        return outcome


def _reason(node: Node) -> str | None:
    """Why a topk stays, None if it goes."""
    scores, k, dim, largest, ordered = (*node.args, -1, True, True)[:5]
    value = scores.meta["val"]
    if dim not in (-1, value.dim() - 1) or not largest or not ordered or not value.dtype.is_floating_point:
        return "is not the largest floating point numbers of each row in order"
    if k > MAX_K or value.shape[-1] > MAX_COLUMNS:
        return f"takes {k} of {value.shape[-1]}; at most {MAX_K} of {MAX_COLUMNS} are unrolled"
    if (cause := _may_be_minus_inf(scores)) is not None:
        return f"a score may be -inf: {cause}"
    return None


def _may_be_minus_inf(value: Any, depth: int = 0) -> str | None:
    """The node that may put -inf into ``value``, None if there is none."""
    if not isinstance(value, Node):
        return None if not isinstance(value, float) or math.isfinite(value) else str(value)
    if value.op in ("placeholder", "get_attr") or not value.meta["val"].dtype.is_floating_point:
        return None
    if value.target in CONSTANTS:
        return None if math.isfinite(value.args[CONSTANTS[value.target]]) else value.name
    if value.target in NEVER_MINUS_INF:
        return None
    if value.target is aten.div.Tensor:  # softmax and scaling: what it divides by is a sum of exponentials, or a number
        return _may_be_minus_inf(value.args[0], depth + 1)
    if value.target not in KEEP_FINITE or depth > 20:
        return value.name
    causes = (_may_be_minus_inf(argument, depth + 1) for argument in value.args if isinstance(argument, Node | float))
    return next((cause for cause in causes if cause is not None), None)

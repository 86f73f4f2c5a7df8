"""One ``metadata_update`` a step, however many layers ask for it.

Before::

    m0 = metadata_update(token0, local_tokens, group)      # layer 0
    d0 = agv_dispatch(m0.token, ..., local_tokens, m0[1], M, group)
    ...
    m1 = metadata_update(tokenk, local_tokens, group)      # layer 1, the same count
    d1 = agv_dispatch(m1.token, ..., local_tokens, m1[1], M, group)

After::

    m0 = metadata_update(token0, local_tokens, group)
    d0 = agv_dispatch(m0.token, ..., local_tokens, m0[1], M, group)
    ...
    d1 = agv_dispatch(tokenk, ..., local_tokens, m0[1], M, group)

Legal because the graph is functional: one node is one value, so every rank would be told the same three numbers
again. The op's only other effect is one meeting of all ranks, and every later op meets them itself
(docs/protocol.md: each op waits for every rank once, in any mix of ops). All ranks compile the same layers, so all
leave out the same calls; ``agreement`` checks it. Refused where a layer counts another tensor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .effects import EffectOp, effect_ops, read
from .report import Outcome

# Pure ops that models put between their count and the op: two of them on one value are one value.
VIEWS = (
    torch.ops.aten.slice.Tensor,
    torch.ops.aten.select.int,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.squeeze.default,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.alias.default,
    torch.ops.prims.convert_element_type.default,
    torch.ops.aten._to_copy.default,
)


@dataclass(frozen=True)
class RepeatedUpdate:
    """A ``metadata_update`` of a count that ``first`` has already summed."""

    first: EffectOp
    again: EffectOp

    def replace(self) -> str:
        """Give its readers the first result; returns what was done."""
        done = f"{self.again.node.name}: reads {self.first.node.name} instead"
        self.again.erase({0: _result(self.first)})
        return done


class HoistMetadata:
    """See the module's docstring."""

    name = "hoist_metadata"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Rewrite ``graph``; the outcome lists every update that went, and those that count something else."""
        outcome = Outcome(self.name)
        first: dict[Any, EffectOp] = {}
        for update in effect_ops(graph, "metadata_update"):
            arguments = update.arguments
            key = (arguments["group_name"], value_key(arguments["local_tokens"]))
            if key in first:
                outcome.done.append(RepeatedUpdate(first[key], update).replace())
                continue
            if first:
                other = next(iter(first.values()))
                outcome.refuse(update.node, f"counts another tensor or group than {other.node.name}")
            first[key] = update
        return outcome


def value_key(value: Any) -> Any:
    """Equal for two nodes only if they hold the same value: the node, or a view of equal ones."""
    if isinstance(value, Node) and value.op == "call_function" and value.target in VIEWS:
        return (value.target, tuple(map(value_key, value.args)), tuple(sorted(value.kwargs.items(), key=str)))
    return tuple(map(value_key, value)) if isinstance(value, list | tuple) else value


def _result(update: EffectOp) -> Node:
    """The node that reads an update's result, right after it."""
    reads = update.results(0)
    if reads:
        return reads[0]
    with update.node.graph.inserting_after(update.node):
        return read(update.node, 1)

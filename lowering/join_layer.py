"""Experts read where the peers have written: dispatch and ``fused_moe_combine`` of one layer become one op.

Before::

    d = with_effects(token, moe_ep.agv_dispatch, x, ids, weights, local_tokens, metadata, M, group)  # slot to tensors
    y = with_effects(d[0], moe_ep.fused_moe_combine, d[1], d[2], d[3], gate_up, down, local_tokens, metadata, start, T,
                     addends, group)

After::

    y = with_effects(token, moe_ep.moe_layer, x, ids, weights, gate_up, down, local_tokens, metadata, start, M,
                     addends, group)

The gathered batch (M, H) is no tensor of the graph any more: not allocated, and on transports with kernels not copied
out of symmetric memory. Legal because nobody else reads it, both ops use the same counts, and no ordered op stands
between them. In the joined op dispatch and combine strictly alternate, and the experts read the batch before the
combine meets all ranks: that is why one buffer without a second wait is enough for any number of layers
(docs/protocol.md). The op stands where the combine stood, because its addends may be younger than the dispatch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .effects import EffectOp, effect_ops, insert_effect, read
from .hoist_metadata import value_key
from .report import Outcome

INPUTS = ("hidden", "topk_ids", "topk_weights")
POSITIONAL = ("gate_up", "down", "local_tokens", "metadata", "local_expert_start")
GONE = ("num_rows", "addends", "group_name", *INPUTS, *POSITIONAL)  # arguments with a place of their own


@dataclass(frozen=True)
class DispatchAndRest:
    """A dispatch and the ``fused_moe_combine`` that alone reads its results."""

    dispatch: EffectOp
    rest: EffectOp

    def replace(self) -> str:
        """Put one op in place of both; returns what was done."""
        graph, first, rest = self.rest.node.graph, self.dispatch.arguments, self.rest.arguments
        args = (
            *(first[name] for name in INPUTS), *(rest[name] for name in POSITIONAL),
            first["max_tokens"], rest["addends"], rest["group_name"],
        )  # fmt: skip
        options = {name: value for name, value in rest.items() if name not in GONE}
        batch = self.dispatch.value(0)
        names = f"{self.dispatch.node.name} and {self.rest.node.name}"
        with graph.inserting_before(self.rest.node):
            joined = insert_effect(
                graph, self.dispatch.token, torch.ops.moe_ep.moe_layer.default, args, options, (self.rest.value(0),)
            )
            token, value = read(joined, 0), read(joined, 1)
        for node in list(self.rest.node.users):
            node.replace_all_uses_with(token if node.args[1] == 0 else value)
        self.erase()
        return f"{joined.name}: {names}; the gathered batch, {batch.numel() * batch.element_size()} bytes, stays inside"

    def erase(self) -> None:
        """Remove the two ops, the later one first."""
        self.rest.erase({})
        self.dispatch.erase({})


class JoinLayer:
    """See the module's docstring."""

    name = "join_layer"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Join every dispatch with the experts and combine behind it; refusals say why a copy out stays."""
        outcome = Outcome(self.name)
        ops = list(effect_ops(graph))
        for dispatch, rest in zip(ops, [*ops[1:], None]):
            if dispatch.name != "agv_dispatch":
                continue
            if reason := _refuse(dispatch, rest):
                outcome.refuse(dispatch.node, reason)
                continue
            assert rest is not None
            outcome.done.append(DispatchAndRest(dispatch, rest).replace())
        return outcome


def _refuse(dispatch: EffectOp, rest: EffectOp | None) -> str | None:
    """Why the batch stays a tensor of the graph, or None. ``rest``: the next ordered op."""
    if rest is None or rest.name != "fused_moe_combine":
        return f"the next ordered op is {rest.name if rest else 'none'}, not experts joined with their combine"
    if rest.token not in _reads(dispatch, 0):
        return f"{rest.node.name} is not the next op in the chain of tokens"
    first, other = dispatch.arguments, rest.arguments
    for index, name in enumerate(INPUTS):
        reads = dispatch.results(index)
        if other[name] not in reads:
            return f"{rest.node.name} takes its {name} from elsewhere"
        users = {user for read_ in reads for user in read_.users}
        if any(read_ in other["addends"] for read_ in reads):
            return f"the gathered {name} is also added to the combine's result"
        if users - {rest.node}:
            return f"the gathered {name} is also read by {', '.join(sorted(user.name for user in users - {rest.node}))}"
    for name in ("local_tokens", "metadata", "group_name"):
        if value_key(first[name]) != value_key(other[name]):
            return f"{rest.node.name} has another {name}"
    rows = first["hidden"].meta["val"].shape[0]
    if other["num_rows"] != rows:
        return f"{rest.node.name} returns {other['num_rows']} rows, this rank sends {rows}"
    return None


def _reads(op: EffectOp, index: int) -> list[Any]:
    return [user for user in op.node.users if isinstance(user, Node) and user.args[1] == index]

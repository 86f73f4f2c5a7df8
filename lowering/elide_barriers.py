"""Says of every wait for peers whether the order of the others already gives it. It changes nothing.

An op that exchanges data through reused memory can need two waits: one because it reads what peers write in this very
call (arrival), one because it writes where peers may still read or write for an earlier call (reuse).

Arrival. ``metadata_update`` reads the peers' counts, ``agv_dispatch`` their rows, ``rsv_combine`` (and what joins it)
their partial sums, each written by the same call on the other rank. No op before it can have delivered them: they do
not exist yet. So this wait always stays. It is the one that each op has.

Reuse. The op writes slot ``epoch mod 2``, last used two ordered ops earlier on this group. Between them stands exactly
one ordered op of the group, and it waited for every rank, each of which had ended the earlier one before (one stream,
one chain of tokens). So every rank is done with the slot: this wait is never needed (docs/protocol.md, model-checked in
tests/protocol). Nothing here depends on which ops they are, so the rewrites of the other passes keep it.

Hence 2 waits a layer, one for dispatch and one for combine, and one a step for the metadata; dropping any of them
would read what nobody wrote. What the pass checks is the premise: that all ordered ops of a group form one chain.
"""

from __future__ import annotations

from torch.fx import Graph

from .effects import EffectOp, effect_ops, reaches
from .report import Outcome

ARRIVAL = {
    "metadata_update": "the counts of all ranks",
    "agv_dispatch": "the rows of all ranks",
    "rsv_combine": "the partial sums of all ranks",
    "rsv_combine_add": "the partial sums of all ranks",
    "fused_moe_combine": "the partial sums of all ranks",
}


class ElideBarriers:
    """See the module's docstring."""

    name = "elide_barriers"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """``done``: waits that the order makes superfluous; ``refused``: waits that stay, with the reason."""
        outcome = Outcome(self.name)
        by_group: dict[str, list[EffectOp]] = {}
        for op in effect_ops(graph, *ARRIVAL):
            by_group.setdefault(op.arguments["group_name"], []).append(op)
        for ops in by_group.values():
            _explain(ops, outcome)
        return outcome


def _explain(ops: list[EffectOp], outcome: Outcome) -> None:
    for number, op in enumerate(ops):
        if number and not _follows(op, ops[number - 1]):
            outcome.refuse(op.node, f"arrival and reuse: no token orders it behind {ops[number - 1].node.name}")
            continue
        outcome.refuse(op.node, f"arrival: {op.name} reads {ARRIVAL[op.name]}, written in this call")
        if number >= 2:
            first, between = ops[number - 2], ops[number - 1]
            outcome.done.append(
                f"{op.node.name}: no reuse wait; its slot was {first.node.name}'s, "
                f"and {between.node.name} met all ranks since"
            )
        else:
            outcome.done.append(f"{op.node.name}: no reuse wait; the group's last op before this graph met all ranks")


def _follows(op: EffectOp, before: EffectOp) -> bool:
    """Whether the chain of tokens leads from ``before`` to ``op``."""
    return reaches(op.token, lambda node: node is before.node)

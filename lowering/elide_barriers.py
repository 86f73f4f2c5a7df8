"""Drops a meeting of all ranks where the order of the others already gives it, and says of each why it stays or goes.

Before::

    y0 = with_effects(token0, moe_ep.moe_layer, ..., group)                           # meets before peers write: entry
    y1 = with_effects(token1, moe_ep.moe_layer, ..., group)

After::

    y0 = with_effects(token0, moe_ep.moe_layer, ..., group, entry_barrier=False)      # behind a metadata_update
    y1 = with_effects(token1, moe_ep.moe_layer, ..., group, entry_barrier=False)

An op that exchanges data through reused memory can need two kinds of meeting.

Arrival: it reads what peers write in this very call. ``metadata_update`` reads their counts, ``agv_dispatch`` their
rows, ``rsv_combine`` (and what joins it) their partial sums, ``moe_layer`` rows and then partial sums. No op before it
can have delivered them: they do not exist yet. These always stay.

Reuse: it writes where others may still read for an earlier call. Ops with slots of their own need none: slot ``epoch
mod 2`` was last used two calls earlier, and the call between met all ranks. ``moe_layer`` writes into the one layer
batch of each rank, which the experts of the op that used it last may still be reading: it needs a meeting of all ranks
after those. Any ordered op of the group that stands between has one, and every ``moe_ep`` op that uses the layer
batch ends with a combine, which is one as well. So the entry meeting goes wherever an ordered op of the group comes
before in this graph, and stays only at the start of a graph that begins with a layer: what ran before it, the graph
does not say.

Dropped or not is part of the fingerprint that ranks compare (``agreement``), because a meeting that one rank leaves out
is a dead-lock. docs/protocol.md has the proof. The protocol's model (``tests/protocol``), which knows nothing of this,
checks what Inductor scheduled wherever a test of ``tests/lowering`` explains a graph, decode steps of real models among
them, and refuses the same sequence without the meetings that a dropped one relies on.
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
    "moe_layer": "the rows, then the partial sums of all ranks",
    "moe_layer_shared": "the rows, then the partial sums of all ranks",
}
LAYERS = ("moe_layer", "moe_layer_shared")  # with the layer batch, and an entry barrier


class ElideBarriers:
    """See the module's docstring."""

    name = "elide_barriers"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """``done``: meetings that went or never were; ``refused``: meetings that stay, with the reason."""
        outcome = Outcome(self.name)
        by_group: dict[str, list[EffectOp]] = {}
        for op in effect_ops(graph, *ARRIVAL):
            by_group.setdefault(op.arguments["group_name"], []).append(op)
        for ops in by_group.values():
            for number, op in enumerate(ops):
                _decide(op, ops[:number], outcome)
        return outcome


def _decide(op: EffectOp, before: list[EffectOp], outcome: Outcome) -> None:
    """``before``: the group's ordered ops that the graph lists earlier."""
    if before and not _follows(op, before[-1]):
        outcome.refuse(op.node, f"arrival and reuse: no token orders it behind {before[-1].node.name}")
        return
    outcome.refuse(op.node, f"arrival: {op.name} reads {ARRIVAL[op.name]}, written in this call")
    if op.name in LAYERS:
        _decide_entry(op, before, outcome)
    elif len(before) >= 2:
        first, between = before[-2:]
        outcome.done.append(
            f"{op.node.name}: no reuse wait; its slot was {first.node.name}'s, "
            f"and {between.node.name} met all ranks since"
        )
    else:
        outcome.done.append(f"{op.node.name}: no reuse wait; the group's last op before this graph met all ranks")


def _decide_entry(op: EffectOp, before: list[EffectOp], outcome: Outcome) -> None:
    if not before:
        outcome.refuse(op.node, "reuse: the graph begins with it, and what used the layer batch before is not known")
        return
    op.node.kwargs = op.node.kwargs | {"entry_barrier": False}
    user = next((other for other in reversed(before) if other.name in LAYERS), None)
    last = f"{user.node.name}, whose experts" if user is not None else "an earlier graph's layer, whose experts"
    outcome.done.append(
        f"{op.node.name}: entry wait dropped; the layer batch was last read by {last} ended before "
        f"{before[-1].node.name} met all ranks"
    )


def _follows(op: EffectOp, before: EffectOp) -> bool:
    """Whether the chain of tokens leads from ``before`` to ``op``."""
    return reaches(op.token, lambda node: node is before.node)

"""Rows of a layer travel only to ranks that hold an expert for them, and sums come back only from those.

Before::

    y = with_effects(token, moe_ep.moe_layer, x, ids, ..., M, addends, group)                       # every row to all

After::

    y = with_effects(token, moe_ep.moe_layer, x, ids, ..., M, addends, group, experts_per_rank=64)

Legal because all ranks have told each other which experts they hold (``moe_ops.place_experts``) and hold the same
number, in the order of ranks: a row's ids then name the ranks that need its hidden states. Nobody reads them on the
others, whose part of the row's sum is zero, so no bit changes. Every rank decides from what all know: the declared
splits, W, K and M; the number is part of the fingerprint that ranks compare (``agreement``), so ranks that decide
differently raise ``AgreementError`` instead of losing rows. A layer whose split is not even, or was not declared, keeps
sending every row to all.
"""

from __future__ import annotations

from torch.fx import Graph

from moe_ops.transports import KERNEL_TRANSPORTS
from moe_ops.workspace import Workspace, get_workspace

from .effects import EffectOp, effect_ops
from .elide_barriers import LAYERS
from .report import Outcome

# What must stay off the wire, a rank and direction, to pay for looking at the ids: on 4 H200s 160 KB gain nothing (17.6
# us instead of 17.5), 275 KB 1 us of 25, 550 KB 2.3 of 41 (bench_comm, K = 8, H = 2048 and 7168, T = 128, 64, 128).
LEAST_BYTES = 200_000


class RouteRows:
    """See the module's docstring."""

    name = "route_rows"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Give every layer its split; refusals say why rows go to all ranks. One rank alone is not mentioned."""
        outcome = Outcome(self.name)
        for layer in effect_ops(graph, *LAYERS):
            workspace = get_workspace(layer.arguments["group_name"])
            if workspace is None or workspace.world_size == 1:
                continue
            count, first = layer.arguments["gate_up"].meta["val"].shape[0], layer.arguments["local_expert_start"]
            saved = _saved_bytes(layer, workspace)
            if reason := _refuse(workspace, first, count, saved):
                outcome.refuse(layer.node, reason)
                continue
            layer.node.kwargs = layer.node.kwargs | {"experts_per_rank": count}
            outcome.done.append(
                f"{layer.node.name}: {count} experts on each of {workspace.world_size} ranks; about {saved} bytes stay "
                "off the wire to each rank, and from each"
            )
        return outcome


def _saved_bytes(layer: EffectOp, workspace: Workspace) -> int:
    """Hidden states that a rank need not get if all rows live and experts are drawn evenly."""
    x, world = layer.arguments["hidden"].meta["val"], workspace.world_size
    top_k = layer.arguments["topk_ids"].meta["val"].shape[1]
    row = x.shape[1] * x.element_size()
    return int(layer.arguments["max_tokens"] * row * (1 - 1 / world) ** (top_k + 1))  # of the others' rows


def _refuse(workspace: Workspace, first: int, count: int, saved: int) -> str | None:
    """Why every row goes to all ranks, or None."""
    if workspace.transport not in KERNEL_TRANSPORTS:
        return f"{workspace.transport} moves whole batches"
    if workspace.transport.endswith("multicast"):
        return "a multicast store reaches every rank anyway"
    if not workspace.placements.splits:
        return "the ranks have not told each other which experts they hold (moe_ops.place_experts)"
    if not workspace.placements.experts_per_rank(workspace.rank, first, count):
        return f"experts {first} to {first + count - 1} here are no part of a declared split with equal numbers"
    if saved < LEAST_BYTES:
        return f"{saved} bytes would stay off the wire: less than {LEAST_BYTES}, which do not pay for it"
    return None

"""One MoE layer of a graph as boxes and arrows, for the picture that ``explain`` draws before and after the passes.

A box is what becomes one or more launches together: an op of ``moe_ep``, a product, a top-k, or pointwise ops that
are neighbours, which Inductor fuses. Counts are those of CUDA with the ops' kernels (p2p, multicast): they say what the
graph asks for; a profile says what came of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph, Node

from . import torch_compat
from .effects import is_moe_op, short_name

aten = torch.ops.aten
VIEWS = {
    aten.view.default, aten.reshape.default, aten.permute.default, aten.slice.Tensor, aten.select.int,
    aten.split.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.t.default,
}  # fmt: skip
PRODUCTS = {aten.mm.default: "product", aten.addmm.default: "product and sum", aten.bmm.default: "product"}
# launches, meetings of all ranks, passes that only copy the gathered batch (M, H)
COSTS = {
    "metadata_update": (1, 1, 0), "agv_dispatch": (1, 1, 1), "fused_moe": (3, 0, 0), "rsv_combine": (1, 1, 1),
    "rsv_combine_add": (1, 1, 1), "fused_moe_combine": (3, 1, 0), "moe_layer": (4, 2, 0), "moe_layer_shared": (7, 2, 0),
}  # fmt: skip
INSIDE = {
    "fused_moe": ["gate and up, down,", "sum over the K pairs"],
    "agv_dispatch": ["rows to all ranks; wait;", "copy out of symmetric memory"],
    "rsv_combine": ["copy into symmetric memory; wait;", "sum over ranks"],
    "rsv_combine_add": ["copy into symmetric memory; wait;", "sum over ranks, then the adds"],
    "fused_moe_combine": ["gate and up, down; sum of pairs", "into symmetric memory; wait;", "sum over ranks"],
}
LAYER = ["rows into all ranks' batch; wait;", "gate and up, down; sum of pairs", "into symmetric memory; wait;"]
INSIDE["moe_layer"] = [*LAYER, "sum over ranks, adds"]
INSIDE["moe_layer_shared"] = [*INSIDE["moe_layer"], "| beside it, on a stream of its own:", "| the shared expert"]
LAYER_ENDS = ("rsv_combine", "rsv_combine_add", "fused_moe_combine", "moe_layer", "moe_layer_shared")
LAYER_STARTS = ("agv_dispatch", "moe_layer", "moe_layer_shared")


@dataclass
class Box:
    """One box; ``depth``: how many boxes lie before it on the longest way."""

    name: str
    inside: list[str]
    launches: int
    meetings: int
    copies: int
    depth: int = 0
    needs: list[int] = field(default_factory=list)  # boxes that it reads, by number


@dataclass
class LayerView:
    """The boxes of one layer, each after those that it reads."""

    boxes: list[Box]

    def totals(self) -> dict[str, int]:
        """Launches, meetings and copies of the layer."""
        return {name: sum(getattr(box, name) for box in self.boxes) for name in ("launches", "meetings", "copies")}


def view_layer(graph: Graph) -> LayerView | None:
    """The last MoE layer of ``graph``, from what its input becomes to the residual; None if there is none."""
    ops = [(name, node) for node in graph.nodes if (name := _moe_name(node)) is not None]
    starts = [node for name, node in ops if name in LAYER_STARTS]
    ends = [node for name, node in ops if name in LAYER_ENDS]
    if not starts or not ends:
        return None
    source = _behind_views(starts[-1].args[2])  # behind token and op
    members = _members(source, _last_add(ends[-1]), starts[-1])
    return _boxes([node for node in graph.nodes if node in members])


def _moe_name(node: Node) -> str | None:
    op: Any = node.args[1] if torch_compat.is_effect(node) else node.target
    return short_name(op) if node.op == "call_function" and is_moe_op(op) else None


def _behind_views(node: Any) -> Node:
    while node.op == "call_function" and node.target in VIEWS:
        node = node.args[0]
    return node


def _last_add(combine: Node) -> Node:
    """The combine's result, or the last add that reads nothing but it and other values."""
    last = combine
    while True:
        adds = [user for user in last.users if user.target is aten.add.Tensor or user.target in VIEWS]
        adds += [user for user in last.users if user.target not in VIEWS and _is_read(user, combine)]
        if len(adds) != 1:
            return last
        last = adds[0]


def _is_read(node: Node, combine: Node) -> bool:
    """Whether ``node`` takes the first result of the combine."""
    return len(node.args) == 2 and node.args[0] is combine and bool(node.args[1] == 1)


def _members(source: Node, end: Node, start: Node) -> set[Node]:
    """Nodes between ``source`` and ``end``, and the metadata that the layer reads."""
    below, stack = {source}, [source]
    while stack:
        fresh = [user for user in stack.pop().users if user not in below and user.op == "call_function"]
        below.update(fresh)
        stack.extend(fresh)
    above, stack = {end}, [end]
    while stack:
        fresh = [parent for parent in stack.pop().all_input_nodes if parent not in above]
        above.update(fresh)
        stack.extend(fresh)
    metadata = [node for node in above if _moe_name(node) == "metadata_update" and _feeds(node, start)]
    reads = [read for node in metadata for read in node.users if read in start.args]
    return (below & above - {source}) | {*metadata, *reads}


def _feeds(metadata: Node, start: Node) -> bool:
    return any(read in start.args for read in metadata.users)


def _boxes(nodes: list[Node]) -> LayerView:
    """Group ``nodes``, in the graph's order, into boxes."""
    boxes: list[Box] = []
    box_of: dict[Node, int | None] = {}
    for node in nodes:
        needs = sorted({box for parent in _sources(node, box_of) if (box := box_of.get(parent)) is not None})
        kind = _kind(node)
        if kind is None:  # a view, or the read of a result: stands for what it reads
            box_of[node] = needs[-1] if needs else None
            continue
        joined = next((n for n in needs if kind == "pointwise" and boxes[n].name == "pointwise"), None)
        if joined is not None and all(need <= joined for need in needs):
            boxes[joined].inside = _named(boxes[joined].inside, node)
            box_of[node] = joined
            continue
        box_of[node] = len(boxes)
        boxes.append(_box(kind, node, needs, boxes))
    _sink(boxes)
    return LayerView(boxes)


def _sink(boxes: list[Box]) -> None:
    """Put every box right above the first that reads it, so that arrows are short."""
    for number, box in reversed(list(enumerate(boxes))):
        readers = [other.depth for other in boxes if number in other.needs]
        box.depth = min(readers) - 1 if readers else box.depth


def _sources(node: Node, known: dict[Node, int | None]) -> Iterator[Node]:
    """Inputs that carry data: the token of an ordered op does not."""
    inputs = node.args[2:] if torch_compat.is_effect(node) else (*node.args, *node.kwargs.values())
    stack = list(inputs)
    while stack:
        value = stack.pop()
        if isinstance(value, list | tuple):
            stack.extend(value)
        elif isinstance(value, Node) and value in known:
            yield value


def _kind(node: Node) -> str | None:
    if (name := _moe_name(node)) is not None:
        return name
    if node.op != "call_function" or node.target in VIEWS or not isinstance(node.target, torch_compat.OpOverload):
        return None
    if node.target is aten.topk.default:
        return "top-k"
    return PRODUCTS.get(node.target, "pointwise")


def _box(kind: str, node: Node, needs: list[int], boxes: list[Box]) -> Box:
    launches, meetings, copies = COSTS.get(kind, (2 if kind == "top-k" else 1, 0, 0))
    depth = max((boxes[need].depth + 1 for need in needs), default=0)
    inside = _named([], node) if kind == "pointwise" else list(INSIDE.get(kind, []))
    return Box(kind, inside, launches, meetings, copies, depth, needs)


def _named(names: list[str], node: Node) -> list[str]:
    """The ops of a pointwise box, without casts, each once, at most five."""
    name = str(node.target).split(".")[1]
    plain = name in ("convert_element_type", "full", "scalar_tensor", "iota")
    return names if plain or name in names or len(names) == 5 else [*names, name]

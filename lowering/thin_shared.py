"""Few rows: a shared expert beside its layer runs on kernels of our own, its last product included.

Before (views left out)::

    y, s = with_effects(token, moe_ep.moe_layer_shared, ..., x, [gate, up], None, -1, group)[1:]  # s: the activation
    out  = y + mm(s, shared_down)                                         # torch would make it one addmm

After::

    y, s = with_effects(token, moe_ep.moe_layer_shared, ..., [gate, up], shared_down, -1, group, shared_thin=True)[1:]
    out  = y + s

Two launches instead of four or five, which read the weights at the memory's rate and leave room for dispatch and
combine on every SM (``moe_ops/shared_expert.py``). Sums in another order than the library's, and a product that is
rounded before its add: the bits change, so the pass is one of ``INEXACT``. Refused for more than ``MAX_ROWS`` rows, and
for weights that are not stored row by row. The CPU's products stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from moe_ops.thin_linear import MAX_ROWS

from . import torch_compat
from .effects import EffectOp, effect_ops, reaches
from .overlap_shared import readers, strip_views
from .report import Outcome

aten = torch.ops.aten


class ThinShared:
    """See the module's docstring."""

    name = "thin_shared"

    def __init__(self, devices: tuple[str, ...] = ("cuda",)):
        self.devices = devices

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Rewrite every layer with a shared expert beside it."""
        outcome = Outcome(self.name)
        for layer in effect_ops(graph, "moe_layer_shared"):
            arguments = layer.arguments
            if arguments["shared_x"].meta["val"].device.type not in self.devices:
                continue
            product = _last_product(layer) if arguments["shared_down"] is None else None
            down: Any = product.args[1] if product is not None else arguments["shared_down"]
            if reason := _refuse(arguments["shared_x"], [*arguments["shared_gate_up"], *([down] if down else [])]):
                outcome.refuse(layer.node, reason)
                continue
            layer.node.kwargs = layer.node.kwargs | {"shared_thin": True}
            if product is not None:
                _take_along(layer, product)
            along = f", {product.name} with it" if product is not None else ""
            outcome.done.append(f"{layer.node.name}: thin kernels for its shared expert{along}")
        torch_compat.sort_graph(graph)
        return outcome


def _refuse(x: Node, weights: list[Node]) -> str | None:
    rows = x.meta["val"].shape[0]
    if rows > MAX_ROWS:
        return f"{rows} rows; the library is as fast from {MAX_ROWS + 1} on"
    loose = [weight.name for weight in weights if not weight.meta["val"].t().is_contiguous()]
    return f"{', '.join(loose)}: not stored row by row" if loose else None


def _last_product(layer: EffectOp) -> Node | None:
    """The one product that reads the activation, if its weight does not depend on the layer."""
    reading = [reader for result in layer.results(1) for reader in readers(result)]
    if len(reading) != 1 or reading[0].target is not aten.mm.default:
        return None
    (product,) = reading
    left, weight = product.args
    if strip_views(left) not in layer.results(1) or not isinstance(weight, Node):
        return None
    return None if reaches(weight, lambda node: node is layer.node) else product


def _take_along(layer: EffectOp, product: Node) -> None:
    """The layer's second result becomes that of ``product``, which goes."""
    names = [argument.name for argument in torch_compat.schema_arguments(layer.op)]
    layer.node.update_arg(2 + names.index("shared_down"), product.args[1])
    value: Any = product.meta["val"]
    layer.node.meta["val"] = (*layer.node.meta["val"][:2], value)
    (result,) = layer.results(1)
    left = product.args[0]
    product.replace_all_uses_with(result)
    layer.node.graph.erase_node(product)
    while isinstance(left, Node) and left is not result and not left.users:  # views of the activation
        left, gone = left.args[0], left
        layer.node.graph.erase_node(gone)
    result.meta["val"] = value

"""Sine and cosine of the positions are computed once a step, not once in every layer that rotates by them.

Before::

    c = prims.convert_element_type(aten.cos(angles) * scale, bf16)      # Inductor computes it anew in every reader:
    q0 = ... * c;  k0 = ... * c;  q1 = ... * c;  ...                     # two a layer, for every head

After::

    kept = realize(aten.cos(angles) * scale)                            # a buffer, written once
    c = prims.convert_element_type(kept, bf16)
    q0 = ... * c;  k0 = ... * c;  q1 = ... * c;  ...

The same bits: what is kept is the fp32 value before it is rounded, which is what Inductor's fused code computes with.
Left alone where fewer than ``MIN_READERS`` nodes read it: then a buffer would cost as much as it saves.

The angles themselves, ``aten.bmm(frequencies (B, R, 1), positions (B, 1, S))``, become ``aten.mul`` of the two, which
Inductor computes in the same kernel. torch 2.13 does so itself; with 2.11 the product is three launches: its operand,
ATen's copy of the frequencies, because they are the same for every row (stride 0), and itself. A product of fp32
with one term has nothing to sum: the same bits, unless TF32 is allowed (transformers wants none there).
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node

from . import torch_compat
from .report import Outcome

aten, prims = torch.ops.aten, torch.ops.prims
MIN_READERS = 4
_VIEWS = (aten.unsqueeze.default, aten.view.default, aten.reshape.default, aten.expand.default, aten.slice.Tensor)
_SCALINGS = (aten.mul.Tensor, aten.mul.Scalar)


class KeepRotations:
    """See the module's docstring."""

    name = "keep_rotations"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Rewrite ``graph``; the outcome lists every sine and cosine: kept, or why not."""
        outcome = Outcome(self.name)
        for node in graph.find_nodes(op="call_function", target=aten.bmm.default):
            if _is_outer(node):
                outcome.done.append(_multiply(node))
        for target in (aten.cos.default, aten.sin.default):
            for node in graph.find_nodes(op="call_function", target=target):
                value = _scaled(node)
                if reason := _refuse(value):
                    outcome.refuse(node, reason)
                else:
                    outcome.done.append(_keep(value, node))
        return outcome


def _is_outer(product: Node) -> bool:
    """Whether every element of ``product`` is one product of two fp32 numbers."""
    first = product.args[0]
    assert isinstance(first, Node)
    return first.meta["val"].dtype == torch.float32 and first.meta["val"].shape[2] == 1


def _multiply(product: Node) -> str:
    """Put a pointwise product in the place of ``product``, contiguous as that one is."""
    with product.graph.inserting_before(product):
        outer = torch_compat.insert_call(product.graph, aten.mul.Tensor, *product.args)
        if not outer.meta["val"].is_contiguous():
            layout = {"memory_format": torch.contiguous_format}
            outer = torch_compat.insert_call(product.graph, aten.clone.default, outer, **layout)
    product.replace_all_uses_with(outer)
    product.graph.erase_node(product)
    return f"{product.name}: pointwise"


def _refuse(value: Node) -> str | None:
    """Why ``value`` is computed anew wherever it is read, or None."""
    dtype, readers = value.meta["val"].dtype, _readers(value)
    if dtype != torch.float32:
        return f"{dtype}: what is kept would be rounded, and Inductor's fused code does not round it"
    if readers < MIN_READERS:
        return f"{readers} readers: less than {MIN_READERS}, for which a buffer costs as much as it saves"
    return None


def _scaled(node: Node) -> Node:
    """The last of the scalings by a number that follow ``node`` and are its only readers."""
    users = list(node.users)
    if len(users) == 1 and users[0].target in _SCALINGS and not isinstance(users[0].args[1], Node):
        return _scaled(users[0])
    return node


def _readers(node: Node) -> int:
    """Nodes that compute with ``node``, casts and views of it looked through."""
    through = (*_VIEWS, prims.convert_element_type.default)
    return sum(_readers(user) if user.target in through else 1 for user in node.users)


def _keep(value: Node, node: Node) -> str:
    readers = list(value.users)
    with value.graph.inserting_after(value):
        kept = torch_compat.insert_call(value.graph, torch_compat.realize_target(), value)
    for reader in readers:
        reader.replace_input_with(value, kept)
    return f"{node.name}: {_readers(kept)} readers"

"""How the rotation of a query or key by its position, and the RMSNorm before it, look in a graph of one token a row.

Only what moves dimensions of size 1 is taken for a view here: with one token, (B, 1, heads, D) and (B, heads, 1, D)
hold the same elements in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from .effects import bind

aten, prims = torch.ops.aten, torch.ops.prims
_VIEWS = {
    aten.view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims,
    aten.permute.default, aten.transpose.int, aten.select.int, aten.clone.default,
    aten.alias.default,
}  # fmt: skip


@dataclass(frozen=True)
class Turned:
    """``rotate(norm(source), cos, sin)``: the first ``width`` columns turn, column c with column c + width / 2.

    ``norm (D,)`` is the weight of an RMSNorm with ``eps``, None for none. ``cos`` and ``sin`` are of ``width`` columns
    a row, before they were rounded to the model's dtype: that is what Inductor's fused code computes with.
    """

    source: Node
    cos: Node
    sin: Node
    width: int
    norm: Node | None = None
    eps: float = 0.0


def match_turned(node: Node) -> Turned | None:
    """``node (B, ..., D)`` taken apart, or None if it is not rotated half by half."""
    node = base_of(node)
    found = _rotation(node) or _partial_rotation(node)
    return None if found is None else _with_norm(found)


def base_of(node: Node) -> Node:
    """What ``node`` is a view of: the same elements in the same order."""
    while node.target in _VIEWS and _same_order(node):
        (node,) = node.all_input_nodes
    return node


def _same_order(view: Node) -> bool:
    before, after = _value(view.args[0]), _value(view)
    if before.numel() != after.numel():
        return False
    given: dict[str, Any] = bind(view.target, view.args, view.kwargs)
    order = list(range(before.dim()))
    if view.target is aten.permute.default:
        order = [dim % before.dim() for dim in given["dims"]]
    elif view.target is aten.transpose.int:
        first, second = given["dim0"] % before.dim(), given["dim1"] % before.dim()
        order[first], order[second] = second, first
    kept = [dim for dim in order if before.shape[dim] != 1]
    return kept == sorted(kept)


def _rotation(node: Node) -> Turned | None:
    """``x * cos + cat(-x[width / 2:], x[:width / 2]) * sin``; ``source`` is x as it stands there."""
    if node.target is not aten.add.Tensor:
        return None
    for straight, across in _both_ways(node):
        if straight.target is not aten.mul.Tensor or across.target is not aten.mul.Tensor:
            continue
        for (x, cos), (swapped, sin) in ((a, b) for a in _both_ways(straight) for b in _both_ways(across)):
            if _is_angle(cos, x) and _is_angle(sin, x) and _is_swapped(swapped, x):
                return Turned(x, _exact(cos), _exact(sin), _value(x).shape[-1])
    return None


def _partial_rotation(node: Node) -> Turned | None:
    """``cat(rotate(x[:width]), x[width:])``."""
    pieces = _concatenated(node)
    part = _rotation(pieces[0]) if pieces else None
    if pieces is None or part is None:
        return None
    turned, rest = _columns(part.source), _columns(pieces[1])
    if turned is None or rest is None or turned[0] is not rest[0]:
        return None
    if (turned[1:], rest[1:]) != ((0, part.width), (part.width, _value(node).shape[-1])):
        return None
    return replace(part, source=turned[0])


def _with_norm(found: Turned) -> Turned:
    """With the norm apart from ``source``, if there is one over its last dimension."""
    source, depth = base_of(found.source), _value(found.source).shape[-1]
    if source.target is aten.mul.Tensor and _value(source).shape[-1] == depth:
        for weight, scaled in _both_ways(source):
            if tuple(_value(weight).shape) == (depth,) and (parts := _normalised(_uncast(scaled))):
                return replace(found, source=base_of(parts[0]), norm=weight, eps=parts[1])
    return replace(found, source=source)


def _normalised(node: Node) -> tuple[Node, float] | None:
    """``(x, eps)`` of ``x * rsqrt(mean(x ** 2, -1) + eps)``."""
    if node.target is not aten.mul.Tensor:
        return None
    for x, root in _both_ways(node):
        total: Any = root.args[0] if root.target is aten.rsqrt.default else None
        if total is None or total.target is not aten.add.Tensor or not isinstance(total.args[1], float):
            continue
        mean, eps = total.args
        if mean.target is not aten.mean.dim or mean.args[1:] != ([-1], True):
            continue
        square = mean.args[0]
        if (square.target, square.args) in ((aten.pow.Tensor_Scalar, (x, 2)), (aten.mul.Tensor, (x, x))):
            return _uncast(x), eps
    return None


def _is_angle(angle: Node, x: Node) -> bool:
    """One factor a row and column, the same for all heads: (B, 1, 1, width) beside x (B, heads, 1, width)."""
    shape, beside = tuple(_value(angle).shape), tuple(_value(x).shape)
    return len(beside) == 4 and beside[2] == 1 and shape == (beside[0], 1, 1, beside[3])


def _is_swapped(node: Node, x: Node) -> bool:
    pieces, width = _concatenated(node), _value(x).shape[-1]
    if pieces is None or pieces[0].target is not aten.neg.default:
        return False
    (second,) = pieces[0].all_input_nodes
    return (_columns(second), _columns(pieces[1])) == ((x, width // 2, width), (x, 0, width // 2))


def _concatenated(node: Node) -> tuple[Node, Node] | None:
    """The two nodes that ``node`` joins along its last dimension."""
    if node.target is not aten.cat.default:
        return None
    given = bind(node.target, node.args, node.kwargs)
    dims = _value(node).dim()
    if given["dim"] % dims != dims - 1 or len(given["tensors"]) != 2:
        return None
    first, second = given["tensors"]
    return first, second


def _columns(node: Node) -> tuple[Node, int, int] | None:
    """``(x, first, end)`` where ``node`` is ``x[..., first:end]``."""
    if node.target is not aten.slice.Tensor:
        return None
    given = bind(node.target, node.args, node.kwargs)
    shape = _value(given["self"]).shape
    if given["dim"] % len(shape) != len(shape) - 1 or given["step"] != 1:
        return None
    end = shape[-1] if given["end"] is None else min(given["end"], shape[-1])
    return given["self"], given["start"] or 0, end


def _exact(angle: Node) -> Node:
    base = base_of(angle)
    cast = _uncast(base)
    return base_of(cast) if _value(cast).dtype == torch.float32 else base


def _uncast(node: Node) -> Node:
    """What was cast."""
    return node.all_input_nodes[0] if node.target is prims.convert_element_type.default else node


def _both_ways(node: Node) -> Iterator[tuple[Node, Node]]:
    """Both orders of the two operands, if both are nodes."""
    first, second = node.args[:2] if len(node.args) == 2 else (None, None)
    if isinstance(first, Node) and isinstance(second, Node):
        yield first, second
        yield second, first


def _value(node: Any) -> torch.Tensor:
    return node.meta["val"]

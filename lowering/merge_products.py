"""Products of one small batch with several weights become one launch: ``thin_linear``.

Before::

    q = aten.mm(x, aten.permute(wq, [1, 0]))       # one or two launches each
    k = aten.mm(x, aten.permute(wk, [1, 0]))
    v = aten.mm(x, aten.permute(wv, [1, 0]))

After::

    t = moe_ep.thin_linear(x, [wq, wk, wv])
    q, k, v = t[0], t[1], t[2]

Also for a single product, because at few rows the library's kernels do not read the weights at full speed. A router
that casts both operands to fp32 (DeepSeek-V3) keeps its fp32 result but not the casts, which read and write the whole
weight in every step: products of 16-bit values are exact in fp32, where the kernel sums them anyway. Legal
because the weights are inputs of the graph, and nothing writes them. A sum in fp32
that is rounded once, as the library's, but in another order.

Products with few columns that only pointwise code and reductions read, as a router's, are summed in pieces of their
depth, so that there are programs enough to read the weight at the memory's rate::

    t = moe_ep.thin_linear(x, [w], out_dtype=float32, split=4)
    logits = aten.sum(t[0], [0])                   # Inductor does this in the softmax's kernel

Refused for more than ``MAX_ROWS`` rows (``MAX_ROWS_ALONE`` of a single product in one piece), and for weights that are
not stored row by row, are larger than ``MAX_BYTES``, where the library is as fast, or of another dtype than the batch.
The CPU's products stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_ops.shapes import HALF_DTYPES
from moe_ops.thin_linear import MAX_WEIGHTS, best_split, takes

from . import torch_compat
from .effects import read
from .hoist_metadata import value_key
from .report import Outcome
from .unroll_topk import topk_columns

aten, prims = torch.ops.aten, torch.ops.prims
VIEWS = (aten.view.default, aten.unsqueeze.default, aten.squeeze.dim, aten.select.int, aten.slice.Tensor)
MAX_BYTES = 64 << 20  # one weight
MAX_ROWS_ALONE = 32  # of one product in one piece; at 64 the library is faster (10.2 us, 11.5; 2048 x 4096, H200)


@dataclass(frozen=True)
class Product:
    """``node = x @ weight.T`` with ``weight (width, depth)`` an input of the graph; both may be cast to fp32 for it."""

    node: Node
    weight: Node

    @property
    def dtype(self) -> torch.dtype:
        return self.node.meta["val"].dtype

    @property
    def x(self) -> Any:
        """The batch before the cast. Read it late: a product that stood here may have been replaced meanwhile."""
        left = self.node.args[0]
        return left if self.weight.meta["val"].dtype == self.dtype else _uncast(left)


def replace_together(products: list[Product]) -> str:
    """One ``thin_linear`` in the place of the first; returns what was done."""
    first, split = products[0], split_of(products)
    graph, names = first.node.graph, ", ".join(product.node.name for product in products)
    with graph.inserting_before(first.node):
        op, weights = torch.ops.moe_ep.thin_linear.default, [product.weight for product in products]
        options: dict[str, Any] = {} if first.x.meta["val"].dtype == first.dtype else {"out_dtype": first.dtype}
        if split > 1:
            options = {"out_dtype": torch.float32, "split": split}
        joined = torch_compat.insert_call(graph, op, first.x, weights, **options)
        results = [read(joined, index) for index in range(len(products))]
        if split > 1:
            results = [_add_pieces(graph, pieces, first.dtype) for pieces in results]
    for product, result in zip(products, results, strict=True):
        product.node.replace_all_uses_with(result)
        graph.erase_node(product.node)
    return f"{joined.name}: {names}" + (f" in {split} pieces, added where they are read" if split > 1 else "")


def split_of(products: list[Product]) -> int:
    """Pieces of the depth: 1 unless they have few columns, read by ops that Inductor joins with a sum."""
    if not all(_fuses(reader) for product in products for reader in _readers(product.node)):
        return 1
    widths, depths = zip(*(product.weight.meta["val"].shape for product in products), strict=True)
    return best_split(widths, depths[0])


def _add_pieces(graph: Graph, pieces: Node, dtype: torch.dtype) -> Node:
    """``pieces (split, rows, width)`` added in order and rounded to ``dtype``."""
    added = torch_compat.insert_call(graph, aten.sum.dim_IntList, pieces, [0])
    if dtype == torch.float32:
        return added
    return torch_compat.insert_call(graph, prims.convert_element_type.default, added, dtype)


def _readers(node: Node) -> Iterator[Node]:
    """Who reads the values of ``node``, themselves or through a view."""
    for user in node.users:
        if user.target in VIEWS:
            yield from _readers(user)
        else:
            yield user


def _fuses(reader: Node) -> bool:
    tags = getattr(reader.target, "tags", ())
    return torch.Tag.pointwise in tags or torch.Tag.reduction in tags or reader.target is topk_columns


class MergeProducts:
    """See the module's docstring."""

    name = "merge_products"

    def __init__(self, devices: tuple[str, ...] = ("cuda",)):
        self.devices = devices

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Rewrite ``graph``; the outcome lists every product with a weight."""
        outcome = Outcome(self.name)
        groups: dict[Any, list[Product]] = {}  # by value: every product has a view of its own of the same batch
        for node in graph.find_nodes(op="call_function", target=aten.mm.default):
            weight = _stored_weight(node.args[1])
            if weight is None or weight.meta["val"].device.type not in self.devices:
                continue
            product = Product(node, weight)
            if reason := _reason(product.x.meta["val"], weight.meta["val"]):
                outcome.refuse(node, reason)
            else:
                groups.setdefault((value_key(product.x), product.dtype), []).append(product)
        for group in groups.values():
            rows = group[0].node.meta["val"].shape[0]
            if len(group) == 1 and rows > MAX_ROWS_ALONE and split_of(group) == 1:
                outcome.refuse(group[0].node, f"{rows} rows times one weight")
                continue
            for start in range(0, len(group), MAX_WEIGHTS):
                outcome.done.append(replace_together(group[start : start + MAX_WEIGHTS]))
        return outcome


def _reason(x: Any, weight: Any) -> str | None:
    """Why a product stays, None if it goes."""
    if not takes(x.shape[0], x.dtype, x.device.type == "cuda"):
        return f"{x.shape[0]} rows of {x.dtype}"
    if x.dtype != weight.dtype:
        return f"x is {x.dtype}, the weight {weight.dtype}"
    if not weight.is_contiguous():
        return "the weight is not stored row by row"
    if weight.numel() * weight.element_size() > MAX_BYTES:
        return f"the weight is larger than {MAX_BYTES >> 20} MiB"
    return None


def _stored_weight(right: Any) -> Node | None:
    """``w`` where the right operand is ``w.T`` of an input ``w``, or of ``w`` cast to fp32."""
    if not isinstance(right, Node) or right.target not in (aten.permute.default, aten.t.default):
        return None
    weight = _uncast(right.args[0])
    return weight if isinstance(weight, Node) and weight.op in ("placeholder", "get_attr") else None


def _uncast(value: Any) -> Any:
    """The 16-bit value that ``value`` is a cast of to fp32, where it is one."""
    if not isinstance(value, Node) or value.target is not prims.convert_element_type.default:
        return value
    source: Any = value.args[0]
    exact = value.args[1] == torch.float32 and source.meta["val"].dtype in HALF_DTYPES
    return source if exact else value

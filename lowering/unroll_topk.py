"""A router's ``topk`` becomes k maxima, which Inductor joins with the softmax before and the scaling after it.

Before::

    t = aten.topk(scores, k)                      # two launches of its own, none of which fuses with anything
    values, ids = t[0], t[1]

After::

    key = order(scores) << 32 | (n - 1 - column)  # order: the bits of a float as an integer that sorts alike
    b0 = aten.amax(key, [-1], True)
    b1 = aten.amax(aten.where(key == b0, lowest, key), [-1], True)
    ...
    values = aten.cat([unorder(b0 >> 32), ...], -1)
    ids = aten.cat([n - 1 - (b0 & 0xffffffff), ...], -1)

What follows, such as the weights' normalisation, is then computed column by column too (``lowering/columns.py``), so
that one launch takes a router's logits to the weights and ids of dispatch.

The same values, bit for bit, in the same order, NaN first. All keys of a row differ, so a column is taken once, and of
equal scores the first is taken, where topk promises no order. Refused for more than ``MAX_K`` of more than
``MAX_COLUMNS``, which one block of threads would not hold. On the CPU topk costs nothing and stays.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from . import torch_compat
from .columns import Columns
from .effects import bind
from .report import Outcome

aten, prims = torch.ops.aten, torch.ops.prims
MAX_K, MAX_COLUMNS = 16, 1024
LOWEST, LOW_HALF, ALL_BUT_SIGN = -(1 << 63), (1 << 32) - 1, (1 << 31) - 1


@dataclass(frozen=True)
class RouterTopk:
    """One ``topk`` and its arguments."""

    node: Node
    scores: Node
    k: int
    dim: int
    largest: bool
    ordered: bool  # False: in any order, also this

    def reason(self) -> str | None:
        """Why it stays, None if it goes."""
        value = self.scores.meta["val"]
        if self.dim not in (-1, value.dim() - 1) or not self.largest:
            return "is not the largest of each row"
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"sorts {value.dtype}"
        if self.k > MAX_K or value.shape[-1] > MAX_COLUMNS:
            return f"takes {self.k} of {value.shape[-1]}; at most {MAX_K} of {MAX_COLUMNS} are unrolled"
        return None

    def replace(self) -> str:
        """Put k maxima in its place; returns what was done."""
        graph = self.node.graph
        write = _Writer(graph)
        with graph.inserting_before(self.node):
            values, ids = _largest(write, self.scores, self.k)
        reads = list(self.node.users)
        assert all(read.target is operator.getitem for read in reads)
        known = {read: ids if read.args[1] else values for read in reads}
        columns = Columns(graph, write, known, {r for r in reads if r.args[1]}, {r for r in reads if not r.args[1]})
        columns.spread(self.node)
        graph.erase_node(self.node)
        return f"{self.node.name}: {self.k} maxima" + "".join(f", {name}" for name in columns.done)


class UnrollTopk:
    """See the module's docstring."""

    name = "unroll_topk"

    def __init__(self, devices: tuple[str, ...] = ("cuda",)):
        self.devices = devices

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Rewrite ``graph``; the outcome lists every topk."""
        outcome = Outcome(self.name)
        for node in graph.find_nodes(op="call_function", target=aten.topk.default):
            given = bind(node.target, node.args, node.kwargs)
            topk = RouterTopk(node, *(given[name] for name in ("self", "k", "dim", "largest", "sorted")))
            if topk.scores.meta["val"].device.type not in self.devices:
                continue
            if reason := topk.reason():
                outcome.refuse(node, reason)
            else:
                outcome.done.append(topk.replace())
        return outcome


@dataclass(frozen=True)
class _Writer:
    """Writes nodes at the graph's insertion point."""

    graph: Graph

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        return torch_compat.insert_call(self.graph, target, *args, **kwargs)

    def cast(self, value: Node, dtype: torch.dtype) -> Node:
        return value if value.meta["val"].dtype == dtype else self(prims.convert_element_type.default, value, dtype)

    def rest(self, value: Node, last: int) -> Node:
        """``last - value``."""
        return self(aten.add.Tensor, self(aten.neg.default, value), last)

    def mirror(self, bits: Node) -> Node:
        """int32 bits of floats to integers that sort as the floats do, and back: negative ones turn round."""
        sign = self(aten.__rshift__.Scalar, bits, 31)
        return self(aten.bitwise_xor.Tensor, bits, self(aten.bitwise_and.Scalar, sign, ALL_BUT_SIGN))


def _largest(write: _Writer, scores: Node, k: int) -> tuple[list[Node], list[Node]]:
    """Values and ids of the k largest of each row, by column."""
    sample = scores.meta["val"]
    last = sample.shape[-1] - 1
    columns = write(prims.iota.default, last + 1, start=0, step=1, dtype=torch.int64,
                    device=sample.device, requires_grad=False)  # fmt: skip
    bits = write(aten.view.dtype, write.cast(scores, torch.float32), torch.int32)
    high = write(aten.__lshift__.Scalar, write.cast(write.mirror(bits), torch.int64), 32)
    key = write(aten.add.Tensor, high, write.rest(columns, last))
    # A buffer, else Inductor may split the first maxima of scores with groups over blocks, in two launches each.
    key = write(torch_compat.realize_target(), key)
    lowest = write(aten.full.default, [], LOWEST, dtype=torch.int64, device=sample.device)
    values, ids = [], []
    for _ in range(k):
        best = write(aten.amax.default, key, [-1], True)
        key = write(aten.where.self, write(aten.eq.Tensor, key, best), lowest, key)
        ids.append(write.rest(write(aten.bitwise_and.Scalar, best, LOW_HALF), last))
        bits = write.mirror(write.cast(write(aten.__rshift__.Scalar, best, 32), torch.int32))
        values.append(write.cast(write(aten.view.dtype, bits, torch.float32), sample.dtype))
    return values, ids

"""A router's ``topk`` becomes k maxima, which Inductor joins with the softmax before and the scaling after it.

Before::

    t = aten.topk(scores, k)                      # two launches of its own, none of which fuses with anything
    values, ids = t[0], t[1]

After::

    t = moe_ep.topk_columns(scores, k)
    values, ids = aten.cat([t[0], ..., t[k - 1]], -1), aten.cat([t[k], ...], -1)

which Inductor builds (``torch_compat.lower_as``) from::

    key = order(scores) << 32 | (n - 1 - column)  # order: the bits of a float as an integer that sorts alike
    b0 = aten.amax(key, [-1], True)
    b1 = aten.amax(aten.where(key == b0, lowest, key), [-1], True)
    ...
    t[0], t[k] = unorder(b0 >> 32), n - 1 - (b0 & 0xffffffff)
    ...

In the graph these would be a hundred nodes a layer, and compiling them most of what the pass costs.

What follows, such as the weights' normalisation, is then computed column by column too (``lowering/columns.py``), so
that one launch takes a router's logits to the weights and ids of dispatch.

The same values, bit for bit, in the same order, NaN first. All keys of a row differ, so a column is taken once, and of
equal scores the first is taken, where topk promises no order. Refused for more than ``MAX_K`` of more than
``MAX_COLUMNS``, which one block of threads would not hold. On the CPU topk costs nothing and stays.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from moe_ops.registration import register_op

from . import torch_compat
from .columns import Columns
from .effects import bind, read
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
        torch_compat.lower_as(topk_columns, _columns_in_inductor)
        write = partial(torch_compat.insert_call, graph)
        with graph.inserting_before(self.node):
            columns = write(topk_columns, self.scores, self.k)
            results = [read(columns, number) for number in range(2 * self.k)]
        values, ids = results[: self.k], results[self.k :]
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


def _fake(scores: Tensor, k: int) -> list[Tensor]:
    size = (*scores.shape[:-1], 1)
    values = [scores.new_empty(size) for _ in range(k)]
    return values + [scores.new_empty(size, dtype=torch.int64) for _ in range(k)]


def _run(scores: Tensor, k: int) -> list[Tensor]:
    def call(target: Any, *args: Any, readers: int = 1, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    return _columns(call, scores, k, scores.shape[-1], scores.device)


topk_columns = register_op("topk_columns(Tensor scores, int k) -> Tensor[]", fake=_fake, cpu=_run, cuda=_run)


def _columns_in_inductor(call: Callable, scores: Any, k: int) -> list[Any]:
    return _columns(call, scores, k, int(scores.get_size()[-1]), scores.get_device())


def _columns(call: Callable, scores: Any, k: int, width: int, device: torch.device) -> list[Any]:
    """The k largest of each row of ``scores (..., width)`` by column, k values and then k ids; all by ``call``."""
    write, last = _Writer(call), width - 1
    columns = call(prims.iota.default, width, start=0, step=1, dtype=torch.int64, device=device, requires_grad=False)
    bits = call(aten.view.dtype, write.cast(scores, torch.float32), torch.int32)
    high = call(aten.__lshift__.Scalar, write.cast(write.mirror(bits), torch.int64), 32)
    key = call(aten.add.Tensor, high, write.rest(columns, last))
    # A buffer, else Inductor may split the first maxima of scores with groups over blocks, in two launches each.
    key = call(torch_compat.realize_target(), key)
    lowest = call(aten.full.default, [], LOWEST, dtype=torch.int64, device=device)
    values, ids = [], []
    for _ in range(k):
        best = call(aten.amax.default, key, [-1], True)
        key = call(aten.where.self, call(aten.eq.Tensor, key, best), lowest, key, readers=3)
        ids.append(write.rest(call(aten.bitwise_and.Scalar, best, LOW_HALF), last))
        bits = write.mirror(write.cast(call(aten.__rshift__.Scalar, best, 32), torch.int32))
        values.append(write.cast(call(aten.view.dtype, bits, torch.float32), scores.dtype))
    return values + ids


@dataclass(frozen=True)
class _Writer:
    """Steps that take several ops, each done by ``call``."""

    call: Callable

    def cast(self, value: Any, dtype: torch.dtype) -> Any:
        return value if value.dtype == dtype else self.call(prims.convert_element_type.default, value, dtype)

    def rest(self, value: Any, last: int) -> Any:
        """``last - value``."""
        return self.call(aten.add.Tensor, self.call(aten.neg.default, value), last)

    def mirror(self, bits: Any) -> Any:
        """int32 bits of floats to integers that sort as the floats do, and back: negative ones turn round."""
        sign = self.call(aten.__rshift__.Scalar, bits, 31)
        return self.call(aten.bitwise_xor.Tensor, bits, self.call(aten.bitwise_and.Scalar, sign, ALL_BUT_SIGN))

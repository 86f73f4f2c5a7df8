"""What follows ``rsv_combine`` joins it: a cast, a scaling, the shared experts' add, the residual add.

Before::

    c = with_effects(token, moe_ep.rsv_combine, y, local_tokens, metadata, T, group)[1]
    a = aten.add(c, shared)
    x = aten.add(residual, a)

After::

    x = with_effects(token, moe_ep.rsv_combine_add, y, local_tokens, metadata, T, [shared, residual], group)[1]

One launch less, and one pass less over (T, H). Views in between that keep rows of H are looked through, as models add
in three dimensions. Legal when nobody else reads ``c`` and ``a``, and when no addend depends on a later ordered op:
the combine moves down to where its last addend exists.

Which bits? ``rsv_combine_add`` rounds the sum over ranks to its dtype like ``rsv_combine``, then
- ``rounding="compiled"`` (default): every value is rounded where Inductor would round it without this pass. So an add
  joins only if its operands and its result are buffers in that code too (inputs, results of matrix products and other
  extern kernels; read by such kernels or returned). Inductor keeps fused pointwise values in fp32, and folds
  ``c + a @ b`` into ``addmm``: those are refused, with that reason.
- ``rounding="eager"``: every step is rounded, as if each op ran alone: bit-equal to the uncompiled model, and all adds
  join but those whose addend would then need a kernel of its own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from . import torch_compat
from .effects import NO_KERNEL, EffectOp, effect_ops, insert_effect, is_moe_op, is_one_kernel, reaches, read
from .overlap_shared import VIEWS, readers, strip_views
from .report import Outcome

aten, prims = torch.ops.aten, torch.ops.prims
MAX_ADDENDS = 4
KEPT = "Inductor keeps it in fp32, a buffer would round it (rounding='eager' joins it)"
PRODUCTS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._scaled_mm.default)


@dataclass
class CombineEpilogue:
    """A combine and the ops that join it, first to last; ``last`` and addends may be views of (T, H)."""

    combine: EffectOp
    result: Node  # what the combine returns now
    last: Node  # what it shall return
    scale: float = 1.0
    addends: list[Node] = field(default_factory=list)
    out_dtype: torch.dtype | None = None
    steps: list[Node] = field(default_factory=list)

    def replace(self, round_each: bool) -> str:
        """Put ``rsv_combine_add`` where the last step stood; returns what was done."""
        graph, last = self.combine.node.graph, self.last.meta["val"]
        with graph.inserting_before(self.last):
            joined = self.insert(round_each, last.reshape(-1, last.shape[-1]), {})
            token, value = read(joined, 0), as_shape(read(joined, 1), last.shape)
        self.last.replace_all_uses_with(value)
        done = f"{joined.name}: {self.combine.node.name} joined by {', '.join(step.name for step in self.joined())}"
        self.erase(token)
        return done

    def insert(self, round_each: bool, result: Tensor, more: dict[str, Any]) -> Node:
        """``rsv_combine_add`` at the graph's insertion point, with ``more`` keyword arguments; ``result``: its fake."""
        graph, arguments = self.combine.node.graph, self.combine.arguments
        args = [arguments[name] for name in ("expert_output", "local_tokens", "metadata", "num_rows")]
        kwargs = {"scale": self.scale, "round_each": round_each, "out_dtype": self.out_dtype or arguments["out_dtype"]}
        addends = [as_shape(addend, self.result.meta["val"].shape) for addend in self.addends]
        return insert_effect(
            graph, self.combine.token, torch.ops.moe_ep.rsv_combine_add.default,
            (*args, addends, arguments["group_name"]), kwargs | more, (result,),
        )  # fmt: skip

    def joined(self) -> list[Node]:
        """The steps, without views."""
        return [step for step in self.steps if step.target not in VIEWS]

    def erase(self, token: Node) -> None:
        """Remove what was joined; ``token``: the new op's."""
        graph = self.combine.node.graph
        for node in self.combine.node.users:
            if node.args[1] == 0:
                node.replace_all_uses_with(token)
        for step in reversed(self.steps):
            graph.erase_node(step)
        self.combine.erase({})
        for addend in self.addends:
            erase_unread_views(addend)
        torch_compat.sort_graph(graph)


class FuseCombine:
    """See the module's docstring."""

    name = "fuse_combine"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Join what can be joined; refusals say why an add stays."""
        outcome = Outcome(self.name)
        for combine in effect_ops(graph, "rsv_combine"):
            match = self._match(combine, rounding, outcome)
            if match is not None:
                outcome.done.append(match.replace(rounding == "eager" or rounds_every_step(match.last)))
        return outcome

    def _match(self, combine: EffectOp, rounding: str, outcome: Outcome) -> CombineEpilogue | None:
        match = match_epilogue(combine, rounding, outcome)
        if match is None or not match.joined():
            return None
        if rounding == "compiled" and (reason := _result_is_kept_exact(match.last)):
            outcome.refuse(match.last, reason)
            return None
        return match


def match_epilogue(combine: EffectOp, rounding: str, outcome: Outcome) -> CombineEpilogue | None:
    """The steps behind ``combine`` that may join it, perhaps none; ``outcome`` gets the reason of one that may not."""
    if not is_one_kernel(combine):
        outcome.refuse(combine.node, NO_KERNEL)
        return None
    results = combine.results(0)
    if len(results) != 1:
        outcome.refuse(combine.node, f"its result is read in {len(results)} places")
        return None
    match = CombineEpilogue(combine, results[0], results[0])
    views: list[Node] = []
    while (step := _only_user((views or [match.last])[-1])) is not None:
        if step.target in VIEWS and step.meta["val"].shape[-1] == match.result.meta["val"].shape[-1]:
            views.append(step)
            continue
        reason = _take(match, step, (views or [match.last])[-1], rounding)
        if reason is None:
            match.steps += [*views, step]
            match.last, views = step, []
            continue
        if reason:
            outcome.refuse(step, reason)
        break
    if not match.steps and len(reading := readers(match.result)) > 1:
        outcome.refuse(combine.node, f"its result has {len(reading)} readers")
    return match


def _take(match: CombineEpilogue, step: Node, last: Node, rounding: str) -> str | None:
    """Add ``step``, which reads ``last``, and return None; or the reason why not ("" if it is no candidate)."""
    if step.target is aten.add.Tensor and len(step.all_input_nodes) == 2 and step.kwargs.get("alpha", 1) == 1:
        addend = next(node for node in step.all_input_nodes if node is not last)
        if reason := _refuse_addend(match, addend, last, rounding):
            return reason
        match.addends.append(addend)
    elif step.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(step.args[1], int | float):
        if match.addends or match.scale != 1.0:
            return "a scaling joins only before the first add"
        if rounding == "compiled" and not rounds_every_step(step):
            return "Inductor contracts this product with what follows; only rounding='eager' has one meaning for it"
        match.scale = float(step.args[1])
    elif step.target is prims.convert_element_type.default:
        if match.steps or _dtype(match.result) != torch.float32 or step.args[1] not in (torch.bfloat16, torch.float16):
            return "a cast joins only right behind a combine that returns float32"
        match.out_dtype = _as_dtype(step.args[1])
    else:
        return ""
    return None


def _refuse_addend(match: CombineEpilogue, addend: Node, last: Node, rounding: str) -> str | None:
    """Why this addend of ``last`` cannot join, or None."""
    mine, other = last.meta["val"], addend.meta.get("val")
    if not isinstance(other, Tensor) or other.shape != mine.shape or other.dtype != mine.dtype:
        return f"{addend.name} has another shape or dtype"
    if len(match.addends) == MAX_ADDENDS:
        return f"at most {MAX_ADDENDS} addends"
    if reaches(addend, lambda node: node is match.combine.node):
        return f"{addend.name} depends on a later ordered op"
    source = strip_views(addend)
    if rounding == "eager":
        lone = _is_pointwise(source) and len(readers(source)) == 1
        return f"{source.name} is pointwise with no other reader: it would cost a launch" if lone else None
    if _is_pointwise(source):
        return f"{source.name} is pointwise: {KEPT}"
    if addend.target is aten.mm.default and len(addend.users) == 1:
        return f"torch folds this add into {addend.name} (addmm), which rounds once (rounding='eager' joins it)"
    return None


def _result_is_kept_exact(last: Node) -> str | None:
    """Why the joined result would be rounded where Inductor does not round it, or None."""
    for user in readers(last):
        if user.op != "output" and _is_pointwise(user):
            return (
                f"{user.name} reads it: Inductor keeps it in fp32, a buffer would round it (rounding='eager' joins it)"
            )
    return None


def _is_pointwise(node: Node) -> bool:
    """Whether Inductor may fuse this node into others; all but inputs, extern kernels and ops of ours."""
    if node.op != "call_function" or node.target in PRODUCTS or is_moe_op(node.target):
        return False
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, Node) and not torch_compat.is_effect(source)
    return True


def as_shape(node: Node, shape: torch.Size) -> Node:
    """``node``, what it is a view of, or a new view of it, whichever has ``shape``."""
    source = strip_views(node)
    for candidate in (node, source):
        if candidate.meta["val"].shape == shape:
            return candidate
    return torch_compat.insert_call(node.graph, aten.view.default, node, list(shape))


def erase_unread_views(node: Node) -> None:
    """Remove ``node`` if it is a view that nobody reads, then what it was a view of, likewise."""
    while node.target in VIEWS and not node.users:
        (source,) = node.all_input_nodes
        node.graph.erase_node(node)
        node = source


def _only_user(node: Node) -> Node | None:
    users = list(node.users)
    return users[0] if len(users) == 1 and users[0].op == "call_function" else None


def rounds_every_step(node: Node) -> bool:
    return torch_compat.rounds_every_step(node.meta["val"].device.type)


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _as_dtype(value: Any) -> torch.dtype:
    assert isinstance(value, torch.dtype)
    return value

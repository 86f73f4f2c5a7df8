"""The RMSNorm of the next block joins the combine before it, together with the adds in between.

Before (views left out)::

    c = with_effects(token, moe_ep.rsv_combine, y, local_tokens, metadata, T, group)[1]
    x = aten.add(residual, c)
    f = prims.convert_element_type(x, float32)
    n = f * aten.rsqrt(aten.mean(f ** 2, [-1], True) + eps)
    h = weight * prims.convert_element_type(n, bfloat16)                   # or bfloat16(weight * n)

After::

    b = with_effects(token, moe_ep.rsv_combine_add, y, local_tokens, metadata, T, [residual], group,
                     norm_weight=weight, norm_eps=eps, norm_round_first=True)[1]                          # (2, T, H)
    x, h = b[0], b[1]

One launch less a layer: what reads ``h`` are matrix products, and what else reads ``x`` is the next block's add, so the
kernel that added and normalised is gone. A program of the combine holds whole rows and reduces them itself.

May change bits, so it is one of ``INEXACT``: the squares are summed in another order, and the norm reads ``x`` as it is
stored, which is what the model's own code says, where Inductor hands its kernel the sum before it is rounded. The adds
join under the rules of ``fuse_combine``'s ``rounding="eager"``. Refused for more than ``MAX_ROWS`` gathered rows, where
a launch is little and the combine's grid is tuned for parts of rows; on transports without a kernel; where an addend
or the weight would need a launch of its own. All ranks must decide alike, as the norm changes which program holds which
unit: they decide by M and H, and the fingerprint that they compare (``agreement``) says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from moe_ops.combine_add import MAX_NORM_WIDTH

from . import torch_compat
from .effects import EffectOp, effect_ops, erase_unused, read
from .fuse_combine import CombineEpilogue, as_shape, match_epilogue, rounds_every_step
from .overlap_shared import readers
from .report import Outcome

aten, prims = torch.ops.aten, torch.ops.prims
MAX_ROWS = 1024  # M, gathered


@dataclass(frozen=True)
class RmsNorm:
    """``out = norm(x) * (weight + shift)``; ``round_first``: rounded before the weight is applied, too."""

    out: Node
    weight: Node
    eps: float
    shift: float
    round_first: bool

    @property
    def arguments(self) -> dict[str, Any]:
        """As arguments of ``rsv_combine_add``."""
        return {
            "norm_weight": self.weight,
            "norm_eps": self.eps,
            "norm_shift": self.shift,
            "norm_round_first": self.round_first,
        }


@dataclass(frozen=True)
class CombineAndNorm:
    """A combine, the adds that join it, and the norm of what comes out."""

    epilogue: CombineEpilogue
    norm: RmsNorm

    def replace(self, round_each: bool) -> str:
        """Put ``rsv_combine_add`` with a norm where the last add stood; returns what was done."""
        epilogue, out, last = self.epilogue, self.norm.out, self.epilogue.last
        graph, shape = last.graph, last.meta["val"].shape
        fake = last.meta["val"].reshape(1, -1, shape[-1]).expand(2, -1, -1).contiguous()
        with graph.inserting_before(last):
            joined = epilogue.insert(round_each, fake, self.norm.arguments)
            token, both = read(joined, 0), read(joined, 1)
            rows, normed = (torch_compat.insert_call(graph, aten.select.int, both, 0, index) for index in range(2))
            rows, normed = as_shape(rows, shape), as_shape(normed, out.meta["val"].shape)
        out.replace_all_uses_with(normed)
        erase_unused(out, last)
        last.replace_all_uses_with(rows)
        names = ", ".join(step.name for step in (*epilogue.joined(), out))
        done = f"{joined.name}: {epilogue.combine.node.name} joined by {names}"
        epilogue.erase(token)
        return done


class FuseNorm:
    """See the module's docstring."""

    name = "fuse_norm"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Join what can be joined; refusals say why a norm keeps its launch."""
        outcome = Outcome(self.name)
        for combine in effect_ops(graph, "rsv_combine"):
            match = _match(combine, outcome)
            if match is not None:
                last = match.epilogue.last
                outcome.done.append(match.replace(rounding == "eager" or rounds_every_step(last)))
        return outcome


def _match(combine: EffectOp, outcome: Outcome) -> CombineAndNorm | None:
    source = combine.arguments["expert_output"].meta["val"]
    if source.shape[0] > MAX_ROWS or source.shape[1] > MAX_NORM_WIDTH:
        limits = f"{MAX_ROWS} of {MAX_NORM_WIDTH}"
        outcome.refuse(combine.node, f"it gathers {source.shape[0]} rows of {source.shape[1]}; at most {limits}")
        return None
    tried = Outcome(outcome.name)  # what stops the adds matters only where no norm follows them
    epilogue = match_epilogue(combine, "eager", tried)
    norm = find_norm(epilogue.last) if epilogue is not None else None
    if epilogue is None or norm is None:
        if epilogue is not None and not tried.refused:
            tried.refuse(epilogue.last, "no RMSNorm reads it")
        outcome.refused += tried.refused
        return None
    if norm.weight.op not in ("placeholder", "get_attr"):
        outcome.refuse(norm.out, f"its weight {norm.weight.name} is computed in the graph: it would cost a launch")
        return None
    return CombineAndNorm(epilogue, norm)


def find_norm(x: Node) -> RmsNorm | None:
    """The RMSNorm that reads ``x``, as Hugging Face's models write it, computed in fp32."""
    width = x.meta["val"].shape[-1]
    for wide in readers(x):
        if wide.target is not prims.convert_element_type.default or wide.args[1] != torch.float32:
            continue
        if wide.meta["val"].shape[-1] != width:
            continue
        for square in wide.users:
            root = _root(square, wide)
            norm = _scaled(root[0], wide, root[1], x.meta["val"].dtype) if root is not None else None
            if norm is not None:
                return norm
    return None


def _root(square: Node, wide: Node) -> tuple[Node, float] | None:
    """``rsqrt(mean(square) + eps)`` and eps, if ``square`` is that of ``wide``."""
    squares = square.target is aten.pow.Tensor_Scalar and square.args[1] == 2
    squares = squares or (square.target is aten.mul.Tensor and square.args == (wide, wide))
    mean = _only(square, aten.mean.dim) if squares else None
    if mean is None or mean.args[1] not in ([-1], [wide.meta["val"].dim() - 1]) or mean.args[2:3] != (True,):
        return None
    plus = _only(mean, aten.add.Tensor)
    root = _only(plus, aten.rsqrt.default)
    if plus is None or root is None or not isinstance(plus.args[1], float):
        return None
    return root, plus.args[1]


def _scaled(root: Node, wide: Node, eps: float, dtype: torch.dtype) -> RmsNorm | None:
    """What becomes of ``wide * root``."""
    product = _only(root, aten.mul.Tensor)
    if product is None or set(product.all_input_nodes) != {root, wide}:
        return None
    rounded = _only(product, prims.convert_element_type.default)
    if rounded is not None and rounded.args[1] == dtype:
        out = _only(rounded, aten.mul.Tensor)
        weight, shift = _weight(out, rounded), 0.0
        return RmsNorm(out, weight, eps, shift, True) if out and weight and _fits(weight, out, dtype) else None
    scaled = _only(product, aten.mul.Tensor)
    out = _only(scaled, prims.convert_element_type.default)
    weight, shift = _unshifted(_weight(scaled, product))
    if out is None or weight is None or out.args[1] != dtype or not _fits(weight, out, dtype):
        return None
    return RmsNorm(out, weight, eps, shift, False)


def _weight(product: Node | None, value: Node) -> Node | None:
    """The other factor."""
    others = [node for node in product.all_input_nodes if node is not value] if product is not None else []
    return others[0] if len(others) == 1 else None


def _unshifted(weight: Node | None) -> tuple[Node | None, float]:
    """``w`` and 1.0 of ``1.0 + float32(w)``, and so on."""
    shift = 0.0
    if weight is not None and weight.target is aten.add.Tensor and isinstance(weight.args[1], float | int):
        weight, shift = weight.all_input_nodes[0], float(weight.args[1])
    if weight is not None and weight.target is prims.convert_element_type.default:
        weight = weight.all_input_nodes[0]
    return weight, shift


def _fits(weight: Node, out: Node, dtype: torch.dtype) -> bool:
    """Whether ``weight`` is (H,) of ``dtype``, and so is ``out``'s dtype."""
    value, result = weight.meta["val"], out.meta["val"]
    return value.shape == result.shape[-1:] and value.dtype == result.dtype == dtype


def _only(node: Node | None, target: Any) -> Node | None:
    """The only user of ``node`` if it calls ``target``."""
    users = list(node.users) if node is not None else []
    return users[0] if len(users) == 1 and users[0].target is target else None

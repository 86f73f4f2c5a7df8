"""Experts write into symmetric memory: ``fused_moe`` and the combine behind it become one op without a copy between.

Before::

    y = moe_ep.fused_moe(hidden, ids, weights, gate_up, down, metadata[0:1], start)        # sums K pairs, writes (M, H)
    x = with_effects(token, moe_ep.rsv_combine, y, local_tokens, metadata, T, group)[1]    # copies y into its slot

After::

    x = with_effects(token, moe_ep.fused_moe_combine, hidden, ids, weights, gate_up, down, local_tokens, metadata,
                     start, T, [], group)[1]                                # sums the pairs straight into the slot

The intermediate (M, H) is gone: not written, not read, not allocated. Legal because nobody else reads ``y``, not even
an ordered op in between, so that the experts may as well run where the combine stands, when its slot is free; and both
use the same ``metadata``. Which of the two slots it is depends on the epoch, which lives on the device; that is why the
combine kernel does the last step of the experts, and not the experts the first of the combine (docs/lowering.md
compares this with Inductor's own communication buffers).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from .effects import NO_KERNEL, EffectOp, bind, effect_ops, insert_effect, is_moe_op, is_one_kernel, read
from .report import Outcome

EXPERT_TENSORS = ("hidden", "topk_ids", "topk_weights", "gate_up", "down")
EXPERT_OPTIONS = (
    "activation", "alpha", "limit", "gated", "transposed", "interleaved", "gate_up_bias", "down_bias", "tokens_hint",
    "batch_invariant",
)  # fmt: skip
EPILOGUE = {
    "scale": 1.0, "round_each": True, "norm_weight": None, "norm_eps": 0.0, "norm_shift": 0.0, "norm_round_first": True,
}  # fmt: skip


@dataclass(frozen=True)
class ExpertsAndCombine:
    """``fused_moe`` and the combine that alone reads its result."""

    experts: Node
    combine: EffectOp

    def replace(self) -> str:
        """Put one op in place of both; returns what was done."""
        graph = self.combine.node.graph
        experts, combine = _arguments(self.experts), {"addends": [], **EPILOGUE} | self.combine.arguments
        args = (
            *(experts[name] for name in EXPERT_TENSORS), combine["local_tokens"], combine["metadata"],
            experts["local_expert_start"], combine["num_rows"], combine["addends"], combine["group_name"],
        )  # fmt: skip
        options = {name: experts[name] for name in EXPERT_OPTIONS}
        options |= {name: combine[name] for name in EPILOGUE} | {"combine_dtype": combine["out_dtype"]}
        with graph.inserting_before(self.combine.node):
            joined = insert_effect(
                graph, self.combine.token, torch.ops.moe_ep.fused_moe_combine.default, args, options,
                (self.combine.value(0),),
            )  # fmt: skip
            token, value = read(joined, 0), read(joined, 1)
        for node in list(self.combine.node.users):
            node.replace_all_uses_with(token if node.args[1] == 0 else value)
        y = self.experts.meta["val"]
        self.erase()
        nbytes = y.numel() * y.element_size()
        names = f"{self.experts.name} and {self.combine.node.name}"
        return f"{joined.name}: {names} share a slot, {nbytes} bytes stay unwritten"

    def erase(self) -> None:
        """Remove the two ops."""
        self.combine.erase({})
        self.experts.graph.erase_node(self.experts)


class CommBuffers:
    """See the module's docstring."""

    name = "comm_buffers"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Join every combine with its experts; refusals say why a copy stays."""
        outcome = Outcome(self.name)
        for combine in effect_ops(graph, "rsv_combine", "rsv_combine_add"):
            experts = combine.arguments["expert_output"]
            if reason := _refuse(combine, experts):
                outcome.refuse(combine.node, reason)
                continue
            outcome.done.append(ExpertsAndCombine(experts, combine).replace())
        return outcome


def _refuse(combine: EffectOp, experts: Any) -> str | None:
    """Why the experts cannot write into the combine's slot, or None."""
    if not is_one_kernel(combine):
        return NO_KERNEL
    if not (isinstance(experts, Node) and is_moe_op(experts.target, "fused_moe")):
        return f"{experts} comes from no fused_moe: it is copied into the slot"
    if experts in combine.arguments.get("addends", []):
        return f"{experts.name} is also added to the combine's result"
    if len(experts.users) > 1:
        return f"{experts.name} has {len(experts.users)} readers"
    arguments = _arguments(experts)
    hidden = arguments["hidden"].meta["val"]
    if experts.meta["val"].dtype != hidden.dtype:
        return f"{experts.name} returns {experts.meta['val'].dtype}, the slot holds {hidden.dtype}"
    if not _counts_of(arguments["valid_tokens"], combine.arguments["metadata"]):
        return f"{experts.name} counts its rows with another tensor than the combine's metadata"
    return None


def _counts_of(valid_tokens: Any, metadata: Any) -> bool:
    """Whether ``valid_tokens`` is ``metadata[0:1]`` or ``metadata[0]``."""
    aten = torch.ops.aten
    while isinstance(valid_tokens, Node) and valid_tokens.target in (aten.view.default, aten.unsqueeze.default):
        valid_tokens = valid_tokens.args[0]
    if not isinstance(valid_tokens, Node) or not valid_tokens.args or valid_tokens.args[0] is not metadata:
        return False
    rest = tuple(valid_tokens.args[1:])
    if valid_tokens.target is aten.slice.Tensor:
        return rest in ((0, 0, 1), (0, 0, 1, 1))
    return valid_tokens.target is aten.select.int and rest == (0, 0)


def _arguments(experts: Node) -> dict[str, Any]:
    return bind(experts.target, experts.args, experts.kwargs)

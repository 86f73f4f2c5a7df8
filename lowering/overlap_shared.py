"""A shared expert runs beside its layer: its GEMMs go into the layer's op, which gives them a stream of their own.

Before (views left out)::

    y    = with_effects(token, moe_ep.moe_layer, x, ids, weights, gate_up, down, ..., addends, group)[1]
    act  = silu(mm(x, gate)) * mm(x, up)          # or the halves of one product
    s    = mm(act, shared_down)
    out  = y + s                                  # or s is one of the addends

After::

    y, s = with_effects(token, moe_ep.moe_layer_shared, x, ids, weights, ..., x, [gate, up], shared_down, -1, group)[1:]
    out  = y + s                                  # gone where s is an addend: its place among them stands for the -1

One chain of launches becomes two that run side by side in one CUDA graph: the shared expert beside dispatch, the
routed experts and their waits for peers. Legal because the shared expert reads nothing but x and its own weights, and
its intermediate values have no other readers. The bits stay: the same GEMMs, and the pointwise step between them rounds
where Inductor's code for it does.

Where torch would fold the add into the last GEMM (``addmm``, which rounds once), that GEMM stays in the graph behind
the combine, and the op returns ``act``: with ``rounding="eager"`` the add joined the combine before, and all of it runs
beside. A gate on the shared expert (Qwen2-MoE) and everything else that follows stays in the graph too. More than
``MAX_ROWS`` rows stay behind the layer: their products fill the GPU, and each side slows the other down.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.fx import Graph, Node

from . import torch_compat
from .effects import EffectOp, effect_ops, erase_unused, insert_effect, reaches, read
from .report import Outcome

aten, prims = torch.ops.aten, torch.ops.prims
MAX_ROWS = 64  # 128 are slower beside (2709 us, 2705 behind; Qwen2-MoE 221, 212), 32 faster (2 H200s, bench_overlap)
VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.alias.default)
PRODUCTS: dict[Any, int] = {aten.mm.default: 0, aten.addmm.default: 1}  # and which argument is their input
LARGEST_ACTIVATION = 40  # nodes; gelu has about ten
OTHER_ACTIVATION = "no silu(gate) * up of two products without bias, or of the halves of one, gate first"
LAYER = (
    "hidden", "topk_ids", "topk_weights", "gate_up", "down", "local_tokens", "metadata", "local_expert_start",
    "max_tokens",
)  # fmt: skip


class Activation(NamedTuple):
    """``mul = silu(gate) * up``, where gate and up are products of ``x`` with ``weights``."""

    mul: Node
    x: Node  # views taken off
    weights: list[Node]  # [gate, up], or [gate_up]
    products: list[Node]


@dataclass(frozen=True)
class SharedExpertMatch:
    """An activation of the layer's input, and the product behind it if it may come along."""

    activation: Activation
    product: Node | None
    position: int  # of the product among the layer's addends, or -1

    @property
    def result(self) -> Node:
        """What the op returns."""
        return self.activation.mul if self.product is None else self.product

    def replace(self, layer: EffectOp) -> str:
        """Put ``moe_layer_shared`` in place of ``layer`` and of the match; returns what was done."""
        graph, arguments, weights = layer.node.graph, layer.arguments, self.activation.weights
        addends = [node for number, node in enumerate(arguments["addends"]) if number != self.position]
        down = self.product.args[1] if self.product is not None else None
        args = (
            *(arguments[name] for name in LAYER), addends, arguments["hidden"], weights, down, self.position,
            arguments["group_name"],
        )  # fmt: skip
        options = {n: v for n, v in arguments.items() if n not in (*LAYER, "addends", "group_name")}
        options["shared_round_each"] = torch_compat.rounds_every_step(layer.value(0).device.type)
        value = self.result.meta["val"]
        flat = value if value.dim() == 2 else value.reshape(-1, value.shape[-1])
        with graph.inserting_before(layer.node):
            op = torch.ops.moe_ep.moe_layer_shared.default
            joined = insert_effect(graph, layer.token, op, args, options, (layer.value(0), flat))
            results = [read(joined, index) for index in range(3)]
            result = results[2] if value.dim() == 2 else _view(graph, results[2], value)
        for node in list(layer.node.users):
            node.replace_all_uses_with(results[1] if node.args[1] == 1 else results[0])
        self.result.replace_all_uses_with(result)
        done = f"{joined.name}: {self.result.name} of {', '.join(w.name for w in weights)} runs beside the layer"
        layer.erase({})
        erase_unused(self.result)
        torch_compat.sort_graph(graph)
        return done + ("" if self.product is not None else ", its last product stays behind (addmm)")


class OverlapShared:
    """See the module's docstring."""

    name = "overlap_shared"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Move the shared expert of every layer into its op; refusals say what looked like one and is none."""
        outcome = Outcome(self.name)
        layers = list(effect_ops(graph, "moe_layer"))
        activations = [found for node in graph.nodes if layers and (found := _activation(node))]
        others = _others(graph, {strip_views(layer.arguments["hidden"]) for layer in layers}, activations)
        for layer in reversed(layers):  # a layer's replacement renames what the next one reads
            x = strip_views(layer.arguments["hidden"])
            for activation in activations:
                if activation.x is not x:
                    continue
                match = _match(layer, activation)
                if isinstance(match, SharedExpertMatch):
                    outcome.done.append(match.replace(layer))
                    break
                outcome.refuse(activation.mul, match)
        outcome.done.reverse()
        outcome.refused.reverse()
        for name, reason in others:
            outcome.refuse(name, reason)
        return outcome


def _others(graph: Graph, inputs: set[Node], activations: list[Activation]) -> list[tuple[str, str]]:
    """``(name, reason)`` of what looks like a shared expert and is none of a layer, before anything is rewritten."""
    of_others = [found for found in activations if found.x not in inputs]
    reasons = [(found.mul.name, f"it reads {found.x.name}, which is no layer's input") for found in of_others]
    known = {found.mul for found in activations}
    for mul in graph.find_nodes(op="call_function", target=aten.mul.Tensor) if inputs else ():
        if mul not in known and any(reader.target in PRODUCTS for reader in readers(mul)) and _comes_from(mul, inputs):
            reasons.append((mul.name, OTHER_ACTIVATION))
    return reasons


def _comes_from(mul: Node, inputs: set[Node]) -> bool:
    """Whether ``mul`` is computed from products of one of ``inputs``, and from nothing else."""
    seen, stack = {mul}, [mul]
    while stack and len(seen) < LARGEST_ACTIVATION:
        node = stack.pop()
        if node.target in PRODUCTS:
            if strip_views(node.args[PRODUCTS[node.target]]) not in inputs:
                return False
            continue
        if node.op != "call_function" or torch_compat.is_effect(node):
            return False
        stack += [parent for parent in node.all_input_nodes if parent not in seen]
        seen.update(node.all_input_nodes)
    return not stack


def _match(layer: EffectOp, activation: Activation) -> SharedExpertMatch | str:
    """The shared expert around an activation of the layer's input, or why it stays where it is."""
    rows = layer.arguments["hidden"].meta["val"].shape[0]
    if rows > MAX_ROWS:
        return f"{rows} rows: beside the layer it takes longer than behind it"
    reading = readers(activation.mul)
    product = reading[0]
    if len(reading) > 1 or product.target is not aten.mm.default or strip_views(product.args[0]) is not activation.mul:
        return f"{', '.join(reader.name for reader in reading)}: no single matrix product reads it"
    for shared in activation.products:
        if len(readers(shared)) > 1:
            return f"{shared.name} has {len(readers(shared))} readers"
    position = next((n for n, addend in enumerate(layer.arguments["addends"]) if addend is product), -1)
    if position >= 0 and len(product.users) > 1:
        return f"{product.name} is added to the combine's result and has other readers"
    keep = position < 0 and _becomes_addmm(product)
    for node in [*activation.weights, *([] if keep else product.args[1:2])]:
        if reaches(node, lambda other: other is layer.node):
            return f"{node.name} depends on the layer"
    return SharedExpertMatch(activation, None if keep else product, position)


def _activation(mul: Node) -> Activation | None:
    """What ``mul`` multiplies, if that is the silu of one product and another product of the same matrix."""
    if mul.target is not aten.mul.Tensor or not mul.users:
        return None
    operands: list[Any] = [strip_views(operand) for operand in mul.args]
    for silu, up in (operands, operands[::-1]):
        gate = _silu_of(silu)
        if gate is None or not isinstance(up, Node):
            continue
        gate = strip_views(gate)
        products: list[Any] = [_halved(gate, up)] if gate.target is operator.getitem else [gate, up]
        if all(product is not None and product.target is aten.mm.default for product in products):
            inputs = [strip_views(product.args[0]) for product in products]
            if inputs[0] is inputs[-1]:
                return Activation(mul, inputs[0], [product.args[1] for product in products], products)
    return None


def _halved(gate: Node, up: Node) -> Node | None:
    """The node of which ``gate`` and ``up`` are first and second half, columns."""
    split: Any = gate.args[0]
    if up.target is not operator.getitem or up.args[0] is not split or (gate.args[1], up.args[1]) != (0, 1):
        return None
    if split.target is not aten.split.Tensor or len(split.users) != 2:
        return None
    whole, width = split.args[0].meta["val"], gate.meta["val"].shape[-1]
    along_columns = 2 * width == whole.shape[-1] and gate.meta["val"].shape[:-1] == whole.shape[:-1]
    return strip_views(split.args[0]) if along_columns else None


def _silu_of(node: Any) -> Node | None:
    """The bf16 or fp16 value whose silu ``node`` is: ``cast(f / (exp(-f) + 1))`` with ``f = cast(value)``, or None."""
    quotient: Any = _argument(node, prims.convert_element_type.default)
    wide = _argument(quotient, aten.div.Tensor)
    divisor: Any = quotient.args[1] if wide is not None else None
    negated: Any = _argument(_argument(divisor, aten.add.Tensor), aten.exp.default)
    value = _argument(wide, prims.convert_element_type.default)
    if value is None or wide is None or _argument(negated, aten.neg.default) is not wide or divisor.args[1] != 1:
        return None
    if wide.meta["val"].dtype != torch.float32 or node.meta["val"].dtype != value.meta["val"].dtype:
        return None
    alone = len(wide.users) == 2 and all(len(step.users) == 1 for step in (node, quotient, divisor, negated))
    return value if alone else None


def _argument(node: Any, target: Any) -> Node | None:
    """The first argument of ``node`` if it calls ``target``."""
    if not isinstance(node, Node) or node.target is not target or not isinstance(node.args[0], Node):
        return None
    return node.args[0]


def _becomes_addmm(product: Node) -> bool:
    """Whether torch folds the add behind ``product`` into it, so that the two round once."""
    users = list(product.users)
    return len(users) == 1 and users[0].target is aten.add.Tensor


def strip_views(node: Any) -> Any:
    """The node behind views that change no element."""
    while isinstance(node, Node) and node.target in VIEWS:
        node = node.args[0]
    return node


def readers(node: Node) -> list[Node]:
    """Users of ``node`` and of its views, which themselves do not count."""
    return [reader for user in node.users for reader in (readers(user) if user.target in VIEWS else [user])]


def _view(graph: Graph, node: Node, like: Any) -> Node:
    view = graph.call_function(aten.view.default, (node, list(like.shape)))
    view.meta["val"] = like
    return view

"""Small MoE layers, and ways to see the inference graph that passes work on."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch import config as functorch_config
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch.fx import Graph, GraphModule

import moe_ops  # noqa: F401 - registers the ops
from lowering.effects import EffectOp, effect_ops
from lowering.passes import Options, run_passes
from lowering.torch_compat import schema_arguments

ops = torch.ops.moe_ep
T, H, K, E, I = 8, 32, 2, 4, 16


def weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Router, experts and a shared projection of one layer."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"router": (H, E), "gate_up": (E, 2 * I, H), "down": (E, H, I), "shared": (H, H)}
    return {name: (torch.randn(*size, generator=generator) / 4).to(dtype) for name, size in sizes.items()}


def batch(seed: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(T, H, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routed(
    x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor | None = None, *, group: str = "local",
    start: int = 0, max_tokens: int = T, **combine: Any,
) -> Tensor:  # fmt: skip
    """Router, dispatch, experts and combine; asks for its own metadata unless given some."""
    if metadata is None:
        metadata = ops.metadata_update(count, group)
    chosen, ids = (x @ w["router"]).softmax(-1).topk(K, -1)
    rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, count, metadata, max_tokens, group)
    y = ops.fused_moe(rows, ids, chosen, w["gate_up"], w["down"], metadata[0:1], start)
    return ops.rsv_combine(y, count, metadata, x.shape[0], group, **combine)


def inference_graph(function: Callable, *args: Any, **options: Any) -> tuple[GraphModule, list[Any]]:
    """The graph of a function as passes get it, and the example inputs in its order; ``options`` of ``aot_autograd``.

    With ``keep_inference_input_mutations=True``, as Inductor has it, inputs that change are written inside the graph.
    """
    found: list[tuple[GraphModule, list[Any]]] = []

    def keep(module: GraphModule, fakes: list[Any]) -> Callable:
        def call(*inputs: Any) -> Any:
            found.append((module, list(inputs)))
            return module(*inputs)

        return make_boxed_func(call)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, decompositions=select_decomp_table(), **options)
    with torch.no_grad(), functorch_config.patch(unlift_effect_tokens=True):
        torch.compile(function, backend=backend, fullgraph=True)(*args)
    ((module, inputs),) = found
    return module, inputs


def give_to_group(op: EffectOp, group: str) -> None:
    """Let an ordered op of a traced graph communicate over another group, which need not exist."""
    names = [argument.name for argument in schema_arguments(op.op)]
    op.node.update_arg(2 + names.index("group_name"), group)  # behind token and op


def two_groups() -> Graph:
    """A layer of "local", whose metadata comes from outside, behind another group's ``metadata_update``."""

    def model(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
        seen = ops.metadata_update(count, "local")
        return routed(x, w, count, metadata) + seen[0]

    count, metadata = (torch.tensor(values, dtype=torch.int32) for values in ([5], [5, 0, 5]))
    module, _ = inference_graph(model, batch(), weights(), count, metadata)
    (update,) = effect_ops(module.graph, "metadata_update")
    give_to_group(update, "other")
    run_passes(module.graph, Options(frozenset({"agreement", "elide_barriers"})))
    return module.graph


def text(graph: Graph) -> str:
    """One line a node, short enough to be compared with an expected text; ``!`` marks an ordered op.

    Inputs are numbered by their first use, because their order differs between torch versions.
    """
    lines = []
    for node in graph.nodes:
        if node.op == "placeholder" or node.target is torch.ops.prims._sink_tokens.default:
            continue
        if node.op == "output":
            lines.append(f"return {_args(node.args[0])}")
        elif node.target is operator.getitem:
            lines.append(f"{node.name} = {node.args[0]}[{node.args[1]}]")
        elif node.target is torch.ops.higher_order.with_effects:
            lines.append(f"{node.name} = !{_short(node.args[1])}{_args((node.args[0], *node.args[2:]), node.kwargs)}")
        else:
            lines.append(f"{node.name} = {_short(node.target)}{_args(node.args, node.kwargs)}")
    names: dict[str, str] = {}
    return re.sub(r"\barg\d+_1\b", lambda m: names.setdefault(m[0], f"in{len(names)}"), "\n".join(lines))


def _short(target: Any) -> str:
    return str(target).removeprefix("moe_ep.").removeprefix("aten.").removesuffix(".default")


def _args(args: Any, kwargs: dict[str, Any] | None = None) -> str:
    parts = [repr(a) if isinstance(a, str) else str(a) for a in args]
    return f"({', '.join(parts + [f'{k}={v}' for k, v in (kwargs or {}).items()])})"

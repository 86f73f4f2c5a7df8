"""Graphs in which a meeting was dropped go through the model of the protocol, which knows nothing of the pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Graph

from lowering.effects import effect_ops
from lowering.passes import Options, run_passes
from tests.lowering.layers import T, batch, inference_graph, ops, routed, weights
from tests.protocol.sequence import Step, check_sequence

COUNT, METADATA = torch.tensor([5], dtype=torch.int32), torch.tensor([5, 0, 5], dtype=torch.int32)
SLOTS = {"agv_dispatch": "agv_dispatch", "rsv_combine": "rsv_combine", "rsv_combine_add": "rsv_combine",
         "fused_moe_combine": "rsv_combine", "metadata_update": "metadata_update"}  # fmt: skip


def launches(graph: Graph) -> list[Step]:
    """The graph's ordered ops as the model's launches; x is the layer batch."""
    steps: list[Step] = []
    for op in effect_ops(graph):
        if op.name in SLOTS:
            steps.append(Step(SLOTS[op.name]))
        elif op.name in ("moe_layer", "moe_layer_shared"):
            steps.append(Step("dispatch_into", writes=("x",), barrier=op.arguments["entry_barrier"]))
            steps += [Step("local", reads=("x",)), Step("rsv_combine")]
        else:
            assert op.name == "agree", op.name  # launches nothing
    return steps


def one_layer(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return x + routed(x, w, count)


def three_layers(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    for _ in range(3):
        x = x + routed(x, w, count)
    return x


def metadata_from_outside(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return routed(x + routed(x, w, count, metadata), w, count, metadata)


def a_batch_that_others_read(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    """A layer that stays three ops, between two that become one."""
    x = x + routed(x, w, count)
    ids, chosen = torch.zeros(T, 2, dtype=torch.int64), torch.ones(T, 2)
    rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, count, metadata, T, "local")
    y = ops.fused_moe(rows, ids, chosen, w["gate_up"], w["down"], metadata[0:1], 0)
    x = ops.rsv_combine(y, count, metadata, T, "local") + rows.sum()
    return x + routed(x, w, count)


MODELS = (one_layer, three_layers, metadata_from_outside, a_batch_that_others_read)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
@pytest.mark.parametrize("rounding", ["compiled", "eager"])
def test_the_model_agrees(model: Callable, rounding: str):
    module, _ = inference_graph(model, batch(), weights(), COUNT, METADATA)
    run_passes(module.graph, Options(rounding=rounding))
    steps = launches(module.graph)
    assert any(step.kind == "dispatch_into" and not step.barrier for step in steps)
    verdict = check_sequence(steps)
    assert verdict.ok, verdict.counterexample


def test_the_model_would_object():
    """Without the combine's meeting, on which the pass relies, the same elision is a race on the layer batch."""
    module, _ = inference_graph(metadata_from_outside, batch(), weights(), COUNT, METADATA)
    run_passes(module.graph)
    steps = [step for step in launches(module.graph) if step.kind != "rsv_combine"]
    verdict = check_sequence(steps)
    assert not verdict.ok and "race" in verdict.counterexample and "'x'" in verdict.counterexample
    kept = [step._replace(barrier=True) for step in steps]
    assert check_sequence(kept).ok

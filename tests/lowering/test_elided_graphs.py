"""Graphs in which a meeting was dropped go through the model of the protocol, which knows nothing of the pass."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lowering
from graphs import experts, hf_compat
from graphs.checkpoints import tiny_model
from lowering.passes import Options, run_passes
from tests.lowering.launches import check_code, launches, launches_in_code, verdict, without_meetings
from tests.lowering.layers import T, batch, inference_graph, ops, routed, weights
from tests.protocol.sequence import Step, check_sequence

COUNT, METADATA = torch.tensor([5], dtype=torch.int32), torch.tensor([5, 0, 5], dtype=torch.int32)


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
    assert verdict(tuple(steps)).ok, verdict(tuple(steps)).counterexample


FAMILIES = {
    "qwen3_moe": {"num_hidden_layers": 3},
    "deepseek_v3": {"num_hidden_layers": 4},  # the first is dense
    "gpt_oss": {"num_hidden_layers": 3, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_agrees_on_decode_steps(family: str):
    """Three layers, with the passes that a decode loop runs; ``test_models.py`` has the scheduled code of two."""
    model = tiny_model(family, torch.bfloat16, **FAMILIES[family])
    state = experts.ExpertParallelState("local", 0, 2, T, torch.device("cpu"))
    experts.share_state(hf_compat.experts_modules(model).values(), state)
    model.set_experts_implementation(experts.NAME)
    module, _ = inference_graph(lambda ids: model(ids, use_cache=False).logits, torch.full((T, 1), 7))
    run_passes(module.graph, Options(inexact=True))
    steps = tuple(launches(module.graph))
    layer = (Step("dispatch_into", writes=("x",), barrier=False), Step("local", reads=("x",)), Step("rsv_combine"))
    assert steps == (Step("metadata_update"), *layer * 3)
    assert verdict(steps).ok, verdict(steps).counterexample
    fewer = verdict(without_meetings(steps))
    assert not fewer.ok and "race" in fewer.counterexample and "'x'" in fewer.counterexample


def test_the_scheduled_code_of_what_a_test_explains_is_checked(schedules: list[tuple[Step, ...]]):
    lowering.explain(a_batch_that_others_read, batch(), weights(), COUNT, METADATA)
    into = (Step("dispatch_into", writes=("x",), barrier=False), Step("local", reads=("x",)), Step("rsv_combine"))
    slots = (Step("agv_dispatch"), Step("rsv_combine"))
    assert schedules == [(Step("metadata_update"), *into, *slots, *into)]


CODE = """
        torch.ops.moe_ep.agree.default(buf0, 'x', 'local')
        buf1 = torch.ops.moe_ep.moe_layer.default(x, i, w, g, d, n, m, 0, 8, [], 'local', entry_barrier=True)
        buf2 = torch.ops.moe_ep.thin_linear.default(buf1, w)
        buf3 = torch.ops.moe_ep.moe_layer.default(x, i, w, g, d, n, m, 0, 8, [], 'local', entry_barrier=False)
        torch.ops.moe_ep.metadata_update.default(buf0, 'other')
"""


def test_the_reader_of_code():
    into = [Step("dispatch_into", writes=("x",), barrier=entry) for entry in (True, False)]
    rest = (Step("local", reads=("x",)), Step("rsv_combine"))
    code = f"if True:{CODE}"
    assert launches_in_code(code) == {"local": (into[0], *rest, into[1], *rest), "other": (Step("metadata_update"),)}
    assert len(check_code(code)) == 2
    with pytest.raises(AssertionError, match="agv_dispatch_into"):  # a graph with this op needs more than x
        launches_in_code("torch.ops.moe_ep.agv_dispatch_into.default(x, i, w, n, m, b, bi, bw, 'local')")


def test_the_model_would_object():
    """Without the combine's meeting, on which the pass relies, the same elision is a race on the layer batch."""
    module, _ = inference_graph(metadata_from_outside, batch(), weights(), COUNT, METADATA)
    run_passes(module.graph)
    steps = [step for step in launches(module.graph) if step.kind != "rsv_combine"]
    found = check_sequence(steps)
    assert not found.ok and "race" in found.counterexample and "'x'" in found.counterexample
    kept = [step._replace(barrier=True) for step in steps]
    assert check_sequence(kept).ok

"""Decode steps of real architectures: every layer becomes one op, one graph, nothing copied around the ops.

Inductor cuts graphs into partitions only for CUDA, so their number can be other than 0 only there; that ``explain``
reports it is tested in ``test_explain.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import lowering
from graphs import experts, hf_compat
from graphs.checkpoints import tiny_model
from graphs.hf_slots import adapt_attention
from graphs.sampling import greedy
from graphs.sharding import expert_parallel_state
from graphs.step import DecodeStep

T = 4
LAYERS = {"qwen3_moe": 2, "mixtral": 2, "deepseek_v3": 2, "gpt_oss": 2}


def decoding_model(family: str, world: int) -> Any:
    """On a rank that takes itself for the first of ``world`` (the others have no rows)."""
    model = tiny_model(family, torch.bfloat16)
    state = experts.ExpertParallelState("local", 0, world, T, torch.device("cpu"))
    experts.share_state(hf_compat.experts_modules(model).values(), state)
    model.set_experts_implementation(experts.NAME)
    return model


def decode_step(family: str, world: int) -> Callable[[Tensor], Tensor]:
    """One token of T sequences."""
    model = decoding_model(family, world)
    return lambda ids: model(ids, use_cache=False).logits


def static_step(family: str, world: int) -> DecodeStep:
    """As ``decode_step``, with the cache and the sampling of a ``DecodeLoop``."""
    model = decoding_model(family, world)
    adapt_attention(model)
    state = expert_parallel_state(model)
    assert state is not None
    step = DecodeStep(model, state, T, 8, greedy)
    state.declare_batch(T, T, step.active)
    with torch.no_grad():
        step.feed()  # allocates the cache
    return step


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_step_of_the_decode_loop_copies_nothing(family: str):
    lowering.enable(rounding="compiled", without=[])
    explanation = lowering.explain(static_step(family, 2))
    assert explanation.ops == {"agree": 1, "metadata_update": 1, "moe_layer": LAYERS[family]}, explanation
    assert explanation.compiled_graphs == 1 and not explanation.graph_breaks and explanation.partitions == 0
    assert explanation.copies == [], explanation


@pytest.mark.parametrize("family", LAYERS)
def test_a_step_is_one_graph_without_copies(family: str):
    lowering.enable(rounding="compiled", without=[])
    ids = torch.randint(1, 500, (T, 1), generator=torch.Generator().manual_seed(0))
    explanation = lowering.explain(decode_step(family, 2), ids)
    layer = "moe_layer_shared" if family == "deepseek_v3" else "moe_layer"
    assert explanation.ops == {"agree": 1, "metadata_update": 1, layer: LAYERS[family]}, explanation
    assert explanation.compiled_graphs == 1 and not explanation.graph_breaks and explanation.partitions == 0
    assert explanation.copies == [], explanation
    assert explanation.graphs[0].after.totals()["copies"] == 0 < explanation.graphs[0].before.totals()["copies"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_one_graph_for_every_number_of_ranks(world: int):
    """One rank alone gathers nothing, so there only the experts are ops."""
    ids = torch.randint(1, 500, (T, 1), generator=torch.Generator().manual_seed(0))
    explanation = lowering.explain(decode_step("qwen3_moe", world), ids)
    assert (explanation.compiled_graphs, explanation.partitions) == (1, 0) and not explanation.graph_breaks
    layers = {"fused_moe": 2} if world == 1 else {"agree": 1, "metadata_update": 1, "moe_layer": 2}
    assert explanation.ops == layers

"""One point of a benchmark of ``fused_moe``: its inputs, its floor, and the check that comes before any time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from shapes import LayerShape
from torch import Tensor

from moe_ops.fused_moe_config import Shape
from moe_ops.fused_moe_tune import Tuner
from moe_ops.graph_timer import GraphTimer
from moe_ops.random_layer import MAX_ERROR, Answer


def tuner_of(layer: LayerShape, tokens: int, timer: GraphTimer) -> Tuner:
    """Random weights and routing of ``tokens`` rows, on the GPU."""
    shape = Shape(layer.local_experts, layer.top_k, layer.hidden, layer.inner, tokens)
    return Tuner(shape, layer.experts, timer, torch.device("cuda"))


def floor_of(layer: LayerShape, tuner: Tuner) -> float:
    """``LayerShape.floor_us`` of the routing that ``tuner`` has."""
    local = tuner.ids[tuner.ids < layer.local_experts]
    return layer.floor_us(tuner.shape.tokens, local.numel(), local.unique().numel())


def checked(name: str, call: Callable[[], Tensor], answer: Answer, limit: float = MAX_ERROR) -> float:
    """The relative error of a call, which must be right before it may be timed."""
    error = answer.error_of(call())
    if not error <= limit:
        raise AssertionError(f"{name}: relative error {error:.2e} > {limit}; not timed")
    return error

"""``fused_moe`` as a decode step runs it (``--layers``): in one graph, layer after layer, each with weights of its own.

Nothing is written between replays: the weights of the other layers are what makes L2 cold. A graph's own time, and the
written lines that ``GraphTimer`` leaves in L2, are not in these figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from statistics import median

from moe_points import checked, floor_of, tuner_of
from shapes import LayerShape
from torch import Tensor

from moe_ops.fused_moe import launch_fused_moe
from moe_ops.fused_moe_tune import Tuner
from moe_ops.graph_timer import FLUSH_BYTES, GraphTimer
from moe_ops.random_layer import Answer

LEAST_LAYERS = 5
SETTLING = 7  # times as many replays before those that count: the check in fp64 leaves the GPU at another clock
HEADER = "shape            rows  layers  us a layer  floor us  frac.    above"

Call = Callable[[], Tensor]


def layers_of(tuner: Tuner) -> list[tuple[Tensor, Tensor]]:
    """``(gate_up, down)`` of as many layers as read several times what L2 holds: the tuner's, in other places."""
    touched = tuner.ids[tuner.ids < tuner.shape.experts].unique().numel()
    read = max(touched, 1) * (tuner.gate_up[0].nbytes + tuner.down[0].nbytes)
    count = max(LEAST_LAYERS, math.ceil(FLUSH_BYTES / read))
    return [(tuner.gate_up.roll(place, 0), tuner.down.roll(place, 0)) for place in range(count)]


def calls_of(tuner: Tuner) -> list[Call]:
    """A call for each layer, all on the same rows."""
    inputs, hint = (tuner.hidden, tuner.ids, tuner.weights), tuner.shape.tokens
    return [
        partial(launch_fused_moe, *inputs, gate_up, down, tuner.live, 0, tokens_hint=hint)
        for gate_up, down in layers_of(tuner)
    ]


def check(name: str, tuner: Tuner, calls: list[Call]) -> None:
    """Raise ``AssertionError`` unless the first and the last layer are right."""
    gate_up, down = tuner.gate_up, tuner.down
    for place in (0, len(calls) - 1):
        tuner.gate_up, tuner.down = gate_up.roll(place, 0), down.roll(place, 0)
        checked(f"{name}, layer {place}", calls[place], Answer(tuner))
    tuner.gate_up, tuner.down = gate_up, down


def us_of_a_layer(calls: list[Call], timer: GraphTimer, repeats: int) -> float:
    """One graph of all calls, one replay after the other."""
    samples = timer.samples(lambda: [call() for call in calls][-1], (1 + SETTLING) * repeats, flush=False)
    return median(samples[-repeats:]) / len(calls)


def line(layer: LayerShape, tokens: int, timer: GraphTimer, repeats: int) -> str:
    """A point of the table, checked, then timed."""
    tuner, name = tuner_of(layer, tokens, timer), f"{layer.name} T={tokens}"
    calls, floor = calls_of(tuner), floor_of(layer, tuner)
    check(name, tuner, calls)
    us = us_of_a_layer(calls, timer, repeats)
    sizes = f"{layer.name:16} {tokens:5d} {len(calls):7d}"
    return f"{sizes} {us:11.1f} {floor:9.1f} {floor / us:6.3f} {us - floor:8.1f}"

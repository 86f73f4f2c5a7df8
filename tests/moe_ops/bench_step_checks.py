"""The checks of ``bench_fused_moe.py --steps`` and ``--layers`` on the kernels themselves, in Triton's interpreter."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import moe_layers
import moe_steps
import pytest
from moe_points import tuner_of
from shapes import SHAPES

CPU = torch.device("cpu")


def test_align_passes_its_check(monkeypatch):
    monkeypatch.setattr(moe_steps, "CALLS", 2)
    for step in moe_steps.align_steps(8, 2, 16, CPU):
        step.check()


def test_the_sum_passes_its_check(monkeypatch):
    monkeypatch.setattr(moe_steps, "CALLS", 2)
    layer = replace(SHAPES["qwen3-30b-ep8"], local_experts=4, experts=16, top_k=3, hidden=64)
    for step in moe_steps.sum_steps(layer, 5, CPU):
        step.check()


@pytest.fixture
def tuner(monkeypatch):
    """Of a small layer, in fp16 (the interpreter has no bf16 products); six layers are more than L2 holds."""
    real = torch.device
    monkeypatch.setattr(torch, "device", lambda kind: real("cpu"))
    monkeypatch.setattr(moe_layers, "FLUSH_BYTES", 6 * 4 * 3 * 64 * 32 * 2)
    layer = replace(SHAPES["qwen3-30b"], local_experts=4, experts=4, top_k=4, hidden=64, inner=32)
    made = tuner_of(layer, 5, None)
    made.hidden, made.gate_up, made.down = (each.half() for each in (made.hidden, made.gate_up, made.down))
    return made


def test_a_graph_of_layers_reads_more_than_l2_holds_and_is_right(tuner):
    calls = moe_layers.calls_of(tuner)
    assert len(calls) == 6
    assert len({gate_up.data_ptr() for gate_up, _ in moe_layers.layers_of(tuner)}) == 6
    moe_layers.check("a point", tuner, calls)


@pytest.mark.parametrize("place", [0, 5])
def test_a_wrong_layer_is_not_timed(tuner, place):
    calls = moe_layers.calls_of(tuner)
    right = calls[place]
    calls[place] = lambda: 1.02 * right()
    with pytest.raises(AssertionError, match=f"layer {place}: relative error"):
        moe_layers.check("a point", tuner, calls)

"""What the layer benchmark calls a near tie: the only rows that it lets differ by more than rounding."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("layer_models")


def test_steps_to_a_tie(models: ModuleType):
    """Top-1 of logits 4 and 4, 4 and the bf16 number before it, 4 and 2: no step, half of 4's own, a binade."""
    below = 4 - 2**-6
    router = torch.tensor([[4.0, 4.0, 4.0], [4.0, below, 2.0]], dtype=torch.bfloat16)
    x = torch.eye(3, dtype=torch.bfloat16)
    unused = torch.empty(0, dtype=torch.bfloat16)
    steps = models.steps_to_a_tie(x, models.Weights(router, unused, unused, None, None), 1)
    assert steps.tolist() == [0.0, 0.5, 64.0]


def test_touched_experts_are_those_of_this_rank(models: ModuleType):
    """Ranks of two experts each: the second holds 2 and 3, which two layers name once and twice."""
    steps = torch.zeros(1)
    seen = [models.Seen(torch.tensor([[0, 2]]), steps), models.Seen(torch.tensor([[2, 3]]), steps)]
    assert models.touched_experts(seen, 2, 2) == 1.5

"""How the layer benchmark checks results: only a near tie of a router lets a row differ by more than rounding."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("layer_models")


@pytest.fixture
def benchmark_of_layers(models: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return importlib.import_module("bench_layer")


def compared(benchmark: ModuleType, lowered: torch.Tensor, steps: list[float]) -> list[float]:
    """``compare`` of variants of which all but ``lowered`` gave ones."""
    graph, ones = SimpleNamespace(replay=lambda: None), torch.ones_like(lowered)
    variants = [SimpleNamespace(graph=graph, result=result) for result in (lowered, ones, ones, ones)]
    return benchmark.compare(variants, torch.tensor(steps))


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


def test_a_row_that_differs_must_be_a_near_tie(benchmark_of_layers: ModuleType):
    lowered = torch.ones(8, 4)
    lowered[3] = 1.1
    tie, none = [9.0] * 3 + [2.0] + [9.0] * 4, [9.0] * 8
    assert compared(benchmark_of_layers, lowered, tie) == [0.0, 0.0]
    with pytest.raises(AssertionError):
        compared(benchmark_of_layers, lowered, none)


def test_a_small_difference_needs_no_tie_and_nan_is_never_right(benchmark_of_layers: ModuleType):
    lowered = torch.ones(2, 4)
    lowered[1, 0] = 1.01
    assert compared(benchmark_of_layers, lowered, [9.0, 9.0]) == [0.01, 0.01]
    lowered[0, 0] = float("nan")
    with pytest.raises(AssertionError):
        compared(benchmark_of_layers, lowered, [0.0, 9.0])


def test_lines_are_kept_as_they_come(benchmark_of_layers: ModuleType, tmp_path: Path):
    out = tmp_path / "new" / "lines.jsonl"
    for tokens in (1, 8):
        benchmark_of_layers.write_line(out, {"T": tokens})
    assert [json.loads(line)["T"] for line in out.read_text().splitlines()] == [1, 8]

"""How the layer benchmark checks results: only a near tie of a router lets a row differ by more than rounding."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

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
    ones = torch.ones_like(lowered)
    variants = [variant(benchmark, "", result) for result in (lowered, ones, ones, ones)]
    return benchmark.compare("a layer", variants, torch.tensor(steps))


def variant(benchmark: ModuleType, name: str, result: torch.Tensor) -> Any:
    return benchmark.Variant(name, SimpleNamespace(replay=lambda: None), result, 0.0, 1)


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
    with pytest.raises(benchmark_of_layers.DifferentResults, match=r"a layer: .* in 1 rows .* no near tie: \[3\]"):
        compared(benchmark_of_layers, lowered, none)


def test_a_small_difference_needs_no_tie_and_nan_is_never_right(benchmark_of_layers: ModuleType):
    lowered = torch.ones(2, 4)
    lowered[1, 0] = 1.01
    assert compared(benchmark_of_layers, lowered, [9.0, 9.0]) == [0.01, 0.01]
    lowered[0, 0] = float("nan")
    with pytest.raises(benchmark_of_layers.DifferentResults):
        compared(benchmark_of_layers, lowered, [0.0, 9.0])


class OnCpu(TorchFunctionMode):
    """Tensors that a benchmark asks for on the GPU are made here."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **(kwargs | ({"device": "cpu"} if kwargs.get("device") == "cuda" else {})))


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A group of one rank on the CPU; yields what was timed."""
    make = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: make())
    for name, value in (("get_rank", 0), ("get_world_size", 1), ("all_reduce", None)):
        monkeypatch.setattr(torch.distributed, name, lambda *args, value=value, **options: value)
    monkeypatch.setattr(torch.distributed, "group", SimpleNamespace(WORLD=SimpleNamespace(group_name="local")))
    with OnCpu():
        yield []


def tiny_layer(models: ModuleType) -> Any:
    of = models.SHAPES["tiny"]
    sizes = (of.experts, of.hidden), (of.experts, 2 * of.inner, of.hidden), (of.experts, of.hidden, of.inner)
    return models.Weights(*(torch.ones(size).bfloat16() for size in sizes), None, None)


def timed(variants: list, log: list[str]) -> dict[str, float]:
    log += [variant.name for variant in variants]
    return {variant.name: 2.0 + n for n, variant in enumerate(variants)}


@pytest.mark.parametrize("wrong", [None, "exact", "plain"])
def test_a_layer_is_checked_before_it_is_timed(
    wrong: str | None, models: ModuleType, benchmark_of_layers: ModuleType, without_gpu: list[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    """One bit of one row is enough: 1 and the next number of bf16."""

    def captured(name: str, function: object, layers: int) -> Any:
        result = torch.ones(3, 64, dtype=torch.bfloat16)
        result[1, 5] += 2**-7 * (name == wrong)
        return variant(benchmark_of_layers, name, result)

    monkeypatch.setattr(benchmark_of_layers, "capture", captured)
    monkeypatch.setattr(benchmark_of_layers, "alternate", lambda variants, replays: timed(variants, without_gpu))
    arguments = "tiny", 3, [tiny_layer(models)], 1, "compiled", "local"
    if wrong is None:
        line, _ = benchmark_of_layers.measure(*arguments)
        assert line["bit_equal"] and without_gpu == ["lowered", "exact", "plain", "today"]
    else:
        with pytest.raises(benchmark_of_layers.DifferentResults, match=r"tiny, W = 1, T = 3.*in 1 rows: \[1\]"):
            benchmark_of_layers.measure(*arguments)
        assert without_gpu == []


@pytest.mark.parametrize("wrong", [None, "exact_beside"])
def test_a_shared_expert_beside_its_layer_is_checked_before_it_is_timed(
    wrong: str | None, models: ModuleType, benchmark_of_layers: ModuleType, without_gpu: list[str],
    monkeypatch: pytest.MonkeyPatch,
):  # fmt: skip
    overlap = importlib.import_module("bench_overlap")
    names = ("beside", "serial", "exact_beside", "exact_serial", "rest", "shared")
    variants = [variant(overlap, name, torch.full((3, 64), 1.0 + (name == wrong))) for name in names]
    monkeypatch.setattr(overlap, "variants_of", lambda *arguments: variants)
    monkeypatch.setattr(overlap, "alternate", lambda variants, replays: timed(variants, without_gpu))
    arguments = "tiny", 3, [tiny_layer(models)], 1, "compiled", "local"
    if wrong is None:
        assert overlap.measure(*arguments)["bit_equal"] and without_gpu == list(names)
    else:
        with pytest.raises(overlap.DifferentResults, match="tiny, W = 1, T = 3"):
            overlap.measure(*arguments)
        assert without_gpu == []


def test_a_difference_shows_what_there_is_and_ends_the_process(
    benchmark_of_layers: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def ended(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(os, "_exit", ended)
    with pytest.raises(SystemExit) as end:
        benchmark_of_layers.end_with(benchmark_of_layers.DifferentResults("tiny differs"), [{"T": 7}])
    out, err = capsys.readouterr()
    assert end.value.code == 1 and "7" in out and "tiny differs" in err


def test_lines_are_kept_as_they_come(benchmark_of_layers: ModuleType, tmp_path: Path):
    out = tmp_path / "new" / "lines.jsonl"
    for tokens in (1, 8):
        benchmark_of_layers.write_line(out, {"T": tokens})
    assert [json.loads(line)["T"] for line in out.read_text().splitlines()] == [1, 8]

"""Idle time in a trace."""

import json
from pathlib import Path

import torch

from graphs.profiling import Idle, Span, idle_of, idle_of_trace, traced


def test_gaps_by_what_ended_them():
    spans = [Span(10, 20, 2), Span(0, 4, 1), Span(5, 8, 1), Span(6, 7, 1)]
    assert idle_of(spans) == Idle(20, 2 / 20, 1 / 20)


def test_trace_of_a_cpu_shows_no_gpu(tmp_path: Path):
    with traced(tmp_path / "trace.json"):
        torch.ones(3) + 1
    names = {event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert "aten::add" in names and idle_of_trace(tmp_path / "trace.json") is None

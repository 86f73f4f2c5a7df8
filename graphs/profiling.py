"""How much of the time a GPU idles while a loop decodes, from a profiler's trace."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")


class Span(NamedTuple):
    """One kernel or copy, µs; ``launch`` tells graph replays (and single kernels) apart."""

    start: float
    end: float
    launch: int


class Idle(NamedTuple):
    """Shares of the window from the first kernel to the last in which no kernel ran."""

    window_us: float
    between: float  # after one launch, before the next: what the host is to blame for
    inside: float  # within one replay: what dependent kernels cost


@contextmanager
def traced(path: Path) -> Iterator[None]:
    """Write a Chrome trace of what runs inside to ``path``; the device is idle before and after."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities = [torch.profiler.ProfilerActivity.CUDA]  # the CPU's events would slow the host down
        torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    profile.export_chrome_trace(str(path))


def idle_of_trace(path: Path) -> Idle | None:
    """From a Chrome trace; None if nothing in it ran on a GPU."""
    events = json.loads(path.read_text())["traceEvents"]
    spans = [
        Span(float(e["ts"]), float(e["ts"]) + float(e["dur"]), e.get("args", {}).get("correlation", 0))
        for e in events
        if e.get("cat") in _ON_GPU
    ]
    return idle_of(spans) if spans else None


def idle_of(spans: Sequence[Span]) -> Idle:
    """Gaps between kernels, by whether a new launch ended them.

    Example: replay 1 busy 0-4 and 5-8, replay 2 busy 10-20: window 20, inside 1/20, between 2/20.
    """
    ordered = sorted(spans)
    inside = between = 0.0
    end, launch = ordered[0].end, ordered[0].launch
    for span in ordered[1:]:
        gap = max(0.0, span.start - end)
        if span.launch == launch:
            inside += gap
        else:
            between += gap
        if span.end > end:
            end, launch = span.end, span.launch
    window = end - ordered[0].start
    return Idle(window, between / window, inside / window)

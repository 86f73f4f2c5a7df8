"""Where the time of a replayed CUDA graph goes: kernels by group, and what the GPU idles inside and between replays."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

# First match wins. Names as the profiler shows them on Hopper with torch 2.11; Inductor's carry the fused ops' names.
GROUPS = (
    ("communication", r"nccl|_dispatch_kernel|_combine_kernel|_combine_add_kernel|_metadata_kernel"),
    ("experts", r"gate_up_(few|many)_kernel|down_(few|many)_kernel|topk_sum_kernel|_align_kernel|_count_kernel|"
                r"_scatter_kernel|GroupProblemShape|grouped|Grouped"),
    ("attention", r"fmha|flash|attention|cudnn|_attend_kernel|_merge_kernel"),
    ("sampling", r"argmax|multinomial"),
    ("router", r"softmax|topk|TopK|bitonic"),
    ("sorting", r"[Ss]ort|histc|kernelHistogram|cub::|radix|scan"),
    ("dense GEMM", r"nvjet|gemm|gemv|splitK|cublas|cutlass|triton_tem|_mm_"),
    ("repeat_kv", r"clone.*expand|expand.*clone|repeat"),
    ("cache writes", r"index_copy|index_put"),
    ("norms, rope", r"rsqrt|pow|mean|cos|sin|neg|cat"),
)  # fmt: skip
OTHER = "other pointwise"


@dataclass
class Kernel:
    """One kernel or copy of a trace; µs."""

    name: str
    start: float
    length: float
    replay: int


@dataclass
class Profile:
    """µs a replay by group, launches a replay, and idle shares of the whole window."""

    step_us: float
    groups: dict[str, tuple[float, float]]  # name -> (µs, launches)
    kernels: list[tuple[str, float, float]]  # name, µs, launches
    idle_inside: float
    idle_between: float

    def text(self) -> str:
        """A table, longest group first."""
        lines = [f"{name:16} {us:8.1f} us {count:6.1f} launches" for name, (us, count) in self.groups.items()]
        lines.append(
            f"{'step':16} {self.step_us:8.1f} us; idle inside {self.idle_inside:.1%}, between {self.idle_between:.1%}"
        )
        return "\n".join(lines)


def group_of(name: str) -> str:
    """The group of a kernel by its name."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), OTHER)


def profile(step: Callable[[], None], replays: int = 10) -> Profile:
    """Trace ``replays`` back-to-back calls of ``step``, each one CUDA graph launch."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        for _ in range(replays):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        prof.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [
        Kernel(e["name"], float(e["ts"]), float(e["dur"]), e.get("args", {}).get("correlation", 0))
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return summarise(kernels)


def summarise(kernels: list[Kernel]) -> Profile:
    """Add up; replays are told apart by the launch that their kernels share, the largest launch being the graph."""
    sizes: dict[int, int] = {}
    for kernel in kernels:
        sizes[kernel.replay] = sizes.get(kernel.replay, 0) + 1
    graphs = {replay for replay, count in sizes.items() if 2 * count > max(sizes.values())}
    kernels = sorted((k for k in kernels if k.replay in graphs), key=lambda k: k.start)
    inside, between = _idle(kernels)
    window = max(k.start + k.length for k in kernels) - kernels[0].start
    by_group: dict[str, list[float]] = {}
    by_name: dict[str, list[float]] = {}
    for kernel in kernels:
        by_group.setdefault(group_of(kernel.name), []).append(kernel.length)
        by_name.setdefault(kernel.name, []).append(kernel.length)
    each = len(graphs)
    groups = {name: (sum(values) / each, len(values) / each) for name, values in by_group.items()}
    names = [(name, sum(values) / each, len(values) / each) for name, values in by_name.items()]
    return Profile(
        step_us=window / each,
        groups=dict(sorted(groups.items(), key=lambda item: -item[1][0])),
        kernels=sorted(names, key=lambda item: -item[1]),
        idle_inside=inside / window,
        idle_between=between / window,
    )


def _idle(kernels: list[Kernel]) -> tuple[float, float]:
    """µs without any kernel running, inside a replay and between two."""
    inside = between = 0.0
    end, replay = kernels[0].start, kernels[0].replay
    for kernel in kernels:
        gap = max(0.0, kernel.start - end)
        if kernel.replay == replay:
            inside += gap
        else:
            between += gap
        if kernel.start + kernel.length > end:
            end, replay = kernel.start + kernel.length, kernel.replay
    return inside, between

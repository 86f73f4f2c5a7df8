"""Where the time of a replayed CUDA graph goes: kernels by group, and what the GPU idles inside and between replays."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from graphs.profiling import Span, idle_of, traced

# First match wins. Names as the profiler shows them on Hopper with torch 2.11; Inductor's carry the fused ops' names.
GROUPS = (
    ("communication", r"nccl|_dispatch\w*_kernel|_combine\w*_kernel|_metadata_kernel"),
    ("experts", r"gate_up_\w+_kernel|down_\w+_kernel|topk_sum_\w*kernel|_align_kernel|_count_kernel|_scatter_kernel|"
                r"experts?_\w*kernel|GroupProblemShape|grouped|Grouped"),
    ("attention", r"_attend_kernel|_merge_kernel|fmha|flash_fprop|efficient_attention"),
    ("repeat_kv", r"triton_poi.*clone.*expand"),
    ("router", r"softmax|topk|TopK|bitonic|triton_per_fused__to_copy__unsafe_view_.*div_.*sum"),
    ("sampling", r"argmax|multinomial"),
    ("sorting", r"[Ss]ort|histc|kernelHistogram|cub::|radix|cumsum"),
    ("dense GEMM", r"_thin_linear_kernel|nvjet|gemm|gemv|splitK|cublas|cutlass"),
    ("rope, cache writes", r"index_copy|index_put|cos|sin"),
    ("norms", r"rsqrt|pow|mean"),
)  # fmt: skip
OTHER = "other pointwise"


class Kernel(NamedTuple):
    """One kernel or copy of a trace; µs. ``launch`` tells graph replays apart."""

    name: str
    start: float
    length: float
    launch: int


@dataclass
class Profile:
    """µs a replay by group, launches a replay, and idle shares of the whole window.

    Kernels that start before the one ahead has ended overlap it, so the groups can add up to more than the step.
    """

    step_us: float
    groups: dict[str, tuple[float, float]]  # name -> (µs, launches)
    kernels: list[tuple[str, float, float]]  # name, µs, launches
    idle_inside: float
    idle_between: float

    def text(self) -> str:
        """A table, longest group first."""
        lines = [f"{name:18} {us:8.1f} us {count:6.1f} launches" for name, (us, count) in self.groups.items()]
        launches = sum(count for _, count in self.groups.values())
        idle = f"idle inside {self.idle_inside:.1%}, between {self.idle_between:.2%}"
        return "\n".join([*lines, f"{'step':18} {self.step_us:8.1f} us {launches:6.1f} launches; {idle}"])


def group_of(name: str) -> str:
    """The group of a kernel by its name."""
    return next((group for group, pattern in GROUPS if re.search(pattern, name)), OTHER)


def profile(step: Callable[[], None], replays: int = 20) -> Profile:
    """Trace ``replays`` back-to-back calls of ``step``, each one CUDA graph launch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with traced(path):
            for _ in range(replays):
                step()
        events = json.loads(path.read_text())["traceEvents"]
    kernels = [
        Kernel(e["name"], float(e["ts"]), float(e["dur"]), e.get("args", {}).get("correlation", 0))
        for e in events
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    return summarise(kernels)


def summarise(kernels: Sequence[Kernel]) -> Profile:
    """Add up. What is not part of a graph launch (a launch with few kernels) is left out of the groups."""
    sizes = Counter(kernel.launch for kernel in kernels)
    graphs = {launch for launch, count in sizes.items() if 2 * count > max(sizes.values())}
    idle = idle_of([Span(k.start, k.start + k.length, k.launch) for k in kernels])
    times: dict[str, list[float]] = {}
    for kernel in kernels:
        if kernel.launch in graphs:
            times.setdefault(kernel.name, []).append(kernel.length)
    each = len(graphs)
    names = [(name, sum(values) / each, len(values) / each) for name, values in times.items()]
    groups: dict[str, tuple[float, float]] = {}
    for name, us, count in names:
        total, launches = groups.get(group_of(name), (0.0, 0.0))
        groups[group_of(name)] = (total + us, launches + count)
    return Profile(
        step_us=idle.window_us / each,
        groups=dict(sorted(groups.items(), key=lambda item: -item[1][0])),
        kernels=sorted(names, key=lambda item: -item[1]),
        idle_inside=idle.inside,
        idle_between=idle.between,
    )

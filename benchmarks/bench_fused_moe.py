"""``fused_moe`` against the floor and against what others offer: correctness first, then time.

One CUDA graph replay a sample, 256 MB written before each (cold L2), two events around it, nothing
subtracted, the median reported. The floor is ``shapes.LayerShape.floor_us``.

    python benchmarks/bench_fused_moe.py --peers --csv out.csv --plot out.png       # the whole registry
    python benchmarks/bench_fused_moe.py --shapes mixtral --tokens 64,8192 --profile
    python benchmarks/bench_fused_moe.py --layers                                   # as in a decode step's graph
"""

from __future__ import annotations

import argparse
import csv
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import moe_layers
import peers
import torch
from moe_points import checked, floor_of, tuner_of
from moe_steps import print_steps
from shapes import SHAPES, TOKENS, LayerShape, peer_fraction
from torch import Tensor

from moe_ops.fused_moe_config import choose_plan
from moe_ops.graph_timer import GraphTimer
from moe_ops.random_layer import Answer

SLACK_US = 10.0  # the aim where the floor is short
PEER_MAX_ERROR = 1e-2  # others round more often


@dataclass
class Point:
    """One line of the table."""

    shape: str
    tokens: int
    us: float
    floor_us: float
    fraction: float
    above_us: float
    error: float
    known_peer: float | None
    grouped_mm_us: float | None = None
    chain_us: float | None = None
    invariant_us: float | None = None
    plan: str = ""

    def line(self) -> str:
        ratio = f"{self.fraction / self.known_peer:5.2f}" if self.known_peer else "    -"
        rivals = [us for us in (self.grouped_mm_us, self.chain_us) if us]
        faster = f"{min(rivals) / self.us:5.2f}" if rivals else "    -"
        invariant = f"{self.invariant_us / self.us:5.2f}" if self.invariant_us else "    -"
        return (
            f"{self.shape:16} {self.tokens:5d} {self.us:9.1f} {self.floor_us:9.1f} {self.fraction:6.3f} "
            f"{self.above_us:8.1f} {self.error:9.1e} {ratio} {faster} {invariant} {'ok' if self.reached() else 'BELOW'}"
        )

    def reached(self) -> bool:
        """The aims: close to the floor where it is short or set by memory, a fraction of it at many tokens."""
        if self.tokens > 512:
            wanted = 0.60 if self.tokens < 8192 or self.shape == "qwen3-30b-ep8" else 0.70
            return self.fraction >= wanted
        return self.above_us <= SLACK_US if self.floor_us < 100 else self.fraction >= 0.93


HEADER = "shape            rows        us  floor us  frac.    above     error  vsref vsrun invar"


def peer_us(name: str, call: Callable[[], Tensor], answer: Answer, timer: GraphTimer, repeats: int) -> float | None:
    """Time of another implementation; None, and a line that says so, where its result is wrong."""
    try:
        checked(name, call, answer, PEER_MAX_ERROR)
    except AssertionError as wrong:
        print(f"    {wrong}", flush=True)
        return None
    return timer.median_us(call, repeats)


def measure(layer: LayerShape, tokens: int, timer: GraphTimer, args: argparse.Namespace) -> Point:
    tuner, name = tuner_of(layer, tokens, timer), f"{layer.name} T={tokens}"
    answer = Answer(tuner)
    error = checked(name, lambda: tuner.call(None), answer)
    floor, us = floor_of(layer, tuner), timer.median_us(lambda: tuner.call(None), args.repeats)
    plan = choose_plan(tuner.shape, torch.cuda.get_device_name())
    point = Point(
        layer.name, tokens, us, floor, floor / us, us - floor, error, peer_fraction(layer, tokens), plan=str(plan)
    )
    if args.invariant:
        fixed = choose_plan(tuner.shape, torch.cuda.get_device_name(), batch_invariant=True)
        checked(f"{name}, batch-invariant", lambda: tuner.call(fixed), answer)
        point.invariant_us = timer.median_us(lambda: tuner.call(fixed), args.repeats)
    if args.peers:
        for field, make in (("grouped_mm_us", peers.transformers_grouped_mm), ("chain_us", peers.grouped_mm_chain)):
            call = make(tuner.hidden, tuner.ids, tuner.weights, tuner.gate_up, tuner.down)
            setattr(point, field, peer_us(f"{name}, {make.__name__}", call, answer, timer, args.repeats))
    if args.profile:
        profile(lambda: tuner.call(None), timer)
    return point


def profile(call: Callable[[], object], timer: GraphTimer, rounds: int = 5) -> None:
    """Print the kernels of one call with their own time (eager, cold L2)."""
    call()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as trace:
        for _ in range(rounds):
            timer.flush()
            call()
        torch.cuda.synchronize()
    for event in trace.key_averages():
        if "kernel" in event.key:
            print(f"    {event.key[:60]:60} {event.device_time:8.1f} us")


def plot(points: list[Point], path: Path) -> None:
    """Time over floor, one line a shape, log-log; the diagonal is the floor."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5.5))
    for name in dict.fromkeys(point.shape for point in points):
        mine = [point for point in points if point.shape == name]
        axes.loglog([p.floor_us for p in mine], [p.us for p in mine], "o-", label=name)
    low, high = min(p.floor_us for p in points) * 0.8, max(p.us for p in points) * 1.2
    axes.loglog([low, high], [low, high], "k--", label="floor")
    axes.set_xlabel("floor, us (bytes / 4.37 TB/s or flops / 786 TFLOP/s)")
    axes.set_ylabel("measured, us (graph replay, cold L2)")
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def write_csv(points: list[Point], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(asdict(points[0])))
        writer.writeheader()
        writer.writerows(asdict(point) for point in points)


def summary(points: list[Point]) -> str:
    ratios = [p.fraction / p.known_peer for p in points if p.known_peer]
    mean = f"{statistics.geometric_mean(ratios):.2f} x the best peer figure" if ratios else ""
    return f"{sum(p.reached() for p in points)} of {len(points)} points reach their aim; geometric mean {mean}"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated names of benchmarks/shapes.py")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="comma-separated row counts")
    parser.add_argument("--repeats", type=int, default=20, help="replays a sample")
    parser.add_argument("--seconds", type=float, default=math.inf, help="no new point is begun after this long")
    parser.add_argument("--peers", action="store_true", help="time transformers' grouped_mm and a chain, too")
    parser.add_argument("--invariant", action="store_true", help="time the batch-invariant mode, too")
    parser.add_argument("--profile", action="store_true", help="print each kernel's own time")
    parser.add_argument("--clean", action="store_true", help="leave no written lines in L2 (see GraphTimer)")
    parser.add_argument("--steps", action="store_true", help="check and time align and the top-k sum, nothing else")
    parser.add_argument("--layers", action="store_true", help="time a layer in a graph of layers, nothing else")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    if unknown := [name for name in args.shapes.split(",") if name not in SHAPES]:
        parser.error(f"--shapes {','.join(unknown)}: pass some of {', '.join(SHAPES)}")
    if not all(count.isdecimal() and int(count) for count in args.tokens.split(",")):
        parser.error(f"--tokens {args.tokens}: pass counts from 1 up with commas between them, as in 1,64,8192")
    for path in (args.csv, args.plot):
        if path and not path.parent.is_dir():
            parser.error(f"{path}: there is no folder {path.parent}; make it first")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    return args


def main() -> None:
    args = options()
    timer = GraphTimer(torch.device("cuda"), args.clean)
    print(f"an empty graph takes {timer.empty_us():.1f} us", flush=True)
    wanted = [(SHAPES[s], int(t)) for s in args.shapes.split(",") for t in args.tokens.split(",")]
    if args.steps:
        print_steps(timer, args.repeats)
        return
    if args.layers:
        print(moe_layers.HEADER)
        for layer, tokens in wanted:
            print(moe_layers.line(layer, tokens, timer, args.repeats), flush=True)
            torch.cuda.empty_cache()
        return
    began, points = time.monotonic(), []
    print(HEADER, flush=True)
    for layer, tokens in wanted:
        if time.monotonic() - began > args.seconds:
            print(f"time is up before {layer.name} T={tokens}", flush=True)
            break
        points.append(measure(layer, tokens, timer, args))
        print(points[-1].line(), flush=True)
        if args.csv:  # after each point: a wrong one, or an interrupt, ends the run
            write_csv(points, args.csv)
        torch.cuda.empty_cache()
    print(summary(points))
    if args.plot and points:
        plot(points, args.plot)


if __name__ == "__main__":
    main()

"""A whole MoE layer, router to residual, in one run: lowered, not lowered, and as one would write it today.

    torchrun --nproc-per-node 4 benchmarks/bench_layer.py --shape qwen3-30b --tokens 8 --tokens 128

``lowered``, ``exact`` and ``plain`` are the same source: with all passes, with those that keep every bit, and without
``lowering``. ``today`` all-gathers the hidden states with NCCL, routes the gathered rows, runs transformers'
``grouped_mm`` over the local experts and reduce-scatters with NCCL, compiled the same way. Each is one CUDA graph of
``--layers`` layers with their own weights; rounds of them alternate, each replay starts from a barrier; a figure is the
median over replays of the slowest rank, in µs a layer. ``launches`` are kernels a layer in a profile of one replay,
router product included; their names and times go to ``--kernels``. Every result is checked before it is timed: exact
against plain to the bit (with ``--rounding compiled``: both round alike there), lowered against both others; a
difference ends the run. ``floor_us``: ``layer_models.floor`` of the rank that touches most experts; ``x_plain_most``
and ``x_today_most`` are what the two ratios would be there.
"""

from __future__ import annotations

import csv
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import torch.distributed as dist
import typer
from layer_models import SHAPES, Seen, Weights, floor, make_weights, ours, today, touched_experts
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lowering
import moe_ops

NEAR = 2.0  # steps of bf16 between two logits that two products may order differently


class DifferentResults(Exception):
    """Two ways to compute a layer do not agree; names the layer, and the rows."""


@dataclass
class Variant:
    """One compiled and captured way to compute the layers."""

    name: str
    graph: torch.cuda.CUDAGraph
    result: Tensor
    compile_s: float
    layers: int
    kernels: list[tuple[str, float]] = field(default_factory=list)  # name, µs, of one replay

    @property
    def launches(self) -> float:
        """Kernels and copies a layer."""
        return len(self.kernels) / self.layers


def capture(name: str, function: Callable[[], Tensor], layers: int) -> Variant:
    """Compile, run, capture, and note the kernels of one replay."""
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=False)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), torch.cuda.stream(stream):
        begin = time.perf_counter()
        compiled()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
        for _ in range(2):
            compiled()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = compiled()
    return Variant(name, graph, result, seconds, layers, kernels_of(graph))


def kernels_of(graph: torch.cuda.CUDAGraph) -> list[tuple[str, float]]:
    """Kernels and copies on the device in one replay, in order."""
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return [(e.name, e.time_range.elapsed_us()) for e in sorted(events, key=lambda e: e.time_range.start)]


def alternate(variants: list[Variant], replays: int) -> dict[str, float]:
    """µs a layer of each variant: median over replays, of the slowest rank; rounds of all of them alternate."""
    times: dict[str, list[float]] = {variant.name: [] for variant in variants}
    for _ in range(replays):
        for variant in variants:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            dist.barrier()
            begin.record()
            variant.graph.replay()
            end.record()
            torch.cuda.synchronize()
            times[variant.name].append(begin.elapsed_time(end) * 1e3 / variant.layers)
    worst = torch.tensor([statistics.median(values) for values in times.values()], device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return dict(zip(times, worst.tolist(), strict=True))


def measure(
    name: str, tokens: int, layers: list[Weights], replays: int, rounding: str, group: str
) -> tuple[dict, list[Variant]]:
    """One line of the table: T = ``tokens`` live rows on every rank."""
    shape, rank, world = SHAPES[name], dist.get_rank(), dist.get_world_size()
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16, generator=_generator(rank))
    count = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    variants = []
    for variant, inexact in (("lowered", True), ("exact", False), ("plain", None)):
        lowering.disable() if inexact is None else lowering.enable(rounding=rounding, inexact=inexact)
        variants.append(capture(variant, lambda: ours(x, layers, count, shape, rank, world, group), len(layers)))
    reference = str(dist.group.WORLD.group_name)  # pyright: ignore[reportOptionalMemberAccess]
    variants.append(capture("today", lambda: today(x, layers, shape, rank, world, reference), len(layers)))
    seen: list[Seen] = []
    with torch.no_grad():
        ours(x, layers, count, shape, rank, world, group, seen=seen)
    replay(variants)
    _, exact, plain, _ = variants
    layer = f"{name}, W = {world}, T = {tokens}, rounding {rounding}, rank {rank}"
    if rounding == "compiled":
        check_bits(layer, exact, plain)
    errors = compare(layer, variants, torch.stack([steps for _, steps in seen]).amin(0))
    us = alternate(variants, replays)
    least = least_us(seen, name, tokens)
    line = {
        "shape": name, "W": world, "T": tokens, "rounding": rounding, "norm": layers[0].norm is not None,
        **{f"{key}_us": round(value, 1) for key, value in us.items()},
        "x_plain": round(us["plain"] / us["lowered"], 3), "x_today": round(us["today"] / us["lowered"], 3),
        "floor_us": round(least, 1),
        "x_plain_most": round(us["plain"] / least, 2), "x_today_most": round(us["today"] / least, 2),
        **{f"{v.name}_launches": round(v.launches, 1) for v in variants},
        **{f"{v.name}_compile_s": round(v.compile_s, 1) for v in variants},
        "bit_equal": torch.equal(exact.result, plain.result), "error_plain": errors[0], "error_today": errors[1],
    }  # fmt: skip
    return line, variants


def least_us(seen: list[Seen], name: str, tokens: int) -> float:
    """The floor of a layer, for the routing that was measured and the rank that touches most experts."""
    shape, rank, world = SHAPES[name], dist.get_rank(), dist.get_world_size()
    local = shape.experts // world
    touched = torch.tensor([touched_experts(seen, rank * local, local)], device="cuda")
    dist.all_reduce(touched, op=dist.ReduceOp.MAX)
    return floor(shape, world, tokens, touched.item())[-1]


def replay(variants: list[Variant]) -> None:
    """Compute every result once more, from its graph."""
    for variant in variants:
        variant.graph.replay()
    torch.cuda.synchronize()


def check_bits(layer: str, one: Variant, other: Variant) -> None:
    """Raise ``DifferentResults`` unless both results have the same bits."""
    if not torch.equal(one.result, other.result):
        rows = (one.result != other.result).any(1).nonzero().flatten().tolist()
        raise DifferentResults(f"{layer}: {one.name} and {other.name} differ in {len(rows)} rows: {rows[:8]}")


def compare(layer: str, variants: list[Variant], steps: Tensor) -> list[float]:
    """Largest difference between lowered and plain, and today, over the largest value.

    Raises ``DifferentResults`` where it is no rounding. ``steps (T,)``: of ``steps_to_a_tie``, the least of all layers.
    A near tie of a router that falls differently changes a whole row: those rows alone may differ by more.
    """
    lowered, _, plain, other = (variant.result.float() for variant in variants)
    errors = []
    for name, result, limit in (("plain", plain, 0.02), ("today", other, 0.05)):
        rows = (lowered - result).abs().amax(1) / result.abs().max()
        wrong = (~(rows.isfinite() & ((rows < limit) | (steps <= NEAR)))).nonzero().flatten().tolist()
        if wrong:
            raise DifferentResults(
                f"{layer}: lowered and {name} differ by more than {limit} of the largest value in {len(wrong)} rows "
                f"that are no near tie: {wrong[:8]}, by {[round(rows[row].item(), 4) for row in wrong[:8]]}"
            )
        errors.append(round(rows[steps > NEAR].max().item() if bool((steps > NEAR).any()) else 0.0, 4))
    return errors


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def join_group() -> int:
    """The default process group, one GPU a rank; returns the rank."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    return rank


def is_late(began: float, minutes: float) -> bool:
    """Whether any rank's time is over."""
    late = torch.tensor([float(time.monotonic() - began > 60 * minutes)], device="cuda")
    dist.all_reduce(late)
    return late.item() > 0


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(SHAPES)}; may repeat")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="rows a rank, T; may repeat")] = None,
    layers: int = 2,
    replays: int = 40,
    rounding: Annotated[list[str] | None, typer.Option(help="compiled, eager; may repeat")] = None,
    norm: Annotated[bool, typer.Option(help="layers normalise what they read, as in a model")] = False,
    minutes: Annotated[float, typer.Option(help="start no new line after this")] = 8.0,
    out: Annotated[Path | None, typer.Option(help="JSON lines are appended here")] = None,
    kernels: Annotated[Path | None, typer.Option(help="CSV of kernels a layer is appended here")] = None,
) -> None:
    """Print one table; results as JSON lines where ``--out`` says."""
    rank = join_group()
    began, lines, sizes = time.monotonic(), [], tokens or [1, 8, 32, 128]
    for name in shape or ["qwen3-30b", "deepseek-v3"]:
        sizes_of = SHAPES[name]
        ws = moe_ops.init_workspace(
            None, max_tokens_per_rank=max(sizes), hidden_size=sizes_of.hidden, top_k=sizes_of.top_k, timeout_s=60
        )
        ws.allocate()
        each = sizes_of.experts // dist.get_world_size()
        moe_ops.place_experts(ws, rank * each, each)
        stack = [make_weights(sizes_of, rank, dist.get_world_size(), seed, norm) for seed in range(layers)]
        for mode in rounding or ["compiled"]:
            for size in sizes:
                if is_late(began, minutes):
                    continue
                try:
                    line, variants = measure(name, size, stack, replays, mode, ws.group_name)
                except DifferentResults as difference:
                    end_with(difference, lines if rank == 0 else [])
                lines.append(line)
                if rank == 0:
                    write_line(out, line)
                    write_kernels(kernels, line, variants)
        ws.check()
        ws.close()
        del stack
    if rank == 0:
        report(lines)
    dist.barrier()
    os._exit(0)  # NCCL work captured in graphs can hang its own shutdown


def end_with(difference: DifferentResults, lines: list[dict]) -> NoReturn:
    """Show what there is and end this process with an error: torchrun then ends the others."""
    report(lines)
    print(f"error: {difference}", file=sys.stderr, flush=True)
    os._exit(1)


def write_kernels(path: Path | None, line: dict, variants: list[Variant]) -> None:
    """One row a kernel name: how often a layer launches it, and its µs a layer in the profile (waits included)."""
    if path is None:
        return
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        for variant in variants:
            counts = Counter(name for name, _ in variant.kernels)
            for name, count in counts.items():
                us = sum(time for other, time in variant.kernels if other == name)
                row = [*(line[key] for key in ("shape", "W", "T", "rounding")), variant.name, count / variant.layers]
                writer.writerow([*row, round(us / variant.layers, 2), name[:120]])


def write_line(path: Path | None, line: dict) -> None:
    """To the terminal and the end of ``path``, at once: what comes later may fail."""
    print(json.dumps(line), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def report(lines: list[dict]) -> None:
    """A table on the terminal, if there is anything to show."""
    if not lines:
        return
    table = Table(*lines[0], title="µs a layer")
    for line in lines:
        table.add_row(*map(str, line.values()))
    Console(width=260).print(table)


if __name__ == "__main__":
    typer.run(main)

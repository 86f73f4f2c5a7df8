"""A whole MoE layer, router to residual, three times in one run: lowered, not lowered, and as one would write it today.

    torchrun --nproc-per-node 4 benchmarks/bench_layer.py --shape qwen3-30b --tokens 8 --tokens 128

``lowered`` and ``plain`` are the same source, compiled with and without ``lowering``. ``today`` all-gathers the hidden
states with NCCL, routes the gathered rows, runs transformers' ``grouped_mm`` over the local experts and
reduce-scatters with NCCL, compiled the same way. Each is one CUDA graph of ``--layers`` layers with their own weights;
rounds of the three alternate, each replay starts from a barrier; a figure is the median over replays of the slowest
rank, in µs a layer. ``launches`` are kernels a layer in a profile of one replay, router product included. Every
result is checked before it is timed: lowered against plain, both against today.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import lowering
import moe_ops

ops = torch.ops.moe_ep


@dataclass(frozen=True)
class Shape:
    """Sizes of one model's MoE layer; experts are split evenly over the ranks."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    shared: int  # inner size of the shared expert, 0 without one


SHAPES = {
    "qwen3-30b": Shape(128, 8, 2048, 768, 0),
    "deepseek-v3": Shape(256, 8, 7168, 2048, 2048),
    "qwen2-moe": Shape(60, 4, 2048, 1408, 5632),
    "tiny": Shape(8, 2, 64, 32, 32),
}


@dataclass
class Weights:
    """One layer on one rank: router (H, E), experts (E_l, 2I, H) and (E_l, H, I), shared (H, 2S) and (S, H)."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor | None
    shared_down: Tensor | None


def make_weights(shape: Shape, rank: int, world: int, seed: int) -> Weights:
    """Random bf16 weights; router and shared expert are equal on all ranks."""

    def tensor(key: int, *size: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(1000 * seed + key)
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16) * size[-1] ** -0.5

    local = shape.experts // world
    shared = (
        [tensor(1, shape.hidden, 2 * shape.shared), tensor(2, shape.shared, shape.hidden)] if shape.shared else None
    )
    return Weights(
        tensor(0, shape.hidden, shape.experts),
        tensor(10 + 2 * rank, local, 2 * shape.inner, shape.hidden),
        tensor(11 + 2 * rank, local, shape.hidden, shape.inner),
        *(shared or (None, None)),
    )


def route(x: Tensor, weights: Weights, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax router with renormalised weights (T, K), and ids."""
    chosen, ids = (x @ weights.router).float().softmax(-1).topk(top_k, -1)
    return (chosen / chosen.sum(-1, keepdim=True)).to(x.dtype), ids


def add_shared(routed: Tensor, x: Tensor, weights: Weights) -> Tensor:
    """``routed`` plus the shared expert of x, if there is one."""
    if weights.shared_gate_up is None or weights.shared_down is None:
        return routed
    gate, up = (x @ weights.shared_gate_up).chunk(2, -1)
    return routed + (F.silu(gate) * up) @ weights.shared_down


def ours(x: Tensor, layers: list[Weights], count: Tensor, shape: Shape, rank: int, world: int, group: str) -> Tensor:
    """The layers with the ops of ``moe_ep``; every layer asks for its metadata, as models do."""
    start, gathered = rank * (shape.experts // world), world * x.shape[0]
    for weights in layers:
        metadata = ops.metadata_update(count, group)
        chosen, ids = route(x, weights, shape.top_k)
        rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, count, metadata, gathered, group)
        y = ops.fused_moe(rows, ids, chosen, weights.gate_up, weights.down, metadata[0:1], start)
        x = x + add_shared(ops.rsv_combine(y, count, metadata, x.shape[0], group), x, weights)
    return x


class _Experts:
    """What transformers' ``grouped_mm`` reads of its module."""

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self, weights: Weights):
        self.gate_up_proj, self.down_proj = weights.gate_up, weights.down
        self.num_experts = weights.gate_up.shape[0]

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up


def today(x: Tensor, layers: list[Weights], shape: Shape, rank: int, world: int, group: str) -> Tensor:
    """NCCL all-gather, transformers' grouped_mm, NCCL reduce-scatter."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    local = shape.experts // world
    for weights in layers:
        rows = collectives.all_gather_tensor(x, 0, group) if world > 1 else x
        chosen, ids = route(rows, weights, shape.top_k)
        ids = ids - rank * local
        ids = torch.where((ids >= 0) & (ids < local), ids, local)
        y = grouped_mm_experts_forward(_Experts(weights), rows, ids, chosen)  # pyright: ignore[reportArgumentType]
        routed = collectives.reduce_scatter_tensor(y, "sum", 0, group) if world > 1 else y
        x = x + add_shared(routed, x, weights)
    return x


@dataclass
class Variant:
    """One compiled and captured way to compute the layers."""

    name: str
    graph: torch.cuda.CUDAGraph
    result: Tensor
    compile_s: float
    launches: float = 0.0


def capture(name: str, function: Callable[[], Tensor], layers: int) -> Variant:
    """Compile, run, capture, and count the kernels of one replay."""
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
    variant = Variant(name, graph, result, seconds)
    variant.launches = count_kernels(graph, name) / layers
    return variant


def count_kernels(graph: torch.cuda.CUDAGraph, name: str) -> int:
    """Kernels and copies on the device in one replay; their names with MOE_EP_NAMES set."""
    dist.barrier()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        graph.replay()
        torch.cuda.synchronize()
    events = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    if os.environ.get("MOE_EP_NAMES") and dist.get_rank() == 0:
        print(name, *(f"  {e.time_range.elapsed_us():7.1f} us {e.name[:90]}" for e in events), sep="\n")
    return len(events)


def alternate(variants: list[Variant], replays: int, layers: int) -> dict[str, float]:
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
            times[variant.name].append(begin.elapsed_time(end) * 1e3 / layers)
    worst = torch.tensor([statistics.median(values) for values in times.values()], device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return dict(zip(times, worst.tolist(), strict=True))


def measure(name: str, tokens: int, layers: list[Weights], replays: int, rounding: str, group: str) -> dict:
    """One line of the table: T = ``tokens`` live rows on every rank."""
    shape, rank, world = SHAPES[name], dist.get_rank(), dist.get_world_size()
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16, generator=_generator(rank))
    count = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    variants = []
    for variant in ("lowered", "plain"):
        lowering.enable(rounding=rounding) if variant == "lowered" else lowering.disable()
        variants.append(capture(variant, lambda: ours(x, layers, count, shape, rank, world, group), len(layers)))
    reference = str(dist.group.WORLD.group_name)  # pyright: ignore[reportOptionalMemberAccess]
    variants.append(capture("today", lambda: today(x, layers, shape, rank, world, reference), len(layers)))
    error = compare(variants)
    us = alternate(variants, replays, len(layers))
    lowered, plain, _ = variants
    return {
        "shape": name, "W": world, "T": tokens, "rounding": rounding,
        **{f"{key}_us": round(value, 2) for key, value in us.items()},
        "x_plain": round(us["plain"] / us["lowered"], 3), "x_today": round(us["today"] / us["lowered"], 3),
        **{f"{v.name}_launches": round(v.launches, 2) for v in variants},
        **{f"{v.name}_compile_s": round(v.compile_s, 1) for v in variants},
        "bit_equal": torch.equal(lowered.result, plain.result), "error_today": error,
    }  # fmt: skip


def compare(variants: list[Variant]) -> float:
    """Largest difference between lowered and today, relative to the largest value; raises where it is no rounding."""
    for variant in variants:
        variant.graph.replay()
    torch.cuda.synchronize()
    lowered, plain, other = (variant.result.float() for variant in variants)
    scale = other.abs().max()
    errors = [((lowered - result).abs().max() / scale).item() for result in (plain, other)]
    assert errors[0] < 0.02 and errors[1] < 0.05, errors
    return round(errors[1], 5)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cuda").manual_seed(seed)


def main(
    shape: Annotated[list[str] | None, typer.Option(help=f"one of {', '.join(SHAPES)}; may repeat")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="rows a rank, T; may repeat")] = None,
    layers: int = 4,
    replays: int = 40,
    rounding: Annotated[list[str] | None, typer.Option(help="compiled, eager; may repeat")] = None,
    minutes: Annotated[float, typer.Option(help="start no new line after this")] = 8.0,
    out: Annotated[Path | None, typer.Option(help="JSON lines are appended here")] = None,
) -> None:
    """Print one table; results as JSON lines where ``--out`` says."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    began, lines, sizes = time.monotonic(), [], tokens or [1, 8, 32, 128]
    for name in shape or ["qwen3-30b", "deepseek-v3"]:
        sizes_of = SHAPES[name]
        ws = moe_ops.init_workspace(
            None, max_tokens_per_rank=max(sizes), hidden_size=sizes_of.hidden, top_k=sizes_of.top_k, timeout_s=60
        )
        ws.allocate()
        stack = [make_weights(sizes_of, rank, dist.get_world_size(), seed) for seed in range(layers)]
        for mode in rounding or ["compiled", "eager"]:
            for size in sizes:
                late = torch.tensor([float(time.monotonic() - began > 60 * minutes)], device="cuda")
                dist.all_reduce(late)
                if late.item() == 0:
                    lines.append(measure(name, size, stack, replays, mode, ws.group_name))
                    if rank == 0:
                        print(json.dumps(lines[-1]), flush=True)
        ws.check()
        ws.close()
        del stack
    if rank == 0 and lines:
        report(lines, out)
    dist.barrier()
    os._exit(0)  # NCCL work captured in graphs can hang its own shutdown


def report(lines: list[dict], out: Path | None) -> None:
    """A table on the terminal, and JSON lines in ``out``."""
    table = Table(*lines[0], title="µs a layer")
    for line in lines:
        table.add_row(*map(str, line.values()))
    Console(width=220).print(table)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    typer.run(main)

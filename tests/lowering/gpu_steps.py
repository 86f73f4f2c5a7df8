"""Whole steps and layers on GPUs, as ``gpu_checks.py`` runs them: what the compiled code and a profile of it show."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import graphs
import lowering
import moe_ops
from graphs.checkpoints import tiny_model

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
PRODUCTS = "thin_linear|gemm|nvjet|splitk|cutlass"  # of a router: all else is behind its logits
MOST_LAUNCHES = 6


def check_step(family: str, group: Any, transport: str) -> None:
    """The decode step of a model: one graph, and in Inductor's code no copy beside an op, not once a step either.

    Nor is there one in a profile of it, which also shows what the ops launch inside.
    """
    top_k = {"num_experts_per_tok": 4} if family == "gpt_oss" else {}  # as the real one: 8 bytes of weights a row
    model = graphs.shard_experts(tiny_model(family, torch.bfloat16, **top_k).cuda(), group, max_tokens_per_rank=16)
    loop = graphs.DecodeLoop(model, batch=4, max_len=8, compile=False)
    loop.prefill([[1, 2, 3, 4]] * 4)
    for inexact in (False, True):
        lowering.enable(rounding="compiled", inexact=inexact)
        with loop._declared(loop.batch, loop.group_batch, loop._step.active):
            explanation = lowering.explain(loop._step)
        assert explanation.compiled_graphs == 1 and not explanation.graph_breaks
        assert explanation.partitions <= 1 and explanation.cudagraph_skips == 0
        assert explanation.ops["metadata_update"] == 1
        assert explanation.copies == [], (inexact, explanation.copies)
        if transport in ("p2p", "multicast"):
            layer = "moe_layer_shared" if family == "deepseek_v3" else "moe_layer"
            assert explanation.ops[layer] == 2, explanation.ops
    if transport in ("p2p", "multicast"):
        with loop._declared(loop.batch, loop.group_batch, loop._step.active):
            kernels = kernels_of_a_step(loop._step)
        print(f"{family}, rank {dist.get_rank()}: {len(kernels)} launches a step", flush=True)
        assert sum("combine_add" in name for name in kernels) == 2, kernels
        foreign = [name for name in kernels if not name.startswith("triton_")]  # Inductor's were judged by its schedule
        assert not [name for name in foreign if re.search("copy|clone", name, re.IGNORECASE)], foreign


def kernels_of_a_step(step: Callable) -> list[str]:
    """What a replay of the compiled step launches, in order."""
    kernels_of = _benchmark().kernels_of
    torch._dynamo.reset()
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            compiled()
        return [name for name, _ in kernels_of(SimpleNamespace(replay=compiled))]


def check_launches(group: Any) -> None:
    """Qwen3-30B's layer at decode: at most 6 launches between router logits and residual, from a profile."""
    bench = _benchmark()
    rank, world, shape = dist.get_rank(), dist.get_world_size(), bench.SHAPES["qwen3-30b"]
    ws = moe_ops.init_workspace(group, max_tokens_per_rank=32, hidden_size=shape.hidden, top_k=shape.top_k)
    ws.allocate()
    each = shape.experts // world
    moe_ops.place_experts(ws, rank * each, each)
    stack = [bench.make_weights(shape, rank, world, seed) for seed in range(2)]
    for rounding in ("eager", "compiled"):
        lowering.enable(rounding=rounding, inexact=True)
        for rows in (1, 32):
            x = torch.randn(rows, shape.hidden, device="cuda").bfloat16()
            count = torch.tensor([rows], dtype=torch.int32, device="cuda")

            def layers(x: torch.Tensor = x, count: torch.Tensor = count) -> torch.Tensor:
                return bench.ours(x, stack, count, shape, rank, world, ws.group_name)

            names = [name for name, _ in bench.capture("lowered", layers, len(stack)).kernels]
            behind = [name for name in names if not re.search(f"metadata|{PRODUCTS}", name, re.IGNORECASE)]
            if rank == 0:
                print(f"launches: {rounding}, {rows} rows, {len(behind) / len(stack)} a layer of {names}", flush=True)
            assert len(behind) <= MOST_LAUNCHES * len(stack), (rounding, rows, names)
    ws.check()


def _benchmark() -> Any:
    if BENCHMARKS not in sys.path:
        sys.path.insert(0, BENCHMARKS)
    import bench_layer

    return bench_layer

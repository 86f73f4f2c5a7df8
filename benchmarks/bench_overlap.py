"""How much of a shared expert its layer hides: beside the layer, behind it, and each alone, in one run.

    torchrun --nproc-per-node 4 benchmarks/bench_overlap.py --shape deepseek-v3 --tokens 8

``beside`` is the lowered layer, ``serial`` the same without the pass ``overlap_shared``, ``rest`` the layer without its
shared expert (the routers look at one fixed batch, so that all choose the same experts), ``shared`` the shared expert
alone. ``exact_beside`` and ``exact_serial`` use the library's products, ``beside`` and ``serial`` thin kernels where
there are few rows. ``hidden`` = (serial - beside) / min(serial - rest, rest): 1 where the shorter side costs nothing.
``most``: what ``hidden`` would be if ``beside`` took the least time possible, ``layer_models.floor`` plus what ``rest``
takes above its own. Method as in ``bench_layer.py``. Before anything is timed the exact ones are compared to the bit; a
difference ends the run.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from bench_layer import DifferentResults, Variant, alternate, capture, check_bits, end_with, is_late, join_group, replay
from layer_models import SHAPES, Seen, Weights, floor, make_weights, ours, shared_alone, touched_experts
from torch import Tensor

import lowering
import moe_ops


def variants_of(name: str, x: Tensor, count: Tensor, layers: list[Weights], rounding: str, group: str) -> list[Variant]:
    """All that is compared, compiled and captured."""
    shape, rank, world = SHAPES[name], dist.get_rank(), dist.get_world_size()
    bare = [replace(weights, shared_gate_up=None, shared_down=None) for weights in layers]

    def layer(stack: list[Weights]) -> Tensor:
        return ours(x, stack, count, shape, rank, world, group, fixed=x)

    found = []
    for prefix, inexact in (("", True), ("exact_", False)):
        for which, without in (("beside", []), ("serial", ["overlap_shared"])):
            lowering.enable(without=without, rounding=rounding, inexact=inexact)
            found.append(capture(prefix + which, lambda: layer(layers), len(layers)))
    lowering.enable(without=[], rounding=rounding, inexact=True)
    found.append(capture("rest", lambda: layer(bare), len(layers)))
    found.append(capture("shared", lambda: shared_alone(x, layers), len(layers)))
    return found


def measure(name: str, tokens: int, layers: list[Weights], replays: int, rounding: str, group: str) -> dict:
    """One line: µs a layer of each variant, what share is hidden, and what share could be."""
    shape, rank, world = SHAPES[name], dist.get_rank(), dist.get_world_size()
    generator = torch.Generator("cuda").manual_seed(rank)
    x = torch.randn(tokens, shape.hidden, device="cuda", dtype=torch.bfloat16, generator=generator)
    count = torch.tensor([tokens], dtype=torch.int32, device="cuda")
    variants = variants_of(name, x, count, layers, rounding, group)
    replay(variants)
    exact = {variant.name: variant for variant in variants if variant.name.startswith("exact")}
    layer = f"{name}, W = {world}, T = {tokens}, rounding {rounding}, rank {rank}"
    check_bits(layer, exact["exact_beside"], exact["exact_serial"])
    us = alternate(variants, replays)
    shorter = min(us["serial"] - us["rest"], us["rest"])
    seen: list[Seen] = []
    ours(x, layers, count, shape, rank, world, group, fixed=x, seen=seen)
    local = shape.experts // world
    touched = torch.tensor([touched_experts(seen, rank * local, local)], device="cuda")
    dist.all_reduce(touched, op=dist.ReduceOp.MAX)
    least, alone = (floor(of, world, tokens, touched.item())[-1] for of in (shape, replace(shape, shared=0)))
    return {
        "shape": name, "W": world, "T": tokens, "rounding": rounding,
        **{f"{key}_us": round(value, 1) for key, value in us.items()},
        "hidden": round((us["serial"] - us["beside"]) / shorter, 2),
        "most": round((us["serial"] - us["rest"] - (least - alone)) / shorter, 2),
        "floor_us": round(least, 1), "touched": round(touched.item(), 1),
        "bit_equal": True,
    }  # fmt: skip


def main(
    shape: Annotated[list[str] | None, typer.Option(help="deepseek-v3, qwen2-moe, tiny; may repeat")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="rows a rank, T; may repeat")] = None,
    layers: int = 2,
    replays: int = 40,
    rounding: str = "compiled",
    minutes: Annotated[float, typer.Option(help="start no new line after this")] = 4.0,
    out: Annotated[Path | None, typer.Option(help="JSON lines are appended here")] = None,
) -> None:
    """One JSON line a measurement."""
    rank, began, sizes = join_group(), time.monotonic(), tokens or [1, 8, 32, 128]
    for name in shape or ["deepseek-v3", "qwen2-moe"]:
        of = SHAPES[name]
        ws = moe_ops.init_workspace(
            None, max_tokens_per_rank=max(sizes), hidden_size=of.hidden, top_k=of.top_k, timeout_s=60
        )
        ws.allocate()
        stack = [make_weights(of, rank, dist.get_world_size(), seed) for seed in range(layers)]
        for size in sizes:
            if is_late(began, minutes):
                continue
            try:
                line = json.dumps(measure(name, size, stack, replays, rounding, ws.group_name))
            except DifferentResults as difference:
                end_with(difference, [])
            if rank == 0:
                print(line, flush=True)
                if out is not None:
                    out.open("a").write(line + "\n")
        ws.check()
        ws.close()
        del stack
    dist.barrier()
    os._exit(0)  # NCCL work captured in graphs can hang its own shutdown


if __name__ == "__main__":
    typer.run(main)

"""Whole steps and layers on GPUs, as ``gpu_checks.py`` runs them: what the compiled code and a profile of it show."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

import graphs
import lowering
import moe_ops
from graphs.checkpoints import tiny_model
from moe_ops.workspace import get_workspace

BENCHMARKS = str(Path(__file__).resolve().parents[2] / "benchmarks")
PRODUCTS = "thin_linear|gemm|nvjet|splitk|cutlass"  # of a router: all else is behind its logits
MOST_LAUNCHES = 6
# Not around the layers: a model's own attention copies. DeepSeek-V3 puts its keys together from products and a cache,
# and its values are every other part of a product, which ``decode_attention`` makes contiguous.
ATTENTION = {"thin_linear": "thin_linear", "decode_attention": "attend|merge", "rotate_and_attend": "attend|merge"}


def check_step(family: str, group: Any, transport: str) -> None:
    """The decode step of a model, in a workspace that lives as long as the check: see ``_check_step``."""
    try:
        _check_step(family, group, transport)
    finally:
        torch._dynamo.reset()  # CUDA graphs that hold the ops
        if (workspace := get_workspace(group.group_name)) is not None:
            workspace.close()


def _check_step(family: str, group: Any, transport: str) -> None:
    """One graph, and in Inductor's code no copy beside an op of a layer, not once a step either.

    Nor is there one in a profile of it, which also shows what the ops launch inside.
    """
    top_k = {"num_experts_per_tok": 4} if family == "gpt_oss" else {}  # as the real one: 8 bytes of weights a row
    model = graphs.shard_experts(tiny_model(family, torch.bfloat16, **top_k).cuda(), group, max_tokens_per_rank=16)
    # of fewer rows torch may pad the operand of a product of its own to 8 (pad_mm): a copy of what a layer wrote
    loop = graphs.DecodeLoop(model, batch=8, max_len=8, compile=False)
    loop.prefill([[1, 2, 3, 4]] * 8)
    for inexact in (False, True):
        lowering.enable(rounding="compiled", inexact=inexact)
        with loop._declared(loop.batch, loop.group_batch, loop._step.active):
            explanation = lowering.explain(loop._step)
        assert explanation.compiled_graphs == 1 and not explanation.graph_breaks
        assert explanation.partitions <= 1 and explanation.cudagraph_skips == 0
        assert explanation.ops["metadata_update"] == 1
        copies = [copy for copy in explanation.copies if copy.op not in ATTENTION]
        assert not copies, (inexact, copies)
        if transport in ("p2p", "multicast"):
            layer = "moe_layer_shared" if family == "deepseek_v3" else "moe_layer"
            assert explanation.ops[layer] == 2, explanation.ops
    if transport in ("p2p", "multicast"):
        with loop._declared(loop.batch, loop.group_batch, loop._step.active):
            kernels = kernels_of_a_step(loop._step)
        print(f"{family}, rank {dist.get_rank()}: {len(kernels)} launches a step", flush=True)
        assert sum("combine_add" in name for name in kernels) == 2, kernels
        assert not (found := copies_beside_ours(kernels)), (found, kernels)


def copies_beside_ours(kernels: list[str]) -> list[tuple[str, str]]:
    """Copies among ``kernels``, in launch order, that come right before or behind a kernel of a layer, and that kernel.

    An op that copies does so there. Inductor's kernels are not judged by their names: its schedule was. Nor is what a
    call of torch copies for itself: with torch 2.11 the products of GPT-OSS's own attention do, of a query and weights
    of one row, whose stride Inductor gives as 0.
    """
    others, found = "triton_|nvjet|.*(" + "|".join(ATTENTION.values()) + ")", []
    for pair in pairwise(kernels):
        for copy, beside in (pair, pair[::-1]):
            ours = re.fullmatch(r"\w+", beside) and not re.match(others, beside)
            if ours and not copy.startswith("triton_") and re.search("copy|clone|memcpy", copy, re.IGNORECASE):
                found.append((copy, beside))
    return found


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

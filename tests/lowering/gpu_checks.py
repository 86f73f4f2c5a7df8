"""Lowering on GPUs: bits of the joined kernels, one CUDA graph, no copies, changing counts.

torchrun --nproc-per-node 2 tests/lowering/gpu_checks.py
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch import Tensor

import lowering
import moe_ops
from lowering import torch_compat

ops = torch.ops.moe_ep
T, H, K, E, I, LAYERS = 8, 1024, 4, 16, 256, 3


def tensor(seed: int, *size: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16) * scale


def make_model(group: str, rank: int, world: int) -> Callable[[Tensor, Tensor], Tensor]:
    """LAYERS layers with a shared product and a residual; each asks for its own metadata."""
    local = E // world
    router, shared = tensor(1, H, E, scale=H**-0.5), tensor(2, H, H, scale=H**-0.5)
    gate_up = [tensor(10 + 100 * rank + n, local, 2 * I, H, scale=H**-0.5) for n in range(LAYERS)]
    down = [tensor(50 + 100 * rank + n, local, H, I, scale=I**-0.5) for n in range(LAYERS)]

    def model(x: Tensor, count: Tensor) -> Tensor:
        for n in range(LAYERS):
            metadata = ops.metadata_update(count, group)
            chosen, ids = (x @ router).softmax(-1).topk(K, -1)
            rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, count, metadata, world * T, group)
            y = ops.fused_moe(rows, ids, chosen, gate_up[n], down[n], metadata[0:1], rank * local)
            x = x + (ops.rsv_combine(y, count, metadata, T, group) + x @ shared)
        return x

    return model


def check_joined_kernel(group: str, rank: int, world: int) -> None:
    """fused_moe_combine equals the ops one by one, bit for bit, for few and many rows, each a few times."""
    local = E // world
    for rows in (1, 3, T, 64):
        gathered = world * rows
        gate_up, down = tensor(3 + rank, local, 2 * I, H, scale=H**-0.5), tensor(7 + rank, local, H, I, scale=I**-0.5)
        generator = torch.Generator("cuda").manual_seed(5)
        ids = torch.randint(-1, E, (gathered, K), generator=generator, device="cuda")
        weights = torch.rand(gathered, K, generator=generator, device="cuda")
        hidden, addends = tensor(4, gathered, H), [tensor(8 + rank, rows, H), tensor(9 + rank, rows, H)]
        for live in {0, rows // 2, rows}:
            count = torch.tensor([max(live - rank, 0)], dtype=torch.int32, device="cuda")
            metadata = ops.metadata_update(count, group)
            y = ops.fused_moe(hidden, ids, weights, gate_up, down, metadata[0:1], rank * local)
            alone = ops.rsv_combine(y, count, metadata, rows, group)
            arguments = (hidden, ids, weights, gate_up, down, count, metadata, rank * local, rows)
            assert torch.equal(ops.fused_moe_combine(*arguments, [], group), alone), (rows, live)
            joined = ops.fused_moe_combine(*arguments, addends, group)
            assert torch.equal(joined, alone + addends[0] + addends[1]), (rows, live)


def check_one_graph(model: Callable, x: Tensor, rounding: str, transport: str) -> None:
    """One CUDA graph, no partition, no skip, no copy beside an op; every layer joined."""
    lowering.enable(rounding=rounding)
    count = torch.tensor([T], dtype=torch.int32, device="cuda")
    explanation = lowering.explain(model, x, count, mode="reduce-overhead")
    if dist.get_rank() == 0:
        print(explanation, flush=True)
    assert explanation.compiled_graphs == 1 and not explanation.graph_breaks
    assert explanation.partitions <= 1 and explanation.cudagraph_skips == 0
    assert explanation.copies == []
    assert explanation.ops["metadata_update"] == 1
    if transport in ("p2p", "multicast"):
        assert explanation.ops["fused_moe_combine"] == LAYERS, explanation.ops


def replay(model: Callable, x: Tensor, counts: list[int]) -> list[Tensor]:
    """Results of a CUDA graph over changing live counts."""
    torch._dynamo.reset()
    before = torch_compat.compile_counts()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    count = torch.zeros(1, dtype=torch.int32, device="cuda")
    results = []
    with torch.no_grad():
        for live in [T, T, T, *counts]:
            count.fill_(live)
            torch.compiler.cudagraph_mark_step_begin()
            results.append(compiled(x, count).clone())
    after = torch_compat.compile_counts()
    assert after.graphs - before.graphs == 1 and after.cuda_graphs >= 1, (before, after)
    return results[3:]


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    world = dist.get_world_size()
    ws = moe_ops.init_workspace(None, max_tokens_per_rank=64, hidden_size=H, top_k=K, timeout_s=60)
    ws.allocate()
    check_joined_kernel(ws.group_name, rank, world)
    model, x = make_model(ws.group_name, rank, world), tensor(20 + rank, T, H)
    for rounding in ("compiled", "eager"):
        check_one_graph(model, x, rounding, ws.transport)
    counts = [max(live - rank, 0) for live in (T, 3, 0, 5, T)]
    lowering.enable(rounding="compiled")
    lowered = replay(model, x, counts)
    lowering.disable()
    plain = replay(model, x, counts)
    for n, (one, other) in enumerate(zip(lowered, plain, strict=True)):
        assert torch.equal(one[: counts[n]], other[: counts[n]]), n
    ws.check()
    print(f"rank {rank} of {world}: lowering checks passed on {ws.transport}", flush=True)
    dist.barrier()
    os._exit(0)  # NCCL work captured in graphs can hang its own shutdown


if __name__ == "__main__":
    main()

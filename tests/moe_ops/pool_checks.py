"""On a GPU: symmetric memory set up while CUDA-graph trees warm a graph up (``moe_ops/pools.py``).

torchrun --nproc-per-node 2 tests/moe_ops/pool_checks.py
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import moe_ops


def main() -> None:
    rank = int(os.environ["RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    group = dist.group.WORLD
    moe_ops.init_workspace(group, max_tokens_per_rank=8, hidden_size=64, top_k=2, transport="p2p", timeout_s=20)
    tokens = torch.full((1,), rank + 1, dtype=torch.int32, device="cuda")

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def step(count: torch.Tensor) -> torch.Tensor:
        return torch.ops.moe_ep.metadata_update(count, group.group_name) + 0

    with torch.no_grad():
        for _ in range(4):  # the first call allocates, inside the graph's warm-up; the third replays
            torch.compiler.cudagraph_mark_step_begin()
            metadata = step(tokens).tolist()
    size = dist.get_world_size()
    assert metadata == [size * (size + 1) // 2, rank * (rank + 1) // 2, size], metadata
    print(f"rank {rank}: symmetric memory outlives the graph that set it up: passed", flush=True)
    dist.barrier()
    os._exit(0)


if __name__ == "__main__":
    main()

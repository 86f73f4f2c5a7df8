"""Which launch (blocks, warps, chunks) of a communication kernel is fastest, by size: the source of tables/comm.json.

    torchrun --nproc-per-node 4 benchmarks/tune_comm.py --out comm_w4.json

Every candidate is timed as in ``bench_comm.py`` and prints a line; ``--out`` gets the best of each op and size. Copy
them into ``moe_ops/tables/comm.json`` under the number of ranks, and say there which run they come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
import torch.distributed as dist
import typer
from bench_comm import microseconds

import moe_ops
from moe_ops.combine import launch_combine
from moe_ops.combine_from import launch_combine_from
from moe_ops.comm_launch import Launch
from moe_ops.dispatch import launch_dispatch
from moe_ops.dispatch_into import launch_dispatch_into
from moe_ops.reference import Batch

TOP_K = 8
SHAPES = ((4, 128), (4, 256), (8, 256), (8, 512), (16, 512), (16, 1024))  # warps, chunks


def candidates(nbytes: int) -> Iterator[Launch]:
    """What is worth trying for a gathered batch of ``nbytes``."""
    if nbytes <= 2 << 20:
        blocks, shapes = (8, 16, 32, 64, 132), SHAPES[:4]
    elif nbytes <= 16 << 20:
        blocks, shapes = (64, 132, 264, 528), SHAPES[:5]
    else:
        blocks, shapes = (132, 264, 528, 1024), SHAPES[2:]
    for count in blocks:
        for warps, chunks in shapes:
            yield Launch(count, warps, chunks)


def calls_of(ws: moe_ops.Workspace, rows: int) -> dict[str, Callable[[Launch], object]]:
    """One call of each op with a given launch, T = ``rows`` live rows on every rank."""
    hidden, most = ws.config.hidden_size, rows * ws.world_size
    mine = Batch(
        torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16),
        torch.randint(0, 256, (rows, TOP_K), device="cuda", dtype=torch.int32),
        torch.rand(rows, TOP_K, device="cuda"),
    )
    count = torch.tensor([rows], dtype=torch.int32, device="cuda")
    metadata = torch.ops.moe_ep.metadata_update(count, ws.group_name)
    batch, output = ws.layer_batch(most, torch.int32, torch.float32), ws.layer_output(most)
    channel, buffers = ws.channel, ws.buffers
    assert channel is not None

    def into(launch: Launch) -> None:
        launch_dispatch_into(channel, buffers, mine, count, metadata, batch, entry_barrier=False, launch=launch)

    def combined(launch: Launch) -> None:
        launch_combine_from(channel, buffers, output, count, metadata, rows, exit_barrier=False, launch=launch)

    return {
        "agv_dispatch_into": into,
        "rsv_combine_from": combined,
        "agv_dispatch": lambda launch: launch_dispatch(channel, *mine, count, metadata, most, launch),
        "rsv_combine": lambda launch: launch_combine(channel, output, count, metadata, rows, launch=launch),
    }


def main(
    hidden: int = 7168,
    tokens: Annotated[list[int] | None, typer.Option(help="rows a rank, T")] = None,
    replays: int = 12,
    out: Annotated[Path | None, typer.Option(help="JSON with the best launches")] = None,
) -> None:
    """Time every candidate."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    sizes = tokens or [2, 8, 64, 128, 512, 4096]
    ws = moe_ops.init_workspace(
        None, max_tokens_per_rank=max(sizes), hidden_size=hidden, top_k=TOP_K, timeout_s=20
    )  # fmt: skip
    best: dict[str, list[dict[str, float]]] = {}
    for rows in sizes:
        nbytes = rows * ws.world_size * ws.layout.hidden_row
        for op, call in calls_of(ws, rows).items():
            timed = sorted((microseconds(partial(call, launch), replays), launch) for launch in candidates(nbytes))
            best.setdefault(op, []).append({"T": rows, "bytes": nbytes, "us": timed[0][0], **timed[0][1]._asdict()})
            if rank == 0:
                line = "  ".join(f"{us:.2f} {launch.blocks}x{launch.warps}x{launch.chunks}" for us, launch in timed[:6])
                print(f"W={ws.world_size} H={hidden} T={rows:5} {op:18} {line}", flush=True)
    ws.check()
    if rank == 0 and out is not None:
        out.write_text(json.dumps(best, indent=1))
    dist.barrier()
    os._exit(0)  # NCCL work captured in graphs can hang its own shutdown


if __name__ == "__main__":
    typer.run(main)

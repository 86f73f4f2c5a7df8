"""Dispatch and combine against NCCL, in one run, inside CUDA graphs.

    torchrun --nproc-per-node 4 benchmarks/bench_comm.py --hidden 7168 --tokens 8 --tokens 4096

Each figure is the median over replays of a graph of ``CALLS`` calls, the slowest rank's, in µs a call. All
ranks start a replay from a barrier, so waiting for a peer inside an op counts. NCCL moves the hidden states alone
(all-gather, reduce-scatter); ours also moves ids and weights. Results are checked before they are timed.

barrier            ``metadata_update``: the bare exchange of one word with every peer
endless            the same exchange without a limit of time, nor what follows from one: what bounded waits cost
turns              ``agv_dispatch_into`` and ``rsv_combine_from`` in turn, no extra barrier: what the compiler emits
routed             the same with ``experts_per_rank``: rows travel to and from ranks with an expert for them only
into, from         the two alone, each with its extra barrier
dispatch, combine  the functional ops: fresh outputs, slots in between
ratio              turns / (all_gather + reduce_scatter); ``ratio_routed`` and ``functional`` likewise
"""

from __future__ import annotations

import csv
import os
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.distributed as dist
import triton
import triton.language as tl
import typer
from rich.console import Console
from rich.table import Table

import moe_ops
from moe_ops.barrier import _verdict, _word_offset, enter, leave, signal
from moe_ops.ptx import LANES, poll_word
from moe_ops.selfcheck import Case, check_round

CALLS = 10
EXPERTS = 256  # ids are drawn evenly
TARGETS = {8: 0.48, 16: 0.48, 64: 0.40, 128: 0.50, 512: 0.68, 4096: 0.88}  # ours / NCCL, both directions


def graph_of(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``CALLS`` calls, warmed up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
        stream.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(CALLS):
                call()
    torch.cuda.synchronize()
    return graph


def microseconds(call: Callable[[], object], replays: int) -> float:
    """Median µs a call over ``replays``, of the slowest rank."""
    graph = graph_of(call)
    times = []
    for _ in range(replays):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        dist.barrier()
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / CALLS)
    worst = torch.tensor([statistics.median(times)], device="cuda")
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    graph.reset()
    return worst.item()


class Sizes(NamedTuple):
    """One line of the table: T live rows on every rank, H, K."""

    rows: int
    hidden: int
    top_k: int


def measure(sizes: Sizes, ws: moe_ops.Workspace, replays: int) -> dict[str, float]:
    """All figures of one line."""
    rows, hidden, top_k = sizes
    world, name, ops = ws.world_size, ws.group_name, torch.ops.moe_ep
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    ids = torch.randint(0, EXPERTS, (rows, top_k), device="cuda", dtype=torch.int32)
    weights = torch.rand(rows, top_k, device="cuda")
    count = torch.tensor([rows], dtype=torch.int32, device="cuda")
    gathered = world * rows
    metadata = ops.metadata_update(count, name)
    y = torch.randn(gathered, hidden, device="cuda", dtype=torch.bfloat16)
    batch, output = ws.layer_batch(gathered, ids.dtype, weights.dtype), ws.layer_output(gathered)
    output.copy_(y)
    nccl_in, nccl_out = torch.empty_like(y), torch.empty_like(x)

    def turn(per_rank: int = 0) -> None:
        barrier = {"entry_barrier": False, "experts_per_rank": per_rank}
        ops.agv_dispatch_into(x, ids, weights, count, metadata, *batch, name, **barrier)
        routing = {"topk_ids": ids, "experts_per_rank": per_rank}
        ops.rsv_combine_from(output, count, metadata, rows, [], name, exit_barrier=False, **routing)

    calls: dict[str, Callable[[], object]] = {
        "barrier": lambda: ops.metadata_update(count, name),
        "endless": lambda: endless_barrier(ws, count),
        "turns": turn,
        "routed": lambda: turn(-(-EXPERTS // world)),
        "into": lambda: ops.agv_dispatch_into(x, ids, weights, count, metadata, *batch, name),
        "from": lambda: ops.rsv_combine_from(output, count, metadata, rows, [], name),
        "dispatch": lambda: ops.agv_dispatch(x, ids, weights, count, metadata, gathered, name),
        "combine": lambda: ops.rsv_combine(y, count, metadata, rows, name),
        "all_gather": lambda: dist.all_gather_into_tensor(nccl_in, x),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(nccl_out, y),
    }
    result = {what: microseconds(call, replays) for what, call in calls.items()}
    nccl = result["all_gather"] + result["reduce_scatter"]
    wire = 2 * (world - 1) * rows * hidden * 2 / 1e3  # KB in each direction, there and back: KB / µs = GB/s
    return result | {
        "ratio": result["turns"] / nccl,
        "ratio_routed": result["routed"] / nccl,
        "functional": (result["dispatch"] + result["combine"]) / nccl,
        "turns_GBps": wire / result["turns"],
    }


def endless_barrier(ws: moe_ops.Workspace, count: torch.Tensor) -> None:
    """``metadata_update`` with a kernel that never looks at the clock."""
    channel = ws.channel
    assert channel is not None
    _endless_kernel[(1,)](channel.peers(), count, count.new_empty(3), W=channel.world_size, num_warps=1)


@triton.jit
def _endless_kernel(peers, local_tokens_ptr, out_ptr, W: tl.constexpr):
    """The exchange of ``_metadata_kernel``, waiting for ever. Grid: one program, one warp."""
    lanes = tl.arange(0, LANES)
    count = tl.maximum(tl.load(local_tokens_ptr), 0)
    call = enter(peers, W, LANES)
    signal(peers, call, count, W, False, RELEASE=False)
    address = call.own + _word_offset(call.epoch, W) + lanes * 8
    word = poll_word(address, lanes < W, False)
    verdict, _ = _verdict(word, call.epoch, lanes < W)
    while verdict != 0:
        word = poll_word(address, lanes < W, False)
        verdict, _ = _verdict(word, call.epoch, lanes < W)
    counts = tl.where(lanes < W, word & 0xFFFFFFFF, 0).to(tl.int32)
    tl.store(out_ptr, tl.sum(counts, axis=0))
    tl.store(out_ptr + 1, tl.sum(tl.where(lanes < peers.rank, counts, 0), axis=0))
    tl.store(out_ptr + 2, tl.max(counts, axis=0))
    leave(peers, call)


def main(
    hidden: Annotated[list[int] | None, typer.Option(help="H")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="rows a rank, T")] = None,
    top_k: int = 8,
    replays: int = 30,
    out: Annotated[Path | None, typer.Option(help="folder for comm.csv and comm.png")] = None,
) -> None:
    """Print the table; write CSV and a plot where ``--out`` says."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    sizes = tokens or list(TARGETS)
    rows = []
    for h in hidden or [7168, 2048]:
        ws = moe_ops.init_workspace(None, max_tokens_per_rank=max(sizes), hidden_size=h, top_k=top_k, timeout_s=20)
        problem = check_round(ws, Case(0, tuple((rank * 37) % max(sizes) for rank in range(ws.world_size))))
        assert problem is None, problem
        rows += [{"hidden": h, "tokens": t} | measure(Sizes(t, h, top_k), ws, replays) for t in sizes]
        ws.check()
        ws.close()
    if rank == 0:
        report(rows, dist.get_world_size(), out)
    dist.barrier()
    os._exit(0)  # NCCL work captured in graphs can hang its own shutdown


def report(rows: list[dict[str, float]], world: int, out: Path | None) -> None:
    """Table on the terminal, CSV and plot in ``out``."""
    table = Table("H", "T", *list(rows[0])[2:], "target", title=f"W = {world}, µs a call")
    for row in rows:
        target = TARGETS.get(int(row["tokens"]))
        figures = [f"{value:.2f}" for value in list(row.values())[2:]]
        table.add_row(str(row["hidden"]), str(row["tokens"]), *figures, f"{target or '-'}")
    Console(width=200).print(table)
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / f"comm_w{world}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot(rows, world, out / f"comm_w{world}.png")


def plot(rows: list[dict[str, float]], world: int, path: Path) -> None:
    """Time of dispatch + combine over T, ours and NCCL's, one panel for each H."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = sorted({int(row["hidden"]) for row in rows})
    figure, axes = pyplot.subplots(1, len(sizes), figsize=(5 * len(sizes), 4), squeeze=False)
    for axis, h in zip(axes[0], sizes, strict=True):
        of_size = [row for row in rows if row["hidden"] == h]
        x = [row["tokens"] for row in of_size]
        axis.loglog(x, [row["turns"] for row in of_size], "o-", label="moe_ep, symmetric buffers")
        axis.loglog(x, [row["dispatch"] + row["combine"] for row in of_size], "^:", label="moe_ep, fresh outputs")
        axis.loglog(x, [row["all_gather"] + row["reduce_scatter"] for row in of_size], "s--", label="NCCL")
        axis.set(title=f"H = {h}, W = {world}", xlabel="rows a rank", ylabel="µs")
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    typer.run(main)

"""Random requests arriving at random on every rank, for minutes: every answer right, memory flat, no rank hangs.

    python -m tests.graphs.soak --minutes 10                                              2 ranks, CPU, gloo
    torchrun --nproc-per-node 2 -m tests.graphs.soak --minutes 10                         2 GPUs, p2p

In rounds: requests come and go on all ranks, more on some than on others; then each of the answers is asked for
again, alone on its rank, and must be the same tokens. Memory is read after each round, once the second has shown
what the loop needs. Each rank prints a line every now and then, rank 0 one JSON object at the end; exit status 1 if
anything is wrong.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import graphs
from graphs.launch import Emit, local_rank, process_group, rank_device, run_ranks, under_torchrun
from lowering.torch_compat import compile_counts
from tests.graphs.serve_cases import LONGEST, arrivals, served_model

SETTLED = 2  # rounds after which memory must not grow
SLACK_BYTES = 24 << 20  # an allocator's mood
MOST_REQUESTS = 12  # of one rank in one round
SAY_EVERY_S = 20.0


class Soak(NamedTuple):
    """What to run; every field is a command-line option."""

    minutes: float = 10.0
    family: str = "deepseek_v3"
    batch: int = 4
    seed: int = 0
    compile: bool = True
    device: str = "cpu"


def run_rank(rank: int, ranks: int, job: Soak, emit: Emit | None = None) -> dict[str, Any]:
    """Rounds until the time is over; what this rank saw."""
    torch.set_num_threads(1)
    dtype = torch.bfloat16 if job.device == "cuda" else torch.float32
    model = served_model(job.family, dtype).to(rank_device(job.device, local_rank() if under_torchrun() else rank))
    graphs.shard_experts(model, max_tokens_per_rank=64, timeout_s=60.0)
    loop = graphs.DecodeLoop(
        model, batch=job.batch + rank, max_len=LONGEST, sampler=graphs.sample, batch_invariant=True, look_every=4,
        **({} if job.compile else {"compile": False}),
    )  # fmt: skip
    rng = random.Random(1000 * job.seed + rank)
    counts, memory, wrong = {"rounds": 0, "requests": 0, "tokens": 0}, [], []
    began, compiled, said = time.monotonic(), 0, 0.0
    while agreed(time.monotonic() < began + 60 * job.minutes):
        answers = list(loop.serve(arrivals(rng, rng.randrange(MOST_REQUESTS + 1))))
        wrong += list(differing(loop, answers))
        counts["rounds"] += 1
        counts["requests"] += len(answers)
        counts["tokens"] += sum(len(answer.tokens) for answer in answers)
        memory.append(bytes_used())
        compiled = compiled or compile_counts().graphs
        if (passed := time.monotonic() - began) >= said + SAY_EVERY_S:
            said = passed
            resident = f"{memory[-1] / 2**20:.1f} MiB"
            print(f"{passed:.0f} s, rank {rank}: {counts}, {len(wrong)} wrong, {resident}", flush=True)
    settled = memory[SETTLED:]
    grown = max(settled[-1] - settled[0], 0) if settled else 0
    seen = {"rank": rank, **counts, "wrong": wrong[:3], "recompiles": compile_counts().graphs - compiled}
    return seen | {"memory_mb": [round(m / 2**20, 1) for m in every_tenth(settled)], "flat": grown <= SLACK_BYTES}


def differing(loop: graphs.DecodeLoop, answers: list[graphs.Answer]) -> Iterator[str]:
    """Ask for each answer again, alone on this rank; ranks with fewer take part without rows."""
    for number in range(int(largest(len(answers)))):
        mine = answers[number : number + 1]
        for again, before in zip(loop.serve([answer.request for answer in mine]), mine, strict=True):
            if (again.tokens, again.reason) != (before.tokens, before.reason):
                yield f"{before.request}: {before.tokens}, alone {again.tokens}"


def agreed(go_on: bool) -> bool:
    """Whether any rank wants to go on."""
    return largest(int(go_on)) > 0


def largest(number: int) -> int:
    """Over all ranks."""
    everyone = [number] * dist.get_world_size()
    dist.all_gather_object(everyone, number)
    return max(everyone)


def bytes_used() -> int:
    """Resident memory of this process, and what its GPU holds."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        resident = int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return resident + (torch.cuda.memory_reserved() if torch.cuda.is_available() else 0)


def every_tenth(values: list[int]) -> list[int]:
    """At most eleven of them, first and last among these."""
    last = len(values) - 1
    return [values[i * last // 10] for i in range(11)] if last >= 10 else values


def verdict(seen: list[dict[str, Any]]) -> bool:
    """Print what the ranks saw; True if all is well."""
    good = all(rank["flat"] and not rank["wrong"] and rank["recompiles"] == 0 for rank in seen)
    print(json.dumps({"passed": good, "ranks": seen}))
    return good


def parse() -> Soak:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in Soak()._asdict().items():
        if name not in ("compile", "device"):
            parser.add_argument(f"--{name}", type=type(default), default=default)
    return Soak(**vars(parser.parse_args()), device="cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    """Start two ranks on the CPU, or be one of torchrun's."""
    job = parse()
    if not under_torchrun():
        sys.exit(not verdict(run_ranks(run_rank, job._replace(device="cpu"), ranks=2, device="cpu", on_event=print)))
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with process_group(rank_device(job.device, local_rank()), rank, ranks):
        everyone: list[Any] = [None] * ranks
        dist.all_gather_object(everyone, run_rank(rank, ranks, job))
        good = rank != 0 or verdict(everyone)
        sys.stdout.flush()
        dist.barrier()
        os._exit(not good)  # NCCL work captured in graphs can hang its own shutdown


if __name__ == "__main__":
    main()

"""Stop or kill a rank while it replays a CUDA graph: the others raise in time, name it, and go on. On GPUs:

    python tests/moe_ops/gpu_deaths.py --ranks 4

One process a GPU. After each injection the ranks that live make a new group, which works; a stopped rank wakes, learns
that the others went on without it, and joins them. On CPUs ``test_killed_rank.py`` does the same with emulated kernels.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import random
import signal
import sys
import time
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist

from moe_ops.errors import MoeEpError
from moe_ops.selfcheck import Case, check_round
from tests.moe_ops.rank_checks import Setup, random_counts

TIMEOUT_S = 2.0
SLACK_S = 2.0  # the contract: every survivor raises within timeout_s + 2 s
WARM_S = 60.0  # while kernels are compiled
SIZES = Setup("p2p", rows=32, hidden_size=2048, top_k=8)
STOP, KILL = signal.SIGSTOP, signal.SIGKILL
PLAN = (STOP, STOP, KILL, STOP, STOP, KILL, STOP, STOP, STOP, KILL)  # 4 ranks, then 3, then 2, then 1


class Member:
    """A rank's process: joins groups, replays until something raises."""

    def __init__(self, gpu: int, ranks: int, port: int, link: Connection):
        self.link = link
        torch.cuda.set_device(gpu)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=30))
        dist.init_process_group("nccl", store=store, rank=gpu, world_size=ranks)

    def join(self, members: list[int]) -> None:
        """A new group of the living, of a new name: compile with patience, then a round with the short limit."""
        group, ranks = dist.new_group(members, use_local_synchronization=True), len(members)
        for timeout in (WARM_S, TIMEOUT_S):
            self.ws = replace(SIZES, group=group, timeout_s=timeout).workspace()
            problem = check_round(self.ws, Case(ranks, random_counts(ranks, SIZES.rows, ranks)))
            assert problem is None, problem
            self.capture()
            if timeout == WARM_S:
                self.graph.reset()
                self.ws.close()

    def capture(self) -> None:
        """A step: metadata and two layers, one over slots and one over symmetric buffers."""
        ws, ops, rows = self.ws, torch.ops.moe_ep, SIZES.rows
        most, name = rows * ws.world_size, ws.group_name
        self.count = torch.full((1,), rows, dtype=torch.int32, device="cuda")
        x = torch.randn(rows, SIZES.hidden_size, device="cuda", dtype=torch.bfloat16)
        ids = torch.zeros(rows, SIZES.top_k, device="cuda", dtype=torch.int32)
        batch, output = ws.layer_batch(most, ids.dtype, torch.float32), ws.layer_output(most)

        def step() -> None:
            metadata = ops.metadata_update(self.count, name)
            hidden, _, _ = ops.agv_dispatch(x, ids, ids.float(), self.count, metadata, most, name)
            ops.rsv_combine(hidden, self.count, metadata, rows, name)
            ops.agv_dispatch_into(x, ids, ids.float(), self.count, metadata, *batch, name, entry_barrier=False)
            output.copy_(batch.hidden)
            ops.rsv_combine_from(output, self.count, metadata, rows, [], name, exit_barrier=False)

        step()
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            step()
        torch.cuda.synchronize()

    def replay(self) -> tuple[list[int], str, int]:
        """Replay until the workspace raises: ranks it names, its text, replays done."""
        replays = 0
        try:
            while True:
                for _ in range(random.randint(1, 20)):
                    self.count.fill_(random.randint(0, SIZES.rows))
                    self.graph.replay()
                    replays += 1
                torch.cuda.synchronize()
                self.ws.check()
        except MoeEpError as error:
            return list(getattr(error, "missing_ranks", [])), str(error), replays

    def run(self) -> None:
        """Do what the controller says."""
        while True:
            what, *arguments = self.link.recv()
            faulthandler.dump_traceback_later(90)
            if what == "join":
                self.join(*arguments)
                self.link.send(("joined", None))
            elif what == "replay":
                faulthandler.cancel_dump_traceback_later()
                answer = self.replay()
                self.link.send(("raised", answer))
                self.graph.reset()
                self.ws.close()


def member(gpu: int, ranks: int, port: int, link: Connection) -> None:
    Member(gpu, ranks, port, link).run()


def expect(link: Connection, kind: str, seconds: float) -> object:
    assert link.poll(seconds), f"no {kind!r} within {seconds:g} s: a rank hangs"
    got, value = link.recv()
    assert got == kind, (got, value)
    return value


def inject(links: dict[int, Connection], processes: dict[int, int], how: signal.Signals) -> str:
    """Hit one rank of the group of ``links``; returns what the others did. Raises AssertionError."""
    alive = sorted(links)
    for gpu in alive:
        links[gpu].send(("join", alive))
    for gpu in alive:
        expect(links[gpu], "joined", 90)
    for gpu in alive:
        links[gpu].send(("replay",))
    time.sleep(random.uniform(0.05, 0.6))
    victim = random.choice(alive)
    os.kill(processes[victim], how)
    hit, slowest = time.monotonic(), 0.0
    for gpu in alive:
        if gpu != victim:
            missing, text, _ = expect(links[gpu], "raised", TIMEOUT_S + 30)
            slowest = max(slowest, time.monotonic() - hit)
            assert missing == [alive.index(victim)], f"GPU {gpu} named {missing}: {text}"
    assert slowest < TIMEOUT_S + SLACK_S, f"raised after {slowest:.2f} s"
    late = ""
    if how == KILL:
        del links[victim]
    else:
        os.kill(processes[victim], signal.SIGCONT)
        missing, text, _ = expect(links[victim], "raised", TIMEOUT_S + 30)
        late = f"; it woke and learned: {text[:70]}"
    return f"{len(alive)} ranks, {how.name} of GPU {victim}: others raised after {slowest:.2f} s{late}"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    plan = PLAN if arguments.ranks == 4 else PLAN[-4:]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("spawn")
    links, processes, children = {}, {}, []
    for gpu in range(arguments.ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=member, args=(gpu, arguments.ranks, store.port, theirs), daemon=True)
        process.start()
        links[gpu], processes[gpu] = ours, process.pid
        children.append(process)
    done = 0
    try:
        for number, how in enumerate(plan):
            print(f"{number}: {inject(links, processes, how)}", flush=True)
            done += 1
    finally:
        for process in children:
            process.kill()
        print(f"{done} of {len(plan)} injections as the contract says", flush=True)
        os._exit(done != len(plan))


if __name__ == "__main__":
    main()

"""Kill or stop one of three ranks at any point: the others raise in time, name it, and go on in a new group."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

WORLD = 3
TIMEOUT_S = 1.5  # a busy machine may keep a rank that is alive from running for a second
SLACK_S = 2.0  # the contract: every survivor raises within timeout_s + 2 s
AT_ONCE = 4  # groups under test at a time; they mostly sleep


def survivor_report(rank: int, port: int, transport: str, link: Connection) -> None:
    """One rank: rounds until something raises, then a round with the survivors; sends what happened."""
    import torch

    torch.set_num_threads(1)
    from moe_ops.errors import PeerTimeoutError
    from moe_ops.selfcheck import Case, check_round, check_turns
    from tests.moe_ops.rank_checks import Setup, random_counts

    def join(name: str, rank: int, ranks: int) -> None:
        client = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
        store = dist.PrefixStore(name, client)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=5))

    def seconds() -> float:
        """Time, but not while this thread was kept waiting for a core: other tests may have them all."""
        return time.monotonic() - int(Path("/proc/thread-self/schedstat").read_text().split()[1]) / 1e9

    join("all", rank, WORLD)
    ws = Setup(transport, rows=2, hidden_size=16, top_k=1, timeout_s=TIMEOUT_S).workspace()
    link.send(("ready", None))
    round_number, started = 0, seconds()
    try:
        while True:
            started = seconds()
            case = Case(round_number, random_counts(WORLD, 2, round_number))
            problem = check_turns(ws, case, turns=1) if round_number % 2 else check_round(ws, case)
            assert problem is None, problem
            round_number += 1
    except PeerTimeoutError as error:
        link.send(("raised", (error.missing_ranks, seconds() - started, round_number)))
    ws.close()
    alive = link.recv()
    dist.destroy_process_group()
    join("survivors", alive.index(rank), len(alive))
    ws = Setup(transport, rows=2, hidden_size=16, top_k=1, timeout_s=10.0).workspace()
    link.send(("later group", check_round(ws, Case(1, random_counts(len(alive), 2, 1)))))
    link.recv()
    os._exit(0)


def inject(transport: str, seed: int) -> str | None:
    """One injection; None if all went as the contract says, else what did not."""
    rng = random.Random(seed)
    victim, how = rng.randrange(WORLD), rng.choice((signal.SIGKILL, signal.SIGSTOP))
    context = multiprocessing.get_context("forkserver")
    # served by this process, as torchrun's agent would: a rank stopped inside a file store would keep its lock
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    links, workers = [], []
    for rank in range(WORLD):
        mine, theirs = context.Pipe()
        worker = context.Process(target=survivor_report, args=(rank, store.port, transport, theirs), daemon=True)
        worker.start()
        links.append(mine)
        workers.append(worker)
    try:
        for link in links:
            expect(link, "ready", 60)
        time.sleep(rng.uniform(0, 0.2))
        os.kill(workers[victim].pid, how)
        alive = [rank for rank in range(WORLD) if rank != victim]
        for rank in alive:
            missing, elapsed, _ = expect(links[rank], "raised", TIMEOUT_S + 20)
            assert missing == [victim], f"rank {rank} named {missing}, not {victim} ({how.name})"
            assert elapsed < TIMEOUT_S + SLACK_S, f"rank {rank} raised after {elapsed:.2f} s ({how.name})"
        for rank in alive:
            links[rank].send(alive)
        for rank in alive:
            problem = expect(links[rank], "later group", 60)
            assert problem is None, problem
        return None
    except (AssertionError, EOFError, OSError) as error:
        return f"seed {seed}, rank {victim} {how.name}: {error}"
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def expect(link: Connection, kind: str, seconds: float) -> object:
    """The next message of a rank, which must be of that kind."""
    assert link.poll(seconds), f"no {kind!r} within {seconds:g} s: a rank hangs"
    got, value = link.recv()
    assert got == kind, (got, value)
    return value


@pytest.mark.timeout(600)
@pytest.mark.parametrize("transport", ["gloo", "emulator", "emulator-multicast"])
def test_survivors_raise_and_go_on(transport: str) -> None:
    injections = {"gloo": 70, "emulator": 70, "emulator-multicast": 60}[transport]
    # Ranks are forks of a process that has imported everything (``tests/forked.py``), Triton as an interpreter.
    with mock.patch.dict(os.environ, TRITON_INTERPRET="1"), ThreadPoolExecutor(AT_ONCE) as pool:
        problems = [p for p in pool.map(lambda seed: inject(transport, seed), range(injections)) if p]
    assert not problems, f"{len(problems)} of {injections} injections failed; first: {problems[:3]}"

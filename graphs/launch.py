"""Starting the ranks of one command, and never waiting for one that is gone."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import torch
import torch.distributed as dist

from .errors import RankFailedError

HERE = "127.0.0.1"
START_METHOD = "spawn"  # CUDA allows no other; tests, on CPUs, fork ranks from a process that has imported all
GRACE_S = 3.0  # after a failure: time for the other ranks to say what they saw
Emit = Callable[[Any], None]
RankFunction = Callable[[int, int, Any, Emit], Any]  # (rank, world size, job, emit) -> result


def under_torchrun() -> bool:
    """True if a launcher has already made this process one of several ranks."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


@contextmanager
def process_group(device: torch.device, rank: int, world_size: int, store: dist.Store | None = None) -> Iterator[None]:
    """The default group for one rank: gloo on the CPU, NCCL on GPUs. Without ``store``, a launcher's environment."""
    backend = "gloo"
    kwargs: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend, kwargs = "nccl", {"device_id": device}
    init = {"store": store} if store is not None else {"init_method": "env://"}
    dist.init_process_group(backend, rank=rank, world_size=world_size, **init, **kwargs)
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank_device(device: str, local_rank: int) -> torch.device:
    """Device of a rank on this machine."""
    return torch.device("cuda", local_rank) if device == "cuda" else torch.device("cpu")


@dataclass
class _Rank:
    process: BaseProcess
    messages: Connection
    result: Any = None
    error: str | None = None
    done: bool = False


def run_ranks(function: RankFunction, job: Any, *, ranks: int, device: str, on_event: Emit) -> list[Any]:
    """Run ``function(rank, ranks, job, emit)`` in ``ranks`` new processes with a default group; their results.

    ``device``: "cpu" or "cuda". What a rank emits goes to ``on_event`` here. If a rank fails or dies, the others
    are ended and ``RankFailedError`` tells what each one said.
    """
    context = multiprocessing.get_context(START_METHOD)
    store = dist.TCPStore(HERE, 0, is_master=True, wait_for_workers=False)  # lives on if rank 0 dies
    started: list[_Rank] = []
    try:
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            arguments = (function, job, rank, ranks, device, store.port, theirs)
            process = context.Process(target=_child, args=arguments, daemon=True)
            process.start()
            theirs.close()
            started.append(_Rank(process, ours))
        _collect(started, on_event)
    finally:
        _end(started)
    return [rank.result for rank in started]


def _collect(ranks: list[_Rank], on_event: Emit) -> None:
    """Take messages until all ranks are done, or one has failed and the grace is over."""
    deadline: float | None = None
    while open_ranks := [rank for rank in ranks if not rank.done]:
        left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
        ready = wait([rank.messages for rank in open_ranks], timeout=left)
        if deadline is not None and not ready:
            break
        for rank in open_ranks:
            if rank.messages in ready:
                _take(rank, on_event)
        if deadline is None and any(rank.error for rank in ranks):
            deadline = time.monotonic() + GRACE_S
    errors = [f"rank {number}: {rank.error}" for number, rank in enumerate(ranks) if rank.error]
    if errors:
        raise RankFailedError("\n".join(errors))


def _take(rank: _Rank, on_event: Emit) -> None:
    """One message of a rank; a closed pipe without a result is a death."""
    try:
        kind, value = rank.messages.recv()
    except EOFError:
        rank.process.join(GRACE_S)
        rank.done = True
        rank.error = rank.error or f"ended with exit code {rank.process.exitcode} before it was done"
        return
    if kind == "event":
        on_event(value)
    else:
        rank.done = True
        rank.result, rank.error = (value, None) if kind == "result" else (None, value)


def _end(ranks: list[_Rank]) -> None:
    """Wait briefly for ranks that are done, end the others."""
    for rank in ranks:
        rank.process.join(GRACE_S if rank.done else 0)
        if rank.process.is_alive():
            rank.process.kill()
            rank.process.join()
        rank.messages.close()


def _child(
    function: RankFunction, job: Any, rank: int, ranks: int, device: str, port: int, messages: Connection
) -> None:
    """Body of a started rank. Its stdout joins stderr, so that the parent's stdout stays the command's own."""
    os.dup2(2, 1)
    try:
        store = dist.TCPStore(HERE, port, is_master=False)
        with process_group(rank_device(device, rank), rank, ranks, store):
            result = function(rank, ranks, job, lambda value: messages.send(("event", value)))
            messages.send(("result", result))
    except BaseException as error:
        traceback.print_exc()
        messages.send(("error", f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error


@contextmanager
def stdout_kept_clean() -> Iterator[int]:
    """Send everything that is printed to stderr; yields a descriptor of the real stdout."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield kept
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def is_first() -> bool:
    """True on the rank that reports, under torchrun."""
    return os.environ.get("RANK") == "0"


def local_rank() -> int:
    """This process's number on its machine, under torchrun."""
    return int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


def cpu_threads(ranks: int) -> int:
    """Threads for each of ``ranks`` processes on this machine's CPUs."""
    return max(1, len(os.sched_getaffinity(0)) // ranks)

"""Run a function on several ranks, each a process of its own that interprets the kernels.

Starting a process and importing torch takes seconds, so a pool keeps its processes and serves any
world size up to its own. ``run_ranks`` uses one pool for the whole program.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch.distributed as dist

from moe_ops.symmetric import Channel, Layout, SymmetricBuffer, make_channel

DEFAULT_TIMEOUT_S = 120.0
STORE_TIMEOUT = timedelta(seconds=60)
START_METHOD = "spawn"  # tests fork ranks from a process that has imported everything


@dataclass
class Rank:
    """What a function under ``run_ranks`` gets first."""

    rank: int
    world_size: int
    multicast: bool
    store: dist.Store
    _meetings: int = 0

    def channel(self, layout: Layout, *, timeout_s: float = 30.0, epoch: int = 0) -> Channel:
        """A channel over fresh shared memory; collective."""
        from .hook import install

        install()
        channel = make_channel(
            rank=self.rank,
            layout=layout,
            buffer=self.buffer(layout.nbytes),
            timeout_s=timeout_s,
            multicast=self.multicast,
            epoch=epoch,
        )
        self.meet()
        return channel

    def buffer(self, nbytes: int) -> SymmetricBuffer:
        """Fresh shared memory; collective."""
        from .memory import allocate_shared

        self._meetings += 1
        return allocate_shared(self.store, self.rank, self.world_size, nbytes, f"buffer{self._meetings}")

    def meet(self) -> None:
        """Wait for all ranks, on the host."""
        self._meetings += 1
        keys = [f"meet{self._meetings}/{rank}" for rank in range(self.world_size)]
        self.store.set(keys[self.rank], "")
        self.store.wait(keys, STORE_TIMEOUT)


class RankError(RuntimeError):
    """A rank's function raised, died, or did not return in time."""


@contextmanager
def _interpreted() -> Iterator[None]:
    """The environment in which a child imports Triton."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _serve(rank: int, port: int, link: Connection) -> None:
    """A rank's process: calls until the link closes."""
    import torch

    torch.set_num_threads(1)
    client = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=STORE_TIMEOUT)
    while True:
        try:
            number, world_size, multicast, function, args = link.recv()
        except EOFError:
            return
        context = Rank(rank, world_size, multicast, dist.PrefixStore(f"run{number}", client))
        try:
            answer = (True, function(context, *args))
        except BaseException as error:
            answer = (False, f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}")
        link.send(answer)


class RankPool:
    """Processes that wait for work; started when first needed, ended by ``close``."""

    def __init__(self) -> None:
        self._server: dist.TCPStore | None = None
        self._workers: list[tuple[Any, Connection]] = []
        self._runs = 0

    def run(
        self,
        world_size: int,
        function: Callable[..., Any],
        args: Sequence[Any] = (),
        *,
        multicast: bool = False,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> list[Any]:
        """``function(rank, *args)`` on ranks ``0..world_size-1``; their results in rank order.

        ``function``: importable by name. Raises ``RankError`` with the traceback of every rank that failed;
        ranks that do not answer within ``timeout_s`` are ended, and the next run starts new ones.
        """
        self._grow(world_size)
        self._runs += 1
        links = [link for _, link in self._workers[:world_size]]
        for link in links:
            link.send((self._runs, world_size, multicast, function, args))
        answers = self._collect(links, time.monotonic() + timeout_s)
        failures = [text for fine, text in answers if not fine]
        if failures:
            raise RankError("\n".join(failures))
        return [value for _, value in answers]

    def close(self) -> None:
        """End the processes."""
        for process, link in self._workers:
            link.close()
            process.join(timeout=1)
            process.kill()
        self._workers, self._server = [], None

    def _grow(self, world_size: int) -> None:
        server = self._server = self._server or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context(START_METHOD)
        for rank in range(len(self._workers), world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, server.port, there), daemon=True)
            with _interpreted():
                process.start()
            there.close()
            self._workers.append((process, here))

    def _collect(self, links: list[Connection], deadline: float) -> list[tuple[bool, Any]]:
        answers: list[tuple[bool, Any]] = []
        lost = False
        for rank, link in enumerate(links):
            try:
                arrived = link.poll(max(0.0, deadline - time.monotonic()))
                answers.append(link.recv() if arrived else (False, f"rank {rank}: no answer in time"))
            except EOFError:
                arrived = False
                answers.append((False, f"rank {rank}: its process ended"))
            lost |= not arrived
        if lost:
            self.close()
        return answers


_pool = RankPool()
atexit.register(_pool.close)


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    multicast: bool = False,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> list[Any]:
    """``RankPool.run`` on the program's own pool."""
    return _pool.run(world_size, function, args, multicast=multicast, timeout_s=timeout_s)

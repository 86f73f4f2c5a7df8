"""Times calls as replays of CUDA graphs with cold L2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import torch

FLUSH_BYTES = 256 << 20  # several times the L2 of an H200


class GraphTimer:
    """Times a call as one CUDA graph replay with cold L2: 256 MB are written before each replay.

    ``clean``: then as much is read, too. Else L2 is full of written lines, whose way back to memory competes with
    the reads of what is timed.
    """

    def __init__(self, device: torch.device, clean: bool = False):
        self._flushed = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
        self._read = torch.zeros(FLUSH_BYTES // 4, dtype=torch.int32, device=device) if clean else None

    def flush(self) -> None:
        self._flushed.zero_()
        if self._read is not None:
            self._read.amax()

    def empty_us(self) -> float:
        """What the method itself takes: a graph of one kernel that writes four bytes."""
        word = torch.zeros(1, dtype=torch.int32, device=self._flushed.device)
        return self.median_us(word.zero_)

    def samples(self, call: Callable[[], object], repeats: int, flush: bool = True) -> list[float]:
        """Microseconds of ``repeats`` replays, between two events around each. ``flush``: see ``in_turns``."""
        return self.in_turns([call], repeats, flush)[0]

    def in_turns(self, calls: Sequence[Callable[[], object]], rounds: int, flush: bool = True) -> list[list[float]]:
        """``rounds`` samples of each call, one of each a round: what heats or slows the GPU meets all alike.

        ``flush``: False where each call itself reads more than L2 holds; then nothing is written before.
        """
        graphs = [self._captured(call) for call in calls]
        events = [[self._replay(graph, flush) for graph in graphs] for _ in range(rounds)]
        torch.cuda.synchronize()
        return [[1e3 * start.elapsed_time(end) for start, end in column] for column in zip(*events, strict=True)]

    @staticmethod
    def _captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        for _ in range(2):
            graph.replay()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, flush: bool) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if flush:
            self.flush()
        start.record()
        graph.replay()
        end.record()
        return start, end

    def median_us(self, call: Callable[[], object], repeats: int = 20) -> float:
        return median(self.samples(call, repeats))

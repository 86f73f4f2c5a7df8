"""Who sits in which slot: the host's book of one rank. Requests wait, are placed, prefilled, started, and read out."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from .requests import Answer, Request
from .step import Chunk, DecodeStep, PrefillStep


class _Snapshot(NamedTuple):
    """The device's state on its way to the host, and which request each slot was decoding then."""

    active: Tensor
    starts: Tensor
    history: Tensor
    ready: torch.cuda.Event | None
    ids: list[int | None]


class Slots:
    """Places requests into the lowest free slots and collects what they decode.

    ``prefill`` None: prompts go through the decode step, a token a step. ``apart``: a forward of the prefill never
    holds chunks of two requests.
    """

    def __init__(self, step: DecodeStep, prefill: PrefillStep | None, apart: bool):
        self._step, self._prefill, self._apart = step, prefill, apart
        self._next_id = 0
        self._waiting: deque[tuple[int, Request]] = deque()
        self._held: list[tuple[int, Request] | None] = [None] * step.batch
        self._started = [False] * step.batch
        self._chunks: deque[Chunk] = deque()
        self._snapshots: deque[_Snapshot] = deque()

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number."""
        self._waiting.append((self._next_id, request))
        self._next_id += 1
        return self._next_id - 1

    def unfinished(self) -> int:
        """Requests waiting or in a slot."""
        return len(self._waiting) + sum(held is not None for held in self._held)

    def room(self) -> int:
        """Requests that could still be queued and find a free slot at once."""
        return self._held.count(None) - len(self._waiting)

    def clear(self) -> None:
        """Forget everything; the slots are free."""
        self._waiting.clear()
        self._chunks.clear()
        self._snapshots.clear()
        self._held = [None] * self._step.batch
        self._started = [False] * self._step.batch
        self._step.active.zero_()

    def admit(self, start: bool = True) -> None:
        """Place waiting requests into free slots; those without anything to prefill start, unless told not to."""
        free = [slot for slot, held in enumerate(self._held) if held is None][: len(self._waiting)]
        if not free:
            return
        placed = [self._waiting.popleft() for _ in free]
        requests = [request for _, request in placed]
        fed = [len(r.prompt_ids) - 1 if self._prefill is not None else 0 for r in requests]
        self._step.place(self._indices(free), requests, fed)
        for slot, entry, tokens in zip(free, placed, fed, strict=True):
            self._held[slot] = entry
            self._cut(slot, entry[1], tokens)
        if start:
            self.start([slot for slot, tokens in zip(free, fed, strict=True) if tokens == 0])

    def prefills(self) -> int:
        """Forwards that the placed prompts still need."""
        return -(-len(self._chunks) // self._prefill.ids.shape[0]) if self._prefill is not None else 0

    def next_chunks(self) -> list[Chunk]:
        """What the next forward of the prefill feeds; none if this rank only takes part."""
        assert self._prefill is not None
        count = min(self._prefill.ids.shape[0], len(self._chunks))
        return [chunk for chunk in (self._chunks.popleft() for _ in range(count)) if chunk.ids]

    def start(self, slots: list[int]) -> None:
        """From the next step on these slots decode."""
        if slots:
            self._step.start(self._indices(slots))
            for slot in slots:
                self._started[slot] = True

    def snapshot(self) -> None:
        """Send the state to the host, behind the steps launched so far."""
        step = self._step
        cuda = step.active.is_cuda
        active, starts, history = (
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=cuda).copy_(tensor, non_blocking=True)
            for tensor in (step.active, step.rows.starts, step.history)
        )
        ready = None
        if cuda:
            ready = torch.cuda.Event()
            ready.record()
        pairs = zip(self._held, self._started, strict=True)
        ids = [held[0] if held is not None and started else None for held, started in pairs]
        self._snapshots.append(_Snapshot(active, starts, history, ready, ids))

    def harvest(self, keep: int = 0) -> list[Answer]:
        """Answers complete in all snapshots but the last ``keep``; their slots are free from now on."""
        answers = []
        while len(self._snapshots) > keep:
            snapshot = self._snapshots.popleft()
            for slot, answer in self._read(snapshot):
                if answer.reason != "running":
                    self._held[slot], self._started[slot] = None, False
                    answers.append(answer)
        return answers

    def running(self) -> list[Answer]:
        """What every started request has so far, by slot; waits for the device."""
        self.snapshot()
        return [answer for _, answer in self._read(self._snapshots.pop())]

    def _read(self, snapshot: _Snapshot) -> list[tuple[int, Answer]]:
        """Slot and answer so far of what a snapshot shows and is still in its slot."""
        if snapshot.ready is not None:
            snapshot.ready.synchronize()
        found = []
        for slot, (number, held) in enumerate(zip(snapshot.ids, self._held, strict=True)):
            if number is None or held is None or held[0] != number:
                continue
            request = held[1]
            tokens = snapshot.history[slot, len(request.prompt_ids) : int(snapshot.starts[slot]) + 1].tolist()
            stopped = bool(tokens) and tokens[-1] in request.stop_ids
            reason = "running" if snapshot.active[slot] else "stop" if stopped else "length"
            found.append((slot, Answer(number, request, tokens, reason)))
        return found

    def _cut(self, slot: int, request: Request, fed: int) -> None:
        """Queue the first ``fed`` tokens of a prompt in chunks."""
        if fed == 0 or self._prefill is None:
            return
        rows, columns = self._prefill.ids.shape
        prompt = list(request.prompt_ids)
        for start in range(0, fed, columns):
            self._chunks.append(Chunk(slot, start, prompt[start : min(start + columns, fed)], start + columns >= fed))
        while self._apart and len(self._chunks) % rows:
            self._chunks.append(Chunk(slot, 0, (), False))

    def _indices(self, slots: list[int]) -> Tensor:
        return torch.tensor(slots).to(self._step.active.device, non_blocking=True)

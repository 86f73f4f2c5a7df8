"""The two forwards of a decode loop, each of one shape for ever: a step of all slots, and a prefill of a few chunks.

All their state lies in buffers of these modules: they take no argument, so that a CUDA graph replays them without
copying anything in, and the host changes what the next replay does by writing to a buffer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import lowering  # its passes run whenever a step is compiled

from . import hf_compat
from .experts import ExpertParallelState
from .hf_compat import Model
from .hf_slots import Rows, SlotCache
from .requests import MAX_STOP_IDS, Request
from .sampling import Choice, Sampler

NO_TOKEN = -1  # in unused places of a list of stop tokens


class DecodeStep(nn.Module):
    """One token for every active slot. Buffers (B slots, L = max_len):

    ``active (B,) bool``. ``tokens (B,) int64``: last token of each slot, ``rows.starts (B,) int64``: its position.
    ``history (B, L) int64``: all tokens, prompt and answer, by position. ``prompt (B,)``, ``last (B,) int64``:
    length of the prompt, position of the last token allowed. ``stop (B, S) int64``: tokens that end an answer.
    ``temperature``, ``top_p (B,) fp32``, ``top_k``, ``seed (B,) int64``.

    Slots that are not active compute like the others, but their rows go to no expert and their buffers stay.
    """

    active: Tensor
    tokens: Tensor
    history: Tensor
    prompt: Tensor
    last: Tensor
    stop: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    seed: Tensor

    def __init__(self, model: Model, state: ExpertParallelState, batch: int, max_len: int, sampler: Sampler):
        super().__init__()
        device = state.live.device
        self.model, self.state, self.sampler, self.batch = model, state, sampler, batch
        self.rows = Rows(batch, device)
        self.cache = SlotCache(model.config, batch, max_len, self.rows)
        sizes = {"tokens": (), "history": (max_len,), "prompt": (), "last": (), "top_k": (), "seed": ()}
        for name, size in {**sizes, "stop": (MAX_STOP_IDS,)}.items():
            self._zeros(name, (batch, *size), torch.int64, device)
        self._zeros("active", (batch,), torch.bool, device)
        self._zeros("temperature", (batch,), torch.float32, device)
        self._zeros("top_p", (batch,), torch.float32, device)

    def forward(self) -> None:
        """Feed the last tokens, choose the next ones, record them, see who has finished."""
        number = torch.arange(1, self.batch + 1, device=self.active.device)
        # Live rows are a prefix of the batch for the ops; slots in it that are not active send rows without experts.
        self.state.live.copy_((number * self.active).amax())
        logits = self.feed()
        position = self.rows.starts + 1
        choice = Choice(position, self.temperature, self.top_k, self.top_p, self.seed)
        self.record(self.sampler(logits, choice))

    def feed(self) -> Tensor:
        """Logits (B, V) after the last token of every slot; fills the cache."""
        return self.model(
            input_ids=self.tokens[:, None],
            position_ids=self.rows.positions(1),
            past_key_values=self.cache,
            use_cache=True,
        ).logits[:, -1]

    def record(self, chosen: Tensor) -> None:
        """Make ``chosen (B,)`` the last token of the active slots, or the next of a prompt that is still being fed."""
        active, position = self.active, self.rows.starts + self.active
        token = torch.where(active, chosen, self.tokens)
        stops = (token[:, None] == self.stop).any(dim=1)
        if self.cache.recurrent:  # the others' prompts never come through here
            in_prompt = position < self.prompt
            token = torch.where(in_prompt, self.history.gather(1, position[:, None])[:, 0], token)
            stops = stops & ~in_prompt
        ends = stops | (position >= self.last)
        self.history.scatter_(1, position[:, None], token[:, None])
        self.tokens.copy_(token)
        self.rows.starts.copy_(position)
        self.active.copy_(active & ~ends)

    def place(self, slots: Tensor, requests: Sequence[Request], fed: Sequence[int]) -> None:
        """Put requests into slots (n,), not active yet; the first ``fed`` tokens of each prompt go to the cache."""
        length = self.history.shape[1]
        prompts = [list(r.prompt_ids) for r in requests]
        values: Mapping[str, list[Any]] = {
            "tokens": [prompt[n] for prompt, n in zip(prompts, fed, strict=True)],
            "history": [prompt + [0] * (length - len(prompt)) for prompt in prompts],
            "prompt": [len(prompt) for prompt in prompts],
            "last": [r.last_position(length) for r in requests],
            "stop": [[*r.stop_ids, *[NO_TOKEN] * (MAX_STOP_IDS - len(r.stop_ids))] for r in requests],
            "temperature": [r.temperature for r in requests],
            "top_k": [r.top_k for r in requests],
            "top_p": [r.top_p for r in requests],
            "seed": [r.seed for r in requests],
        }
        self._put(self.rows.starts, slots, list(fed))
        for name, value in values.items():
            self._put(getattr(self, name), slots, value)

    def start(self, slots: Tensor) -> None:
        """From the next step on slots (n,) decode; until now their rows were fed, but nothing of it counts."""
        self.cache.clear_slots(slots)
        self.active.index_fill_(0, slots, True)

    def _put(self, buffer: Tensor, slots: Tensor, value: list[Any]) -> None:
        buffer.index_copy_(0, slots, torch.tensor(value, dtype=buffer.dtype).to(buffer.device, non_blocking=True))

    def _zeros(self, name: str, size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
        self.register_buffer(name, torch.zeros(size, dtype=dtype, device=device), persistent=False)


class Chunk(NamedTuple):
    """A piece of one prompt on its way into the cache: ``ids`` at columns ``start`` onwards of ``slot``."""

    slot: int
    start: int
    ids: Sequence[int]  # empty: a row left free
    final: bool  # the last piece


class PrefillStep(nn.Module):
    """R chunks of C tokens into the cache, chosen from any prompts, also several of one: a row's keys are stored
    before any row looks. Buffers: ``ids (R, C) int64``; ``counted (R * C,) bool``, which tokens are not padding;
    ``used (1,) int32``, rows that hold a chunk, the first ones.
    """

    ids: Tensor
    counted: Tensor
    used: Tensor

    def __init__(self, decode: DecodeStep, chunks: int, columns: int):
        super().__init__()
        device = decode.tokens.device
        self.model, self.state = decode.model, decode.state
        self.rows = Rows(chunks, device, picked=True)
        batch, max_len = decode.history.shape
        self.cache = SlotCache(decode.model.config, batch, max_len, self.rows, owner=decode.cache)
        self.register_buffer("ids", torch.zeros(chunks, columns, dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("counted", torch.zeros(chunks * columns, dtype=torch.bool, device=device), False)
        self.register_buffer("used", torch.zeros(1, dtype=torch.int32, device=device), persistent=False)

    def forward(self) -> None:
        """Fill the cache; no token is chosen here."""
        self.state.live.copy_(self.used)
        self.model(
            input_ids=self.ids,
            position_ids=self.rows.positions(self.ids.shape[1]),
            past_key_values=self.cache,
            use_cache=True,
            **hf_compat.prefill_kwargs(self.model),
        )

    def load(self, chunks: Sequence[Chunk]) -> None:
        """What the next forward feeds: at most R chunks, also none."""
        rows, columns = self.ids.shape
        spare = rows - len(chunks)
        padded = [[*chunk.ids, *[0] * (columns - len(chunk.ids))] for chunk in chunks] + [[0] * columns] * spare
        counts = [len(chunk.ids) for chunk in chunks] + [0] * spare
        assert self.rows.slots is not None and self.rows.counts is not None
        pairs: list[tuple[Tensor, list[Any]]] = [
            (self.ids, padded),
            (self.counted, [column < count for count in counts for column in range(columns)]),
            (self.used, [len(chunks)]),
            (self.rows.starts, [chunk.start for chunk in chunks] + [0] * spare),
            (self.rows.counts, counts),
            (self.rows.slots, [chunk.slot for chunk in chunks] + [0] * spare),
        ]
        for buffer, value in pairs:
            buffer.copy_(torch.tensor(value, dtype=buffer.dtype), non_blocking=True)


def compiled_step(step: nn.Module | None, compile: bool, backend: str | Callable | None) -> Any:
    """The step as one graph; on CUDA also one CUDA graph. Its first call, which compiles, allows inexact passes."""
    if step is None or not compile:
        return step
    chosen: dict[str, Any] = {"mode": "reduce-overhead"} if backend is None else {"backend": backend}
    compiled = torch.compile(step, fullgraph=True, dynamic=False, **chosen)
    warm = False

    def run(*args: Any) -> Any:
        nonlocal warm
        with nullcontext() if warm else lowering.allow_inexact():
            result = compiled(*args)
        warm = True
        return result

    return run

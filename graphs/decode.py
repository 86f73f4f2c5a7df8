"""The decode loop: one compiled step of fixed shape, every rank with its own prompts and its own live rows.

All state of a step lives in buffers of one module: the step takes no argument, so a CUDA graph replays it
without copying anything in. Ranks run the same number of steps; a rank may have no live row at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import lowering  # noqa: F401  its passes run whenever a step is compiled
from moe_ops import get_workspace
from moe_ops.errors import CapacityError

from . import hf_compat
from .errors import RequestError
from .experts import ExpertParallelState
from .hf_compat import Model
from .sampling import Sampler, greedy
from .sharding import check_peers, expert_parallel_state, group_size, shard_experts

FILLER = 0  # token in padding and in slots without a prompt; masked or never read
CHECK_EVERY = 16  # steps between two looks at what the device recorded


class DecodeStep(nn.Module):
    """One token for every slot of the batch. Buffers (B slots, L = max_len):

    ``tokens (B, 1) int64`` last token of each slot; ``positions (B, 1) int64``; ``mask (B, L) int64``, 0 on left
    padding; ``history (B, L) int64`` tokens chosen, in columns; ``column (1,) int64`` the next column to write.
    """

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    history: Tensor
    column: Tensor

    def __init__(self, model: Model, cache: Any, batch: int, max_len: int, sampler: Sampler, device: torch.device):
        super().__init__()
        self.model, self.cache, self.sampler = model, cache, sampler
        sizes = {"tokens": (batch, 1), "positions": (batch, 1), "mask": (batch, max_len), "history": (batch, max_len)}
        for name, size in {**sizes, "column": (1,)}.items():
            self.register_buffer(name, torch.zeros(size, dtype=torch.int64, device=device), persistent=False)

    def forward(self) -> None:
        """Feed the last tokens, choose the next ones, record them."""
        out = self.model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.positions,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.positions.add_(1)
        self.record(out.logits[:, -1])

    def record(self, logits: Tensor) -> None:
        """Choose from ``logits (B, V)`` and make that the last token of each slot."""
        chosen = self.sampler(logits)[:, None]  # [B, 1]
        self.tokens.copy_(chosen)
        self.history.index_copy_(1, self.column, chosen)
        self.column.add_(1)


class _Shape(NamedTuple):
    batch: int
    max_len: int


class DecodeLoop:
    """Prefill and decode ``batch`` slots of at most ``max_len`` tokens each (prompt and answer).

    ``model``: from ``graphs.from_pretrained`` or ``shard_experts``; a plain model is prepared for one process.
    ``max_len`` must be equal on all ranks, ``batch`` need not be. ``compile=False`` runs the step eagerly,
    ``backend`` replaces Inductor with CUDA graphs. Collective: all ranks construct it and make the same calls.
    """

    def __init__(
        self,
        model: Model,
        *,
        batch: int,
        max_len: int,
        sampler: Sampler = greedy,
        compile: bool = True,
        backend: str | Callable | None = None,
    ):
        if batch < 1 or max_len < 2:
            raise RequestError(f"batch={batch}, max_len={max_len}; pass at least 1 slot of at least 2 tokens.")
        self.model, self.batch, self.max_len = model, batch, max_len
        self.state = _prepared(model)
        self.group = _group_of(self.state)
        self.group_batch = self._agree_on_shape()
        self.length = 0  # cache columns in use
        self.generated = 0  # history columns in use
        self.prompts = 0
        self.live = 0
        cache = hf_compat.full_length_cache(model.config, max_len)
        self._step = DecodeStep(model, cache, batch, max_len, sampler, self.state.live.device)
        self._run_step = _compiled(self._step, backend) if compile else self._step

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Start over with ``prompts`` (token numbers, at most ``batch`` of them, also none) and choose first tokens.

        Prompts may differ in length, also between ranks: all are padded on the left to the longest of the group.
        """
        width = self._agree_on_width(prompts)
        ids = self._load(prompts, width)
        self.set_live(len(prompts))
        logits = None
        with self._batch_declared():
            for columns in self._chunks(width):
                logits = self._prefill_chunk(ids, columns)
        assert logits is not None
        self._step.positions.copy_(self._padded_positions()[:, width - 1 : width] + 1)
        self._step.record(logits[:, -1])
        self.length, self.generated, self.prompts = width, 1, len(prompts)

    @torch.no_grad()
    def run(self, steps: int, on_step: Callable[[int], None] | None = None) -> None:
        """Decode ``steps`` more tokens for every live slot; the same number on every rank.

        ``on_step(i)`` is called after the i-th launch. The host waits for the device only in ``tokens``.
        """
        if self.generated == 0:
            raise RequestError("run before prefill; call prefill(prompts) on every rank first.")
        if self.length + steps > self.max_len:
            raise CapacityError(
                f"decode: {self.length} tokens so far and {steps} steps exceed max_len={self.max_len}; "
                "make the DecodeLoop with a larger max_len."
            )
        with self._batch_declared():
            for index in range(steps):
                self._run_step()
                self.length += 1
                self.generated += 1
                if index % CHECK_EVERY == CHECK_EVERY - 1:
                    check_peers(self.model)
                if on_step is not None:
                    on_step(index)

    def set_live(self, live: int) -> None:
        """From the next ``run`` on only the first ``live`` slots take part; a device write, no recompilation."""
        if not 0 <= live <= self.batch:
            raise RequestError(f"live={live}; pass 0 to {self.batch}, the number of slots.")
        self.live = live

    def tokens(self) -> list[list[int]]:
        """The tokens decoded so far for each prompt; waits for the device and raises what it recorded."""
        rows = self._step.history[: self.prompts, : self.generated].tolist()
        check_peers(self.model)
        return rows

    @contextmanager
    def _batch_declared(self) -> Iterator[None]:
        """While this loop runs the model, its live count holds; before and after, all rows of a forward count."""
        self.state.live.fill_(self.live)
        self.state.declare_batch(self.batch, self.group_batch)
        try:
            yield
        finally:
            self.state.declare_batch(None)

    def _prefill_chunk(self, ids: Tensor, columns: slice) -> Tensor:
        """Feed these columns of every slot; logits (B, 1 or more, V)."""
        return self.model(
            input_ids=ids[:, columns],
            attention_mask=self._step.mask,
            position_ids=self._padded_positions()[:, columns],
            past_key_values=self._step.cache,
            use_cache=True,
            **hf_compat.prefill_kwargs(self.model),
        ).logits

    def _load(self, prompts: Sequence[Sequence[int]], width: int) -> Tensor:
        """Fill mask and counters for ``prompts``; returns their ids (B, width), padded on the left."""
        ids = torch.full((self.batch, width), FILLER, dtype=torch.int64)
        mask = torch.ones(self.batch, self.max_len, dtype=torch.int64)  # ones after the prompt: causality hides them
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[row, : width - len(prompt)] = 0
        step = self._step
        step.mask.copy_(mask)
        step.column.zero_()
        step.history.zero_()
        step.cache.reset()
        return ids.to(step.tokens.device)

    def _padded_positions(self) -> Tensor:
        """Position of every column (B, L): 0 on padding and on the first token of the prompt."""
        return (self._step.mask.cumsum(1) - 1).clamp(min=0)

    def _chunks(self, width: int) -> Iterator[slice]:
        """Column ranges of a prefill that keep every rank's forward within its capacity."""
        size = width
        if self.state.world_size > 1:
            size = min(width, self.state.max_tokens_per_rank // self.group_batch)
        for start in range(0, width, max(size, 1)):
            yield slice(start, min(start + size, width))

    def _agree_on_shape(self) -> int:
        """Check what ranks must share; returns the largest batch of any rank."""
        everyone: list[_Shape] = self._gather(_Shape(self.batch, self.max_len))
        lengths = [shape.max_len for shape in everyone]
        if len(set(lengths)) > 1:
            raise RequestError(f"max_len differs between ranks: {lengths}; pass the same value on every rank.")
        largest = max(shape.batch for shape in everyone)
        if self.state.world_size > 1 and largest > self.state.max_tokens_per_rank:
            raise CapacityError(
                f"decode: batch={largest} exceeds max_tokens_per_rank={self.state.max_tokens_per_rank}; "
                "load the model with a larger max_tokens_per_rank."
            )
        return largest

    def _agree_on_width(self, prompts: Sequence[Sequence[int]]) -> int:
        """Longest prompt of the group; every rank raises if any rank's prompts do not fit."""
        problem = self._problem_with(prompts)
        everyone = self._gather((max(map(len, prompts), default=1), problem))
        for rank, (_, theirs) in enumerate(everyone):
            if theirs:
                raise RequestError(f"prefill: rank {rank}: {theirs}")
        return max(width for width, _ in everyone)

    def _problem_with(self, prompts: Sequence[Sequence[int]]) -> str | None:
        if len(prompts) > self.batch:
            return f"{len(prompts)} prompts for {self.batch} slots; make the DecodeLoop with a larger batch."
        if any(len(prompt) == 0 for prompt in prompts):
            return "an empty prompt; pass at least one token."
        longest = max(map(len, prompts), default=1)
        if longest >= self.max_len:
            return f"a prompt of {longest} tokens leaves no room in max_len={self.max_len}; pass a larger max_len."
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        bad = [token for prompt in prompts for token in prompt if not 0 <= token < vocabulary]
        return f"token {bad[0]} is outside the vocabulary of {vocabulary}." if bad else None

    def _gather(self, value: Any) -> list[Any]:
        """``value`` of every rank."""
        everyone = [value] * group_size(self.group)
        if self.group is not None:
            dist.all_gather_object(everyone, value, group=self.group)
        return everyone


def _prepared(model: Model) -> ExpertParallelState:
    """The model's expert-parallel state; a plain model becomes a group of one."""
    state = expert_parallel_state(model)
    if state is None:
        if dist.is_initialized() and dist.get_world_size() > 1:
            raise RequestError(
                "the model's experts are not sharded, but this process is one of several; load it with "
                "graphs.from_pretrained, or call graphs.shard_experts first."
            )
        shard_experts(model, None, max_tokens_per_rank=1)
        state = expert_parallel_state(model)
    assert state is not None
    return state


def _group_of(state: ExpertParallelState) -> dist.ProcessGroup | None:
    workspace = get_workspace(state.group_name)
    return workspace.group if workspace is not None else None


def _compiled(step: DecodeStep, backend: str | Callable | None) -> Callable[[], None]:
    """The step as one graph; on CUDA also one CUDA graph."""
    if backend is not None:
        return torch.compile(step, fullgraph=True, dynamic=False, backend=backend)
    return torch.compile(step, fullgraph=True, dynamic=False, mode="reduce-overhead")

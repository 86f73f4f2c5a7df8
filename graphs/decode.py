"""The decode loop: one compiled step of fixed shape; requests join and leave its slots between steps.

Every rank has its own requests and may have none. The host looks at what the device did once in ``look_every``
steps, and on a GPU at a copy one look old, so that the device never waits for the host. Ranks agree at each look how
much to prefill and whether to go on (``meeting``); between looks no rank knows or needs what the others have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ops.errors import CapacityError

from .attention import use_decode_attention
from .errors import RequestError
from .experts import ExpertParallelState
from .hf_compat import Model
from .hf_slots import adapt_attention
from .meeting import meetings_of
from .requests import Answer, Request, problem_with
from .sampling import Sampler, greedy
from .sharding import check_peers, expert_parallel_state, shard_experts
from .slots import Slots
from .step import DecodeStep, PrefillStep, compiled_step

LOOK_EVERY = 16
PREFILL_TOKENS = 256  # of one forward
PREFILLS_A_LOOK = 4  # so many forwards does the decoding of the others wait at most
CHUNK_TOKENS = 32  # a prompt is padded to a multiple of it


class _Turn(NamedTuple):
    """What a rank brings to a meeting."""

    steps: int  # until the next one: equal on all ranks
    prefills: int  # forwards that its prompts still need
    unfinished: int  # requests that it has
    problem: str | None  # why no rank can go on


class DecodeLoop:
    """Decode up to ``batch`` requests at a time, each of at most ``max_len`` tokens, prompt and answer together.

    ``model``: from ``graphs.from_pretrained`` or ``shard_experts``; a plain model is prepared for one process.
    ``sampler``: ``greedy``, or ``graphs.sample`` for requests with a temperature. ``compile=False`` runs eagerly,
    ``backend`` replaces Inductor with CUDA graphs, ``compile_prefill`` compiles the prefill too.
    ``batch_invariant``: a request keeps every bit whatever else is in the batch. Collective: all ranks construct it
    and make the same calls; ``max_len`` and ``look_every`` are equal on all, ``batch`` need not be.
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
        compile_prefill: bool = False,
        batch_invariant: bool = False,
        look_every: int = LOOK_EVERY,
    ):
        if batch < 1 or max_len < 2 or look_every < 1:
            raise RequestError(
                f"batch={batch}, max_len={max_len}, look_every={look_every}; "
                "pass at least 1 slot of at least 2 tokens, and looks at least 1 step apart."
            )
        if next(model.parameters()).is_cuda:
            use_decode_attention(model)
        adapt_attention(model)
        self.model, self.batch, self.max_len, self.look_every = model, batch, max_len, look_every
        self.samples, self.batch_invariant = sampler is not greedy, batch_invariant
        self.state = _prepared(model)
        self._meetings = meetings_of(self.state)
        self.group_batch = self._agree_on_shape()
        self._vocabulary = model.get_input_embeddings().weight.shape[0]
        self._lag = 1 if self.state.live.is_cuda else 0
        self._first: list[int] = []  # requests of the last ``prefill``, and those of them that are complete
        self._complete: dict[int, list[int]] = {}
        self._step = DecodeStep(model, self.state, batch, max_len, sampler)
        with self._declared(batch, self.group_batch, self._step.active), torch.no_grad():
            self._step.feed()  # allocates the cache, outside of any compiled code
        self._step.cache.begin_recurrence()
        self._prefill = None if self._step.cache.recurrent else self._make_prefill()
        self.slots = Slots(self._step, self._prefill, apart=batch_invariant)
        self._run_prefill = compiled_step(self._prefill, compile_prefill and compile, backend)
        self._run_step = compiled_step(self._step, compile, backend)

    def submit(self, request: Request) -> int:
        """Queue a request; it joins when a slot is free. Returns the number that its ``Answer`` will carry."""
        if problem := self._problem_with(request):
            raise RequestError(f"submit: {problem}")
        return self.slots.submit(request)

    def run(self, steps: int, on_step: Callable[[int], None] | None = None) -> list[Answer]:
        """Decode ``steps`` steps, the same number on every rank; returns the answers that became complete.

        Steps for which no rank has a request are left out. ``on_step(i)`` is called after the i-th launch. The host
        waits for the device at the end.
        """
        answers: list[Answer] = []
        for first in range(0, steps, self.look_every):
            self._turn(min(self.look_every, steps - first), on_step=on_step, first=first)
            answers += self._harvest(self._lag)
        return answers + self._harvest()

    def serve(self, requests: Iterable[Request | None]) -> Iterator[Answer]:
        """Decode this rank's ``requests`` as slots become free; yields answers in the order in which they finish.

        A ``None`` among the requests means "none yet": the loop decodes on and asks again at its next look. Ends
        when all ranks are done; until then a rank without requests takes part with no rows.
        """
        source, more, problem = iter(requests), True, None
        while True:
            try:
                more = more and self._take(source)
            except RequestError as error:  # told to the others before it is raised, here and there
                problem = str(error)
            turns = self._turn(self.look_every, coming=int(more), problem=problem)
            if not any(turn.unfinished for turn in turns):
                break
            yield from self._harvest(self._lag)
        yield from self._harvest()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """Answers to ``prompts`` (also none), in their order; ``options`` are those of ``Request``."""
        numbers = [self.submit(Request(prompt, max_new_tokens, **options)) for prompt in prompts]
        answers = {answer.request_id: answer.tokens for answer in self.serve(())}
        return [answers[number] for number in numbers]

    def prefill(self, prompts: Sequence[Sequence[int]]) -> None:
        """Start over with ``prompts`` (token numbers, at most ``batch``, also none) and choose their first tokens.

        With ``run`` and ``tokens`` the way to decode one fixed batch, every slot the same number of steps.
        """
        problem = None
        if len(prompts) > self.batch:
            problem = f"{len(prompts)} prompts for {self.batch} slots; make the DecodeLoop with a larger batch."
        requests = [Request(prompt) for prompt in prompts]
        problem = problem or next(filter(None, map(self._problem_with, requests)), None)
        self.slots.clear()
        self._complete.clear()
        if problem is None:
            self._first = [self.slots.submit(request) for request in requests]
            self.slots.admit(start=False)
        while any(turn.prefills for turn in self._turn(0, problem=problem, start=False)):
            pass
        # Prompts that go through the step take a step a token: the longest starts first, all end together.
        lengths = [1 if self._prefill is not None else len(prompt) for prompt in prompts]
        longest = max(self._meetings.meet(max(lengths, default=1)))
        for left in range(longest, 0, -1):
            self.slots.start([slot for slot, length in enumerate(lengths) if length == left])
            self.run(1)

    def set_live(self, live: int) -> None:
        """From the next ``run`` on only the first ``live`` slots take part; a device write, no recompilation."""
        if not 0 <= live <= self.batch:
            raise RequestError(f"live={live}; pass 0 to {self.batch}, the number of slots.")
        self._step.active.copy_(torch.arange(self.batch) < live)

    def tokens(self) -> list[list[int]]:
        """The tokens so far for each prompt of ``prefill``; waits for the device and raises what it recorded."""
        by_id = {answer.request_id: answer.tokens for answer in self.slots.running()} | self._complete
        check_peers(self.model)
        return [by_id[number] for number in self._first]

    @torch.no_grad()
    def _turn(
        self,
        steps: int,
        *,
        coming: int = 0,
        problem: str | None = None,
        start: bool = True,
        on_step: Callable[[int], None] | None = None,
        first: int = 0,
    ) -> list[_Turn]:
        """Meet, prefill what joins, decode ``steps`` steps; returns what the ranks brought."""
        check_peers(self.model)
        if start:
            self.slots.admit()
        mine = _Turn(steps, self.slots.prefills(), self.slots.unfinished() + coming, problem)
        everyone = self._meet(mine)
        for _ in range(min(max(turn.prefills for turn in everyone), PREFILLS_A_LOOK)):
            self._prefill_once(start)
        if any(turn.unfinished for turn in everyone):
            with self._declared(self.batch, self.group_batch, self._step.active):
                for index in range(steps):
                    self._run_step()
                    if on_step is not None:
                        on_step(first + index)
            self.slots.snapshot()
        return everyone

    def _meet(self, mine: _Turn) -> list[_Turn]:
        """Every rank's turn; all raise if any has a problem, or if they are not making the same call."""
        everyone = [_Turn(*turn) for turn in self._meetings.meet(mine)]
        for rank, turn in enumerate(everyone):
            if turn.problem is not None:
                raise RequestError(f"rank {rank}: {turn.problem}")
        steps = [turn.steps for turn in everyone]
        if len(set(steps)) > 1:
            raise RequestError(f"ranks are about to run {steps} steps; make the same calls on every rank.")
        return everyone

    def _prefill_once(self, start: bool) -> None:
        """One forward of the prefill; slots whose prompt is complete start."""
        assert self._prefill is not None
        chunks = self.slots.next_chunks()
        self._prefill.load(chunks)
        rows = self._prefill.ids.shape[0]
        with self._declared(rows, rows, self._prefill.counted):
            self._run_prefill()
        if start:
            self.slots.start([chunk.slot for chunk in chunks if chunk.final])

    def _take(self, source: Iterator[Request | None]) -> bool:
        """Queue requests while there are slots for them; False if there will be no more."""
        while self.slots.room() > 0:
            try:
                request = next(source)
            except StopIteration:
                return False
            if request is None:
                break
            self.submit(request)
        return True

    def _harvest(self, keep: int = 0) -> list[Answer]:
        answers = self.slots.harvest(keep)
        if not keep:
            check_peers(self.model)
        self._complete |= {a.request_id: a.tokens for a in answers if a.request_id in self._first}
        return answers

    @contextmanager
    def _declared(self, batch: int, group_batch: int, counted: Tensor) -> Iterator[None]:
        """While this loop runs the model, its live rows hold; before and after, all rows of a forward count."""
        self.state.declare_batch(batch, group_batch, counted)
        self.state.batch_invariant = self.batch_invariant
        try:
            yield
        finally:
            self.state.declare_batch(None)
            self.state.batch_invariant = False

    def _make_prefill(self) -> PrefillStep:
        """As many chunks in a forward as the capacity of a rank holds."""
        tokens = PREFILL_TOKENS
        if self.state.world_size > 1:
            tokens = min(tokens, self.state.max_tokens_per_rank)
        columns = min(CHUNK_TOKENS, tokens)
        return PrefillStep(self._step, tokens // columns, columns)

    def _agree_on_shape(self) -> int:
        """Check what ranks must share; returns the largest batch of any rank."""
        everyone = self._meetings.meet([self.batch, self.max_len, self.look_every])
        batches, *shared = zip(*everyone, strict=True)
        for name, values in zip(("max_len", "look_every"), shared, strict=True):
            if len(set(values)) > 1:
                raise RequestError(f"{name} differs between ranks: {list(values)}; pass the same value on every rank.")
        capacity = self.state.max_tokens_per_rank
        if self.state.world_size > 1 and max(batches) > capacity:
            raise CapacityError(
                f"decode: batch={max(batches)} exceeds max_tokens_per_rank={capacity}; "
                "load the model with a larger max_tokens_per_rank."
            )
        return max(batches)

    def _problem_with(self, request: Request) -> str | None:
        return problem_with(request, self.max_len, self._vocabulary, self.samples)


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

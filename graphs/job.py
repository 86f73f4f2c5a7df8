"""The main job, as one rank runs it: load, decode prompts or serve requests, compare with plain Hugging Face."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from moe_ops import get_workspace

from . import hf_compat
from .decode import DecodeLoop
from .hf_compat import Model
from .launch import Emit, cpu_threads
from .loading import from_pretrained
from .profiling import idle_of_trace, traced
from .report import CompileMeter, DecodeReport, GraphStats, over_ranks
from .requests import Answer, Request
from .sampling import greedy, sample
from .sharding import expert_parallel_state
from .verify import compare, load_reference

WARM_UP_STEPS = 3  # compile, record the CUDA graph, replay once
PREFILL_TOKENS = 256  # of one rank in one forward; longer prompts go in chunks
LONGEST_RANDOM_PROMPT = 12
TIMEOUT_S = 300.0  # a rank may compile this long while the others wait for it


@dataclass(frozen=True)
class DecodeJob:
    """What to decode. Without ``requests``, random prompts: ``batch`` on rank 0, fewer on the others.

    With them, rank r serves every W-th, ``batch`` at a time. ``profile``: a folder for traces of the timed part.
    """

    folder: str
    tokens: int
    batch: int
    device: str
    dtype: str
    transport: str = "auto"
    compile: bool = True
    check: bool = True
    seed: int = 0
    requests: tuple[Request, ...] = ()
    profile: str | None = None


class Phase(NamedTuple):
    """Event: what the ranks are doing now."""

    text: str


class Progress(NamedTuple):
    """Event: ``done`` of ``total`` tokens of each prompt are decoded."""

    done: int
    total: int


class Outcome(NamedTuple):
    """What rank 0 has in the end: the report, and the answers to the job's requests in their order."""

    report: DecodeReport
    answers: list[Answer]


class _Decoded(NamedTuple):
    """What one rank contributes."""

    answers: list[Answer]
    stats: GraphStats
    seconds: float  # of the timed steps
    timed_tokens: int
    gpu_idle: float | None = None


def run_rank(rank: int, world_size: int, job: DecodeJob, emit: Emit) -> Outcome | None:
    """Everything one rank does, with the default group set up; None on all ranks but 0."""
    if job.device == "cpu":
        torch.set_num_threads(cpu_threads(world_size))
    say = emit if rank == 0 else _ignore
    with hf_compat.quiet():
        say(Phase(f"loading {world_size} shards"))
        model = from_pretrained(
            job.folder,
            max_tokens_per_rank=max(PREFILL_TOKENS, job.batch),
            dtype=job.dtype,
            transport=job.transport,
            timeout_s=TIMEOUT_S,
        )
        transport = _transport(model)
        mine = _serve(model, job, rank, world_size, say) if job.requests else _decode(model, job, rank, say)
        everyone: list[_Decoded] = [mine] * world_size
        dist.all_gather_object(everyone, mine)
        _release(model)
        del model
        if rank != 0:
            return None
        matches = _matches(job, everyone, say) if job.check else None
    return Outcome(_report(job, everyone, transport, matches), _in_order(everyone) if job.requests else [])


def make_prompts(job: DecodeJob, rank: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of 3 to 12 tokens; rank r has r fewer than rank 0, counting round, but at least one."""
    count = job.batch - rank % job.batch
    generator = torch.Generator().manual_seed(job.seed * 1009 + rank)
    lengths = torch.randint(3, LONGEST_RANDOM_PROMPT + 1, (count,), generator=generator).tolist()
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _decode(model: Model, job: DecodeJob, rank: int, say: Emit) -> _Decoded:
    """Random prompts of this rank, all of them at once and to the same number of tokens."""
    prompts = make_prompts(job, rank, model.config.get_text_config().vocab_size)
    loop = DecodeLoop(model, batch=len(prompts), max_len=LONGEST_RANDOM_PROMPT + job.tokens, compile=job.compile)
    meter = CompileMeter()
    say(Phase("prefill, and compiling the step"))
    loop.prefill(prompts)
    warm = min(WARM_UP_STEPS, job.tokens - 1)
    loop.run(warm)
    loop.tokens()  # waits for the device
    meter.warm()
    timed = job.tokens - 1 - warm
    dist.barrier()
    with _timed(job, rank) as clock:
        loop.run(timed, on_step=lambda i: say(Progress(1 + warm + i + 1, job.tokens)))
        tokens = loop.tokens()
    pairs = enumerate(zip(prompts, tokens, strict=True))
    answers = [Answer(number, Request(prompt, job.tokens), decoded, "length") for number, (prompt, decoded) in pairs]
    return _Decoded(answers, meter.read(), clock.seconds, timed * len(prompts), clock.gpu_idle)


def _serve(model: Model, job: DecodeJob, rank: int, world_size: int, say: Emit) -> _Decoded:
    """Every ``world_size``-th request, as slots become free."""
    mine, max_len = job.requests[rank::world_size], max(r.last_position(2**62) + 1 for r in job.requests)
    sampler = sample if any(request.temperature > 0 for request in job.requests) else greedy
    loop = DecodeLoop(model, batch=job.batch, max_len=max(max_len, 2), sampler=sampler, compile=job.compile)
    meter = CompileMeter()
    say(Phase("compiling the step"))
    first = next(iter(mine), None)
    list(loop.serve([replace(first, max_new_tokens=1)] if first else []))
    meter.warm()
    dist.barrier()
    answers, shift = [], 1 if first else 0
    with _timed(job, rank) as clock:
        for answer in loop.serve(mine):
            answers.append(replace(answer, request_id=(answer.request_id - shift) * world_size + rank))
            say(Progress(len(answers), len(mine)))
    return _Decoded(answers, meter.read(), clock.seconds, sum(len(a.tokens) for a in answers), clock.gpu_idle)


@dataclass
class _Clock:
    seconds: float = 0.0
    gpu_idle: float | None = None


@contextmanager
def _timed(job: DecodeJob, rank: int) -> Iterator[_Clock]:
    """Seconds of what runs inside; with a profile, also how long the GPU idled."""
    clock, path = _Clock(), Path(job.profile or "") / f"rank{rank}.json"
    with traced(path) if job.profile else nullcontext():
        start = time.perf_counter()
        yield clock
        clock.seconds = time.perf_counter() - start
    if job.profile and (idle := idle_of_trace(path)) is not None:
        clock.gpu_idle = idle.between


def _transport(model: Model) -> tuple[str, str]:
    state = expert_parallel_state(model)
    workspace = get_workspace(state.group_name) if state is not None else None
    return (workspace.transport, workspace.transport_reason) if workspace is not None else ("local", "one rank")


def _release(model: Model) -> None:
    """Free what the group shares, when no rank uses it any more."""
    state = expert_parallel_state(model)
    workspace = get_workspace(state.group_name) if state is not None else None
    dist.barrier()
    torch.compiler.reset()  # graphs that hold the ops
    if workspace is not None:
        workspace.close()


def _in_order(everyone: list[_Decoded]) -> list[Answer]:
    return sorted((answer for d in everyone for answer in d.answers), key=lambda answer: answer.request_id)


def _matches(job: DecodeJob, everyone: list[_Decoded], say: Emit) -> bool | None:
    """Compare all ranks' greedy answers with the whole model in plain eager transformers; None if there are none."""
    say(Phase("comparing with plain Hugging Face"))
    device = torch.device("cuda", torch.cuda.current_device()) if job.device == "cuda" else torch.device("cpu")
    reference = load_reference(Path(job.folder), getattr(torch, job.dtype), device)
    answers = [answer for d in everyone for answer in d.answers if answer.request.temperature == 0]
    if not answers:
        return None
    result = compare(
        reference, [answer.request.prompt_ids for answer in answers], [answer.tokens for answer in answers]
    )
    say(Phase(result.mismatch or f"{result.identical} of {result.total} tokens identical"))
    return result.mismatch is None


def _report(job: DecodeJob, everyone: list[_Decoded], transport: tuple[str, str], matches: bool | None) -> DecodeReport:
    stats = over_ranks([d.stats for d in everyone])
    slowest = max(d.seconds for d in everyone)
    timed_tokens = sum(d.timed_tokens for d in everyone)
    return DecodeReport(
        ranks=len(everyone),
        device=torch.cuda.get_device_name() if job.device == "cuda" else "cpu",
        transport=transport[0],
        transport_reason=transport[1],
        graph_breaks=stats.graph_breaks,
        recompiles=stats.recompiles,
        cuda_graphs=stats.cuda_graphs,
        tokens=sum(len(answer.tokens) for d in everyone for answer in d.answers),
        tokens_per_s=timed_tokens / slowest if timed_tokens else 0.0,
        matches_reference=matches,
        gpu_idle=max((d.gpu_idle for d in everyone if d.gpu_idle is not None), default=None),
    )


def _ignore(_: Any) -> None:
    pass

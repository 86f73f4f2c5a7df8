"""The main job, as one rank runs it: load, decode, compare with plain Hugging Face."""

from __future__ import annotations

import time
from dataclasses import dataclass
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
from .report import CompileMeter, DecodeReport, GraphStats, over_ranks
from .sharding import expert_parallel_state
from .verify import compare, load_reference

WARM_UP_STEPS = 3  # compile, record the CUDA graph, replay once
PREFILL_TOKENS = 256  # of one rank in one forward; longer prompts go in chunks
TIMEOUT_S = 300.0  # a rank may compile this long while the others wait for it


@dataclass(frozen=True)
class DecodeJob:
    """What to decode. ``batch`` is the number of prompts of rank 0; the others have fewer."""

    folder: str
    tokens: int
    batch: int
    device: str
    dtype: str
    transport: str = "auto"
    check: bool = True
    seed: int = 0


class Phase(NamedTuple):
    """Event: what the ranks are doing now."""

    text: str


class Progress(NamedTuple):
    """Event: ``done`` of ``total`` tokens of each prompt are decoded."""

    done: int
    total: int


class _Decoded(NamedTuple):
    """What one rank contributes to the report."""

    prompts: list[list[int]]
    answers: list[list[int]]
    stats: GraphStats
    seconds: float  # of the timed steps
    timed_steps: int


def run_rank(rank: int, world_size: int, job: DecodeJob, emit: Emit) -> DecodeReport | None:
    """Everything one rank does, with the default group set up; rank 0 returns the report, the others None."""
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
        mine = _decode(model, make_prompts(job, rank, model.config.get_text_config().vocab_size), job, say)
        everyone: list[_Decoded] = [mine] * world_size
        dist.all_gather_object(everyone, mine)
        _release(model)
        del model
        if rank != 0:
            return None
        matches = _matches(job, everyone, say) if job.check else None
    return _report(job, everyone, transport, matches)


def make_prompts(job: DecodeJob, rank: int, vocab_size: int) -> list[list[int]]:
    """Random prompts of 3 to 12 tokens; rank r has r fewer than rank 0, counting round, but at least one."""
    count = job.batch - rank % job.batch
    generator = torch.Generator().manual_seed(job.seed * 1009 + rank)
    lengths = torch.randint(3, 13, (count,), generator=generator).tolist()
    return [torch.randint(1, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def _decode(model: Model, prompts: list[list[int]], job: DecodeJob, say: Emit) -> _Decoded:
    longest = torch.tensor(max(map(len, prompts)), device=model.device)
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    loop = DecodeLoop(model, batch=len(prompts), max_len=int(longest) + job.tokens)
    meter = CompileMeter()
    say(Phase("prefill, and compiling the step"))
    loop.prefill(prompts)
    warm = min(WARM_UP_STEPS, job.tokens - 1)
    loop.run(warm)
    loop.tokens()  # waits for the device
    meter.warm()
    timed = job.tokens - 1 - warm
    dist.barrier()
    start = time.perf_counter()
    loop.run(timed, on_step=lambda i: say(Progress(1 + warm + i + 1, job.tokens)))
    answers = loop.tokens()
    return _Decoded(prompts, answers, meter.read(), time.perf_counter() - start, timed)


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


def _matches(job: DecodeJob, everyone: list[_Decoded], say: Emit) -> bool:
    """Compare all ranks' answers with the whole model, here, in plain eager transformers."""
    say(Phase("comparing with plain Hugging Face"))
    device = torch.device("cuda", torch.cuda.current_device()) if job.device == "cuda" else torch.device("cpu")
    reference = load_reference(Path(job.folder), getattr(torch, job.dtype), device)
    result = compare(reference, [p for d in everyone for p in d.prompts], [a for d in everyone for a in d.answers])
    say(Phase(result.mismatch or f"{result.identical} of {result.total} tokens identical"))
    return result.mismatch is None


def _report(job: DecodeJob, everyone: list[_Decoded], transport: tuple[str, str], matches: bool | None) -> DecodeReport:
    stats = over_ranks([d.stats for d in everyone])
    slowest = max(d.seconds for d in everyone)
    timed_tokens = sum(d.timed_steps * len(d.prompts) for d in everyone)
    return DecodeReport(
        ranks=len(everyone),
        device=torch.cuda.get_device_name() if job.device == "cuda" else "cpu",
        transport=transport[0],
        transport_reason=transport[1],
        graph_breaks=stats.graph_breaks,
        recompiles=stats.recompiles,
        cuda_graphs=stats.cuda_graphs,
        tokens=sum(len(answer) for d in everyone for answer in d.answers),
        tokens_per_s=timed_tokens / slowest if timed_tokens else 0.0,
        matches_reference=matches,
    )


def _ignore(_: Any) -> None:
    pass

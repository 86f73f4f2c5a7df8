"""A whole decode step of Qwen3-30B-A3B's dimensions: ours against transformers' compiled ``grouped_mm``, in one run.

    python benchmarks/bench_decode.py --profile --csv decode.csv --plot decode.png
    torchrun --nproc-per-node 4 benchmarks/bench_decode.py --batch 8 --batch 32 --csv decode.csv

Random bf16 weights, the same for both; one CUDA graph a step, from the last token to the next one (greedy). A figure is
the median over steps that the host enqueues without waiting, between events after each. ``--filled`` tokens of
``--max-len`` are in the cache at the start. Under torchrun ``--batch`` is a rank's: ours decodes it against experts
spread over the ranks; transformers' own expert parallelism runs the batches of all ranks on every rank, which gives
the same number of tokens. Logits are compared before anything is timed.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from decode_models import Model, OurStep, TheirStep, build, config_of, set_content, shard_as_transformers_does
from decode_report import Line, show
from kernel_times import profile
from torch import Tensor

import graphs
import lowering
from graphs.attention import use_decode_attention
from graphs.hf_slots import adapt_attention
from graphs.report import CompileMeter

OURS, THEIRS = "moe_ep", "transformers"
MAX_OVER_NOISE = 2.0  # a rounding flips routes of random weights, on either side, so errors differ by chance


@dataclass(frozen=True)
class Case:
    """What one comparison runs."""

    model: str
    layers: int
    batch: int
    max_len: int
    filled: int


@dataclass(frozen=True)
class Settings:
    """How all cases are compiled and measured."""

    steps: int
    backend: str | None
    inductor: tuple[str, ...]
    attention: bool
    profiles: Path | None

    def compile_options(self, ours: bool) -> dict[str, Any]:
        """Arguments of ``torch.compile``: what "reduce-overhead" means, and for ours the options asked for."""
        if self.backend:
            return {"backend": self.backend}
        values = (entry.split("=", 1) for entry in self.inductor) if ours else ()
        return {"options": {"triton.cudagraphs": True} | {name: json.loads(value) for name, value in values}}


class Runner:
    """One variant of one case: compiled, checked, timed."""

    def __init__(self, variant: str, model: Model, case: Case, settings: Settings):
        self.variant, self.case = variant, case
        ranks, rank = _ranks()
        with torch.no_grad():
            if variant == OURS:
                self.step = OurStep(model, case.batch, case.max_len)
            else:
                self.step = TheirStep(model, case.batch * ranks, case.max_len)
            self.tokens = set_content(self.step, rank * case.batch if variant == OURS else 0)
        torch._dynamo.reset()
        options = settings.compile_options(ours=variant == OURS)
        lowering.enable(inexact=True)  # as the decode loop does for its step; transformers' has no op of ours
        self.call: Callable[[], None] = torch.compile(self.step, fullgraph=True, dynamic=False, **options)

    def begin(self) -> None:
        """Back to the first step."""
        self.step.fill(self.case.filled)
        self.step.tokens.copy_(self.tokens)

    def start(self) -> Tensor:
        """Compile and capture; returns the first step's logits (B, V)."""
        meter, began = CompileMeter(), time.perf_counter()
        self.begin()
        self.advance(1)
        logits = self.step.sampler.logits.clone()
        self.advance(3)
        self.compile_s, self.cuda_graphs = time.perf_counter() - began, meter.read().cuda_graphs
        return logits

    @torch.no_grad()
    def uncompiled(self) -> Tensor:
        """The first step's logits (B, V) from the same step, run eagerly."""
        self.begin()
        self.step()
        return self.step.sampler.logits.clone()

    @torch.no_grad()
    def advance(self, steps: int) -> None:
        """Run ``steps`` steps and wait for them."""
        for _ in range(steps):
            self.call()
        _wait()

    @torch.no_grad()
    def step_ms(self, steps: int) -> float:
        """Median time of a step, of the slowest rank."""
        self.begin()
        self.advance(3)
        if dist.is_initialized():
            dist.barrier()
        times = _gpu_times(self.call, steps) if torch.cuda.is_available() else _cpu_times(self.call, steps)
        worst = torch.tensor([statistics.median(times)], device=self.step.tokens.device)
        if dist.is_initialized():
            dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        return worst.item()


def _gpu_times(call: Callable[[], None], steps: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) for first, second in itertools.pairwise(events)]


def _cpu_times(call: Callable[[], None], steps: int) -> list[float]:
    stamps = [time.perf_counter()]
    for _ in range(steps):
        call()
        stamps.append(time.perf_counter())
    return [1e3 * (second - first) for first, second in itertools.pairwise(stamps)]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def error_of(got: Tensor, wanted: Tensor) -> float:
    """Relative error of a row of logits (B, V), median over rows; rows of different sequences are 1.4 apart."""
    errors = (got.float() - wanted.float()).norm(dim=1) / wanted.float().norm(dim=1)
    return errors.median().item()


def prepare(variant: str, model: Model, case: Case, attention: bool) -> None:
    """Make ``model`` what ``variant`` runs; ours for good, as its experts stay sharded."""
    if variant == THEIRS:
        model.set_experts_implementation("grouped_mm")
        return
    if graphs.expert_parallel_state(model) is None:
        graphs.shard_experts(model, max_tokens_per_rank=max(case.batch, 64), timeout_s=60.0)
        if attention:
            use_decode_attention(model)
        adapt_attention(model)


def compare(case: Case, models: dict[str, Model], settings: Settings) -> list[Line]:
    """Both variants of one case, theirs first.

    Its error is against the same step uncompiled. Ours is against theirs compiled, and must not be larger by more than
    ``MAX_OVER_NOISE``.
    """
    ranks, rank = _ranks()
    lines: list[Line] = []
    wanted = noise = None
    for variant, model in models.items():
        prepare(variant, model, case, settings.attention)
        runner = Runner(variant, model, case, settings)
        logits = runner.start()
        mine = slice(rank * case.batch, (rank + 1) * case.batch)
        if wanted is None or noise is None:
            wanted = logits[mine]
            error = noise = error_of(wanted, runner.uncompiled()[mine])
        else:
            error = error_of(logits, wanted)
            assert error < MAX_OVER_NOISE * noise + 0.01, f"error {error} of {variant}, {noise} of transformers"
        ms = runner.step_ms(settings.steps)
        lines.append(
            Line(
                case.model, case.layers, ranks, case.batch, case.max_len, case.filled, variant, round(ms, 4),
                round(case.batch * ranks / ms * 1e3, 1), round(lines[0].step_ms / ms, 3) if lines else None,
                runner.cuda_graphs, round(runner.compile_s, 1), round(error, 5),
            )
        )  # fmt: skip
        if rank == 0:
            print(lines[-1], flush=True)
        if settings.profiles is not None:
            write_profile(runner, settings.profiles / f"profile_w{ranks}_b{case.batch}_l{case.max_len}_{variant}.txt")
        del runner
    return lines


def write_profile(runner: Runner, path: Path) -> None:
    """Kernel groups of a replay on rank 0's terminal, single kernels in ``path``."""
    if not torch.cuda.is_available():
        return
    runner.begin()
    with torch.no_grad():
        found = profile(runner.call)
    if _ranks()[1] == 0:
        kernels = "\n".join(f"{us:9.1f} us {count:6.1f} x {name[:150]}" for name, us, count in found.kernels)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{runner.variant} {runner.case}\n{found.text()}\n\n{kernels}\n")
        print(f"-- {runner.variant} {runner.case}\n{found.text()}", flush=True)


def _ranks() -> tuple[int, int]:
    return (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)


def start_ranks() -> torch.device:
    """Join the others under torchrun; returns this rank's device."""
    cuda, local = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", device_id=device if cuda else None)
    return device


def main(
    batch: Annotated[list[int] | None, typer.Option(help="sequences a rank; may repeat")] = None,
    max_len: Annotated[list[int] | None, typer.Option(help="tokens that the cache holds; may repeat")] = None,
    filled: Annotated[float, typer.Option(help="share of the cache that is filled at the start")] = 0.5,
    model: str = "qwen3-30b-a3b",
    layers: int = 12,
    steps: int = 60,
    with_profile: Annotated[Path | None, typer.Option("--profile", help="write kernel times into this folder")] = None,
    csv_path: Annotated[Path | None, typer.Option("--csv", help="append the rows here")] = None,
    plot_path: Annotated[Path | None, typer.Option("--plot")] = None,
    minutes: Annotated[float, typer.Option(help="start no new case after this")] = 10.0,
    inductor: Annotated[list[str] | None, typer.Option(help="Inductor option for ours: name=value; may repeat")] = None,
    attention: Annotated[bool, typer.Option(help="ours with its own decode attention, else with sdpa")] = True,
    backend: Annotated[str | None, typer.Option(help="instead of Inductor with CUDA graphs, for a dry run")] = None,
) -> None:
    """Print a table of step times; every row is checked against transformers' logits first."""
    began, device = time.monotonic(), start_ranks()
    ranks, rank = _ranks()
    lengths, lines = max_len or [320], []
    settings = Settings(steps, backend, tuple(inductor or ()), attention, with_profile)
    config = config_of(model, layers, 2 * max(lengths))
    with torch.no_grad():
        models = {THEIRS: build(config, device), OURS: build(config_of(model, layers, 2 * max(lengths)), device)}
        if ranks > 1:
            shard_as_transformers_does(models[THEIRS])
    for length in lengths:
        for size in batch or [1, 16, 64]:
            late = torch.tensor([float(time.monotonic() - began > 60 * minutes)], device=device)
            if ranks > 1:
                dist.all_reduce(late)
            if late.item():
                continue
            case = Case(model, layers, size, length, int(length * filled))
            lines += compare(case, models, settings)
    if rank == 0:
        show(lines, csv_path, plot_path)
    if ranks > 1:
        dist.barrier()
        os._exit(0)  # NCCL work captured in graphs can hang its own shutdown


if __name__ == "__main__":
    typer.run(main)

"""The command ``moe-ep``. Each subcommand is one small function that calls into the packages."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from moe_ops.errors import ArgumentError, MoeEpError

if TYPE_CHECKING:
    from .job import DecodeJob
    from .launch import Emit
    from .report import DecodeReport

app = typer.Typer(help="Expert-parallel MoE inference in one CUDA graph a step.", add_completion=False)


@app.callback()
def _root() -> None:
    """Without a callback typer would make a single subcommand the whole program."""


def main() -> None:
    """Entry point: errors that a user can mend are one line, not a traceback."""
    try:
        app()
    except MoeEpError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


@app.command()
def decode(
    model: Annotated[str | None, typer.Option(help="Checkpoint folder or Hub name; default: a random one.")] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks to start; default 2 (1 on a single GPU).")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to decode for each prompt.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts of rank 0; the other ranks have fewer.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on the CPU, else bfloat16) or a torch dtype.")] = "auto",
    transport: Annotated[str, typer.Option(help="auto, multicast, p2p, nccl or gloo.")] = "auto",
    check: Annotated[bool, typer.Option(help="Compare every token with plain Hugging Face on one process.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")] = False,
) -> None:
    """Decode an MoE model whose experts are spread over ranks, and compare it with plain Hugging Face.

    Starts its own ranks, or is one of them under torchrun.
    """
    from . import launch

    torchrun = launch.under_torchrun()
    ranks = int(os.environ["WORLD_SIZE"]) if torchrun else ranks
    device, ranks = choose_device(device, ranks, int(os.environ.get("LOCAL_WORLD_SIZE", 0)) if torchrun else None)
    dtype = choose_dtype(dtype, device)
    with launch.stdout_kept_clean() as stdout, checkpoint(model, dtype) as folder:
        job = make_job(folder, tokens, batch, device, dtype, transport, check)
        with progress_display(enabled=not torchrun or launch.is_first()) as on_event:
            report = run_here(job, on_event) if torchrun else start_ranks(job, ranks, on_event)
        if report is not None:
            os.write(stdout, render(report, as_json).encode())
    if report is not None and report.matches_reference is False:
        sys.exit(1)


@app.command()
def selftest(
    ranks: Annotated[int | None, typer.Option(min=2, help="Ranks to start; default: one a GPU, else 2.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")] = False,
) -> None:
    """Check every transport of this machine against the oracle, bit for bit, and that it moved the data itself."""
    import torch
    from rich.console import Console

    from . import launch
    from . import selftest as checks

    device, ranks = choose_device(device, ranks or max(torch.cuda.device_count(), 2), None)
    with launch.stdout_kept_clean() as stdout:
        with Console(stderr=True).status("starting") as status:
            verdicts = checks.run(device, ranks, lambda name: status.update(f"{name}: {ranks} ranks on {device}"))
        report = checks.as_dict(ranks, verdicts)
        os.write(stdout, (json.dumps(report) + "\n" if as_json else checks.as_table(ranks, verdicts)).encode())
    if not report["passed"]:
        sys.exit(1)


@app.command()
def tune(
    experts: Annotated[int, typer.Option(min=1, help="Experts of a layer, over all ranks.")],
    top_k: Annotated[int, typer.Option(min=1, help="Experts per token.")],
    hidden: Annotated[int, typer.Option(min=1, help="Hidden size.")],
    inner: Annotated[int, typer.Option(min=1, help="Intermediate size of one expert.")],
    ranks: Annotated[int, typer.Option(min=1, help="Ranks that the experts are spread over.")] = 1,
    tokens: Annotated[str, typer.Option(help="Row counts of the gathered batch.")] = "1,4,16,64,128,256,512,2048,8192",
    out: Annotated[Path | None, typer.Option(help="Table; default: the installed one of this GPU.")] = None,
) -> None:
    """Measure tile shapes of fused_moe on this GPU and keep the best in a table. An interrupted run resumes."""
    import torch
    from rich.progress import Progress

    from moe_ops.fused_moe_config import Shape
    from moe_ops.fused_moe_tune import tune as tune_shapes

    if not torch.cuda.is_available():
        raise ArgumentError("tune: there is no CUDA device here; run it on the GPU that the table is for.")
    if not all(part.strip().isdigit() for part in tokens.split(",")):
        raise ArgumentError(f"--tokens {tokens}: pass counts with commas between them, as in 1,16,64.")
    local = -(-experts // ranks)
    shapes = [(Shape(local, top_k, hidden, inner, int(count)), experts) for count in tokens.split(",")]
    with Progress() as display:
        task = display.add_task("tuning", total=len(shapes))

        def show(line: str) -> None:
            display.print(line)
            display.advance(task)

        path = tune_shapes(shapes, out=out, progress=show)
    print(path)


def choose_device(device: str, ranks: int | None, local_ranks: int | None) -> tuple[str, int]:
    """Device type and number of ranks; GPUs only if every rank of this machine gets its own."""
    import torch

    gpus = torch.cuda.device_count()
    if device not in ("auto", "cpu", "cuda"):
        raise ArgumentError(f"--device {device}: pass auto, cpu or cuda.")
    if ranks is None:
        ranks = 1 if gpus == 1 and device != "cpu" else 2
    enough = gpus >= (local_ranks or ranks)
    if device == "cuda" and not enough:
        raise ArgumentError(f"--device cuda: {ranks} ranks need a GPU each, here are {gpus}; pass fewer --ranks.")
    return ("cuda" if enough else "cpu") if device == "auto" else device, ranks


def choose_dtype(dtype: str, device: str) -> str:
    """A torch dtype by name; on GPUs only 16-bit ones, which the kernels take."""
    if dtype == "auto":
        return "float32" if device == "cpu" else "bfloat16"
    allowed = ("bfloat16", "float16") if device == "cuda" else ("float32", "bfloat16", "float16")
    if dtype not in allowed:
        raise ArgumentError(f"--dtype {dtype}: on {device} pass one of {', '.join(allowed)}.")
    return dtype


def make_job(folder: str, tokens: int, batch: int, device: str, dtype: str, transport: str, check: bool) -> DecodeJob:
    from .job import DecodeJob

    return DecodeJob(folder, tokens=tokens, batch=batch, device=device, dtype=dtype, transport=transport, check=check)


@contextmanager
def checkpoint(model: str | None, dtype: str) -> Iterator[str]:
    """The folder of ``model``, or a small random Qwen3-MoE checkpoint made for this run."""
    from .loading import resolve_folder

    if model is not None:
        yield str(resolve_folder(model))
        return
    import torch

    from .checkpoints import make_checkpoint
    from .hf_compat import quiet

    with TemporaryDirectory(prefix="moe-ep-") as folder, quiet():
        yield str(make_checkpoint(Path(folder), dtype=getattr(torch, dtype)))


def start_ranks(job: DecodeJob, ranks: int, on_event: Emit) -> DecodeReport:
    """Run the job in new processes."""
    from .job import run_rank
    from .launch import run_ranks

    return run_ranks(run_rank, job, ranks=ranks, device=job.device, on_event=on_event)[0]


def run_here(job: DecodeJob, on_event: Emit) -> DecodeReport | None:
    """Run the job as the rank that torchrun made of this process."""
    from . import launch
    from .job import run_rank

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with launch.process_group(launch.rank_device(job.device, launch.local_rank()), rank, world_size):
        return run_rank(rank, world_size, job, on_event)


def render(report: DecodeReport, as_json: bool) -> str:
    """The report as one JSON object, or as a table."""
    if as_json:
        return json.dumps(report.as_dict()) + "\n"
    width = max(len(label) for label, _ in report.rows())
    return "".join(f"{label:<{width}}  {text}\n" for label, text in report.rows())


@contextmanager
def progress_display(enabled: bool) -> Iterator[Emit]:
    """A progress bar on stderr, fed with the events of a job."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from .job import Phase
    from .job import Progress as Decoded

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not enabled) as display:
        task = display.add_task("starting", total=None)

        def show(event: object) -> None:
            if isinstance(event, Phase):
                display.update(task, description=event.text)
            elif isinstance(event, Decoded):
                display.update(task, description="decoding", completed=event.done, total=event.total)

        yield show


if __name__ == "__main__":
    main()

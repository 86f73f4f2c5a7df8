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

from .explain_cli import explain

if TYPE_CHECKING:
    from .job import DecodeJob, Outcome
    from .launch import Emit
    from .report import DecodeReport
    from .requests import Request

    Lines = list[tuple[int, Request]]

app = typer.Typer(help="Expert-parallel MoE inference in one CUDA graph a step.", add_completion=False)
app.command()(explain)


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
    batch: Annotated[int, typer.Option(min=1, help="Prompts of rank 0, the others have fewer; or slots a rank.")] = 4,
    requests: Annotated[Path | None, typer.Option(help="JSON lines of prompts (text or token numbers).")] = None,
    profile: Annotated[Path | None, typer.Option(help="Folder for a Chrome trace of each rank.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto (float32 on the CPU, else bfloat16) or a torch dtype.")] = "auto",
    transport: Annotated[str, typer.Option(help="auto, multicast, p2p, nccl or gloo.")] = "auto",
    compile: Annotated[bool, typer.Option(help="Compile the step into one graph; else run it eagerly.")] = True,
    check: Annotated[bool, typer.Option(help="Compare every token with plain Hugging Face on one process.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")] = False,
) -> None:
    """Decode an MoE model whose experts are spread over ranks, and compare it with plain Hugging Face.

    Starts its own ranks, or is one of them under torchrun. Decodes random prompts, or with --requests those of a
    file: each line a prompt or {"prompt": ..., "max_new_tokens", "temperature", "top_k", "top_p", "seed",
    "stop_ids"}. Answers go to stdout, a JSON object a line in the order of the file; the report then to stderr.
    """
    from . import launch

    torchrun = launch.under_torchrun()
    ranks = int(os.environ["WORLD_SIZE"]) if torchrun else ranks
    device, ranks = choose_device(device, ranks, int(os.environ.get("LOCAL_WORLD_SIZE", 0)) if torchrun else None)
    dtype = choose_dtype(dtype, device)
    with launch.stdout_kept_clean() as stdout, checkpoint(model, dtype) as folder:
        lines = read_lines(requests, folder, tokens)
        job = make_job(folder, tokens, batch, device, dtype, transport, compile, check, lines, profile)
        with progress_display(enabled=not torchrun or launch.is_first()) as on_event:
            outcome = run_here(job, on_event) if torchrun else start_ranks(job, ranks, on_event)
        if outcome is not None:
            show(outcome, answer_objects(lines, outcome, folder), as_json, stdout)
    if outcome is not None and outcome.report.matches_reference is False:
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
    out: Annotated[Path | None, typer.Option(help="Table; default: the installed one, which calls read.")] = None,
) -> None:
    """Measure tile shapes of fused_moe on this GPU and keep the best in a table. An interrupted run resumes."""
    import torch
    from rich.progress import Progress

    from moe_ops.align import MAX_LOCAL_EXPERTS
    from moe_ops.fused_moe_config import Shape
    from moe_ops.fused_moe_tune import tune as tune_shapes

    if not torch.cuda.is_available():
        raise ArgumentError("tune: there is no CUDA device here; run it on the GPU that the table is for.")
    if not all(part.strip().isdecimal() and int(part) for part in tokens.split(",")):
        raise ArgumentError(f"--tokens {tokens}: pass counts from 1 up with commas between them, as in 1,16,64.")
    local = -(-experts // ranks)
    if top_k > experts or local > MAX_LOCAL_EXPERTS:
        raise ArgumentError(
            f"--top-k {top_k}, --experts {experts}, --ranks {ranks}: pass at most --experts as --top-k, and so many "
            f"--ranks that each has at most {MAX_LOCAL_EXPERTS} experts."
        )
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


def read_lines(path: Path | None, folder: str, tokens: int) -> Lines:
    """The requests of a file with their line numbers; none without a file."""
    from .request_file import Checkpoint, read_requests

    return read_requests(path, Checkpoint(folder), tokens) if path is not None else []


def make_job(
    folder: str, tokens: int, batch: int, device: str, dtype: str, transport: str, compile: bool,
    check: bool, lines: Lines, profile: Path | None,
) -> DecodeJob:  # fmt: skip
    from .job import DecodeJob

    if profile is not None:
        profile.mkdir(parents=True, exist_ok=True)
    return DecodeJob(
        folder, tokens=tokens, batch=batch, device=device, dtype=dtype, transport=transport,
        compile=compile, check=check, requests=tuple(request for _, request in lines),
        profile=None if profile is None else str(profile),
    )  # fmt: skip


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


def start_ranks(job: DecodeJob, ranks: int, on_event: Emit) -> Outcome:
    """Run the job in new processes."""
    from .job import run_rank
    from .launch import run_ranks

    return run_ranks(run_rank, job, ranks=ranks, device=job.device, on_event=on_event)[0]


def run_here(job: DecodeJob, on_event: Emit) -> Outcome | None:
    """Run the job as the rank that torchrun made of this process."""
    from . import launch
    from .job import run_rank

    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with launch.process_group(launch.rank_device(job.device, launch.local_rank()), rank, world_size):
        return run_rank(rank, world_size, job, on_event)


def answer_objects(lines: Lines, outcome: Outcome, folder: str) -> list[dict]:
    """The answers to a file's requests, in its order."""
    from .request_file import Checkpoint, answer_line

    if not lines:
        return []
    known = Checkpoint(folder)
    return [answer_line(line, answer, known) for (line, _), answer in zip(lines, outcome.answers, strict=True)]


def show(outcome: Outcome, answers: list[dict], as_json: bool, stdout: int) -> None:
    """Write the answers and the report: one JSON object, or answers and a table."""
    if as_json:
        whole = outcome.report.as_dict() | ({"answers": answers} if answers else {})
        os.write(stdout, (json.dumps(whole) + "\n").encode())
        return
    os.write(stdout, "".join(json.dumps(answer) + "\n" for answer in answers).encode())
    os.write(2 if answers else stdout, as_table(outcome.report).encode())


def as_table(report: DecodeReport) -> str:
    """The report as aligned lines."""
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

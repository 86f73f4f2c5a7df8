"""``moe-ep explain``: what lowering does to the decode step of a model, as text, JSON and a picture."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from moe_ops.errors import ArgumentError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lowering import Explanation

    from .launch import Emit

PROMPT = 4  # tokens; what is explained is the step behind it


@dataclass(frozen=True)
class ExplainJob:
    """What to explain; every rank gets the same."""

    folder: str
    batch: int
    device: str
    dtype: str
    transport: str
    rounding: str
    without: tuple[str, ...]


def explain(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder, Hub name or family such as deepseek_v3 (tiny, random).")
    ] = None,
    ranks: Annotated[int | None, typer.Option(min=1, help="Ranks to start; default 2 (1 on a single GPU).")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences a rank, all of them live.")] = 4,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="A torch dtype, 16-bit on GPUs.")] = "bfloat16",
    transport: Annotated[str, typer.Option(help="auto, multicast, p2p, nccl or gloo.")] = "auto",
    rounding: Annotated[str, typer.Option(help="compiled or eager.")] = "compiled",
    without: Annotated[list[str] | None, typer.Option(help="Leave out the pass of this name; may repeat.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Draw one layer before and after into this file.")] = None,
) -> None:
    """Say what lowering does to a model's decode step: what was joined, dropped, refused and why, and what is left.

    Compiles the step on every rank and runs it; numbers of graphs, partitions and copies are those of rank 0.
    """
    from lowering import Options

    from . import cli, launch

    Options(frozenset(without or ()), rounding)  # names that do not exist: an error before any rank starts
    if svg is not None and not svg.parent.is_dir():
        raise ArgumentError(f"--svg {svg}: {svg.parent} is no folder; make it first.")
    device, ranks = cli.choose_device(device, ranks, None)
    if svg is not None and ranks == 1:
        raise ArgumentError("--svg: one rank alone exchanges nothing, so there is no layer to draw; pass --ranks 2.")
    dtype = cli.choose_dtype(dtype, device)
    with launch.stdout_kept_clean() as stdout, _folder(model, dtype) as folder:
        job = ExplainJob(folder, batch, device, dtype, transport, rounding, tuple(without or ()))
        found = launch.run_ranks(explain_rank, job, ranks=ranks, device=device, on_event=lambda event: None)[0]
        os.write(stdout, ((found.to_json() if as_json else str(found)) + "\n").encode())
        if svg is not None:
            svg.write_text(found.to_svg())


def explain_rank(rank: int, world_size: int, job: ExplainJob, emit: Emit) -> Explanation | None:
    """One rank's part: load, make a decode loop, explain its step; the result of rank 0."""
    import torch

    import lowering

    from .decode import DecodeLoop
    from .loading import from_pretrained

    lowering.enable(without=job.without, rounding=job.rounding, inexact=True)  # as the loop runs it
    rows = job.batch * PROMPT
    model = from_pretrained(
        job.folder, dtype=getattr(torch, job.dtype), device=job.device, max_tokens_per_rank=rows,
        transport=job.transport,
    )  # fmt: skip
    loop = DecodeLoop(model, batch=job.batch, max_len=2 * PROMPT, compile=False)
    loop.prefill([[1 + token for token in range(PROMPT)]] * job.batch)
    with loop._declared(loop.batch, loop.group_batch, loop._step.active):
        found = lowering.explain(loop._step)
    return found if rank == 0 else None


@contextmanager
def _folder(model: str | None, dtype: str) -> Iterator[str]:
    """The checkpoint's folder; a family's name stands for a small random model of it."""
    import torch

    from . import cli
    from .checkpoints import FAMILIES, make_checkpoint
    from .hf_compat import quiet

    if model not in FAMILIES:
        with cli.checkpoint(model, dtype) as folder:
            yield folder
        return
    with TemporaryDirectory(prefix="moe-ep-") as name, quiet():
        yield str(make_checkpoint(Path(name), model, getattr(torch, dtype)))

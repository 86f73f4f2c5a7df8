"""``moe-ep selftest``: every transport that this machine has, bit for bit against the oracle, and proof that it ran.

Each transport gets processes of its own, so that one that fails, crashes or hangs leaves the others their verdict.
The proof: before a round every rank fills its memory behind the signals with bytes that no round sends; afterwards it
counts the chunks of its dispatch slots that peers have overwritten.
"""

from __future__ import annotations

import faulthandler
import os
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import moe_ops
from moe_ops import transports
from moe_ops.selfcheck import Case, check_round, check_turns
from moe_ops.shapes import CHUNK_BYTES, align_up
from moe_ops.symmetric import Channel

from . import launch
from .errors import RankFailedError

POISON = 0x7F  # as bf16 3.4e38, as fp16 NaN, as an id 2139062143: nothing that a round sends
TIMEOUT_S = 30.0  # of one wait for a peer
LIMIT_S = 120.0  # of one transport; a rank that takes longer is ended
TOP_K = 5  # ids and weights fill no whole chunks


class Sizes(NamedTuple):
    """One workspace: T, H, and the rounds to run on it."""

    rows: int
    hidden_size: int
    rounds: int


SIZES = {
    "cpu": (Sizes(4, 40, 4), Sizes(3, 129, 4)),
    "cuda": (Sizes(16, 7168, 8), Sizes(64, 2048, 8), Sizes(5, 129, 8)),
}
DESCRIPTIONS = {
    "multicast": "NVLink multicast stores and reductions",
    "p2p": "peer pointers over NVLink or PCIe",
    "nccl": "NCCL collectives",
    "gloo": "gloo collectives",
    "emulator": "the p2p kernels, interpreted on CPUs",
    "emulator-multicast": "the multicast kernels, interpreted on CPUs",
}


@dataclass(frozen=True)
class Verdict:
    """What one transport did. ``bytes_moved``: by peers into dispatch slots, over all ranks; None for collectives."""

    transport: str
    reason: str
    rounds: int
    passed: bool
    problem: str | None
    bytes_moved: int | None


class RankResult(NamedTuple):
    """One rank's rounds on one transport."""

    rounds: int
    problem: str | None
    bytes_moved: int | None


def available_transports(device: str, ranks: int) -> list[str]:
    """What this machine can run between ``ranks`` processes on ``device`` ("cpu" or "cuda", a GPU each)."""
    if device == "cpu":
        return ["gloo", "emulator", "emulator-multicast"]
    symmetric = transports.symmetric_memory_available()
    gpus = range(ranks)
    reachable = all(torch.cuda.can_device_access_peer(a, b) for a in gpus for b in gpus if a != b)
    multicast = symmetric and all(transports.multicast_supported(torch.device("cuda", gpu)) for gpu in gpus)
    return ["multicast"] * multicast + ["p2p"] * (symmetric and reachable) + ["nccl"]


def run(device: str, ranks: int, on_start: Callable[[str], None] = lambda name: None) -> list[Verdict]:
    """Check all of them, one after the other; ``on_start`` hears which one is next."""
    verdicts = []
    for name in available_transports(device, ranks):
        on_start(name)
        verdicts.append(_judge(name, device, ranks))
    return verdicts


def _judge(name: str, device: str, ranks: int) -> Verdict:
    """Run one transport in new processes. Whatever ends a rank is a problem of the transport, not of this command."""
    reason = DESCRIPTIONS[name]
    try:
        with _environment(name):
            results = launch.run_ranks(run_rank, name, ranks=ranks, device=device, on_event=lambda event: None)
    except RankFailedError as error:
        return Verdict(name, reason, 0, False, str(error), None)
    problem = next((f"rank {rank}: {r.problem}" for rank, r in enumerate(results) if r.problem), None)
    moved = [r.bytes_moved for r in results if r.bytes_moved is not None]
    total = sum(moved) if moved else None
    if problem is None and name in transports.KERNEL_TRANSPORTS and not total:
        problem = "no byte was moved"
    return Verdict(name, reason, results[0].rounds, problem is None, problem, total)


@contextmanager
def _environment(name: str) -> Iterator[None]:
    """What Triton must find in a rank's environment: it interprets for the emulator and compiles for GPUs."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1" if name.startswith("emulator") else "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def run_rank(rank: int, ranks: int, transport: str, emit: launch.Emit) -> RankResult:
    """All rounds of one transport on one rank; never fewer after a difference, so that the ranks stay together."""
    faulthandler.dump_traceback_later(LIMIT_S, exit=True)
    torch.set_num_threads(launch.cpu_threads(ranks))
    results = [_check_sizes(sizes, transport) for sizes in SIZES["cuda" if _on_cuda() else "cpu"]]
    faulthandler.cancel_dump_traceback_later()
    moved = [r.bytes_moved for r in results if r.bytes_moved is not None]
    problem = next((r.problem for r in results if r.problem), None)
    return RankResult(sum(r.rounds for r in results), problem, sum(moved) if moved else None)


def _on_cuda() -> bool:
    return dist.get_backend() == "nccl"


def _check_sizes(sizes: Sizes, transport: str) -> RankResult:
    """The rounds of one workspace."""
    ws = moe_ops.init_workspace(
        None,
        max_tokens_per_rank=sizes.rows,
        hidden_size=sizes.hidden_size,
        top_k=TOP_K,
        transport=transport,
        timeout_s=TIMEOUT_S,
    )
    problems, total = [], 0
    for seed in range(sizes.rounds):
        case = Case(seed, _counts(ws.world_size, sizes.rows, seed))
        _poison(ws.channel)
        problem = check_round(ws, case)
        if seed % 2 == 0:  # the zero-copy forms; half of the rounds, so that an emulated run stays under a minute
            turned = check_turns(ws, case)  # also after a difference, which other ranks may not see
            problem = problem or turned
        if ws.channel is not None:
            moved, expected = _overwritten(ws.channel), _pushed(ws.channel, case)
            total += moved
            if problem is None and moved != expected:
                problem = f"peers moved {moved} bytes in place of {expected}"
        problems += [f"H = {sizes.hidden_size}, live rows {case.counts}: {problem}"] if problem else []
    moved_bytes = None if ws.channel is None else total
    ws.close()
    return RankResult(sizes.rounds, problems[0] if problems else None, moved_bytes)


def _counts(world_size: int, rows: int, seed: int) -> tuple[int, ...]:
    """Live rows of every rank: all full, then one rank alone, then at random with zeros among them."""
    if seed == 0:
        return (rows,) * world_size
    if seed == 1:
        return (0,) * (world_size - 1) + (rows,)
    rng = random.Random(seed)
    return tuple(rng.choice((0, rows, rng.randint(0, rows))) for _ in range(world_size))


def _poison(channel: Channel | None) -> None:
    """Fill own slots: not before all ranks have read the last round's sums there, and before anybody pushes again."""
    dist.barrier()
    if channel is not None:
        channel.buffer.local[channel.layout.dispatch_offset :].fill_(POISON)
        if channel.buffer.local.is_cuda:
            torch.cuda.synchronize(channel.buffer.local.device)
    dist.barrier()


def _overwritten(channel: Channel) -> int:
    """Bytes, in whole chunks, that no longer hold the poison in this rank's dispatch slots."""
    layout = channel.layout
    chunks = channel.buffer.local[layout.dispatch_offset : layout.combine_offset].view(-1, CHUNK_BYTES)
    return int((chunks != POISON).any(dim=1).sum()) * CHUNK_BYTES


def _pushed(channel: Channel, case: Case) -> int:
    """Bytes that a round of ``check_round`` (int32 ids, fp32 weights) puts there; own rows by multicast only."""
    rows = sum(case.counts) - (0 if channel.multicast else case.counts[channel.rank])
    return rows * (channel.layout.hidden_row + 2 * align_up(4 * channel.layout.top_k, CHUNK_BYTES))


def as_dict(ranks: int, verdicts: list[Verdict]) -> dict[str, Any]:
    """What ``--json`` prints."""
    return {
        "ranks": ranks,
        "transports": [asdict(verdict) for verdict in verdicts],
        "passed": all(verdict.passed for verdict in verdicts),
    }


def as_table(ranks: int, verdicts: list[Verdict]) -> str:
    """The same for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("transport", "what it is", "rounds", "bytes moved by peers", "result", title=f"{ranks} ranks")
    for v in verdicts:
        moved = "-" if v.bytes_moved is None else f"{v.bytes_moved:,}"
        table.add_row(v.transport, v.reason, str(v.rounds), moved, "equal" if v.passed else "DIFFERS")
    console = Console(file=StringIO(), width=110)
    console.print(table)
    for v in verdicts:
        if v.problem:
            console.print(f"{v.transport}: {v.problem}", markup=False, highlight=False)
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()

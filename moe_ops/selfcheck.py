"""Bitwise check of a transport against the oracle, with data that every rank can make for itself.

``init_workspace`` runs one small round before it trusts symmetric memory; ``moe-ep selftest`` runs many.
All values are small integers, so every sum is exact and the order of additions cannot show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from . import reference
from .errors import MoeEpError
from .transports import TransportChoice
from .workspace import _WORKSPACES, Workspace

PROBE_TIMEOUT_S = 10.0
PROBE_ROUNDS = 3  # odd and even epochs, and one slot used again


class Case(NamedTuple):
    """One round: the seed of its data and the live rows of every rank."""

    seed: int
    counts: tuple[int, ...]


def probe_transport(workspace: Workspace) -> str | None:
    """One small round on ``workspace``'s transport; None if all bits are right, else what was wrong."""
    config = replace(
        workspace.config,
        max_tokens_per_rank=4,
        hidden_size=64,
        top_k=2,
        timeout_s=min(workspace.config.timeout_s, PROBE_TIMEOUT_S),
    )
    choice = TransportChoice(workspace.transport, "probe")
    name = f"{workspace.group_name}/probe"
    probe = Workspace(workspace.group, name, config, choice, workspace.device)
    try:
        with _registered(probe):
            for seed in range(PROBE_ROUNDS):
                counts = tuple((rank + seed) % 5 for rank in range(probe.world_size))
                problem = check_round(probe, Case(seed, counts))
                if problem:
                    return problem
    except (MoeEpError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None


def check_round(ws: Workspace, case: Case) -> str | None:
    """Metadata, dispatch and combine once; None if equal to the oracle bit for bit, else the first difference."""
    config, rank, name = ws.config, ws.rank, ws.group_name
    batches, outputs, max_tokens = make_data(ws, case)
    mine = reference.Batch(*(tensor.to(ws.device) for tensor in batches[rank]))
    local_tokens = torch.tensor([case.counts[rank]], dtype=torch.int32).to(ws.device)
    ops = torch.ops.moe_ep
    metadata = ops.metadata_update(local_tokens, name)
    gathered = ops.agv_dispatch(*mine, local_tokens, metadata, max_tokens, name)
    rows = config.max_tokens_per_rank
    combined = ops.rsv_combine(
        outputs[rank].to(ws.device), local_tokens, metadata, rows, name, out_dtype=config.dtype
    )
    if ws.device.type == "cuda":
        torch.cuda.synchronize(ws.device)
    ws.check()

    valid = sum(case.counts)
    want = reference.agv_dispatch(batches, case.counts, max_tokens)
    pairs = [("metadata", metadata, reference.metadata(case.counts)[rank])]
    pairs += [
        (f"dispatched {field}", got[:valid], expected[:valid])
        for field, got, expected in zip(reference.Batch._fields, gathered, want, strict=True)
    ]
    pairs.append(("ids of dead rows", gathered[1][valid:], want.topk_ids[valid:]))
    sums = reference.rsv_combine(outputs, case.counts, [rows] * ws.world_size, config.dtype)
    pairs.append(("combined rows", combined, sums[rank]))
    return next((_difference(*pair) for pair in pairs if not torch.equal(pair[1].cpu(), pair[2])), None)


def check_turns(ws: Workspace, case: Case, turns: int = 2) -> str | None:
    """Dispatch into symmetric buffers and combine from them, in turns; None if equal to the oracle, else what is not.

    Rank r's stand-in for experts multiplies by r + 1: small integers, no rounding for up to 8 ranks in fp16 and bf16.
    """
    rank, name, ops = ws.rank, ws.group_name, torch.ops.moe_ep
    batches, _, max_tokens = make_data(ws, case)
    mine = reference.Batch(*(tensor.to(ws.device) for tensor in batches[rank]))
    local_tokens = torch.tensor([case.counts[rank]], dtype=torch.int32).to(ws.device)
    metadata = ops.metadata_update(local_tokens, name)
    gathered = ws.layer_batch(max_tokens, mine.topk_ids.dtype, mine.topk_weights.dtype)
    output, rows = ws.layer_output(max_tokens), ws.config.max_tokens_per_rank
    sums = []
    for _ in range(turns):
        ops.agv_dispatch_into(*mine, local_tokens, metadata, *gathered, name, entry_barrier=False)
        torch.mul(gathered.hidden, rank + 1, out=output)
        kept = [tensor.clone() for tensor in gathered]
        sums.append(
            ops.rsv_combine_from(
                output, local_tokens, metadata, rows, [], name, out_dtype=ws.config.dtype, exit_barrier=False
            )
        )
    if ws.device.type == "cuda":
        torch.cuda.synchronize(ws.device)
    ws.check()

    valid, want = sum(case.counts), reference.agv_dispatch(batches, case.counts, max_tokens)
    factor = sum(range(1, ws.world_size + 1))
    live = torch.arange(rows)[:, None] < case.counts[rank]
    expected = torch.where(live, batches[rank].hidden * factor, 0)
    pairs = [
        (f"{field} of the buffer", got[:valid], right[:valid])
        for field, got, right in zip(reference.Batch._fields, kept, want, strict=True)
    ]
    pairs.append(("ids of the buffer's dead rows", kept[1][valid:], want.topk_ids[valid:]))
    pairs += [(f"rows combined in turn {turn}", got, expected) for turn, got in enumerate(sums)]
    return next((_difference(*pair) for pair in pairs if not torch.equal(pair[1].cpu(), pair[2])), None)


def make_data(ws: Workspace, case: Case) -> tuple[list[reference.Batch], list[Tensor], int]:
    """Every rank's batch and expert output, the same on all ranks: T = max_tokens_per_rank, M = W * T."""
    config = ws.config
    generator = torch.Generator().manual_seed(case.seed)
    rows, max_tokens = config.max_tokens_per_rank, config.max_tokens_per_rank * ws.world_size

    def integers(*shape: int) -> Tensor:
        return torch.randint(-8, 9, shape, generator=generator).to(config.dtype)

    batches = [
        reference.Batch(
            integers(rows, config.hidden_size),
            torch.randint(-1, 1000, (rows, config.top_k), generator=generator, dtype=torch.int32),
            torch.rand(rows, config.top_k, generator=generator),
        )
        for _ in range(ws.world_size)
    ]
    return batches, [integers(max_tokens, config.hidden_size) for _ in range(ws.world_size)], max_tokens


@contextmanager
def _registered(ws: Workspace) -> Iterator[None]:
    """Let the ops find ``ws`` by its name for a while."""
    _WORKSPACES[ws.group_name] = ws
    try:
        yield
    finally:
        ws.close()


def _difference(name: str, got: Tensor, want: Tensor) -> str:
    got = got.cpu()
    where = (got != want).nonzero()[0].tolist() if got.shape == want.shape else "shape"
    return f"{name} differ from the oracle at {where}"

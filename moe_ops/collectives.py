"""The communication ops over ``torch.distributed`` collectives: transports ``nccl``, ``gloo`` and ``local``.

Plain torch, static shapes, no host sync, so they capture into a CUDA graph where the backend does.
They work on any cluster that the group spans. Rows travel padded to the capacity that all ranks agreed
on in ``init_workspace``; the combine moves rows by all-to-all and adds them here, fp32 in rank order,
so that results are bit-equal to ``moe_ops.reference``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import CapacityError
from .shapes import CHUNK_BYTES, align_up

if TYPE_CHECKING:
    from .workspace import Workspace

COUNT_BYTES = 4  # one int32 live count
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before 2.13


def metadata_update(ws: Workspace, local_tokens: Tensor) -> Tensor:
    """``[valid_tokens, rank_token_offset, ep_max_tokens]`` (3,) int32 from this rank's live count."""
    counts = _gather_counts(ws, local_tokens, "metadata_update")
    return torch.stack((counts.sum(), counts[: ws.rank].sum(), counts.max())).to(torch.int32)


def agv_dispatch(
    ws: Workspace,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    max_tokens: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather the live rows of all ranks into ``max_tokens`` (M) rows: hidden (M, H), ids and weights (M, K)."""
    parts = [_as_bytes(tensor) for tensor in (hidden, topk_ids, topk_weights)]
    capacity = hidden.shape[0] if ws.world_size == 1 else ws.config.max_tokens_per_rank
    width = sum(align_up(part.shape[1], CHUNK_BYTES) for part in parts)
    packed = parts[0].new_zeros(capacity + 1, width)  # the last row carries the live count
    start, slices = 0, []
    for part in parts:
        slices.append(slice(start, start + part.shape[1]))
        packed[: part.shape[0], slices[-1]] = part
        start += align_up(part.shape[1], CHUNK_BYTES)
    packed[capacity, :COUNT_BYTES] = local_tokens.reshape(1).view(torch.uint8)
    gathered = _all_gather(ws, packed, "agv_dispatch")  # (W, capacity + 1, width)

    counts = gathered[:, capacity, :COUNT_BYTES].contiguous().view(torch.int32).flatten()
    rank, row, live = _row_sources(counts, max_tokens)
    rows = gathered[rank, row.clamp(max=capacity - 1)] if capacity else packed.new_zeros(max_tokens, width)
    out = [
        rows[:, part].contiguous().view(tensor.dtype)
        for part, tensor in zip(slices, (hidden, topk_ids, topk_weights), strict=True)
    ]
    out[1].masked_fill_(~live[:, None], -1)
    return out[0], out[1], out[2]


def rsv_combine(
    ws: Workspace, expert_output: Tensor, local_tokens: Tensor, metadata: Tensor, num_rows: int, out_dtype: torch.dtype
) -> Tensor:
    """This rank's rows of the sum of all ranks' ``expert_output`` (M, H): (num_rows, H), dead rows zero."""
    live = torch.arange(num_rows, device=expert_output.device) < local_tokens
    if ws.world_size == 1:
        padded = _fit_rows(expert_output.contiguous(), num_rows)
        return torch.where(live[:, None], padded.float(), 0.0).to(out_dtype)
    capacity = ws.config.max_tokens_per_rank
    counts = _gather_counts(ws, local_tokens, "rsv_combine")
    offsets = counts.cumsum(0) - counts
    slot = torch.arange(capacity, device=expert_output.device)
    wanted = (offsets[:, None] + slot).clamp(max=max(expert_output.shape[0] - 1, 0))  # (W, capacity)
    recv = _all_to_all(ws, expert_output[wanted], "rsv_combine")
    total = recv[0].float()
    for part in recv[1:]:
        total = total + part.float()
    return torch.where(live[:, None], _fit_rows(total, num_rows), 0.0).to(out_dtype)


def _row_sources(counts: Tensor, max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """For every row of the gathered batch: the rank it comes from, its row there, and whether it is live."""
    ends = counts.long().cumsum(0)
    rows = torch.arange(max_tokens, device=counts.device)
    rank = torch.searchsorted(ends, rows, right=True).clamp(max=counts.numel() - 1)
    return rank, rows - (ends - counts)[rank], rows < ends[-1]


def _fit_rows(tensor: Tensor, rows: int) -> Tensor:
    """The first ``rows`` rows, padded with zeros where there are fewer."""
    if tensor.shape[0] >= rows:
        return tensor[:rows]
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])


def _as_bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8).view(tensor.shape[0], -1) if tensor.numel() else (
        tensor.new_zeros(tensor.shape[0], tensor.shape[1] * tensor.element_size(), dtype=torch.uint8)
    )


def _gather_counts(ws: Workspace, local_tokens: Tensor, op: str) -> Tensor:
    """The live counts of all ranks, (W,) int32."""
    return _all_gather(ws, local_tokens.reshape(1).contiguous(), op).flatten()


def _all_gather(ws: Workspace, tensor: Tensor, op: str) -> Tensor:
    """``tensor`` of every rank, stacked in rank order."""
    if ws.world_size == 1:
        return tensor[None]
    out = tensor.new_empty(ws.world_size * tensor.shape[0], *tensor.shape[1:])  # gloo takes no stacked output
    _bounded(ws, op, out, lambda: _all_gather_flat(out, tensor, group=ws.group, async_op=True))
    return out.view(ws.world_size, *tensor.shape)


def _all_to_all(ws: Workspace, tensor: Tensor, op: str) -> Tensor:
    """``tensor[r]`` of every rank for this rank ``r``, stacked in rank order; leading dimension W."""
    out = torch.empty_like(tensor)
    send = tensor.contiguous()
    return _bounded(ws, op, out, lambda: dist.all_to_all_single(out, send, group=ws.group, async_op=True))


def _bounded(ws: Workspace, op: str, out: Tensor, start: Callable[[], dist.Work | None]) -> Tensor:
    """Run one collective and wait for it, at most ``timeout_s`` on the CPU; the group's own limit on CUDA."""
    if out.is_cuda:
        work = start()
        assert work is not None
        work.wait()
        return out
    with ws.census.watch(op):
        work = start()
        assert work is not None
        work.wait(ws.timeout)
    return out


def check_counts_on_host(op: str, local_tokens: Tensor, rows: int) -> None:
    """On the CPU the live count is readable: raise ``CapacityError`` where it does not fit ``rows``."""
    count = int(local_tokens)
    if not 0 <= count <= rows:
        raise CapacityError(f"{op}: {count} live rows, but the batch has {rows}; pass 0 <= local_tokens <= {rows}.")

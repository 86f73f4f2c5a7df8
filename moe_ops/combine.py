"""``rsv_combine``: this rank's rows of the experts' output, summed over all ranks in fp32."""

from __future__ import annotations

import torch
from torch import Tensor

from . import collectives
from .comm_launch import Launch, choose_launch, is_aligned, rows_of
from .dispatch import check_metadata
from .errors import DtypeError, ShapeError
from .registration import register_op
from .shapes import (
    CPU_HIDDEN_DTYPES,
    check_dtype,
    check_hidden_dtype,
    check_rank,
    check_same_device,
    check_scalar_count,
)
from .symmetric import Channel
from .workspace import resolve

_OP = "rsv_combine"


def _check(
    expert_output: Tensor, local_tokens: Tensor, metadata: Tensor, num_rows: int, out_dtype: torch.dtype | None
) -> None:
    check_rank(_OP, "expert_output", expert_output, 2, "(M, H)")
    check_hidden_dtype(_OP, "expert_output", expert_output)
    check_scalar_count(_OP, "local_tokens", local_tokens)
    check_metadata(_OP, metadata)
    check_same_device(_OP, expert_output=expert_output, local_tokens=local_tokens, metadata=metadata)
    if not 0 <= num_rows <= expert_output.shape[0]:
        raise ShapeError(f"{_OP}: num_rows = {num_rows}; pass this rank's T, at most M = {expert_output.shape[0]}.")
    if out_dtype is not None and out_dtype not in CPU_HIDDEN_DTYPES:
        raise DtypeError(f"{_OP}: out_dtype = {out_dtype}; pass bfloat16, float16 or float32.")


def _empty_output(expert_output: Tensor, num_rows: int, out_dtype: torch.dtype | None) -> Tensor:
    return expert_output.new_empty(num_rows, expert_output.shape[1], dtype=out_dtype or torch.bfloat16)


def _fake(
    expert_output: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    num_rows: int,
    group_name: str,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check(expert_output, local_tokens, metadata, num_rows, out_dtype)
    return _empty_output(expert_output, num_rows, out_dtype)


def launch_combine(
    channel: Channel,
    expert_output: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    num_rows: int,
    out_dtype: torch.dtype | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """The kernel over symmetric memory: one launch, one barrier. ``launch``: in place of the table's (tuning)."""
    from .chunks import Slots
    from .combine_kernels import _combine_kernel

    layout = channel.layout
    out = _empty_output(expert_output, num_rows, out_dtype)
    launch = launch or choose_launch(_OP, expert_output.shape[0], channel)
    _combine_kernel[(launch.blocks,)](
        channel.peers(),
        Slots(layout.combine_offset, layout.combine_slot, layout.capacity),
        rows_of(expert_output),
        rows_of(out),
        local_tokens,
        metadata,
        min(num_rows, layout.max_tokens_per_rank),
        expert_output.shape[0],
        num_rows,
        W=channel.world_size,
        N=launch.chunks,
        ALIGNED_IN=is_aligned(expert_output),
        ALIGNED_OUT=is_aligned(out),
        MULTICAST=channel.multicast,
        num_warps=launch.warps,  # pyright: ignore[reportCallIssue]
    )
    return out


def _run(
    expert_output: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    num_rows: int,
    group_name: str,
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    _check(expert_output, local_tokens, metadata, num_rows, out_dtype)
    ws = resolve(group_name, _OP)
    ws.check_call(
        _OP, rows=num_rows, hidden_size=expert_output.shape[1], top_k=None, device=expert_output.device
    )  # fmt: skip
    ws.check()
    if not expert_output.is_cuda:
        collectives.check_counts_on_host(_OP, local_tokens, num_rows)
    if ws.channel is None:
        return collectives.rsv_combine(
            ws, expert_output, local_tokens, metadata, num_rows, out_dtype or torch.bfloat16
        )  # fmt: skip
    check_dtype(_OP, "expert_output", expert_output, (ws.config.dtype,))
    out = launch_combine(ws.channel, expert_output, local_tokens, metadata, num_rows, out_dtype)
    if not out.is_cuda:
        ws.check()
    return out


rsv_combine = register_op(
    "rsv_combine(Tensor expert_output, Tensor local_tokens, Tensor metadata, int num_rows, str group_name, *, "
    "ScalarType? out_dtype=None) -> Tensor",
    fake=_fake,
    cpu=_run,
    cuda=_run,
    ordered=True,
)

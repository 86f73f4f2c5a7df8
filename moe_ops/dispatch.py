"""``agv_dispatch``: gather the live rows of all ranks (hidden states, ids and weights) in rank order."""

from __future__ import annotations

import torch
from torch import Tensor

from . import collectives
from .comm_launch import WARP, Launch, choose_launch, is_aligned, rows_of
from .errors import ShapeError
from .registration import register_op
from .shapes import CHUNK_BYTES, check_dtype, check_rank, check_same_device, check_scalar_count, check_topk
from .symmetric import Channel
from .workspace import resolve

_OP = "agv_dispatch"


def _check(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, local_tokens: Tensor, metadata: Tensor, max_tokens: int
) -> None:
    check_topk(_OP, hidden, topk_ids, topk_weights)
    check_scalar_count(_OP, "local_tokens", local_tokens)
    check_metadata(_OP, metadata)
    check_same_device(
        _OP,
        hidden=hidden,
        topk_ids=topk_ids,
        topk_weights=topk_weights,
        local_tokens=local_tokens,
        metadata=metadata,
    )
    if max_tokens < hidden.shape[0]:
        raise ShapeError(
            f"{_OP}: max_tokens = {max_tokens} is below this rank's {hidden.shape[0]} rows; pass at least W * T."
        )


def check_metadata(op: str, metadata: Tensor) -> None:
    """``metadata (3,) int32``, contiguous, as ``metadata_update`` returns it."""
    check_rank(op, "metadata", metadata, 1, "(3,)")
    check_dtype(op, "metadata", metadata, (torch.int32,))
    if metadata.shape[0] != 3:
        raise ShapeError(f"{op}: metadata has shape {tuple(metadata.shape)}; pass what metadata_update returned, (3,).")


def _empty_outputs(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, max_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    first, second, third = (
        tensor.new_empty(max_tokens, tensor.shape[1]) for tensor in (hidden, topk_ids, topk_weights)
    )
    return first, second, third


def _fake(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    max_tokens: int,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(hidden, topk_ids, topk_weights, local_tokens, metadata, max_tokens)
    return _empty_outputs(hidden, topk_ids, topk_weights, max_tokens)


def _routing_lanes(topk_ids: Tensor, topk_weights: Tensor, launch: Launch) -> int:
    """Lanes that cover ids and weights of a row, a chunk each, and every thread."""
    chunks = sum(-(-tensor.shape[1] * tensor.element_size() // CHUNK_BYTES) for tensor in (topk_ids, topk_weights))
    return max(WARP * launch.warps, 1 << (chunks - 1).bit_length())


def launch_dispatch(
    channel: Channel,
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    max_tokens: int,
    launch: Launch | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel over symmetric memory: one launch, one barrier. ``launch``: in place of the table's (tuning)."""
    from .chunks import Slots
    from .dispatch_kernels import Batch, _dispatch_kernel

    layout = channel.layout
    outputs = _empty_outputs(hidden, topk_ids, topk_weights, max_tokens)
    launch = launch or choose_launch(_OP, max_tokens, channel)
    _dispatch_kernel[(launch.blocks,)](
        channel.peers(),
        Slots(layout.dispatch_offset, layout.dispatch_slot, layout.capacity),
        Batch(rows_of(hidden), rows_of(topk_ids), rows_of(topk_weights)),
        Batch(*map(rows_of, outputs)),
        local_tokens,
        metadata,
        min(hidden.shape[0], layout.max_tokens_per_rank),
        max_tokens,
        W=channel.world_size,
        N=launch.chunks,
        R=_routing_lanes(topk_ids, topk_weights, launch),
        ALIGNED_IN=is_aligned(hidden),
        ALIGNED_OUT=is_aligned(outputs[0]),
        ALIGNED_ROUTING=all(map(is_aligned, (topk_ids, topk_weights, *outputs[1:]))),
        MULTICAST=channel.multicast,
        num_warps=launch.warps,  # pyright: ignore[reportCallIssue]
    )
    return outputs


def _run(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    max_tokens: int,
    group_name: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(hidden, topk_ids, topk_weights, local_tokens, metadata, max_tokens)
    ws = resolve(group_name, _OP)
    ws.check_call(_OP, rows=hidden.shape[0], hidden_size=hidden.shape[1], top_k=topk_ids.shape[1], device=hidden.device)
    ws.check()
    if not hidden.is_cuda:
        collectives.check_counts_on_host(_OP, local_tokens, hidden.shape[0])
    if ws.channel is None:
        return collectives.agv_dispatch(
            ws, hidden, topk_ids, topk_weights, local_tokens, metadata, max_tokens
        )  # fmt: skip
    check_dtype(_OP, "hidden", hidden, (ws.config.dtype,))
    outputs = launch_dispatch(ws.channel, hidden, topk_ids, topk_weights, local_tokens, metadata, max_tokens)
    if not hidden.is_cuda:
        ws.check()
    return outputs


agv_dispatch = register_op(
    "agv_dispatch(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor local_tokens, Tensor metadata, "
    "int max_tokens, str group_name) -> (Tensor hidden, Tensor topk_ids, Tensor topk_weights)",
    fake=_fake,
    cpu=_run,
    cuda=_run,
    ordered=True,
)

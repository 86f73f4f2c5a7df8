"""``agv_dispatch_into``: gather the live rows of all ranks into buffers that the caller holds on every rank.

Rows are pushed straight to their final place: no slot, no copy out. The buffers are ``Workspace.empty`` tensors (or
``Workspace.layer_batch``), the same ones on all ranks. By default the op is safe alone: before the first store
the ranks meet, so that nobody's earlier work still reads its buffers. ``entry_barrier=False`` leaves that meeting out;
legal where every rank has met all others, in any communication op of the group, since it last used the buffers
(docs/protocol.md): in strict turns of dispatch_into, experts and combine it always is.

It returns how many rows there are: ``valid_tokens``, or 0 where a rank did not come. Whoever computes from the gathered
rows into a buffer of ``rsv_combine_from(exit_barrier=False)`` takes that count, so that in a workspace that gave up
nothing is overwritten which a healthy rank may still read.

``experts_per_rank``, if not 0, promises that expert ``e`` lies on rank ``e // experts_per_rank``. The hidden states of
a row then travel only to ranks that have an expert for it; elsewhere they are unspecified, and no expert reads them.

``dispatch_into(ws, batch, local_tokens, metadata, out, entry_barrier=...)`` is the launcher that other ops compose.
"""

from __future__ import annotations

from torch import Tensor

from . import collectives
from .buffers import SymmetricTensors
from .comm_launch import WARP, Launch, choose_launch, is_aligned, place_of, routed_ids, rows_of
from .dispatch import check_metadata
from .errors import ShapeError
from .pdl import chain_start
from .reference import Batch
from .registration import register_op
from .shapes import check_dtype, check_rank, check_same_device, check_scalar_count, check_topk
from .symmetric import Channel
from .workspace import Workspace, resolve

_OP = "agv_dispatch_into"
_NAMES = ("out_hidden", "out_ids", "out_weights")


def _check(batch: Batch, local_tokens: Tensor, metadata: Tensor, out: Batch) -> None:
    check_topk(_OP, *batch)
    check_scalar_count(_OP, "local_tokens", local_tokens)
    check_metadata(_OP, metadata)
    placed = dict(zip(_NAMES, out, strict=True))
    check_same_device(
        _OP, hidden=batch.hidden, ids=batch.topk_ids, weights=batch.topk_weights, local_tokens=local_tokens,
        metadata=metadata, **placed,
    )  # fmt: skip
    for (name, tensor), like in zip(placed.items(), batch, strict=True):
        check_rank(_OP, name, tensor, 2, "(M, H) or (M, K)")
        check_dtype(_OP, name, tensor, (like.dtype,))
        if tensor.shape[1] != like.shape[1] or tensor.shape[0] != out.hidden.shape[0]:
            raise ShapeError(
                f"{_OP}: {name} has shape {tuple(tensor.shape)}; pass (M, {like.shape[1]}), the same M for all three."
            )


def launch_dispatch_into(
    channel: Channel,
    buffers: SymmetricTensors,
    batch: Batch,
    local_tokens: Tensor,
    metadata: Tensor,
    out: Batch,
    *,
    entry_barrier: bool = True,
    experts_per_rank: int = 0,
    experts_follow: bool = False,
    launch: Launch | None = None,
) -> Tensor:
    """The kernel over symmetric memory: one launch, one barrier, or two with ``entry_barrier``.

    ``experts_follow``: the next launch on this stream is ours, so it may start early and wait (``pdl``).
    """
    from .dispatch_into_kernels import _dispatch_into_kernel
    from .dispatch_kernels import Batch as KernelBatch

    layout = channel.layout
    places = KernelBatch(*(place_of(_OP, name, tensor, buffers) for name, tensor in zip(_NAMES, out, strict=True)))
    live = metadata.new_empty(1)
    launch = launch or choose_launch(_OP, out.hidden.shape[0], channel)
    _dispatch_into_kernel[(launch.blocks,)](
        channel.peers(),
        KernelBatch(*map(rows_of, batch)),
        places,
        live,
        local_tokens,
        metadata,
        min(batch.hidden.shape[0], layout.max_tokens_per_rank),
        out.hidden.shape[0],
        experts_per_rank,
        W=channel.world_size,
        N=max(launch.chunks, WARP * launch.warps),
        ALIGNED=all(map(is_aligned, batch)),
        MULTICAST=channel.multicast,
        ENTRY=entry_barrier,
        ROUTED=routed_ids(channel, batch.topk_ids.shape[1], experts_per_rank),
        num_warps=launch.warps,  # pyright: ignore[reportCallIssue]
        **chain_start(experts_follow, live.device),
    )
    return live


def dispatch_into(
    ws: Workspace,
    batch: Batch,
    local_tokens: Tensor,
    metadata: Tensor,
    out: Batch,
    *,
    entry_barrier: bool = True,
    experts_per_rank: int = 0,
    experts_follow: bool = False,
) -> Tensor:
    """Gather ``batch`` (T rows) of all ranks into ``out`` (M rows); ids of rows >= valid_tokens become -1.

    ``experts_follow``: see ``launch_dispatch_into``.
    Returns the number of gathered rows, (1,) int32: 0 in a workspace that gave up.
    Raises ``SymmetricMemoryError`` where ``out`` is not memory of ``ws.empty``.
    """
    _check(batch, local_tokens, metadata, out)
    hidden = batch.hidden
    ws.check_call(
        _OP, rows=hidden.shape[0], hidden_size=hidden.shape[1], top_k=batch.topk_ids.shape[1], device=hidden.device
    )
    ws.check()
    if not hidden.is_cuda:
        collectives.check_counts_on_host(_OP, local_tokens, hidden.shape[0])
    if ws.channel is None:
        _copy_collective(ws, batch, local_tokens, metadata, out)
        return metadata[0:1].clone()
    check_dtype(_OP, "hidden", hidden, (ws.config.dtype,))
    live = launch_dispatch_into(
        ws.channel, ws.buffers, batch, local_tokens, metadata, out, entry_barrier=entry_barrier,
        experts_per_rank=experts_per_rank, experts_follow=experts_follow,
    )  # fmt: skip
    if not hidden.is_cuda:
        ws.check()
    return live


def _copy_collective(ws: Workspace, batch: Batch, local_tokens: Tensor, metadata: Tensor, out: Batch) -> None:
    if ws.world_size > 1:
        for name, tensor in zip(_NAMES, out, strict=True):
            ws.buffers.find(_OP, name, tensor)
    results = collectives.agv_dispatch(ws, *batch, local_tokens, metadata, out.hidden.shape[0])
    for tensor, result in zip(out, results, strict=True):
        tensor.copy_(result)


def _fake(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, local_tokens: Tensor, metadata: Tensor,
    out_hidden: Tensor, out_ids: Tensor, out_weights: Tensor, group_name: str, *, entry_barrier: bool = True,
    experts_per_rank: int = 0,
) -> Tensor:  # fmt: skip
    _check(
        Batch(hidden, topk_ids, topk_weights), local_tokens, metadata, Batch(out_hidden, out_ids, out_weights)
    )  # fmt: skip
    return metadata.new_empty(1)


def _run(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, local_tokens: Tensor, metadata: Tensor,
    out_hidden: Tensor, out_ids: Tensor, out_weights: Tensor, group_name: str, *, entry_barrier: bool = True,
    experts_per_rank: int = 0,
) -> Tensor:  # fmt: skip
    batch, out = Batch(hidden, topk_ids, topk_weights), Batch(out_hidden, out_ids, out_weights)
    ws = resolve(group_name, _OP)
    return dispatch_into(
        ws, batch, local_tokens, metadata, out, entry_barrier=entry_barrier, experts_per_rank=experts_per_rank
    )  # fmt: skip


agv_dispatch_into = register_op(
    "agv_dispatch_into(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor local_tokens, Tensor metadata, "
    "Tensor(a!) out_hidden, Tensor(b!) out_ids, Tensor(c!) out_weights, str group_name, *, bool entry_barrier=True, "
    "int experts_per_rank=0) -> Tensor",
    fake=_fake,
    cpu=_run,
    cuda=_run,
)

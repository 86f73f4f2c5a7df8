"""``rsv_combine_from``: this rank's rows of the experts' output, summed over all ranks' buffers where they lie.

The expert output lies in a buffer that the caller holds on every rank (``Workspace.empty`` or
``Workspace.layer_output``): nothing is copied in, peers pull their rows. The rest is ``rsv_combine_add``: scale and
addends, which may be none. By default the op is safe alone: after the last load the ranks meet, so that whatever
comes next may overwrite the buffer. ``exit_barrier=False`` leaves that meeting out; legal where every rank meets all
others, in any communication op of the group, before it writes to the buffer again (docs/protocol.md): in strict turns
of dispatch_into, experts and combine_from it always is, if the experts count rows by what dispatch_into returned.

``topk_ids`` (num_rows, K) with ``experts_per_rank`` not 0 promise that expert ``e`` lies on rank
``e // experts_per_rank``, and that ranks without an expert for a row have zeros there: they are not read.

``combine_from(ws, expert_output, local_tokens, metadata, num_rows, epilogue, ...)`` is the launcher that other ops
compose.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import collectives
from .buffers import SymmetricTensors
from .combine import _check as _check_combine
from .combine import _empty_output
from .combine_add import Epilogue, apply_epilogue, check_epilogue
from .comm_launch import Launch, choose_launch, is_aligned, place_of, routed_ids, rows_of
from .errors import ShapeError
from .registration import register_op
from .shapes import INDEX_DTYPES, check_dtype
from .symmetric import Channel
from .workspace import Workspace, resolve

_OP = "rsv_combine_from"
NO_EPILOGUE = Epilogue((), 1.0, False)


class Routing(NamedTuple):
    """This rank's ids ``(num_rows, K)``; expert ``e`` lies on rank ``e // experts_per_rank``."""

    topk_ids: Tensor
    experts_per_rank: int


def launch_combine_from(
    channel: Channel,
    buffers: SymmetricTensors,
    expert_output: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    num_rows: int,
    epilogue: Epilogue = NO_EPILOGUE,
    out_dtype: torch.dtype | None = None,
    *,
    exit_barrier: bool = True,
    routing: Routing | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """The kernel over symmetric memory: one launch, one barrier, or two with ``exit_barrier``."""
    from .combine_from_kernels import _combine_from_kernel

    layout, max_tokens = channel.layout, expert_output.shape[0]
    out = _empty_output(expert_output, num_rows, out_dtype)
    ids = routing.topk_ids if routing else local_tokens.view(1, 1)
    launch = launch or choose_launch(_OP, max_tokens, channel)
    _combine_from_kernel[(launch.blocks,)](
        channel.peers(),
        place_of(_OP, "expert_output", expert_output, buffers),
        rows_of(out),
        tuple(map(rows_of, epilogue.addends)) or (rows_of(out),),
        epilogue.scale,
        rows_of(ids),
        routing.experts_per_rank if routing else 0,
        local_tokens,
        metadata,
        min(num_rows, layout.max_tokens_per_rank),
        max_tokens,
        num_rows,
        W=channel.world_size,
        N=launch.chunks,
        ADDENDS=len(epilogue.addends),
        ROUND_EACH=epilogue.round_each,
        ALIGNED=all(map(is_aligned, (out, *epilogue.addends))),
        MULTICAST=channel.multicast,
        EXIT=exit_barrier,
        ROUTED=routed_ids(channel, ids.shape[1], routing.experts_per_rank) if routing else 0,
        num_warps=launch.warps,  # pyright: ignore[reportCallIssue]
    )
    return out


def combine_from(
    ws: Workspace,
    expert_output: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    num_rows: int,
    epilogue: Epilogue = NO_EPILOGUE,
    out_dtype: torch.dtype | None = None,
    *,
    exit_barrier: bool = True,
    routing: Routing | None = None,
) -> Tensor:
    """``(num_rows, H)``, fresh: the sum over ranks of ``expert_output`` (M, H) and its epilogue; rows >= t are zero
    before the epilogue. Raises ``SymmetricMemoryError`` where ``expert_output`` is not memory of ``ws.empty``.
    """
    dtype = out_dtype or torch.bfloat16
    _check_combine(expert_output, local_tokens, metadata, num_rows, dtype)
    check_epilogue(_OP, epilogue, expert_output, num_rows, dtype)
    ws.check_call(_OP, rows=num_rows, hidden_size=expert_output.shape[1], top_k=None, device=expert_output.device)
    ws.check()
    if not expert_output.is_cuda:
        collectives.check_counts_on_host(_OP, local_tokens, num_rows)
    if ws.channel is None:
        if ws.world_size > 1:
            ws.buffers.find(_OP, "expert_output", expert_output)
        rows = collectives.rsv_combine(ws, expert_output, local_tokens, metadata, num_rows, dtype)
        return apply_epilogue(rows, epilogue)
    check_dtype(_OP, "expert_output", expert_output, (ws.config.dtype,))
    out = launch_combine_from(
        ws.channel, ws.buffers, expert_output, local_tokens, metadata, num_rows, epilogue, dtype,
        exit_barrier=exit_barrier, routing=routing,
    )  # fmt: skip
    if not out.is_cuda:
        ws.check()
    return out


def _routing(num_rows: int, topk_ids: Tensor | None, experts_per_rank: int) -> Routing | None:
    if topk_ids is None or experts_per_rank == 0:
        return None
    check_dtype(_OP, "topk_ids", topk_ids, INDEX_DTYPES)
    if topk_ids.dim() != 2 or topk_ids.shape[0] != num_rows:
        raise ShapeError(
            f"{_OP}: topk_ids has shape {tuple(topk_ids.shape)}; pass (num_rows, K), num_rows = {num_rows}."
        )
    return Routing(topk_ids, experts_per_rank)


def _fake(
    expert_output: Tensor, local_tokens: Tensor, metadata: Tensor, num_rows: int, addends: Sequence[Tensor],
    group_name: str, *, scale: float = 1.0, round_each: bool = True, out_dtype: torch.dtype | None = None,
    exit_barrier: bool = True, topk_ids: Tensor | None = None, experts_per_rank: int = 0,
) -> Tensor:  # fmt: skip
    _check_combine(expert_output, local_tokens, metadata, num_rows, out_dtype)
    _routing(num_rows, topk_ids, experts_per_rank)
    epilogue = Epilogue(addends, scale, round_each)
    check_epilogue(_OP, epilogue, expert_output, num_rows, out_dtype or torch.bfloat16)
    return _empty_output(expert_output, num_rows, out_dtype)


def _run(
    expert_output: Tensor, local_tokens: Tensor, metadata: Tensor, num_rows: int, addends: Sequence[Tensor],
    group_name: str, *, scale: float = 1.0, round_each: bool = True, out_dtype: torch.dtype | None = None,
    exit_barrier: bool = True, topk_ids: Tensor | None = None, experts_per_rank: int = 0,
) -> Tensor:  # fmt: skip
    ws, epilogue = resolve(group_name, _OP), Epilogue(addends, scale, round_each)
    return combine_from(
        ws, expert_output, local_tokens, metadata, num_rows, epilogue, out_dtype, exit_barrier=exit_barrier,
        routing=_routing(num_rows, topk_ids, experts_per_rank),
    )  # fmt: skip


rsv_combine_from = register_op(
    "rsv_combine_from(Tensor expert_output, Tensor local_tokens, Tensor metadata, int num_rows, Tensor[] addends, "
    "str group_name, *, float scale=1.0, bool round_each=True, ScalarType? out_dtype=None, bool exit_barrier=True, "
    "Tensor? topk_ids=None, int experts_per_rank=0) -> Tensor",
    fake=_fake,
    cpu=_run,
    cuda=_run,
    ordered=True,
)

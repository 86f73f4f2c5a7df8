"""``rsv_combine_add``: a combine that also scales its rows, adds tensors to them, and normalises what comes out.

The compiler puts it in place of ``rsv_combine`` and the ops behind it (``lowering/fuse_combine.py``: shared experts,
residual; ``lowering/fuse_norm.py``: the next block's RMSNorm). Its meaning is theirs: round the sum to the output's
dtype, multiply, add one addend after the other, in fp32; with ``round_each`` every step is rounded, as if each op ran
alone, else only the last, as in one pointwise kernel. With ``norm_weight`` the result is ``(2, num_rows, H)``: those
rows, and their RMSNorm (``Norm``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import collectives
from .combine import _check as _check_combine
from .combine import _empty_output
from .comm_launch import choose_launch, is_aligned, routed_ids, rows_of
from .errors import ArgumentError, ShapeError
from .pdl import chain_link
from .registration import register_op
from .shapes import check_dtype, check_same_device
from .symmetric import Channel
from .workspace import Workspace, resolve

_OP = "rsv_combine_add"
MAX_ADDENDS = 4
MAX_NORM_WIDTH = 8192  # H: a program holds a whole row to normalise it
NORM = "Tensor? norm_weight=None, float norm_eps=0.0, float norm_shift=0.0, bool norm_round_first=True"


class Norm(NamedTuple):
    """RMSNorm of the rows as they are stored, computed in fp32: ``x * rsqrt(mean(x * x) + eps) * (weight + shift)``.

    ``weight (H,)`` in the output's dtype; ``round_first``: round before the weight is applied, too (Llama's way).
    """

    weight: Tensor
    eps: float
    shift: float
    round_first: bool

    @classmethod
    def of(
        cls,
        norm_weight: Tensor | None = None,
        norm_eps: float = 0.0,
        norm_shift: float = 0.0,
        norm_round_first: bool = True,
    ) -> Norm | None:
        """From the arguments of an op, of which calls leave out what has its default."""
        return None if norm_weight is None else cls(norm_weight, norm_eps, norm_shift, norm_round_first)


class Epilogue(NamedTuple):
    """What happens to a combined row before it is stored: ``addends`` (num_rows, H) in the output's dtype."""

    addends: Sequence[Tensor]
    scale: float
    round_each: bool
    norm: Norm | None = None

    def new_output(self, like: Tensor, num_rows: int, out_dtype: torch.dtype | None) -> Tensor:
        """``(num_rows, H)``, or ``(2, num_rows, H)`` with a norm; H and device of ``like``."""
        if self.norm is None:
            return _empty_output(like, num_rows, out_dtype)
        return like.new_empty(2, num_rows, like.shape[1], dtype=out_dtype or torch.bfloat16)


class Pairs(NamedTuple):
    """Experts' outputs that are not summed yet: ``rows (M * K, H)``, ids (M, K) contiguous, weights (M, K) in rows."""

    rows: Tensor
    topk_ids: Tensor
    topk_weights: Tensor
    expert_start: int
    num_experts: int


def kernel_routing(pairs: Pairs | None, stand_in: Tensor, experts_per_rank: int = 0) -> tuple:
    """``combine_add_kernels.Routing`` of ``pairs``; without any the kernel does not look at it."""
    from .combine_add_kernels import Routing

    if pairs is None:
        return Routing(stand_in, stand_in, 0, 0, 0, 0)
    return Routing(*pairs[1:3], pairs.topk_weights.stride(0), *pairs[3:], experts_per_rank)


def check_epilogue(op: str, epilogue: Epilogue, like: Tensor, num_rows: int, out_dtype: torch.dtype) -> None:
    """Raise unless every addend is ``(num_rows, H)`` of ``out_dtype`` on ``like``'s device."""
    if len(epilogue.addends) > MAX_ADDENDS:
        raise ArgumentError(f"{op}: {len(epilogue.addends)} addends; pass at most {MAX_ADDENDS}.")
    for number, addend in enumerate(epilogue.addends):
        name = f"addends[{number}]"
        check_dtype(op, name, addend, (out_dtype,))
        check_same_device(op, **{"expert_output": like, name: addend})
        if addend.shape != (num_rows, like.shape[1]):
            raise ShapeError(
                f"{op}: {name} has shape {tuple(addend.shape)}; pass (num_rows, H) = {(num_rows, like.shape[1])}."
            )
    if epilogue.norm is not None:
        _check_norm(op, epilogue.norm.weight, like, out_dtype)


def _check_norm(op: str, weight: Tensor, like: Tensor, out_dtype: torch.dtype) -> None:
    width = like.shape[1]
    check_dtype(op, "norm_weight", weight, (out_dtype,))
    check_same_device(op, expert_output=like, norm_weight=weight)
    if weight.shape != (width,):
        raise ShapeError(f"{op}: norm_weight has shape {tuple(weight.shape)}; pass (H,) = {(width,)}.")
    if width > MAX_NORM_WIDTH:
        raise ArgumentError(f"{op}: norm_weight with H = {width}; at most {MAX_NORM_WIDTH} are normalised here.")


def apply_epilogue(rows: Tensor, epilogue: Epilogue) -> Tensor:
    """The meaning, in plain torch: ``rows (T, H)`` are rounded already; the result has their dtype.

    ``(T, H)``, or ``(2, T, H)`` with a norm.
    """
    dtype = rows.dtype

    def step(values: Tensor) -> Tensor:
        return values.to(dtype).float() if epilogue.round_each else values

    total = step(rows.float() * epilogue.scale)
    for addend in epilogue.addends:
        total = step(total + addend.float())
    out = total.to(dtype)
    return out if epilogue.norm is None else torch.stack([out, _normalised(out, epilogue.norm)])


def _normalised(rows: Tensor, norm: Norm) -> Tensor:
    wide = rows.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + norm.eps)
    if norm.round_first:
        wide = wide.to(rows.dtype).float()
    return (wide * (norm.weight.float() + norm.shift)).to(rows.dtype)


def whole_rows(width: int) -> tuple[int, int]:
    """``(octets, warps)`` of a program that holds a row of ``width``: one octet a thread, two above H = 4096."""
    octets = max(32, 1 << (-(-width // 8) - 1).bit_length())
    return octets, min(octets // 32, 16)


def kernel_norm(norm: Norm | None, out: Tensor) -> tuple[tuple, int]:
    """The norm as kernels take it: ``combine_add_kernels.NormRow``, and the constant NORM."""
    from .combine_add_kernels import NormRow

    if norm is None:
        return NormRow(rows_of(out), 0.0, 0.0), 0
    return NormRow(rows_of(norm.weight.unsqueeze(0)), norm.eps, norm.shift), 1 if norm.round_first else 2


def all_aligned(out: Tensor, epilogue: Epilogue) -> bool:
    """Whether chunks of all that is read and written behind the meeting are chunks of memory."""
    norm = [epilogue.norm.weight.unsqueeze(0)] if epilogue.norm else []
    return all(map(is_aligned, (out, *epilogue.addends, *norm)))


def launch_combine_add(
    channel: Channel,
    source: Tensor | Pairs,
    local_tokens: Tensor,
    metadata: Tensor,
    num_rows: int,
    epilogue: Epilogue,
    out_dtype: torch.dtype | None = None,
    experts_per_rank: int = 0,
    behind_experts: bool = False,
) -> Tensor:
    """The kernel over symmetric memory: one launch, one barrier. ``source``: expert output (M, H), or its pairs.

    ``behind_experts``: the launch before it on this stream is the last one of the experts, so that it may start early.
    ``experts_per_rank``: not 0 promises that expert ``e`` lies on rank ``e // experts_per_rank``; pairs then come only
    from ranks that have some. The bits are the same.
    """
    from .chunks import Slots
    from .combine_add_kernels import _combine_add_kernel

    layout = channel.layout
    pairs = source if isinstance(source, Pairs) else None
    rows = pairs.rows if pairs is not None else source
    assert isinstance(rows, Tensor)
    top_k = pairs.topk_ids.shape[1] if pairs is not None else 0
    max_tokens = rows.shape[0] // top_k if top_k else rows.shape[0]
    out = epilogue.new_output(rows, num_rows, out_dtype)
    flat = out.view(-1, out.shape[-1])
    norm, kind = kernel_norm(epilogue.norm, flat)
    launch = choose_launch("rsv_combine", max_tokens, channel)
    octets, warps = whole_rows(rows.shape[1]) if kind else (launch.chunks, launch.warps)
    _combine_add_kernel[(launch.blocks,)](
        channel.peers(),
        Slots(layout.combine_offset, layout.combine_slot, layout.capacity),
        rows_of(rows),
        kernel_routing(pairs, local_tokens, experts_per_rank),
        rows_of(flat),
        tuple(map(rows_of, epilogue.addends)) or (rows_of(flat),),
        epilogue.scale,
        norm,
        local_tokens,
        metadata,
        min(num_rows, layout.max_tokens_per_rank),
        max_tokens,
        num_rows,
        W=channel.world_size,
        N=octets,
        TOP_K=top_k,
        ADDENDS=len(epilogue.addends),
        ROUND_EACH=epilogue.round_each,
        NORM=kind,
        ALIGNED_IN=is_aligned(rows),
        ALIGNED_OUT=all_aligned(flat, epilogue),
        MULTICAST=channel.multicast,
        ROUTED=routed_ids(channel, top_k, experts_per_rank),
        num_warps=warps,  # pyright: ignore[reportCallIssue]
        **chain_link(behind_experts, out.device),
    )
    return out


def combine_and_add(
    op: str,
    ws: Workspace,
    expert_output: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    num_rows: int,
    epilogue: Epilogue,
    out_dtype: torch.dtype,
) -> Tensor:
    """Checks that need the workspace, then the way of its transport."""
    ws.check_call(op, rows=num_rows, hidden_size=expert_output.shape[1], top_k=None, device=expert_output.device)
    ws.check()
    if not expert_output.is_cuda:
        collectives.check_counts_on_host(op, local_tokens, num_rows)
    if ws.world_size == 1 and expert_output.is_cuda:
        from .local_combine import launch_local_combine

        return launch_local_combine(expert_output, local_tokens, num_rows, epilogue, out_dtype)
    if ws.channel is None:
        rows = collectives.rsv_combine(ws, expert_output, local_tokens, metadata, num_rows, out_dtype)
        return apply_epilogue(rows, epilogue)
    check_dtype(op, "expert_output", expert_output, (ws.config.dtype,))
    out = launch_combine_add(ws.channel, expert_output, local_tokens, metadata, num_rows, epilogue, out_dtype)
    if not out.is_cuda:
        ws.check()
    return out


def _fake(
    expert_output: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    num_rows: int,
    addends: Sequence[Tensor],
    group_name: str,
    *,
    scale: float = 1.0,
    round_each: bool = True,
    out_dtype: torch.dtype | None = None,
    **norm: Any,
) -> Tensor:
    _check_combine(expert_output, local_tokens, metadata, num_rows, out_dtype)
    epilogue = Epilogue(addends, scale, round_each, Norm.of(**norm))
    check_epilogue(_OP, epilogue, expert_output, num_rows, out_dtype or torch.bfloat16)
    return epilogue.new_output(expert_output, num_rows, out_dtype)


def _run(
    expert_output: Tensor,
    local_tokens: Tensor,
    metadata: Tensor,
    num_rows: int,
    addends: Sequence[Tensor],
    group_name: str,
    *,
    scale: float = 1.0,
    round_each: bool = True,
    out_dtype: torch.dtype | None = None,
    **norm: Any,
) -> Tensor:
    dtype, epilogue = out_dtype or torch.bfloat16, Epilogue(addends, scale, round_each, Norm.of(**norm))
    _check_combine(expert_output, local_tokens, metadata, num_rows, dtype)
    check_epilogue(_OP, epilogue, expert_output, num_rows, dtype)
    ws = resolve(group_name, _OP)
    return combine_and_add(_OP, ws, expert_output, local_tokens, metadata, num_rows, epilogue, dtype)


rsv_combine_add = register_op(
    "rsv_combine_add(Tensor expert_output, Tensor local_tokens, Tensor metadata, int num_rows, Tensor[] addends, "
    f"str group_name, *, float scale=1.0, bool round_each=True, ScalarType? out_dtype=None, {NORM}) -> Tensor",
    fake=_fake,
    cpu=_run,
    cuda=_run,
    ordered=True,
)

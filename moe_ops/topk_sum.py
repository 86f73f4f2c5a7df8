"""``topk_sum``: the weighted sum over each row's pairs, the last step of a layer made of ``expert_linear``."""

from __future__ import annotations

import torch
from torch import Tensor

from .align import MAX_LOCAL_EXPERTS, check_pairs
from .errors import ArgumentError, DtypeError, ShapeError
from .fused_moe import OUT_DTYPES
from .registration import register_op
from .shapes import check_rank, check_same_device, check_scalar_count, check_topk

_OP = "topk_sum"


def _check(
    pairs: Tensor, topk_ids: Tensor, topk_weights: Tensor, valid_tokens: Tensor, local_expert_start: int,
    num_local_experts: int, out_dtype: torch.dtype | None,
) -> None:  # fmt: skip
    check_rank(_OP, "pairs", pairs, 2, "(M*K, H)")
    check_rank(_OP, "topk_ids", topk_ids, 2, "(M, K)")
    if pairs.shape[0] != topk_ids.numel():
        raise ShapeError(
            f"{_OP}: pairs {tuple(pairs.shape)} and topk_ids {tuple(topk_ids.shape)} do not fit; pass a row a pair."
        )
    check_topk(_OP, pairs[: topk_ids.shape[0]], topk_ids, topk_weights)
    check_pairs(_OP, topk_ids)
    check_scalar_count(_OP, "valid_tokens", valid_tokens)
    check_same_device(_OP, pairs=pairs, topk_ids=topk_ids, topk_weights=topk_weights, valid_tokens=valid_tokens)
    if not 1 <= num_local_experts <= MAX_LOCAL_EXPERTS or local_expert_start < 0:
        raise ArgumentError(
            f"{_OP}: num_local_experts={num_local_experts}, local_expert_start={local_expert_start}; "
            f"pass 1 to {MAX_LOCAL_EXPERTS} experts and a start of at least 0."
        )
    if out_dtype is not None and out_dtype not in OUT_DTYPES:
        raise DtypeError(f"{_OP}: out_dtype={out_dtype}; pass one of {', '.join(map(str, OUT_DTYPES))}.")


def _fake(
    pairs: Tensor, topk_ids: Tensor, topk_weights: Tensor, valid_tokens: Tensor, local_expert_start: int,
    num_local_experts: int, *, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    _check(pairs, topk_ids, topk_weights, valid_tokens, local_expert_start, num_local_experts, out_dtype)
    return pairs.new_empty(topk_ids.shape[0], pairs.shape[1], dtype=out_dtype or pairs.dtype)


def topk_sum_reference(
    pairs: Tensor, topk_ids: Tensor, topk_weights: Tensor, valid_tokens: Tensor, local_expert_start: int,
    num_local_experts: int, *, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """See ``topk_sum``; rows >= ``valid_tokens`` are zero."""
    rows, top_k = topk_ids.shape
    ids = topk_ids.long() - local_expert_start
    local = (ids >= 0) & (ids < num_local_experts) & (torch.arange(rows, device=ids.device) < valid_tokens)[:, None]
    wide = torch.promote_types(pairs.dtype, torch.float32)
    out = torch.zeros(rows, pairs.shape[1], dtype=wide, device=pairs.device)
    for slot in range(top_k):
        value = pairs.view(rows, top_k, -1)[:, slot].to(wide) * topk_weights[:, slot, None].to(wide)
        out += torch.where(local[:, slot, None], value, 0)
    return out.to(out_dtype or pairs.dtype)


def _cpu(
    pairs: Tensor, topk_ids: Tensor, topk_weights: Tensor, valid_tokens: Tensor, local_expert_start: int,
    num_local_experts: int, *, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    _check(pairs, topk_ids, topk_weights, valid_tokens, local_expert_start, num_local_experts, out_dtype)
    return topk_sum_reference(
        pairs.contiguous(), topk_ids, topk_weights, valid_tokens, local_expert_start, num_local_experts,
        out_dtype=out_dtype,
    )  # fmt: skip


def launch_topk_sum(
    pairs: Tensor, topk_ids: Tensor, topk_weights: Tensor, valid_tokens: Tensor, local_expert_start: int,
    num_local_experts: int, *, out_dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The Triton implementation: the last kernel of ``fused_moe``."""
    _check(pairs, topk_ids, topk_weights, valid_tokens, local_expert_start, num_local_experts, out_dtype)
    out = pairs.new_empty(topk_ids.shape[0], pairs.shape[1], dtype=out_dtype or pairs.dtype)
    if not out.numel() or not topk_ids.numel():
        return out.zero_()
    from .topk_sum_launch import sum_pairs

    arguments = pairs.contiguous(), topk_ids.contiguous(), topk_weights.contiguous(), valid_tokens, out
    sum_pairs(*arguments, local_expert_start, num_local_experts, {"PDL": False})
    return out


topk_sum = register_op(
    "topk_sum(Tensor pairs, Tensor topk_ids, Tensor topk_weights, Tensor valid_tokens, int local_expert_start, "
    "int num_local_experts, *, ScalarType? out_dtype=None) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=launch_topk_sum,
)
"""``torch.ops.moe_ep.topk_sum.default``: ``(M, H)``, ``out[row] = sum over slots of weight * pairs[row*K + slot]``.

pairs: (M*K, H); topk_ids, topk_weights: (M, K); valid_tokens: one int32. Slots are added in order, in fp32, and
rounded once. Slots whose id is outside ``[local_expert_start, local_expert_start + num_local_experts)`` add nothing,
and their pairs are not used; rows >= ``valid_tokens`` are unspecified.
Raises ``ShapeError``, ``DtypeError``, ``DeviceError``, ``ArgumentError``.
"""

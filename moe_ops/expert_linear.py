"""``expert_linear``: one projection of this rank's experts, for gates that ``fused_moe`` does not have.

A layer with such a gate is ``topk_sum(expert_linear(gate(expert_linear(x))))``, the gate being the model's own code:
``(row, slot)`` pairs go from op to op, so nothing is permuted and all shapes are static.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .align import MAX_LOCAL_EXPERTS, check_pairs
from .errors import ArgumentError, DtypeError, ShapeError
from .registration import register_op
from .shapes import (
    INDEX_DTYPES,
    check_dtype,
    check_hidden_dtype,
    check_rank,
    check_same_device,
    check_scalar_count,
)

_OP = "expert_linear"


def _width(weight: Tensor, transposed: bool) -> tuple[int, int]:
    """``(D, N)``: what the projection takes and gives."""
    return (weight.shape[1], weight.shape[2]) if transposed else (weight.shape[2], weight.shape[1])


def _check(
    x: Tensor, topk_ids: Tensor, weight: Tensor, valid_tokens: Tensor, local_expert_start: int, bias: Tensor | None,
    transposed: bool,
) -> None:  # fmt: skip
    letters = "(E_l, D, N)" if transposed else "(E_l, N, D)"
    check_rank(_OP, "x", x, 2, "(M, D) or (M*K, D)")
    check_rank(_OP, "topk_ids", topk_ids, 2, "(M, K)")
    check_rank(_OP, "weight", weight, 3, letters)
    check_hidden_dtype(_OP, "x", x)
    check_dtype(_OP, "topk_ids", topk_ids, INDEX_DTYPES)
    check_pairs(_OP, topk_ids)
    check_scalar_count(_OP, "valid_tokens", valid_tokens)
    check_same_device(_OP, x=x, topk_ids=topk_ids, weight=weight, valid_tokens=valid_tokens, bias=bias)
    depth, width = _width(weight, transposed)
    if x.shape[0] not in (topk_ids.shape[0], topk_ids.numel()) or x.shape[1] != depth:
        raise ShapeError(
            f"{_OP}: x {tuple(x.shape)}, topk_ids {tuple(topk_ids.shape)}, weight {tuple(weight.shape)} do not fit; "
            f"pass one row of x a token or a pair, and weight {letters} with transposed={transposed}."
        )
    if weight.dtype != x.dtype or not weight.is_contiguous():
        raise DtypeError(
            f"{_OP}: weight is {weight.dtype} with strides {weight.stride()} and x {x.dtype}; "
            "pass both in one dtype and weight contiguous."
        )
    if bias is not None and (tuple(bias.shape) != (weight.shape[0], width) or bias.dtype != x.dtype):
        raise ShapeError(
            f"{_OP}: bias is {tuple(bias.shape)} {bias.dtype}; pass shape {(weight.shape[0], width)} in x's dtype."
        )
    if not 1 <= weight.shape[0] <= MAX_LOCAL_EXPERTS or local_expert_start < 0:
        raise ArgumentError(
            f"{_OP}: {weight.shape[0]} local experts from {local_expert_start} on; pass 1 to {MAX_LOCAL_EXPERTS} "
            "experts and a start of at least 0."
        )


def _fake(
    x: Tensor, topk_ids: Tensor, weight: Tensor, valid_tokens: Tensor, local_expert_start: int, *,
    bias: Tensor | None = None, transposed: bool = False, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    _check(x, topk_ids, weight, valid_tokens, local_expert_start, bias, transposed)
    return x.new_empty(topk_ids.numel(), _width(weight, transposed)[1])


def expert_linear_reference(
    x: Tensor, topk_ids: Tensor, weight: Tensor, valid_tokens: Tensor, local_expert_start: int, *,
    bias: Tensor | None = None, transposed: bool = False,
) -> Tensor:  # fmt: skip
    """See ``expert_linear``; bf16 and fp16 are multiplied in fp32 and rounded once. Unspecified pairs are zero."""
    wide, top_k = torch.promote_types(x.dtype, torch.float32), topk_ids.shape[1]
    out = torch.zeros(topk_ids.numel(), _width(weight, transposed)[1], dtype=x.dtype, device=x.device)
    ids = topk_ids[: int(valid_tokens)].reshape(-1).long() - local_expert_start
    per_pair = x.shape[0] == topk_ids.numel()
    for expert in torch.unique(ids[(ids >= 0) & (ids < weight.shape[0])]).tolist():
        pairs = torch.nonzero(ids == expert).squeeze(1)
        rows = x[pairs if per_pair else pairs // top_k].to(wide)
        matrix = weight[expert].to(wide)
        result = rows @ (matrix if transposed else matrix.T)
        out[pairs] = (result if bias is None else result + bias[expert].to(wide)).to(x.dtype)
    return out


def _cpu(
    x: Tensor, topk_ids: Tensor, weight: Tensor, valid_tokens: Tensor, local_expert_start: int, *,
    bias: Tensor | None = None, transposed: bool = False, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    _check(x, topk_ids, weight, valid_tokens, local_expert_start, bias, transposed)
    return expert_linear_reference(
        x, topk_ids, weight, valid_tokens, local_expert_start, bias=bias, transposed=transposed
    )


def launch_expert_linear(
    x: Tensor, topk_ids: Tensor, weight: Tensor, valid_tokens: Tensor, local_expert_start: int, *,
    bias: Tensor | None = None, transposed: bool = False, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    """The Triton implementation: an align launch and one persistent kernel."""
    from .expert_linear_kernels import launch

    _check(x, topk_ids, weight, valid_tokens, local_expert_start, bias, transposed)
    depth, width = _width(weight, transposed)
    out = x.new_empty(topk_ids.numel(), width)
    if out.numel() and depth:
        launch(x, topk_ids, weight, valid_tokens, local_expert_start, bias, transposed, batch_invariant, out)
    return out if depth else out.zero_()


expert_linear = register_op(
    "expert_linear(Tensor x, Tensor topk_ids, Tensor weight, Tensor valid_tokens, int local_expert_start, *, "
    "Tensor? bias=None, bool transposed=False, bool batch_invariant=False) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=launch_expert_linear,
)
"""``torch.ops.moe_ep.expert_linear.default``: ``(M*K, N)``, ``out[pair] = x[pair] @ weight[expert of pair] + bias``.

x: (M, D), a row a token, or (M*K, D), a row a pair ``row*K + slot``; topk_ids: (M, K); weight: (E_l, N, D), or
(E_l, D, N) with ``transposed``; bias: (E_l, N); valid_tokens: one int32. x, weight and bias share a dtype; sums are
fp32, rounded once; with ``batch_invariant`` a pair's bits depend on its row and its expert alone. Pairs of experts
outside ``[local_expert_start, local_expert_start + E_l)`` and of rows >= ``valid_tokens`` are neither read nor
written: what they hold in the result is unspecified.
Raises ``ShapeError``, ``DtypeError``, ``DeviceError``, ``ArgumentError``.
"""

"""``fused_moe_into``: the experts write into a buffer that the caller gives, such as ``Workspace.layer_output``.

``fused_moe`` otherwise, to the bit. Rows from ``valid_tokens`` on are not written: in front of
``rsv_combine_from(exit_barrier=False)`` pass the count that ``agv_dispatch_into`` returned, which is 0 in a
workspace that gave up.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import moe_combine
from .errors import ShapeError
from .fused_moe import OUT_DTYPES, fused_moe, launch_fused_moe
from .registration import register_op
from .shapes import check_dtype, check_rank, check_same_device

_OP = "fused_moe_into"


def _check_out(hidden: Tensor, out: Tensor) -> None:
    check_rank(_OP, "out", out, 2, "(M, H)")
    check_dtype(_OP, "out", out, OUT_DTYPES)
    check_same_device(_OP, hidden=hidden, out=out)
    if out.shape != hidden.shape or (out.shape[1] > 1 and out.stride(1) != 1):
        raise ShapeError(
            f"{_OP}: out has shape {tuple(out.shape)} and strides {out.stride()}; pass {tuple(hidden.shape)}, "
            "the elements of a row one after the other."
        )


def _fake(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, valid_tokens: Tensor,
    local_expert_start: int, out: Tensor, **experts: Any,
) -> None:  # fmt: skip
    _check_out(hidden, out)
    fused_moe(
        hidden, topk_ids, topk_weights, gate_up, down, valid_tokens, local_expert_start, out_dtype=out.dtype, **experts
    )


def _cpu(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, valid_tokens: Tensor,
    local_expert_start: int, out: Tensor, **experts: Any,
) -> None:  # fmt: skip
    _check_out(hidden, out)
    result = fused_moe(
        hidden, topk_ids, topk_weights, gate_up, down, valid_tokens, local_expert_start, out_dtype=out.dtype, **experts
    )
    live = torch.arange(out.shape[0]) < valid_tokens
    out.copy_(torch.where(live[:, None], result, out))


def _cuda(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, valid_tokens: Tensor,
    local_expert_start: int, out: Tensor, **experts: Any,
) -> None:  # fmt: skip
    _check_out(hidden, out)
    launch_fused_moe(
        hidden, topk_ids, topk_weights, gate_up, down, valid_tokens, local_expert_start, out_dtype=out.dtype, out=out,
        **experts,
    )  # fmt: skip


fused_moe_into = register_op(
    "fused_moe_into(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor down, "
    f"Tensor valid_tokens, int local_expert_start, Tensor(a!) out, *, {moe_combine.EXPERTS}) -> ()",
    fake=_fake,
    cpu=_cpu,
    cuda=_cuda,
)

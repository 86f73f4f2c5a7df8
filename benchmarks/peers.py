"""What others offer for the same work: transformers' ``grouped_mm`` experts, compiled, and a plain torch chain."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor


def _local(topk_ids: Tensor, topk_weights: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Ids of this rank with the sentinel ``experts`` and weight 0 for the rest, as transformers marks them."""
    remote = topk_ids >= experts
    return topk_ids.masked_fill(remote, experts), topk_weights.masked_fill(remote, 0.0)


def transformers_grouped_mm(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Callable[[], Tensor]:
    """``grouped_mm_experts_forward`` under ``torch.compile``, on an object with the fields that it reads."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    def apply_gate(projected: Tensor) -> Tensor:
        gate, up = projected.chunk(2, dim=-1)
        return F.silu(gate) * up

    module = SimpleNamespace(
        num_experts=gate_up.shape[0], gate_up_proj=gate_up, down_proj=down, has_gate=True, has_bias=False,
        is_transposed=False, _apply_gate=apply_gate,
    )  # fmt: skip
    ids, weights = _local(topk_ids, topk_weights, gate_up.shape[0])
    compiled = torch.compile(lambda x, i, w: grouped_mm_experts_forward(module, x, i, w), dynamic=False)

    def call() -> Tensor:
        with torch.no_grad():
            return compiled(hidden, ids, weights)

    for _ in range(2):
        call()
    return call


def grouped_mm_chain(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor
) -> Callable[[], Tensor]:
    """Sort, gather, grouped GEMM, SwiGLU, grouped GEMM, scatter-add: seven eager torch calls."""
    ids, weights = _local(topk_ids, topk_weights, gate_up.shape[0])
    experts, top_k = gate_up.shape[0], ids.shape[1]
    grouped_mm = torch._grouped_mm
    bounds = torch.arange(experts, device=hidden.device)

    def call() -> Tensor:
        sorted_ids, order = torch.sort(ids.reshape(-1))
        offsets = torch.searchsorted(sorted_ids, bounds, right=True, out_int32=True)
        rows = order // top_k
        gate, up = grouped_mm(hidden[rows], gate_up.transpose(1, 2), offsets).chunk(2, dim=-1)
        result = grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offsets)
        scaled = torch.where(sorted_ids[:, None] < experts, result * weights.reshape(-1)[order][:, None], 0.0)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
        return out.index_add_(0, rows, scaled.float()).to(hidden.dtype)

    call()
    return call

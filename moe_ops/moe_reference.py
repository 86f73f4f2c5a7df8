"""``align_block_size`` and ``fused_moe`` in plain torch: their CPU implementation and the oracle of their tests."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import apply_activation
from .shapes import align_up


def padded_pairs(num_pairs: int, num_local_experts: int, block_size: int) -> int:
    """Static length of ``sorted_token_ids``: every expert that has a pair pads by at most ``block_size - 1``."""
    return align_up(num_pairs + min(num_local_experts, num_pairs) * (block_size - 1), block_size)


def align_reference(
    topk_ids: Tensor, valid_tokens: Tensor, block_size: int, num_local_experts: int, local_expert_start: int
) -> tuple[Tensor, Tensor, Tensor]:
    """See ``align.align_block_size``; reads nothing of the rows >= ``valid_tokens``."""
    num_pairs = topk_ids.numel()
    live = topk_ids[: max(int(valid_tokens), 0)].reshape(-1).long() - local_expert_start
    pairs = torch.nonzero((live >= 0) & (live < num_local_experts)).squeeze(1)
    expert_of, order = torch.sort(live[pairs], stable=True)
    counts = torch.bincount(expert_of, minlength=num_local_experts)
    blocks = -(-counts // block_size)
    first_pair = torch.cumsum(counts, 0) - counts
    first_slot = (torch.cumsum(blocks, 0) - blocks) * block_size

    size = padded_pairs(num_pairs, num_local_experts, block_size)
    sorted_ids = torch.full((size,), num_pairs, dtype=torch.int32)
    rank = torch.arange(expert_of.numel()) - first_pair[expert_of]
    sorted_ids[first_slot[expert_of] + rank] = pairs[order].int()
    expert_ids = torch.full((size // block_size,), -1, dtype=torch.int32)
    used = int(blocks.sum())
    expert_ids[:used] = torch.repeat_interleave(torch.arange(num_local_experts), blocks).int()
    return sorted_ids, expert_ids, torch.tensor([used * block_size], dtype=torch.int32)


def _project(rows: Tensor, weights: Tensor, biases: Tensor | None, expert: int, transposed: bool) -> Tensor:
    """``(rows, in)`` times one expert's matrix, in the orientation and order of operations of HF's eager code."""
    weight = weights[expert].to(rows.dtype)
    out = rows @ weight if transposed else F.linear(rows, weight)
    return out if biases is None else out + biases[expert].to(rows.dtype)


def fused_moe_reference(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    valid_tokens: Tensor,
    local_expert_start: int,
    *,
    activation: str = "silu",
    alpha: float | None = None,
    limit: float | None = None,
    gated: bool = True,
    transposed: bool = False,
    interleaved: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """See ``fused_moe.fused_moe``; all dtypes, fp64 included.

    In fp32 and fp64 the order of operations is that of HF's eager experts (experts ascending, the rows
    of an expert slot by slot), so the results are equal to the bit. bf16 and fp16 are computed in fp32
    and rounded once at the end, where HF rounds at every step.
    """
    live, wide = max(int(valid_tokens), 0), torch.promote_types(hidden.dtype, torch.float32)
    ids = topk_ids[:live].long() - local_expert_start
    out = torch.zeros(hidden.shape[0], hidden.shape[1], dtype=wide, device=hidden.device)
    present = torch.unique(ids[(ids >= 0) & (ids < gate_up.shape[0])])
    for expert in present.tolist():
        slots, tokens = torch.where((ids == expert).T)
        # A CPU's matrix product may add in another order for another number of rows: one row at a time, if asked.
        size = 1 if batch_invariant else tokens.numel()
        for slot, token in zip(slots.split(size), tokens.split(size), strict=True):
            projected = _project(hidden[token].to(wide), gate_up, gate_up_bias, expert, transposed)
            inner = apply_activation(
                projected, activation, alpha=alpha, limit=limit, gated=gated, interleaved=interleaved
            )
            rows = _project(inner, down, down_bias, expert, transposed)
            out.index_add_(0, token, (rows * topk_weights[token, slot, None]).to(wide))
    return out.to(out_dtype or hidden.dtype)

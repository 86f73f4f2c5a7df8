"""The three communication ops in plain torch, over all ranks at once: the oracle of every transport.

Each function takes one value per rank and returns what every rank must get. The order of additions
(fp32, rank 0 first) is part of the contract, so results are compared bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One rank's input of ``agv_dispatch``, or the gathered output: hidden (T, H), ids and weights (T, K)."""

    hidden: Tensor
    topk_ids: Tensor
    topk_weights: Tensor


def metadata(counts: Sequence[int]) -> list[Tensor]:
    """``[valid_tokens, rank_token_offset, ep_max_tokens]`` of every rank, (3,) int32 each."""
    total, most = sum(counts), max(counts)
    return [torch.tensor([total, sum(counts[:rank]), most], dtype=torch.int32) for rank in range(len(counts))]


def agv_dispatch(batches: Sequence[Batch], counts: Sequence[int], max_tokens: int) -> Batch:
    """The live rows of all ranks, rank 0 first; rows from ``sum(counts)`` on hold zeros and ids -1."""
    first = batches[0]
    rows = [
        torch.cat([tensor[:count] for tensor, count in zip(column, counts, strict=True)])
        for column in zip(*batches, strict=True)
    ]
    gathered = Batch(
        first.hidden.new_zeros(max_tokens, first.hidden.shape[1]),
        first.topk_ids.new_full((max_tokens, first.topk_ids.shape[1]), -1),
        first.topk_weights.new_zeros(max_tokens, first.topk_weights.shape[1]),
    )
    for out, live in zip(gathered, rows, strict=True):
        out[: live.shape[0]] = live
    return gathered


def rsv_combine(
    expert_outputs: Sequence[Tensor],
    counts: Sequence[int],
    num_rows: Sequence[int],
    out_dtype: torch.dtype = torch.bfloat16,
) -> list[Tensor]:
    """Every rank's rows of ``sum_r expert_outputs[r]`` (M, H): fp32 in rank order, rounded once; dead rows zero."""
    valid = sum(counts)
    total = expert_outputs[0][:valid].float()
    for output in expert_outputs[1:]:
        total = total + output[:valid].float()
    results, offset = [], 0
    for count, rows in zip(counts, num_rows, strict=True):
        mine = total.new_zeros(rows, total.shape[1])
        mine[:count] = total[offset : offset + count]
        results.append(mine.to(out_dtype))
        offset += count
    return results

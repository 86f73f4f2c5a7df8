"""Device code of ``align_block_size``: one launch, no atomics on global memory, positions by counting."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .pdl import chain_start


@triton.jit
def _local_ids(ids_ptr, first, num_pairs, expert_start, num_experts, CHUNK: tl.constexpr, NONE: tl.constexpr):
    """Pair indices of one chunk, and their local experts (``NONE`` where not of this rank)."""
    pair = first + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + pair, mask=pair < num_pairs, other=-1)
    # compared before narrowing: a wild int64 id must not wrap into range
    local = (ids >= expert_start) & (ids < expert_start + num_experts)
    return pair, tl.where(local, (ids - expert_start).to(tl.int32), NONE)


@triton.jit
def _fill(ptr, first, end, step, value, CHUNK: tl.constexpr):
    """``ptr[i] = value`` for the chunks of ``[first, end)`` that start ``step`` apart."""
    for at in range(first, end, step):
        where = at + tl.arange(0, CHUNK)
        tl.store(ptr + where, tl.full((CHUNK,), value, tl.int32), mask=where < end)


@triton.jit
def _align_kernel(
    ids_ptr, valid_ptr, sorted_ptr, expert_ids_ptr, total_ptr,
    num_rows, top_k, expert_start, num_experts, sorted_size,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, BINS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program ``e`` counts all experts, then writes the pairs, the padding and the block ids of expert ``e``.

    Grid: one program a local expert. Example: ids [[1, 0], [1, 2]], E_l 2, BLOCK 4 gives
    sorted [1, 4, 4, 4, 0, 2, 4, 4, ...], expert_ids [0, 1, -1, ...], total 8 (pair 3 is not local).
    """
    if PDL:  # a next kernel that asked for it may start and wait
        tl.extra.cuda.gdc_launch_dependents()
    expert = tl.program_id(0)
    pairs_total = tl.cast(num_rows, tl.int64) * top_k
    num_pairs = tl.minimum(tl.load(valid_ptr).to(tl.int64) * top_k, pairs_total)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, num_pairs, CHUNK):
        _, local = _local_ids(ids_ptr, first, num_pairs, expert_start, num_experts, CHUNK, BINS - 1)
        counts += tl.histogram(local, BINS)
    bins = tl.arange(0, BINS)
    padded = tl.where(bins < num_experts, (counts.to(tl.int64) + BLOCK - 1) // BLOCK * BLOCK, 0)
    begin = tl.sum(tl.where(bins < expert, padded, 0))
    end = begin + tl.sum(tl.where(bins == expert, padded, 0))
    total = tl.sum(padded)

    position = begin
    for first in range(0, num_pairs, CHUNK):
        pair, local = _local_ids(ids_ptr, first, num_pairs, expert_start, num_experts, CHUNK, BINS - 1)
        hit = (local == expert).to(tl.int32)
        tl.store(sorted_ptr + position + tl.cumsum(hit, 0) - 1, pair.to(tl.int32), mask=hit > 0)
        position += tl.sum(hit)

    sentinel = pairs_total.to(tl.int32)
    _fill(sorted_ptr, position, end, CHUNK, sentinel, CHUNK)
    _fill(expert_ids_ptr, begin // BLOCK, end // BLOCK, CHUNK, expert, CHUNK)
    # past the end: all programs share the work
    step = tl.num_programs(0).to(tl.int64) * CHUNK
    _fill(sorted_ptr, total + expert * CHUNK, tl.cast(sorted_size, tl.int64), step, sentinel, CHUNK)
    _fill(expert_ids_ptr, total // BLOCK + expert * CHUNK, tl.cast(sorted_size, tl.int64) // BLOCK, step, -1, CHUNK)
    if expert == 0:
        tl.store(total_ptr, total.to(tl.int32))


def launch(
    topk_ids: Tensor,
    valid_tokens: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    block_size: int,
    num_local_experts: int,
    local_expert_start: int,
) -> None:
    """Fill ``outputs`` (see ``align.align_block_size``); ``topk_ids`` contiguous."""
    sorted_ids, expert_ids, total = outputs
    chunk = min(max(triton.next_power_of_2(topk_ids.numel()), 128), 4096)
    _align_kernel[(num_local_experts,)](
        topk_ids, valid_tokens, sorted_ids, expert_ids, total,
        topk_ids.shape[0], topk_ids.shape[1], local_expert_start, num_local_experts, sorted_ids.numel(),
        BLOCK=block_size, CHUNK=chunk, BINS=triton.next_power_of_2(num_local_experts + 1),
        num_warps=8 if chunk > 512 else 4, **chain_start(True, topk_ids.device),
    )  # fmt: skip

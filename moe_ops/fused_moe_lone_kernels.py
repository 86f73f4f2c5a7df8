"""Device code of ``fused_moe`` for many rows of a slice of the experts: rows that have one local pair, or none.

In a slice of an eighth that is 39% and 34% of the rows at K 8. A lone pair, weighted, is all that the top-k sum would
have: so the second GEMM writes it to the result, and the sum, which reads and writes a row for it, leaves it out. Rows
without any are zeroed beside the first GEMM, where memory has little to do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_moe_kernels import store_tile

NOT_LONE = tl.constexpr(-1)  # bits of a NaN that no weight is stored with


@triton.jit
def lone_weight(ids_ptr, weights_ptr, pair, inside, expert_start, num_experts, TOP_K: tl.constexpr):
    """Bits of each pair's weight in fp32 if the pair is its row's only local one, else NOT_LONE. ``pair`` int64.

    ``pair`` is local itself. Example: K 2, ids [local, remote], [local, local]: the weight for pair 0, else NOT_LONE.
    """
    first, count = pair // TOP_K * TOP_K, tl.zeros_like(pair)
    for slot in tl.static_range(TOP_K):
        expert = tl.load(ids_ptr + first + slot, mask=inside, other=-1)
        count += ((expert >= expert_start) & (expert < expert_start + num_experts)).to(tl.int64)
    weight = tl.load(weights_ptr + pair, mask=inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
    weight = tl.where(weight == NOT_LONE, 0x7FFFFFFF, weight)  # another NaN
    return tl.where(count == 1, weight, NOT_LONE)


@triton.jit
def store_pairs(
    pairs_ptr, pairs, row_mask, tile, width, acc, lone, out_ptr, out_stride, LONE: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Store a tile of the second GEMM: to its pairs' rows, or as ``topk_sum_kernel`` would to the result's.

    LONE: K, or 0 where no pair is to go to the result. ``lone``: see ``lone_weight``; ``out`` in the pairs' dtype; rows
    of both begin at multiples of 16 bytes.
    """
    if LONE:
        kind: tl.constexpr = pairs_ptr.dtype.element_ty
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        weight = tl.where(lone == NOT_LONE, 1.0, lone.to(tl.float32, bitcast=True))  # what it leaves is exact
        value = acc.to(kind).to(tl.float32) * weight[:, None] + 0.0  # the sum begins with a zero, which decides -0
        here, there = pairs_ptr + pairs.to(tl.int64) * width, out_ptr + (pairs // LONE).to(tl.int64) * out_stride
        # said again: Triton 3.9 does not see it through the choice, and would store elements one by one
        rows = tl.multiple_of(tl.where(lone == NOT_LONE, here, there), 16)
        tl.store(rows[:, None] + cols[None, :], value.to(kind), mask=row_mask[:, None] & (cols < width)[None, :])
    else:
        store_tile(pairs_ptr, pairs.to(tl.int64), row_mask, tile, width, acc, BLOCK_N)


@triton.jit
def zero_rows(
    ids_ptr, valid_ptr, out_ptr, num_rows, width, out_stride, expert_start, num_experts, TOP_K: tl.constexpr
):  # fmt: skip
    """Zero the live rows of ``out`` that have no local slot: every program some of them, 32 rows at a time."""
    SLOTS: tl.constexpr = triton.next_power_of_2(TOP_K)
    slots, cols = tl.arange(0, SLOTS), tl.arange(0, 256)
    live = tl.minimum(tl.load(valid_ptr), num_rows)
    for first in range(tl.program_id(0) * 32, live, tl.num_programs(0) * 32):
        row = tl.cast(first, tl.int64) + tl.arange(0, 32)
        asked = (row < live)[:, None] & (slots < TOP_K)[None, :]
        expert = tl.load(ids_ptr + row[:, None] * TOP_K + slots[None, :], mask=asked, other=-1)
        local = (expert >= expert_start) & (expert < expert_start + num_experts)
        none = (tl.sum(local.to(tl.int32), 1) == 0) & (row < live)
        for col in range(0, width, 256):
            where = out_ptr + row[:, None] * out_stride + (col + cols)[None, :]
            zeros = tl.zeros((32, 256), out_ptr.dtype.element_ty)
            tl.store(where, zeros, mask=none[:, None] & (col + cols < width)[None, :])

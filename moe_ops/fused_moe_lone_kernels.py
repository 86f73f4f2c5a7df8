"""Device code of ``fused_moe`` for many rows of a slice of the experts: rows that have one local pair.

In a slice of an eighth that is 39% of the rows at K 8. Their pair, weighted, is all that the top-k sum would have: so
the second GEMM writes it to the result, and the sum, which reads and writes a row for it, leaves it out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_moe_kernels import store_tile


@triton.jit
def destinations(
    ids_ptr, weights_ptr, pairs_ptr, out_ptr, width, out_stride, pair, local, inside, expert_start, num_experts,
    TOP_K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Of each local pair the address (int64) of the row that it goes to, and what it is times (fp32) there.

    ``pair (CHUNK,)`` int64, consecutive, from a row's first one on if K divides CHUNK. A row's only local one goes to
    ``out``, times its weight; others to ``pairs``, times 1. Example: K 2, ids [local, remote], [local, local]: pair 0
    goes to row 0 of ``out``, pairs 2 and 3 to theirs.
    """
    if CHUNK % TOP_K == 0:
        count = tl.sum(tl.reshape(local.to(tl.int32), (CHUNK // TOP_K, TOP_K)), 1)
        count = tl.reshape(tl.broadcast_to(count[:, None], (CHUNK // TOP_K, TOP_K)), (CHUNK,))
    else:
        first, count = pair // TOP_K * TOP_K, tl.zeros((CHUNK,), tl.int32)
        for slot in tl.static_range(TOP_K):
            expert = tl.load(ids_ptr + first + slot, mask=inside, other=-1)
            count += ((expert >= expert_start) & (expert < expert_start + num_experts)).to(tl.int32)
    weight = tl.load(weights_ptr + pair, mask=inside, other=0.0).to(tl.float32)
    here, there = pairs_ptr + pair * width, out_ptr + pair // TOP_K * out_stride
    place = tl.where(count == 1, there.to(tl.int64), here.to(tl.int64))
    return place, tl.where(count == 1, weight, 1.0)


@triton.jit
def load_places(sorted_ptr, place_ptr, factor_ptr, positions, LONE: tl.constexpr):
    """What the rows of a block are: pairs, and again in place of a factor; with LONE their ``destinations``."""
    if LONE:
        return tl.load(place_ptr + positions), tl.load(factor_ptr + positions)
    else:
        pairs = tl.load(sorted_ptr + positions)
        return pairs, pairs


@triton.jit
def is_pair(places, num_pairs, LONE: tl.constexpr):
    """Which rows of a block are no padding, whose address is 0, or whose pair the sentinel."""
    return places != 0 if LONE else places < num_pairs


@triton.jit
def store_pairs(
    pairs_ptr, places, row_mask, tile, width, acc, factor,
    LONE: tl.constexpr, BLOCK_N: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """Store a tile of the second GEMM to the rows of pairs ``places``; with LONE where and as ``destinations`` says.

    Then it is rounded as a pair's row is, and again as ``topk_sum_kernel`` rounds a sum of one. Rows begin at multiples
    of 16 bytes.
    """
    if LONE:
        kind: tl.constexpr = pairs_ptr.dtype.element_ty
        cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        # the sum begins with a zero, which decides about -0; the factor 1 is exact
        value = acc.to(kind).to(tl.float32) * factor[:, None] + 0.0
        rows = tl.multiple_of(places.to(tl.pointer_type(kind)), 16)
        policy: tl.constexpr = "evict_last" if KEEP else ""
        mask = row_mask[:, None] & (cols < width)[None, :]
        tl.store(rows[:, None] + cols[None, :], value.to(kind), mask=mask, eviction_policy=policy)
    else:
        store_tile(pairs_ptr, places.to(tl.int64), row_mask, tile, width, acc, BLOCK_N, KEEP)

"""Device code of ``fused_moe`` for few rows: routing is found anew by every program, so there is no align launch.

The live (row, slot) pairs are taken PAIRS at a time; one chunk holds all of them as long as the count
stays at what the launch was planned for, and further chunks make any count right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_moe_kernels import down_tile, gate_up_tile, store_tile
from .ptx import prefetch_l2


@triton.jit
def slot_expert(
    ids_ptr, chunk, num_pairs, all_pairs, slot, expert_start, num_experts, PAIRS: tl.constexpr, BY_PAIR: tl.constexpr
):
    """The local expert that program ``slot`` serves in this chunk, and the rank of each pair among its pairs.

    ``BY_PAIR`` (fewer pairs than experts): slot s serves the expert of pair s, if no earlier pair has it.
    Returns ``(expert, rank (PAIRS,), count)``; rank is -1 at pairs of others, count 0 when idle.
    Example: ids [7, 3, 7], slot 0: rank [0, -1, 1], count 2; slot 2: count 0.
    """
    pair = chunk + tl.arange(0, PAIRS)
    # loaded up to the static bound: masked by the live count, this load would wait for that one
    ids = tl.load(ids_ptr + pair, mask=pair < all_pairs, other=-1)
    live = pair < num_pairs
    if BY_PAIR:
        mine = tl.load(ids_ptr + chunk + slot, mask=chunk + slot < all_pairs, other=-1)
        owner = (mine >= expert_start) & (mine < expert_start + num_experts) & (chunk + slot < num_pairs)
        owner &= tl.min(tl.where(ids == mine, pair, chunk + PAIRS)) == chunk + slot
        hit = (ids == mine) & owner & live
        expert = (mine - expert_start).to(tl.int32)
    else:
        hit = (ids == expert_start + slot) & live
        expert = slot
    ones = hit.to(tl.int32)
    return expert, tl.where(hit, tl.cumsum(ones, 0) - 1, -1), tl.sum(ones)


@triton.jit
def block_pairs(rank, chunk, first, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, ONE_HOT: tl.constexpr = 4096):
    """Pair indices (int64) of ranks ``first ... first + BLOCK_M - 1``, and these ranks; no scratch memory.

    Small tables are matched as a whole (32 registers a thread); larger ones bisect the running count.
    """
    wanted = first + tl.arange(0, BLOCK_M)
    if PAIRS * BLOCK_M <= ONE_HOT:
        at = tl.arange(0, PAIRS)
        found = tl.sum(tl.where(rank[None, :] == wanted[:, None], at[None, :], 0), axis=1)
    else:
        reached = tl.cumsum((rank >= 0).to(tl.int32), 0)
        found = tl.zeros((BLOCK_M,), tl.int32)  # grows to the first pair at which wanted + 1 is reached
        step: tl.constexpr = PAIRS // 2
        for bit in tl.static_range(PAIRS.bit_length() - 1):
            probe = found + (step >> bit) - 1
            found = tl.where(tl.gather(reached, probe, 0) <= wanted, probe + 1, found)
    return chunk + found.to(tl.int64), wanted


@triton.jit
def gate_up_few_kernel(
    x_ptr, ids_ptr, valid_ptr, w, bias_ptr, act_ptr,
    num_rows, x_stride, expert_start, num_experts, hidden, inner, alpha, limit,
    TOP_K: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr,
    PAIRS: tl.constexpr, BY_PAIR: tl.constexpr, PDL: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``act[pair] = act(x[pair // K] @ gate_up[expert] + bias)``. Grid: (tiles of I, expert slots)."""
    if PDL:  # the next kernel may start: it finds its routing, then waits for the end of this one
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    all_pairs = tl.cast(num_rows, tl.int64) * TOP_K
    num_pairs = tl.minimum(tl.load(valid_ptr), num_rows).to(tl.int64) * TOP_K
    for chunk in range(0, num_pairs, PAIRS):
        expert, rank, count = slot_expert(
            ids_ptr, chunk, num_pairs, all_pairs, tl.program_id(1), expert_start, num_experts, PAIRS, BY_PAIR
        )
        for first in range(0, count, BLOCK_M):
            pairs, wanted = block_pairs(rank, chunk, first, PAIRS, BLOCK_M)
            rows = wanted < count
            inner_rows = gate_up_tile(
                x_ptr, pairs // TOP_K * x_stride, rows, w, bias_ptr, expert, tile,
                hidden, inner, alpha, limit, ACT, GATED, TRANSPOSED, INTERLEAVED, HAS_BIAS, HAS_LIMIT,
                TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
            )  # fmt: skip
            store_tile(act_ptr, pairs, rows, tile, inner, inner_rows, BLOCK_N)


@triton.jit
def prefetch_columns(ptr, expert, first, width, depth, COLUMNS: tl.constexpr, LIMIT: tl.constexpr):
    """Ask L2 for columns ``first ... first + COLUMNS`` of one expert, which lie one after the other, up to LIMIT bytes.

    ``ptr``: (E_l, width, depth), 16-byte aligned columns.
    """
    columns = tl.minimum(width - first, COLUMNS)
    size = tl.minimum(columns.to(tl.int64) * depth * (ptr.dtype.element_ty.primitive_bitwidth // 8), LIMIT)
    start = ptr + (expert.to(tl.int64) * width + first) * depth
    prefetch_l2(start.to(tl.int64, bitcast=True), size.to(tl.int32))


@triton.jit
def down_few_kernel(
    act_ptr, ids_ptr, valid_ptr, w, weights_ptr, bias_ptr, out_ptr,
    num_rows, expert_start, num_experts, hidden, inner,
    TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAIRS: tl.constexpr, BY_PAIR: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``out[pair] = act[pair] @ down[expert] + bias``. Grid: (tiles of H, expert slots).

    PREFETCH: bytes of its weights that a program asks L2 for while the first projection still runs.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    all_pairs = tl.cast(num_rows, tl.int64) * TOP_K
    num_pairs = tl.minimum(tl.load(valid_ptr), num_rows).to(tl.int64) * TOP_K
    for chunk in range(0, num_pairs, PAIRS):
        expert, rank, count = slot_expert(
            ids_ptr, chunk, num_pairs, all_pairs, tl.program_id(1), expert_start, num_experts, PAIRS, BY_PAIR
        )
        if PDL:  # routing above depends on inputs only: it overlaps the tail of the first projection
            if PREFETCH > 0 and count > 0:
                prefetch_columns(weights_ptr, expert, tile * BLOCK_N, hidden, inner, BLOCK_N, PREFETCH)
            tl.extra.cuda.gdc_wait()
        for first in range(0, count, BLOCK_M):
            pairs, wanted = block_pairs(rank, chunk, first, PAIRS, BLOCK_M)
            rows = wanted < count
            acc = down_tile(
                act_ptr, pairs * inner, rows, w, bias_ptr, expert, tile, hidden, inner,
                TRANSPOSED, HAS_BIAS, TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
            )  # fmt: skip
            store_tile(out_ptr, pairs, rows, tile, hidden, acc, BLOCK_N)
    if PDL:  # also where nothing was live: who waits for this kernel must have waited for the one before
        tl.extra.cuda.gdc_wait()

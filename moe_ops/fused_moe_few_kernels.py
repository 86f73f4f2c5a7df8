"""Device code of ``fused_moe`` for few rows: routing is found anew by every program, so there is no align launch.

The live (row, slot) pairs are taken PAIRS at a time; one chunk holds all of them as long as the count
stays at what the launch was planned for, and further chunks make any count right.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_moe_kernels import down_tile, gate_up_tile, rows_times_weights, store_tile
from .ptx import prefetch_l2


@triton.jit
def load_ids(ids_ptr, chunk, all_pairs, PAIRS: tl.constexpr):
    """Expert ids of a chunk's pairs. The bound is the static one: the live count would be waited for first."""
    pair = chunk + tl.arange(0, PAIRS)
    return tl.load(ids_ptr + pair, mask=pair < all_pairs, other=-1)


@triton.jit
def local_experts(
    ids, chunk, num_pairs, expert_start, num_experts, PAIRS: tl.constexpr, BY_PAIR: tl.constexpr
):  # fmt: skip
    """Local experts ``(PAIRS,)`` of a chunk's pairs, -1 where there is none, and how many slots they make."""
    live = chunk + tl.arange(0, PAIRS) < num_pairs
    # compared before narrowing: a wild int64 id must not wrap into range
    local = (ids >= expert_start) & (ids < expert_start + num_experts) & live
    slots = tl.sum(local.to(tl.int32)) if BY_PAIR else num_experts
    return tl.where(local, ids - expert_start, -1).to(tl.int32), slots


@triton.jit
def slot_expert(experts, slot, PAIRS: tl.constexpr, BY_PAIR: tl.constexpr):
    """The local expert that ``slot`` serves in this chunk, which pairs are its own, and their number.

    ``BY_PAIR`` (fewer pairs than experts): slot s serves the expert of the s-th local pair, if no earlier one has it.
    Example: experts [7, -1, 3, 7], slot 0: 7, [1, 0, 0, 1], 2; slot 2: 7, none, 0.
    """
    if BY_PAIR:
        local = experts >= 0
        nth = tl.where(local, tl.cumsum(local.to(tl.int32), 0) - 1, PAIRS)
        expert = tl.sum(tl.where(nth == slot, experts, 0))
        first = tl.min(tl.where(experts == expert, nth, PAIRS))
        own = experts == tl.where(first == slot, expert, -2)
    else:
        expert = slot
        own = experts == slot
    return expert, own, tl.sum(own.to(tl.int32))


@triton.jit
def block_pairs(own, count, chunk, first, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr, ONE_HOT: tl.constexpr = 4096):
    """The expert's pairs ``first ... first + BLOCK_M - 1`` (indices, int64), and which of them there are.

    A chunk no larger than a block is taken as it lies, in one block. Otherwise small tables are matched as a whole (32
    registers a thread), larger ones bisect the running count: no scratch memory.
    """
    if PAIRS == BLOCK_M:
        return (chunk + tl.arange(0, PAIRS)).to(tl.int64), own
    else:
        wanted = first + tl.arange(0, BLOCK_M)
        reached = tl.cumsum(own.to(tl.int32), 0)
        if PAIRS * BLOCK_M <= ONE_HOT:
            at = tl.arange(0, PAIRS)
            rank = tl.where(own, reached - 1, -1)
            found = tl.sum(tl.where(rank[None, :] == wanted[:, None], at[None, :], 0), axis=1)
        else:
            found = tl.zeros((BLOCK_M,), tl.int32)  # grows to the first pair at which wanted + 1 is reached
            step: tl.constexpr = PAIRS // 2
            for bit in tl.static_range(PAIRS.bit_length() - 1):
                probe = found + (step >> bit) - 1
                found = tl.where(tl.gather(reached, probe, 0) <= wanted, probe + 1, found)
        return chunk + found.to(tl.int64), wanted < count


@triton.jit
def rows_of_blocks(count, PAIRS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Where blocks of ``count`` pairs end: a chunk that is a block makes at most one."""
    return tl.minimum(count, 1) if PAIRS == BLOCK_M else count


SPREAD = tl.constexpr(True)


@triton.jit
def prefetch_columns(ptr, expert, first, width, depth, COLUMNS: tl.constexpr, LIMIT: tl.constexpr):
    """Ask L2 for the first bytes of columns ``first ... first + COLUMNS`` of one expert, LIMIT bytes in all.

    ``ptr``: (E_l, width, depth), 16-byte aligned columns. Each column's first bytes, as a product needs all columns
    of its first step of depth at once.
    """
    BITS: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    if SPREAD:
        column = tl.minimum(first + tl.arange(0, COLUMNS), width - 1)
        SHARE: tl.constexpr = LIMIT // COLUMNS // 16 * 16 if LIMIT >= 16 * COLUMNS else 16
        size = tl.zeros((COLUMNS,), tl.int32) + tl.minimum(depth * (BITS // 8), SHARE)
        start = ptr + (expert.to(tl.int64) * width + column) * depth
        prefetch_l2(start.to(tl.int64, bitcast=True), size, COLUMNS)
    else:
        columns = tl.minimum(width - first, COLUMNS)
        size = tl.minimum(columns.to(tl.int64) * depth * (BITS // 8), LIMIT)
        start = ptr + (expert.to(tl.int64) * width + first) * depth
        prefetch_l2(start.to(tl.int64, bitcast=True), size.to(tl.int32), 1)


@triton.jit
def gate_up_few_kernel(
    x_ptr, ids_ptr, valid_ptr, w, weights_ptr, bias_ptr, act_ptr,
    num_rows, x_stride, expert_start, num_experts, hidden, inner, alpha, limit,
    TOP_K: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr,
    PAIRS: tl.constexpr, BY_PAIR: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``act[pair] = act(x[pair // K] @ gate_up[expert] + bias)``. Grid: (tiles of I, programs that share the slots).

    PREFETCH: bytes of each part of its weights that a program asks L2 for at once, ahead of its pipeline.
    """
    if PDL:  # the next kernel may start: it finds its routing, then waits for the end of this one
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    all_pairs = tl.cast(num_rows, tl.int64) * TOP_K
    ids = load_ids(ids_ptr, 0, all_pairs, PAIRS)
    num_pairs = tl.minimum(tl.load(valid_ptr), num_rows).to(tl.int64) * TOP_K
    for chunk in range(0, num_pairs, PAIRS):
        experts, slots = local_experts(ids, chunk, num_pairs, expert_start, num_experts, PAIRS, BY_PAIR)
        for slot in range(tl.program_id(1), slots, tl.num_programs(1)):
            expert, own, count = slot_expert(experts, slot, PAIRS, BY_PAIR)
            if PREFETCH > 0 and count > 0:
                PARTS: tl.constexpr = 2 if GATED and not INTERLEAVED else 1
                COLUMNS: tl.constexpr = 2 * BLOCK_N if GATED and INTERLEAVED else BLOCK_N
                width = 2 * inner if GATED else inner
                for part in tl.static_range(PARTS):
                    at = part * inner + tile * COLUMNS
                    prefetch_columns(weights_ptr, expert, at, width, hidden, COLUMNS, PREFETCH)
            for first in range(0, rows_of_blocks(count, PAIRS, BLOCK_M), BLOCK_M):
                pairs, rows = block_pairs(own, count, chunk, first, PAIRS, BLOCK_M)
                inner_rows = gate_up_tile(
                    x_ptr, pairs // TOP_K * x_stride, rows, w, bias_ptr, expert, tile,
                    hidden, inner, alpha, limit, ACT, GATED, TRANSPOSED, INTERLEAVED, HAS_BIAS, HAS_LIMIT,
                    TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
                )  # fmt: skip
                store_tile(act_ptr, pairs, rows, tile, inner, inner_rows, BLOCK_N)
        ids = load_ids(ids_ptr, chunk + PAIRS, all_pairs, PAIRS)


@triton.jit
def down_few_kernel(
    act_ptr, ids_ptr, valid_ptr, w, weights_ptr, bias_ptr, out_ptr,
    num_rows, expert_start, num_experts, hidden, inner,
    TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAIRS: tl.constexpr, BY_PAIR: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``out[pair] = act[pair] @ down[expert] + bias``. Grid: (tiles of H, programs that share the slots).

    PREFETCH: bytes of its weights that a program asks L2 for while the first projection still runs.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    all_pairs = tl.cast(num_rows, tl.int64) * TOP_K
    ids = load_ids(ids_ptr, 0, all_pairs, PAIRS)
    num_pairs = tl.minimum(tl.load(valid_ptr), num_rows).to(tl.int64) * TOP_K
    for chunk in range(0, num_pairs, PAIRS):
        experts, slots = local_experts(ids, chunk, num_pairs, expert_start, num_experts, PAIRS, BY_PAIR)
        for slot in range(tl.program_id(1), slots, tl.num_programs(1)):
            expert, own, count = slot_expert(experts, slot, PAIRS, BY_PAIR)
            if PDL and PREFETCH > 0 and count > 0:
                prefetch_columns(weights_ptr, expert, tile * BLOCK_N, hidden, inner, BLOCK_N, PREFETCH)
            for first in range(0, rows_of_blocks(count, PAIRS, BLOCK_M), BLOCK_M):
                pairs, rows = block_pairs(own, count, chunk, first, PAIRS, BLOCK_M)
                if PDL:  # routing depends on inputs only: it overlaps the tail of the first projection
                    tl.extra.cuda.gdc_wait()
                acc = down_tile(
                    act_ptr, pairs * inner, rows, w, bias_ptr, expert, tile, hidden, inner,
                    TRANSPOSED, HAS_BIAS, TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
                )  # fmt: skip
                store_tile(out_ptr, pairs, rows, tile, hidden, acc, BLOCK_N)
        ids = load_ids(ids_ptr, chunk + PAIRS, all_pairs, PAIRS)
    if PDL:  # also where nothing was live: who waits for this kernel must have waited for the one before
        tl.extra.cuda.gdc_wait()


@triton.jit
def split_slots(values, COUNT: tl.constexpr):
    """Columns of ``values (N, COUNT)`` as a tuple of ``COUNT`` tensors (N,), in order."""
    if COUNT == 1:
        return (tl.reshape(values, (values.shape[0],)),)
    else:
        even, odd = tl.split(tl.reshape(values, (values.shape[0], COUNT // 2, 2)))
        evens, odds = split_slots(even, COUNT // 2), split_slots(odd, COUNT // 2)
        columns = ()
        for i in tl.static_range(COUNT // 2):
            columns = columns + (evens[i], odds[i])
        return columns


@triton.jit
def slot_values(
    act_ptr, ids_ptr, w_ptr, bias_ptr, pair, slots, cols, expert_start, num_experts, hidden, inner,
    HAS_BIAS: tl.constexpr, SLOTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``SLOTS`` tensors (BLOCK_H,): columns ``cols`` of ``act[p] @ down[expert of p] + bias`` for pairs ``pair + s``.

    One product serves all of them: its left operand holds BLOCK_H weight columns of each slot's expert, its right one
    the rows of all slots, and of the result each slot takes what its own weights gave. Pairs from ``slots`` on, and
    of other ranks' experts, are not read.
    """
    RIGHT: tl.constexpr = SLOTS if SLOTS > 16 else 16  # below 16 columns Triton takes other instructions, other bits
    left = tl.arange(0, BLOCK_H * SLOTS)
    slot, col = left % SLOTS, cols + left // SLOTS
    expert = tl.load(ids_ptr + pair + slot, mask=slot < slots, other=-1) - expert_start
    local = (expert >= 0) & (expert < num_experts)
    offset = tl.where(local, expert, 0).to(tl.int64) * hidden
    at = tl.arange(0, RIGHT)
    right = tl.load(ids_ptr + pair + at, mask=at < slots, other=-1) - expert_start
    right = tl.where((right >= 0) & (right < num_experts), at, RIGHT)
    depth = tl.where(tl.min(right) < RIGHT, inner, 0)
    acc = rows_times_weights(
        w_ptr, (offset + col) * inner, local & (col < hidden), act_ptr + pair * inner, right, RIGHT, depth, inner,
        False, BLOCK_H * SLOTS, RIGHT, BLOCK_K, EVEN_K,
    )  # fmt: skip
    own = tl.sum(tl.where(slot[:, None] == at[None, :], acc, 0.0), axis=1)
    if HAS_BIAS:
        own += tl.load(bias_ptr + offset + col, mask=local & (col < hidden), other=0.0).to(tl.float32)
    return split_slots(tl.reshape(own, (BLOCK_H, SLOTS)), SLOTS)


@triton.jit
def down_sum_few_kernel(
    act_ptr, ids_ptr, valid_ptr, w_ptr, weights_ptr, bias_ptr, out_ptr,
    out_stride, num_rows, expert_start, num_experts, hidden, inner,
    TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    SLOTS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``down_few_kernel`` and ``topk_sum_kernel`` in one, with their roundings and their order.

    Grid: (tiles of H, row programs); a program takes every ``num_programs(1)``-th live row.
    """
    tile, row = tl.program_id(0), tl.program_id(1)
    live = tl.minimum(tl.load(valid_ptr), num_rows)
    if PDL:
        if PREFETCH > 0:
            for slot in tl.static_range(TOP_K):
                expert = tl.load(ids_ptr + row * TOP_K + slot) - expert_start
                if (expert >= 0) & (expert < num_experts) & (row < live):
                    prefetch_columns(w_ptr, expert, tile * BLOCK_H, hidden, inner, BLOCK_H, PREFETCH)
        tl.extra.cuda.gdc_wait()
    cols = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    for row in range(tl.program_id(1), live, tl.num_programs(1)):
        total = tl.zeros((BLOCK_H,), tl.float32)
        for first in range(0, TOP_K, SLOTS):
            pair, slots = tl.cast(row, tl.int64) * TOP_K + first, TOP_K - first
            values = slot_values(
                act_ptr, ids_ptr, w_ptr, bias_ptr, pair, slots, tile * BLOCK_H, expert_start, num_experts,
                hidden, inner, HAS_BIAS, SLOTS, BLOCK_H, BLOCK_K, EVEN_K,
            )  # fmt: skip
            for s in tl.static_range(SLOTS):
                expert = tl.load(ids_ptr + pair + s, mask=s < slots, other=-1) - expert_start
                weight = tl.load(weights_ptr + pair + s, mask=s < slots, other=0.0).to(tl.float32)
                local = (expert >= 0) & (expert < num_experts)
                value = values[s].to(act_ptr.dtype.element_ty).to(tl.float32)
                # fma, or whether product and sum are rounded apart would depend on the layouts
                total = tl.fma(tl.where(local, weight, 0.0), tl.where(local, value, 0.0), total)
        where = out_ptr + tl.cast(row, tl.int64) * out_stride + cols
        tl.store(where, total.to(out_ptr.dtype.element_ty), mask=cols < hidden)

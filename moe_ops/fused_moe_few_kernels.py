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
def local_experts(
    ids_ptr, chunk, num_pairs, all_pairs, expert_start, num_experts, PAIRS: tl.constexpr, BY_PAIR: tl.constexpr
):  # fmt: skip
    """Local experts ``(PAIRS,)`` of a chunk's pairs, -1 where there is none, and how many slots they make."""
    pair = chunk + tl.arange(0, PAIRS)
    # loaded up to the static bound: masked by the live count, this load would wait for that one
    ids = tl.load(ids_ptr + pair, mask=pair < all_pairs, other=-1)
    # compared before narrowing: a wild int64 id must not wrap into range
    local = (ids >= expert_start) & (ids < expert_start + num_experts) & (pair < num_pairs)
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


@triton.jit
def prefetch_columns(ptr, expert, first, width, depth, COLUMNS: tl.constexpr, LIMIT: tl.constexpr):
    """Ask L2 for the first bytes of columns ``first ... first + COLUMNS`` of one expert, LIMIT bytes in all.

    ``ptr``: (E_l, width, depth), 16-byte aligned columns. Each column's first bytes, as a product needs all columns
    of its first step of depth at once.
    """
    SHARE: tl.constexpr = LIMIT // COLUMNS // 16 * 16 if LIMIT >= 16 * COLUMNS else 16
    column = tl.minimum(first + tl.arange(0, COLUMNS), width - 1)
    size = tl.minimum(depth * (ptr.dtype.element_ty.primitive_bitwidth // 8), SHARE)
    start = ptr + (expert.to(tl.int64) * width + column) * depth
    prefetch_l2(start.to(tl.int64, bitcast=True), tl.zeros((COLUMNS,), tl.int32) + size, COLUMNS)


@triton.jit
def gate_up_few_kernel(
    x_ptr, ids_ptr, valid_ptr, w, bias_ptr, act_ptr,
    num_rows, x_stride, expert_start, num_experts, hidden, inner, alpha, limit,
    TOP_K: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr,
    PAIRS: tl.constexpr, BY_PAIR: tl.constexpr, PDL: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``act[pair] = act(x[pair // K] @ gate_up[expert] + bias)``. Grid: (tiles of I, programs that share the slots)."""
    if PDL == 2:  # dispatch still ran
        tl.extra.cuda.gdc_wait()
    if PDL:  # the next kernel may start: it finds its routing, then waits for the end of this one
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    all_pairs = tl.cast(num_rows, tl.int64) * TOP_K
    num_pairs = tl.minimum(tl.load(valid_ptr), num_rows).to(tl.int64) * TOP_K
    # always a first chunk: else its ids would be asked for only when the live count is there. Not loaded ahead and
    # carried: in the layouts that need no conversion Triton 3.6 then takes the first chunk's for all
    for chunk in range(0, tl.maximum(num_pairs, PAIRS), PAIRS):
        experts, slots = local_experts(
            ids_ptr, chunk, num_pairs, all_pairs, expert_start, num_experts, PAIRS, BY_PAIR
        )  # fmt: skip
        for slot in range(tl.program_id(1), slots, tl.num_programs(1)):
            expert, own, count = slot_expert(experts, slot, PAIRS, BY_PAIR)
            for first in range(0, rows_of_blocks(count, PAIRS, BLOCK_M), BLOCK_M):
                pairs, rows = block_pairs(own, count, chunk, first, PAIRS, BLOCK_M)
                inner_rows = gate_up_tile(
                    x_ptr, pairs // TOP_K * x_stride, rows, w, bias_ptr, expert, tile,
                    hidden, inner, alpha, limit, ACT, GATED, TRANSPOSED, INTERLEAVED, HAS_BIAS, HAS_LIMIT,
                    TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
                )  # fmt: skip
                store_tile(act_ptr, pairs, rows, tile, inner, inner_rows, BLOCK_N, KEEP)


@triton.jit
def down_few_kernel(
    act_ptr, ids_ptr, valid_ptr, w, weights_ptr, bias_ptr, out_ptr,
    num_rows, expert_start, num_experts, hidden, inner,
    TOP_K: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    PAIRS: tl.constexpr, BY_PAIR: tl.constexpr, PDL: tl.constexpr, PREFETCH: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``out[pair] = act[pair] @ down[expert] + bias``. Grid: (tiles of H, programs that share the slots).

    PREFETCH: bytes of its weights that a program asks L2 for while the first projection still runs.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    all_pairs = tl.cast(num_rows, tl.int64) * TOP_K
    num_pairs = tl.minimum(tl.load(valid_ptr), num_rows).to(tl.int64) * TOP_K
    # chunks as in gate_up_few_kernel
    for chunk in range(0, tl.maximum(num_pairs, PAIRS), PAIRS):
        experts, slots = local_experts(
            ids_ptr, chunk, num_pairs, all_pairs, expert_start, num_experts, PAIRS, BY_PAIR
        )  # fmt: skip
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
                store_tile(out_ptr, pairs, rows, tile, hidden, acc, BLOCK_N, KEEP)
    if PDL:  # also where nothing was live: who waits for this kernel must have waited for the one before
        tl.extra.cuda.gdc_wait()

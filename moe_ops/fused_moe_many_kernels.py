"""Device code of ``fused_moe`` for many rows: persistent programs over the blocks that ``align_block_size`` made."""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_moe_kernels import down_tile, gate_up_tile, store_tile
from .fused_moe_lone_kernels import is_pair, load_places, store_pairs


@triton.jit
def grouped_tile(index, num_blocks, num_tiles, GROUP: tl.constexpr):
    """``(block, tile)`` of work item ``index``: GROUP blocks take turns on a tile of weights, which L2 then holds.

    Example: 3 blocks, 2 tiles, GROUP 2: (0,0) (1,0) (0,1) (1,1) (2,0) (2,1).
    """
    first = index // (GROUP * num_tiles) * GROUP
    size = tl.minimum(num_blocks - first, GROUP)
    inside = index % (GROUP * num_tiles)
    return first + inside % size, inside // size


@triton.jit
def whole_rounds(items, programs):
    """How many of ``items`` are full rounds of ``programs``; all, where the rest is more than half a round.

    Example: 132 programs; 432 items are 3 rounds, and 36 items left; of 500 items none are left for other kernels.
    """
    left = items % programs
    return tl.where(2 * left <= programs, items - left, items)


@triton.jit
def part(index, whole, num_blocks, num_tiles, PARTS: tl.constexpr, GROUP: tl.constexpr):
    """``(row part of all blocks, column half of all tiles)`` of part ``index`` of the items from ``whole`` on.

    PARTS: 2, halves of the columns; 4, of which each has half of the rows.
    """
    block, tile = grouped_tile(whole + index // PARTS, num_blocks, num_tiles, GROUP)
    return block * (PARTS // 2) + index % (PARTS // 2), 2 * tile + index // (PARTS // 2) % 2


@triton.jit
def across(values, SIZE: tl.constexpr):
    """``values (SIZE,)``, moved between threads here: a loop that carries them then has an element a thread.

    Else it has them as the store wants them, 16 rows a thread, twice over: spills; and Triton 3.6 mixes up copies of
    one carried tensor in several layouts.
    """
    return tl.gather(values, tl.arange(0, SIZE), 0)


@triton.jit
def gate_up_many_kernel(
    x_ptr, sorted_ptr, expert_ids_ptr, total_ptr, w, bias_ptr, act_ptr,
    num_pairs, x_stride, hidden, inner, alpha, limit,
    TOP_K: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, FLAT: tl.constexpr,
    WHOLE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """``act[position] = act(x[sorted[position] // K] @ gate_up[expert] + bias)``. Grid: persistent.

    WHOLE: only full rounds of the grid; ``gate_up_rest_kernel`` does what is left.
    """
    if PDL:  # in this order: the kernel of what is left starts when align has ended
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    num_blocks = tl.load(total_ptr) // BLOCK_M
    num_tiles = tl.cdiv(inner, BLOCK_N)
    items = num_blocks * num_tiles
    if WHOLE:
        items = whole_rounds(items, tl.num_programs(0))
    # FLAT: one loop over the depths of all tiles, so that a tile's first loads begin under the one before
    for index in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLAT):
        block, tile = grouped_tile(index, num_blocks, num_tiles, GROUP)
        expert = tl.load(expert_ids_ptr + block)
        first = block.to(tl.int64) * BLOCK_M
        position = first + tl.arange(0, BLOCK_M)
        pairs = tl.load(sorted_ptr + position)
        rows = pairs < num_pairs
        inner_rows = gate_up_tile(
            x_ptr, (pairs // TOP_K).to(tl.int64) * x_stride, rows, w, bias_ptr, expert, tile, hidden, inner,
            alpha, limit, ACT, GATED, TRANSPOSED, INTERLEAVED, HAS_BIAS, HAS_LIMIT, TMA, SWAP,
            BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
        )  # fmt: skip
        # padding rows too: the second projection reads whole blocks
        store_tile(act_ptr, position, position >= 0, tile, inner, inner_rows, BLOCK_N, KEEP)


@triton.jit
def down_many_kernel(
    act, sorted_ptr, expert_ids_ptr, total_ptr, w, bias_ptr, pairs_ptr, place_ptr, factor_ptr,
    num_pairs, positions, hidden, inner,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, BOX_ROWS: tl.constexpr, LONE: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, FLAT: tl.constexpr,
    SPECIAL: tl.constexpr, WHOLE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """``pairs[sorted[position]] = act[position] @ down[expert] + bias``. Grid: persistent.

    LONE: to address ``place[position]`` instead, times ``factor[position]``: see ``fused_moe_lone_kernels``.
    ``act``: (S, I), with BOX_ROWS its descriptor: a block's rows lie one after the other. SPECIAL (BLOCK_M 128, four
    warps): one group of warps loads, two multiply 64 rows each and store while their next tile is being loaded.
    """
    if PDL:  # in this order: the kernel of what is left starts when align has ended
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if SPECIAL:  # made here: the groups take half boxes, which a descriptor made by the host cannot follow
        act = tl.make_tensor_descriptor(act, [positions, inner], [inner, 1], [BLOCK_M, BLOCK_K])
    num_blocks = tl.load(total_ptr) // BLOCK_M
    num_tiles = tl.cdiv(hidden, BLOCK_N)
    items = num_blocks * num_tiles
    if WHOLE:
        items = whole_rounds(items, tl.num_programs(0))
    for index in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLAT, warp_specialize=SPECIAL):
        block, tile = grouped_tile(index, num_blocks, num_tiles, GROUP)
        expert = tl.load(expert_ids_ptr + block)
        first = block.to(tl.int64) * BLOCK_M
        place, factor = load_places(sorted_ptr, place_ptr, factor_ptr, first + tl.arange(0, BLOCK_M), LONE)
        rows = is_pair(place, num_pairs, LONE)
        if BOX_ROWS:
            where = first.to(tl.int32)
        else:
            where = (first + tl.arange(0, BLOCK_M)) * inner
        acc = down_tile(
            act, where, rows, w, bias_ptr, expert, tile, hidden, inner,
            TRANSPOSED, HAS_BIAS, TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, BOX_ROWS,
        )  # fmt: skip
        if LONE and not SPECIAL:
            place, factor = across(place, BLOCK_M), across(factor, BLOCK_M)
            rows = is_pair(place, num_pairs, LONE)
        store_pairs(pairs_ptr, place, rows, tile, hidden, acc, factor, LONE, BLOCK_N, KEEP)

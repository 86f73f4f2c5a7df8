"""Device code of ``fused_moe`` for many rows: what the last round of programs would do with most of them idle.

A round of tiles of 128 x 256 takes 25 us at H 2048 even if only a quarter of the SMs has one. So the kernels of
``fused_moe_many_kernels`` stop after the last full round, and these do the rest in halves of tiles, or in quarters, two
programs an SM. They start as the others' programs end (``pdl``: these read nothing that the others write), and end
after them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_moe_kernels import down_tile, gate_up_tile, store_tile
from .fused_moe_lone_kernels import is_pair, load_places, store_pairs
from .fused_moe_many_kernels import part, whole_rounds


@triton.jit
def gate_up_rest_kernel(
    x_ptr, sorted_ptr, expert_ids_ptr, total_ptr, w, bias_ptr, act_ptr,
    num_pairs, x_stride, hidden, inner, alpha, limit, programs,
    TOP_K: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, TRANSPOSED: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr, GROUP: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PARTS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Parts of the tiles that ``gate_up_many_kernel`` with ``programs`` programs leaves. Grid: any."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    num_blocks, num_tiles = tl.load(total_ptr) // (BLOCK_M * (PARTS // 2)), tl.cdiv(inner, 2 * BLOCK_N)
    whole = whole_rounds(num_blocks * num_tiles, programs)
    for index in range(tl.program_id(0), PARTS * (num_blocks * num_tiles - whole), tl.num_programs(0)):
        rows_part, tile = part(index, whole, num_blocks, num_tiles, PARTS, GROUP)
        position = rows_part.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        pairs = tl.load(sorted_ptr + position)
        inner_rows = gate_up_tile(
            x_ptr, (pairs // TOP_K).to(tl.int64) * x_stride, pairs < num_pairs, w, bias_ptr,
            tl.load(expert_ids_ptr + rows_part // (PARTS // 2)), tile, hidden, inner, alpha, limit,
            ACT, GATED, TRANSPOSED, INTERLEAVED, HAS_BIAS, HAS_LIMIT, TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K,
        )  # fmt: skip
        store_tile(act_ptr, position, position >= 0, tile, inner, inner_rows, BLOCK_N, KEEP)
    if PDL:  # the next kernel waits for this one alone
        tl.extra.cuda.gdc_wait()


@triton.jit
def down_rest_kernel(
    act, sorted_ptr, expert_ids_ptr, total_ptr, w, bias_ptr, pairs_ptr, place_ptr, factor_ptr,
    num_pairs, hidden, inner, programs,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP: tl.constexpr, LONE: tl.constexpr,
    TMA: tl.constexpr, SWAP: tl.constexpr, PDL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr, PARTS: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """Parts of the tiles that ``down_many_kernel`` with ``programs`` programs leaves. Grid: any."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    num_blocks, num_tiles = tl.load(total_ptr) // (BLOCK_M * (PARTS // 2)), tl.cdiv(hidden, 2 * BLOCK_N)
    whole = whole_rounds(num_blocks * num_tiles, programs)
    for index in range(tl.program_id(0), PARTS * (num_blocks * num_tiles - whole), tl.num_programs(0)):
        rows_part, tile = part(index, whole, num_blocks, num_tiles, PARTS, GROUP)
        first = rows_part * BLOCK_M
        place, factor = load_places(sorted_ptr, place_ptr, factor_ptr, first + tl.arange(0, BLOCK_M), LONE)
        rows = is_pair(place, num_pairs, LONE)
        acc = down_tile(
            act, first, rows, w, bias_ptr, tl.load(expert_ids_ptr + rows_part // (PARTS // 2)), tile, hidden, inner,
            TRANSPOSED, HAS_BIAS, TMA, SWAP, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, True,
        )  # fmt: skip
        store_pairs(pairs_ptr, place, rows, tile, hidden, acc, factor, LONE, BLOCK_N, KEEP)
    if PDL:
        tl.extra.cuda.gdc_wait()

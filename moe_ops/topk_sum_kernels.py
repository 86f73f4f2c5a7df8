"""Device code of the top-k sum, also the last launch of ``fused_moe``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def topk_sum_kernel(
    pairs_ptr, ids_ptr, weights_ptr, valid_ptr, out_ptr, out_stride, num_rows, hidden, expert_start, num_experts,
    TOP_K: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``out[row] = sum over slots of weight * pairs[row * K + slot]``, local experts only, slots in order, in fp32.

    Grid: (row programs, column tiles); a program takes every ``num_programs(0)``-th live row.
    Example: K 2, weights [0.5, 2], ids [local, remote] gives 0.5 * pairs[0]; pairs[1] is not read.
    """
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = cols < hidden
    live = tl.minimum(tl.load(valid_ptr), num_rows)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for row in range(tl.program_id(0), live, tl.num_programs(0)):
        pair = tl.cast(row, tl.int64) * TOP_K
        acc = tl.zeros((BLOCK_H,), tl.float32)
        for slot in tl.static_range(TOP_K):
            expert = tl.load(ids_ptr + pair + slot)
            local = (expert >= expert_start) & (expert < expert_start + num_experts)
            weight = tl.load(weights_ptr + pair + slot).to(tl.float32)
            inside_local = cols < tl.where(local, hidden, 0)
            value = tl.load(pairs_ptr + (pair + slot) * hidden + cols, mask=inside_local, other=0.0)
            # a remote slot adds nothing, whatever its weight holds
            acc += tl.where(local, weight, 0.0) * value.to(tl.float32)
        tl.store(out_ptr + tl.cast(row, tl.int64) * out_stride + cols, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _lowest_bit(bits):
    """Index of the lowest set bit, or -127 where there is none, and the rest: 6 gives (1, 4)."""
    low = bits & -bits
    return (low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, bits ^ low


@triton.jit
def topk_sum_local_kernel(
    pairs_ptr, ids_ptr, weights_ptr, valid_ptr, out_ptr, out_stride, num_rows, hidden, expert_start, num_experts,
    TOP_K: tl.constexpr, BLOCK_H: tl.constexpr, SLOTS: tl.constexpr, LONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``topk_sum_kernel`` where most slots are remote: two local slots a turn, and no turn for the others.

    Grid: as there. ``SLOTS``: ids looked at together, a power of two up to 16. LONE (TOP_K <= SLOTS) leaves rows
    with one local slot as they are, see ``fused_moe_lone_kernels``.
    """
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = cols < hidden
    slots = tl.arange(0, SLOTS)
    live = tl.minimum(tl.load(valid_ptr), num_rows)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for row in range(tl.program_id(0), live, tl.num_programs(0)):
        acc = tl.zeros((BLOCK_H,), tl.float32)
        for part in tl.static_range(0, TOP_K, SLOTS):
            pair = tl.cast(row, tl.int64) * TOP_K + part
            expert = tl.load(ids_ptr + pair + slots, mask=slots < TOP_K - part, other=-1)
            local = (expert >= expert_start) & (expert < expert_start + num_experts)
            bits = tl.sum(tl.where(local, 1 << slots, 0), 0)
            if LONE:
                wanted = (bits == 0) | (bits & (bits - 1) != 0)
                bits = tl.where(wanted, bits, 0)
            while bits != 0:
                first, bits = _lowest_bit(bits)
                second, bits = _lowest_bit(bits)
                more = second >= 0
                second = tl.where(more, second, first)
                weight = tl.load(weights_ptr + pair + first).to(tl.float32)
                next_weight = tl.where(more, tl.load(weights_ptr + pair + second).to(tl.float32), 0.0)
                value = tl.load(pairs_ptr + (pair + first) * hidden + cols, mask=inside, other=0.0)
                both = cols < tl.where(more, hidden, 0)
                next_value = tl.load(pairs_ptr + (pair + second) * hidden + cols, mask=both, other=0.0)
                acc += weight * value.to(tl.float32)
                acc += next_weight * next_value.to(tl.float32)
        if LONE:
            inside_row = cols < tl.where(wanted, hidden, 0)
        else:
            inside_row = inside
        where = out_ptr + tl.cast(row, tl.int64) * out_stride + cols
        tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=inside_row)

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
def _local_bits(
    ids_ptr, row, part, live, expert_start, num_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Bit ``r * SLOTS + s`` (int64): slot ``part + s`` of row ``row + r`` is local. ROWS * SLOTS up to 64."""
    at = tl.arange(0, ROWS * SLOTS)
    rows, slots = row + at // SLOTS, part + at % SLOTS
    asked = (rows < live) & (slots < TOP_K)
    expert = tl.load(ids_ptr + rows.to(tl.int64) * TOP_K + slots, mask=asked, other=-1)
    local = (expert >= expert_start) & (expert < expert_start + num_experts)
    return tl.sum(local.to(tl.int64) << at.to(tl.int64), 0)


@triton.jit
def topk_sum_local_kernel(
    pairs_ptr, ids_ptr, weights_ptr, valid_ptr, out_ptr, out_stride, num_rows, hidden, expert_start, num_experts,
    TOP_K: tl.constexpr, BLOCK_H: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, LONE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """``topk_sum_kernel`` where most slots are remote: two local slots a turn, and no turn for the others.

    Grid: (programs, column tiles); a program takes every ``num_programs(0)``-th group of ROWS rows. ``SLOTS``: a power
    of two up to 16; if it covers K, one load brings a group's ids, and the first group's come ahead of the wait; else
    ROWS is 1. LONE (SLOTS covers K) leaves rows with one local slot as they are, see ``fused_moe_lone_kernels``.
    """
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = cols < hidden
    live = tl.minimum(tl.load(valid_ptr), num_rows)
    first_row, step = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
    group_bits = _local_bits(ids_ptr, first_row, 0, live, expert_start, num_experts, TOP_K, SLOTS, ROWS)
    if PDL:
        tl.extra.cuda.gdc_wait()
    for group in range(first_row, live, step):
        for row in range(group, tl.minimum(group + ROWS, live)):
            acc, written = tl.zeros((BLOCK_H,), tl.float32), inside
            for part in tl.static_range(0, TOP_K, SLOTS):
                if part > 0:
                    group_bits = _local_bits(ids_ptr, row, part, live, expert_start, num_experts, TOP_K, SLOTS, ROWS)
                bits = (group_bits >> tl.cast(row - group, tl.int64) * SLOTS).to(tl.int32) & ((1 << SLOTS) - 1)
                if LONE:
                    wanted = (bits == 0) | (bits & (bits - 1) != 0)
                    bits, written = tl.where(wanted, bits, 0), cols < tl.where(wanted, hidden, 0)
                pair = tl.cast(row, tl.int64) * TOP_K + part
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
            where = out_ptr + tl.cast(row, tl.int64) * out_stride + cols
            tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=written)
        group_bits = _local_bits(ids_ptr, group + step, 0, live, expert_start, num_experts, TOP_K, SLOTS, ROWS)

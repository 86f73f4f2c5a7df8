"""Device code of ``align_block_size``: positions by counting, no atomics on global memory.

One launch up to ``ONE_LAUNCH_PAIRS``, where every program reads all ids; two above it, where every program
counts a share of the ids, and then ranks the same share and, with the counts of all shares at hand, scatters it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_moe_lone_kernels import destinations
from .pdl import chain_link, chain_start

ONE_LAUNCH_PAIRS = 2048
_SHARE = 32  # pairs that a program of the one-launch form places
_PARTS = 4  # of the pairs, which a program of the one-launch form counts apart: only one of them twice
_PROGRAMS = 128  # about one an SM
_TABLE = 4096  # counts that a program of the two-launch form reads at once
_BLOCKS = 4  # blocks that a program of the one-launch form pads at once


@triton.jit
def _local_ids(ids_ptr, first, num_pairs, all_pairs, expert_start, num_experts, CHUNK: tl.constexpr):
    """Pair indices of one chunk, their local experts (0 where there is none), and whether they have one."""
    pair = first + tl.arange(0, CHUNK)
    # loaded up to the static bound: masked by the live count, this load would wait for that one
    ids = tl.load(ids_ptr + pair, mask=pair < all_pairs, other=-1)
    # compared before narrowing: a wild int64 id must not wrap into range
    local = (ids >= expert_start) & (ids < expert_start + num_experts) & (pair < num_pairs)
    return pair, tl.where(local, ids - expert_start, 0).to(tl.int32), local


@triton.jit
def _fill(ptr, first, end, step, value, CHUNK: tl.constexpr):
    """``ptr[i] = value`` for the chunks of ``[first, end)`` that start ``step`` apart."""
    for at in range(first, end, step):
        where = at + tl.arange(0, CHUNK)
        tl.store(ptr + where, tl.full((CHUNK,), value, ptr.dtype.element_ty), mask=where < end)


@triton.jit
def _earlier_equal(local, GROUPS: tl.constexpr, SIZE: tl.constexpr):
    """How many pairs of its group of SIZE before each pair have its expert: one group [5, 3, 5] gives [0, 0, 1]."""
    groups, at = tl.reshape(local, (GROUPS, SIZE)), tl.arange(0, SIZE)
    begin = groups * SIZE  # of an expert's keys; a pair's key is that plus its place, so one compare says all
    # the axis that is summed comes first, so that each thread has it to itself
    past = tl.trans(begin + at[None, :])[:, :, None] - begin[None, :, :]
    earlier = past.to(tl.uint32, bitcast=True) < at[None, None, :].to(tl.uint32)
    return tl.reshape(tl.sum(earlier.to(tl.int32), axis=0), (GROUPS * SIZE,))


@triton.jit
def _ranks(local, has, GROUPS: tl.constexpr, SIZE: tl.constexpr, BINS: tl.constexpr):
    """How many pairs before each pair have its expert, and how many of all: among groups by counting, then within."""
    if GROUPS == 1:
        return _earlier_equal(tl.where(has, local, -1), 1, SIZE), tl.histogram(local, BINS, mask=has)
    which = tl.arange(0, GROUPS * SIZE) // SIZE * BINS + local
    counts = tl.reshape(tl.histogram(which, GROUPS * BINS, mask=has), (GROUPS, BINS))
    before = tl.reshape(tl.cumsum(counts, 0) - counts, (GROUPS * BINS,))
    within = _earlier_equal(tl.where(has, local, -1), GROUPS, SIZE)
    return tl.gather(before, which, 0) + within, tl.sum(counts, 0)


@triton.jit
def _count_parts(
    ids_ptr, start, num_pairs, all_pairs, expert_start, num_experts,
    PART: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Pairs of each expert: all, and those before pair ``start``. ``PARTS * PART`` is at least ``all_pairs``."""
    cut = start // PART * PART
    pair, local, has = _local_ids(ids_ptr, cut, num_pairs, all_pairs, expert_start, num_experts, PART)
    parts = ()
    for part in tl.static_range(PARTS):  # all loads ahead of the first histogram
        parts = parts + (_local_ids(ids_ptr, part * PART, num_pairs, all_pairs, expert_start, num_experts, PART),)
    before = tl.histogram(local, BINS, mask=has & (pair < start))
    counts = tl.zeros((BINS,), tl.int32)
    for part in tl.static_range(PARTS):
        here = tl.histogram(parts[part][1], BINS, mask=parts[part][2])
        counts += here
        before += tl.where(part * PART < cut, here, 0)
    return counts, before


@triton.jit
def _align_kernel(
    ids_ptr, valid_ptr, sorted_ptr, expert_ids_ptr, total_ptr,
    num_rows, top_k, expert_start, num_experts, sorted_size,
    BLOCK: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, BINS: tl.constexpr, SHARE: tl.constexpr,
    BLOCKS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Programs count all pairs, and those before their share; then they place SHARE pairs, and pad BLOCKS blocks.

    Grid: enough programs for all shares; for blocks they loop. Example: ids [[1, 0], [1, 2]], E_l 2, BLOCK 4 gives
    sorted [1, 4, 4, 4, 0, 2, 4, 4, ...], expert_ids [0, 1, -1, ...], total 8 (pair 3 is not local).
    """
    if PDL == 2:  # dispatch still ran
        tl.extra.cuda.gdc_wait()
    if PDL:  # a next kernel that asked for it may start and wait
        tl.extra.cuda.gdc_launch_dependents()
    program, pairs_total = tl.program_id(0), num_rows * top_k
    num_pairs = tl.minimum(tl.load(valid_ptr), num_rows) * top_k
    own_pair, own, own_has = _local_ids(
        ids_ptr, program * SHARE, num_pairs, pairs_total, expert_start, num_experts, SHARE
    )
    counts, before = _count_parts(
        ids_ptr, program * SHARE, num_pairs, pairs_total, expert_start, num_experts, PART, PARTS, BINS
    )
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(padded, 0)
    rank = _earlier_equal(tl.where(own_has, own, -1), 1, SHARE)
    tl.store(sorted_ptr + tl.gather(ends - padded + before, own, 0) + rank, own_pair, mask=own_has)
    filled_ends = ends - padded + counts
    PIECE: tl.constexpr = BLOCK & -BLOCK  # of a block: fused_moe asks for blocks of 192, which no range can have
    for first in range(program * BLOCKS, sorted_size // PIECE, tl.num_programs(0) * BLOCKS):
        piece = (first + tl.arange(0, BLOCKS)) * PIECE
        expert = tl.sum((ends[None, :] <= piece[:, None]).to(tl.int32), axis=1)
        # where the pairs of the piece's expert end; past the total, those of the last one, and all is padding
        filled = tl.gather(filled_ends, tl.minimum(expert, BINS - 1), 0)
        begins = (piece < sorted_size) & (piece % BLOCK == 0)
        tl.store(expert_ids_ptr + piece // BLOCK, tl.where(expert < BINS, expert, -1), mask=begins)
        where = piece[:, None] + tl.arange(0, PIECE)[None, :]
        mask = (where >= filled[:, None]) & (where < sorted_size)
        tl.store(sorted_ptr + where, tl.full((BLOCKS, PIECE), 0, tl.int32) + pairs_total, mask=mask)
    if program == 0:
        tl.store(total_ptr, tl.max(ends))


@triton.jit
def _count_kernel(
    ids_ptr, valid_ptr, counts_ptr, sorted_ptr, place_ptr,
    num_rows, top_k, expert_start, num_experts, sorted_size, share,
    CHUNK: tl.constexpr, FILL: tl.constexpr, BINS: tl.constexpr, LONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """``counts[p, e]`` = pairs of expert e among the ``share`` pairs from ``p * share`` on; fills what is sorted.

    Grid: one program a share. Example: ids [[1, 0], [1, 2]], E_l 2, share 2: counts [[1, 1], [0, 1]].
    """
    if PDL == 2:  # dispatch still ran
        tl.extra.cuda.gdc_wait()
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0).to(tl.int64)
    pairs_total = tl.cast(num_rows, tl.int64) * top_k
    num_pairs = tl.minimum(tl.load(valid_ptr).to(tl.int64) * top_k, pairs_total)
    first, end = program * share, tl.minimum((program + 1) * share, pairs_total)
    end_pair = tl.minimum(end, num_pairs)
    # the first chunk ahead of the loop, whose bound waits for the live count
    _, local, has = _local_ids(ids_ptr, first, end_pair, end, expert_start, num_experts, CHUNK)
    size = tl.cast(sorted_size, tl.int64)
    _fill(sorted_ptr, program * FILL, size, programs * FILL, pairs_total.to(tl.int32), FILL)
    if LONE:
        _fill(place_ptr, program * FILL, size, programs * FILL, 0, FILL)
    counts = tl.histogram(local, BINS, mask=has)
    for later in range(first + CHUNK, end_pair, CHUNK):
        _, local, has = _local_ids(ids_ptr, later, end_pair, end, expert_start, num_experts, CHUNK)
        counts += tl.histogram(local, BINS, mask=has)
    tl.store(counts_ptr + program * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _sum_shares(counts_ptr, program, shares, BINS: tl.constexpr, ROWS: tl.constexpr):
    """Pairs of each expert, all and those of shares before ``program``'s, from the counts of all shares."""
    bins = tl.arange(0, BINS)
    KEPT: tl.constexpr = ROWS if BINS > 32 else 1  # rows that are added up at the end; of few bins one turn reads all
    counts, before = tl.zeros((KEPT, BINS), tl.int32), tl.zeros((KEPT, BINS), tl.int32)
    for first in range(0, shares, ROWS):
        row = first + tl.arange(0, ROWS)
        part = tl.load(counts_ptr + row[:, None] * BINS + bins[None, :], mask=(row < shares)[:, None], other=0)
        earlier = tl.where((row < program)[:, None], part, 0)
        counts += part if KEPT > 1 else tl.sum(part, 0, keep_dims=True)
        before += earlier if KEPT > 1 else tl.sum(earlier, 0, keep_dims=True)
    return tl.sum(counts, 0), tl.sum(before, 0)


@triton.jit
def _scatter_kernel(
    ids_ptr, valid_ptr, counts_ptr, sorted_ptr, expert_ids_ptr, total_ptr,
    weights_ptr, pairs_ptr, out_ptr, place_ptr, factor_ptr,
    num_rows, top_k, expert_start, num_experts, share, blocks, width, out_stride,
    BLOCK: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, BINS: tl.constexpr, ROWS: tl.constexpr,
    ONE: tl.constexpr, LONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write the pairs of one share to where the counts of all shares put them, and a part of the ``blocks``' experts.

    Grid: one program a share. ONE: a share is one chunk.
    LONE: K, or 0; then ``place`` and ``factor[position]`` are ``destinations`` of the pair there.
    """
    program = tl.program_id(0).to(tl.int64)
    pairs_total = tl.cast(num_rows, tl.int64) * top_k
    num_pairs = tl.minimum(tl.load(valid_ptr).to(tl.int64) * top_k, pairs_total)
    end = tl.minimum((program + 1) * share, num_pairs)
    CHUNK: tl.constexpr = GROUPS * SIZE
    # inputs only, so ahead of the wait: the whole share, where it is one chunk
    pair, local, has = _local_ids(ids_ptr, program * share, end, pairs_total, expert_start, num_experts, CHUNK)
    rank, here = _ranks(local, has, GROUPS, SIZE, BINS)
    if LONE:
        place, factor = destinations(
            ids_ptr, weights_ptr, pairs_ptr, out_ptr, width, out_stride, pair, has, pair < pairs_total,
            expert_start, num_experts, LONE, CHUNK,
        )  # fmt: skip
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    counts, before = _sum_shares(counts_ptr, program, tl.num_programs(0), BINS, ROWS)
    padded = (counts + BLOCK - 1) // BLOCK * BLOCK
    ends = tl.cumsum(padded, 0)
    base = ends - padded + before
    tl.store(sorted_ptr + tl.gather(base, local, 0) + rank, pair.to(tl.int32), mask=has)
    if LONE:
        position = tl.gather(base, local, 0) + rank
        tl.store(place_ptr + position, place, mask=has)
        tl.store(factor_ptr + position, factor, mask=has)
    if not ONE:
        base += here
        for first in range(program * share + CHUNK, end, CHUNK):
            pair, local, has = _local_ids(ids_ptr, first, end, pairs_total, expert_start, num_experts, CHUNK)
            rank, here = _ranks(local, has, GROUPS, SIZE, BINS)
            tl.store(sorted_ptr + tl.gather(base, local, 0) + rank, pair.to(tl.int32), mask=has)
            if LONE:
                place, factor = destinations(
                    ids_ptr, weights_ptr, pairs_ptr, out_ptr, width, out_stride, pair, has, pair < pairs_total,
                    expert_start, num_experts, LONE, CHUNK,
                )  # fmt: skip
                position = tl.gather(base, local, 0) + rank
                tl.store(place_ptr + position, place, mask=has)
                tl.store(factor_ptr + position, factor, mask=has)
            base += here
    end_blocks = ends // BLOCK
    for first in range(program * ROWS, blocks, tl.num_programs(0) * ROWS):
        block = (first + tl.arange(0, ROWS)).to(tl.int32)
        expert = tl.sum((end_blocks[None, :] <= block[:, None]).to(tl.int32), axis=1)
        tl.store(expert_ids_ptr + block, tl.where(expert < BINS, expert, -1), mask=block < blocks)
    if program == 0:
        tl.store(total_ptr, tl.max(ends))


def _launch_two(
    topk_ids: Tensor, valid_tokens: Tensor, outputs: tuple[Tensor, Tensor, Tensor], block_size: int,
    num_local_experts: int, local_expert_start: int, lone: tuple[Tensor, ...] | None, behind_dispatch: bool,
) -> None:  # fmt: skip
    sorted_ids, expert_ids, total = outputs
    bins = max(triton.next_power_of_2(num_local_experts), 16)
    # few bins: groups of 32 pairs among themselves; many: 128 pairs, as Triton's histogram slows with bins squared
    programs, groups, size = (256, 4, 32) if bins <= 32 else (128, 1, 128)
    share = triton.cdiv(triton.cdiv(topk_ids.numel(), programs), groups * size) * groups * size
    shares = triton.cdiv(topk_ids.numel(), share)
    counts = torch.empty(shares, bins, dtype=torch.int32, device=topk_ids.device)
    sizes = topk_ids.shape[0], topk_ids.shape[1], local_expert_start, num_local_experts
    options = {"BINS": bins, "LONE": topk_ids.shape[1] if lone else 0, "num_warps": 4}
    strides = (lone[1].shape[1], lone[2].stride(0)) if lone else (0, 0)
    lone = lone or 5 * (counts,)
    _count_kernel[(shares,)](
        topk_ids, valid_tokens, counts, sorted_ids, lone[3], *sizes, sorted_ids.numel(), share,
        CHUNK=min(triton.next_power_of_2(share), 1024), FILL=256, **options,
        **chain_start(True, topk_ids.device, behind_dispatch),
    )  # fmt: skip
    _scatter_kernel[(shares,)](
        topk_ids, valid_tokens, counts, sorted_ids, expert_ids, total, *lone,
        *sizes, share, expert_ids.numel(), *strides,
        BLOCK=block_size, GROUPS=groups, SIZE=size, ROWS=max(_TABLE // bins, 1), ONE=share == groups * size,
        **options, **chain_link(True, topk_ids.device),
    )  # fmt: skip


def launch(
    topk_ids: Tensor,
    valid_tokens: Tensor,
    outputs: tuple[Tensor, Tensor, Tensor],
    block_size: int,
    num_local_experts: int,
    local_expert_start: int,
    lone: tuple[Tensor, ...] | None = None,
    behind_dispatch: bool = False,
) -> None:
    """Fill ``outputs`` (see ``align.align_block_size``); ``topk_ids`` contiguous.

    ``lone`` (more than ``ONE_LAUNCH_PAIRS`` pairs): weights (M, K), pairs (M * K, H) and out (M, H) of
    ``destinations``, and what gets these, (S,) int64 and fp32.
    """
    if topk_ids.numel() > ONE_LAUNCH_PAIRS:
        sizes = block_size, num_local_experts, local_expert_start
        _launch_two(topk_ids, valid_tokens, outputs, *sizes, lone, behind_dispatch)
        return
    assert lone is None, "one launch tells no lone pairs"
    sorted_ids, expert_ids, total = outputs
    pairs, blocks = topk_ids.numel(), expert_ids.numel()
    whole = max(triton.next_power_of_2(pairs), 128)
    parts = _PARTS if whole > 1024 else 1
    programs = max(triton.cdiv(pairs, _SHARE), min(triton.cdiv(blocks, _BLOCKS), _PROGRAMS))
    _align_kernel[(programs,)](
        topk_ids, valid_tokens, sorted_ids, expert_ids, total,
        topk_ids.shape[0], topk_ids.shape[1], local_expert_start, num_local_experts, sorted_ids.numel(),
        BLOCK=block_size, PART=whole // parts, PARTS=parts, BINS=triton.next_power_of_2(num_local_experts),
        SHARE=_SHARE, BLOCKS=_BLOCKS, num_warps=min(max(whole // 256, 4), 8),
        **chain_start(True, topk_ids.device, behind_dispatch),
    )  # fmt: skip

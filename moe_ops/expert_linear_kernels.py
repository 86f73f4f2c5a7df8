"""Device code and launch of ``expert_linear``: made to be right for every gate, without bulk copies or tuned tiles."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .align import launch_align

_PROGRAMS_PER_SM = 8
_HOST_PROGRAMS = 4  # stands for the number of SMs in Triton's interpreter


@triton.jit
def _expert_linear_kernel(
    x_ptr, sorted_ptr, expert_ids_ptr, total_ptr, w_ptr, bias_ptr, out_ptr,
    num_pairs, x_stride, depth, width,
    PAIRS_PER_ROW: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``out[pair] = x[pair // PAIRS_PER_ROW] @ w[expert] + bias[expert]`` for the pairs that align listed.

    Grid: persistent over (blocks of one expert's pairs) x (column tiles); a block's tiles are neighbours.
    Example: PAIRS_PER_ROW 2, sorted [3, 4, 4, ...] of 4 pairs: pair 3 takes row 1; 4 is padding.
    """
    num_tiles = tl.cdiv(width, BLOCK_N)
    work = tl.load(total_ptr) // BLOCK_M * num_tiles
    ks = tl.arange(0, BLOCK_K)
    for index in range(tl.program_id(0), work, tl.num_programs(0)):
        block = index // num_tiles
        cols = index % num_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        expert = tl.load(expert_ids_ptr + block).to(tl.int64)
        pairs = tl.load(sorted_ptr + block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))
        rows = pairs < num_pairs
        x_ptrs = x_ptr + (pairs // PAIRS_PER_ROW).to(tl.int64)[:, None] * x_stride + ks[None, :]
        w_start = w_ptr + expert * depth * width
        if TRANSPOSED:
            w_ptrs = w_start + ks[:, None].to(tl.int64) * width + cols[None, :]
            w_step = tl.cast(width, tl.int64) * BLOCK_K
        else:
            w_ptrs = w_start + cols[None, :].to(tl.int64) * depth + ks[:, None]
            w_step = tl.cast(BLOCK_K, tl.int64)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, depth, BLOCK_K):
            inside = ks < depth - k
            x = tl.load(x_ptrs, mask=rows[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=inside[:, None] & (cols < width)[None, :], other=0.0)
            acc = tl.dot(x, w, acc)
            x_ptrs += BLOCK_K
            w_ptrs += w_step
        if HAS_BIAS:
            acc += tl.load(bias_ptr + expert * width + cols, mask=cols < width, other=0.0).to(tl.float32)[None, :]
        out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * width + cols[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=rows[:, None] & (cols < width)[None, :])


def _programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _HOST_PROGRAMS
    return _PROGRAMS_PER_SM * torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    x: Tensor, topk_ids: Tensor, weight: Tensor, valid_tokens: Tensor, expert_start: int, bias: Tensor | None,
    transposed: bool, batch_invariant: bool, out: Tensor,
) -> None:  # fmt: skip
    """Fill the live local pairs of ``out (M*K, N)``."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    pairs, width, depth = out.shape[0], out.shape[1], x.shape[1]
    block = 16 if batch_invariant or pairs <= 32 * weight.shape[0] else 64
    aligned = launch_align(topk_ids, valid_tokens, block, weight.shape[0], expert_start)
    tiles = aligned[1].numel() * triton.cdiv(width, 64)
    _expert_linear_kernel[(min(tiles, _programs(x.device)),)](
        x, *aligned, weight, weight if bias is None else bias, out,
        pairs, x.stride(0), depth, width,
        PAIRS_PER_ROW=pairs // x.shape[0], TRANSPOSED=transposed, HAS_BIAS=bias is not None,
        BLOCK_M=block, BLOCK_N=64, BLOCK_K=64, num_warps=4, num_stages=4,
    )  # fmt: skip

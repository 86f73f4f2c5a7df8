"""Host side of the top-k sum: the op ``topk_sum``, and the last launch of ``fused_moe``. Imports triton."""

# Triton's launcher takes plain values for constexpr parameters, and options that no kernel declares.
# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .topk_sum_kernels import topk_sum_kernel, topk_sum_local_kernel

SUM_ROWS, SUM_SLOTS = 512, 16  # rows from which the sum looks for local slots first; ids that it looks at together
_HOST_PROGRAMS = 4  # stands for the number of SMs where the kernels run in Triton's interpreter


def device_of(tensor: Tensor) -> tuple[str, int]:
    """Name and number of SMs."""
    if tensor.device.type != "cuda":
        return "interpreter", _HOST_PROGRAMS
    # any runtime call makes the device's context current, which a new thread lacks and descriptors need
    torch.cuda.is_current_stream_capturing()
    properties = torch.cuda.get_device_properties(tensor.device)
    return properties.name, properties.multi_processor_count


def sum_pairs(
    pairs: Tensor, ids: Tensor, weights: Tensor, valid_tokens: Tensor, out: Tensor, expert_start: int, experts: int,
    link: dict[str, Any], many: bool | None = None, lone: bool = False,
) -> None:  # fmt: skip
    """``out (M, H)``: each live row's K ``pairs (M * K, H)`` of local experts times their weights, summed.

    ``many``: the form that reads no remote slot's pair, by default from ``SUM_ROWS`` rows up. Equal bits.
    ``lone``: rows with one local slot are there already, see ``fused_moe_lone_kernels``.
    """
    (rows, width), top_k = out.shape, ids.shape[1]
    many = rows >= SUM_ROWS if many is None else many
    block = 512 if many else 1024 if width >= 1024 else 256
    tiles = triton.cdiv(width, block)
    grid = min(rows, max((32 if many else 16) * device_of(out)[1] // tiles, 1)), tiles
    arguments = pairs, ids, weights, valid_tokens, out, out.stride(0), rows, width, expert_start, experts
    if many:  # one warp a program: nothing but the loop's own loads to wait for, and 32 programs fit into an SM
        slots = min(triton.next_power_of_2(top_k), SUM_SLOTS)
        options = {"TOP_K": top_k, "BLOCK_H": block, "SLOTS": slots, "LONE": lone, "num_warps": 1}
        topk_sum_local_kernel[grid](*arguments, **options, **link)
    else:
        topk_sum_kernel[grid](*arguments, TOP_K=top_k, BLOCK_H=block, num_warps=4, **link)

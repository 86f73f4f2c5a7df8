"""Host side of decode attention: how the columns are split into spans, and the launches. Imports triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from moe_ops.pdl import chain_link, chain_start

from .attention_kernels import _attend_kernel, _merge_kernel

# Chosen by a sweep on one H200 with 32 query heads, 4 key heads, 128 deep, at 1, 16 and 64 sequences.
SHORT = 512  # caches up to this length are not split: the second launch would cost more
BLOCK, SHORT_BLOCK = 64, 32  # columns a loop turn
STAGES, SHORT_STAGES = 3, 4  # loop turns in flight
MIN_SPAN, MAX_SPAN = 128, 4096  # a span reads its mask at once, so it has an upper bound
PROGRAMS_PER_SM = 2  # enough loads in flight; more only makes more to merge
MIN_ROWS = 16  # rows of a tensor core product; query heads of one key head are padded to it
_HOST_SMS = 4  # in Triton's interpreter


def span_of(length: int, pairs: int, sms: int) -> int:
    """Columns a program takes, a power of two, for ``pairs`` = B * key heads: all of them once the GPU is full."""
    if length <= SHORT:
        return max(MIN_SPAN, triton.next_power_of_2(length))
    wanted = max(1, PROGRAMS_PER_SM * sms // pairs)
    span = triton.next_power_of_2(triton.cdiv(length, wanted))
    return max(MIN_SPAN, min(span, MAX_SPAN))


def launch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, span: int | None = None) -> Tensor:
    """The kernels; arguments as in ``attention.reference``, ``span`` for tests."""
    batch, heads, depth = query.shape
    kv_heads, length, depth_v = key.shape[1], key.shape[2], value.shape[3]
    sms = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else _HOST_SMS
    span = span or span_of(length, batch * kv_heads, sms)
    spans = triton.cdiv(length, span)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    out = query.new_empty(batch, heads, depth_v)
    parts = query.new_empty(batch, heads, spans, depth_v, dtype=torch.float32) if spans > 1 else out
    stats = query.new_empty(batch, heads, spans, dtype=torch.float32) if spans > 1 else out
    two = spans > 1
    _attend_kernel[(batch * kv_heads, spans)](
        query, key, value, mask.view(torch.uint8), parts, stats, mask.stride(0), scale, kv_heads, length,
        GROUP=heads // kv_heads, ROWS=max(MIN_ROWS, triton.next_power_of_2(heads // kv_heads)),
        DEPTH=depth, DEPTH_V=depth_v,
        DEPTH_PAD=triton.next_power_of_2(depth), DEPTH_V_PAD=triton.next_power_of_2(depth_v),
        BLOCK=SHORT_BLOCK if length <= SHORT else BLOCK, SPAN=span, SPANS=spans,
        num_warps=4, num_stages=SHORT_STAGES if length <= SHORT else STAGES,  # pyright: ignore[reportCallIssue]
        **chain_start(two, query.device),
    )  # fmt: skip
    if two:
        _merge_kernel[(batch * heads,)](
            parts, stats, out,
            DEPTH_V=depth_v, DEPTH_V_PAD=triton.next_power_of_2(depth_v),
            SPANS=spans, SPANS_PAD=triton.next_power_of_2(spans),
            num_warps=4, **chain_link(True, query.device),  # pyright: ignore[reportCallIssue]
        )  # fmt: skip
    return out

"""Host side of decode attention: how the columns are split into spans, and the launches. Imports triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
from torch import Tensor

from moe_ops.errors import ShapeError
from moe_ops.pdl import chain_link, chain_start

from .attention_kernels import _attend_kernel, _merge_kernel
from .rotated_attention_kernels import _rotate_and_attend_kernel

if TYPE_CHECKING:
    from .rotated_attention import NewToken

# Chosen by a sweep on one H200 with 32 query heads, 4 key heads, 128 deep, at 1, 16 and 64 sequences.
SHORT = 512  # caches up to this length are not split: the second launch would cost more
BLOCK, SHORT_BLOCK = 64, 32  # columns a loop turn
STAGES, SHORT_STAGES = 3, 4  # loop turns in flight
# With a new token and a short cache. Cache 320, 160 filled: 7.8, 9.1 and 14.2 us at 8, 16 and 64 sequences; turns of 32
# columns take 9.1, 10.2 and 13.5 us.
JOINED = {"BLOCK": 64, "num_warps": 8, "num_stages": 3}
MIN_SPAN, MAX_SPAN = 128, 4096  # a span reads its mask at once, so it has an upper bound
PROGRAMS_PER_SM = 2  # enough loads in flight; more only makes more to merge
MIN_ROWS = 16  # rows of a tensor core product; query heads of one key head are padded to it
MIN_DEPTH = 16  # what one adds up, and the least that Triton takes
_HOST_SMS = 4  # in Triton's interpreter


def _padded(depth: int) -> int:
    return max(MIN_DEPTH, triton.next_power_of_2(depth))


def span_of(length: int, pairs: int, sms: int) -> int:
    """Columns a program takes, a power of two, for ``pairs`` = B * key heads: all of them once the GPU is full."""
    if length <= SHORT:
        return max(MIN_SPAN, triton.next_power_of_2(length))
    wanted = max(1, PROGRAMS_PER_SM * sms // pairs)
    span = triton.next_power_of_2(triton.cdiv(length, wanted))
    return max(MIN_SPAN, min(span, MAX_SPAN))


class Split(NamedTuple):
    """How the columns of a cache are split, and where the spans leave what they found."""

    span: int
    spans: int
    out: Tensor  # (B, heads, D_v)
    parts: Tensor  # (B, heads, spans, D_v) fp32; ``out`` itself if there is one span
    stats: Tensor  # (B, heads, spans) fp32; likewise

    def merge(self) -> Tensor:
        """``out`` from its parts."""
        if self.spans > 1:
            depth_v = self.out.shape[2]
            _merge_kernel[(self.out.shape[0] * self.out.shape[1],)](
                self.parts, self.stats, self.out,
                DEPTH_V=depth_v, DEPTH_V_PAD=_padded(depth_v),
                SPANS=self.spans, SPANS_PAD=triton.next_power_of_2(self.spans),
                num_warps=4, **chain_link(True, self.out.device),  # pyright: ignore[reportCallIssue]
            )  # fmt: skip
        return self.out


def split(query: Tensor, keys: Tensor, values: Tensor, span: int | None) -> Split:
    """Allocate; ``span``: None for what suits the sizes."""
    batch, heads, _ = query.shape
    kv_heads, length, depth_v = values.shape[1:]
    sms = torch.cuda.get_device_properties(query.device).multi_processor_count if query.is_cuda else _HOST_SMS
    span = span or span_of(length, batch * kv_heads, sms)
    spans = triton.cdiv(length, span)
    out = query.new_empty(batch, heads, depth_v)
    if spans == 1:
        return Split(span, spans, out, out, out)
    parts = query.new_empty(batch, heads, spans, depth_v, dtype=torch.float32)
    return Split(span, spans, out, parts, query.new_empty(batch, heads, spans, dtype=torch.float32))


def sizes(query: Tensor, keys: Tensor, values: Tensor, found: Split) -> dict[str, Any]:
    """Constants and launch options that both kernels of a span share."""
    heads, depth = query.shape[1:]
    kv_heads, length, depth_v = values.shape[1:]
    short, group = length <= SHORT, heads // kv_heads
    return {
        "GROUP": group, "ROWS": max(MIN_ROWS, triton.next_power_of_2(group)), "DEPTH": depth, "DEPTH_V": depth_v,
        "DEPTH_PAD": _padded(depth), "DEPTH_V_PAD": _padded(depth_v),
        "BLOCK": SHORT_BLOCK if short else BLOCK, "SPAN": found.span, "SPANS": found.spans,
        "num_warps": 4, "num_stages": SHORT_STAGES if short else STAGES,
    }  # fmt: skip


def launch(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, span: int | None = None) -> Tensor:
    """The kernels; arguments as in ``attention.reference``, ``span`` for tests."""
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    found = split(query, key, value, span)
    batch, kv_heads, length, _ = key.shape
    _attend_kernel[(batch * kv_heads, found.spans)](
        query, key, value, mask.view(torch.uint8), found.parts, found.stats, mask.stride(0), scale, kv_heads, length,
        **sizes(query, key, value, found), **chain_start(found.spans > 1, query.device),
    )  # fmt: skip
    return found.merge()


def launch_with_new_token(token: NewToken, span: int | None = None, **chosen: int) -> Tensor:
    """``rotate_and_attend``; ``span`` and ``chosen`` tile sizes for tests and sweeps.

    The cache is written, so it is used as it lies: contiguous, as ``SlotLayer`` allocates it.
    """
    query, keys, values, mask = token.query.contiguous(), token.keys, token.values, token.mask[:, 0, 0]
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ShapeError(f"rotate_and_attend: keys {keys.stride()} or values {values.stride()} are not contiguous.")
    found = split(query, keys, values, span)
    batch, kv_heads, length, _ = keys.shape
    norms = (token.query_norm, token.key_norm)
    tuned = JOINED if length <= SHORT else {}
    constants: dict[str, Any] = {
        "TURNED": token.cos.shape[1], "NORMS": tuple(norm is not None for norm in norms),
        **sizes(query, keys, values, found), **tuned, **chain_start(found.spans > 1, query.device), **chosen,
    }  # fmt: skip
    _rotate_and_attend_kernel[(batch * kv_heads, found.spans)](
        (query, token.key.contiguous(), token.value.contiguous()),
        tuple(query if norm is None else norm.contiguous() for norm in norms), token.query_eps, token.key_eps,
        (token.cos.contiguous(), token.sin.contiguous()), (keys, values), token.columns, mask.view(torch.uint8),
        found.parts, found.stats, mask.stride(0), token.scale, kv_heads, length,
        **constants,
    )  # fmt: skip
    return found.merge()

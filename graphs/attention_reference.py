"""Decode attention in plain torch: what both of its ops mean, and the checks that they share."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_ops.shapes import check_rank, check_same_device


def check_attention(op: str, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> None:
    """Shapes of one token's query, of a cache and of a mask of its columns."""
    check_rank(op, "query", query, 3, "(B, heads, D)")
    check_rank(op, "key", key, 4, "(B, key heads, L, D)")
    check_rank(op, "value", value, 4, "(B, key heads, L, D_v)")
    check_rank(op, "mask", mask, 4, "(B, 1, 1, L)")
    check_same_device(op, query=query, key=key, value=value, mask=mask)
    batch, kv_heads, length, depth = key.shape
    torch._check(query.shape[0] == batch and query.shape[2] == depth, lambda: f"{op}: query {tuple(query.shape)}")
    torch._check(value.shape[:3] == key.shape[:3], lambda: f"{op}: value {tuple(value.shape)}")
    torch._check(tuple(mask.shape) == (batch, 1, 1, length), lambda: f"{op}: mask {tuple(mask.shape)}")
    torch._check(query.shape[1] % kv_heads == 0, lambda: f"{op}: {query.shape[1]} heads over {kv_heads} key heads")


def reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention of one token a sequence, in fp32: (B, heads, D_v).

    ``query (B, heads, D)``, ``key (B, key heads, L, D)``, ``value (B, key heads, L, D_v)`` of one dtype;
    ``mask (B, L)`` bool, the columns to attend to, any pattern; rows without one become 0.
    """
    batch, heads, _ = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(batch, kv_heads, heads // kv_heads, -1).float()
    scores = (grouped @ key.float().transpose(2, 3) * scale).masked_fill(~mask[:, None, None], float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)  # [B, key heads, heads / key heads, L]
    live = value.float().masked_fill(~mask[:, None, :, None], 0.0)  # what was never written may be NaN
    return (weights @ live).view(batch, heads, -1).to(query.dtype)

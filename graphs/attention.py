"""The attention implementation ``"moe_ep"``: what a decode step runs instead of ``sdpa`` against a static cache.

transformers' ``sdpa`` is given a mask at every decode step, so it copies keys and values once for each query head and
reads the whole cache. Here one op reads the cache as it lies, and of it only the columns that the mask leaves.
Everything else (prompts, other dtypes) goes to ``sdpa`` as before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_ops.registration import register_op
from moe_ops.shapes import HALF_DTYPES, check_rank, check_same_device

from . import hf_compat
from .hf_compat import Model

NAME = "moe_ep"
_OP = "decode_attention"


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


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    check_attention(_OP, query, key, value, mask)
    return query.new_empty(*query.shape[:2], value.shape[3])


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


def _cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    check_attention(_OP, query, key, value, mask)
    return reference(query, key, value, mask[:, 0, 0], scale)


def _cuda(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    from .attention_launch import launch

    check_attention(_OP, query, key, value, mask)
    return launch(query, key, value, mask[:, 0, 0], scale)


decode_attention = register_op(
    "decode_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float scale) -> Tensor",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query (B, heads, S, D), cache (B, key heads, L, D) -> (B, S, heads, D_v)."""
    if attention_mask is None or not _takes(query, key, attention_mask, kwargs):
        return hf_compat.sdpa_attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # the mask as it is: a view of it in every layer would be a launch in every layer
    return torch.ops.moe_ep.decode_attention(query[:, :, 0], key, value, attention_mask, scale)[:, None], None


def _takes(query: Tensor, key: Tensor, mask: Tensor, kwargs: dict) -> bool:
    """One token a sequence, a mask of columns, and nothing else that ``sdpa`` would heed."""
    plain = kwargs.get("position_bias") is None and not kwargs.get("dropout")
    half = query.dtype in HALF_DTYPES or not query.is_cuda
    shared = mask.dtype == torch.bool and mask.shape[:2] == (query.shape[0], 1)
    return plain and half and shared and query.shape[2] == 1 and mask.shape[3] == key.shape[2]


def use_decode_attention(model: Model) -> bool:
    """Let ``model`` run ``"moe_ep"`` where it runs ``sdpa``; says whether it does now. Others stay as they are."""
    hf_compat.register_attention(NAME, attention_forward)
    if hf_compat.runs_plain_sdpa(model):
        model.set_attn_implementation(NAME)
    return hf_compat.attention_name(model) == NAME

"""The attention implementation ``"moe_ep"``: what a decode step runs instead of ``sdpa`` against a static cache.

transformers' ``sdpa`` is given a mask at every decode step, so it copies keys and values once for each query head and
reads the whole cache. Here one op reads the cache as it lies, and of it only the columns that the mask leaves.
Everything else (prompts, other dtypes) goes to ``sdpa`` as before.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_ops.registration import register_op
from moe_ops.shapes import HALF_DTYPES

from . import hf_compat
from . import rotated_attention as _rotated_attention  # noqa: F401  registers what lowering puts in this op's place
from .attention_reference import check_attention, reference
from .hf_compat import Model

NAME = "moe_ep"
_OP = "decode_attention"


def _fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    check_attention(_OP, query, key, value, mask)
    return query.new_empty(*query.shape[:2], value.shape[3])


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

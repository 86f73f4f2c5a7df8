"""Small random MoE checkpoints on disk, in the layout that each family's real checkpoints have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .errors import UnsupportedModelError

SEED = 0
COMMON: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.12,  # at the default 0.02 all logits are nearly equal, and any error would go unnoticed
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {
            "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "head_dim": 32,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96}),
    "olmoe": ("OlmoeConfig", {"num_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96}),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "intermediate_size": 192,
            "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3,
            "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 32,
            "num_key_value_heads": 4,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {
            "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 96, "head_dim": 32,
            "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 131072,
        },
    ),
}  # fmt: skip


def tiny_config(family: str = "qwen3_moe", **overrides: Any) -> Any:
    """Configuration of a small model of ``family``; ``overrides`` replace single values."""
    import transformers

    if family not in FAMILIES:
        raise UnsupportedModelError(f"no random checkpoint for family {family!r}; pass one of {sorted(FAMILIES)}.")
    class_name, values = FAMILIES[family]
    return getattr(transformers, class_name)(**{**COMMON, **values, **overrides})


def tiny_model(family: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """A small model of ``family`` with the same random weights at every call."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = AutoModelForCausalLM.from_config(tiny_config(family, **overrides))
    return model.to(dtype).eval()


def make_checkpoint(
    folder: Path, family: str = "qwen3_moe", dtype: torch.dtype = torch.float32, **overrides: Any
) -> Path:
    """Write a small random checkpoint of ``family`` into ``folder`` and return it."""
    tiny_model(family, dtype, **overrides).save_pretrained(folder)
    return folder

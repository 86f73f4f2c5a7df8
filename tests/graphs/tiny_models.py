"""A tiny random model for every class of transformers' experts interface, found in the installed version.

A new class appears here by itself; sizes are set by the names that configurations share (``SIZES``), and only what a
family needs besides is listed (``EXTRA``).
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "head_dim": 8, "intermediate_size": 32, "moe_intermediate_size": 16,
    "expert_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2,
    "top_k_experts": 2, "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "num_expert_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "qk_head_dim": 16, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": None, "initializer_range": 0.12, "first_k_dense_replace": 1, "num_dense_layers": 0,
    "sliding_window": 8, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 4, "num_nextn_predict_layers": 0,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_num_heads": 4, "mamba_head_dim": 8,
    "ssm_state_size": 8, "linear_num_heads": 2, "linear_head_dim": 16,
}  # fmt: skip
DENSE_THEN_MOE = ["dense", "sparse"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
HYBRID = {"layer_types": ["linear_attention", "full_attention"]}
EXTRA: dict[str, dict[str, Any]] = {
    "BailingHybridExperts": HYBRID | {"mlp_layer_types": DENSE_THEN_MOE},
    "BeamExperts": {"mlp_layer_types": DENSE_THEN_MOE},
    "Cohere2MoeExperts": {"logit_scale": 1.0},
    "DeepseekOcr2TextExperts": {"mlp_layer_types": DENSE_THEN_MOE},
    "DeepseekV4Experts": {"hc_mult": 2},
    "DiffusionGemmaTextExperts": {
        "global_head_dim": 8, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": VOCABULARY
    },
    "Ernie4_5_VLMoeMoeExperts": {
        "moe_intermediate_size": [16, 8], "rope_parameters": ROPE | {"mrope_section": [1, 1, 2]}
    },
    "FlintExperts": {"mlp_only_layers": []},
    "Gemma4TextExperts": {
        "enable_moe_block": True, "global_head_dim": 8, "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCABULARY,
    },
    "Glm4vMoeTextExperts": {
        "head_dim": 16, "rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    },
    "Glm5NextTextExperts": {
        "index_kpool": 2, "qk_rope_head_dim": 0, "mlp_layer_types": DENSE_THEN_MOE,
        **HYBRID,
    },
    "GraniteMoeHybridExperts": HYBRID,
    "InklingExperts": {"logits_mup_width_multiplier": 1.0},
    "JambaExperts": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "expert_layer_period": 1,
                     "expert_layer_offset": 0},
    "KimiLinearExperts": HYBRID | {"mlp_layer_types": DENSE_THEN_MOE},
    "Lfm2MoeExperts": {"layer_types": ["conv", "full_attention"]},
    "MiMoV2FlashExperts": {"head_dim": 24, "num_key_value_heads": 2},
    "Mistral4Experts": {
        "rope_parameters": ROPE | {
            "partial_rotary_factor": 1.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64
        }
    },
    "MuseSparkExperts": {"moe_hidden_size": 16, "moe_intermediate_size": 24},
    "NemotronHExperts": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"], "n_groups": 2,
        "moe_shared_expert_intermediate_size": 16, "moe_latent_size": 16,
    },
    "Qwen3NextExperts": HYBRID,
    "Qwen3_5MoeExperts": HYBRID,
    "Qwen4ExpTextExperts": HYBRID | {
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "ZayaExperts": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
MODEL = {"Qwen3OmniMoeTalkerTextExperts": "Qwen3OmniMoeTalkerModel"}  # where the first text model is another one
KEEPS_FP32 = {"Inkling2Experts"}  # what the family names runs in fp32 whatever the model's dtype, and needs to
AFTER_BUILD = {"Qwen3OmniMoeTalkerTextExperts": {"shared_expert_intermediate_size": 16}}  # 5.17 forgets to declare it


class ExpertsClass(NamedTuple):
    """A class of the experts interface and the package of transformers that defines it."""

    name: str
    package: str

    @property
    def module(self) -> Any:
        return importlib.import_module(f"transformers.models.{self.package}.modeling_{self.package}")


@cache
def experts_classes() -> dict[str, ExpertsClass]:
    """All classes of the installed transformers with the interface's decorator, by name."""
    folder = Path(inspect.getfile(transformers)).parent / "models"
    pattern = re.compile(r"^@use_experts_implementation(?:\(.*?\))?\nclass (\w+)", re.MULTILINE | re.DOTALL)
    found = [
        ExpertsClass(name, file.parent.name)
        for file in sorted(folder.glob("*/modeling_*.py"))
        for name in pattern.findall(file.read_text())
    ]
    return {entry.name: entry for entry in found}


def model_class(entry: ExpertsClass) -> type[PreTrainedModel]:
    """The causal language model of the package, else its text model."""
    members = {
        n: c for n, c in vars(entry.module).items() if inspect.isclass(c) and c.__module__ == entry.module.__name__
    }
    models = [n for n, c in members.items() if issubclass(c, PreTrainedModel) and "PreTrained" not in n]
    wanted = [
        MODEL.get(entry.name, ""),
        *(n for end in ("ForCausalLM", "TextModel", "Model") for n in models if n.endswith(end)),
    ]
    return members[next(n for n in wanted if n in members)]


def tiny_config(entry: ExpertsClass, **overrides: Any) -> Any:
    cls = model_class(entry).config_class
    names, alias = set(cls().to_dict()) | set(inspect.signature(cls.__init__).parameters), cls.attribute_map
    sizes = {n: v for n, v in SIZES.items() if (n in names or n in alias) and alias.get(n) not in SIZES}
    config = cls(**sizes | EXTRA.get(entry.name, {}) | overrides)
    for name, value in AFTER_BUILD.get(entry.name, {}).items():
        setattr(config, name, value)
    return config


def build(entry: ExpertsClass, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """The model with the same random weights at every call; its experts large enough that an error in them shows."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(entry)(tiny_config(entry, **overrides))
        for module in own_experts(model, entry):
            for parameter in module.parameters(recurse=False):
                parameter.normal_(std=0.3)
    model = model.to(dtype)
    kept = model._keep_in_fp32_modules_strict if entry.name in KEEPS_FP32 else ()
    for name, parameter in model.named_parameters():
        if any(part in name for part in kept):
            parameter.data = parameter.data.float()
    return model.eval()


def own_experts(model: Any, entry: ExpertsClass) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == entry.name]


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def answer(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """Logits (last hidden states of a model without a head) for every position of ``ids``."""
    plain = getattr(model, "_orig_mod", model)
    if type(plain).__name__ == "Qwen3OmniMoeTalkerModel":  # takes no token numbers
        out = model(inputs_embeds=plain.get_input_embeddings()(ids), **kwargs)
    else:
        out = model(input_ids=ids, **kwargs)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state

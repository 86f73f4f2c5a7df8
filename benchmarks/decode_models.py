"""One decode step of a Hugging Face MoE model, whole in one graph, with the experts it is asked to use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from graphs import hf_compat

Model = Any


@dataclass(frozen=True)
class Sizes:
    """True dimensions of one model, but for its number of layers."""

    hidden: int
    experts: int
    top_k: int
    inner: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


MODELS = {
    "qwen3-30b-a3b": Sizes(2048, 128, 8, 768, 32, 4, 128, 151936),
    "tiny": Sizes(64, 8, 2, 32, 4, 2, 32, 512),
}


def config_of(name: str, layers: int, max_len: int) -> Qwen3MoeConfig:
    """transformers' configuration of ``MODELS[name]`` with ``layers`` layers."""
    s = MODELS[name]
    return Qwen3MoeConfig(
        vocab_size=s.vocabulary, hidden_size=s.hidden, num_hidden_layers=layers, num_experts=s.experts,
        num_experts_per_tok=s.top_k, moe_intermediate_size=s.inner, num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads, head_dim=s.head_dim, norm_topk_prob=True, max_position_embeddings=max_len,
        decoder_sparse_step=1, tie_word_embeddings=False, initializer_range=0.02,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip


def build(config: Qwen3MoeConfig, device: torch.device, seed: int = 0) -> Model:
    """Random bf16 weights made on the device itself; equal for equal seeds."""
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def shard_as_transformers_does(model: Model) -> Model:
    """transformers' own expert parallelism over all ranks: what ``from_pretrained`` does with this configuration.

    Every rank must be given the same batch: dense parts run on all of it, experts on their share, then all-reduce.
    """
    from transformers.distributed import DistributedConfig

    wanted = DistributedConfig(tp_size=dist.get_world_size(), enable_expert_parallel=True)
    wanted, _, mesh = model.prepare_distribute_model(wanted)
    model.config.distributed_config = wanted  # chooses the expert plan
    return model.maybe_distribute_model(model, wanted, mesh)


class Step(nn.Module):
    """Feed the last token of each of B sequences, choose the next greedily: tokens (B, 1) int64, logits (B, V)."""

    tokens: Tensor
    logits: Tensor

    def __init__(self, model: Model, batch: int, max_len: int, seed: int = 0):
        super().__init__()
        self.model, self.cache = model, hf_compat.full_length_cache(model.config, max_len)
        config, device = model.config, model.device
        generator = torch.Generator(device).manual_seed(1000 + seed)
        tokens = torch.randint(config.vocab_size, (batch, 1), generator=generator, device=device)
        self.register_buffer("tokens", tokens, persistent=False)
        logits = torch.zeros(batch, config.vocab_size, dtype=model.dtype, device=device)
        self.register_buffer("logits", logits, persistent=False)
        self._start = tokens.clone()
        self.cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, device)
        for layer in self.cache.layers:
            layer.keys.normal_(generator=generator)
            layer.values.normal_(generator=generator)

    def fill(self, length: int) -> None:
        """Start over behind ``length`` random tokens."""
        self.tokens.copy_(self._start)
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)

    def forward(self) -> None:
        out = self.model(input_ids=self.tokens, past_key_values=self.cache, use_cache=True)
        self.logits.copy_(out.logits[:, -1])
        self.tokens.copy_(self.logits.argmax(-1, keepdim=True))

"""One decode step of a Hugging Face MoE model, whole in one graph, with the experts it is asked to use."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, StaticCache

import graphs
from graphs.sampling import Choice, Sampler, greedy
from graphs.step import NO_TOKEN, DecodeStep

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


class Recorder(nn.Module):
    """A choice of tokens that also keeps the logits (B, V), in both variants."""

    logits: Tensor

    def __init__(self, model: Model, batch: int, sampler: Sampler | None = None):
        super().__init__()
        self.sampler = sampler
        logits = torch.zeros(batch, model.config.vocab_size, dtype=model.dtype, device=model.device)
        self.register_buffer("logits", logits, persistent=False)

    def forward(self, logits: Tensor, choice: Choice | None = None) -> Tensor:
        self.logits.copy_(logits)
        return self.sampler(logits, choice) if self.sampler and choice else logits.argmax(-1)


class TheirStep(nn.Module):
    """A step as one writes it with transformers alone: a static cache, all sequences equally long.

    Feeds the last token of each of B sequences and makes the likeliest next one its last: tokens (B,) int64.
    """

    tokens: Tensor

    def __init__(self, model: Model, batch: int, max_len: int):
        super().__init__()
        self.model, self.cache, self.sampler = model, StaticCache(model.config, max_len), Recorder(model, batch)
        config, device = model.config, model.device
        self.register_buffer("tokens", torch.zeros(batch, dtype=torch.int64, device=device), persistent=False)
        self.cache.early_initialization(batch, config.num_key_value_heads, config.head_dim, model.dtype, device)

    def forward(self) -> None:
        out = self.model(input_ids=self.tokens[:, None], past_key_values=self.cache, use_cache=True)
        self.tokens.copy_(self.sampler(out.logits[:, -1]))

    def fill(self, length: int) -> None:
        """All sequences hold ``length`` tokens from now on."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(length)


class OurStep(DecodeStep):
    """The step that ``graphs.DecodeLoop`` compiles, all slots busy."""

    def __init__(self, model: Model, batch: int, max_len: int):
        state = graphs.expert_parallel_state(model)
        assert state is not None
        super().__init__(model, state, batch, max_len, Recorder(model, batch, greedy))
        state.declare_batch(batch, batch, self.active)
        self.feed()  # allocates the cache

    def fill(self, length: int) -> None:
        """All slots hold ``length`` tokens from now on, and may go on to the end."""
        self.active.fill_(True)
        self.rows.starts.fill_(length)
        self.last.fill_(self.history.shape[1] - 1)
        self.stop.fill_(NO_TOKEN)


def set_content(step: TheirStep | OurStep, first_sequence: int) -> Tensor:
    """Random keys and values for sequences ``first_sequence`` onwards; returns their last tokens (B,).

    Sequences are numbered over all ranks, so one is the same whoever holds it.
    """
    batch, device = step.tokens.shape[0], step.tokens.device
    tokens = torch.zeros_like(step.tokens)
    for row in range(batch):
        generator = torch.Generator(device).manual_seed(1000 + first_sequence + row)
        tokens[row] = torch.randint(step.model.config.vocab_size, (), generator=generator, device=device)
        for layer in step.cache.layers:
            layer.keys[row].normal_(generator=generator)
            layer.values[row].normal_(generator=generator)
    return tokens

"""Models and random requests of the serving tests: ``test_serve``, ``rank_jobs``, ``soak``, ``gpu_serve``."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch

import graphs
from graphs.checkpoints import COMMON, FAMILIES, tiny_model

LONGEST = 64  # prompt and answer
GLM4 = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96, "intermediate_size": 192,
    "head_dim": 32, "first_k_dense_replace": 1, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "num_hidden_layers": 3,
}  # fmt: skip
SERVED = ("qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "glm4_moe")


def served_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model of one of ``SERVED``, the same weights at every call, experts not yet sharded."""
    if family in FAMILIES:
        return tiny_model(family, dtype)
    from transformers import AutoModelForCausalLM, Glm4MoeConfig

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(Glm4MoeConfig(**{**COMMON, **GLM4})).to(dtype).eval()


def random_request(rng: random.Random, vocabulary: int = 512) -> graphs.Request:
    """Any prompt, any parameters: half of them greedy, some with stop tokens that are likely to come."""
    prompt = [rng.randrange(1, vocabulary) for _ in range(rng.choice((1, 2, 5, 17, 33, 40)))]
    sampled = rng.random() < 0.5
    return graphs.Request(
        prompt,
        max_new_tokens=rng.randrange(1, LONGEST - len(prompt) + 1),
        temperature=rng.choice((0.5, 1.0, 3.0)) if sampled else 0.0,
        top_k=rng.choice((0, 1, 20)),
        top_p=rng.choice((1.0, 0.9, 0.3)),
        seed=rng.randrange(-(2**63), 2**63),
        stop_ids=tuple(rng.randrange(vocabulary) for _ in range(rng.choice((0, 0, 8)))),
    )


def arrivals(rng: random.Random, count: int, pause: float = 0.3) -> Iterator[graphs.Request | None]:
    """``count`` random requests; with probability ``pause`` the loop finds none and must go on without."""
    while count:
        if rng.random() < pause:
            yield None
        else:
            count -= 1
            yield random_request(rng)

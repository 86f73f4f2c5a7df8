"""Decode attention: the op against transformers, whole models with it, and where its kernels are checked."""

from __future__ import annotations

import math

import pytest
import torch

from graphs.attention import NAME, reference, use_decode_attention
from graphs.checkpoints import tiny_model
from graphs.hf_compat import attention_name
from tests.graphs.model_cases import GraphKeeper, prompts_of
from tests.graphs.static_cache import full_length_cache
from tests.moe_ops.interpreted import run_checks

CHECKS = "../graphs/attention_kernel_checks.py"
SDPA_FAMILIES = ("qwen3_moe", "mixtral", "olmoe", "deepseek_v3")


def test_kernels_in_the_interpreter():
    run_checks(CHECKS, interpret=True)


@pytest.mark.gpu("1 H200: the compiled kernels, bf16")
def test_kernels_on_the_gpu():
    run_checks(CHECKS, interpret=False)


def test_literal():
    """Two columns of three are seen; equal scores, so their mean; the third is NaN and must not matter."""
    query, key = torch.zeros(1, 2, 4), torch.zeros(1, 1, 3, 4)
    value = torch.tensor([[1.0, 3.0], [5.0, 7.0], [math.nan, math.nan]]).view(1, 1, 3, 2)
    mask = torch.tensor([[True, True, False]]).view(1, 1, 1, 3)
    got = torch.ops.moe_ep.decode_attention(query, key, value, mask, 1.0)
    assert torch.equal(got, torch.tensor([[[3.0, 5.0], [3.0, 5.0]]]))


def test_reference_equals_sdpa():
    query, key, value = torch.randn(3, 8, 16), torch.randn(3, 2, 40, 16), torch.randn(3, 2, 40, 16)
    mask = torch.rand(3, 40) < 0.5
    wanted = torch.nn.functional.scaled_dot_product_attention(
        query[:, :, None], key, value, attn_mask=mask[:, None, None], enable_gqa=True, scale=0.3
    )
    torch.testing.assert_close(reference(query, key, value, mask, 0.3), wanted[:, :, 0], atol=1e-6, rtol=1e-5)


def test_opcheck():
    args = (torch.randn(2, 4, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 4), torch.ones(2, 1, 1, 6).bool(), 0.5)
    torch.library.opcheck(torch.ops.moe_ep.decode_attention.default, args)


@pytest.mark.parametrize(
    ("at", "shape"),
    [(0, (2, 3, 8)), (1, (2, 2, 6, 4)), (2, (2, 2, 5, 4)), (3, (1, 1, 1, 6))],
    ids=["q", "k", "v", "mask"],
)
def test_wrong_shapes_are_refused(at: int, shape: tuple[int, ...]):
    args = [torch.randn(2, 4, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 4), torch.ones(2, 1, 1, 6).bool(), 0.5]
    args[at] = torch.ones(shape, dtype=args[at].dtype)
    with pytest.raises(RuntimeError, match="decode_attention"):
        torch.ops.moe_ep.decode_attention(*args)


@torch.no_grad()
def decode_logits(model, prompts: list[list[int]], steps: int, step=None) -> list[torch.Tensor]:
    """Logits of ``steps`` decode steps behind a left-padded prompt, always fed the same tokens."""
    width, length = max(map(len, prompts)), 40
    mask = torch.ones(len(prompts), length, dtype=torch.int64)
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        mask[row, : width - len(prompt)] = 0
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache = full_length_cache(model.config, length)
    found = []
    for index in range(steps + 1):
        columns = slice(0, width) if index == 0 else slice(width + index - 1, width + index)
        fed = ids if index == 0 else torch.full((len(prompts), 1), 7 + index)
        run = model if step is None or index == 0 else step
        out = run(
            input_ids=fed, attention_mask=mask, position_ids=positions[:, columns], past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        found.append(out.logits[:, -1])
    return found[1:]


@pytest.mark.parametrize("family", SDPA_FAMILIES)
def test_model_decodes_as_with_sdpa(family: str):
    model, prompts = tiny_model(family, torch.float32), prompts_of((3, 7, 5))
    model.set_experts_implementation("moe_ep")
    wanted = decode_logits(model, prompts, 4)
    assert use_decode_attention(model) and attention_name(model) == NAME
    keeper = GraphKeeper()
    torch._dynamo.reset()
    got = decode_logits(model, prompts, 4, torch.compile(model, fullgraph=True, dynamic=False, backend=keeper))
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert keeper.calls("decode_attention") == model.config.num_hidden_layers * len(keeper.graphs)
    assert not keeper.integer_inputs() and not keeper.unbacked()


def test_model_with_its_own_attention_is_left_alone():
    model = tiny_model("gpt_oss", torch.float32)
    before = attention_name(model)
    assert not use_decode_attention(model) and attention_name(model) == before != NAME

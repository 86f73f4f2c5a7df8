"""Comparison with plain Hugging Face: the whole model in one process, its own experts code, no compilation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .hf_compat import Model

# In bf16 and fp16 a token counts as right if the same model in fp32, fed the same tokens, puts it within
# 2 * 1.5 errors of its best logit: "error" is what plain Hugging Face in half precision is off by, measured on
# that very answer, ours may be 1.5 times that (tests/tolerances.py), and a wrong order needs two of them.
HALF_OVER_PLAIN = 1.5


class Comparison(NamedTuple):
    """``identical`` of ``total`` tokens equal the reference; ``mismatch`` names the first that is wrong, if any."""

    identical: int
    total: int
    mismatch: str | None


def load_reference(folder: Path, dtype: torch.dtype, device: torch.device) -> Model:
    """The checkpoint as transformers alone loads and runs it."""
    from transformers import AutoModelForCausalLM

    model: Model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager")
    return model.to(device).eval()


@torch.no_grad()
def reference_tokens(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    """``count`` greedy tokens after ``prompt`` from transformers' ``generate``."""
    ids = torch.tensor([list(prompt)], device=model.device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def compare(model: Model, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> Comparison:
    """Each answer against the reference: equal token by token, in half precision equal but for rounding.

    Where half-precision answers differ, ``model`` is converted to fp32 in place to judge them.
    """
    identical, total, different = 0, 0, []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = reference_tokens(model, prompt, len(answer))
        same = [a == b for a, b in zip(answer, expected, strict=True)]
        identical, total = identical + sum(same), total + len(same)
        if not all(same):
            at = same.index(False)
            text = f"prompt {number}, token {at}: {answer[at]}, the reference chose {expected[at]}"
            different.append((prompt, answer, text))
    return Comparison(identical, total, _first_wrong(model, different))


def _first_wrong(model: Model, different: Sequence[tuple[Sequence[int], Sequence[int], str]]) -> str | None:
    """Of the answers that differ, the first that rounding does not explain."""
    if not different or model.dtype == torch.float32:
        return different[0][2] if different else None
    in_half = [_logits(model, prompt, answer) for prompt, answer, _ in different]
    model.float()
    for (prompt, answer, text), half in zip(different, in_half, strict=True):
        exact = _logits(model, prompt, answer)
        error = (half - exact).abs().max()
        chosen = exact.gather(1, torch.tensor(answer, device=exact.device)[:, None])[:, 0]
        behind = (exact.amax(1) - chosen).max()
        if behind > 2 * HALF_OVER_PLAIN * error:
            return f"{text}; in fp32 a chosen token is {behind:.3g} behind, rounding explains {error:.3g}"
    return None


@torch.no_grad()
def _logits(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> torch.Tensor:
    """What ``model`` thinks before each token of ``answer``: (answer, V) fp32."""
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    return model(ids).logits[0, len(prompt) - 1 : -1].float()

"""Comparison with plain Hugging Face: the whole model in one process, its own experts code, no compilation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .hf_compat import Model

# A token counts as right in bf16 or fp16 if the reference, fed the same tokens, puts it within this many
# roundings of its best logit: both sides round every layer's output, in different orders.
HALF_ROUNDINGS = 4


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
    """Each answer against the reference: equal token by token, in half precision equal but for rounding."""
    identical, total, mismatch = 0, 0, None
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        expected = reference_tokens(model, prompt, len(answer))
        same = [a == b for a, b in zip(answer, expected, strict=True)]
        identical, total = identical + sum(same), total + len(same)
        if not all(same) and mismatch is None and not _equal_but_for_rounding(model, prompt, answer):
            at = same.index(False)
            mismatch = f"prompt {number}, token {at}: {answer[at]}, the reference chose {expected[at]}"
    return Comparison(identical, total, mismatch)


@torch.no_grad()
def _equal_but_for_rounding(model: Model, prompt: Sequence[int], answer: Sequence[int]) -> bool:
    """True if the model is in half precision and each token of ``answer`` is as good as its best, to rounding."""
    if model.dtype == torch.float32:
        return False
    ids = torch.tensor([[*prompt, *answer]], device=model.device)
    logits = model(ids).logits[0, len(prompt) - 1 : -1].float()  # [answer, V]
    chosen = logits.gather(1, torch.tensor(answer, device=model.device)[:, None])[:, 0]
    slack = HALF_ROUNDINGS * torch.finfo(model.dtype).eps * logits.abs().amax(1)
    return bool((chosen >= logits.amax(1) - slack).all())

"""How the next token is chosen, inside the compiled step."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Sampler = Callable[[Tensor], Tensor]


def greedy(logits: Tensor) -> Tensor:
    """The most likely token: logits (B, V) -> (B,) int64; the lowest number where several tie."""
    return logits.argmax(dim=-1)

"""The activations between the two projections of an expert: their names, their limits, their plain-torch form.

``silu``, ``gelu``, ``gelu_tanh``, ``relu2``   ``act(gate) * up``, or ``act(up)`` without a gate
``swiglu_oai``                              ``(up + 1) * gate * sigmoid(alpha * gate)`` (gpt-oss)

``limit`` clamps ``gate`` from above and ``up`` from both sides before ``silu`` and ``swiglu_oai``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError

_POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: torch.square(F.relu(x)),
}
ACTIVATIONS = (*_POINTWISE, "swiglu_oai")
_WITH_LIMIT = ("silu", "swiglu_oai")


def check_activation(
    op: str, activation: str, *, alpha: float | None, limit: float | None, gated: bool, interleaved: bool
) -> None:
    """Raise ``ArgumentError`` for a combination that has no meaning."""
    if activation not in ACTIVATIONS:
        raise ArgumentError(f"{op}: activation={activation!r} is unknown; pass one of {', '.join(ACTIVATIONS)}.")
    if (alpha is not None) != (activation == "swiglu_oai"):
        raise ArgumentError(
            f"{op}: alpha={alpha} with activation={activation!r}; pass alpha with 'swiglu_oai' and only with it."
        )
    if limit is not None and (activation not in _WITH_LIMIT or not gated):
        raise ArgumentError(
            f"{op}: limit={limit} with activation={activation!r}, gated={gated}; "
            f"leave limit out, or use it with a gated {' or '.join(map(repr, _WITH_LIMIT))}."
        )
    if limit is not None and not limit > 0:
        raise ArgumentError(f"{op}: limit={limit}; pass one above 0, or none.")
    if not gated and (activation == "swiglu_oai" or interleaved):
        raise ArgumentError(
            f"{op}: gated=False with activation={activation!r}, interleaved={interleaved}; "
            "both need a gate: pass gated=True."
        )


def apply_activation(
    projected: Tensor, activation: str, *, alpha: float | None, limit: float | None, gated: bool, interleaved: bool
) -> Tensor:
    """``(rows, 2I)`` (``(rows, I)`` without a gate) to ``(rows, I)``, in the dtype given."""
    if not gated:
        return _POINTWISE[activation](projected)
    gate, up = (projected[..., ::2], projected[..., 1::2]) if interleaved else projected.chunk(2, dim=-1)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    if activation == "swiglu_oai":
        assert alpha is not None
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))
    return _POINTWISE[activation](gate) * up

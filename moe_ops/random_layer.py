"""A layer of random weights and routing to measure ``fused_moe`` with, and what its result must be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .moe_reference import fused_moe_reference

if TYPE_CHECKING:
    from .fused_moe_config import Shape
    from .fused_moe_tune import Tuner

MAX_ERROR = 4e-3  # of bf16 against fp64, relative, in the Frobenius norm
_CHECKED_ROWS = 512
_LARGE = 2.0**12


def random_layer(
    shape: Shape, total_experts: int, device: torch.device, seed: int = 0
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """``(hidden, topk_ids, topk_weights)`` of uniform routing over all experts, and bf16 ``(gate_up, down)``.

    Of the random routings the first that touches as many local experts as is to be expected, rounded: at a few tokens
    chance would decide how many weights are read.
    """
    missed = (1 - shape.top_k / total_experts) ** shape.tokens
    expected = round(shape.experts * (1 - missed))
    make = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(size, device=device, generator=make, dtype=torch.bfloat16) * scale

    for _ in range(1000):
        weights, ids = torch.rand(shape.tokens, total_experts, device=device, generator=make).topk(shape.top_k, dim=-1)
        if ids[ids < shape.experts].unique().numel() == expected:
            break
    gate_up = normal(shape.experts, 2 * shape.inner, shape.hidden, scale=shape.hidden**-0.5)
    down = normal(shape.experts, shape.hidden, shape.inner, scale=shape.inner**-0.5)
    return (normal(shape.tokens, shape.hidden), ids, weights / weights.sum(-1, keepdim=True)), (gate_up, down)


def make_order_tell(hidden: Tensor, gate_up: Tensor, down: Tensor) -> None:
    """Change the first and last columns so that another order of additions changes bits: large products that cancel.

    ``hidden (M, H)``, ``gate_up (E_l, 2I, H)`` with gate and up one after the other, ``down (E_l, H, I)``. Every sum in
    between is rounded where the large ones have their last bits; so how it rounds reaches the small result.
    """
    inner = down.shape[2]
    hidden[:, 0], hidden[:, -1] = _LARGE, -_LARGE
    gate_up[..., 0] = gate_up[..., -1] = 1.0
    gate_up[:, inner - 1], gate_up[:, -1] = gate_up[:, 0], gate_up[:, inner]  # the last inner column is the first
    down[..., 0], down[..., -1] = _LARGE, -_LARGE


class Answer:
    """What a ``Tuner``'s call must give: fp64, at most 512 rows of it, all of them live."""

    def __init__(self, layer: Tuner):
        self.rows = torch.randperm(layer.shape.tokens, device=layer.hidden.device)[:_CHECKED_ROWS]
        live = torch.tensor([self.rows.numel()], dtype=torch.int32, device=self.rows.device)
        inputs = layer.hidden[self.rows].double(), layer.ids[self.rows], layer.weights[self.rows].double()
        self.wanted = fused_moe_reference(*inputs, layer.gate_up, layer.down, live, 0, out_dtype=torch.float64)

    def error_of(self, got: Tensor) -> float:
        """Relative error in the Frobenius norm."""
        return float((got[self.rows].double() - self.wanted).norm() / self.wanted.norm())

"""The layers that benchmarks measure: one source with the ops of ``moe_ep``, one as people write it today."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor

ops = torch.ops.moe_ep


@dataclass(frozen=True)
class Shape:
    """Sizes of one model's MoE layer; experts are split evenly over the ranks."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    shared: int  # inner size of the shared expert, 0 without one


SHAPES = {
    "qwen3-30b": Shape(128, 8, 2048, 768, 0),
    "deepseek-v3": Shape(256, 8, 7168, 2048, 2048),
    "qwen2-moe": Shape(60, 4, 2048, 1408, 5632),
    "tiny": Shape(8, 2, 64, 32, 32),
}


@dataclass
class Weights:
    """One layer on one rank: router (H, E), experts (E_l, 2I, H) and (E_l, H, I), shared (H, 2S) and (S, H)."""

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor | None
    shared_down: Tensor | None


def make_weights(shape: Shape, rank: int, world: int, seed: int) -> Weights:
    """Random bf16 weights; router and shared expert are equal on all ranks."""

    def tensor(key: int, *size: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(1000 * seed + key)
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16) * size[-1] ** -0.5

    local = shape.experts // world
    shared = (
        [tensor(1, shape.hidden, 2 * shape.shared), tensor(2, shape.shared, shape.hidden)] if shape.shared else None
    )
    return Weights(
        tensor(0, shape.hidden, shape.experts),
        tensor(10 + 2 * rank, local, 2 * shape.inner, shape.hidden),
        tensor(11 + 2 * rank, local, shape.hidden, shape.inner),
        *(shared or (None, None)),
    )


def route(x: Tensor, weights: Weights, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax router with renormalised weights (T, K), and ids."""
    chosen, ids = (x @ weights.router).float().softmax(-1).topk(top_k, -1)
    return (chosen / chosen.sum(-1, keepdim=True)).to(x.dtype), ids


def shared_alone(x: Tensor, layers: list[Weights]) -> Tensor:
    """Nothing but the shared experts of the layers, one behind the other, residual included."""
    for weights in layers:
        x = add_shared(x, x, weights)
    return x


def add_shared(routed: Tensor, x: Tensor, weights: Weights) -> Tensor:
    """``routed`` plus the shared expert of x, if there is one."""
    if weights.shared_gate_up is None or weights.shared_down is None:
        return routed
    gate, up = (x @ weights.shared_gate_up).chunk(2, -1)
    return routed + (F.silu(gate) * up) @ weights.shared_down


def ours(x: Tensor, layers: list[Weights], count: Tensor, shape: Shape, rank: int, world: int, group: str) -> Tensor:
    """The layers with the ops of ``moe_ep``; every layer asks for its metadata, as models do."""
    start, gathered = rank * (shape.experts // world), world * x.shape[0]
    for weights in layers:
        metadata = ops.metadata_update(count, group)
        chosen, ids = route(x, weights, shape.top_k)
        rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, count, metadata, gathered, group)
        y = ops.fused_moe(rows, ids, chosen, weights.gate_up, weights.down, metadata[0:1], start)
        x = x + add_shared(ops.rsv_combine(y, count, metadata, x.shape[0], group), x, weights)
    return x


class _Experts:
    """What transformers' ``grouped_mm`` reads of its module."""

    has_gate, has_bias, is_transposed = True, False, False

    def __init__(self, weights: Weights):
        self.gate_up_proj, self.down_proj = weights.gate_up, weights.down
        self.num_experts = weights.gate_up.shape[0]

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up


def today(x: Tensor, layers: list[Weights], shape: Shape, rank: int, world: int, group: str) -> Tensor:
    """NCCL all-gather, transformers' grouped_mm, NCCL reduce-scatter."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    local = shape.experts // world
    for weights in layers:
        rows = collectives.all_gather_tensor(x, 0, group) if world > 1 else x
        chosen, ids = route(rows, weights, shape.top_k)
        ids = ids - rank * local
        ids = torch.where((ids >= 0) & (ids < local), ids, local)
        y = grouped_mm_experts_forward(_Experts(weights), rows, ids, chosen)  # pyright: ignore[reportArgumentType]
        routed = collectives.reduce_scatter_tensor(y, "sum", 0, group) if world > 1 else y
        x = x + add_shared(routed, x, weights)
    return x

"""The layers that benchmarks measure: one source with the ops of ``moe_ep``, one as people write it today.

Weights lie as transformers holds them: products are ``F.linear``. ``floor`` is what no code could go below.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

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
    """One layer on one rank: router (E, H), experts (E_l, 2I, H) and (E_l, H, I), shared (2S, H) and (H, S).

    ``norm (H,)``: of what the layer reads; the result of the last one is normalised too, as by the block behind it.
    """

    router: Tensor
    gate_up: Tensor
    down: Tensor
    shared_gate_up: Tensor | None
    shared_down: Tensor | None
    norm: Tensor | None = None


def make_weights(shape: Shape, rank: int, world: int, seed: int, norm: bool = False) -> Weights:
    """Random bf16 weights; router and shared expert are equal on all ranks."""

    def tensor(key: int, *size: int) -> Tensor:
        generator = torch.Generator("cuda").manual_seed(1000 * seed + key)
        return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16) * size[-1] ** -0.5

    local = shape.experts // world
    shared = (
        [tensor(1, 2 * shape.shared, shape.hidden), tensor(2, shape.hidden, shape.shared)] if shape.shared else None
    )
    return Weights(
        tensor(0, shape.experts, shape.hidden),
        tensor(10 + 2 * rank, local, 2 * shape.inner, shape.hidden),
        tensor(11 + 2 * rank, local, shape.hidden, shape.inner),
        *(shared or (None, None)),
        tensor(3, shape.hidden) + 1 if norm else None,
    )


class Seen(NamedTuple):
    """What a layer's router did: the ids (M, K) that this rank's experts were given, and of its own rows
    ``steps_to_a_tie`` (T,)."""

    ids: Tensor
    steps: Tensor


def normalised(x: Tensor, weight: Tensor | None) -> Tensor:
    """RMSNorm as transformers writes it; ``x`` itself without a weight."""
    if weight is None:
        return x
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def route(x: Tensor, weights: Weights, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax router with renormalised weights (T, K), and ids."""
    chosen, ids = F.linear(x, weights.router).float().softmax(-1).topk(top_k, -1)
    return (chosen / chosen.sum(-1, keepdim=True)).to(x.dtype), ids


def steps_to_a_tie(x: Tensor, weights: Weights, top_k: int) -> Tensor:
    """(T,): how far the last expert chosen for a row is from the next, in steps of bf16 at the size of its logit.

    Two correct products of a router differ by a step where they sum in another order, so at one or two steps either
    expert is right.
    """
    last, following = F.linear(x, weights.router).float().topk(top_k + 1, -1).values[:, -2:].unbind(-1)
    return (last - following) / torch.exp2(last.abs().log2().floor() - 7)


def shared_alone(x: Tensor, layers: list[Weights]) -> Tensor:
    """Nothing but the shared experts of the layers, one behind the other, residual included."""
    for weights in layers:
        x = add_shared(x, x, weights)
    return x


def add_shared(routed: Tensor, x: Tensor, weights: Weights) -> Tensor:
    """``routed`` plus the shared expert of x, if there is one."""
    if weights.shared_gate_up is None or weights.shared_down is None:
        return routed
    gate, up = F.linear(x, weights.shared_gate_up).chunk(2, -1)
    return routed + F.linear(F.silu(gate) * up, weights.shared_down)


def ours(
    x: Tensor, layers: list[Weights], count: Tensor, shape: Shape, rank: int, world: int, group: str, *,
    fixed: Tensor | None = None, seen: list[Seen] | None = None,
) -> Tensor:  # fmt: skip
    """The layers with the ops of ``moe_ep``; every layer asks for its metadata, as models do.

    ``fixed``: what the routers look at instead of x, so that other layers choose the same experts. ``seen``: gets what
    each layer's router did.
    """
    start, gathered = rank * (shape.experts // world), world * x.shape[0]
    for weights in layers:
        metadata = ops.metadata_update(count, group)
        h = normalised(x, weights.norm)
        routed = h if fixed is None else fixed
        chosen, ids = route(routed, weights, shape.top_k)
        rows, ids, chosen = ops.agv_dispatch(h, ids, chosen, count, metadata, gathered, group)
        if seen is not None:
            seen.append(Seen(ids, steps_to_a_tie(routed, weights, shape.top_k)))
        y = ops.fused_moe(rows, ids, chosen, weights.gate_up, weights.down, metadata[0:1], start)
        x = x + add_shared(ops.rsv_combine(y, count, metadata, x.shape[0], group), h, weights)
    return normalised(x, layers[0].norm)


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
        h = normalised(x, weights.norm)
        rows = collectives.all_gather_tensor(h, 0, group) if world > 1 else h
        chosen, ids = route(rows, weights, shape.top_k)
        ids = ids - rank * local
        ids = torch.where((ids >= 0) & (ids < local), ids, local)
        y = grouped_mm_experts_forward(_Experts(weights), rows, ids, chosen)  # pyright: ignore[reportArgumentType]
        routed = collectives.reduce_scatter_tensor(y, "sum", 0, group) if world > 1 else y
        x = x + add_shared(routed, h, weights)
    return normalised(x, layers[0].norm)


# One H200 reads at most 4.37 TB/s; a peer's stores arrive at 381 GB/s, loads at 363. An exchange of all ranks that
# moves nothing takes 3.0 us on two and 3.2 on four (benchmarks/bench_comm.py, ``barrier``); a layer has two.
READ, PUSH, PULL, EXCHANGE = 4.37e6, 381e3, 363e3, {1: 0.0, 2: 3.0, 4: 3.2}  # bytes a us; us


def floor(shape: Shape, world: int, tokens: int, touched: float) -> tuple[float, float, float]:
    """Least us of a layer's experts, of its two exchanges, and of the whole, on a rank that reads ``touched`` experts.

    The experts' rows come from the first exchange and go into the second, so these add up. A router's and a shared
    expert's bytes need not wait for anybody, but share the memory's rate.
    """
    element = 2
    experts = touched * 3 * shape.hidden * shape.inner * element / READ
    rest = (shape.experts + 3 * shape.shared) * shape.hidden * element / READ
    wanted = 1 - (1 - 1 / world) ** shape.top_k  # rows with an expert here
    arriving = wanted * (world - 1) * tokens * shape.hidden * element
    exchanges = 2 * EXCHANGE[world] + arriving / PUSH + arriving / PULL if world > 1 else 0.0
    return experts, exchanges, experts + max(rest, exchanges)


def touched_experts(seen: list[Seen], start: int, count: int) -> float:
    """How many of ``count`` local experts a layer's ids name, the mean over layers."""
    local = [ids[(ids >= start) & (ids < start + count)].unique().numel() for ids, _ in seen]
    return sum(local) / len(local)

"""``align_block_size`` and the top-k sum alone, checked against their references and timed (``--steps``)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from shapes import SHAPES, LayerShape
from torch import Tensor

from moe_ops.align import launch_align
from moe_ops.fused_moe_config import Shape
from moe_ops.graph_timer import GraphTimer
from moe_ops.moe_reference import align_reference
from moe_ops.pdl import chain_link
from moe_ops.random_layer import MAX_ERROR, random_layer
from moe_ops.topk_sum import topk_sum_reference

CALLS = 21  # with inputs of their own, of which one graph is made
BLOCK = 64  # rows of a block of align


class Step(NamedTuple):
    """One call on inputs of its own; ``check`` makes it and raises ``AssertionError`` where its result is wrong."""

    call: Callable[[], object]
    check: Callable[[], None]


def check_align(call: Callable[[], tuple[Tensor, ...]], ids: Tensor, live: Tensor, experts: int) -> None:
    """All three outputs equal the reference's, padding included."""
    wanted = align_reference(ids.cpu(), live.cpu(), BLOCK, experts, 0)
    names = "sorted_token_ids", "expert_ids", "num_tokens_post_padded"
    for name, mine, theirs in zip(names, call(), wanted, strict=True):
        if not torch.equal(mine.cpu(), theirs):
            raise AssertionError(f"align of {tuple(ids.shape)}, {experts} experts: {name} is wrong; not timed")


def check_sum(call: Callable[[], object], inputs: tuple[Tensor, ...], out: Tensor, experts: int) -> None:
    """``out``, which ``call`` writes, is the sum over ``inputs`` (pairs, ids, weights, live) but for its rounding."""
    out.fill_(float("nan"))
    call()
    pairs, ids, weights, live = inputs
    wanted = topk_sum_reference(pairs.double(), ids, weights, live, 0, experts)
    error = float((out.double() - wanted).norm() / wanted.norm())
    if not error <= MAX_ERROR:
        raise AssertionError(f"top-k sum of {tuple(ids.shape)}: relative error {error:.2e} > {MAX_ERROR}; not timed")


def align_steps(rows: int, top_k: int, experts: int, device: torch.device) -> list[Step]:
    steps = []
    for _ in range(CALLS):
        ids = torch.rand(rows, experts, device=device).topk(top_k, dim=-1).indices
        live = torch.tensor([rows], dtype=torch.int32, device=device)
        call = partial(launch_align, ids, live, BLOCK, experts, 0)
        steps.append(Step(call, partial(check_align, call, ids, live, experts)))
    return steps


def sum_steps(layer: LayerShape, tokens: int, device: torch.device) -> list[Step]:
    """The layer's sums, each with dependent launch as after its second GEMM; pairs of remote experts are as others."""
    from moe_ops.fused_moe_launch import sum_pairs

    shape = Shape(layer.local_experts, layer.top_k, layer.hidden, 64, tokens)
    (hidden, ids, weights), _ = random_layer(shape, layer.experts, device)
    steps = []
    for _ in range(CALLS):
        pairs, out = torch.randn_like(hidden.repeat_interleave(layer.top_k, 0)), torch.empty_like(hidden)
        live = torch.tensor([tokens], dtype=torch.int32, device=device)
        inputs = pairs, ids.clone(), weights.clone(), live
        call = partial(sum_pairs, *inputs, out, 0, layer.local_experts, chain_link(True, device))
        steps.append(Step(call, partial(check_sum, call, inputs, out, layer.local_experts)))
    return steps


def step_line(name: str, steps: list[Step], timer: GraphTimer, repeats: int) -> str:
    """Time of the first call as a graph of its own, and of one more call in a graph of all of them.

    The calls' inputs and outputs must differ, so that each reads cold memory and none waits to overwrite. Every one is
    checked before any is timed.
    """
    for step in steps:
        step.check()
    alone = timer.median_us(steps[0].call, repeats)
    # the list keeps every call's outputs: memory of one would serve the next
    together = timer.median_us(lambda: [step.call() for step in steps], repeats)
    return f"{name:42} {alone:8.1f} {(together - alone) / (len(steps) - 1):8.1f}"


def print_steps(timer: GraphTimer, repeats: int) -> None:
    """Print the time of ``align_block_size`` and of the top-k sum, two figures each (see the printed legend)."""
    device = torch.device("cuda")
    print(f"us of a call: as a graph of its own, in which the empty graph is; as one more of {CALLS} in a graph")
    for rows, top_k, experts in ((8, 8, 128), (64, 8, 128), (512, 8, 16), (512, 8, 128), (512, 8, 256), (8192, 8, 128)):
        name = f"align  M*K {rows * top_k}  E_l {experts}"
        print(step_line(name, align_steps(rows, top_k, experts, device), timer, repeats), flush=True)
    for shape, tokens in (
        ("qwen3-30b", 16), ("qwen3-30b", 256), ("qwen3-30b", 8192), ("qwen3-30b-ep8", 2048), ("qwen3-30b-ep8", 8192),
    ):  # fmt: skip
        name = f"top-k sum  {shape}  {tokens} tokens"
        print(step_line(name, sum_steps(SHAPES[shape], tokens, device), timer, repeats), flush=True)
        torch.cuda.empty_cache()

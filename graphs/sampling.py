"""How the next token is chosen, inside the compiled step.

A draw is a pure function of a request's seed, the position of the token and the token's number: no generator state.
So a request draws the same tokens in any slot, beside any neighbours, on any rank, and again tomorrow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

SCAN_BLOCK = 512


class Choice(NamedTuple):
    """What each slot asked for, on the device: all (B,)."""

    positions: Tensor  # int64, of the token that is being chosen
    temperature: Tensor  # fp32; 0: greedy
    top_k: Tensor  # int64; 0: all
    top_p: Tensor  # fp32; 1: all
    seed: Tensor  # int64


PARTS = 128  # of a vocabulary, looked through side by side; it divides those of most models
Sampler = Callable[[Tensor, Choice], Tensor]  # logits (B, V), Choice -> (B,) int64


def greedy(logits: Tensor, choice: Choice) -> Tensor:
    """The most likely token: logits (B, V) -> (B,) int64; the lowest number where several tie.

    In two stages: in one, a single block of threads reads the whole vocabulary of a row (34 us on an H200, 12 so).
    """
    size = logits.shape[-1]
    if size % PARTS:
        return logits.argmax(dim=-1)
    parts = logits.unflatten(-1, (PARTS, size // PARTS))  # [B, P, V / P]
    part = parts.amax(dim=-1).argmax(dim=-1)  # [B]
    within = parts.argmax(dim=-1).gather(1, part[:, None])[:, 0]
    return part * (size // PARTS) + within


def sample(logits: Tensor, choice: Choice) -> Tensor:
    """Draw from softmax(logits / temperature) cut to ``top_k``, then ``top_p``: logits (B, V) -> (B,) int64.

    The cuts are those of transformers, in its order; tokens that tie with the last one kept are kept as well.
    The draw is an exponential race: the largest p / e wins, e exponential, drawn for each token.
    """
    drawn = choice.temperature > 0
    scaled = logits.float() / torch.where(drawn, choice.temperature, 1.0)[:, None]  # [B, V]
    kept = scaled >= threshold(scaled, choice.top_k, choice.top_p)[:, None]
    race = exponential(choice.seed, choice.positions, logits.shape[-1])
    raced = torch.where(kept, scaled - race.log(), float("-inf"))
    return torch.where(drawn[:, None], raced, scaled).argmax(dim=-1)


def threshold(scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """The smallest value of ``scaled (B, V)`` that both cuts keep: (B,) fp32."""
    size = scaled.shape[-1]
    ordered = scaled.sort(dim=-1, descending=True).values
    rank = torch.arange(size, device=scaled.device)
    within_k = rank < torch.where(top_k > 0, top_k, size)[:, None]
    p = torch.where(within_k, ordered, float("-inf")).softmax(dim=-1)
    before = running_sums(p) - p  # mass of the tokens ahead of each
    kept = within_k & ((before < top_p[:, None]) | (rank == 0))
    return torch.where(kept, ordered, float("inf")).amin(dim=-1)


def running_sums(x: Tensor) -> Tensor:
    """``x.cumsum(-1)`` of (B, V), first in blocks, then over blocks: torch 2.11 cannot compile a long scan of B > 1."""
    blocks = pad(x, (0, -x.shape[1] % SCAN_BLOCK)).view(x.shape[0], -1, SCAN_BLOCK)
    inside = blocks.cumsum(dim=2)
    totals = inside[:, :, -1]
    return (inside + (totals.cumsum(dim=1) - totals)[:, :, None]).view(x.shape[0], -1)[:, : x.shape[1]]


def exponential(seed: Tensor, positions: Tensor, size: int) -> Tensor:
    """Independent exponential numbers, one a token: seed (B,), positions (B,) int64 -> (B, size) fp32, above 0."""
    low, high = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    key = _mix(_mix(_mix(low) ^ high) ^ (positions & 0xFFFFFFFF))  # [B]
    token = _mix(torch.arange(size, device=seed.device))  # nothing added: Inductor keeps an index in 32 bits
    bits = _mix(key[:, None] ^ token)  # [B, size], 32 of them
    # A 32-bit draw is exact near 0, where the race is decided; 1.0 at the other end only means "last".
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log1p(-uniform)


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers held in int64 in which every input bit flips about half of the output bits.

    Constants below 2**31 keep every product inside int64, whose overflow C++ leaves undefined.
    """
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
    return x ^ (x >> 15)

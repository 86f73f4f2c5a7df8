"""The experts implementation ``"moe_ep"``: what a Hugging Face experts module runs instead of its own forward."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

import moe_ops  # noqa: F401  registers torch.ops.moe_ep
from moe_ops.errors import CapacityError

from . import hf_compat
from .gates import OwnCode, recognise
from .hf_compat import Experts

NAME = "moe_ep"
LOCAL_GROUP = "local"
STATE = "_moe_ep"  # submodule of every sharded experts module
LOCAL_START = "_moe_ep_start"  # global number of its first expert
FIRST, LAST = "_moe_ep_first", "_moe_ep_last"  # True on the modules that begin and end a forward


class ExpertParallelState(nn.Module):
    """What all experts modules of one model share: the group, its sizes, and the live rows on the device.

    A module, so that ``torch.compile`` sees its tensors as buffers (static addresses, which CUDA graphs may
    write) and its integers as constants rather than graph inputs.

    ``batch``: sequences that a forward of this rank holds (None: not declared, all rows are live);
    ``group_batch``: the largest ``batch`` of any rank. Live sequences come first in the batch; of their rows only
    those count that ``counted (T,) bool`` names, if it is given. ``batch_invariant``: see ``fused_moe``.

    ``metadata (3,) int32``: what the first layer of a forward was told, for the others; None between forwards. No
    buffer: in a compiled forward the layers read the op's own result, and nothing is copied or returned.
    """

    live: Tensor

    def __init__(self, group_name: str, rank: int, world_size: int, max_tokens_per_rank: int, device: torch.device):
        super().__init__()
        self.group_name, self.rank, self.world_size = group_name, rank, world_size
        self.max_tokens_per_rank = max_tokens_per_rank
        self.batch: int | None = None
        self.group_batch = 0
        self.counted: Tensor | None = None
        self.batch_invariant = False
        self.metadata: Tensor | None = None
        self.register_buffer("live", torch.zeros(1, dtype=torch.int32, device=device), persistent=False)

    def declare_batch(self, batch: int | None, group_batch: int = 0, counted: Tensor | None = None) -> None:
        """Say how many sequences a forward holds, so that only the first ``live`` of them are sent; None: all rows."""
        self.batch, self.group_batch, self.counted = batch, group_batch, counted
        self.metadata = None

    def check_rows(self, rows: int) -> None:
        """Raise ``CapacityError`` if ``rows`` of hidden states are more than the workspace was set up for."""
        if self.world_size > 1 and rows > self.max_tokens_per_rank:
            raise CapacityError(
                f"moe_ep: a forward of {rows} tokens exceeds max_tokens_per_rank={self.max_tokens_per_rank}; pass a "
                "larger max_tokens_per_rank when sharding the model, or feed the prompt in smaller chunks."
            )
        if self.batch is not None and rows % self.batch:
            raise CapacityError(
                f"moe_ep: a forward of {rows} tokens does not hold {self.batch} sequences of equal length; "
                "pass the declared batch, or call declare_batch(None)."
            )

    def local_tokens(self, rows: int) -> Tensor:
        """This rank's live rows t of ``rows``, (1,) int32."""
        if self.batch is None:
            return torch.full((1,), rows, dtype=torch.int32, device=self.live.device)
        return self.live if rows == self.batch else self.live * (rows // self.batch)

    def gathered_rows(self, rows: int) -> int:
        """M: rows of the gathered batch, the same number on every rank."""
        if self.batch is None:
            return self.world_size * self.max_tokens_per_rank
        return self.world_size * self.group_batch * (rows // self.batch)


def share_state(modules: Collection[Experts], state: ExpertParallelState, same_rows: bool = True) -> None:
    """Give ``modules``, in the order in which a forward runs them, their state.

    ``same_rows``: all of them see the same live rows, so that one update of the metadata serves a forward.
    """
    for number, module in enumerate(modules, start=1):
        module.add_module(STATE, state)
        setattr(module, FIRST, number == 1 or not same_rows)
        setattr(module, LAST, number == len(modules) or not same_rows)


def moe_ep_experts(self: Experts, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts forward: hidden_states (T, H), top_k_index (T, K) int64, top_k_weights (T, K) -> (T, H).

    ``self`` is the Hugging Face experts module. With its experts sharded, the live rows of all ranks are
    gathered, every rank adds its experts' part, and the sums come back; else all rows run here.
    """
    x = hidden_states.to(self.down_proj.dtype)
    state = getattr(self, STATE, None)
    rows = x.shape[0]
    if state is None:
        valid = torch.full((1,), rows, dtype=torch.int32, device=x.device)
        out = _run_experts(self, x, top_k_index, top_k_weights, valid)
    else:
        state.check_rows(rows)
        if state.counted is not None:
            top_k_index = torch.where(state.counted[:, None], top_k_index, -1)
        run = _run_alone if state.world_size == 1 else _run_sharded
        out = run(self, state, x, top_k_index, top_k_weights)
    return out.to(hidden_states.dtype)


def _run_alone(self: Experts, state: ExpertParallelState, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """One rank: no communication, but rows that are not live must come out as zeros, as from a combine."""
    live = state.local_tokens(x.shape[0])
    out = _run_experts(self, x, ids, weights, live)
    row = torch.arange(x.shape[0], device=x.device)
    return torch.where((row < live)[:, None], out, 0)


def _run_sharded(self: Experts, state: ExpertParallelState, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    rows, group = x.shape[0], state.group_name
    live = state.local_tokens(rows)
    metadata = _metadata(self, state, live)
    capacity = state.gathered_rows(rows)
    x_all, ids_all, weights_all = torch.ops.moe_ep.agv_dispatch(x, ids, weights, live, metadata, capacity, group)
    partial = _run_experts(self, x_all, ids_all, weights_all, metadata[0:1])  # [M, H]
    return torch.ops.moe_ep.rsv_combine(partial, live, metadata, rows, group, out_dtype=x.dtype)


def _metadata(self: Experts, state: ExpertParallelState, live: Tensor) -> Tensor:
    """The live rows of all ranks, (3,) int32: asked for once a forward, and by a layer that is called alone."""
    metadata = None if getattr(self, FIRST) else state.metadata
    if metadata is None:
        metadata = torch.ops.moe_ep.metadata_update(live, state.group_name)
    if getattr(self, LAST):
        state.metadata = None
    elif getattr(self, FIRST):
        state.metadata = metadata
    return metadata


def _run_experts(self: Experts, x: Tensor, ids: Tensor, weights: Tensor, valid_tokens: Tensor) -> Tensor:
    """This rank's experts on the first ``valid_tokens`` rows of ``x``."""
    gate, state = recognise(self), getattr(self, STATE, None)
    batch_invariant = state is not None and state.batch_invariant
    if isinstance(gate, OwnCode):
        return _run_own_gate(self, x, ids, weights, valid_tokens, batch_invariant)
    stem = "gate_up_proj" if gate.gated else "up_proj"
    return torch.ops.moe_ep.fused_moe(
        x,
        ids,
        weights,
        getattr(self, stem),
        self.down_proj,
        valid_tokens,
        getattr(self, LOCAL_START, 0),
        activation=gate.activation,
        alpha=gate.alpha,
        limit=gate.limit,
        gated=gate.gated,
        transposed=gate.transposed,
        interleaved=gate.interleaved,
        gate_up_bias=getattr(self, f"{stem}_bias") if self.has_bias else None,
        down_bias=self.down_proj_bias if self.has_bias else None,
        batch_invariant=batch_invariant,
    )


def _run_own_gate(
    self: Experts, x: Tensor, ids: Tensor, weights: Tensor, valid_tokens: Tensor, batch_invariant: bool
) -> Tensor:
    """The model's own gate and norm between the projections: rows are (row, slot) pairs, unspecified where dead."""
    start, biased, transposed = getattr(self, LOCAL_START, 0), self.has_bias, self.is_transposed

    def project(rows: Tensor, name: str) -> Tensor:
        return torch.ops.moe_ep.expert_linear(
            rows.to(x.dtype), ids, getattr(self, name), valid_tokens, start,
            bias=getattr(self, f"{name}_bias") if biased else None,
            transposed=transposed, batch_invariant=batch_invariant,
        )  # fmt: skip

    if self.has_gate:
        inner = self._apply_gate(project(x, "gate_up_proj"))  # [M*K, I]
    else:
        inner = self.act_fn(project(x, "up_proj"))
    pairs = project(inner, "down_proj")  # [M*K, H]
    if getattr(self, "has_post_expert_norm", False):
        pairs = self.post_expert_norm(pairs).to(x.dtype)
    return torch.ops.moe_ep.topk_sum(pairs, ids, weights, valid_tokens, start, self.down_proj.shape[0])


hf_compat.register_experts(NAME, moe_ep_experts)

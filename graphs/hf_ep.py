"""``"moe_ep"`` as one of transformers' own ``EPImplementation``s, for models that are loaded with its API (5.23 on).

    config = graphs.distributed_config(path, max_tokens_per_rank=64)
    model = AutoModelForCausalLM.from_pretrained(path, distributed_config=config, experts_implementation="moe_ep")

transformers then shards the experts itself (evenly only) and gives this class the rows of one rank's own batch.
``graphs.from_pretrained`` needs none of this and takes any split; both run the same three ops around the experts.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ops import init_workspace
from moe_ops.errors import CapacityError
from moe_ops.workspace import DEFAULT_TIMEOUT_S

from . import hf_compat
from .errors import TransformersVersionError
from .experts import NAME

EPImplementation: Any = object
EPImplementationInterface: Any = None
with suppress(ImportError, AttributeError):  # before 5.23
    _theirs = import_module("transformers.distributed.expert_parallel")
    EPImplementation, EPImplementationInterface = _theirs.EPImplementation, _theirs.EPImplementationInterface

SINCE = "5.23"
KEEP_WHOLE = "replicate"  # transformers' style that leaves a module or parameter as it is


@dataclass(frozen=True)
class EpOptions:
    """What the workspace of a group is set up with, where transformers' configuration has no place for it."""

    max_tokens_per_rank: int = 1024
    transport: str = "auto"
    timeout_s: float = DEFAULT_TIMEOUT_S


_options = EpOptions()


def set_ep_options(**values: Any) -> EpOptions:
    """Change ``EpOptions`` for models that are loaded from now on; the same values on every rank."""
    global _options
    _options = replace(_options, **values)
    return _options


class MoeEpImplementation(EPImplementation):
    """One experts module's way to its tokens: gather every rank's rows, run this rank's experts, add up.

    Ranks hold batches of their own, also of different sizes up to ``max_tokens_per_rank``.
    """

    def __init__(self, experts: Any, ep_mesh: Any, tp_mesh: Any):
        super().__init__(experts, ep_mesh, tp_mesh)
        group: dist.ProcessGroup = ep_mesh.get_group()
        down = experts.down_proj
        self.group_name, self.world_size = group.group_name, group.size()
        self.first_expert = group.rank() * self.num_local_experts
        self.dtype, self.capacity = down.dtype, _options.max_tokens_per_rank
        if self.world_size > 1:
            init_workspace(
                group,
                max_tokens_per_rank=self.capacity,
                hidden_size=down.shape[2 if experts.is_transposed else 1],
                top_k=hf_compat.top_k(experts.config),
                dtype=self.dtype,
                transport=_options.transport,
                timeout_s=_options.timeout_s,
            )

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, H), top_k_index (T, K) of all experts, top_k_weights (T, K) -> (T, H)."""
        if self.world_size == 1:
            return self.experts_forward(hidden_states, top_k_index, top_k_weights)
        rows = hidden_states.shape[0]
        if rows > self.capacity:
            raise CapacityError(
                f"moe_ep: a forward of {rows} tokens exceeds max_tokens_per_rank={self.capacity}; "
                "call graphs.set_ep_options(max_tokens_per_rank=...) before the model is loaded."
            )
        ops, group = torch.ops.moe_ep, self.group_name
        live = torch.full((1,), rows, dtype=torch.int32, device=hidden_states.device)
        metadata = ops.metadata_update(live, group)
        x, ids, weights = ops.agv_dispatch(
            hidden_states.to(self.dtype), top_k_index, top_k_weights, live, metadata,
            self.world_size * self.capacity, group,
        )  # fmt: skip
        local = ids - self.first_expert
        mine = (local >= 0) & (local < self.num_local_experts)
        # transformers skips the id one past the last, and wants its weight to be zero
        local, weights = torch.where(mine, local, self.num_local_experts), torch.where(mine, weights, 0)
        out = self.experts_forward(x, local, weights)
        return ops.rsv_combine(out.to(self.dtype), live, metadata, rows, group, out_dtype=self.dtype)


def distributed_config(model: str | Path | Any, *, max_tokens_per_rank: int, ep_size: int | None = None) -> Any:
    """transformers' ``DistributedConfig`` for ``model`` (a folder, a name or a configuration) with experts split alone.

    Every rank (``ep_size`` of them: the world by default) has a batch of its own and the dense parts whole.
    Raises ``TransformersVersionError`` before 5.23.
    """
    if EPImplementationInterface is None:
        raise TransformersVersionError(
            f"transformers {hf_compat.transformers.__version__} has no EPImplementation; upgrade to {SINCE}, "
            "or load the model with graphs.from_pretrained."
        )
    from transformers import AutoConfig, distributed

    config_class: Any = distributed.DistributedConfig
    set_ep_options(max_tokens_per_rank=max_tokens_per_rank)
    config = AutoConfig.from_pretrained(model) if isinstance(model, (str, Path)) else model
    with torch.device("meta"):
        meta = hf_compat.causal_lm_class(config)(config)
    size = ep_size or dist.get_world_size()
    # only a rule of one's own overrides one of the model's, which would share a batch between ranks
    plan = dict.fromkeys(meta.tp_plan, KEEP_WHOLE)
    return config_class(tp_size=size, tp_plan=plan, ep_size=size, ep_implementation=NAME)


if EPImplementationInterface is not None:
    EPImplementationInterface.register(NAME, MoeEpImplementation)

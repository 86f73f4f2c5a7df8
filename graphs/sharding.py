"""Experts of a model split over a group: which rank holds which, and the checks that nothing else was split."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_ops import get_workspace, init_workspace, place_experts
from moe_ops.workspace import DEFAULT_TIMEOUT_S

from . import experts, hf_compat
from .errors import ShardingError, UnsupportedModelError
from .experts import LOCAL_GROUP, LOCAL_START, ExpertParallelState
from .hf_compat import Experts, Model

EXPERT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def expert_range(num_experts: int, world_size: int, rank: int) -> range:
    """Experts of a rank: contiguous, and the first ``num_experts % world_size`` ranks hold one more."""
    if world_size > num_experts:
        raise ShardingError(
            f"{num_experts} experts cannot be split over {world_size} ranks; pass a group of at most {num_experts}."
        )
    each, extra = divmod(num_experts, world_size)
    start = rank * each + min(rank, extra)
    return range(start, start + each + (rank < extra))


def localize(model: Model, world_size: int, rank: int, take: Callable[[Tensor], Tensor]) -> None:
    """Replace every expert parameter by ``take(its rows of this rank)``."""
    for module in hf_compat.experts_modules(model).values():
        mine = expert_range(module.num_experts, world_size, rank)
        for name, parameter in hf_compat.expert_parameters(module).items():
            local = take(parameter.detach()[mine.start : mine.stop])
            setattr(module, name, nn.Parameter(local, requires_grad=parameter.requires_grad))


def shard_experts(
    model: Model,
    group: dist.ProcessGroup | None = None,
    *,
    max_tokens_per_rank: int,
    top_k: int | None = None,
    transport: str = "auto",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Model:
    """Keep this rank's experts of ``model`` and run them with ``"moe_ep"``; collective over ``group``.

    ``group``: a process group (None: the default group, or this process alone if there is none);
    ``max_tokens_per_rank``: tokens that a forward of one rank may hold (batch x prompt chunk);
    ``top_k``: K, needed only where the configuration does not tell; ``transport``, ``timeout_s``: see
    ``moe_ops.init_workspace``. Works in place and returns ``model``. The other parts stay whole on every rank
    and must be equal there, which is checked.
    """
    group = default_group(group)
    if expert_parallel_state(model) is not None:
        raise ShardingError("the experts of this model are already sharded; load a fresh copy to shard it again.")
    hf_compat.refuse_quantized(model.config)
    world_size, rank = group_size(group), group_rank(group)
    if world_size > 1:
        localize(model, world_size, rank, take=torch.clone)
    return attach(
        model, group, max_tokens_per_rank=max_tokens_per_rank, top_k=top_k, transport=transport, timeout_s=timeout_s
    )


def use_experts(model: Model) -> Model:
    """``model.set_experts_implementation("moe_ep")`` with an error where transformers would ignore it.

    For one process; works in place and returns ``model``. Raises ``UnsupportedModelError``.
    """
    hf_compat.refuse_quantized(model.config)
    check_modules(hf_compat.experts_modules(model))
    model.set_experts_implementation(experts.NAME)
    return model


def attach(
    model: Model,
    group: dist.ProcessGroup | None,
    *,
    max_tokens_per_rank: int,
    top_k: int | None,
    transport: str,
    timeout_s: float,
) -> Model:
    """Connect a model that holds this rank's experts to its group, after checking that it is sound."""
    modules = hf_compat.experts_modules(model)
    check_modules(modules)
    world_size, rank = group_size(group), group_rank(group)
    down = next(iter(modules.values())).down_proj
    name = LOCAL_GROUP if group is None else group.group_name
    state = ExpertParallelState(name, rank, world_size, max_tokens_per_rank, down.device)
    experts.share_state(modules.values(), state, see_the_same_rows(list(modules)))
    for module in modules.values():
        setattr(module, LOCAL_START, expert_range(module.num_experts, world_size, rank).start)
    model.set_experts_implementation(experts.NAME)
    if world_size > 1:
        check_dense_parts_agree(model, group)
        workspace = init_workspace(
            group,
            max_tokens_per_rank=max_tokens_per_rank,
            hidden_size=hidden_size(next(iter(modules.values()))),
            top_k=top_k or hf_compat.top_k(model.config),
            dtype=down.dtype,
            transport=transport,
            timeout_s=timeout_s,
        )
        for number in dict.fromkeys(module.num_experts for module in modules.values()):
            mine = expert_range(number, world_size, rank)
            place_experts(workspace, mine.start, len(mine))
    return model


def hidden_size(module: Experts) -> int:
    """H of an experts module, from its weights: down is (E_l, H, I), or (E_l, I, H) transposed."""
    return module.down_proj.shape[2 if module.is_transposed else 1]


def see_the_same_rows(names: list[str]) -> bool:
    """Whether the modules are one to a layer of one stack, so that a forward counts live rows once for all of them.

    ``model.layers.3.mlp.experts`` lies in layer 3 of ``model.layers``. Two in a layer may take turns on its rows.
    """
    layers = [_layer(name) for name in names]
    return len({stack for stack, _ in layers}) == 1 and len(set(layers)) == len(layers)


def _layer(name: str) -> tuple[str, str]:
    parts = name.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return (name, "") if at is None else (".".join(parts[:at]), parts[at])


def check_modules(modules: dict[str, Experts]) -> None:
    """Raise ``UnsupportedModelError`` for a dtype or a parameter that the ops do not take."""
    for name, module in modules.items():
        for parameter in hf_compat.expert_parameters(module).values():
            if parameter.is_meta:
                raise ShardingError(f"{name} is on the meta device; load its weights before sharding.")
            if parameter.dtype not in EXPERT_DTYPES:
                raise UnsupportedModelError(
                    f"{name} holds {parameter.dtype} weights; convert them to bf16: model.to(torch.bfloat16)."
                )


def expert_parallel_state(model: Model) -> ExpertParallelState | None:
    """The state shared by a sharded model's experts, None for a model that is not sharded."""
    return next((m for m in model.modules() if isinstance(m, ExpertParallelState)), None)


def check_peers(model: Model) -> None:
    """Raise what an op recorded on the device since the last check (``PeerTimeoutError``, ``CapacityError``)."""
    state = expert_parallel_state(model)
    workspace = get_workspace(state.group_name) if state is not None else None
    if workspace is not None:
        workspace.check()


def dense_parts(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Parameters and saved buffers that every rank must hold whole."""
    expert_names = {
        f"{name}.{part}"
        for name, module in hf_compat.experts_modules(model).items()
        for part in hf_compat.expert_parameters(module)
    }
    for name, tensor in model.state_dict().items():
        if name not in expert_names:
            yield name, tensor


def check_dense_parts_agree(model: Model, group: dist.ProcessGroup | None) -> None:
    """Raise ``ShardingError`` unless all ranks hold the same dense parts, bit by bit; collective."""
    mine = {name: _fingerprint(tensor) for name, tensor in dense_parts(model)}
    everyone: list[dict] = [{} for _ in range(group_size(group))]
    dist.all_gather_object(everyone, mine, group=group)
    for rank, theirs in enumerate(everyone):
        differing = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n))
        if differing:
            raise ShardingError(
                f"ranks {group_rank(group)} and {rank} differ in {len(differing)} dense parts, first {differing[0]}; "
                "load the same checkpoint with the same dtype on every rank (or seed random weights alike)."
            )


def _fingerprint(tensor: Tensor) -> tuple:
    """Shape, dtype and a position-weighted sum of the bits: equal tensors have equal ones, in any order of adding."""
    if isinstance(tensor, DTensor):
        return ("DTensor", str(tensor.placements), tuple(tensor.shape))
    words = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if words.numel() % 4 == 0:
        words = words.view(torch.int32)
    weights = torch.arange(words.numel(), device=words.device, dtype=torch.int64) % 1021 + 1
    return tuple(tensor.shape), str(tensor.dtype), int((words.long() * weights).sum())


def default_group(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """``group``, or the default group if there is one, or None: this process alone."""
    if group is not None:
        return group
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else group.size()


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else group.rank()

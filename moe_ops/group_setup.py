"""``init_workspace``: the ranks of a group agree on sizes and on a transport that works between all of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
import torch.distributed as dist

from . import transports
from .errors import ArgumentError, TransportError, WorkspaceError
from .shapes import CPU_HIDDEN_DTYPES, HALF_DTYPES
from .workspace import _WORKSPACES, DEFAULT_TIMEOUT_S, Workspace, WorkspaceConfig, agree

log = logging.getLogger("moe_ep")


def init_workspace(
    group: dist.ProcessGroup | str | None,
    *,
    max_tokens_per_rank: int,
    hidden_size: int,
    top_k: int,
    dtype: torch.dtype = torch.bfloat16,
    transport: str = "auto",
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Workspace:
    """Set up what the communication ops of ``group`` use; collective over the group.

    ``max_tokens_per_rank``: rows a rank may pass (its T at most); ``hidden_size`` H; ``top_k`` K; ``dtype`` of
    the hidden states; ``transport``: see ``moe_ops.transports``; ``timeout_s``: seconds that any wait for a peer
    may take. ``group``: a process group, its name, or None for the default group.
    Called again with the same values it returns the same workspace, with others it raises ``WorkspaceError``.
    """
    config = WorkspaceConfig(max_tokens_per_rank, hidden_size, top_k, dtype, transport, float(timeout_s))
    process_group = _as_group(group)
    name = process_group.group_name
    existing = _WORKSPACES.get(name)
    if existing is not None:
        if existing.config != config:
            raise WorkspaceError(
                f"group {name!r} already has a workspace with {_differences(existing.config, config)}; "
                "close() it first, or pass the same values."
            )
        return existing
    device = transports.group_device(process_group)
    _check_config(config, device)
    facts = [transports.RankFacts(**fact) for fact in _meet(process_group, config, device)]
    workspace = _first_that_works(process_group, config, transports.candidates(transport, facts), device)
    _WORKSPACES[name] = workspace
    log.info("moe_ep group %s: transport %s (%s)", name, workspace.transport, workspace.transport_reason)
    return workspace


def place_experts(workspace: Workspace, first: int, count: int) -> int:
    """Tell the group that this rank holds experts ``first`` to ``first + count - 1`` of its layers; collective.

    Compiled layers with these experts then send rows only to ranks that have an expert for them, if all ranks hold the
    same number and it pays (``lowering/route_rows.py``). Returns that number, or 0 if they do not, or for one rank.
    Models whose layers differ tell each split once, in the same order on every rank. Safe to repeat.
    Raises ``ArgumentError``, ``PeerTimeoutError``.
    """
    if first < 0 or count < 1:
        raise ArgumentError(f"place_experts: first = {first}, count = {count}; pass at least 0 and 1.")
    if workspace.group is None or workspace.world_size == 1:
        return 0
    told = agree(workspace.group, "experts", workspace.config.timeout_s, [first, count])
    workspace.placements.add(tuple((theirs[0], theirs[1]) for theirs in told))
    return workspace.placements.experts_per_rank(workspace.rank, first, count)


def _as_group(group: dist.ProcessGroup | str | None) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise WorkspaceError(
            "init_workspace: torch.distributed is not initialized; call torch.distributed.init_process_group first. "
            "One process alone needs no workspace: pass group_name='local' to the ops."
        )
    if isinstance(group, str):
        resolved = transports.resolve_group(group)
        if resolved is None:
            raise WorkspaceError(f"init_workspace: no process group is named {group!r}; pass the group itself.")
        return resolved
    if group is None:
        group = dist.group.WORLD
    if group is None or group == dist.GroupMember.NON_GROUP_MEMBER:
        raise WorkspaceError("init_workspace: this rank is not in the group; call it on the group's ranks only.")
    return group


def _check_config(config: WorkspaceConfig, device: torch.device) -> None:
    for name in ("max_tokens_per_rank", "hidden_size", "top_k"):
        if getattr(config, name) < 1:
            raise ArgumentError(f"init_workspace: {name} = {getattr(config, name)}; pass at least 1.")
    if config.timeout_s <= 0:
        raise ArgumentError(f"init_workspace: timeout_s = {config.timeout_s}; pass a positive number of seconds.")
    allowed = HALF_DTYPES if device.type == "cuda" else CPU_HIDDEN_DTYPES
    if config.dtype not in allowed:
        raise ArgumentError(f"init_workspace: dtype = {config.dtype} on {device.type}; pass one of {allowed}.")


def _meet(group: dist.ProcessGroup, config: WorkspaceConfig, device: torch.device) -> Iterable[dict]:
    """Every rank's facts, after all agreed on the configuration."""
    mine = {"config": config.payload(), "facts": transports.facts_payload(transports.local_facts(group, device))}
    others = agree(group, "init", config.timeout_s, mine)
    for rank, other in enumerate(others):
        if other["config"] != mine["config"]:
            raise WorkspaceError(
                f"init_workspace: rank {group.rank()} passed {mine['config']}, rank {rank} passed {other['config']}; "
                "pass the same values on every rank."
            )
    return [other["facts"] for other in others]


def _first_that_works(
    group: dist.ProcessGroup,
    config: WorkspaceConfig,
    choices: list[transports.TransportChoice],
    device: torch.device,
) -> Workspace:
    """The first choice whose check passes on every rank."""
    failures: list[str] = []
    for choice in choices:
        reason = "; ".join([choice.reason, *failures])
        workspace = Workspace(group, group.group_name, config, transports.TransportChoice(choice.name, reason), device)
        if choice.name in ("nccl", "gloo", "local"):
            return workspace
        problem = next((p for p in agree(group, "check", config.timeout_s, _probe(workspace)) if p), None)
        if problem is None:
            return workspace
        failures.append(f"{choice.name} failed its check: {problem}")
    raise TransportError(f"init_workspace: {'; '.join(failures)}.")


def _probe(workspace: Workspace) -> str | None:
    """Try the transport on a small buffer; None if it works, else what went wrong."""
    if workspace.transport.startswith("emulator"):
        return None
    from .selfcheck import probe_transport

    return probe_transport(workspace)


def _differences(old: WorkspaceConfig, new: WorkspaceConfig) -> str:
    changed = [f"{k}={v!r} (now {getattr(new, k)!r})" for k, v in vars(old).items() if getattr(new, k) != v]
    return ", ".join(changed)

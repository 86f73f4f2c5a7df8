"""What the communication ops of one group use: its transport, its buffers, its errors.

``init_workspace`` is collective and cheap: it chooses the transport. Memory is allocated by the first
op (or by ``Workspace.allocate``). A group of one rank needs no workspace.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property
from typing import NamedTuple

import torch
import torch.distributed as dist

from . import transports
from .buffers import SymmetricTensors
from .census import Census
from .errors import CapacityError, DeviceError, ShapeError, TransportError, WorkspaceError
from .placement import Placements
from .pools import outside_pools
from .reference import Batch
from .symmetric import Channel, Layout, SymmetricBuffer, make_channel, read_record

log = logging.getLogger("moe_ep")

DEFAULT_TIMEOUT_S = 120.0  # ranks may compile for a minute while the others wait
LOCAL_GROUPS = ("", "local")  # names that mean "this process alone"


class BufferInfo(NamedTuple):
    """One region of a workspace's symmetric memory."""

    name: str
    nbytes: int
    allocated: bool


@dataclass(frozen=True)
class WorkspaceConfig:
    """The values that every rank of a group must agree on."""

    max_tokens_per_rank: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype
    transport: str
    timeout_s: float

    def payload(self) -> dict:
        """As JSON sends it."""
        return asdict(self) | {"dtype": str(self.dtype)}


class Workspace:
    """The communication state of one group on one rank. Make it with ``init_workspace``."""

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        group_name: str,
        config: WorkspaceConfig,
        choice: transports.TransportChoice,
        device: torch.device,
    ):
        self.group, self.group_name, self.config, self.device = group, group_name, config, device
        self.rank = group.rank() if group is not None else 0
        self.world_size = group.size() if group is not None else 1
        self.transport, self.transport_reason = choice.name, choice.reason
        self.timeout = timedelta(seconds=config.timeout_s)
        self.closed = False
        self.placements = Placements()
        self._channel: Channel | None = None
        self._last_stream: torch.cuda.Stream | None = None

    @property
    def channel(self) -> Channel | None:
        """What the Triton launchers need; None for the transports that use collectives."""
        if self.transport not in transports.KERNEL_TRANSPORTS:
            return None
        if self._channel is None:
            self.allocate()
        if self.device.type == "cuda":
            self._follow_last_stream()
        return self._channel

    @cached_property
    def layout(self) -> Layout:
        """Where each region lies in the symmetric allocation."""
        config = self.config
        return Layout(self.world_size, config.max_tokens_per_rank, config.hidden_size, config.top_k, config.dtype)

    @cached_property
    def buffers(self) -> SymmetricTensors:
        """The symmetric memory that callers of the zero-copy ops hold."""
        return SymmetricTensors(
            self.layout, lambda nbytes: outside_pools(lambda: self._allocate_buffer(nbytes), self.device)
        )

    def empty(self, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
        """``(rows, columns)`` of zeros that every rank can reach: what the zero-copy ops read and write. Collective."""
        return self.buffers.empty(rows, columns, dtype)

    def layer_batch(self, max_tokens: int, ids: torch.dtype, weights: torch.dtype) -> Batch:
        """The gathered batch of ops that dispatch, compute and combine in strict turn; the first call is collective."""
        return self.buffers.layer_batch(max_tokens, ids, weights)

    def layer_output(self, max_tokens: int) -> torch.Tensor:
        """The experts' output of the same ops, ``(M', H)``; the first call is collective."""
        return self.buffers.layer_output(max_tokens)

    @cached_property
    def census(self) -> Census:
        """Names missing ranks when a collective on the CPU fails."""
        store = transports.group_store(self._group())
        return Census(store, transports.SIGNATURES, self.rank, self.world_size, self.config.timeout_s)

    def allocate(self) -> None:
        """Allocate the symmetric memory now (collective); without it, the first op does."""
        if self._channel is not None or self.transport not in transports.KERNEL_TRANSPORTS:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise WorkspaceError("the workspace is not allocated; call workspace.allocate() before graph capture.")
        self._channel = outside_pools(self._make_channel, self.device)
        agree(self._group(), f"allocate/{self.group_name}", self.config.timeout_s)

    def memory(self) -> list[BufferInfo]:
        """Symmetric memory by region, in bytes, also before it is allocated."""
        if self.transport not in transports.KERNEL_TRANSPORTS:
            return []
        allocated = self._channel is not None
        regions = [BufferInfo(name, nbytes, allocated) for name, nbytes in self.layout.regions()]
        return regions + [BufferInfo(*entry) for entry in self.buffers.memory()]

    def check(self) -> None:
        """Raise what a kernel recorded: ``PeerTimeoutError`` or ``CapacityError``. Does not wait for the GPU."""
        failure = read_record(self._channel.record) if self._channel is not None else None
        if failure is not None:
            raise failure.as_error(self.config.timeout_s)

    def check_call(self, op: str, *, rows: int, hidden_size: int, top_k: int | None, device: torch.device) -> None:
        """Raise unless a call's sizes are those the workspace was set up for."""
        if device.type != self.device.type:
            raise DeviceError(
                f"{op}: tensors on {device}, but group {self.group_name!r} serves {self.device.type}; move them."
            )
        if self.world_size == 1:
            return
        config = self.config
        if rows > config.max_tokens_per_rank:
            raise CapacityError(
                f"{op}: {rows} rows exceed max_tokens_per_rank={config.max_tokens_per_rank}; "
                "call init_workspace with a larger max_tokens_per_rank."
            )
        for name, got, want in (("H", hidden_size, config.hidden_size), ("K", top_k, config.top_k)):
            if got is not None and got != want:
                raise ShapeError(f"{op}: {name} = {got}, but the workspace was set up for {name} = {want}.")

    def reset(self, group: dist.ProcessGroup | None = None) -> Workspace:
        """Go on after an error; collective over ``group`` (the survivors' new group; by default the same one).

        Returns the workspace to use from now on: this one, cleared, or a new one under the new group's name.
        """
        if group is not None and group is not self.group:
            from .group_setup import init_workspace

            self.close()
            return init_workspace(group, **_as_kwargs(self.config))
        self._release()
        agree(self._group(), f"reset/{self.group_name}", self.config.timeout_s)
        return self

    def close(self) -> None:
        """Free the memory and forget the group; free CUDA graphs that hold these ops first. Safe to repeat."""
        if not self.closed:
            self._release()
            self.closed = True
            _WORKSPACES.pop(self.group_name, None)

    def _follow_last_stream(self) -> None:
        """Ops of a workspace run one after the other, also when the caller changes streams between two of them."""
        stream = torch.cuda.current_stream(self.device)
        if stream == self._last_stream or torch.cuda.is_current_stream_capturing():
            return
        if self._last_stream is not None:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    def _release(self) -> None:
        if self.device.type == "cuda" and self._channel is not None:
            torch.cuda.synchronize(self.device)
        if self._channel is not None:
            self._channel.close()
        self._channel = None
        self.buffers.release()

    def _group(self) -> dist.ProcessGroup:
        assert self.group is not None, "a local workspace has no group"
        return self.group

    def _check_rendezvous(self) -> None:
        """Raise where torch's rendezvous would wait for ever (``transports.rendezvous_calls``)."""
        calls = agree(self._group(), "rendezvous", self.config.timeout_s, transports.rendezvous_calls())
        if len(set(calls)) > 1:
            raise TransportError(
                f"the ranks of group {self.group_name!r} have set up different numbers of symmetric buffers ({calls}), "
                "which torch cannot join; set up and allocate() the workspaces of larger groups first, or pass "
                "transport='nccl'."
            )

    def _allocate_buffer(self, nbytes: int) -> SymmetricBuffer:
        """``nbytes`` of zeros that every rank can reach, or that collectives move."""
        if self.transport not in transports.KERNEL_TRANSPORTS:
            local = torch.zeros(nbytes, dtype=torch.uint8, device=self.device)
            return SymmetricBuffer(local, torch.empty(0, dtype=torch.int64))
        if self.transport.startswith("emulator"):
            from .emulator import make_buffer

            return make_buffer(self._group(), nbytes, self.config.timeout_s)
        self._check_rendezvous()
        buffer = transports.allocate_symmetric(self._group(), nbytes, self.device, self.config.timeout_s)
        agree(self._group(), "buffer", self.config.timeout_s)  # nobody writes before all have zeroed theirs
        return buffer

    def _make_channel(self) -> Channel:
        return make_channel(
            rank=self.rank,
            layout=self.layout,
            buffer=self._allocate_buffer(self.layout.nbytes),
            timeout_s=self.config.timeout_s,
            multicast=self.transport.endswith("multicast"),
        )


_WORKSPACES: dict[str, Workspace] = {}


def get_workspace(group_name: str) -> Workspace | None:
    """The workspace of that group, or None."""
    return _WORKSPACES.get(group_name)


def transports_in_use() -> dict[str, str]:
    """Transport by group name, of every group that has a workspace."""
    return {name: workspace.transport for name, workspace in _WORKSPACES.items()}


def placements_in_use() -> dict[str, Placements]:
    """What the ranks of every group have told each other about their experts."""
    return {name: workspace.placements for name, workspace in _WORKSPACES.items()}


def resolve(group_name: str, op: str) -> Workspace:
    """The workspace that an op uses; a group of one rank needs none and gets a local one."""
    workspace = _WORKSPACES.get(group_name)
    if workspace is not None:
        return workspace
    if group_name in LOCAL_GROUPS:
        return _local_workspace(group_name)
    group = transports.resolve_group(group_name)
    if group is not None and group.size() == 1:
        return _local_workspace(group_name)
    known = f"group {group_name!r} has" if group is not None else f"no process group is named {group_name!r}; it has"
    raise WorkspaceError(
        f"{op}: {known} no workspace; call moe_ops.init_workspace(group, ...) on every rank first "
        "(a single process passes group_name='local')."
    )


class _LocalWorkspace(Workspace):
    """One rank, any device, any size."""

    def check_call(self, op: str, *, rows: int, hidden_size: int, top_k: int | None, device: torch.device) -> None:
        """Nothing was set up, so nothing can disagree."""


def _local_workspace(group_name: str) -> Workspace:
    config = WorkspaceConfig(0, 0, 0, torch.bfloat16, "local", DEFAULT_TIMEOUT_S)
    choice = transports.TransportChoice("local", "one rank")
    return _LocalWorkspace(None, group_name, config, choice, torch.device("cpu"))


def agree(group: dist.ProcessGroup, what: str, timeout_s: float, value: object = None) -> list:
    """``value`` of every rank. Meetings are collective, so their number, kept in the store, is the same on all."""
    store, rank = transports.group_store(group), group.rank()
    key = f"moe_ep/{what}/{group.group_name}"
    number = store.add(f"{key}/meetings/{rank}", 1)
    operation = f"init_workspace ({what})"
    return transports.exchange(store, operation, f"{key}/{number}", rank, group.size(), value, timeout_s)


def _as_kwargs(config: WorkspaceConfig) -> dict:
    return dict(vars(config))

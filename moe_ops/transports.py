"""Which transport a group uses, and why; and every private torch API that symmetric memory needs.

``multicast`` (NVSwitch stores and reductions) -> ``p2p`` (peer pointers) -> ``nccl`` (any cluster) ->
``gloo`` (CPU) -> ``local`` (one rank). ``auto`` takes the first that all ranks support. The emulator's two
transports run the GPU kernels on CPUs and are only taken when asked for by name.
"""

from __future__ import annotations

import json
import socket
import time
import weakref
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from .census import GRACE_S, absentees
from .errors import ArgumentError, PeerTimeoutError, TransportError
from .symmetric import SymmetricBuffer

KERNEL_TRANSPORTS = ("multicast", "p2p", "emulator", "emulator-multicast")
TRANSPORTS = ("auto", *KERNEL_TRANSPORTS, "nccl", "gloo", "local")
SIGNATURES = "moe_ep/setup"  # where ranks of a store sign that they are alive


@dataclass(frozen=True)
class RankFacts:
    """What one rank tells the others before a transport is chosen."""

    host: str
    device_type: str
    symmetric: bool
    multicast: bool
    backend: str


@dataclass(frozen=True)
class TransportChoice:
    """The transport in use, and the sentence that says why."""

    name: str
    reason: str


def group_device(group: dist.ProcessGroup) -> torch.device:
    """The device a group's ops run on: CUDA where its backend is NCCL (alone or beside gloo), else the CPU."""
    if "nccl" in dist.get_backend_config(group) and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def resolve_group(name: str) -> dist.ProcessGroup | None:
    """The process group of that name, or None."""
    try:
        return c10d._resolve_process_group(name)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, LookupError, ValueError):
        return None


def group_store(group: dist.ProcessGroup) -> dist.Store:
    """The key-value store that the group's ranks met at."""
    return c10d._get_process_group_store(group)


def exchange(
    store: dist.Store, what: str, key: str, rank: int, world_size: int, value: object, timeout_s: float
) -> list:
    """``value`` (JSON) of every rank, in rank order; raises ``PeerTimeoutError`` naming who did not come.

    A collective over the store, so it needs no backend and no working group.
    """
    store.set(f"{key}/{rank}", json.dumps(value))
    deadline = time.monotonic() + timeout_s
    missing = []
    for peer in range(world_size):
        try:
            store.wait([f"{key}/{peer}"], timedelta(seconds=max(deadline - time.monotonic(), 0.01)))
        except RuntimeError:
            missing.append(peer)
    if missing:
        gone = absentees(store, SIGNATURES, rank, missing, time.monotonic() + GRACE_S, timeout_s)
        raise PeerTimeoutError(what, 0, gone or missing, timeout_s)
    return [json.loads(store.get(f"{key}/{peer}")) for peer in range(world_size)]


def local_facts(group: dist.ProcessGroup, device: torch.device) -> RankFacts:
    """What this rank can do."""
    cuda = device.type == "cuda"
    symmetric = cuda and symmetric_memory_available()
    return RankFacts(
        host=socket.gethostname(),
        device_type=device.type,
        symmetric=symmetric,
        multicast=symmetric and multicast_supported(device),
        backend=str(dist.get_backend(group)),
    )


def candidates(requested: str, facts: list[RankFacts]) -> list[TransportChoice]:
    """The transports to try, best first, each with the reason it would be chosen for."""
    _check_request(requested, facts)
    if len(facts) == 1:
        return [TransportChoice("local", "the group has one rank")]
    if requested != "auto":
        return [TransportChoice(requested, "asked for")]
    if facts[0].device_type == "cpu":
        return [TransportChoice("gloo", "the group's tensors are on the CPU")]
    nccl = TransportChoice("nccl", _why_not_symmetric(facts))
    if not all(fact.symmetric for fact in facts) or len({fact.host for fact in facts}) > 1:
        return [nccl]
    p2p = TransportChoice("p2p", "all ranks on one node; no NVLink multicast")
    multicast = TransportChoice("multicast", "all ranks on one node; NVLink multicast passed its check")
    return ([multicast] if all(fact.multicast for fact in facts) else []) + [p2p, nccl]


def symmetric_memory_available() -> bool:
    """Whether torch was built with symmetric memory for CUDA."""
    try:
        import torch.distributed._symmetric_memory
    except ImportError:
        return False
    return torch.cuda.is_available()


def multicast_supported(device: torch.device) -> bool:
    """Whether torch offers NVLink multicast on this device (it obeys TORCH_SYMM_MEM_DISABLE_MULTICAST)."""
    from torch._C._autograd import DeviceType
    from torch._C._distributed_c10d import _SymmetricMemory

    return bool(_SymmetricMemory.has_multicast_support(DeviceType.CUDA, device.index or 0))


_rendezvous_calls = 0
_rendezvous_groups: dict[str, weakref.ref[dist.ProcessGroup]] = {}  # by name, which is how torch caches them, too


def rendezvous_calls() -> int:
    """Symmetric buffers that this process has set up. torch numbers them per process, not per group (seen on 2.11):
    between ranks whose numbers differ its rendezvous waits for ever."""
    return _rendezvous_calls


def allocate_symmetric(
    group: dist.ProcessGroup, nbytes: int, device: torch.device, timeout_s: float
) -> SymmetricBuffer:
    """``nbytes`` of zeroed symmetric memory on every rank of ``group``; collective.

    torch's rendezvous waits for the other ranks at the group's store, here for ``timeout_s`` at most.
    """
    import torch.distributed._symmetric_memory as symm_mem

    global _rendezvous_calls
    known = _rendezvous_groups.setdefault(group.group_name, weakref.ref(group))
    if known() is not group:
        raise TransportError(
            f"torch remembers an earlier group named {group.group_name!r} and would wait for its ranks; give the new "
            "one a name of its own: torch.distributed.new_group(ranks, use_local_synchronization=True)."
        )
    _rendezvous_calls += 1
    store = group_store(group)
    patience = store.timeout  # pyright: ignore[reportAttributeAccessIssue] -- torch types it for TCPStore only
    store.set_timeout(timedelta(seconds=timeout_s))
    try:
        local = symm_mem.empty(nbytes, dtype=torch.uint8, device=device)
        handle = symm_mem.rendezvous(local, group)
    except RuntimeError as error:
        raise TransportError(
            f"symmetric memory cannot be set up between the ranks of this group ({error}); "
            "pass transport='nccl', or put the ranks on one node whose GPUs reach each other."
        ) from error
    finally:
        store.set_timeout(patience)
    local.zero_()
    peers = torch.tensor(list(handle.buffer_ptrs), dtype=torch.int64).to(device)
    torch.cuda.synchronize(device)
    return SymmetricBuffer(local=local, peer_ptrs=peers, multicast_ptr=int(handle.multicast_ptr or 0))


def facts_payload(facts: RankFacts) -> dict:
    """``facts`` as JSON sends them."""
    return asdict(facts)


def _check_request(requested: str, facts: list[RankFacts]) -> None:
    if requested not in TRANSPORTS:
        raise ArgumentError(f"init_workspace: unknown transport {requested!r}; pass one of {', '.join(TRANSPORTS)}.")
    device = facts[0].device_type
    needs = {"p2p": "cuda", "multicast": "cuda", "nccl": "cuda", "gloo": "cpu"}
    needs |= {"emulator": "cpu", "emulator-multicast": "cpu"}
    if requested in needs and needs[requested] != device:
        raise TransportError(
            f"init_workspace: transport {requested!r} serves {needs[requested]} tensors, but this group's are on "
            f"{device}; pass transport='auto'."
        )
    if requested == "multicast" and not all(fact.multicast for fact in facts):
        raise TransportError("init_workspace: NVLink multicast is not available on every rank; pass transport='auto'.")
    if requested == "local" and len(facts) > 1:
        raise TransportError(f"init_workspace: transport 'local' is for one rank, the group has {len(facts)}.")


def _why_not_symmetric(facts: list[RankFacts]) -> str:
    hosts = len({fact.host for fact in facts})
    if hosts > 1:
        return f"the group spans {hosts} hosts"
    without = [str(rank) for rank, fact in enumerate(facts) if not fact.symmetric]
    if without:
        return f"no symmetric memory on rank(s) {', '.join(without)}"
    return "symmetric memory failed its check"

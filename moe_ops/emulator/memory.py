"""Memory that several CPU processes share, in place of torch symmetric memory.

Each rank makes one file in ``/dev/shm`` and maps those of all ranks. The names are unlinked as soon as
everybody has mapped them: only a process killed before that leaves its own behind. The multicast address is an
inaccessible mapping of the same size: it means something to the PTX machine only, and a plain access
to it faults.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import uuid

import torch
import torch.distributed as dist
from torch import Tensor

from moe_ops.symmetric import SymmetricBuffer
from moe_ops.transports import exchange, group_store

from . import machine

SHARED_FOLDER = "/dev/shm"
SETUP_TIMEOUT_S = 60.0


def allocate_shared(
    store: dist.Store, rank: int, world_size: int, nbytes: int, key: str, timeout_s: float = SETUP_TIMEOUT_S
) -> SymmetricBuffer:
    """``nbytes`` zeroed bytes on each of ``world_size`` ranks, mapped by all; collective over ``store``.

    ``key`` is unique to this allocation in ``store`` and the same on all ranks. Raises ``PeerTimeoutError``.
    """
    path = f"{SHARED_FOLDER}/moe_ep_{os.getpid()}_{uuid.uuid4().hex}"
    own = _create(path, nbytes)
    try:
        paths = exchange(store, "allocate", f"{key}/path", rank, world_size, path, timeout_s)
        maps = [own if peer == rank else _open(paths[peer], nbytes) for peer in range(world_size)]
        exchange(store, "allocate", f"{key}/mapped", rank, world_size, True, timeout_s)
    finally:
        os.unlink(path)
    return _as_buffer(maps, rank, nbytes)


def allocate_for_group(group: dist.ProcessGroup, nbytes: int, timeout_s: float) -> SymmetricBuffer:
    """``allocate_shared`` over the store that ``group``'s ranks met at.

    Allocations are collective, so their number, kept in the store, is the same on all ranks.
    """
    store, rank, prefix = group_store(group), group.rank(), f"moe_ep/emulator/{group.group_name}"
    number = store.add(f"{prefix}/allocations/{rank}", 1)
    return allocate_shared(store, rank, group.size(), nbytes, f"{prefix}/{number}", timeout_s)


def _create(path: str, nbytes: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        os.ftruncate(descriptor, nbytes)
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _open(path: str, nbytes: int) -> mmap.mmap:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return mmap.mmap(descriptor, nbytes)
    finally:
        os.close(descriptor)


def _as_buffer(maps: list[mmap.mmap], rank: int, nbytes: int) -> SymmetricBuffer:
    tensors: list[Tensor] = [torch.frombuffer(entry, dtype=torch.uint8) for entry in maps]
    addresses = [tensor.data_ptr() for tensor in tensors]
    reserved = mmap.mmap(-1, nbytes, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    view = ctypes.c_char.from_buffer(reserved)
    multicast = ctypes.addressof(view)
    _forbid_access(multicast, nbytes)
    machine.add_multicast_range(multicast, nbytes, addresses)
    keep_alive = (tensors, reserved, view)

    def release() -> None:
        nonlocal keep_alive
        machine.remove_multicast_range(multicast)
        keep_alive = ()

    return SymmetricBuffer(tensors[rank], torch.tensor(addresses, dtype=torch.int64), multicast, release)


def _forbid_access(address: int, nbytes: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), 0) != 0:
        raise OSError(ctypes.get_errno(), "mprotect failed")

"""The letters of every docstring, and the checks that an op's implementation and its fake share.

Legend
------
``T``    rows of this rank's batch (capacity, static)
``t``    live rows of this rank, ``0 <= t <= T`` (on the device, may change at every replay)
``W``    ranks of the group
``M``    rows of the gathered batch (static), ``M >= W * max T``
``K``    experts per token
``E``    experts of the layer, over all ranks
``E_l``  experts on this rank
``H``    hidden size
``I``    intermediate size of one expert
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from .errors import DeviceError, DtypeError, ShapeError

INDEX_DTYPES = (torch.int32, torch.int64)
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_DTYPES = (torch.bfloat16, torch.float16)
CPU_HIDDEN_DTYPES = (*HALF_DTYPES, torch.float32)

BLOCK_SIZES = (16, 32, 64, 128, 256)
CHUNK_BYTES = 16  # one access of a thread on the wire


def align_up(value: int, multiple: int) -> int:
    """Smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


def check_dtype(op: str, name: str, tensor: Tensor, allowed: Iterable[torch.dtype]) -> None:
    """Raise ``DtypeError`` unless ``tensor`` has one of the ``allowed`` dtypes."""
    allowed = tuple(allowed)
    if tensor.dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        raise DtypeError(f"{op}: {name} is {tensor.dtype}; convert it to one of {names}.")


def check_hidden_dtype(op: str, name: str, tensor: Tensor) -> None:
    """Hidden states and weights: bf16 or fp16 everywhere, fp32 on the CPU too."""
    allowed = CPU_HIDDEN_DTYPES if tensor.device.type in ("cpu", "meta") else HALF_DTYPES
    check_dtype(op, name, tensor, allowed)


def check_rank(op: str, name: str, tensor: Tensor, ndim: int, letters: str) -> None:
    """Raise ``ShapeError`` unless ``tensor`` has ``ndim`` dimensions, which ``letters`` names."""
    if tensor.dim() != ndim:
        raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}; pass a tensor of shape {letters}.")


def check_scalar_count(op: str, name: str, tensor: Tensor) -> None:
    """A live count: one int32 element on the device (a view such as ``metadata[0:1]`` is fine)."""
    check_dtype(op, name, tensor, (torch.int32,))
    if tensor.numel() != 1:
        raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}; pass one int32 element.")


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ``DeviceError`` unless all given tensors live on one device."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        listing = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise DeviceError(f"{op}: tensors on different devices ({listing}); move them to one.")


def check_topk(op: str, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> None:
    """``hidden (rows, H)``, ``topk_ids (rows, K)``, ``topk_weights (rows, K)`` with the contract's dtypes."""
    check_rank(op, "hidden", hidden, 2, "(rows, H)")
    check_rank(op, "topk_ids", topk_ids, 2, "(rows, K)")
    check_hidden_dtype(op, "hidden", hidden)
    check_dtype(op, "topk_ids", topk_ids, INDEX_DTYPES)
    check_dtype(op, "topk_weights", topk_weights, WEIGHT_DTYPES)
    if topk_weights.shape != topk_ids.shape:
        raise ShapeError(
            f"{op}: topk_ids {tuple(topk_ids.shape)} and topk_weights {tuple(topk_weights.shape)} differ; "
            "pass one weight for each id."
        )
    if topk_ids.shape[0] != hidden.shape[0]:
        raise ShapeError(
            f"{op}: hidden has {hidden.shape[0]} rows and topk_ids {topk_ids.shape[0]}; pass one row of ids a token."
        )

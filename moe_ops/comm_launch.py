"""Grids of the communication kernels, and the views of tensors that they take."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from .buffers import SymmetricTensors
from .shapes import CHUNK_BYTES, align_up
from .symmetric import Channel

TABLE = Path(__file__).parent / "tables" / "comm.json"
WARP = 32


class Launch(NamedTuple):
    """``blocks`` programs of ``warps`` warps; each takes ``chunks`` (N >= 32 * warps) chunks of a row at once.

    At most ``symmetric.MAX_BLOCKS``. More blocks than fit on the GPU at once are fine, as they start in order: one's
    copies then run beside another's wait.
    """

    blocks: int
    warps: int
    chunks: int


_EMULATED = Launch(blocks=2, warps=1, chunks=32)  # the interpreter runs programs one by one: as few as show the order


@cache
def _table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


def choose_launch(op: str, rows: int, channel: Channel) -> Launch:
    """The launch for ``rows`` (M, static): from values that every rank shares, never from T.

    Takes the first entry of ``tables/comm.json`` for this number of ranks (or the next smaller one that was tuned)
    whose ``max_bytes`` holds the batch; the table says where it comes from.
    """
    if channel.state.device.type != "cuda":
        return _EMULATED
    total = rows * channel.layout.hidden_row
    assert total < 2**31 * CHUNK_BYTES, f"{total} bytes in one call: units are counted in int32"
    tuned = [int(ranks) for ranks in _table() if ranks.isdigit()]
    ranks = max((count for count in tuned if count <= channel.world_size), default=min(tuned))
    entry = next(e for e in _table()[str(ranks)][op] if e["max_bytes"] is None or total <= e["max_bytes"])
    return Launch(entry["blocks"], entry["warps"], entry["chunks"])


def routed_ids(channel: Channel, top_k: int, experts_per_rank: int) -> int:
    """Lanes for the K ids of a row where rows should travel to and from ranks with an expert for them only; else 0.

    That pays where a rank has none for one row in twenty: (1 - 1/W)^K >= 5%. A multicast store reaches every rank.
    """
    if experts_per_rank == 0 or top_k == 0 or channel.multicast or (1 - 1 / channel.world_size) ** top_k < 0.05:
        return 0
    return 1 << (top_k - 1).bit_length()


def rows_of(tensor: Tensor) -> tuple:
    """``tensor`` (2-D) as ``chunks.Rows``."""
    from .chunks import Rows

    size = tensor.element_size()
    return Rows(tensor, tensor.stride(0) * size, tensor.stride(1) * size, tensor.shape[1])


def place_of(op: str, name: str, tensor: Tensor, buffers: SymmetricTensors) -> tuple:
    """``tensor`` (2-D, symmetric memory) as ``chunks.Place``; raises ``SymmetricMemoryError``."""
    from .chunks import Place

    memory, offset = buffers.find(op, name, tensor)
    row_stride = align_up(tensor.shape[1] * tensor.element_size(), CHUNK_BYTES)
    return Place(tensor, memory.peer_ptrs, memory.multicast_ptr, offset, row_stride, tensor.shape[1])


def is_aligned(tensor: Tensor) -> bool:
    """Whether every 16-byte chunk of a row is 16 aligned bytes of memory."""
    size = tensor.element_size()
    return (
        (tensor.stride(1) == 1 or tensor.shape[1] == 1)
        and tensor.data_ptr() % CHUNK_BYTES == 0
        and tensor.stride(0) * size % CHUNK_BYTES == 0
        and tensor.shape[1] * size % CHUNK_BYTES == 0
    )

"""Symmetric memory that callers hold: what the zero-copy ops write to, and read from, on every rank.

``Workspace.empty`` gives a tensor whose rows peers can reach; the workspace remembers it by its addresses. It is
collective: all ranks of the group call it in the same order with the same sizes, so that one offset holds on all of
them. A row starts at a multiple of 16 bytes and is padded to whole chunks; the padding may be overwritten.

``Workspace.layer_batch`` and ``Workspace.layer_output`` are the two buffers of ops that dispatch, compute and combine
in strict turn (docs/protocol.md, "Buffers of callers"): one pair serves every layer and every graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import SymmetricMemoryError, WorkspaceError
from .reference import Batch
from .shapes import CHUNK_BYTES, INDEX_DTYPES, WEIGHT_DTYPES, align_up, check_dtype
from .symmetric import REGION_ALIGNMENT, Layout, SymmetricBuffer


class Segment(NamedTuple):
    """One allocation, and the name under which the workspace's memory table lists it."""

    name: str
    buffer: SymmetricBuffer

    @property
    def start(self) -> int:
        return self.buffer.local.data_ptr()

    @property
    def nbytes(self) -> int:
        return self.buffer.local.numel()


@dataclass
class SymmetricTensors:
    """The symmetric memory of one group that tensors lie in. ``allocate(nbytes)``: zeroed bytes; collective."""

    layout: Layout
    allocate: Callable[[int], SymmetricBuffer]
    segments: list[Segment] = field(default_factory=list)

    def empty(self, rows: int, columns: int, dtype: torch.dtype, name: str = "callers") -> Tensor:
        """``(rows, columns)`` of zeros, rows padded to whole chunks; collective."""
        nbytes = align_up(max(rows * _row_bytes(columns, dtype), 1), REGION_ALIGNMENT)
        segment = self._add(name, nbytes)
        return _rows(segment.buffer.local, 0, rows, columns, dtype)

    def layer_batch(self, max_tokens: int, ids: torch.dtype, weights: torch.dtype) -> Batch:
        """hidden ``(M', H)``, ids and weights ``(M', K)`` with ``M' = min(max_tokens, W * max_tokens_per_rank)``."""
        check_dtype("layer_batch", "ids", torch.empty(0, dtype=ids), INDEX_DTYPES)
        check_dtype("layer_batch", "weights", torch.empty(0, dtype=weights), WEIGHT_DTYPES)
        layout, rows = self.layout, min(max_tokens, self.layout.capacity)
        local = self._named("layer batch", layout.capacity * layout.dispatch_row).buffer.local
        ids_at = layout.capacity * layout.hidden_row
        weights_at = ids_at + layout.capacity * _row_bytes(layout.top_k, torch.int64)
        return Batch(
            _rows(local, 0, rows, layout.hidden_size, layout.dtype),
            _rows(local, ids_at, rows, layout.top_k, ids),
            _rows(local, weights_at, rows, layout.top_k, weights),
        )

    def layer_output(self, max_tokens: int) -> Tensor:
        """``(M', H)`` in the workspace's dtype, for the experts' output."""
        layout = self.layout
        local = self._named("layer output", layout.capacity * layout.hidden_row).buffer.local
        return _rows(local, 0, min(max_tokens, layout.capacity), layout.hidden_size, layout.dtype)

    def find(self, op: str, name: str, tensor: Tensor) -> tuple[SymmetricBuffer, int]:
        """The allocation that holds ``tensor``'s rows, and the bytes before its first row."""
        row = _row_bytes(tensor.shape[1], tensor.dtype)
        at, end = tensor.data_ptr(), tensor.data_ptr() + max(tensor.shape[0], 1) * row
        for segment in self.segments:
            if segment.start <= at and end <= segment.start + segment.nbytes:
                self._check_rows(op, name, tensor, row)
                return segment.buffer, at - segment.start
        raise SymmetricMemoryError(
            f"{op}: {name} of shape {tuple(tensor.shape)} is no symmetric memory of this group, so that other ranks "
            "cannot reach it; pass a tensor of workspace.empty(rows, columns, dtype), or leading rows of one."
        )

    def memory(self) -> list[tuple[str, int, bool]]:
        """``(name, bytes, allocated)`` of the layer buffers, allocated or not, and of callers' tensors."""
        layout = self.layout
        planned = {
            "layer batch": layout.capacity * layout.dispatch_row,
            "layer output": layout.capacity * layout.hidden_row,
        }
        have = {segment.name for segment in self.segments}
        listed = [(name, align_up(nbytes, REGION_ALIGNMENT), name in have) for name, nbytes in planned.items()]
        callers = sum(segment.nbytes for segment in self.segments if segment.name not in planned)
        return listed + ([("callers", callers, True)] if callers else [])

    def release(self) -> None:
        """Forget all tensors. No kernel that uses one may be running, on any rank."""
        for segment in self.segments:
            if segment.buffer.release is not None:
                segment.buffer.release()
        self.segments.clear()

    def _named(self, name: str, nbytes: int) -> Segment:
        known = next((segment for segment in self.segments if segment.name == name), None)
        return known or self._add(name, align_up(nbytes, REGION_ALIGNMENT))

    def _add(self, name: str, nbytes: int) -> Segment:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise WorkspaceError(f"symmetric memory ({name}) cannot be allocated during graph capture; do so before.")
        segment = Segment(name, self.allocate(nbytes))
        self.segments.append(segment)
        return segment

    @staticmethod
    def _check_rows(op: str, name: str, tensor: Tensor, row: int) -> None:
        packed = tensor.shape[0] <= 1 or tensor.stride(0) * tensor.element_size() == row
        if not (packed and (tensor.stride(1) == 1 or tensor.shape[1] == 1) and tensor.data_ptr() % CHUNK_BYTES == 0):
            raise SymmetricMemoryError(
                f"{op}: {name} of shape {tuple(tensor.shape)} has strides {tensor.stride()}; pass rows as "
                "workspace.empty lays them out, or leading rows of such a tensor."
            )


def _row_bytes(columns: int, dtype: torch.dtype) -> int:
    return align_up(columns * dtype.itemsize, CHUNK_BYTES)


def _rows(memory: Tensor, at: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """``(rows, columns)`` in ``memory`` (uint8) from byte ``at`` on."""
    row = _row_bytes(columns, dtype)
    return memory[at : at + rows * row].view(dtype).view(rows, row // dtype.itemsize)[:, :columns]

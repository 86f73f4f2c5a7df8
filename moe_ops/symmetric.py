"""Where things lie in a workspace's symmetric memory, and what a kernel needs to find them.

All sizes and offsets follow from values that every rank shares, so one offset holds on all ranks.
docs/protocol.md says who writes and reads each region.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import CapacityError, MoeEpError, PeerTimeoutError
from .shapes import CHUNK_BYTES, align_up

MAX_RANKS = 32  # one warp signals all peers
MAX_BLOCKS = 1024  # of one launch; each has its own signal words
REGION_ALIGNMENT = 128

OP_CODES = {
    "metadata_update": 1,
    "agv_dispatch": 2,
    "rsv_combine": 3,
    "agv_dispatch_into": 4,
    "rsv_combine_from": 5,
}
KIND_TIMEOUT, KIND_CAPACITY, KIND_ABORTED = 1, 2, 3
RECORD_WORDS = 4


@dataclass(frozen=True)
class Layout:
    """Byte offsets of the regions of one symmetric buffer (``docs/protocol.md``).

    ``dispatch_row`` counts the widest row on the wire: hidden, then K int64 ids, then K fp32 weights,
    each padded to whole 16-byte chunks.
    """

    world_size: int
    max_tokens_per_rank: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype

    @property
    def capacity(self) -> int:
        """Rows of one slot: ``W * max_tokens_per_rank``."""
        return self.world_size * self.max_tokens_per_rank

    @property
    def hidden_row(self) -> int:
        """Bytes of one hidden row on the wire."""
        return align_up(self.hidden_size * self.dtype.itemsize, CHUNK_BYTES)

    @property
    def dispatch_row(self) -> int:
        """Bytes of one dispatched row on the wire, at most."""
        return self.hidden_row + align_up(8 * self.top_k, CHUNK_BYTES) + align_up(4 * self.top_k, CHUNK_BYTES)

    @property
    def signal_bytes(self) -> int:
        return 2 * MAX_BLOCKS * self.world_size * 8

    @property
    def dispatch_slot(self) -> int:
        """Bytes of one of the two dispatch slots."""
        return align_up(self.capacity * self.dispatch_row, REGION_ALIGNMENT)

    @property
    def combine_slot(self) -> int:
        """Bytes of one of the two combine slots."""
        return align_up(self.capacity * self.hidden_row, REGION_ALIGNMENT)

    @property
    def dispatch_offset(self) -> int:
        return align_up(self.signal_bytes, REGION_ALIGNMENT)

    @property
    def combine_offset(self) -> int:
        return self.dispatch_offset + 2 * self.dispatch_slot

    @property
    def nbytes(self) -> int:
        return self.combine_offset + 2 * self.combine_slot

    def regions(self) -> list[tuple[str, int]]:
        """``(name, bytes)`` of all regions, in order: the workspace's memory report."""
        return [
            ("signals", self.signal_bytes),
            ("dispatch", 2 * self.dispatch_slot),
            ("combine", 2 * self.combine_slot),
        ]


@dataclass
class SymmetricBuffer:
    """One allocation that every rank of a group can address.

    ``local``: (nbytes,) uint8, this rank's memory. ``peer_ptrs``: (W,) int64 on the op's device, the
    buffer's address on every rank as seen from here. ``multicast_ptr``: one address for all of them, or 0.
    ``release`` frees what lies behind the addresses, where that is more than dropping ``local``.
    """

    local: Tensor
    peer_ptrs: Tensor
    multicast_ptr: int = 0
    release: Callable[[], None] | None = None


@dataclass(frozen=True)
class Failure:
    """What stopped a workspace's kernels. ``kind``: ``"timeout"``, ``"capacity"`` or ``"aborted"``.

    timeout: ``ranks`` did not arrive (seen here, or reported by a rank that gave up). capacity: ``rows``
    of ``ranks`` exceed ``limit``. aborted: ``ranks`` gave up for a reason of their own (a capacity, there).
    """

    kind: str
    op: str
    epoch: int
    ranks: list[int]
    rows: int = 0
    limit: int = 0

    def as_error(self, timeout_s: float) -> MoeEpError:
        """The exception that tells the user."""
        if self.kind == "timeout":
            return PeerTimeoutError(self.op, self.epoch, self.ranks, timeout_s)
        ranks = ", ".join(map(str, self.ranks)) or "unknown"
        if self.kind == "aborted":
            return CapacityError(
                f"{self.op}: rank(s) {ranks} gave up at communication call {self.epoch} because of too many rows "
                "there; see the error on those ranks, then call workspace.reset() on every rank."
            )
        return CapacityError(
            f"{self.op}: {self.rows} live rows on rank(s) {ranks} exceed the limit of {self.limit}; pass fewer rows, "
            "or larger tensors and a larger max_tokens_per_rank to init_workspace, and call workspace.reset() on every "
            "rank."
        )


@dataclass
class Channel:
    """All that a launcher needs of a workspace whose transport runs the kernels.

    ``state``: (1 + MAX_BLOCKS,) int64 on the device: ``[poison, epoch of block 0, epoch of block 1, ...]``.
    ``record``: (RECORD_WORDS,) int64, readable by the host at any time (pinned on CUDA), all 0 until a
    failure: ``[kind | op << 8, epoch, mask of ranks, rows << 32 | limit]``.
    """

    rank: int
    world_size: int
    layout: Layout
    buffer: SymmetricBuffer
    state: Tensor
    record: Tensor
    timeout_ns: int
    multicast: bool

    def peers(self) -> tuple:
        """The kernels' first argument (``barrier.Peers``)."""
        from .barrier import Peers  # device code: imported when a kernel is about to run

        return Peers(
            table=self.buffer.peer_ptrs,
            multicast=self.buffer.multicast_ptr,
            state=self.state,
            record=self.record.data_ptr(),
            timeout=self.timeout_ns,
            rank=self.rank,
        )

    def close(self) -> None:
        """Let go of the memory. No kernel that uses it may be running, on any rank."""
        if self.buffer.release is not None:
            self.buffer.release()


def make_channel(
    *, rank: int, layout: Layout, buffer: SymmetricBuffer, timeout_s: float, multicast: bool, epoch: int = 0
) -> Channel:
    """A channel over a fresh ``buffer``. The caller makes all ranks meet (on the host) before the first op."""
    device = buffer.local.device
    record = torch.zeros(RECORD_WORDS, dtype=torch.int64, pin_memory=device.type == "cuda")
    state = torch.zeros(1 + MAX_BLOCKS, dtype=torch.int64, device=device)
    channel = Channel(
        rank, layout.world_size, layout, buffer, state, record, int(timeout_s * 1e9), multicast
    )  # fmt: skip
    reset(channel, epoch)
    return channel


def reset(channel: Channel, epoch: int = 0) -> None:
    """Forget a failure and start counting at ``epoch``.

    No kernel of the group may be running, on any rank, and all ranks must meet (on the host) before
    and after: this rewrites the words that peers write.
    """
    channel.record.zero_()
    channel.state.fill_(epoch)
    channel.state[:1].zero_()
    tag = epoch % (1 << 31)  # what a rank that has not arrived left; the next bit means that it gave up
    words = channel.buffer.local[: channel.layout.signal_bytes].view(torch.int64)
    words.fill_(tag << 32)
    if channel.state.is_cuda:
        torch.cuda.synchronize(channel.state.device)


def read_record(record: Tensor) -> Failure | None:
    """What a channel's ``record`` says, or None while nothing has failed. Never synchronises the device."""
    header, epoch, mask, amounts = record.tolist()
    if header == 0:
        return None
    kinds = {KIND_TIMEOUT: "timeout", KIND_CAPACITY: "capacity", KIND_ABORTED: "aborted"}
    ops = {code: name for name, code in OP_CODES.items()}
    ranks = [rank for rank in range(MAX_RANKS) if mask >> rank & 1]
    return Failure(kinds[header & 0xFF], ops[header >> 8], epoch, ranks, amounts >> 32, amounts & 0xFFFFFFFF)

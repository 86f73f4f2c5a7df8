"""Device code: asking L2 for weights that the next launches will read, while this one waits for peers.

A hint: nothing is read, written or waited for. Asked for is what this rank's own rows name, so that dispatch knows it.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .ptx import prefetch_l2

PIECE = 4096  # bytes of one request
_PIECE = tl.constexpr(PIECE)


class Ahead(NamedTuple):
    """The first projection's weights of this rank's experts, and how much of them to ask for."""

    weights: object  # tensor, contiguous, experts outermost
    expert_start: int
    num_experts: int
    pieces: int  # of one expert
    most: int  # pieces in all


@triton.jit
def load_own_ids(ids, rows, LANES: tl.constexpr):
    """The first LANES ids of this rank's ``rows`` rows (int64), row by row, -1 behind them; ``ids``: ``chunks.Rows``."""
    lanes = tl.arange(0, LANES)
    row, slot = (lanes // ids.length).to(tl.int64), lanes % ids.length
    address = ids.data.to(tl.int64) + row * ids.row_stride + slot.to(tl.int64) * ids.element_stride
    pointer = address.to(tl.pointer_type(ids.data.dtype.element_ty))
    return tl.load(pointer, mask=row < rows, other=-1).to(tl.int64)


@triton.jit
def ask_for_experts(ids, live, ahead, LANES: tl.constexpr, THREADS: tl.constexpr):
    """Ask for the experts that the first ``live`` of ``ids (LANES,)`` name, in the order of experts, up to ``most`` pieces.

    Programs and their THREADS share the pieces, one a thread. Example: experts 4 to 7 here, ids [9, 6, 4, 6], live 4, two pieces an
    expert, at most three: both pieces of expert 4, then the first one of expert 6.
    """
    local = (ids >= ahead.expert_start) & (ids < ahead.expert_start + ahead.num_experts)
    local = local & (tl.arange(0, LANES) < live)
    experts = tl.where(local, ids - ahead.expert_start, ahead.num_experts).to(tl.int32)
    threads = tl.arange(0, THREADS)
    first, programs = tl.program_id(0), tl.num_programs(0)
    base = ahead.weights.to(tl.int64)
    left = ahead.most
    expert = tl.min(experts, axis=0)
    while (expert < ahead.num_experts) & (left > 0):
        pieces = tl.minimum(ahead.pieces, left)
        piece = expert.to(tl.int64) * ahead.pieces + first + threads * programs
        count = (pieces - first + programs - 1) // programs
        prefetch_l2(base + piece * _PIECE, threads * 0 + _PIECE, threads * 0 + count)
        left -= pieces
        expert = tl.min(tl.where(experts > expert, experts, ahead.num_experts), axis=0)

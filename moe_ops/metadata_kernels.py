"""Device code of ``metadata_update``: the count of every rank travels inside the barrier's word."""

import triton
import triton.language as tl

from .barrier import check_capacity, enter, leave, signal, wait
from .ptx import LANES
from .symmetric import OP_CODES

_OP = tl.constexpr(OP_CODES["metadata_update"])


@triton.jit
def _metadata_kernel(peers, local_tokens_ptr, out_ptr, rank_capacity, W: tl.constexpr):
    """``out = [sum of t, sum of t over lower ranks, largest t]``. Grid: one program, one warp.

    Example: counts 3, 0, 5 on ranks 0, 1, 2; rank 2 gets ``[8, 3, 5]``.
    """
    lanes = tl.arange(0, LANES)
    count = tl.maximum(tl.load(local_tokens_ptr), 0)
    call = enter(peers, W, LANES)
    signal(peers, call, count, W, False, RELEASE=False)  # all there is to say lies in the word
    payloads, ok = wait(peers, call, _OP, W, False, ACQUIRE=False)
    counts = tl.where((lanes < W) & ok, payloads, 0).to(tl.int32)
    largest = tl.max(counts, axis=0)
    over = tl.where(counts > rank_capacity, (lanes * 0 + 1).to(tl.int64) << lanes.to(tl.int64), 0)
    check_capacity(peers, call, _OP, largest, rank_capacity, tl.sum(over, axis=0))
    tl.store(out_ptr, tl.sum(counts, axis=0))
    tl.store(out_ptr + 1, tl.sum(tl.where(lanes < peers.rank, counts, 0), axis=0))
    tl.store(out_ptr + 2, largest)
    leave(peers, call)

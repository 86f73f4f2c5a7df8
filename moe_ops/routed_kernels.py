"""Device code: which ranks have an expert for a row, so that the row travels to and from no others.

Only where the caller promises that expert ``e`` lies on rank ``e // experts_per_rank``.
"""

import triton
import triton.language as tl


@triton.jit
def _unite(a, b):
    return a | b


@triton.jit
def ranks_of(ids, row, end, experts_per_rank, K: tl.constexpr):
    """Bit r (int32): one of the row's experts is rank r's; 0 for rows from ``end`` on. ``ids``: ``chunks.Rows``.

    K: a power of two, at least the ids of a row. Example: 4 experts a rank, ids [1, 9, -1] gives 0b101.
    """
    lanes = tl.arange(0, K)
    address = ids.data.to(tl.int64) + row * ids.row_stride + lanes.to(tl.int64) * ids.element_stride
    pointer = address.to(tl.pointer_type(ids.data.dtype.element_ty))
    found = tl.load(pointer, mask=lanes < tl.where(row < end, ids.length, 0), other=-1)
    owner = tl.maximum(found, 0).to(tl.int32) // experts_per_rank
    return tl.reduce(tl.where(found >= 0, (lanes * 0 + 1) << owner, 0), 0, _unite)


@triton.jit
def has_rank(ranks, rank):
    """Whether bit ``rank`` of ``ranks`` is set."""
    return ((ranks >> rank) & 1) != 0

"""Device code that ``fused_moe`` for few and for many rows shares: one expert's tile of either projection."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rows_times_weights(
    x_ptr, row_offsets, row_mask, w_ptr, cols, num_cols, depth, w_stride,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
):  # fmt: skip
    """``(BLOCK_M, BLOCK_N)`` fp32: gathered rows of x times columns ``cols`` of one expert's matrix.

    ``w_stride`` is the matrix' row stride: ``depth`` as stored by default, ``num_cols`` when transposed.
    """
    ks = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + row_offsets[:, None] + ks[None, :]
    live = cols < num_cols
    if TRANSPOSED:
        w_ptrs = w_ptr + ks[:, None].to(tl.int64) * w_stride + cols[None, :]
    else:
        w_ptrs = w_ptr + cols[None, :].to(tl.int64) * w_stride + ks[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if EVEN_K:
            x = tl.load(x_ptrs, mask=row_mask[:, None], other=0.0)
            w = tl.load(w_ptrs, mask=live[None, :], other=0.0, eviction_policy="evict_first")
        else:
            inside = ks < depth - k
            x = tl.load(x_ptrs, mask=row_mask[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=live[None, :] & inside[:, None], other=0.0, eviction_policy="evict_first")
        acc = tl.dot(x, w, acc)
        x_ptrs += BLOCK_K
        if TRANSPOSED:
            w_ptrs += tl.cast(w_stride, tl.int64) * BLOCK_K
        else:
            w_ptrs += BLOCK_K
    return acc


@triton.jit
def gated_columns(tile, inner, BLOCK_I: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Columns of gate_up that ``split_gate`` takes apart again, and a bound that masks the tail.

    Interleaved: ``2i, 2i+1, ...``. Otherwise BLOCK_I columns of gate, then those of up. Columns past
    the end are moved to ``2 * inner``, which no mask lets through.
    """
    if not GATED:
        return tile * BLOCK_I + tl.arange(0, BLOCK_I), inner
    else:
        at = tl.arange(0, 2 * BLOCK_I)
        if INTERLEAVED:
            return 2 * tile * BLOCK_I + at, 2 * inner
        else:
            col = tile * BLOCK_I + at % BLOCK_I
            return tl.where(col < inner, col + (at // BLOCK_I) * inner, 2 * inner), 2 * inner


@triton.jit
def split_gate(acc, BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, INTERLEAVED: tl.constexpr):
    """``(BLOCK_M, 2 * BLOCK_I)`` to gate and up, each ``(BLOCK_M, BLOCK_I)``."""
    if INTERLEAVED:
        return tl.split(tl.reshape(acc, (BLOCK_M, BLOCK_I, 2)))
    else:
        return tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_I)), (0, 2, 1)))


@triton.jit
def pointwise(x, ACT: tl.constexpr):
    """One of ``activations.ACTIVATIONS`` that needs no ``up``, in fp32."""
    if ACT == "silu":
        return x * tl.sigmoid(x)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return x * tl.sigmoid(2.0 * inner)  # 0.5 * (1 + tanh(y)) = sigmoid(2y)
    else:
        tl.static_assert(ACT == "relu2")
        positive = tl.maximum(x, 0.0)
        return positive * positive


@triton.jit
def activate(gate, up, alpha, limit, ACT: tl.constexpr, HAS_LIMIT: tl.constexpr):
    """``act(gate) * up`` with ``activations``' meaning of alpha and limit, in fp32."""
    if HAS_LIMIT:
        limit = tl.cast(limit, tl.float32)
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    if ACT == "swiglu_oai":
        return (up + 1.0) * gate * tl.sigmoid(gate * tl.cast(alpha, tl.float32))
    else:
        return pointwise(gate, ACT) * up


@triton.jit
def rows_times_box(
    x_ptr, row_offsets, row_mask, w_desc, expert, at, depth,
    PARTS: tl.constexpr, TRANSPOSED: tl.constexpr, SWAP: tl.constexpr, BOX_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``rows_times_weights`` with the weights brought by bulk copies, which zero-fill past the edges of a matrix.

    ``w_desc`` is four-dimensional, ``(E_l, PARTS, cols, depth)`` or transposed ``(E_l, depth, PARTS, cols)``; a box
    holds BLOCK_N columns, ``BLOCK_N / PARTS`` of each part from column ``at`` on. SWAP makes the weights the left
    operand, so that the tensor cores' minimum of 64 rows is met by them and not by padding tokens. BOX_ROWS: the rows
    come by bulk copies, too; ``x_ptr`` is then their two-dimensional descriptor and ``row_offsets`` the first row.
    """
    ks = tl.arange(0, BLOCK_K)
    if not BOX_ROWS:
        x_ptrs = x_ptr + row_offsets[:, None] + ks[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, depth, BLOCK_K):
        if BOX_ROWS:
            x = x_ptr.load([row_offsets, k])
        else:
            mask = row_mask[:, None] if EVEN_K else row_mask[:, None] & (ks < depth - k)[None, :]
            x = tl.load(x_ptrs, mask=mask, other=0.0)
            x_ptrs += BLOCK_K
        if TRANSPOSED:
            w = w_desc.load([expert, k, 0, at]).reshape(BLOCK_K, BLOCK_N)
        else:
            w = w_desc.load([expert, 0, at, k]).reshape(BLOCK_N, BLOCK_K).T
        acc = tl.dot(w.T, x.T, acc) if SWAP else tl.dot(x, w, acc)
    return acc.T if SWAP else acc


@triton.jit
def gate_up_tile(
    x_ptr, row_offsets, row_mask, w, bias_ptr, expert, tile, hidden, inner, alpha, limit,
    ACT: tl.constexpr, GATED: tl.constexpr, TRANSPOSED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_LIMIT: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """``(BLOCK_M, BLOCK_I)`` fp32: act(rows @ gate_up + bias) for columns ``tile * BLOCK_I ...`` of one expert.

    ``w`` is the tensor, or with TMA its descriptor (see ``rows_times_box``).
    """
    WIDTH: tl.constexpr = 2 * BLOCK_I if GATED else BLOCK_I
    PARTS: tl.constexpr = 2 if GATED and not INTERLEAVED else 1
    cols, num_cols = gated_columns(tile, inner, BLOCK_I, GATED, INTERLEAVED)
    if TMA:
        acc = rows_times_box(
            x_ptr, row_offsets, row_mask, w, expert, tile * (WIDTH // PARTS), hidden,
            PARTS, TRANSPOSED, SWAP, False, BLOCK_M, WIDTH, BLOCK_K, EVEN_K,
        )  # fmt: skip
    else:
        w_stride = num_cols if TRANSPOSED else hidden
        acc = rows_times_weights(
            x_ptr, row_offsets, row_mask, w + expert.to(tl.int64) * hidden * num_cols, cols, num_cols, hidden,
            w_stride, TRANSPOSED, BLOCK_M, WIDTH, BLOCK_K, EVEN_K,
        )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * num_cols + cols, mask=cols < num_cols, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if GATED:
        gate, up = split_gate(acc, BLOCK_M, BLOCK_I, INTERLEAVED)
        return activate(gate, up, alpha, limit, ACT, HAS_LIMIT)
    else:
        return pointwise(acc, ACT)


@triton.jit
def down_tile(
    x_ptr, row_offsets, row_mask, w, bias_ptr, expert, tile, hidden, inner,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr, TMA: tl.constexpr, SWAP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_K: tl.constexpr,
    BOX_ROWS: tl.constexpr = False,
):  # fmt: skip
    """``(BLOCK_M, BLOCK_H)`` fp32: rows @ down + bias for columns ``tile * BLOCK_H ...`` of one expert."""
    cols = tile * BLOCK_H + tl.arange(0, BLOCK_H)
    if TMA:
        acc = rows_times_box(
            x_ptr, row_offsets, row_mask, w, expert, tile * BLOCK_H, inner,
            1, TRANSPOSED, SWAP, BOX_ROWS, BLOCK_M, BLOCK_H, BLOCK_K, EVEN_K,
        )  # fmt: skip
    else:
        w_stride = hidden if TRANSPOSED else inner
        acc = rows_times_weights(
            x_ptr, row_offsets, row_mask, w + expert.to(tl.int64) * hidden * inner, cols, hidden, inner, w_stride,
            TRANSPOSED, BLOCK_M, BLOCK_H, BLOCK_K, EVEN_K,
        )  # fmt: skip
    if HAS_BIAS:
        bias = tl.load(bias_ptr + expert * hidden + cols, mask=cols < hidden, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def store_tile(out_ptr, out_rows, row_mask, tile, width, acc, BLOCK_N: tl.constexpr, KEEP: tl.constexpr):
    """Round once and store a tile; ``out_rows`` int64 row numbers of a contiguous ``(*, width)`` tensor.

    KEEP: L2 is to evict other lines first.
    """
    policy: tl.constexpr = "evict_last" if KEEP else ""
    cols = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row_mask[:, None] & (cols < width)[None, :]
    where = out_ptr + out_rows[:, None] * width + cols[None, :]
    tl.store(where, acc.to(out_ptr.dtype.element_ty), mask=mask, eviction_policy=policy)

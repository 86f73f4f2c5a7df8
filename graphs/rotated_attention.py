"""``rotate_and_attend``: what a decode step does between its projections, in the one launch of its attention.

Query and key of the new token are normalised (where the model does that) and rotated by their position, key and value
are written into the cache, and the query attends to it. ``lowering/join_attention.py`` puts the op in the place of the
pointwise work, the two cache writes and ``decode_attention``; nothing else calls it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_ops.errors import ShapeError
from moe_ops.registration import register_op
from moe_ops.shapes import check_rank, check_same_device

from .attention_reference import check_attention, reference

_OP = "rotate_and_attend"


class NewToken(NamedTuple):
    """Arguments of the op: B sequences with one new token each, and their cache, of one dtype."""

    query: Tensor  # (B, heads, D), as the projection gave it
    key: Tensor  # (B, key heads, D), likewise
    value: Tensor  # (B, key heads, D_v)
    query_norm: Tensor | None  # (D,), weight of an RMSNorm over D; None: none
    key_norm: Tensor | None
    query_eps: float
    key_eps: float
    cos: Tensor  # (B, R): the first R of D columns turn, column c with column c + R / 2; the rest stays
    sin: Tensor
    keys: Tensor  # (B, key heads, L, D), written at columns
    values: Tensor  # (B, key heads, L, D_v), written at columns
    columns: Tensor  # (B,) int64, below L
    mask: Tensor  # (B, 1, 1, L) bool, columns to attend to, the new one among them if it is to be seen
    scale: float


def _check(token: NewToken) -> None:
    check_attention(_OP, token.query, token.keys, token.values, token.mask)
    check_rank(_OP, "cos", token.cos, 2, "(B, R)")
    tensors = {name: value for name, value in token._asdict().items() if isinstance(value, Tensor)}
    check_same_device(_OP, **tensors)
    batch, kv_heads, _, depth = token.keys.shape
    turned = token.cos.shape[1]
    shapes = {
        "key": (batch, kv_heads, depth), "value": (batch, kv_heads, token.values.shape[3]), "cos": (batch, turned),
        "sin": (batch, turned), "columns": (batch,), "query_norm": (depth,), "key_norm": (depth,),
    }  # fmt: skip
    for name, wanted in shapes.items():
        if name in tensors and tuple(tensors[name].shape) != wanted:
            raise ShapeError(f"{_OP}: {name} is {tuple(tensors[name].shape)}; pass {wanted}.")
    if turned % 2 or turned > depth:
        raise ShapeError(f"{_OP}: {turned} of {depth} columns cannot be rotated; pass cos of an even width <= {depth}.")


def _fake(*args: object) -> Tensor:
    token = NewToken(*args)  # type: ignore[arg-type]
    _check(token)
    return token.query.new_empty(*token.query.shape[:2], token.values.shape[3])


def prepared(x: Tensor, norm: Tensor | None, eps: float, cos: Tensor, sin: Tensor) -> Tensor:
    """``x (B, heads, D)`` normalised and rotated: fp32 throughout, rounded once to its own dtype."""
    turned = cos.shape[1]
    y = x.float()
    if norm is not None:
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * norm.float()
    first, second, rest = y.split((turned // 2, turned // 2, y.shape[-1] - turned), dim=-1)
    straight, across = torch.cat((first, second), -1), torch.cat((-second, first), -1)
    y = straight * cos.float()[:, None] + across * sin.float()[:, None]
    return torch.cat((y, rest), -1).to(x.dtype)


def _cpu(*args: object) -> Tensor:
    token = NewToken(*args)  # type: ignore[arg-type]
    _check(token)
    row, angles = torch.arange(len(token.columns), device=token.columns.device), (token.cos, token.sin)
    token.keys[row, :, token.columns] = prepared(token.key, token.key_norm, token.key_eps, *angles)
    token.values[row, :, token.columns] = token.value
    query = prepared(token.query, token.query_norm, token.query_eps, *angles)
    return reference(query, token.keys, token.values, token.mask[:, 0, 0], token.scale)


def _cuda(*args: object) -> Tensor:
    from .attention_launch import launch_with_new_token

    token = NewToken(*args)  # type: ignore[arg-type]
    _check(token)
    return launch_with_new_token(token)


rotate_and_attend = register_op(
    "rotate_and_attend(Tensor query, Tensor key, Tensor value, Tensor? query_norm, Tensor? key_norm, float query_eps, "
    "float key_eps, Tensor cos, Tensor sin, Tensor(a!) keys, Tensor(b!) values, Tensor columns, Tensor mask, "
    "float scale) -> Tensor",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip

"""FP8 and MXFP4 checkpoints, dequantised as they are read: the ops take bf16, fp16 or (on the CPU) fp32 weights.

A quantised tensor and its scales stand as one lazy tensor of the wanted dtype, so that all that follows (which
expert belongs to which rank, renaming, merging) sees an ordinary checkpoint, and experts of other ranks stay on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError, UnsupportedModelError

METHODS = ("fp8", "mxfp4")
FP8_BLOCK = (128, 128)
FP8_DTYPE = "F8_E4M3"
NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
FLOATS = {"BF16", "F16", "F32", "F64"}
INTEGERS = {"I64", "I32", "BOOL"}  # buffers that are numbers anyway, such as a router's hash table
# e2m1: sign, two bits of exponent, one of mantissa
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MXFP4_BIAS = 127  # of a scale, which is an exponent


class Dequantized:
    """A tensor on disk made of parts; ``[...]`` reads it, ``[a:b]`` rows of the first dimension of all parts."""

    def __init__(self, parts: tuple[Any, ...], shape: list[int], dtype: torch.dtype, compute: Callable[..., Tensor]):
        self._parts, self._shape, self._dtype, self._compute = parts, shape, dtype, compute

    def __getitem__(self, index: Any) -> Tensor:
        return self._compute(*(part[index] for part in self._parts), dtype=self._dtype)

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return NAMES[self._dtype]


def fp8_blocks(weight: Tensor, scale: Tensor, *, dtype: torch.dtype, block: tuple[int, int] = FP8_BLOCK) -> Tensor:
    """``weight (R, C)`` or ``(E, R, C)`` e4m3, times ``scale (..., R / block, C / block)`` or one number.

    The product is fp32, rounded once to ``dtype``.
    """
    out = torch.empty(weight.shape, dtype=dtype)
    if scale.numel() == 1:
        return out.copy_(weight.float() * scale.float())
    parts = [t[None] if t.dim() == 2 else t for t in (out, weight, scale)]
    for result, values, factors in zip(*parts):
        rows, cols = values.shape
        wide = factors.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :cols]
        result.copy_(values.float() * wide)
    return out


def mxfp4_blocks(blocks: Tensor, scales: Tensor, *, dtype: torch.dtype) -> Tensor:
    """``blocks (E, R, G, 16)`` bytes of two values, low half first, ``scales (E, R, G)`` -> ``(E, 32 * G, R)``.

    Transposed, as gpt-oss holds its experts. Every value fits bf16 exactly.
    """
    experts, rows, groups, half = blocks.shape
    table = torch.tensor(FP4_VALUES)
    out = torch.empty(experts, groups * half * 2, rows, dtype=dtype)
    for result, packed, exponents in zip(out, blocks, scales):
        pairs = torch.stack((table[(packed & 15).int()], table[(packed >> 4).int()]), dim=-1)  # [R, G, 16, 2]
        values = torch.ldexp(pairs.flatten(-2), exponents.int()[..., None] - MXFP4_BIAS)
        result.copy_(values.flatten(1).T)
    return out


def dequantized(tensors: dict[str, Any], method: str, dtype: torch.dtype, block: tuple[int, int]) -> dict[str, Any]:
    """The checkpoint ``tensors`` with every quantised tensor in ``dtype``, and without scales.

    Raises ``CheckpointError`` for a tensor whose scales are missing, ``UnsupportedModelError`` for other formats.
    """
    plain = _fp8(tensors, dtype, block) if method == "fp8" else _mxfp4(tensors, dtype)
    for key, stored in plain.items():
        if stored.get_dtype() not in FLOATS | INTEGERS:
            raise UnsupportedModelError(
                f"{key} is stored as {stored.get_dtype()}, which is not {method} as moe-ep reads it; save a "
                "dequantized copy with transformers and load that."
            )
    return plain


def _fp8(tensors: dict[str, Any], dtype: torch.dtype, block: tuple[int, int]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, stored in tensors.items():
        if key.endswith(("_scale_inv", ".input_scale", "activation_scale")):
            continue
        if stored.get_dtype() != FP8_DTYPE:
            out[key] = stored
            continue
        scale = tensors.get(f"{key}_scale_inv")
        if scale is None:
            raise CheckpointError(f"{key} is FP8 and has no {key}_scale_inv; pass a complete checkpoint.")
        shape = list(stored.get_shape())
        _check_scale(key, shape, list(scale.get_shape()), block)
        out[key] = Dequantized((stored, scale), shape, dtype, partial(fp8_blocks, block=block))
    return out


def _check_scale(key: str, shape: list[int], scale: list[int], block: tuple[int, int]) -> None:
    fits = [*shape[:-2], *(-(-size // part) for size, part in zip(shape[-2:], block))]
    if scale not in ([], [1], fits) or (len(shape) > 2 and scale != fits):
        raise CheckpointError(
            f"{key} of shape {shape} has scales of shape {scale}; blocks of {block[0]} x {block[1]} need {fits}."
        )


def _mxfp4(tensors: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, stored in tensors.items():
        stem, _, kind = key.rpartition("_")
        if kind == "blocks":
            scales = tensors.get(f"{stem}_scales")
            if scales is None:
                raise CheckpointError(f"{key} has no {stem}_scales; pass a complete checkpoint.")
            experts, rows, groups, half = stored.get_shape()
            out[stem] = Dequantized((stored, scales), [experts, groups * half * 2, rows], dtype, mxfp4_blocks)
        elif not (kind == "scales" and f"{stem}_blocks" in tensors):
            out[key] = stored
    return out

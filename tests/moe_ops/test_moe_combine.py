"""fused_moe_combine: bit-equal to fused_moe, rsv_combine and the ops behind it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_ops.errors import DtypeError, ShapeError

ops = torch.ops.moe_ep
M, T, H, K, E, I = 6, 4, 32, 2, 4, 16


def arguments(device: str = "cpu", dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "hidden": torch.randn(M, H, generator=generator).to(dtype),
        "topk_ids": torch.randint(-1, E, (M, K), generator=generator),
        "topk_weights": torch.rand(M, K, generator=generator),
        "gate_up": (torch.randn(E, 2 * I, H, generator=generator) / 4).to(dtype),
        "down": (torch.randn(E, H, I, generator=generator) / 4).to(dtype),
    }
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def scalars(device: str = "cpu") -> tuple[Tensor, Tensor]:
    count = torch.tensor([3], dtype=torch.int32, device=device)
    return count, torch.tensor([3, 0, 3], dtype=torch.int32, device=device)


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"tokens_hint": 2, "batch_invariant": True}], ids=str)
def test_equals_the_ops_alone(options: dict):
    values, (count, metadata) = arguments(), scalars()
    addends = [torch.randn(T, H).bfloat16() for _ in range(2)]
    y = ops.fused_moe(*values.values(), metadata[0:1], 0, **options)
    alone = ops.rsv_combine(y, count, metadata, T, "local") * 0.5 + addends[0] + addends[1]
    joined = ops.fused_moe_combine(*values.values(), count, metadata, 0, T, addends, "local", scale=0.5, **options)
    assert torch.equal(joined, alone)


def test_no_epilogue_and_another_dtype():
    values, (count, metadata) = arguments(), scalars()
    y = ops.fused_moe(*values.values(), metadata[0:1], 0)
    alone = ops.rsv_combine(y, count, metadata, T, "local", out_dtype=torch.float32)
    joined = ops.fused_moe_combine(*values.values(), count, metadata, 0, T, [], "local", combine_dtype=torch.float32)
    assert torch.equal(joined, alone) and joined.dtype == torch.float32


def test_opcheck():
    values, (count, metadata) = arguments(), scalars()
    addends = [torch.randn(T, H).bfloat16()]
    torch.library.opcheck(ops.fused_moe_combine, (*values.values(), count, metadata, 0, T, addends, "local"))


def test_mistakes_are_named():
    values, (count, metadata) = arguments(), scalars()
    with pytest.raises(ShapeError, match=r"fused_moe_combine: addends\[0\] has shape \(1, 32\)"):
        ops.fused_moe_combine(*values.values(), count, metadata, 0, T, [torch.zeros(1, H).bfloat16()], "local")
    with pytest.raises(DtypeError, match=r"combine_dtype = torch\.int32"):
        ops.fused_moe_combine(*values.values(), count, metadata, 0, T, [], "local", combine_dtype=torch.int32)

"""The kernels of a shared expert of few rows against plain torch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moe_ops import shared_expert
from moe_ops.shared_expert import _constants
from moe_ops.shared_expert_kernels import thin_gate_up_kernel, thin_product_kernel
from tests.tolerances import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter's bf16 products are slow; the activation of rounded products is rounded again
DTYPE, WITHIN = (torch.bfloat16, 6e-3) if torch.cuda.is_available() else (torch.float32, 2e-6)
SIZES = [{"BLOCK_N": 16, "PARTS": parts, "PART": 16} for parts in (1, 4)]


def tensors(seed: int, *sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [torch.randn(*size, generator=generator, device=DEVICE).to(DTYPE) / size[1] ** 0.5 for size in sizes]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize(("depth", "inner"), [(128, 48), (40, 5), (300, 33)])
def test_gate_up(rows: int, depth: int, inner: int, sizes: dict):
    x, gate, up = tensors(rows, (rows, depth), (inner, depth), (inner, depth))
    out = torch.full((rows, inner), torch.nan, dtype=DTYPE, device=DEVICE)
    thin_gate_up_kernel[(-(-inner // 16),)](x, gate, up, out, rows, inner, depth, **_constants(rows, depth, sizes))
    wanted = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    assert relative_error(out, wanted) < WITHIN


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize(("depth", "width"), [(128, 48), (40, 5), (300, 33)])
def test_product(rows: int, depth: int, width: int, sizes: dict):
    x, weight = tensors(rows, (rows, depth), (width, depth))
    out = torch.full((rows, width), torch.nan, dtype=DTYPE, device=DEVICE)
    thin_product_kernel[(-(-width // 16),)](x, weight, out, rows, width, depth, **_constants(rows, depth, sizes))
    assert relative_error(out, x.double() @ weight.double().T) < WITHIN


def test_worked_examples():
    one = torch.ones(1, 2, dtype=DTYPE, device=DEVICE)
    out = torch.empty(1, 1, dtype=DTYPE, device=DEVICE)
    sizes = _constants(1, 2, SIZES[1])
    thin_gate_up_kernel[(1,)](one, one / 2, one, out, 1, 1, 2, **sizes)
    assert abs(float(out) - 1.4621) < 6e-3
    thin_product_kernel[(1,)](one, one * torch.tensor([[2, 3]], device=DEVICE), out, 1, 1, 2, **sizes)
    assert float(out) == 5.0


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_the_launchers(rows: int):
    """Default tiles at DeepSeek-V3's sizes, weights as transformers holds them; on the CPU its plain code, small."""
    hidden, inner = (7168, 2048) if DEVICE == "cuda" else (56, 16)
    x, gate, up, down = tensors(rows, (rows, hidden), (inner, hidden), (inner, hidden), (hidden, inner))
    act, out = x.new_empty(rows, inner), x.new_empty(rows, hidden)
    shared_expert.thin_gate_up(x, [gate.T, up.T], act)
    assert relative_error(act, F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)) < WITHIN
    both = torch.empty_like(act)
    shared_expert.thin_gate_up(x, [torch.cat([gate, up]).T], both)
    assert torch.equal(both, act)
    shared_expert.thin_product(act, down.T, out)
    assert relative_error(out, act.double() @ down.double().T) < WITHIN

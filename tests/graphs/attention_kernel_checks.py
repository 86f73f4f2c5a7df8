"""The kernels of decode attention against plain torch; in Triton's interpreter or on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graphs.attention import reference
from graphs.attention_launch import MIN_SPAN, Split, launch, span_of, split
from tests.tolerances import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter's bf16 products are slow; in bf16, weights and result are rounded once each
DTYPE, WITHIN = (torch.bfloat16, 6e-3) if torch.cuda.is_available() else (torch.float32, 2e-6)


def case(batch: int, heads: int, kv_heads: int, length: int, depth: int, depth_v: int) -> list[Tensor]:
    """Random query, key, value; no mask yet."""
    generator = torch.Generator(DEVICE).manual_seed(batch + length)
    sizes = ((batch, heads, depth), (batch, kv_heads, length, depth), (batch, kv_heads, length, depth_v))
    return [torch.randn(*s, generator=generator, device=DEVICE).to(DTYPE) for s in sizes]


def masks(batch: int, length: int) -> Tensor:
    """Rows with a prefix, a window, holes, one column, none, all (B, L)."""
    column = torch.arange(length, device=DEVICE)
    rows = [
        column < length // 3,
        (column >= length // 2) & (column < length // 2 + 9),
        (column % 7 == 3) & (column > 2),
        column == length - 1,
        column < 0,
        column >= 0,
    ]
    return torch.stack([rows[i % len(rows)] for i in range(batch)])


@pytest.mark.parametrize("span", [None, 128, 256])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "length", "depth", "depth_v"),
    [(6, 8, 2, 300, 64, 64), (6, 3, 3, 129, 48, 32), (7, 32, 4, 520, 128, 128), (6, 20, 1, 64, 16, 16)],
)
def test_kernels_equal_plain_torch(batch, heads, kv_heads, length, depth, depth_v, span):
    query, key, value = case(batch, heads, kv_heads, length, depth, depth_v)
    mask, scale = masks(batch, length), depth**-0.5
    got = launch(query, key, value, mask, scale, span)
    wanted = reference(query, key, value, mask, scale)
    assert got.shape == wanted.shape == (batch, heads, depth_v)
    assert relative_error(got, wanted) < WITHIN
    assert not got[4].any(), "a row without columns is 0"


@pytest.mark.parametrize("span", [256, 128])
def test_worked_example_of_the_kernels(span: int):
    """Columns 0 and 128 with scores 0 and ln 3, values 0 and 4; the rest is not live."""
    query, mask = torch.ones(1, 1, 1, device=DEVICE, dtype=DTYPE), torch.zeros(1, 130, dtype=torch.bool, device=DEVICE)
    key, value = (torch.full((1, 1, 130, 1), math.nan, device=DEVICE, dtype=DTYPE) for _ in range(2))
    for column, score, number in ((0, 0.0, 0.0), (128, math.log(3), 4.0)):
        key[..., column, :], value[..., column, :], mask[:, column] = score, number, True
    found = split(query, key, value, span)
    assert found.spans == 256 // span
    assert abs(float(launch(query, key, value, mask, 1.0, span)) - 3.0) < 3 * WITHIN
    parts, stats = torch.tensor([[[[0.0], [4.0]]]], device=DEVICE), torch.tensor([[[0.0, math.log2(3)]]], device=DEVICE)
    assert abs(float(Split(128, 2, found.out, parts, stats).merge()) - 3.0) < 3 * WITHIN


def test_columns_outside_the_mask_are_not_read():
    query, key, value = case(6, 8, 2, 300, 64, 64)
    mask = masks(6, 300)
    wanted = launch(query, key, value, mask, 0.1)
    hidden = ~mask[:, None, :, None]
    got = launch(query, key.masked_fill(hidden, math.nan), value.masked_fill(hidden, math.nan), mask, 0.1)
    assert torch.equal(got, wanted)


def test_one_mask_row_for_all_and_large_scores():
    query, key, value = case(3, 4, 4, 200, 32, 32)
    mask = masks(1, 200).expand(3, -1)
    got = launch(query, key, value, mask, 50.0, MIN_SPAN)
    assert relative_error(got, reference(query, key, value, mask, 50.0)) < 10 * WITHIN


def test_spans_fill_the_gpu_and_keep_their_bounds():
    assert span_of(320, 1 * 4, 132) == 512  # short: not split
    assert span_of(20, 1, 132) == MIN_SPAN
    assert span_of(4096, 64 * 4, 132) == 4096  # 256 programs: not split
    assert span_of(4096, 1 * 4, 132) == 128
    assert span_of(32768, 1 * 4, 132) == 512
    assert span_of(100000, 1024, 132) == 4096

"""The kernel of ``thin_linear`` against plain torch, in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from moe_ops.thin_linear import best_split, launch, piece_of, tiles
from tests.tolerances import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter's bf16 products are slow; in bf16 the result is rounded once
DTYPE, WITHIN = (torch.bfloat16, 3e-3) if torch.cuda.is_available() else (torch.float32, 2e-6)
HALF = torch.bfloat16 if torch.cuda.is_available() else torch.float16  # the interpreter takes bf16 for integers here


def case(rows: int, depth: int, widths: tuple[int, ...]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator(DEVICE).manual_seed(rows + depth)
    x, *weights = (
        torch.randn(n, depth, generator=generator, device=DEVICE).to(DTYPE) for n in (rows, *widths)
    )  # fmt: skip
    return x, weights


@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64])
@pytest.mark.parametrize(("depth", "widths"), [(256, (48, 16)), (40, (5,)), (300, (33, 16, 1, 70))])
def test_equals_plain_torch(rows: int, depth: int, widths: tuple[int, ...]):
    x, weights = case(rows, depth, widths)
    for got, weight in zip(launch(x, weights), weights, strict=True):
        wanted = x.double() @ weight.double().T
        assert got.shape == wanted.shape and got.dtype == DTYPE
        assert relative_error(got, wanted) < WITHIN


def test_worked_example_of_the_kernel():
    """Widths 48 and 16 with 32 columns a program: two programs for the first, one for the second."""
    x, weights = case(2, 64, (48, 16))
    first, second = launch(x, weights)
    torch.testing.assert_close(first, x @ weights[0].T, rtol=1e-2, atol=1e-1)
    torch.testing.assert_close(second, x @ weights[1].T, rtol=1e-2, atol=1e-1)


@pytest.mark.parametrize("rows", [1, 17])
def test_16_bit_operands_and_a_result_that_is_not_rounded(rows: int):
    """As a router has it that casts its operands: a sum in fp32 of exact products."""
    x, (weight,) = case(rows, 96, (20,))
    x, weight = x.to(HALF), weight.to(HALF)
    (got,) = launch(x, [weight], out_dtype=torch.float32)
    assert got.dtype == torch.float32
    assert relative_error(got, x.double() @ weight.double().T) < 2e-6


@pytest.mark.parametrize(("depth", "split"), [(2048, 4), (1100, 2), (1100, 7)])
def test_pieces_of_the_depth(depth: int, split: int):
    """Also where the last piece is short, or there are more pieces than depth: those are zero."""
    x, (weight, other) = case(3, depth, (33, 16))
    for got, w in zip(launch(x, [weight, other], out_dtype=torch.float32, split=split), (weight, other), strict=True):
        assert got.shape == (split, 3, w.shape[0]) and got.dtype == torch.float32
        piece = piece_of(depth, split)
        for p in range(split):
            part = slice(p * piece, (p + 1) * piece)
            wanted = x[:, part].double() @ w[:, part].double().T
            torch.testing.assert_close(got[p].double(), wanted, rtol=1e-4, atol=1e-3)
        assert relative_error(got.sum(0), x.double() @ w.double().T) < 2e-6


def test_pieces_of_a_row_do_not_depend_on_the_others():
    x, weights = case(16, 1024, (40,))
    alone = launch(x[3:4], weights, out_dtype=torch.float32, split=2)[0]
    assert torch.equal(launch(x, weights, out_dtype=torch.float32, split=2)[0][:, 3:4], alone)


def test_split():
    sizes = (((128,), 2048), ((256,), 7168), ((2048,), 4096), ((60, 1), 2048), ((8,), 64))
    assert [best_split(*size) for size in sizes] == [4, 7, 1, 4, 1]
    assert piece_of(7168, 7) == 1024 and piece_of(1100, 2) == 1024


def test_strided_input_and_no_rows():
    x, weights = case(4, 64, (20,))
    wide = torch.cat([x, x], 1)[:, :64]
    assert torch.equal(launch(wide, weights)[0], launch(x, weights)[0])
    assert launch(x[:0], weights)[0].shape == (0, 20)


def test_a_row_does_not_depend_on_the_others():
    x, weights = case(16, 512, (40,))
    alone = launch(x[3:4], weights)[0]
    assert torch.equal(launch(x, weights)[0][3:4], alone)


@pytest.mark.parametrize("depth", [256, 300])
@pytest.mark.parametrize(("parts", "part"), [(1, 32), (2, 32), (4, 16), (4, 128)])
def test_sums_in_parts(parts: int, part: int, depth: int):
    x, weights = case(5, depth, (33, 16))
    for got, weight in zip(launch(x, weights, PARTS=parts, PART=part), weights, strict=True):
        assert relative_error(got, x.double() @ weight.double().T) < WITHIN


def test_tiles():
    assert tiles(16, (4096, 512, 512))["BLOCK_N"] == 64
    assert tiles(64, (2048,))["BLOCK_N"] == 16
    assert [tiles(rows, (16,))["ROWS"] for rows in (1, 16, 17, 64)] == [16, 16, 32, 64]

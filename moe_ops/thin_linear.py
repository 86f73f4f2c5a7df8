"""``thin_linear``: one input of few rows times several weights in one launch, as a decode step's projections are.

cuBLAS launches one kernel (or two) for each, and at few rows none of them fills the memory system.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ShapeError
from .registration import register_op
from .shapes import CPU_HIDDEN_DTYPES, HALF_DTYPES, check_dtype, check_rank, check_same_device

_OP = "thin_linear"
MAX_ROWS = 64  # beyond, a product is no longer bounded by reading its weights alone
MAX_WEIGHTS = 4


def _check(x: Tensor, weights: Sequence[Tensor]) -> None:
    check_rank(_OP, "x", x, 2, "(rows, depth)")
    check_dtype(_OP, "x", x, HALF_DTYPES if x.is_cuda else CPU_HIDDEN_DTYPES)
    if not 1 <= len(weights) <= MAX_WEIGHTS or x.shape[0] > MAX_ROWS:
        raise ShapeError(
            f"{_OP}: {len(weights)} weights and {x.shape[0]} rows; pass at most {MAX_WEIGHTS} and {MAX_ROWS}."
        )
    for i, weight in enumerate(weights):
        check_rank(_OP, f"weights[{i}]", weight, 2, "(width, depth)")
        check_dtype(_OP, f"weights[{i}]", weight, (x.dtype,))
        check_same_device(_OP, x=x, weight=weight)
        if weight.shape[1] != x.shape[1]:
            raise ShapeError(f"{_OP}: weights[{i}] {tuple(weight.shape)} does not take x {tuple(x.shape)}.")


def _fake(x: Tensor, weights: Sequence[Tensor], *, out_dtype: torch.dtype | None = None) -> list[Tensor]:
    _check(x, weights)
    return [x.new_empty(x.shape[0], weight.shape[0], dtype=out_dtype or x.dtype) for weight in weights]


def _cpu(x: Tensor, weights: Sequence[Tensor], *, out_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Summed in fp32 and rounded once, as the kernel does."""
    _check(x, weights)
    return [(x.float() @ weight.float().T).to(out_dtype or x.dtype) for weight in weights]


def tiles(rows: int, widths: Sequence[int]) -> dict[str, int]:
    """Tile sizes of a launch, the best of a sweep on one H200 at 1, 16 and 64 rows of Qwen3-30B-A3B's projections.

    Wide: 64 columns a program, which re-read the rows less. Narrow: as many programs as there are, in few steps, and
    few rows in four sums that do not wait for each other.
    """
    padded = max(16, 1 << (rows - 1).bit_length())
    if sum(widths) >= 4096:
        return {"ROWS": padded, "BLOCK_N": 64, "PARTS": 1, "PART": 128, "num_stages": 5}
    parts, part, stages = (4, 128, 4) if rows <= 32 else (1, 256, 3)
    return {"ROWS": padded, "BLOCK_N": 16, "PARTS": parts, "PART": part, "num_stages": stages}


def launch(
    x: Tensor, weights: Sequence[Tensor], *, out_dtype: torch.dtype | None = None, **chosen: int
) -> list[Tensor]:
    """The kernel; ``chosen`` replaces tile sizes, in tests and sweeps."""
    from .thin_linear_kernels import _thin_linear_kernel

    x, weights = x.contiguous(), [weight.contiguous() for weight in weights]
    rows, depth = x.shape
    outs = [x.new_empty(rows, weight.shape[0], dtype=out_dtype or x.dtype) for weight in weights]
    if rows == 0:
        return outs
    widths = [weight.shape[0] for weight in weights]
    sizes = tiles(rows, widths) | chosen
    sizes["EVEN_K"] = depth % (sizes["PARTS"] * sizes["PART"]) == 0
    programs = sum(-(-width // sizes["BLOCK_N"]) for width in widths)
    _thin_linear_kernel[(programs,)](
        x, tuple(weights), tuple(outs), tuple(widths), rows, depth,
        **{"num_warps": 4} | sizes,  # pyright: ignore[reportCallIssue, reportArgumentType]
    )  # fmt: skip
    return outs


def _cuda(x: Tensor, weights: Sequence[Tensor], *, out_dtype: torch.dtype | None = None) -> list[Tensor]:
    _check(x, weights)
    return launch(x, weights, out_dtype=out_dtype)


thin_linear = register_op(
    "thin_linear(Tensor x, Tensor[] weights, *, ScalarType? out_dtype=None) -> Tensor[]",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip


def takes(rows: int, dtype: torch.dtype, cuda: bool) -> bool:
    """Whether a product of so many rows is one for this op."""
    return 1 <= rows <= MAX_ROWS and dtype in (HALF_DTYPES if cuda else CPU_HIDDEN_DTYPES)

"""``thin_linear``: one input of few rows times several weights in one launch, as a decode step's projections are.

cuBLAS launches one kernel (or two) for each, and at few rows none of them fills the memory system.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .errors import DtypeError, ShapeError
from .registration import register_op
from .shapes import CPU_HIDDEN_DTYPES, HALF_DTYPES, align_up, check_dtype, check_rank, check_same_device

_OP = "thin_linear"
MAX_ROWS = 64  # beyond, a product is no longer bounded by reading its weights alone
MAX_WEIGHTS = 4
PIECE_STEP = 512  # of the depth: pieces are multiples, one step of the kernel's loop
MAX_SPLIT = 7  # Inductor adds fewer than 8 values where they are read; of more it makes a launch
MOST_PROGRAMS = 128  # one an SM of an H200, in units of 16 columns


def _check(x: Tensor, weights: Sequence[Tensor], out_dtype: torch.dtype | None, split: int) -> None:
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
    if split < 1:
        raise ShapeError(f"{_OP}: split = {split}; pass at least 1.")
    if split > 1 and out_dtype != torch.float32:
        raise DtypeError(f"{_OP}: out_dtype = {out_dtype} with split = {split}; pass float32, pieces are added.")


def _empty(x: Tensor, weights: Sequence[Tensor], out_dtype: torch.dtype | None, split: int) -> list[Tensor]:
    pieces = () if split == 1 else (split,)
    return [x.new_empty(*pieces, x.shape[0], weight.shape[0], dtype=out_dtype or x.dtype) for weight in weights]


def _fake(
    x: Tensor, weights: Sequence[Tensor], *, out_dtype: torch.dtype | None = None, split: int = 1
) -> list[Tensor]:
    _check(x, weights, out_dtype, split)
    return _empty(x, weights, out_dtype, split)


def _cpu(x: Tensor, weights: Sequence[Tensor], *, out_dtype: torch.dtype | None = None, split: int = 1) -> list[Tensor]:
    """Summed in fp32 and rounded once, as the kernel does."""
    _check(x, weights, out_dtype, split)
    if split == 1:
        return [(x.float() @ weight.float().T).to(out_dtype or x.dtype) for weight in weights]
    ends = [min(p * piece_of(x.shape[1], split), x.shape[1]) for p in range(split + 1)]
    pieces = list(pairwise(ends))
    return [
        torch.stack([x[:, i:j].float() @ weight[:, i:j].float().T for i, j in pieces]) for weight in weights
    ]  # fmt: skip


def tiles(rows: int, widths: Sequence[int], piece: int = 0) -> dict[str, int]:
    """Tile sizes of a launch, the best of a sweep on one H200 at 1, 16 and 64 rows of Qwen3-30B-A3B's projections.

    Wide: 64 columns a program, which re-read the rows less. Narrow: as many programs as there are, in few steps, and
    few rows in four sums that do not wait for each other. ``piece``: of the depth, where it is split; one or two steps,
    the best at 1, 8, 32 and 64 rows of the routers of Qwen3-30B-A3B and DeepSeek-V3.
    """
    padded = max(16, 1 << (rows - 1).bit_length())
    if piece:
        part, stages = (256, 1) if piece >= 1024 and rows <= 32 else (128, 2)
        return {"ROWS": padded, "BLOCK_N": 16, "PARTS": 4, "PART": part, "num_stages": stages}
    if sum(widths) >= 4096:
        return {"ROWS": padded, "BLOCK_N": 64, "PARTS": 1, "PART": 128, "num_stages": 5}
    parts, part, stages = (4, 128, 4) if rows <= 32 else (1, 256, 3)
    return {"ROWS": padded, "BLOCK_N": 16, "PARTS": parts, "PART": part, "num_stages": stages}


def piece_of(depth: int, split: int) -> int:
    """How much of the depth each of ``split`` pieces has, but the last ones, which have what is left."""
    return align_up(-(-depth // split), PIECE_STEP)


def launch(
    x: Tensor, weights: Sequence[Tensor], *, out_dtype: torch.dtype | None = None, split: int = 1, **chosen: int
) -> list[Tensor]:
    """The kernel; ``chosen`` replaces tile sizes, in tests and sweeps."""
    from .thin_linear_kernels import _thin_linear_kernel

    x, weights = x.contiguous(), [weight.contiguous() for weight in weights]
    rows, depth = x.shape
    outs = _empty(x, weights, out_dtype, split)
    if rows == 0:
        return outs
    widths = [weight.shape[0] for weight in weights]
    piece = piece_of(depth, split) if split > 1 else depth
    sizes = tiles(rows, widths, piece if split > 1 else 0) | chosen
    step = sizes["PARTS"] * sizes["PART"]
    sizes["EVEN_K"] = depth % step == 0 and piece % step == 0
    programs = sum(-(-width // sizes["BLOCK_N"]) for width in widths)
    _thin_linear_kernel[(programs, split)](
        x, tuple(weights), tuple(outs), tuple(widths), rows, depth, piece,
        **{"num_warps": 4} | sizes,  # pyright: ignore[reportCallIssue, reportArgumentType]
    )  # fmt: skip
    return outs


def _cuda(
    x: Tensor, weights: Sequence[Tensor], *, out_dtype: torch.dtype | None = None, split: int = 1
) -> list[Tensor]:
    _check(x, weights, out_dtype, split)
    return launch(x, weights, out_dtype=out_dtype, split=split)


thin_linear = register_op(
    "thin_linear(Tensor x, Tensor[] weights, *, ScalarType? out_dtype=None, int split=1) -> Tensor[]",
    fake=_fake, cpu=_cpu, cuda=_cuda,
)  # fmt: skip
"""``(rows, width)`` each. ``split`` > 1: (split, rows, width) fp32, sums over consecutive pieces of the depth.

Whoever reads these adds them, in that order. A product with few columns, such as a router's, has too few programs to
read its weights at the memory's rate otherwise.
"""


def best_split(widths: Sequence[int], depth: int) -> int:
    """Pieces of the depth of products whose readers add them, 1 where their columns make programs enough."""
    programs = sum(-(-width // 16) for width in widths)
    return max(1, min(MAX_SPLIT, depth // PIECE_STEP, MOST_PROGRAMS // programs))


def takes(rows: int, dtype: torch.dtype, cuda: bool) -> bool:
    """Whether a product of so many rows is one for this op."""
    return 1 <= rows <= MAX_ROWS and dtype in (HALF_DTYPES if cuda else CPU_HIDDEN_DTYPES)

"""A shared expert beside a layer's routed ones: ``down(act(gate(x)) * up(x))`` on a stream of its own.

On CUDA it forks from the caller's stream, so that it runs beside dispatch, routed experts and the waits for peers, and
joins it again where its result is read; inside one op, so that one CUDA graph holds both branches and nobody reuses
the memory of either. All tensors are allocated on the caller's stream and live until the join. On the CPU the same
steps run one after the other. The bits are those of the code that Inductor generates for the same lines:
``silu(gate) * up`` in fp32, rounded once (or after each step, as with ``emulate_precision_casts``).

``thin``, for few rows: two launches of our own in place of the library's three to five. They read the weights at the
memory's rate, and leave room on every SM, which the library's do not: dispatch waited 14 us for the last of their
blocks, now 2 (DeepSeek-V3 on 2 H200s). Sums in another order, so other bits. The last product only behind the experts,
beside the combine, was measured to gain nothing more (1080.6 us instead of 1080.5, 134.1 of 133.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError, ShapeError
from .shapes import check_rank, check_same_device
from .thin_linear import MAX_ROWS


class SharedExpert(NamedTuple):
    """``x (T, H)``; ``gate_up``: gate (H, S) and up (H, S), or one (H, 2S), any strides; ``down (S, H)`` or None.

    Without ``down`` the result is ``act(gate(x)) * up(x)``, (T, S). ``thin``: at most ``MAX_ROWS`` rows, and the
    weights should be transposed views of rows of memory, as ``nn.Linear`` stores them; others are copied.
    """

    x: Tensor
    gate_up: Sequence[Tensor]
    down: Tensor | None
    round_each: bool
    thin: bool = False

    @property
    def inner(self) -> int:
        """S."""
        return self.gate_up[0].shape[1] // (3 - len(self.gate_up))

    def new_result(self) -> Tensor:
        """What ``run`` fills."""
        return self.x.new_empty(self.x.shape[0], self.inner if self.down is None else self.down.shape[1])


def check_shared(op: str, shared: SharedExpert) -> None:
    """Raise unless the sizes fit together."""
    check_rank(op, "shared_x", shared.x, 2, "(T, H)")
    if len(shared.gate_up) not in (1, 2):
        raise ArgumentError(f"{op}: {len(shared.gate_up)} tensors in shared_gate_up; pass [gate, up] or [gate_up].")
    width, inner = shared.x.shape[1], shared.inner
    wanted = [(width, 2 * inner)] if len(shared.gate_up) == 1 else [(width, inner)] * 2
    for number, (weight, shape) in enumerate(zip(shared.gate_up, wanted)):
        check_same_device(op, shared_x=shared.x, **{f"shared_gate_up[{number}]": weight})
        if tuple(weight.shape) != shape or weight.dtype != shared.x.dtype:
            raise ShapeError(
                f"{op}: shared_gate_up[{number}] is {tuple(weight.shape)} {weight.dtype}; "
                f"pass {shape} {shared.x.dtype}."
            )
    if shared.thin and shared.x.shape[0] > MAX_ROWS:
        raise ShapeError(f"{op}: shared_thin with {shared.x.shape[0]} rows; pass at most {MAX_ROWS}.")
    if shared.down is not None and (shared.down.dim() != 2 or shared.down.shape[0] != inner):
        raise ShapeError(f"{op}: shared_down has shape {tuple(shared.down.shape)}; pass (S, H) with S = {inner}.")


class Beside:
    """A shared expert under way: ``result`` may be read after ``join``."""

    def __init__(self, shared: SharedExpert):
        self.result = shared.new_result()
        self._side = _side_stream(shared.x.device) if shared.x.is_cuda else None
        self._steps = _steps(shared, self.result)  # kept until the join, as they hold what the launches write
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(shared.x.device))
        with torch.cuda.stream(self._side):
            for step in self._steps:
                step()

    def join(self) -> Tensor:
        """The caller's stream waits for the result. Safe to repeat."""
        if self._side is not None:
            torch.cuda.current_stream(self.result.device).wait_stream(self._side)
            self._side = None
        return self.result


_SIDE_STREAMS: dict[torch.device, torch.cuda.Stream] = {}


def _side_stream(device: torch.device) -> torch.cuda.Stream:
    if device not in _SIDE_STREAMS:
        _SIDE_STREAMS[device] = torch.cuda.Stream(device)
    return _SIDE_STREAMS[device]


def _steps(shared: SharedExpert, result: Tensor) -> list[Callable[[], object]]:
    """The launches in their order; what they write is allocated here, and lives as long as they do."""
    x, weights, down = shared.x, shared.gate_up, shared.down
    inner = result if down is None else x.new_empty(x.shape[0], shared.inner)
    if shared.thin:
        steps: list[Callable[[], object]] = [partial(thin_gate_up, x, weights, inner)]
        return steps if down is None else [*steps, partial(thin_product, inner, down, result)]
    projected = [x.new_empty(x.shape[0], weight.shape[1]) for weight in weights]
    gate, up = projected if len(projected) == 2 else projected[0].chunk(2, -1)
    steps = [partial(torch.mm, x, weight, out=out) for weight, out in zip(weights, projected)]
    steps.append(partial(_silu_and_mul, gate, up, inner, shared.round_each))
    return steps if down is None else [*steps, partial(torch.mm, inner, down, out=result)]


def _silu_and_mul(gate: Tensor, up: Tensor, out: Tensor, round_each: bool) -> None:
    if out.numel() == 0:
        return
    if not out.is_cuda:
        activated = F.silu(gate.float())
        out.copy_((activated.to(out.dtype).float() if round_each else activated) * up.float())
        return
    from .shared_expert_kernels import BLOCK, silu_and_mul_kernel

    rows, inner = out.shape
    silu_and_mul_kernel[(rows, -(-inner // BLOCK))](
        gate, up, out, gate.stride(0), up.stride(0), inner, ROUND_EACH=round_each,
        num_warps=4,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip


# Tiles of the thin kernels: BLOCK_N columns a program. 16 give DeepSeek-V3's 2048 inner columns 128 programs, one an
# SM, in which each of eight warps sums an eighth of a row; dispatch and combine fit in beside them.
_FIRST = {"BLOCK_N": 16, "PARTS": 8, "PART": 64, "num_stages": 3, "num_warps": 8}
_LAST = {"BLOCK_N": 16, "PARTS": 8, "PART": 64, "num_stages": 3, "num_warps": 8}


def thin_gate_up(x: Tensor, weights: Sequence[Tensor], out: Tensor, **chosen: int) -> None:
    """``out (T, S) = silu(x @ gate) * (x @ up)``; ``weights`` as in ``SharedExpert``; ``chosen``: other tile sizes."""
    if out.numel() == 0:
        return
    if not x.is_cuda:
        gate, up = ((x.float() @ weight.float()).to(x.dtype) for weight in _halves(weights))
        return _silu_and_mul(gate, up, out, False)
    from .shared_expert_kernels import thin_gate_up_kernel

    gate, up = (weight.t().contiguous() for weight in _halves(weights))
    (rows, depth), inner, sizes = x.shape, out.shape[1], _FIRST | chosen
    thin_gate_up_kernel[(-(-inner // sizes["BLOCK_N"]),)](
        x.contiguous(), gate, up, out, rows, inner, depth,
        **_constants(rows, depth, sizes),  # pyright: ignore[reportCallIssue, reportArgumentType]
    )  # fmt: skip


def thin_product(x: Tensor, weight: Tensor, out: Tensor, **chosen: int) -> None:
    """``out = x @ weight``, with ``weight`` as in ``SharedExpert``."""
    if out.numel() == 0:
        return
    if not x.is_cuda:
        out.copy_(x.float() @ weight.float())
        return
    from .shared_expert_kernels import thin_product_kernel

    (rows, depth), width, sizes = x.shape, out.shape[1], _LAST | chosen
    thin_product_kernel[(-(-width // sizes["BLOCK_N"]),)](
        x, weight.t().contiguous(), out, rows, width, depth,
        **_constants(rows, depth, sizes),  # pyright: ignore[reportCallIssue, reportArgumentType]
    )  # fmt: skip


def _halves(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    return weights if len(weights) == 2 else weights[0].chunk(2, -1)


def _constants(rows: int, depth: int, sizes: dict[str, int]) -> dict[str, int]:
    padded, step = max(16, 1 << (rows - 1).bit_length()), sizes["PARTS"] * sizes["PART"]
    return sizes | {"ROWS": padded, "EVEN": depth % step == 0}

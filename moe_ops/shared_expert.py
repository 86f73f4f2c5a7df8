"""A shared expert beside a layer's routed ones: ``down(act(gate(x)) * up(x))`` on a stream of its own.

On CUDA it forks from the caller's stream, so that it runs beside dispatch, routed experts and the waits for peers, and
joins it again where its result is read; inside one op, so that one CUDA graph holds both branches and nobody reuses
the memory of either. All tensors are allocated on the caller's stream and live until the join. On the CPU the same
steps run one after the other. The bits are those of the code that Inductor generates for the same lines:
``silu(gate) * up`` in fp32, rounded once (or after each step, as with ``emulate_precision_casts``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import ArgumentError, ShapeError
from .shapes import check_rank, check_same_device


class SharedExpert(NamedTuple):
    """``x (T, H)``; ``gate_up``: gate (H, S) and up (H, S), or one (H, 2S), any strides; ``down (S, H)`` or None.

    Without ``down`` the result is ``act(gate(x)) * up(x)``, (T, S).
    """

    x: Tensor
    gate_up: Sequence[Tensor]
    down: Tensor | None
    round_each: bool

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
    if shared.down is not None and (shared.down.dim() != 2 or shared.down.shape[0] != inner):
        raise ShapeError(f"{op}: shared_down has shape {tuple(shared.down.shape)}; pass (S, H) with S = {inner}.")


class Beside:
    """A shared expert under way: ``result`` may be read after ``join``."""

    def __init__(self, shared: SharedExpert):
        self._shared = shared
        self.result = shared.new_result()
        self._side: torch.cuda.Stream | None = None
        self._held = _temporaries(shared, self.result)
        if not shared.x.is_cuda:
            _run(shared, *self._held)
            return
        self._side = side = _side_stream(shared.x.device)
        side.wait_stream(torch.cuda.current_stream(shared.x.device))
        with torch.cuda.stream(side):
            _run(shared, *self._held)

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


def _temporaries(shared: SharedExpert, result: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
    """Where the projections go, ``act(gate) * up``, and the result (the same tensor without ``down``)."""
    rows = shared.x.shape[0]
    projected = [shared.x.new_empty(rows, weight.shape[1]) for weight in shared.gate_up]
    inner = result if shared.down is None else shared.x.new_empty(rows, shared.inner)
    return projected, inner, result


def _run(shared: SharedExpert, projected: list[Tensor], inner: Tensor, result: Tensor) -> None:
    for weight, out in zip(shared.gate_up, projected):
        torch.mm(shared.x, weight, out=out)
    gate, up = projected if len(projected) == 2 else projected[0].chunk(2, -1)
    _silu_and_mul(gate, up, inner, shared.round_each)
    if shared.down is not None:
        torch.mm(inner, shared.down, out=result)


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

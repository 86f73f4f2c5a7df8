"""``fused_moe``: what this rank's experts add to every row, weights as Hugging Face stores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .activations import check_activation
from .align import MAX_LOCAL_EXPERTS, check_pairs
from .errors import ArgumentError, DtypeError, ShapeError
from .moe_reference import fused_moe_reference
from .registration import register_op
from .shapes import check_dtype, check_rank, check_same_device, check_scalar_count, check_topk

if TYPE_CHECKING:
    from .fused_moe_config import Plan

_OP = "fused_moe"
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class ExpertForm:
    """How an expert computes and how its weights lie: the keyword arguments of the op, without tensors."""

    activation: str = "silu"
    alpha: float | None = None
    limit: float | None = None
    gated: bool = True
    transposed: bool = False
    interleaved: bool = False

    def projections(self) -> int:
        """Rows of ``gate_up`` for each row of ``I``."""
        return 2 if self.gated else 1

    def weight_sizes(self, gate_up: Tensor, down: Tensor) -> tuple[int, int, int]:
        """``(H, I, H')`` as the weights say; ``H' != H`` or a mismatch with I is the caller's error."""
        width, depth = (2, 1) if self.transposed else (1, 2)
        return gate_up.shape[depth], down.shape[depth], down.shape[width]


def _check_weights(hidden: Tensor, gate_up: Tensor, down: Tensor, form: ExpertForm) -> None:
    letters = ("(E_l, H, 2I)", "(E_l, I, H)") if form.transposed else ("(E_l, 2I, H)", "(E_l, H, I)")
    check_rank(_OP, "gate_up", gate_up, 3, letters[0] + (" (I instead of 2I without a gate)"))
    check_rank(_OP, "down", down, 3, letters[1])
    for name, tensor in (("gate_up", gate_up), ("down", down)):
        if tensor.dtype != hidden.dtype:
            raise DtypeError(f"{_OP}: {name} is {tensor.dtype} and hidden {hidden.dtype}; cast hidden to {name}'s.")
        if not tensor.is_contiguous():
            raise ShapeError(f"{_OP}: {name} has strides {tensor.stride()}; pass it contiguous.")
    hidden_size, inner, out_size = form.weight_sizes(gate_up, down)
    projected = gate_up.shape[2 if form.transposed else 1]
    sizes_agree = hidden_size == out_size == hidden.shape[1] and projected == form.projections() * inner
    if not sizes_agree or gate_up.shape[0] != down.shape[0]:
        raise ShapeError(
            f"{_OP}: hidden {tuple(hidden.shape)}, gate_up {tuple(gate_up.shape)}, down {tuple(down.shape)} do not "
            f"fit; pass gate_up {letters[0]} and down {letters[1]} with transposed={form.transposed}, "
            f"gated={form.gated}."
        )
    if inner == 0:
        raise ShapeError(f"{_OP}: gate_up {tuple(gate_up.shape)} has no inner columns; pass I of 1 or more.")
    if not 1 <= gate_up.shape[0] <= MAX_LOCAL_EXPERTS:
        raise ShapeError(f"{_OP}: {gate_up.shape[0]} local experts; pass 1 to {MAX_LOCAL_EXPERTS}.")


def _check_bias(name: str, bias: Tensor | None, hidden: Tensor, rows: int, width: int) -> None:
    if bias is None:
        return
    check_dtype(_OP, name, bias, (hidden.dtype,))
    if tuple(bias.shape) != (rows, width) or not bias.is_contiguous():
        raise ShapeError(
            f"{_OP}: {name} has shape {tuple(bias.shape)} and strides {bias.stride()}; "
            f"pass a contiguous tensor of shape {(rows, width)}."
        )


def _check(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    valid_tokens: Tensor,
    local_expert_start: int,
    form: ExpertForm,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    tokens_hint: int | None,
    out_dtype: torch.dtype | None,
) -> None:
    check_topk(_OP, hidden, topk_ids, topk_weights)
    check_pairs(_OP, topk_ids)
    check_scalar_count(_OP, "valid_tokens", valid_tokens)
    check_same_device(
        _OP, hidden=hidden, topk_ids=topk_ids, topk_weights=topk_weights, gate_up=gate_up, down=down,
        valid_tokens=valid_tokens, gate_up_bias=gate_up_bias, down_bias=down_bias,
    )  # fmt: skip
    check_activation(
        _OP, form.activation, alpha=form.alpha, limit=form.limit, gated=form.gated, interleaved=form.interleaved
    )
    _check_weights(hidden, gate_up, down, form)
    experts, inner, width = gate_up.shape[0], form.weight_sizes(gate_up, down)[1], hidden.shape[1]
    _check_bias("gate_up_bias", gate_up_bias, hidden, experts, form.projections() * inner)
    _check_bias("down_bias", down_bias, hidden, experts, width)
    if local_expert_start < 0 or (tokens_hint is not None and tokens_hint < 0):
        raise ArgumentError(
            f"{_OP}: local_expert_start={local_expert_start}, tokens_hint={tokens_hint}; pass neither below 0."
        )
    if out_dtype is not None and out_dtype not in OUT_DTYPES:
        raise DtypeError(f"{_OP}: out_dtype={out_dtype}; pass one of {', '.join(map(str, OUT_DTYPES))}.")


def _fake(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, valid_tokens: Tensor,
    local_expert_start: int, *, activation: str = "silu", alpha: float | None = None, limit: float | None = None,
    gated: bool = True, transposed: bool = False, interleaved: bool = False, gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, tokens_hint: int | None = None,
    out_dtype: torch.dtype | None = None, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    form = ExpertForm(activation, alpha, limit, gated, transposed, interleaved)
    _check(
        hidden, topk_ids, topk_weights, gate_up, down, valid_tokens, local_expert_start, form, gate_up_bias,
        down_bias, tokens_hint, out_dtype,
    )  # fmt: skip
    return hidden.new_empty(hidden.shape, dtype=out_dtype or hidden.dtype)


def _cpu(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, valid_tokens: Tensor,
    local_expert_start: int, *, activation: str = "silu", alpha: float | None = None, limit: float | None = None,
    gated: bool = True, transposed: bool = False, interleaved: bool = False, gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, tokens_hint: int | None = None,
    out_dtype: torch.dtype | None = None, batch_invariant: bool = False,
) -> Tensor:  # fmt: skip
    form = ExpertForm(activation, alpha, limit, gated, transposed, interleaved)
    _check(
        hidden, topk_ids, topk_weights, gate_up, down, valid_tokens, local_expert_start, form, gate_up_bias,
        down_bias, tokens_hint, out_dtype,
    )  # fmt: skip
    return fused_moe_reference(
        hidden, topk_ids, topk_weights, gate_up, down, valid_tokens, local_expert_start, activation=activation,
        alpha=alpha, limit=limit, gated=gated, transposed=transposed, interleaved=interleaved,
        gate_up_bias=gate_up_bias, down_bias=down_bias, out_dtype=out_dtype, batch_invariant=batch_invariant,
    )  # fmt: skip


def launch_fused_moe(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, valid_tokens: Tensor,
    local_expert_start: int, *, activation: str = "silu", alpha: float | None = None, limit: float | None = None,
    gated: bool = True, transposed: bool = False, interleaved: bool = False, gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, tokens_hint: int | None = None,
    out_dtype: torch.dtype | None = None, batch_invariant: bool = False, out: Tensor | None = None,
    plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """The Triton implementation. ``out (M, H)``, rows contiguous, is written and returned where given
    (the combine buffer); ``plan`` overrides the choice of ``fused_moe_config.choose_plan``."""
    from .fused_moe_launch import Problem, run

    form = ExpertForm(activation, alpha, limit, gated, transposed, interleaved)
    _check(
        hidden, topk_ids, topk_weights, gate_up, down, valid_tokens, local_expert_start, form, gate_up_bias,
        down_bias, tokens_hint, out_dtype,
    )  # fmt: skip
    if out is None:
        out = hidden.new_empty(hidden.shape, dtype=out_dtype or hidden.dtype)
    problem = Problem(
        hidden, topk_ids, topk_weights, gate_up, down, valid_tokens, local_expert_start, form, gate_up_bias,
        down_bias, out,
    )  # fmt: skip
    run(problem, tokens_hint, batch_invariant, plan)
    return out


def launch_fused_moe_pairs(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, valid_tokens: Tensor,
    local_expert_start: int, *, activation: str = "silu", alpha: float | None = None, limit: float | None = None,
    gated: bool = True, transposed: bool = False, interleaved: bool = False, gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None, tokens_hint: int | None = None,
    batch_invariant: bool = False, behind_dispatch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """All but the last step, the sum over each row's K pairs: see ``fused_moe_launch.run_pairs``.

    ``behind_dispatch``: see ``fused_moe_launch.Problem``.
    """
    from .fused_moe_launch import Problem, run_pairs

    form = ExpertForm(activation, alpha, limit, gated, transposed, interleaved)
    _check(
        hidden, topk_ids, topk_weights, gate_up, down, valid_tokens, local_expert_start, form, gate_up_bias,
        down_bias, tokens_hint, None,
    )  # fmt: skip
    problem = Problem(
        hidden, topk_ids, topk_weights, gate_up, down, valid_tokens, local_expert_start, form, gate_up_bias,
        down_bias, hidden, behind_dispatch,
    )  # fmt: skip
    return run_pairs(problem, tokens_hint, batch_invariant)


fused_moe = register_op(
    "fused_moe(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor down, "
    'Tensor valid_tokens, int local_expert_start, *, str activation="silu", float? alpha=None, float? limit=None, '
    "bool gated=True, bool transposed=False, bool interleaved=False, Tensor? gate_up_bias=None, "
    "Tensor? down_bias=None, int? tokens_hint=None, ScalarType? out_dtype=None, bool batch_invariant=False) -> Tensor",
    fake=_fake,
    cpu=_cpu,
    cuda=launch_fused_moe,
)
"""``torch.ops.moe_ep.fused_moe.default``: ``(M, H)``, the sum over this rank's experts of
``weight * (down(act(gate_up(x) + gate_up_bias)) + down_bias)``.

hidden: (M, H), last stride 1; topk_ids, topk_weights: (M, K); gate_up: (E_l, 2I, H); down: (E_l, H, I);
valid_tokens: one int32. Ids outside ``[local_expert_start, local_expert_start + E_l)`` add nothing; rows >=
``valid_tokens`` are not read and what they hold in the result is unspecified.

activation, alpha, limit   see ``activations``
gated                      False: gate_up is (E_l, I, H), one projection
transposed                 gate_up (E_l, H, 2I), down (E_l, I, H)
interleaved                gate and up alternate along 2I instead of lying one after the other
gate_up_bias, down_bias    (E_l, 2I) and (E_l, H), in hidden's dtype
tokens_hint                how many rows are usually live; only speed depends on it
out_dtype                  bf16, fp16 or fp32; hidden's by default
batch_invariant            a row's bits depend on nothing but the row: only plans that add in one order for all counts

Raises ``ShapeError``, ``DtypeError``, ``DeviceError``, ``ArgumentError``.
"""

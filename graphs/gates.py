"""Which gate an experts module has, so that the fused op computes exactly that.

Everything here is plain Python on attributes, because ``torch.compile`` may trace it: the first call of
a one-process model can already be a compiled one.
"""

from __future__ import annotations

from typing import NamedTuple

from . import hf_compat
from .errors import UnsupportedModelError

# Own gates: experts class -> (activation, attribute of alpha, attribute of the clamp limit).
# "silu": silu(min(g, limit)) * clamp(u); "swiglu_oai": (clamp(u) + 1) * g' * sigmoid(alpha * g'), g' = min(g, limit).
# tests/graphs/test_gates.py evaluates each against the installed transformers.
OWN_GATES: dict[str, tuple[str, str | None, str]] = {
    "DeepseekV4Experts": ("silu", None, "limit"),
    "Glm5NextTextExperts": ("silu", None, "swiglu_limit"),
    "HYV4Experts": ("silu", None, "swiglu_limit"),
    "GptOssExperts": ("swiglu_oai", "alpha", "limit"),
    "OpenAIPrivacyFilterExperts": ("swiglu_oai", "alpha", "limit"),
    "MiniMaxM3VLExperts": ("swiglu_oai", "swiglu_alpha", "swiglu_limit"),
}


class Gate(NamedTuple):
    """What ``fused_moe`` needs to know about a module besides its weights."""

    activation: str
    alpha: float | None
    limit: float | None
    gated: bool
    transposed: bool
    interleaved: bool


def recognise(module: hf_compat.Experts) -> Gate:
    """The gate of an experts module; raises ``UnsupportedModelError`` for one that is not known exactly."""
    if getattr(module, "has_post_expert_norm", False):
        raise UnsupportedModelError(_refusal(module, "it normalises each expert's output before weighting"))
    activation, alpha, limit = _formula(module)
    return Gate(
        activation=activation,
        alpha=alpha,
        limit=limit,
        gated=bool(module.has_gate),
        transposed=bool(module.is_transposed),
        interleaved=not module.is_concatenated,
    )


def _formula(module: hf_compat.Experts) -> tuple[str, float | None, float | None]:
    """``(activation, alpha, limit)`` of the module's gate."""
    if not module.has_gate or type(module)._apply_gate is hf_compat.DEFAULT_APPLY_GATE:
        activation = hf_compat.activation_name(getattr(module, "act_fn", None))
        if activation is None:
            raise UnsupportedModelError(_refusal(module, "its activation act_fn has no fused form"))
        return activation, None, None
    own = OWN_GATES.get(type(module).__name__)
    if own is None:
        raise UnsupportedModelError(_refusal(module, "its own _apply_gate is not one that is known"))
    activation, alpha, limit = own
    return activation, (getattr(module, alpha) if alpha is not None else None), getattr(module, limit)


def _refusal(module: hf_compat.Experts, reason: str) -> str:
    return (
        f"experts class {type(module).__name__} is not supported by 'moe_ep': {reason}. "
        "Use another experts implementation: model.set_experts_implementation('grouped_mm')."
    )

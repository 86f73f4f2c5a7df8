"""Which gate an experts module has: one that ``fused_moe`` computes exactly, or the model's own code.

A gate is recognised by what it computes, never by its name: the default gate by identity, with an activation that is
known by identity; a gate of the class's own by evaluating it against the formula that ``OWN_GATES`` claims for it.
All else runs as the model's own code between two projections (``experts.py``). ``recognise`` is plain Python on
attributes, because ``torch.compile`` may trace it: the first call of a one-process model can be a compiled one.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import nn

from moe_ops.activations import apply_activation

from . import hf_compat


class OwnGate(NamedTuple):
    """Formula of a gate: ``activation`` as in ``moe_ops.activations`` ("act_fn": the module's attribute of that
    name), and the module's attributes that hold alpha and the clamp limit."""

    activation: str
    alpha: str | None = None
    limit: str | None = None


OWN_GATES: dict[str, OwnGate] = {
    "BeamExperts": OwnGate("act_fn"),  # the default in fp32, as fused_moe computes every gate
    "DeepseekV4Experts": OwnGate("act_fn", limit="limit"),
    "Glm5NextTextExperts": OwnGate("silu", limit="swiglu_limit"),
    "HYV4Experts": OwnGate("silu", limit="swiglu_limit"),
    "GptOssExperts": OwnGate("swiglu_oai", alpha="alpha", limit="limit"),
    "OpenAIPrivacyFilterExperts": OwnGate("swiglu_oai", alpha="alpha", limit="limit"),
    "MiniMaxM3VLExperts": OwnGate("swiglu_oai", alpha="swiglu_alpha", limit="swiglu_limit"),
}
WITH_LIMIT = ("silu", "swiglu_oai")  # activations that fused_moe clamps


class Gate(NamedTuple):
    """What ``fused_moe`` needs to know about a module besides its weights."""

    activation: str
    alpha: float | None
    limit: float | None
    gated: bool
    transposed: bool
    interleaved: bool


class OwnCode(NamedTuple):
    """A gate that ``fused_moe`` does not have, and why; the model's own code computes it."""

    reason: str


def recognise(module: hf_compat.Experts) -> Gate | OwnCode:
    """The gate of an experts module."""
    if getattr(module, "has_post_expert_norm", False):
        return OwnCode("normalises each expert's output before weighting")
    interleaved = not module.is_concatenated
    if not module.has_gate:
        form, interleaved = OwnGate("act_fn"), False
    elif "_apply_gate" in vars(module):
        return OwnCode("its _apply_gate was replaced on the instance")
    elif type(module)._apply_gate is hf_compat.DEFAULT_APPLY_GATE:
        # the default gate splits in halves, whatever is_concatenated says
        form, interleaved = OwnGate("act_fn"), False
    else:
        found = OWN_GATES.get(type(module).__name__)
        if found is None or not computes(type(module), interleaved):
            return OwnCode("its own _apply_gate has no fused form")
        form = found
    activation = form.activation
    if activation == "act_fn":
        activation = hf_compat.activation_name(getattr(module, "act_fn", None))
    alpha, limit = _number(module, form.alpha), _number(module, form.limit)
    if activation is None or (form.limit and activation not in WITH_LIMIT):
        return OwnCode("its activation act_fn has no fused form")
    if (form.alpha and alpha is None) or (form.limit and limit is None):
        return OwnCode("its gate has no numbers for alpha and limit")
    return Gate(activation, alpha, limit, bool(module.has_gate), bool(module.is_transposed), interleaved)


def _number(module: hf_compat.Experts, name: str | None) -> float | None:
    value = getattr(module, name, None) if name else None
    return float(value) if isinstance(value, (int, float)) else None


@torch.compiler.assume_constant_result
def computes(cls: type, interleaved: bool) -> bool:
    """Whether ``cls._apply_gate`` is what ``OWN_GATES`` says; a constant where ``torch.compile`` traces."""
    return _computes(cls, interleaved)


@cache
def _computes(cls: type, interleaved: bool) -> bool:
    form = OWN_GATES[cls.__name__]
    return all(_agrees(cls, form, interleaved, alpha, limit) for alpha, limit in ((1.3, 2.5), (0.6, 7.0)))


def _agrees(cls: type, form: OwnGate, interleaved: bool, alpha: float, limit: float) -> bool:
    """Evaluate both on values well beyond the limit, with an instance that has nothing but what the formula uses."""
    module: Any = object.__new__(cls)
    nn.Module.__init__(module)
    module.act_fn = nn.SiLU()
    for name, value in ((form.alpha, alpha), (form.limit, limit)):
        if name:
            setattr(module, name, value)
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 6
    try:
        got = module._apply_gate(x)
    except (AttributeError, TypeError):
        return False  # it needs what the formula does not have
    wanted = apply_activation(
        x, "silu" if form.activation == "act_fn" else form.activation, alpha=alpha if form.alpha else None,
        limit=limit if form.limit else None, gated=True, interleaved=interleaved,
    )  # fmt: skip
    # 1e-5: a gate may compute in fp32
    return got.shape == wanted.shape and torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-5)

"""Which gates are recognised: every own gate that is listed is computed, in the installed transformers, as listed."""

import importlib
import importlib.util
import inspect
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.activations import ACT2FN

from graphs import gates, hf_compat
from graphs.errors import UnsupportedModelError
from moe_ops.activations import apply_activation

MODULES = {
    "BeamExperts": "beam",
    "DeepseekV4Experts": "deepseek_v4",
    "Glm5NextTextExperts": "glm5_next",
    "HYV4Experts": "hy_v4",
    "GptOssExperts": "gpt_oss",
    "OpenAIPrivacyFilterExperts": "openai_privacy_filter",
    "MiniMaxM3VLExperts": "minimax_m3_vl",
}
LIMITS = {"alpha": 1.3, "limit": 2.5, "swiglu_alpha": 1.3, "swiglu_limit": 2.5}


def experts_class(name: str) -> type:
    package = MODULES[name]
    return getattr(importlib.import_module(f"transformers.models.{package}.modeling_{package}"), name)


# what the installed transformers has: beam came after 5.17
OWN_GATES = [n for n in gates.OWN_GATES if importlib.util.find_spec(f"transformers.models.{MODULES[n]}")]


def bare_module(cls: type, **attributes: object) -> nn.Module:
    """An instance with the given attributes and no weights."""
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def default_module(act: str, **flags: object) -> nn.Module:
    @hf_compat.hf_moe.use_experts_implementation
    class SomeExperts(nn.Module):
        def forward(self, *args):
            raise NotImplementedError

    layout = {"has_gate": True, "is_transposed": False, "is_concatenated": True, "has_bias": False}
    return bare_module(SomeExperts, **({"act_fn": ACT2FN[act]} | layout | flags))


def computed(gate: gates.Gate, x: torch.Tensor) -> torch.Tensor:
    return apply_activation(
        x, gate.activation, alpha=gate.alpha, limit=gate.limit, gated=gate.gated, interleaved=gate.interleaved
    )


@pytest.mark.parametrize("name", OWN_GATES)
def test_own_gate_is_what_the_table_says(name: str):
    cls = experts_class(name)
    interleaved = "::2" in inspect.getsource(cls._apply_gate)
    layout = {"has_gate": True, "is_transposed": False, "is_concatenated": not interleaved, "has_bias": False}
    module = bare_module(cls, act_fn=ACT2FN["silu"], **layout, **LIMITS)
    x = torch.randn(64, 32) * 4  # well beyond the limit on both sides
    torch.testing.assert_close(computed(gates.recognise(module), x), module._apply_gate(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("act", "name"),
    [("silu", "silu"), ("swish", "silu"), ("gelu", "gelu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("relu2", "relu2")],
)
def test_default_gate(act: str, name: str):
    module = default_module(act)
    gate = gates.recognise(module)
    assert gate == gates.Gate(name, None, None, gated=True, transposed=False, interleaved=False)
    x = torch.randn(8, 32)
    torch.testing.assert_close(computed(gate, x), module._apply_gate(x), rtol=1e-6, atol=1e-6)


def test_ungated_squared_relu_and_layout_flags():
    gate = gates.recognise(default_module("relu2", has_gate=False, is_transposed=True, is_concatenated=False))
    assert gate == gates.Gate("relu2", None, None, gated=False, transposed=True, interleaved=False)


def reason(module: nn.Module) -> str:
    gate = gates.recognise(module)
    assert isinstance(gate, gates.OwnCode), gate
    return gate.reason


@pytest.mark.parametrize("act", ["relu", "quick_gelu", "tanh"])
def test_unknown_activation_runs_as_it_is(act: str):
    assert "act_fn has no fused form" in reason(default_module(act))
    assert "act_fn has no fused form" in reason(default_module(act, has_gate=False))


def test_subclass_of_a_known_activation_is_not_that_activation():
    class Squashed(nn.SiLU):
        def forward(self, x):
            return super().forward(x).clamp(max=1)

    assert "no fused form" in reason(default_module("silu", act_fn=Squashed()))


def test_norm_between_experts_and_weighting():
    assert "normalises each expert's output" in reason(default_module("silu", has_post_expert_norm=True))


def test_gate_replaced_on_an_instance():
    module = default_module("silu")
    module._apply_gate = lambda x: x[..., ::2]
    assert "replaced on the instance" in reason(module)


def clamp_after(self, x):
    """As DeepSeek-V4's, but the clamp comes after the activation: one that real models have, too."""
    gate, up = x.chunk(2, dim=-1)
    return self.act_fn(gate).clamp(max=self.limit) * up.clamp(min=-self.limit, max=self.limit)


def more_attributes(self, x):
    gate, up = x.chunk(2, dim=-1)
    return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(-self.limit, self.limit) * self.scale


@pytest.mark.parametrize("gate", [lambda self, x: x.chunk(2, -1)[0], clamp_after, more_attributes])
def test_a_known_name_with_another_gate_is_not_taken_for_it(gate):
    cls = type("DeepseekV4Experts", (nn.Module,), {"_apply_gate": gate})
    layout = {"has_gate": True, "is_transposed": False, "is_concatenated": True, "has_bias": False}
    module = bare_module(cls, act_fn=nn.SiLU(), limit=2.5, scale=1.0, **layout)
    assert "own _apply_gate" in reason(module)


def test_known_gate_with_another_activation_or_without_numbers():
    cls = experts_class("DeepseekV4Experts")
    layout = {"has_gate": True, "is_transposed": False, "is_concatenated": True, "has_bias": False}
    assert "act_fn has no fused form" in reason(bare_module(cls, act_fn=ACT2FN["gelu"], limit=2.5, **layout))
    assert "no numbers" in reason(bare_module(cls, act_fn=ACT2FN["silu"], limit=None, **layout))


def test_recognition_is_traced_to_constants():
    module = bare_module(experts_class("GptOssExperts"), alpha=1.3, limit=2.5, has_gate=True, is_transposed=True,
                         is_concatenated=False, has_bias=True)  # fmt: skip
    gates._computes.cache_clear()  # the first call of all is the traced one
    traced = torch.compile(lambda x: x * gates.recognise(module).limit, backend="eager", fullgraph=True)
    assert traced(torch.ones(1)) == 2.5
    torch._dynamo.reset()


def test_quantized_weights_are_refused():
    for method in ("fp8", "mxfp4"):
        for quantization in ({"quant_method": method}, SimpleNamespace(quant_method=SimpleNamespace(value=method))):
            with pytest.raises(
                UnsupportedModelError, match=rf"quantized \({method}\).*from_pretrained\(path, dequantize=True\)"
            ):
                hf_compat.refuse_quantized(SimpleNamespace(quantization_config=quantization))

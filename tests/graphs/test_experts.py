"""The experts implementation in one process: what ``set_experts_implementation("moe_ep")`` alone gives."""

import itertools
import types

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

import graphs
from graphs import experts, hf_compat
from graphs.checkpoints import tiny_model
from graphs.gates import OwnCode, recognise
from moe_ops.errors import CapacityError
from tests.graphs.model_cases import FAMILIES, GraphKeeper, plain_model, prompts_of
from tests.tolerances import MODEL_BF16_OVER_PLAIN, relative_error

IDS = torch.randint(1, 512, (2, 7), generator=torch.Generator().manual_seed(0))


def logits(model, **kwargs) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_eager_hugging_face(family: str):
    model = plain_model(family)
    expected = logits(model)
    model.set_experts_implementation("moe_ep")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_is_as_near_to_fp32_as_hugging_face(family: str):
    ids = torch.tensor(prompts_of([32] * 8))
    model = plain_model(family, torch.bfloat16)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        model.set_experts_implementation("moe_ep")
        ours = model(ids, use_cache=False).logits
        model.set_experts_implementation("eager")
        exact = model.float()(ids, use_cache=False).logits
    assert ours.dtype == torch.bfloat16
    assert relative_error(ours, exact) < MODEL_BF16_OVER_PLAIN * relative_error(plain, exact)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_carry_weight(family: str):
    """The comparisons here would notice a wrong expert: without experts the logits are others altogether."""
    model = plain_model(family)
    expected = logits(model)
    for name, parameter in model.named_parameters():
        if "experts" in name and "shared" not in name:
            parameter.data.zero_()
    assert (logits(model) - expected).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
def test_first_call_may_be_the_compiled_one(family: str):
    model = tiny_model(family)
    expected = logits(plain_model(family))
    model.set_experts_implementation("moe_ep")
    keeper = GraphKeeper()
    compiled = torch.compile(model, backend=keeper, fullgraph=True, dynamic=False)
    torch.testing.assert_close(logits(compiled), expected, rtol=0, atol=1e-5)
    assert len(keeper.graphs) == 1
    assert keeper.integer_inputs() == keeper.unbacked() == []
    assert keeper.calls("fused_moe") == 2
    torch._dynamo.reset()


OWN_GATES = {  # family, overrides of its configuration -> whether a norm follows each expert
    "unknown activation": ("mixtral", {"hidden_act": "relu"}, False),
    "transposed, interleaved, biased": ("gpt_oss", {}, False),
    "norm after each expert": ("olmoe", {}, True),
}


@pytest.mark.parametrize("case", OWN_GATES)
def test_any_other_gate_runs_as_the_models_own_code(case: str):
    """Two projections with the model's code between them: equal to Hugging Face, in one graph."""
    family, overrides, norm = OWN_GATES[case]
    model = plain_model(family, **overrides)
    modules = list(hf_compat.experts_modules(model).values())
    for module in modules:
        if hasattr(module, "_apply_gate"):
            module._apply_gate = module._apply_gate  # on the instance it could be anything
        if norm:
            module.has_post_expert_norm, module.post_expert_norm = True, torch.nn.LayerNorm(128)
    assert all(isinstance(recognise(module), OwnCode) for module in modules)
    # transformers before 5.20 knows no norm, and the class's own forward has none
    expected = logits(model) if not norm else logits_with_norms(model, modules)
    model.set_experts_implementation("moe_ep")
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
    keeper = GraphKeeper()
    compiled = torch.compile(model, backend=keeper, fullgraph=True, dynamic=False)
    torch.testing.assert_close(logits(compiled), expected, rtol=0, atol=1e-5)
    assert (keeper.calls("fused_moe"), keeper.calls("expert_linear"), keeper.calls("topk_sum")) == (0, 4, 2)
    assert len(keeper.graphs) == 1 and keeper.integer_inputs() == keeper.unbacked() == []
    torch._dynamo.reset()


def logits_with_norms(model, modules) -> torch.Tensor:
    """By a plain loop over rows and slots, in place of the experts' own forward."""

    def forward(self, hidden, index, weights):
        out = torch.zeros_like(hidden)
        for row, slot in itertools.product(range(len(hidden)), range(index.shape[1])):
            expert = index[row, slot]
            inner = self._apply_gate(self.gate_up_proj[expert] @ hidden[row])
            out[row] += weights[row, slot] * self.post_expert_norm(self.down_proj[expert] @ inner)
        return out

    for module in modules:
        module.forward = types.MethodType(forward, module)
    expected = logits(model)
    for module in modules:
        del module.forward
    return expected


def test_switching_back_gives_hugging_face_again():
    model = plain_model("qwen3_moe")
    expected = logits(model)
    for name in ("moe_ep", "grouped_mm", "moe_ep", "eager"):
        model.set_experts_implementation(name)
        torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)


def test_bf16_experts_take_fp32_hidden_states():
    model = tiny_model("mixtral")
    experts = model.model.layers[0].mlp.experts.to(torch.bfloat16)
    model.set_experts_implementation("moe_ep")
    hidden, weights = torch.randn(3, 128), torch.rand(3, 2)
    out = experts(hidden, torch.tensor([[0, 1], [2, 3], [4, 7]]), weights)
    assert out.dtype == torch.float32 and out.shape == hidden.shape


def test_rows_that_are_not_live_come_out_as_zeros():
    model = graphs.shard_experts(tiny_model("qwen3_moe"), max_tokens_per_rank=1)
    state = graphs.expert_parallel_state(model)
    experts = model.model.layers[0].mlp.experts
    x, ids, weights = torch.randn(8, 128), torch.randint(0, 8, (8, 2)), torch.rand(8, 2)
    everything = experts(x, ids, weights)
    state.declare_batch(4, 4)  # 4 sequences of 2 tokens
    state.live.fill_(3)
    some = experts(x, ids, weights)
    torch.testing.assert_close(some[:6], everything[:6], rtol=0, atol=1e-5)
    assert not some[6:].any()


def test_rows_that_do_not_fill_the_declared_batch_are_an_error():
    model = graphs.shard_experts(tiny_model("qwen3_moe"), max_tokens_per_rank=1)
    graphs.expert_parallel_state(model).declare_batch(4, 4)
    with pytest.raises(CapacityError, match="7 tokens does not hold 4 sequences"):
        model.model.layers[0].mlp.experts(torch.randn(7, 128), torch.zeros(7, 2, dtype=torch.long), torch.rand(7, 2))


class CountUpdates(TorchDispatchMode):
    """How often ``metadata_update`` ran."""

    seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += func is torch.ops.moe_ep.metadata_update.default
        return func(*args, **(kwargs or {}))


def test_metadata_is_asked_for_once_a_forward_and_by_a_layer_alone():
    """Rank 0 of two, the other one without rows."""
    model = tiny_model("qwen3_moe")
    modules = list(hf_compat.experts_modules(model).values())
    state = experts.ExpertParallelState("local", 0, 2, max_tokens_per_rank=14, device=torch.device("cpu"))
    experts.share_state(modules, state)
    expected = logits(model)
    model.set_experts_implementation("moe_ep")
    for runs in (1, 2):
        with CountUpdates() as updates:
            torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-5)
        assert updates.seen == 1 and state.metadata is None, runs
    call = (torch.randn(3, 128), torch.randint(0, 8, (3, 2)), torch.rand(3, 2))
    with CountUpdates() as updates:
        alone = modules[1](*call)
    assert updates.seen == 1 and state.metadata is None
    modules[0](torch.randn(5, 128), torch.randint(0, 8, (5, 2)), torch.rand(5, 2))  # a forward that goes no further
    assert state.metadata is not None and state.metadata.tolist() == [5, 0, 5]
    state.declare_batch(None)
    assert torch.equal(modules[1](*call), alone)


def test_generate_works_on_the_same_model():
    model = plain_model("olmoe")
    expected = model.generate(IDS, max_new_tokens=5, do_sample=False)
    model.set_experts_implementation("moe_ep")
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), expected)
    assert torch.equal(
        model.generate(IDS, max_new_tokens=5, do_sample=False, cache_implementation="static", disable_compile=True),
        expected,
    )
    assert not counters["graph_break"]

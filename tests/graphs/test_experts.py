"""The experts implementation in one process: what ``set_experts_implementation("moe_ep")`` alone gives."""

import pytest
import torch
from torch._dynamo.utils import counters

import graphs
from graphs.checkpoints import tiny_model
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

"""A shared expert moves into its layer's op, bits as Inductor's code has them, or the reason why not is reported."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor import config

import lowering
from graphs import experts, hf_compat
from graphs.experts import ExpertParallelState
from lowering import overlap_shared, torch_compat
from lowering.passes import Options, run_passes
from tests.graphs.serve_cases import served_model
from tests.lowering.layers import H, batch, inference_graph, routed, text, weights

COUNT = torch.tensor([5], dtype=torch.int32)
S = 48
CPU = torch.device("cpu")


def shared_weights() -> dict[str, Tensor]:
    """As transformers stores them: (out, in)."""
    generator = torch.Generator().manual_seed(7)
    sizes = {"gate": (S, H), "up": (S, H), "both": (2 * S, H), "down": (H, S), "sigmoid": (1, H)}
    return {name: (torch.randn(*size, generator=generator) / 4).bfloat16() for name, size in sizes.items()}


def mlp(x: Tensor, s: dict[str, Tensor]) -> Tensor:
    return F.linear(F.silu(F.linear(x, s["gate"])) * F.linear(x, s["up"]), s["down"])


def deepseek(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    """As in transformers: three dimensions around, two inside."""
    x = x.view(2, 4, H)
    return x + (routed(x.view(-1, H), w, count).view(2, 4, H) + mlp(x, s))


def added_at_once(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    return x + (routed(x, w, count) + mlp(x, s))


def one_projection(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    gate, up = F.linear(x, s["both"]).chunk(2, -1)
    return routed(x, w, count) + F.linear(up * F.silu(gate), s["down"])


def qwen2_moe(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    return x + (routed(x, w, count) + torch.sigmoid(F.linear(x, s["sigmoid"])) * mlp(x, s))


def two_layers(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    return qwen2_moe(deepseek(x, w, s, count).view(-1, H), w, s, count)


def three_layers(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    for _ in range(3):
        x = added_at_once(x, w, s, count)
    return x


MODELS = (deepseek, added_at_once, one_projection, qwen2_moe, two_layers, three_layers)


def activation_read_twice(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    act = F.silu(F.linear(x, s["gate"])) * F.linear(x, s["up"])
    return routed(x, w, count) + F.linear(act, s["down"]) + F.linear(act.relu(), s["down"])


def projection_read_twice(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    up = F.linear(x, s["up"])
    return routed(x, w, count) + F.linear(F.silu(F.linear(x, s["gate"])) * up, s["down"]) + F.linear(up, s["down"])


def silu_read_twice(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    gate = F.silu(F.linear(x, s["gate"]))
    return routed(x, w, count) + F.linear(gate * F.linear(x, s["up"]), s["down"]) + F.linear(gate, s["down"])


def product_read_twice(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    shared = mlp(x, s)
    return (routed(x, w, count) + shared).relu() * shared


def weight_of_the_layer(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    y = routed(x, w, count)
    return y + mlp(x, s | {"gate": s["gate"] + y[0]})


def halves_of_rows(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    gate, up = F.linear(x, s["both"]).chunk(2)
    return routed(x, w, count) + F.linear(F.silu(gate) * up, s["both"].T).repeat(2, 1)


def of_another_input(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    return routed(x, w, count) + mlp(x + 1, s)


def halves_swapped(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    up, gate = F.linear(x, s["both"]).chunk(2, -1)
    return routed(x, w, count) + F.linear(F.silu(gate) * up, s["down"])


def another_activation(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    return routed(x, w, count) + F.linear(F.gelu(F.linear(x, s["gate"])) * F.linear(x, s["up"]), s["down"])


def with_biases(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    gate, up = (F.linear(x, s[name], s[name].sum(1)) for name in ("gate", "up"))
    return routed(x, w, count) + F.linear(F.silu(gate) * up, s["down"])


def no_shared_expert(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
    return routed(x, w, count) * torch.sigmoid(F.linear(x, s["sigmoid"]))


NOT_MATCHED = (
    activation_read_twice, projection_read_twice, silu_read_twice, product_read_twice, weight_of_the_layer,
    of_another_input, halves_of_rows, halves_swapped, another_activation, with_biases, no_shared_expert,
)  # fmt: skip


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch_compat.without_caches():
        yield
    torch_compat.install_pass(None)
    lowering.enable()


def lower(model: Callable, rounding: str = "compiled") -> tuple[str, list[str], list[str]]:
    module, _ = inference_graph(model, batch(), weights(), shared_weights(), COUNT)
    outcome = run_passes(module.graph, Options(frozenset({"agreement"}), rounding)).outcome("overlap_shared")
    return text(module.graph), outcome.done, [f"{refusal.node}: {refusal.reason}" for refusal in outcome.refused]


def test_the_graph_of_a_layer():
    graph, done, refused = lower(deepseek)
    assert_expected_inline(
        "\n".join(graph.splitlines()[-14:]),
        """\
convert_element_type_3 = prims.convert_element_type(div, torch.bfloat16)
topk = topk(convert_element_type_3, 2)
getitem_2 = topk[0]
getitem_3 = topk[1]
slice_1 = slice.Tensor(getitem_1, 0, 0, 1)
permute = permute(in3, [1, 0])
permute_1 = permute(in4, [1, 0])
permute_2 = permute(in5, [1, 0])
with_effects_6 = !moe_layer_shared(getitem, view_1, getitem_3, getitem_2, in6, in7, in1, getitem_1, 0, 8, [in0], view_1, [permute, permute_1], permute_2, 0, 'local', entry_barrier=False, experts_per_rank=0, scale=1.0, round_each=False, combine_dtype=None, norm_weight=None, norm_eps=0.0, norm_shift=0.0, norm_round_first=True, activation=silu, alpha=None, limit=None, gated=True, transposed=False, interleaved=False, gate_up_bias=None, down_bias=None, tokens_hint=None, batch_invariant=False, shared_round_each=False)
getitem_16 = with_effects_6[0]
getitem_17 = with_effects_6[1]
getitem_18 = with_effects_6[2]
view_default = view(getitem_17, [2, 4, 32])
return (view_default)""",  # noqa: E501
    )
    assert done == ["with_effects_6: mm_3 of permute, permute_1 runs beside the layer"] and not refused


def test_the_graph_of_glm4_in_transformers():
    """Router, routed experts, shared expert and residual of one layer, as its own code has them."""
    model = served_model("glm4_moe", torch.bfloat16)
    experts.share_state(hf_compat.experts_modules(model).values(), ExpertParallelState("local", 0, 2, 8, CPU))
    model.set_experts_implementation(experts.NAME)
    module, _ = inference_graph(lambda x: x + model.model.layers[1].mlp(x), batch().repeat(1, 4).view(8, 1, 4 * H))
    outcome = run_passes(module.graph, Options(frozenset({"agreement"}))).outcome("overlap_shared")
    graph = text(module.graph)
    assert_expected_inline(
        graph[graph.index("view_4 = ") :],
        """\
view_4 = view(in0, [-1, 128])
full_1 = full([1], 8, dtype=torch.int32, device=cpu, pin_memory=False)
with_effects = !metadata_update(_make_token_default, full_1, 'local')
getitem_6 = with_effects[0]
getitem_7 = with_effects[1]
slice_1 = slice.Tensor(getitem_7, 0, 0, 1)
permute_1 = permute(in3, [1, 0])
permute_2 = permute(in4, [1, 0])
permute_3 = permute(in5, [1, 0])
view_default = view(in0, [8, 128])
with_effects_6 = !moe_layer_shared(getitem_6, view_4, getitem_5, mul, in6, in7, full_1, getitem_7, 0, 16, [view_default], view_4, [permute_1, permute_2], permute_3, 0, 'local', entry_barrier=False, experts_per_rank=0, scale=1.0, round_each=False, combine_dtype=torch.bfloat16, norm_weight=None, norm_eps=0.0, norm_shift=0.0, norm_round_first=True, activation=silu, alpha=None, limit=None, gated=True, transposed=False, interleaved=False, gate_up_bias=None, down_bias=None, tokens_hint=None, batch_invariant=False, shared_round_each=False)
getitem_20 = with_effects_6[0]
getitem_21 = with_effects_6[1]
getitem_22 = with_effects_6[2]
view_default_1 = view(getitem_21, [8, 1, 128])
return (view_default_1, getitem_7)""",  # noqa: E501
    )
    assert outcome.done == ["with_effects_6: mm_3 of permute_1, permute_2 runs beside the layer"]
    assert not outcome.refused


def test_what_is_done_and_refused():
    lines = []
    for model in (*MODELS, *NOT_MATCHED):
        for rounding in ("compiled", "eager"):
            graph, done, refused = lower(model, rounding)
            assert graph.count("!moe_layer_shared") == len(done)
            lines.append(f"{model.__name__} {rounding}: {'; '.join([*done, *refused]) or 'nothing found'}")
    assert_expected_inline(
        "\n".join(lines),
        """\
deepseek compiled: with_effects_6: mm_3 of permute, permute_1 runs beside the layer
deepseek eager: with_effects_6: mm_3 of permute, permute_1 runs beside the layer
added_at_once compiled: with_effects_5: mul of permute, permute_1 runs beside the layer, its last product stays behind (addmm)
added_at_once eager: with_effects_6: mm_3 of permute, permute_1 runs beside the layer
one_projection compiled: with_effects_5: mul of permute runs beside the layer, its last product stays behind (addmm)
one_projection eager: with_effects_6: mm_2 of permute runs beside the layer
qwen2_moe compiled: with_effects_5: mm_4 of permute_1, permute_2 runs beside the layer
qwen2_moe eager: with_effects_5: mm_4 of permute_1, permute_2 runs beside the layer
two_layers compiled: with_effects_11: mm_3 of permute, permute_1 runs beside the layer; with_effects_10: mm_8 of permute_4, permute_5 runs beside the layer
two_layers eager: with_effects_12: mm_3 of permute, permute_1 runs beside the layer; with_effects_11: mm_8 of permute_4, permute_5 runs beside the layer
three_layers compiled: with_effects_17: mul of permute, permute_1 runs beside the layer, its last product stays behind (addmm); with_effects_16: mul_1 of permute_3, permute_4 runs beside the layer, its last product stays behind (addmm); with_effects_15: mul_2 of permute_6, permute_7 runs beside the layer, its last product stays behind (addmm)
three_layers eager: with_effects_20: mm_3 of permute, permute_1 runs beside the layer; with_effects_19: mm_7 of permute_3, permute_4 runs beside the layer; with_effects_18: mm_11 of permute_6, permute_7 runs beside the layer
activation_read_twice compiled: mul: mm_3, relu: no single matrix product reads it
activation_read_twice eager: mul: mm_3, relu: no single matrix product reads it
projection_read_twice compiled: mul: mm has 2 readers
projection_read_twice eager: mul: mm has 2 readers
silu_read_twice compiled: mul: no silu(gate) * up of two products without bias, or of the halves of one, gate first
silu_read_twice eager: mul: no silu(gate) * up of two products without bias, or of the halves of one, gate first
product_read_twice compiled: with_effects_5: mm_2 of permute, permute_1 runs beside the layer
product_read_twice eager: mul: mm_2 is added to the combine's result and has other readers
weight_of_the_layer compiled: mul: permute depends on the layer
weight_of_the_layer eager: mul: permute depends on the layer
of_another_input compiled: mul: it reads add, which is no layer's input
of_another_input eager: mul: it reads add, which is no layer's input
halves_of_rows compiled: mul: no silu(gate) * up of two products without bias, or of the halves of one, gate first
halves_of_rows eager: mul: no silu(gate) * up of two products without bias, or of the halves of one, gate first
halves_swapped compiled: mul: no silu(gate) * up of two products without bias, or of the halves of one, gate first
halves_swapped eager: mul: no silu(gate) * up of two products without bias, or of the halves of one, gate first
another_activation compiled: mul_3: no silu(gate) * up of two products without bias, or of the halves of one, gate first
another_activation eager: mul_3: no silu(gate) * up of two products without bias, or of the halves of one, gate first
with_biases compiled: mul: no silu(gate) * up of two products without bias, or of the halves of one, gate first
with_biases eager: mul: no silu(gate) * up of two products without bias, or of the halves of one, gate first
no_shared_expert compiled: nothing found
no_shared_expert eager: nothing found""",  # noqa: E501
    )


def test_many_rows_stay_behind(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(overlap_shared, "MAX_ROWS", 7)
    graph, done, refused = lower(deepseek)
    assert not done and "!moe_layer_shared" not in graph
    assert refused == ["mul: 8 rows: beside the layer it takes longer than behind it"]


def run(model: Callable) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, fullgraph=True)(batch(), weights(), shared_weights(), COUNT)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_bits_are_those_of_the_unlowered_code(model: Callable):
    lowering.enable(rounding="compiled")
    explanation = lowering.explain(model, batch(), weights(), shared_weights(), COUNT)
    assert explanation.ops["moe_layer_shared"] >= 1 and not explanation.copies, explanation
    lowered = run(model)
    lowering.disable()
    assert torch.equal(lowered, run(model))


def test_rounding_after_each_step_where_torch_does():
    with config.patch(emulate_precision_casts=True):
        lowering.enable(rounding="compiled")
        lowered = run(qwen2_moe)
        lowering.disable()
        assert torch.equal(lowered, run(qwen2_moe))

"""The next block's RMSNorm, and the adds before it, join the combine."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

import lowering
from lowering import fuse_norm, torch_compat
from lowering.fuse_norm import FuseNorm
from lowering.passes import Options, run_passes
from tests.lowering.layers import H, T, batch, inference_graph, ops, routed, text, weights
from tests.lowering.test_models import LAYERS, decode_step
from tests.lowering.test_models import T as DECODED

COUNT, METADATA = torch.tensor([5], dtype=torch.int32), torch.tensor([5, 0, 5], dtype=torch.int32)
WEIGHT = torch.randn(H, generator=torch.Generator().manual_seed(9)).bfloat16()

HALF = WEIGHT[: H // 2].clone()


def combine(y: Tensor, **options: object) -> Tensor:
    return ops.rsv_combine(y, COUNT, ops.metadata_update(COUNT, "local"), T, "local", **options)


def scaled(x: Tensor) -> Tensor:
    """``x / rms(x)`` in fp32, as models write it."""
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)


def llama_norm(x: Tensor) -> Tensor:
    return WEIGHT * scaled(x).to(x.dtype)


def gpt_oss_norm(x: Tensor) -> Tensor:
    return (WEIGHT * scaled(x)).to(x.dtype)


def qwen_next_norm(x: Tensor) -> Tensor:
    return (scaled(x) * (1.0 + WEIGHT.float())).type_as(x)


def block(y: Tensor, shared: Tensor, residual: Tensor, norm: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """As a model goes on: in three dimensions, a product of the norm, and the residual stream."""
    x = residual.view(T, 1, H) + (combine(y).view(T, 1, H) + shared.view(T, 1, H))
    normed = norm(x)
    return normed.view(T, H).relu(), x


def arguments() -> tuple[Tensor, ...]:
    return batch(1), batch(2), batch(3)


def lower(model: Callable, *given: Tensor) -> tuple[str, list[str], list[str], list[list[Tensor]]]:
    """Text after the pass, what it did, what it refused, and the results before and after."""
    module, inputs = inference_graph(model, *(given or arguments()))
    before = module(*inputs)
    outcome = FuseNorm().run(module.graph, "eager")
    module.graph.lint()
    module.recompile()
    refused = [f"{r.node}: {r.reason}" for r in outcome.refused]
    return text(module.graph), outcome.done, refused, [before, module(*inputs)]


def test_adds_and_norm_join():
    graph, done, refused, _ = lower(lambda y, s, r: block(y, s, r, llama_norm))
    assert_expected_inline(
        graph,
        """\
_make_token_default = prims._make_token()
with_effects = !metadata_update(_make_token_default, in0, 'local')
getitem = with_effects[0]
getitem_1 = with_effects[1]
with_effects_2 = !rsv_combine_add(getitem, in1, in0, getitem_1, 8, [in2, in3], 'local', scale=1.0, round_each=True, out_dtype=None, norm_weight=in4, norm_eps=1e-06, norm_shift=0.0, norm_round_first=True)
getitem_4 = with_effects_2[0]
getitem_5 = with_effects_2[1]
select_int = select.int(getitem_5, 0, 0)
select_int_1 = select.int(getitem_5, 0, 1)
view_default = view(select_int, [8, 1, 32])
view_default_1 = view(select_int_1, [8, 1, 32])
view_3 = view(view_default_1, [8, 32])
relu = relu(view_3)
return (relu, view_default)""",  # noqa: E501
    )
    assert_expected_inline("\n".join(done), """with_effects_2: with_effects_1 joined by add, add_1, mul_1""")
    assert not refused


@pytest.mark.parametrize("norm", [llama_norm, gpt_oss_norm, qwen_next_norm])
def test_interpreted_graphs_are_bit_equal(norm: Callable[[Tensor], Tensor]):
    """Interpreted on the CPU, where both compute it as the model says; what Inductor makes of it is compared below."""
    graph, done, _, (before, after) = lower(lambda y, s, r: block(y, s, r, norm))
    assert len(done) == 1 and "rsqrt" not in graph
    assert all(map(torch.equal, before, after))


def test_a_norm_alone_joins():
    """Of the last layer, whose residual stream ends here."""
    _, done, refused, (before, after) = lower(lambda y, s, r: llama_norm(combine(y)))
    assert len(done) == 1 and not refused and torch.equal(before[0], after[0])


def no_norm(y: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return (combine(y) + shared).relu()


def layer_norm(y: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return torch.nn.functional.layer_norm(combine(y) + shared, (H,), WEIGHT)


def computed_weight(y: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return (WEIGHT * 2) * scaled(combine(y) + shared).to(y.dtype)


def pointwise_addend(y: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return llama_norm(combine(y) + shared.sin())


def two_readers(y: Tensor, shared: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    c = combine(y)
    return llama_norm(c + shared), c * 2


def wide_result(y: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return llama_norm(combine(y, out_dtype=torch.float32) + shared.float())


def norm_of_another_part(y: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    x = (combine(y) + shared).view(T, 2, H // 2)
    return HALF * scaled(x).to(y.dtype)


def test_refusals_and_their_reasons():
    lines = []
    for model in (
        no_norm, layer_norm, computed_weight, pointwise_addend, two_readers, wide_result, norm_of_another_part
    ):  # fmt: skip
        graph, done, refused, (before, after) = lower(model)
        assert "norm_weight" not in graph and all(map(torch.equal, before, after))
        lines.append(f"{model.__name__}: {len(done)} joined; {'; '.join(refused) or 'nothing refused'}")
    assert_expected_inline(
        "\n".join(lines),
        """\
no_norm: 0 joined; add: no RMSNorm reads it
layer_norm: 0 joined; convert_element_type: a cast joins only right behind a combine that returns float32
computed_weight: 0 joined; mul_2: its weight mul is computed in the graph: it would cost a launch
pointwise_addend: 0 joined; add: sin is pointwise with no other reader: it would cost a launch
two_readers: 0 joined; with_effects_1: its result has 2 readers
wide_result: 0 joined; add: convert_element_type is pointwise with no other reader: it would cost a launch
norm_of_another_part: 0 joined; add: no RMSNorm reads it""",
    )


@pytest.mark.parametrize(
    ("dim", "keepdim", "weight"),
    [(0, True, WEIGHT), ((0, 1), True, WEIGHT), (-1, False, WEIGHT), (-1, True, WEIGHT.float())],
)
def test_other_means_and_weights_are_no_norm(dim: int | tuple[int, ...], keepdim: bool, weight: Tensor):
    """H rows of H, so that a mean broadcasts whichever way it was taken."""

    def model(y: Tensor, shared: Tensor) -> Tensor:
        x = ops.rsv_combine(y, COUNT, METADATA, H, "local") + shared
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(dim, keepdim=keepdim) + 1e-6)).to(x.dtype)

    graph, done, refused, (before, after) = lower(model, torch.randn(H, H).bfloat16(), torch.randn(H, H).bfloat16())
    assert not done and len(refused) == 1 and "norm_weight" not in graph and torch.equal(before[0], after[0])


@pytest.mark.parametrize(("name", "limit"), [("MAX_ROWS", T - 1), ("MAX_NORM_WIDTH", H - 1)])
def test_too_large_is_refused(name: str, limit: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuse_norm, name, limit)
    _, done, refused, _ = lower(lambda y, s, r: block(y, s, r, llama_norm)[0])
    assert not done and f"it gathers {T} rows of {H}; at most" in refused[0]


def test_no_kernel_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lowering.fuse_combine.is_one_kernel", lambda op: False)
    _, done, refused, _ = lower(lambda y, s, r: block(y, s, r, llama_norm)[0])
    assert not done and "the group's transport has no kernel of its own" in refused[0]


def layer(x: Tensor, w: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    x = x + routed(x, w, COUNT)
    return x, llama_norm(x) @ w["shared"]


def test_a_whole_layer_becomes_one_op_with_a_norm():
    module, inputs = inference_graph(layer, batch(), weights())
    wanted = module(*inputs)
    report = run_passes(module.graph, Options(inexact=True))
    module.recompile()
    assert report.ops_after == {"agree": 1, "metadata_update": 1, "moe_layer": 1}
    assert "norm_weight=bfloat16[32]" in report.outcome("agreement").done[0]  # ranks that differ here must not meet
    torch.testing.assert_close(module(*inputs), wanted, rtol=2**-7, atol=2**-6)


def test_runs_only_where_bits_may_change():
    for inexact in (False, True):
        module, _ = inference_graph(layer, batch(), weights())
        outcome = run_passes(module.graph, Options(inexact=inexact)).outcome("fuse_norm")
        assert (outcome.enabled, len(outcome.done)) == (inexact, int(inexact))


def test_compiled_by_inductor():
    torch._dynamo.reset()
    lowering.enable(rounding="compiled", without=[])
    with torch.no_grad(), torch_compat.without_caches():
        with lowering.allow_inexact():
            explanation = lowering.explain(layer, batch(), weights())
            got = torch.compile(layer, fullgraph=True)(batch(), weights())
        assert explanation.ops == {"agree": 1, "metadata_update": 1, "moe_layer": 1}
        assert not explanation.copies
        torch._dynamo.reset()
        wanted = torch.compile(layer, fullgraph=True)(batch(), weights())
    assert torch.equal(got[0], wanted[0])  # the residual stream
    torch.testing.assert_close(got[1], wanted[1], rtol=2**-6, atol=2**-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral"])
def test_every_layer_of_a_decode_step_joins_the_next_norm(family: str):
    """What a model adds (shared expert, residual; in three dimensions) and how it writes its norm is its own."""
    ids = torch.randint(1, 500, (DECODED, 1), generator=torch.Generator().manual_seed(0))
    module, _ = inference_graph(decode_step(family, 2), ids)
    norms = count_of(module.graph, torch.ops.aten.rsqrt.default)
    report = run_passes(module.graph, Options(inexact=True))
    outcome = report.outcome("fuse_norm")
    assert len(outcome.done) == LAYERS[family] and not outcome.refused
    assert norms - count_of(module.graph, torch.ops.aten.rsqrt.default) == LAYERS[family]
    layer = "moe_layer_shared" if family == "deepseek_v3" else "moe_layer"
    assert report.ops_after[layer] == LAYERS[family]


def count_of(graph: torch.fx.Graph, target: object) -> int:
    return sum(1 for node in graph.nodes if node.target is target and node.users)

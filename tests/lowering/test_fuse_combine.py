"""Cast, scaling and adds behind a combine join it, where every value keeps its bits."""

from collections.abc import Callable, Iterator

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor import config

import lowering
from lowering import torch_compat
from lowering.fuse_combine import MAX_ADDENDS, FuseCombine
from tests.lowering.layers import T, batch, inference_graph, ops, routed, text, weights

COUNT = torch.tensor([5], dtype=torch.int32)


@pytest.fixture
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch_compat.without_caches():
        yield
    torch_compat.install_pass(None)
    lowering.enable()


def combine(y: Tensor, count: Tensor, **options: object) -> Tensor:
    return ops.rsv_combine(y, count, ops.metadata_update(count, "local"), T, "local", **options)


def add_both(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return residual + (combine(y, count) + shared)


def scale_and_add(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return combine(y, count) * 2.5 + shared


def cast_and_add(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return combine(y, count, out_dtype=torch.float32).to(torch.bfloat16) + residual


def shared_product(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return combine(y, count) + residual @ shared.T @ shared


def pointwise_addend(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return combine(y, count) + shared.sin()


def norm_behind(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    x = combine(y, count) + residual
    return x * x.float().pow(2).mean(-1, keepdim=True).rsqrt().to(x.dtype)


def broadcast(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return combine(y, count) + shared[0]


def two_readers(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    c = combine(y, count)
    return (c + shared) * c


def later_op(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return combine(y, count) + combine(residual, count)


def alpha(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return torch.add(combine(y, count), shared, alpha=2)


def arguments() -> tuple[Tensor, ...]:
    return batch(1), COUNT, batch(2), batch(3)


def lower(model: Callable, rounding: str) -> tuple[str, list[str], list[str], bool]:
    """Text after the pass, what it did, what it refused, and whether the interpreted graph gives the same bits."""
    module, inputs = inference_graph(model, *arguments())
    before = module(*inputs)[0]
    outcome = FuseCombine().run(module.graph, rounding)
    module.graph.lint()
    module.recompile()
    same = torch.equal(before, module(*inputs)[0])
    return text(module.graph), outcome.done, [f"{r.node}: {r.reason}" for r in outcome.refused], same


def test_both_adds_join():
    graph, done, refused, _ = lower(add_both, "compiled")
    assert_expected_inline(
        graph,
        """\
_make_token_default = prims._make_token()
with_effects = !metadata_update(_make_token_default, in0, 'local')
getitem = with_effects[0]
getitem_1 = with_effects[1]
with_effects_2 = !rsv_combine_add(getitem, in1, in0, getitem_1, 8, [in2, in3], 'local', scale=1.0, round_each=False, out_dtype=None)
getitem_4 = with_effects_2[0]
getitem_5 = with_effects_2[1]
return (getitem_5)""",  # noqa: E501
    )
    assert done == ["with_effects_2: with_effects_1 joined by add, add_1"] and not refused


@pytest.mark.parametrize("model", [add_both, scale_and_add, cast_and_add, shared_product, norm_behind])
def test_eager_rounding_joins_and_keeps_every_bit_of_the_ops_alone(model: Callable):
    graph, done, _, same = lower(model, "eager")
    assert len(done) == 1 and "!rsv_combine_add" in graph and same


def test_refusals_and_their_reasons():
    lines = []
    for model in (
        shared_product, pointwise_addend, norm_behind, broadcast, two_readers, later_op, scale_and_add, alpha,
    ):  # fmt: skip
        for rounding in ("compiled", "eager"):
            _, done, refused, same = lower(model, rounding)
            assert same or rounding == "compiled"
            lines.append(f"{model.__name__} {rounding}: {len(done)} joined; {'; '.join(refused) or 'nothing refused'}")
    assert_expected_inline("\n".join(lines), """\
shared_product compiled: 0 joined; add: torch folds this add into mm_1 (addmm), which rounds once (rounding='eager' joins it)
shared_product eager: 1 joined; nothing refused
pointwise_addend compiled: 0 joined; add: sin is pointwise: Inductor keeps it in fp32, a buffer would round it (rounding='eager' joins it)
pointwise_addend eager: 0 joined; add: sin is pointwise with no other reader: it would cost a launch
norm_behind compiled: 0 joined; add: convert_element_type reads it: Inductor keeps it in fp32, a buffer would round it (rounding='eager' joins it)
norm_behind eager: 1 joined; nothing refused
broadcast compiled: 0 joined; add: select has another shape or dtype
broadcast eager: 0 joined; add: select has another shape or dtype
two_readers compiled: 0 joined; with_effects_1: its result has 2 readers
two_readers eager: 0 joined; with_effects_1: its result has 2 readers
later_op compiled: 1 joined; add: getitem_7 depends on a later ordered op
later_op eager: 1 joined; add: getitem_7 depends on a later ordered op
scale_and_add compiled: 0 joined; mul: Inductor contracts this product with what follows; only rounding='eager' has one meaning for it
scale_and_add eager: 1 joined; nothing refused
alpha compiled: 0 joined; nothing refused
alpha eager: 0 joined; nothing refused""")  # noqa: E501


def scaled_sum(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    return (combine(y, count) + shared) * 2.5


def many_adds(y: Tensor, count: Tensor, shared: Tensor, residual: Tensor) -> Tensor:
    out = combine(y, count)
    for _ in range(MAX_ADDENDS + 1):
        out = out + shared
    return out


@pytest.mark.parametrize(
    ("model", "reason"),
    [(scaled_sum, "mul: a scaling joins only before the first add"), (many_adds, "add_4: at most 4 addends")],
)
def test_what_stays_behind_joined_adds(model: Callable, reason: str):
    _, done, refused, same = lower(model, "eager")
    assert len(done) == 1 and refused == [reason] and same


def test_nothing_behind_the_combine_is_no_match():
    graph, done, refused, same = lower(lambda y, count, shared, residual: combine(y, count), "compiled")
    assert not done and not refused and same and "rsv_combine_add" not in graph


def run(model: Callable) -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, fullgraph=True)(*arguments())


@pytest.mark.usefixtures("_fresh")
@pytest.mark.parametrize("emulate", [False, True])
def test_compiled_rounding_gives_the_bits_of_the_unlowered_code(emulate: bool):
    for model in (add_both, cast_and_add, norm_behind, shared_product):
        with config.patch(emulate_precision_casts=emulate):
            lowering.enable(rounding="compiled")
            lowered = run(model)
            lowering.disable()
            assert torch.equal(lowered, run(model)), model
            lowering.enable()


def layer(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
    return x + (routed(x, w, count) + x @ w["shared"])


@pytest.mark.usefixtures("_fresh")
def test_a_layer_with_eager_rounding_equals_the_uncompiled_ops():
    lowering.enable(rounding="eager")
    with torch.no_grad():
        lowered = torch.compile(layer, fullgraph=True)(batch(), weights(), COUNT)
        explanation = lowering.explain(layer, batch(), weights(), COUNT)
    assert explanation.ops == {"agree": 1, "metadata_update": 1, "moe_layer": 1}
    torch.testing.assert_close(lowered, layer(batch(), weights(), COUNT), rtol=1.6e-2, atol=1e-2)

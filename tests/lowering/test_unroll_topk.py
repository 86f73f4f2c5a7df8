"""A router's top-k as k maxima."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor import config as inductor_config
from torch.fx import Graph

from lowering import torch_compat
from lowering.unroll_topk import MAX_COLUMNS, UnrollTopk
from tests.lowering.layers import inference_graph, text

PASS = UnrollTopk(devices=("cpu",))


def softmax_router(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    values, ids = (x @ w).float().softmax(-1).topk(3, -1)
    return values / values.sum(-1, keepdim=True), ids


def sigmoid_router(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """With a bias that only chooses, and groups masked with 0, as DeepSeek-V3's."""
    scores = (x @ w).sigmoid()
    biased = scores + w[0]
    masked = biased.masked_fill(biased < 0.2, 0.0)
    ids = masked.topk(2, dim=-1)[1]
    return scores.gather(1, ids), ids


def grouped_router(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Experts of the two best of four groups, unsorted; weights of other scores, scaled: GLM-4's and DeepSeek-V3's."""
    scores = (x @ w).float().sigmoid()
    biased = (scores + w[0]).view(-1, 4, 3)
    groups = biased.topk(2, dim=-1)[0].sum(-1).topk(2, dim=-1, sorted=False)[1]
    kept = torch.zeros(x.shape[0], 4, device=x.device).scatter(1, groups, 1.0)[:, :, None].bool()
    ids = biased.masked_fill(~kept, -torch.inf).view(-1, 12).topk(3, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, ids


def counted_router(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """As the decode loop sees it: ids of rows that do not count are -1."""
    values, ids = (x @ w).float().softmax(-1).topk(3, -1)
    return (values / values.sum(-1, keepdim=True)).to(x.dtype), torch.where(x[:, :1] > 0, ids, -1)


def logits_router(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the chosen ones, as GPT-OSS's."""
    values, ids = torch.topk(x @ w, 4)
    return values.softmax(-1), ids


ROUTERS = [softmax_router, sigmoid_router, grouped_router, counted_router, logits_router]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_choice_and_same_weights(router, dtype):
    x, w = torch.randn(9, 16).to(dtype), torch.randn(16, 12).to(dtype)
    module, inputs = inference_graph(router, x, w)
    wanted = module(*inputs)
    outcome = PASS.run(module.graph)
    assert len(outcome.done) == (3 if router is grouped_router else 1) and not outcome.refused
    module.graph.lint()
    module.recompile()
    got = module(*inputs)
    ties = dtype == torch.bfloat16 and router in (sigmoid_router, logits_router)
    assert_same_choice(got, wanted, router is grouped_router, ties)


def assert_same_choice(got: list[Tensor], wanted: list[Tensor], any_order: bool, ties: bool = False) -> None:
    """Equal weights but for the order of a sum; equal ids, in any order where the router's top-k has none."""
    first = torch.arange(got[1].shape[-1]).expand_as(got[1])
    order, other = (ids.argsort(-1) if any_order else first for ids in (got[1], wanted[1]))
    weights, expected = got[0].gather(-1, order), wanted[0].gather(-1, other)
    torch.testing.assert_close(weights, expected, rtol=2 * torch.finfo(weights.dtype).eps, atol=0.0)
    if not ties:
        assert torch.equal(got[1].gather(-1, order), wanted[1].gather(-1, other))


def reads_of_cats(graph: Graph) -> list[str]:
    """Who reads a tensor of columns that were put together, outputs excepted."""
    cats = graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)
    return [user.name for cat in cats for user in cat.users if user.op != "output"]


@pytest.mark.parametrize("router", ROUTERS)
def test_nothing_but_the_result_is_put_together_from_columns(router):
    """Inductor needs a kernel of its own for whatever reads K columns."""
    module, _ = inference_graph(router, torch.randn(9, 16).bfloat16(), torch.randn(16, 12).bfloat16())
    PASS.run(module.graph)
    assert reads_of_cats(module.graph) == []


def test_what_is_not_done_by_column_reads_them_together():
    """A product with something that differs by column."""
    x, other = torch.randn(9, 16), torch.randn(3)
    module, inputs = inference_graph(lambda x, other: (x.topk(3)[0] * other).sum(-1), x, other)
    wanted = module(*inputs)
    assert len(PASS.run(module.graph).done) == 1
    module.graph.lint()
    module.recompile()
    assert torch.equal(module(*inputs)[0], wanted[0])
    assert reads_of_cats(module.graph) == ["mul"]


def test_columns():
    module, _ = inference_graph(lambda x: (lambda t: (t[0] / t[0].sum(-1, True), t[1]))(x.topk(2)), torch.randn(3, 4))
    outcome = PASS.run(module.graph)
    assert outcome.done == ["topk: 2 maxima, sum_1, div"]
    assert_expected_inline(text(module.graph), """\
topk_columns_default = topk_columns(in0, 2)
getitem_2 = topk_columns_default[0]
getitem_3 = topk_columns_default[1]
getitem_4 = topk_columns_default[2]
getitem_5 = topk_columns_default[3]
cat_default_1 = cat([getitem_4, getitem_5], -1)
add_tensor = add.Tensor(getitem_2, getitem_3)
div_tensor = div.Tensor(getitem_2, add_tensor)
div_tensor_1 = div.Tensor(getitem_3, add_tensor)
cat_default = cat([div_tensor, div_tensor_1], -1)
return (cat_default, cat_default_1)""")


def largest(function, x: Tensor) -> tuple[Tensor, Tensor]:
    """The results of a function whose topk is unrolled."""
    module, inputs = inference_graph(function, x)
    assert len(PASS.run(module.graph).done) == 1
    module.recompile()
    return module(*inputs)


def test_ties_take_the_first_and_no_column_twice():
    assert largest(lambda x: x.topk(3), torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]))[1].tolist() == [[1, 2, 3]]


def test_infinities_and_nan_are_ordered_as_topk_orders_them():
    row = torch.tensor([[-torch.inf, 2.0, -torch.inf, torch.nan, -0.5, torch.inf, -3.0, 0.0, 1e-40]])
    values, ids = largest(lambda x: x.topk(9), row)
    assert ids.tolist() == [[3, 5, 1, 8, 7, 4, 6, 0, 2]]
    assert torch.equal(values.nan_to_num(99), row.gather(1, ids).nan_to_num(99))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_value_keeps_its_bits(dtype):
    x = torch.cat([torch.randn(40, 30), 1e-30 * torch.randn(40, 30)], 1).to(dtype)
    values, ids = largest(lambda x: x.topk(16), x)
    assert torch.equal(values, x.topk(16).values) and torch.equal(values, x.gather(1, ids))


def test_graph():
    module, _ = inference_graph(lambda x: x.topk(2), torch.randn(3, 4))
    outcome = PASS.run(module.graph)
    assert outcome.done == ["topk: 2 maxima"]
    assert_expected_inline(text(module.graph), """\
topk_columns_default = topk_columns(in0, 2)
getitem_2 = topk_columns_default[0]
getitem_3 = topk_columns_default[1]
getitem_4 = topk_columns_default[2]
getitem_5 = topk_columns_default[3]
cat_default_1 = cat([getitem_2, getitem_3], -1)
cat_default = cat([getitem_4, getitem_5], -1)
return (cat_default_1, cat_default)""")


def test_columns_op_is_an_op_like_others():
    torch.library.opcheck(torch.ops.moe_ep.topk_columns.default, (torch.randn(3, 5).bfloat16(), 2))


@pytest.mark.parametrize("router", ROUTERS)
def test_compiled_by_inductor(router):
    x, w = torch.randn(9, 16), torch.randn(16, 12)
    outcomes = []
    torch._dynamo.reset()
    with torch.no_grad(), inductor_config.patch(post_grad_custom_pre_pass=lambda g: outcomes.append(PASS.run(g))):
        got, code = torch_compat.output_code(torch.compile(router, fullgraph=True), x, w)
    assert not any("ops.moe_ep" in source for source in code), "Inductor calls topk_columns instead of building it"
    assert [len(outcome.done) for outcome in outcomes] == [3 if router is grouped_router else 1]
    assert_same_choice(got, router(x, w), router is grouped_router)


@pytest.mark.parametrize(
    ("function", "columns", "reason"),
    [
        (lambda x: x.sigmoid().topk(2, largest=False), 8, "is not the largest"),
        (lambda x: x.sigmoid().topk(2, dim=0), 8, "is not the largest"),
        (lambda x: x.sigmoid().topk(17), 32, "takes 17 of 32"),
        (lambda x: x.sigmoid().topk(2), MAX_COLUMNS + 1, f"takes 2 of {MAX_COLUMNS + 1}"),
        (lambda x: x.double().topk(2), 8, "sorts torch.float64"),
    ],
)
def test_refused(function, columns: int, reason: str):
    module, _ = inference_graph(function, torch.randn(4, columns))
    outcome = PASS.run(module.graph)
    assert not outcome.done
    assert [reason in refusal.reason for refusal in outcome.refused] == [True], outcome.refused


def test_cpu_is_left_alone():
    module, _ = inference_graph(lambda x: x.sigmoid().topk(2), torch.randn(3, 4))
    outcome = UnrollTopk().run(module.graph)
    assert not outcome.done and not outcome.refused

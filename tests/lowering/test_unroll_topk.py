"""A router's top-k as k maxima."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor import config as inductor_config

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


def logits_router(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the chosen ones, as GPT-OSS's."""
    values, ids = torch.topk(x @ w, 4)
    return values.softmax(-1), ids


@pytest.mark.parametrize("router", [softmax_router, sigmoid_router, logits_router])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_choice_and_same_bits(router, dtype):
    x, w = torch.randn(9, 16).to(dtype), torch.randn(16, 12).to(dtype)
    module, inputs = inference_graph(router, x, w)
    wanted = module(*inputs)
    outcome = PASS.run(module.graph)
    assert len(outcome.done) == 1 and not outcome.refused
    module.graph.lint()
    module.recompile()
    got = module(*inputs)
    assert torch.equal(got[0], wanted[0])
    if dtype == torch.float32:  # no ties
        assert torch.equal(got[1], wanted[1])


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
iota_default = prims.iota(4, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
view_dtype = view.dtype(in0, torch.int32)
__rshift___scalar = __rshift__.Scalar(view_dtype, 31)
bitwise_and_scalar = bitwise_and.Scalar(__rshift___scalar, 2147483647)
bitwise_xor_tensor = bitwise_xor.Tensor(view_dtype, bitwise_and_scalar)
convert_element_type_default = prims.convert_element_type(bitwise_xor_tensor, torch.int64)
__lshift___scalar = __lshift__.Scalar(convert_element_type_default, 32)
neg_default = neg(iota_default)
add_tensor = add.Tensor(neg_default, 3)
add_tensor_1 = add.Tensor(__lshift___scalar, add_tensor)
full_default = full([], -9223372036854775808, dtype=torch.int64, device=cpu)
amax_default = amax(add_tensor_1, [-1], True)
eq_tensor = eq.Tensor(add_tensor_1, amax_default)
where_self = where.self(eq_tensor, full_default, add_tensor_1)
amax_default_1 = amax(where_self, [-1], True)
eq_tensor_1 = eq.Tensor(where_self, amax_default_1)
where_self_1 = where.self(eq_tensor_1, full_default, where_self)
cat_default = cat([amax_default, amax_default_1], -1)
bitwise_and_scalar_1 = bitwise_and.Scalar(cat_default, 4294967295)
neg_default_1 = neg(bitwise_and_scalar_1)
add_tensor_2 = add.Tensor(neg_default_1, 3)
__rshift___scalar_1 = __rshift__.Scalar(cat_default, 32)
convert_element_type_default_1 = prims.convert_element_type(__rshift___scalar_1, torch.int32)
__rshift___scalar_2 = __rshift__.Scalar(convert_element_type_default_1, 31)
bitwise_and_scalar_2 = bitwise_and.Scalar(__rshift___scalar_2, 2147483647)
bitwise_xor_tensor_1 = bitwise_xor.Tensor(convert_element_type_default_1, bitwise_and_scalar_2)
view_dtype_1 = view.dtype(bitwise_xor_tensor_1, torch.float32)
return (view_dtype_1, add_tensor_2)""")


@pytest.mark.parametrize("router", [softmax_router, sigmoid_router, logits_router])
def test_compiled_by_inductor(router):
    x, w = torch.randn(9, 16), torch.randn(16, 12)
    outcomes = []
    torch._dynamo.reset()
    with torch.no_grad(), inductor_config.patch(post_grad_custom_pre_pass=lambda g: outcomes.append(PASS.run(g))):
        got = torch.compile(router, fullgraph=True)(x, w)
    assert [len(outcome.done) for outcome in outcomes] == [1]
    wanted = router(x, w)
    torch.testing.assert_close(got[0], wanted[0])
    assert torch.equal(got[1], wanted[1])


@pytest.mark.parametrize(
    ("function", "columns", "reason"),
    [
        (lambda x: x.sigmoid().topk(2, largest=False), 8, "is not the largest"),
        (lambda x: x.sigmoid().topk(2, sorted=False), 8, "is not the largest"),
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

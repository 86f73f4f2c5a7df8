"""A router's top-k as k maxima."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

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
    if dtype == torch.float32:  # no ties
        assert torch.equal(got[1], wanted[1])
    assert torch.equal(got[0], wanted[0])


def test_ties_take_the_first_and_no_column_twice():
    module, inputs = inference_graph(lambda x: x.sigmoid().topk(3), torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]))
    PASS.run(module.graph)
    module.recompile()
    assert module(*inputs)[1].tolist() == [[1, 2, 3]]


def test_rows_of_nan_give_columns_that_exist():
    module, inputs = inference_graph(lambda x: x.sigmoid().topk(3), torch.full((2, 5), torch.nan))
    PASS.run(module.graph)
    module.recompile()
    ids = module(*inputs)[1]
    assert ids.min() >= 0 and ids.max() < 5


def test_graph():
    module, _ = inference_graph(lambda x: x.sigmoid().topk(2), torch.randn(3, 4))
    outcome = PASS.run(module.graph)
    assert outcome.done == ["topk: 2 maxima"]
    assert_expected_inline(text(module.graph), """\
sigmoid = sigmoid(in0)
iota_default = prims.iota(4, start=0, step=1, dtype=torch.int64, device=cpu, requires_grad=False)
full_default = full([], -inf, dtype=torch.float32, device=cpu)
amax_default = amax(sigmoid, [-1], True)
argmax_default = argmax(sigmoid, -1, True)
eq_tensor = eq.Tensor(iota_default, argmax_default)
where_self = where.self(eq_tensor, full_default, sigmoid)
amax_default_1 = amax(where_self, [-1], True)
argmax_default_1 = argmax(where_self, -1, True)
cat_default = cat([amax_default, amax_default_1], -1)
cat_default_1 = cat([argmax_default, argmax_default_1], -1)
return (cat_default, cat_default_1)""")


def test_compiled_by_inductor():
    x, w = torch.randn(9, 16), torch.randn(16, 12)
    module, inputs = inference_graph(softmax_router, x, w)
    PASS.run(module.graph)
    module.recompile()
    torch._dynamo.reset()
    got = torch.compile(module)(*inputs)
    torch.testing.assert_close(got[0], softmax_router(x, w)[0])
    assert torch.equal(got[1], softmax_router(x, w)[1])


@pytest.mark.parametrize(
    ("function", "columns", "reason"),
    [
        (lambda x: x.sigmoid().topk(2, largest=False), 8, "is not the largest"),
        (lambda x: x.sigmoid().topk(2, sorted=False), 8, "is not the largest"),
        (lambda x: x.sigmoid().topk(2, dim=0), 8, "is not the largest"),
        (lambda x: x.sigmoid().topk(17), 32, "takes 17 of 32"),
        (lambda x: x.sigmoid().topk(2), MAX_COLUMNS + 1, f"takes 2 of {MAX_COLUMNS + 1}"),
        (lambda x: x.sigmoid().masked_fill(x < 0, -torch.inf).topk(2), 8, "may be -inf: scalar_tensor"),
        (lambda x: x.sigmoid().log().topk(2), 8, "may be -inf: log"),
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

"""Products of one batch with several weights in one launch."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch.nn import functional

from lowering.merge_products import MAX_BYTES, MAX_ROWS_ALONE, MergeProducts
from moe_ops.thin_linear import MAX_ROWS
from tests.lowering.layers import inference_graph, text

PASS = MergeProducts(devices=("cpu",))


def attention_inputs(x: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor) -> Tensor:
    """Three products of one batch, then one of what became of them."""
    x = x.sin()[None]  # as models have it: every product then has a view of its own of one batch
    mixed = functional.linear(x, q) + functional.linear(x, k) * functional.linear(x, v)
    return functional.linear(mixed, o)[0]


def arguments(rows: int = 5) -> list[Tensor]:
    return [torch.randn(rows, 16), *(torch.randn(8, 16) for _ in range(3)), torch.randn(6, 8)]


def test_graph():
    module, inputs = inference_graph(attention_inputs, *arguments())
    wanted = module(*inputs)[0]
    outcome = PASS.run(module.graph)
    assert outcome.done == ["thin_linear_default: mm, mm_1, mm_2", "thin_linear_default_1: mm_3"]
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*inputs)[0], wanted)
    module.graph.eliminate_dead_code()
    assert_expected_inline(text(module.graph), """\
sin = sin(in0)
unsqueeze = unsqueeze(sin, 0)
view = view(unsqueeze, [5, 16])
thin_linear_default = thin_linear(view, [in1, in2, in3])
getitem = thin_linear_default[0]
getitem_1 = thin_linear_default[1]
getitem_2 = thin_linear_default[2]
view_1 = view(getitem, [1, 5, 8])
view_3 = view(getitem_1, [1, 5, 8])
view_5 = view(getitem_2, [1, 5, 8])
mul = mul.Tensor(view_3, view_5)
add = add.Tensor(view_1, mul)
view_6 = view(add, [5, 8])
thin_linear_default_1 = thin_linear(view_6, [in4])
getitem_3 = thin_linear_default_1[0]
view_7 = view(getitem_3, [1, 5, 6])
select = select.int(view_7, 0, 0)
return (select)""")


def test_a_product_of_a_product():
    """A low-rank projection: the inner product is replaced first, and the outer one then takes its replacement."""

    def low_rank(x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return torch.mm(torch.mm(x, down.T), up.T)

    module, inputs = inference_graph(low_rank, torch.randn(5, 16), torch.randn(4, 16), torch.randn(8, 4))
    wanted = module(*inputs)[0]
    assert len(PASS.run(module.graph).done) == 2
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*inputs)[0], wanted)


def test_more_weights_than_one_launch_takes():
    def five(x: Tensor, *weights: Tensor) -> list[Tensor]:
        return [functional.linear(x, weight) for weight in weights]

    module, inputs = inference_graph(five, torch.randn(3, 8), *(torch.randn(4 + i, 8) for i in range(5)))
    wanted = module(*inputs)
    outcome = PASS.run(module.graph)
    module.recompile()
    assert len(outcome.done) == 2
    for got, want in zip(module(*inputs), wanted, strict=True):
        torch.testing.assert_close(got, want)


def router(x: Tensor, weight: Tensor) -> Tensor:
    """DeepSeek-V3's."""
    return functional.linear(x.sin().type(torch.float32), weight.type(torch.float32)).sigmoid()


def lowered_router(depth: int, done: str) -> str:
    """The graph of a router of 8 columns after the pass, which says ``done`` and keeps its results."""
    weight = torch.randn(8, depth).bfloat16() / depth**0.5
    module, inputs = inference_graph(router, torch.randn(5, depth).bfloat16(), weight)
    wanted = module(*inputs)[0]
    assert PASS.run(module.graph).done == [done]
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(*inputs)[0], wanted)
    module.graph.eliminate_dead_code()
    return text(module.graph)


def test_casts_of_a_router_go():
    """Expected: the weight is read as it is stored, and the logits stay in fp32."""
    assert_expected_inline(lowered_router(16, "thin_linear_default: mm"), """\
sin = sin(in0)
thin_linear_default = thin_linear(sin, [in1], out_dtype=torch.float32)
getitem = thin_linear_default[0]
sigmoid = sigmoid(getitem)
return (sigmoid)""")


def test_few_columns_are_summed_in_pieces_that_their_readers_add():
    """Expected: a result for each quarter of the depth, and one sum, which Inductor makes part of the sigmoid."""
    graph = lowered_router(2048, "thin_linear_default: mm in 4 pieces, added where they are read")
    assert_expected_inline(graph, """\
sin = sin(in0)
thin_linear_default = thin_linear(sin, [in1], out_dtype=torch.float32, split=4)
getitem = thin_linear_default[0]
sum_dim_int_list = sum.dim_IntList(getitem, [0])
sigmoid = sigmoid(sum_dim_int_list)
return (sigmoid)""")


def test_a_16_bit_product_is_rounded_behind_its_sum():
    module, inputs = inference_graph(
        lambda x, w: functional.linear(x.sin()[None], w)[0].float().softmax(-1),
        torch.randn(5, 2048).bfloat16(), torch.randn(8, 2048).bfloat16() / 45,
    )  # fmt: skip
    wanted = module(*inputs)[0]
    assert PASS.run(module.graph).done == ["thin_linear_default: mm in 4 pieces, added where they are read"]
    module.recompile()
    torch.testing.assert_close(module(*inputs)[0], wanted, rtol=0, atol=2e-2)  # a step of bf16 of a logit
    (cast,) = (n for n in module.graph.nodes if n.args[1:] == (torch.bfloat16,))
    assert cast.args[0].target is torch.ops.aten.sum.dim_IntList and cast.meta["val"].dtype == torch.bfloat16


def test_pieces_of_two_products():
    """As of a router and a shared expert's gate, which look at the same rows."""
    module, inputs = inference_graph(
        lambda x, a, b: functional.linear(x, a).softmax(-1) * functional.linear(x, b).sigmoid(),
        *(torch.randn(n, 2048) / 7 for n in (5, 8, 1)),
    )
    wanted = module(*inputs)[0]
    assert PASS.run(module.graph).done == ["thin_linear_default: mm, mm_1 in 4 pieces, added where they are read"]
    module.recompile()
    torch.testing.assert_close(module(*inputs)[0], wanted)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, w: functional.linear(x, w),  # a result of the graph
        lambda x, w: functional.linear(functional.linear(x, w), w.sin().T),  # read by a library's product
        lambda x, w: (lambda y: y.sin() @ w + y @ w)(functional.linear(x, w)),
    ],
    ids=["output", "product", "both"],
)
def test_pieces_are_added_at_once_where_no_kernel_of_inductor_reads_them(function):
    module, _ = inference_graph(function, torch.randn(5, 2048), torch.randn(8, 2048))
    assert all("pieces" not in done for done in PASS.run(module.graph).done)


def test_only_casts_of_equal_dtypes_go():
    """A batch that has more bits than the weight keeps them; casts that round are none of its business."""
    wide, half = torch.randn(5, 16), torch.randn(8, 16).bfloat16()
    reasons = []
    for x, weight in ((wide, half), (wide.half(), half)):
        module, _ = inference_graph(router, x, weight)
        outcome = PASS.run(module.graph)
        assert not outcome.done
        reasons += [refusal.reason for refusal in outcome.refused]
    assert_expected_inline("\n".join(reasons), """\
x is torch.float32, the weight torch.bfloat16
x is torch.float16, the weight torch.bfloat16""")
    module, _ = inference_graph(lambda x, w: x @ w.to(torch.bfloat16).T, half, wide)
    outcome = PASS.run(module.graph)
    assert not outcome.done and not outcome.refused


def test_products_of_two_dtypes_are_two_launches():
    """A projection in bf16 and a router whose logits are fp32 read one batch; a launch has one dtype."""

    def both(x: Tensor, w: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        return functional.linear(x, w), functional.linear(x.float(), scores.float())

    module, inputs = inference_graph(both, *(torch.randn(n, 16).bfloat16() for n in (5, 8, 8)))
    wanted = module(*inputs)
    assert PASS.run(module.graph).done == ["thin_linear_default: mm", "thin_linear_default_1: mm_1"]
    module.recompile()
    assert [result.dtype for result in module(*inputs)] == [result.dtype for result in wanted]
    torch.testing.assert_close(module(*inputs), wanted)


@pytest.mark.parametrize(
    ("x", "weight", "reason"),
    [
        (torch.randn(MAX_ROWS + 1, 8), torch.randn(4, 8), f"{MAX_ROWS + 1} rows"),
        (torch.randn(2, 8), torch.randn(8, 4).T, "not stored row by row"),
        (torch.randn(2, 8), torch.empty(1).expand(MAX_BYTES // 32 + 1, 8).contiguous(), "larger than 64 MiB"),
    ],
    ids=["rows", "layout", "bytes"],
)
def test_refused(x: Tensor, weight: Tensor, reason: str):
    module, _ = inference_graph(functional.linear, x, weight)
    outcome = PASS.run(module.graph)
    assert not outcome.done
    assert [reason in refusal.reason for refusal in outcome.refused] == [True], outcome.refused


def test_many_rows_go_with_several_weights_only():
    rows = MAX_ROWS_ALONE + 1
    module, _ = inference_graph(attention_inputs, *arguments(rows))
    outcome = PASS.run(module.graph)
    assert outcome.done == ["thin_linear_default: mm, mm_1, mm_2"]
    assert [refusal.reason for refusal in outcome.refused] == [f"{rows} rows times one weight"]


def test_products_of_computed_values_are_none_of_its_business():
    module, _ = inference_graph(lambda x, w: x @ w.sin().T, torch.randn(2, 8), torch.randn(4, 8))
    outcome = PASS.run(module.graph)
    assert not outcome.done and not outcome.refused


def test_cpu_is_left_alone():
    module, _ = inference_graph(functional.linear, torch.randn(2, 8), torch.randn(4, 8))
    outcome = MergeProducts().run(module.graph)
    assert not outcome.done and not outcome.refused

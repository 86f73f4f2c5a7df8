"""Sine and cosine kept for all layers."""

import re
from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code

from lowering.keep_rotations import MIN_READERS, KeepRotations
from tests.lowering import layers
from tests.lowering.layers import inference_graph, text

BMM = torch.ops.aten.bmm.default


def rotations(x: Tensor, positions: Tensor, layers: int = 3) -> Tensor:
    """Rotary embedding as transformers writes it, with a product between layers."""
    angles = positions[:, None].float() * torch.arange(4)
    cos, sin = ((function(angles) * 1.5).to(x.dtype)[:, None] for function in (torch.cos, torch.sin))
    for _ in range(layers):
        x = (x * cos + x.flip(-1) * sin) @ torch.ones(4, 4, dtype=x.dtype)
    return x


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0)).bfloat16(), torch.tensor([3, 1, 9])


def test_graph():
    def four_readers(angles: Tensor, x: Tensor) -> list[Tensor]:
        cos = (angles.cos() * 2).bfloat16()[:, None]
        return [x * cos, x + cos, x - cos, x / cos]

    module, given = inference_graph(four_readers, torch.randn(3, 4), torch.randn(3, 2, 4).bfloat16())
    wanted = module(*given)
    assert KeepRotations().run(module.graph).done == [f"cos: {MIN_READERS} readers"]
    module.graph.lint()
    module.recompile()
    assert all(map(torch.equal, module(*given), wanted))
    assert_expected_inline(text(module.graph), """\
cos = cos(in0)
mul = mul.Tensor(cos, 2)
realize_default = _inductor_test.realize(mul)
convert_element_type = prims.convert_element_type(realize_default, torch.bfloat16)
unsqueeze = unsqueeze(convert_element_type, 1)
mul_1 = mul.Tensor(in1, unsqueeze)
add = add.Tensor(in1, unsqueeze)
sub = sub.Tensor(in1, unsqueeze)
div = div.Tensor(in1, unsqueeze)
return (mul_1, add, sub, div)""")


def refused(function: Callable, angles: Tensor, x: Tensor) -> list[str]:
    """Why the pass leaves the graph as it is."""
    module, _ = inference_graph(function, angles, x)
    before = text(module.graph)
    outcome = KeepRotations().run(module.graph)
    assert not outcome.done and text(module.graph) == before
    return [f"{refusal.node}: {refusal.reason}" for refusal in outcome.refused]


def test_refused():
    def two_readers(angles: Tensor, x: Tensor) -> list[Tensor]:
        cos = angles.cos()
        return [x * cos, x + cos]

    def in_double(angles: Tensor, x: Tensor) -> list[Tensor]:
        sin = angles.sin()
        return [x * sin, x + sin, x - sin, x / sin]

    assert refused(two_readers, torch.ones(2), torch.ones(2)) == [
        "cos: 2 readers: less than 4, for which a buffer costs as much as it saves"
    ]
    assert refused(in_double, torch.ones(2).double(), torch.ones(2)) == [
        "sin: torch.float64: what is kept would be rounded, and Inductor's fused code does not round it"
    ]


def test_nothing_to_keep():
    assert refused(lambda angles, x: x * angles.exp(), torch.ones(2), torch.ones(2)) == []


def test_inductor_computes_it_once_and_to_the_same_bits():
    outcomes = []
    torch._dynamo.reset()
    with torch.no_grad():
        before = torch.compile(rotations, fullgraph=True)(*inputs(), 5)
        torch._dynamo.reset()
        with inductor_config.patch(post_grad_custom_pre_pass=lambda graph: outcomes.append(KeepRotations().run(graph))):
            after, (code,) = run_and_get_code(torch.compile(rotations, fullgraph=True), *inputs(), 5)
    assert [done.split(":")[0] for done in outcomes[0].done] == ["cos", "sin"]
    assert len(re.findall(r"\bcos\(\)", code)) <= 2, "one vectorised loop and its tail"
    assert torch.equal(before, after)


def angles_of(frequencies: Tensor, positions: Tensor) -> Tensor:
    """As transformers writes it: the frequencies lie once in memory, whatever the number of rows."""
    rows, columns = positions.shape
    expanded = frequencies[None, :, None].expand(rows, -1, 1)
    return (expanded @ positions[:, None, :]).transpose(1, 2).cos().view(rows, columns, -1)


@pytest.fixture
def _no_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as of torch 2.11, where Inductor has none of its own for ``bmm``."""
    kept = {op: decomposed for op, decomposed in layers.select_decomp_table().items() if op is not BMM}
    monkeypatch.setattr(layers, "select_decomp_table", lambda: kept)


@pytest.mark.usefixtures("_no_decomposition")
def test_a_product_that_sums_stays():
    """Square, so that its operands could be multiplied element by element just as well."""
    module, _ = inference_graph(torch.bmm, torch.rand(4, 2, 2), torch.rand(4, 2, 2))
    assert not KeepRotations().run(module.graph).done and module.graph.find_nodes(op="call_function", target=BMM)


@pytest.mark.usefixtures("_no_decomposition")
@pytest.mark.parametrize("columns", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_are_no_product(columns: int, dtype: torch.dtype):
    positions = torch.arange(4 * columns).view(4, columns) * 1000 + 1
    module, given = inference_graph(lambda f, p: angles_of(f, p.to(dtype)), torch.rand(16, dtype=dtype), positions)
    assert module.graph.find_nodes(op="call_function", target=BMM)
    wanted = module(*given)
    done = KeepRotations().run(module.graph).done
    module.graph.lint()
    module.recompile()
    assert all(map(torch.equal, module(*given), wanted))
    single = dtype == torch.float32
    assert done == (["bmm: pointwise"] if single else [])
    assert bool(module.graph.find_nodes(op="call_function", target=BMM)) != single

"""A shared expert of few rows goes to kernels of our own, with its last product, or the reason why not is reported."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lowering import thin_shared, torch_compat
from lowering.effects import effect_ops
from lowering.overlap_shared import readers
from lowering.passes import Options, run_passes
from lowering.thin_shared import ThinShared
from tests.lowering.layers import H, batch, inference_graph, routed, text, weights
from tests.lowering.test_overlap_shared import (
    COUNT,
    added_at_once,
    deepseek,
    one_projection,
    qwen2_moe,
    shared_weights,
    three_layers,
)

PASS = ThinShared(devices=("cpu",))
ONE_ROUNDING = 2.0**-6  # of bf16, a few of them one after the other


def lower(model: Callable, rounding: str = "compiled") -> tuple[str, list[str], list[str]]:
    """Text after the pass, what it did, what it refused; the result is that of the graph before, but for roundings."""
    module, inputs = inference_graph(model, batch(), weights(), shared_weights(), COUNT)
    run_passes(module.graph, Options(frozenset({"agreement"}), rounding))
    before = module(*inputs)[0]
    outcome = PASS.run(module.graph)
    module.graph.lint()
    module.recompile()
    within = {"rtol": ONE_ROUNDING, "atol": ONE_ROUNDING * float(before.abs().max())}
    torch.testing.assert_close(module(*inputs)[0], before, **within)
    return text(module.graph), outcome.done, [f"{refusal.node}: {refusal.reason}" for refusal in outcome.refused]


def test_the_last_product_comes_along():
    graph, done, refused = lower(added_at_once)
    lines = [line.replace("with_effects_5", "y") for line in graph.splitlines()[-9:]]
    shown = [line.split(", entry_barrier=")[0] for line in lines]
    assert_expected_inline(
        "\n".join(shown),
        """\
permute_1 = permute(in4, [1, 0])
permute_2 = permute(in5, [1, 0])
y = !moe_layer_shared(getitem, in1, getitem_3, getitem_2, in6, in7, in0, getitem_1, 0, 8, [], in1, [permute, permute_1], permute_2, -1, 'local'
getitem_14 = y[0]
getitem_15 = y[1]
getitem_16 = y[2]
add_1 = add.Tensor(getitem_15, getitem_16)
add_2 = add.Tensor(in1, add_1)
return (add_2)""",  # noqa: E501
    )
    assert "shared_thin=True" in graph and done and not refused


@pytest.mark.parametrize("rounding", ["compiled", "eager"])
@pytest.mark.parametrize(
    "model", [deepseek, added_at_once, one_projection, qwen2_moe, three_layers], ids=lambda model: model.__name__
)
def test_every_layer(model: Callable, rounding: str):
    graph, done, refused = lower(model, rounding)
    count = 3 if model is three_layers else 1
    assert graph.count("shared_thin=True") == len(done) == count and not refused
    assert "addmm" not in graph and graph.count("= mm(") == count + (model is qwen2_moe)  # router, sigmoid's gate


def test_what_stays():
    def strided(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
        """Weights stored column by column."""
        gate, up, down = (s[name].t().contiguous() for name in ("gate", "up", "down"))
        return routed(x, w, count).view(2, 4, H) + (torch.nn.functional.silu(x @ gate) * (x @ up) @ down).view(2, 4, H)

    graph, done, refused = lower(strided)
    assert not done and "shared_thin=True" not in graph and len(refused) == 1 and "not stored row by row" in refused[0]
    module, _ = inference_graph(deepseek, batch(), weights(), shared_weights(), COUNT)
    run_passes(module.graph, Options(frozenset({"agreement"})))
    assert not ThinShared().run(module.graph).done  # on the CPU nothing is gained


def test_many_rows_stay_with_the_library(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(thin_shared, "MAX_ROWS", 7)
    graph, done, refused = lower(deepseek)
    assert not done and "shared_thin=True" not in graph
    assert [line.split(": ")[1] for line in refused] == ["8 rows; the library is as fast from 8 on"]


def test_a_product_whose_weight_needs_the_layer_stays_behind():
    def weight_of_the_layer(x: Tensor, w: dict[str, Tensor], s: dict[str, Tensor], count: Tensor) -> Tensor:
        y = routed(x, w, count)
        act = torch.nn.functional.silu(x @ s["gate"].T) * (x @ s["up"].T)
        return y + act @ (s["down"] * y.sum()).T

    graph, done, refused = lower(weight_of_the_layer)
    assert graph.count("shared_thin=True") == 1 and not refused
    assert [line.split(": ")[1] for line in done] == ["thin kernels for its shared expert"]


def test_an_activation_with_two_readers_stays_a_result():
    module, _ = inference_graph(added_at_once, batch(), weights(), shared_weights(), COUNT)
    run_passes(module.graph, Options(frozenset({"agreement"})))
    (layer,) = effect_ops(module.graph, "moe_layer_shared")
    (product,) = readers(layer.results(1)[0])
    (output,) = module.graph.find_nodes(op="output")
    with module.graph.inserting_before(output):
        again = torch_compat.insert_call(module.graph, product.target, *product.args)
    output.args = ((*output.args[0], again),)
    (done,) = PASS.run(module.graph).done
    assert done.endswith("thin kernels for its shared expert")
    module.graph.lint()

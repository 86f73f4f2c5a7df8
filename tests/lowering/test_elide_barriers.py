"""Every wait is accounted for: why it stays, or why it is not needed."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lowering.effects import effect_ops
from lowering.elide_barriers import ElideBarriers
from lowering.passes import Options, run_passes
from lowering.report import Outcome
from tests.lowering.layers import batch, inference_graph, routed, text, two_groups, weights

COUNT = torch.tensor([5], dtype=torch.int32)


def three_layers(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
    for _ in range(3):
        x = x + routed(x, w, count)
    return x


def as_text(outcome: Outcome) -> str:
    return "\n".join([*outcome.done, *(f"{r.node}: {r.reason}" for r in outcome.refused)])


def test_one_wait_an_exchange_and_two_a_layer():
    module, _ = inference_graph(three_layers, batch(), weights(), COUNT)
    report = run_passes(module.graph)
    outcome = report.outcome("elide_barriers")
    assert_expected_inline(
        as_text(outcome),
        """\
with_effects: no reuse wait; the group's last op before this graph met all ranks
with_effects_12: entry wait dropped; the layer batch was last read by an earlier graph's layer, whose experts ended before with_effects met all ranks
with_effects_13: entry wait dropped; the layer batch was last read by with_effects_12, whose experts ended before with_effects_12 met all ranks
with_effects_14: entry wait dropped; the layer batch was last read by with_effects_13, whose experts ended before with_effects_13 met all ranks
with_effects: arrival: metadata_update reads the counts of all ranks, written in this call
with_effects_12: arrival: moe_layer reads the rows, then the partial sums of all ranks, written in this call
with_effects_13: arrival: moe_layer reads the rows, then the partial sums of all ranks, written in this call
with_effects_14: arrival: moe_layer reads the rows, then the partial sums of all ranks, written in this call""",  # noqa: E501
    )
    layers = list(effect_ops(module.graph, "moe_layer"))
    assert [op.arguments["entry_barrier"] for op in layers] == [False] * 3


def test_a_graph_that_begins_with_a_layer_keeps_its_entry():
    """Its metadata comes from outside; the second layer follows the first."""

    def two_layers(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
        return routed(x + routed(x, w, count, metadata), w, count, metadata)

    module, inputs = inference_graph(two_layers, batch(), weights(), COUNT, torch.tensor([5, 0, 5], dtype=torch.int32))
    before = module(*inputs)[0]
    outcome = run_passes(module.graph).outcome("elide_barriers")
    assert_expected_inline(
        as_text(outcome),
        """\
with_effects_7: entry wait dropped; the layer batch was last read by with_effects_6, whose experts ended before with_effects_6 met all ranks
with_effects_6: arrival: moe_layer reads the rows, then the partial sums of all ranks, written in this call
with_effects_6: reuse: the graph begins with it, and what used the layer batch before is not known
with_effects_7: arrival: moe_layer reads the rows, then the partial sums of all ranks, written in this call""",  # noqa: E501
    )
    assert [op.arguments["entry_barrier"] for op in effect_ops(module.graph, "moe_layer")] == [True, False]
    module.recompile()
    assert torch.equal(before, module(*inputs)[0])


def test_switched_off_it_leaves_every_entry():
    module, _ = inference_graph(three_layers, batch(), weights(), COUNT)
    run_passes(module.graph, Options(without=frozenset(["elide_barriers"])))
    assert [op.arguments["entry_barrier"] for op in effect_ops(module.graph, "moe_layer")] == [True] * 3


def test_another_groups_meeting_drops_nothing():
    """Its ranks may be others."""
    graph = two_groups()
    outcome = ElideBarriers().run(graph)
    (layer,) = effect_ops(graph, "moe_layer")
    assert layer.arguments["entry_barrier"] is True, outcome


def test_ops_with_slots_stay_as_they_are():
    module, _ = inference_graph(three_layers, batch(), weights(), COUNT)
    before = text(module.graph)
    ElideBarriers().run(module.graph)
    assert text(module.graph) == before


def test_an_op_outside_the_chain_keeps_both_waits():
    module, _ = inference_graph(three_layers, batch(), weights(), COUNT)
    run_passes(module.graph, Options(without=frozenset(["elide_barriers"])))
    last = list(effect_ops(module.graph, "moe_layer"))[-1].node
    token = next(n for n in module.graph.nodes if n.target is torch.ops.prims._make_token.default)
    last.update_arg(0, token)  # torn off
    last.update_arg(2, next(n for n in module.graph.nodes if n.op == "placeholder"))
    refusal = ElideBarriers().run(module.graph).refused[-1]
    assert refusal.node == last.name and refusal.reason.startswith("arrival and reuse: no token orders it behind")
    assert "entry_barrier" not in last.kwargs or last.kwargs["entry_barrier"]

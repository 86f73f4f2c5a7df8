"""Every wait is accounted for: why it stays, or why it is not needed."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lowering.elide_barriers import ElideBarriers
from lowering.passes import run_passes
from lowering.report import Outcome
from tests.lowering.layers import batch, inference_graph, routed, text, weights

COUNT = torch.tensor([5], dtype=torch.int32)


def three_layers(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
    for _ in range(3):
        x = x + routed(x, w, count)
    return x


def as_text(outcome: Outcome) -> str:
    return "\n".join([*outcome.done, *(f"{r.node}: {r.reason}" for r in outcome.refused)])


def test_one_wait_an_op_and_two_a_layer():
    module, _ = inference_graph(three_layers, batch(), weights(), COUNT)
    report = run_passes(module.graph)
    outcome = report.outcome("elide_barriers")
    assert_expected_inline(as_text(outcome), """\
with_effects: no reuse wait; the group's last op before this graph met all ranks
with_effects_1: no reuse wait; the group's last op before this graph met all ranks
with_effects_9: no reuse wait; its slot was with_effects's, and with_effects_1 met all ranks since
with_effects_4: no reuse wait; its slot was with_effects_1's, and with_effects_9 met all ranks since
with_effects_10: no reuse wait; its slot was with_effects_9's, and with_effects_4 met all ranks since
with_effects_7: no reuse wait; its slot was with_effects_4's, and with_effects_10 met all ranks since
with_effects_11: no reuse wait; its slot was with_effects_10's, and with_effects_7 met all ranks since
with_effects: arrival: metadata_update reads the counts of all ranks, written in this call
with_effects_1: arrival: agv_dispatch reads the rows of all ranks, written in this call
with_effects_9: arrival: fused_moe_combine reads the partial sums of all ranks, written in this call
with_effects_4: arrival: agv_dispatch reads the rows of all ranks, written in this call
with_effects_10: arrival: fused_moe_combine reads the partial sums of all ranks, written in this call
with_effects_7: arrival: agv_dispatch reads the rows of all ranks, written in this call
with_effects_11: arrival: fused_moe_combine reads the partial sums of all ranks, written in this call""")
    arrivals = [refusal for refusal in outcome.refused if refusal.reason.startswith("arrival: ")]
    assert len(arrivals) == 1 + 2 * 3  # metadata once, then dispatch and combine of each layer


def test_it_changes_nothing():
    module, _ = inference_graph(three_layers, batch(), weights(), COUNT)
    before = text(module.graph)
    ElideBarriers().run(module.graph)
    assert text(module.graph) == before


def test_an_op_outside_the_chain_keeps_both_waits():
    module, _ = inference_graph(three_layers, batch(), weights(), COUNT)
    nodes = [n for n in module.graph.nodes if n.target is torch.ops.higher_order.with_effects]
    token = next(n for n in module.graph.nodes if n.target is torch.ops.prims._make_token.default)
    nodes[-1].update_arg(0, token)  # the last combine, torn off
    nodes[-1].update_arg(2, next(n for n in module.graph.nodes if n.op == "placeholder"))
    last = ElideBarriers().run(module.graph).refused[-1]
    assert last.node == nodes[-1].name and last.reason.startswith("arrival and reuse: no token orders it behind")

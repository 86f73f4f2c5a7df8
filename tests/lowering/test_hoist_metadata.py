"""One metadata_update a step."""

import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lowering.effects import effect_ops
from lowering.hoist_metadata import HoistMetadata
from lowering.report import Refusal
from tests.lowering.layers import T, batch, give_to_group, inference_graph, ops, routed, text, weights

COUNT = torch.tensor([5], dtype=torch.int32)


def two_updates(x: Tensor, count: Tensor) -> Tensor:
    first = ops.rsv_combine(x, count, ops.metadata_update(count, "local"), T, "local")
    return ops.rsv_combine(first, count, ops.metadata_update(count, "local"), T, "local")


def test_the_second_update_reads_the_first():
    module, inputs = inference_graph(two_updates, batch(), COUNT)
    before = module(*inputs)
    assert_expected_inline(
        text(module.graph),
        """\
_make_token_default = prims._make_token()
with_effects = !metadata_update(_make_token_default, in0, 'local')
getitem = with_effects[0]
getitem_1 = with_effects[1]
with_effects_1 = !rsv_combine(getitem, in1, in0, getitem_1, 8, 'local')
getitem_2 = with_effects_1[0]
getitem_3 = with_effects_1[1]
with_effects_2 = !metadata_update(getitem_2, in0, 'local')
getitem_4 = with_effects_2[0]
getitem_5 = with_effects_2[1]
with_effects_3 = !rsv_combine(getitem_4, getitem_3, in0, getitem_5, 8, 'local')
getitem_6 = with_effects_3[0]
getitem_7 = with_effects_3[1]
return (getitem_7)""",
    )
    outcome = HoistMetadata().run(module.graph)
    module.graph.lint()
    module.recompile()
    assert_expected_inline(
        text(module.graph),
        """\
_make_token_default = prims._make_token()
with_effects = !metadata_update(_make_token_default, in0, 'local')
getitem = with_effects[0]
getitem_1 = with_effects[1]
with_effects_1 = !rsv_combine(getitem, in1, in0, getitem_1, 8, 'local')
getitem_2 = with_effects_1[0]
getitem_3 = with_effects_1[1]
with_effects_3 = !rsv_combine(getitem_2, getitem_3, in0, getitem_1, 8, 'local')
getitem_6 = with_effects_3[0]
getitem_7 = with_effects_3[1]
return (getitem_7)""",
    )
    assert outcome.done == ["with_effects_2: reads with_effects instead"] and not outcome.refused
    assert torch.equal(before[0], module(*inputs)[0])


def test_views_of_one_count_are_one_count():
    def model(x: Tensor, counts: Tensor) -> Tensor:
        for _ in range(3):
            x = ops.rsv_combine(x, counts[1:2], ops.metadata_update(counts[1:2], "local"), T, "local")
        return x

    module, _ = inference_graph(model, batch(), torch.tensor([9, 5], dtype=torch.int32))
    assert len(HoistMetadata().run(module.graph).done) == 2
    assert text(module.graph).count("!metadata_update") == 1


def test_another_count_is_refused_with_the_reason():
    def model(x: Tensor, counts: Tensor) -> Tensor:
        x = ops.rsv_combine(x, counts[0:1], ops.metadata_update(counts[0:1], "local"), T, "local")
        return ops.rsv_combine(x, counts[1:2], ops.metadata_update(counts[1:2], "local"), T, "local")

    module, _ = inference_graph(model, batch(), torch.tensor([4, 5], dtype=torch.int32))
    before = text(module.graph)
    outcome = HoistMetadata().run(module.graph)
    assert not outcome.done and text(module.graph) == before
    assert outcome.refused == [Refusal("with_effects_2", "counts another tensor or group than with_effects")]


def test_a_count_of_two_groups_is_summed_twice():
    """The same tensor, but over other ranks."""
    module, _ = inference_graph(two_updates, batch(), COUNT)
    _, second = effect_ops(module.graph, "metadata_update")
    give_to_group(second, "other")
    outcome = HoistMetadata().run(module.graph)
    assert not outcome.done and text(module.graph).count("!metadata_update") == 2
    assert outcome.refused == [Refusal("with_effects_2", "counts another tensor or group than with_effects")]


def test_an_update_that_nobody_reads_serves_the_next_layer():
    def model(x: Tensor, count: Tensor) -> Tensor:
        ops.metadata_update(count, "local")
        return ops.rsv_combine(x, count, ops.metadata_update(count, "local"), T, "local")

    module, inputs = inference_graph(model, batch(), COUNT)
    before = module(*inputs)
    assert len(HoistMetadata().run(module.graph).done) == 1
    module.recompile()
    assert torch.equal(before[0], module(*inputs)[0])


def test_one_update_is_no_match():
    module, _ = inference_graph(routed, batch(), weights(), COUNT)
    before = text(module.graph)
    outcome = HoistMetadata().run(module.graph)
    assert not outcome.done and not outcome.refused and text(module.graph) == before

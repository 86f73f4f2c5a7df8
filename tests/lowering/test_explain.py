"""explain: what was done, refused, copied."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor import config, scheduler
from torch.fx import Graph

import lowering
from tests.lowering.layers import batch, routed, weights

COUNT = torch.tensor([5], dtype=torch.int32)


def model(x: Tensor, w: dict[str, Tensor], counts: Tensor) -> Tensor:
    x = x + routed(x, w, counts[0:1])
    x = x + routed(x, w, counts[0:1])
    return x + routed(x, w, counts[1:2])


def test_text_and_json_say_the_same():
    counts = torch.tensor([5, 4], dtype=torch.int32)
    explanation = lowering.explain(model, batch(), weights(), counts)
    assert_expected_inline(
        str(explanation),
        """\
lowering: on
graphs: 1, graph breaks: 0, partitions: 0, cudagraph skips: 0
ops: 1 agree, 2 metadata_update, 3 moe_layer
graph 0:
  a layer, by its graph: launches 11 -> 10, meetings 3 -> 3, copies 2 -> 0
  hoist_metadata: 1 done, 1 refused
    + with_effects_3: reads with_effects instead
    - with_effects_6: counts another tensor or group than with_effects
  fuse_norm: switched off
  fuse_combine: 0 done, 3 refused
    - add: add_1 reads it: Inductor keeps it in fp32, a buffer would round it (rounding='eager' joins it)
    - add_1: add is pointwise: Inductor keeps it in fp32, a buffer would round it (rounding='eager' joins it)
    - add_2: add_1 is pointwise: Inductor keeps it in fp32, a buffer would round it (rounding='eager' joins it)
  comm_buffers: 3 done, 0 refused
    + with_effects_9: fused_moe and with_effects_2 share a slot, 512 bytes stay unwritten
    + with_effects_10: fused_moe_1 and with_effects_5 share a slot, 512 bytes stay unwritten
    + with_effects_11: fused_moe_2 and with_effects_8 share a slot, 512 bytes stay unwritten
  join_layer: 3 done, 0 refused
    + with_effects_12: with_effects_1 and with_effects_9; the gathered batch, 512 bytes, stays inside
    + with_effects_13: with_effects_4 and with_effects_10; the gathered batch, 512 bytes, stays inside
    + with_effects_14: with_effects_7 and with_effects_11; the gathered batch, 512 bytes, stays inside
  overlap_shared: 0 done, 0 refused
  thin_shared: switched off
  route_rows: 0 done, 0 refused
  unroll_topk: switched off
  join_attention: switched off
  keep_rotations: 0 done, 0 refused
  merge_products: switched off
  elide_barriers: 5 done, 5 refused
    + with_effects: no reuse wait; the group's last op before this graph met all ranks
    + with_effects_12: entry wait dropped; the layer batch was last read by an earlier graph's layer, whose experts ended before with_effects met all ranks
    + with_effects_13: entry wait dropped; the layer batch was last read by with_effects_12, whose experts ended before with_effects_12 met all ranks
    + with_effects_6: no reuse wait; its slot was with_effects_12's, and with_effects_13 met all ranks since
    + with_effects_14: entry wait dropped; the layer batch was last read by with_effects_13, whose experts ended before with_effects_6 met all ranks
    - with_effects: arrival: metadata_update reads the counts of all ranks, written in this call
    - with_effects_12: arrival: moe_layer reads the rows, then the partial sums of all ranks, written in this call
    - with_effects_13: arrival: moe_layer reads the rows, then the partial sums of all ranks, written in this call
    - with_effects_6: arrival: metadata_update reads the counts of all ranks, written in this call
    - with_effects_14: arrival: moe_layer reads the rows, then the partial sums of all ranks, written in this call
  agreement: 1 done, 0 refused
    + group 'local': metadata_update(); 2 x [moe_layer(hidden=bfloat16[T,32], topk_ids=int64[T,2], topk_weights=bfloat16[T,2], max_tokens=8, entry_barrier=False, experts_per_rank=0)]; metadata_update(); moe_layer(hidden=bfloat16[T,32], topk_ids=int64[T,2], topk_weights=bfloat16[T,2], max_tokens=8, entry_barrier=False, experts_per_rank=0)
copies around the ops: 0""",  # noqa: E501
    )
    data = json.loads(explanation.to_json())
    assert data["active"] and data["compiled_graphs"] == 1 and data["graph_breaks"] == {}
    assert data["graphs"][0]["ops_before"]["metadata_update"] == 3
    assert data["graphs"][0]["ops_after"]["metadata_update"] == 2
    assert data["copies"] == []


def test_a_compiled_model_is_explained_like_its_source():
    compiled = torch.compile(model, backend="eager")
    counts = torch.tensor([5, 4], dtype=torch.int32)
    again = lowering.explain(compiled, batch(), weights(), counts)
    assert again.to_json() == lowering.explain(model, batch(), weights(), counts).to_json()


def test_graph_breaks_are_counted():
    def broken(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
        x = x + routed(x, w, count)
        torch._dynamo.graph_break()
        return x + routed(x, w, count)

    explanation = lowering.explain(broken, batch(), weights(), COUNT)
    assert explanation.compiled_graphs == 2 and sum(explanation.graph_breaks.values()) == 1


def one_layer(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
    return x + routed(x, w, count)


def test_partitions_and_skipped_cuda_graphs_are_counted():
    """Inductor cuts graphs only for CUDA graphs, so here a pass counts in its place; twice, as counters go on."""

    def cut(graph: Graph) -> None:
        counters["inductor"]["cudagraph_partitions"] += 3

    assert '["cudagraph_partitions"] +=' in Path(scheduler.__file__).read_text()
    config.post_grad_custom_pre_pass = cut
    lowering.enable()
    for _ in range(2):
        explanation = lowering.explain(one_layer, batch(), weights(), COUNT, mode="reduce-overhead")
        assert (explanation.partitions, explanation.cudagraph_skips) == (3, 1)


def test_without_lowering_it_says_so():
    lowering.disable()
    explanation = lowering.explain(one_layer, batch(), weights(), COUNT)
    assert not explanation.active and str(explanation).startswith("lowering: OFF (call lowering.enable())")
    assert explanation.ops == {"metadata_update": 1, "agv_dispatch": 1, "fused_moe": 1, "rsv_combine": 1}


def test_the_users_pass_over_the_schedule_keeps_running():
    seen: list[int] = []

    def count(nodes: list[Any]) -> list[Any]:
        seen.append(len(nodes))
        return nodes

    with config.patch(_post_fusion_custom_pass=count):
        lowering.explain(one_layer, batch(), weights(), COUNT)
        assert len(seen) == 1 and config._post_fusion_custom_pass is count


def test_code_in_cpp_is_refused_before_it_is_written():
    with config.patch(cpp_wrapper=True), pytest.raises(lowering.LoweringError, match="cpp_wrapper is True"):
        lowering.explain(one_layer, batch(), weights(), COUNT)

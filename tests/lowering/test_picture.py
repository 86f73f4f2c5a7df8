"""The boxes of a layer before and after, and the picture of them."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

import lowering
from lowering.layer_view import view_layer
from lowering.passes import run_passes
from lowering.picture import draw
from tests.lowering.layers import batch, inference_graph, routed, weights
from tests.lowering.test_overlap_shared import deepseek, shared_weights

COUNT = torch.tensor([5], dtype=torch.int32)
SVG = "{http://www.w3.org/2000/svg}"


def layer(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
    return x + routed(x, w, count)


def names(view) -> list[str]:
    return [box.name for box in view.boxes]


def test_boxes_and_their_costs():
    module, _ = inference_graph(layer, batch(), weights(), COUNT)
    before = view_layer(module.graph)
    run_passes(module.graph)
    after = view_layer(module.graph)
    assert names(before) == [
        "metadata_update", "product", "pointwise", "top-k", "agv_dispatch", "fused_moe", "rsv_combine", "pointwise",
    ]  # fmt: skip
    assert names(after) == ["metadata_update", "product", "pointwise", "top-k", "moe_layer"]  # the add joined it
    assert before.totals() == {"launches": 11, "meetings": 3, "copies": 2}
    assert after.totals() == {"launches": 9, "meetings": 3, "copies": 0}
    dispatch, experts = before.boxes[4:6]
    assert dispatch.needs == [0, 3] and experts.needs == [4] and before.boxes[-1].inside == ["add"]


def test_a_shared_expert_has_its_own_way():
    module, _ = inference_graph(deepseek, batch(), weights(), shared_weights(), COUNT)
    before = view_layer(module.graph)
    run_passes(module.graph)
    after = view_layer(module.graph)
    assert names(before).count("product") == 4 and names(after).count("product") == 1
    assert "moe_layer_shared" in names(after)
    for view in (before, after):
        for number, box in enumerate(view.boxes):
            assert all(need < number and view.boxes[need].depth < box.depth for need in box.needs)


def test_the_drawing_shows_every_box_inside_its_frame():
    module, _ = inference_graph(deepseek, batch(), weights(), shared_weights(), COUNT)
    before = view_layer(module.graph)
    run_passes(module.graph)
    after = view_layer(module.graph)
    root = ElementTree.fromstring(draw(before, after))
    frame, *boxes = [element.attrib for element in root.iter(f"{SVG}rect")]
    assert len(boxes) == len(before.boxes) + len(after.boxes)
    assert all(int(box["y"]) + int(box["height"]) <= int(frame["height"]) for box in boxes)
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "with lowering" in texts and "moe_layer_shared" in texts and "rsv_combine" in texts
    arrows = [element for element in root.iter(f"{SVG}path") if "marker-end" in element.attrib]
    assert len(arrows) == sum(len(box.needs) for view in (before, after) for box in view.boxes)


def test_explain_draws_and_says_so_where_there_is_nothing_to_draw():
    explanation = lowering.explain(layer, batch(), weights(), COUNT)
    assert "a layer, by its graph: launches 11 -> 9, meetings 3 -> 3, copies 2 -> 0" in str(explanation)
    assert explanation.to_svg().startswith("<svg")
    with pytest.raises(lowering.LoweringError, match="no graph holds a layer"):
        lowering.explain(torch.sin, batch()).to_svg()


def test_a_graph_without_a_layer_has_no_view():
    module, _ = inference_graph(torch.sin, batch())
    assert view_layer(module.graph) is None

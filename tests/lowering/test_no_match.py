"""Every pass on graphs without what it looks for: nothing changes, and nothing is said that is not so."""

from __future__ import annotations

import re

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lowering.passes import PASSES, Pass
from tests.lowering.layers import batch, inference_graph, ops, text

COUNT, METADATA = torch.tensor([5], dtype=torch.int32), torch.tensor([5, 0, 5], dtype=torch.int32)


@pytest.mark.parametrize("one", PASSES, ids=lambda one: one.name)
def test_a_graph_without_ops(one: Pass):
    module, _ = inference_graph(lambda x: (x @ x.T).softmax(-1) * 2, batch())
    before = text(module.graph)
    outcome = one.run(module.graph, "compiled")
    assert not outcome.done and not outcome.refused and text(module.graph) == before


def test_a_lone_combine():
    """One exchange of given rows: no experts, no dispatch, no norm, nothing behind it."""

    def combine(x: Tensor, count: Tensor, metadata: Tensor) -> Tensor:
        return ops.rsv_combine(x, count, metadata, 8, "local")

    module, _ = inference_graph(combine, batch(), COUNT, METADATA)
    said = []
    for one in PASSES:
        before = text(module.graph)
        outcome = one.run(module.graph, "compiled")
        changed = "" if text(module.graph) == before else " (changed)"
        said += [f"{one.name}{changed}: {line}" for line in outcome.done]
        said += [f"{one.name}{changed}, refused: {refusal.reason}" for refusal in outcome.refused]
    assert_expected_inline(
        re.sub(r"arg\d+_1", "input", "\n".join(said)),
        """\
fuse_norm, refused: no RMSNorm reads it
comm_buffers, refused: input comes from no fused_moe: it is copied into the slot
elide_barriers: with_effects: no reuse wait; the group's last op before this graph met all ranks
elide_barriers, refused: arrival: rsv_combine reads the partial sums of all ranks, written in this call
agreement (changed): group 'local': rsv_combine(expert_output=bfloat16[8,32])""",
    )

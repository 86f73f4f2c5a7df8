"""Proposed: holes that mutations found."""

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_ops
from graphs.launch import Emit, run_ranks
from lowering import AgreementError, agreement
from lowering.agreement import Agreement
from lowering.effects import effect_ops
from lowering.elide_barriers import ElideBarriers
from lowering.fuse_combine import MAX_ADDENDS, FuseCombine
from lowering.fuse_norm import FuseNorm
from lowering.hoist_metadata import HoistMetadata
from lowering.passes import Options, run_passes
from tests.lowering.layers import H, T, batch, inference_graph, ops, routed, text, weights

COUNT, METADATA = torch.tensor([5], dtype=torch.int32), torch.tensor([5, 0, 5], dtype=torch.int32)


def two_groups() -> torch.fx.Graph:
    """A layer of "local", whose metadata comes from outside, behind another group's ``metadata_update``."""

    def model(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
        seen = ops.metadata_update(count, "local")
        return routed(x, w, count, metadata) + seen[0]

    module, _ = inference_graph(model, batch(), weights(), COUNT, METADATA)
    (update,) = effect_ops(module.graph, "metadata_update")
    update.node.update_arg(3, "other")
    run_passes(module.graph, Options(frozenset(["agreement", "elide_barriers"])))
    return module.graph


def test_another_groups_meeting_drops_nothing():
    graph = two_groups()
    outcome = ElideBarriers().run(graph)
    (layer,) = effect_ops(graph, "moe_layer")
    assert layer.arguments["entry_barrier"] is True, outcome


def test_each_group_compares_its_own_ops():
    done = Agreement().run(two_groups()).done
    assert len(done) == 2 and done[0] == "group 'other': metadata_update()"
    assert done[1].startswith("group 'local': moe_layer(") and "metadata_update" not in done[1]


def test_counts_of_two_groups_are_two():
    """The same tensor, summed over other ranks."""

    def model(x: Tensor, count: Tensor) -> Tensor:
        return x + ops.metadata_update(count, "local")[0] + ops.metadata_update(count, "local")[0]

    module, _ = inference_graph(model, batch(), COUNT)
    _, second = effect_ops(module.graph, "metadata_update")
    second.node.update_arg(3, "other")
    outcome = HoistMetadata().run(module.graph)
    assert not outcome.done and len(outcome.refused) == 1 and text(module.graph).count("!metadata_update") == 2


def compare(rank: int, ranks: int, case: str, emit: Emit) -> list[str]:
    """Texts that this rank brings to a comparison, one after the other, and what comes of each."""
    ws = moe_ops.init_workspace(None, max_tokens_per_rank=8, hidden_size=32, top_k=2, timeout_s=1.5)
    texts = {"late": ["a", "a", "b"], "second": ["a", "a", "b" if rank else "c", "d"]}[case]
    said = []
    for n, one in enumerate(texts):
        if case == "late" and n == 0 and rank == 1:
            time.sleep(2)
        try:
            agreement.agree(torch.zeros(1), one, ws.group_name)
            said.append(one)
        except AgreementError as error:
            said.append(str(error))
        dist.barrier()
    return said


def test_a_rank_that_came_late_can_agree_later():
    """Neither counts the meeting that failed, so the next one is the same for both."""
    for said in run_ranks(compare, "late", ranks=2, device="cpu", on_event=print):
        assert "did not come to compare graphs within 1.5 s" in said[0] and said[1:] == ["a", "b"]


def test_every_new_text_is_compared():
    for rank, said in enumerate(run_ranks(compare, "second", ranks=2, device="cpu", on_event=print)):
        assert said[:2] == ["a", "a"] and said[3] == "d"
        assert f"Rank {rank}: {'cb'[rank]}. Rank {1 - rank}: {'bc'[rank]}." in said[2]


def combined(y: Tensor) -> Tensor:
    return ops.rsv_combine(y, COUNT, METADATA.clone(), T, "local")


@pytest.mark.parametrize("model", [
    lambda y, *a: (combined(y) + a[0]) * 2.5,
    lambda y, *a: combined(y) + a[0] + a[1] + a[2] + a[3] + a[4],
])  # fmt: skip
def test_what_stays_behind_a_joined_add(model):
    module, inputs = inference_graph(model, *(batch(n) for n in range(2 + MAX_ADDENDS)))
    before = module(*inputs)[0]
    outcome = FuseCombine().run(module.graph, "eager")
    module.recompile()
    assert len(outcome.done) == len(outcome.refused) == 1 and torch.equal(before, module(*inputs)[0])


WEIGHT = torch.randn(H).bfloat16()


@pytest.mark.parametrize("dim,keep,weight", [(0, True, WEIGHT), ((0, 1), True, WEIGHT), (-1, True, WEIGHT.float())])
def test_other_means_and_weights_are_no_norm(dim: Any, keep: bool, weight: Tensor):
    def model(y: Tensor, s: Tensor) -> Tensor:
        x = combined(y) + s
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(dim, keepdim=keep) + 1e-6)).to(x.dtype)

    module, inputs = inference_graph(model, batch(1), batch(2))
    before = module(*inputs)[0]
    outcome = FuseNorm().run(module.graph, "eager")
    module.recompile()
    assert not outcome.done and outcome.refused and torch.equal(before, module(*inputs)[0])
    assert "norm_weight" not in text(module.graph)

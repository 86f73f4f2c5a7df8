"""Ranks compare what they compiled before they first communicate: two processes over gloo, and the graph."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch import Tensor

import lowering
import moe_ops
from graphs.launch import Emit, run_ranks
from lowering import agreement
from lowering.agreement import Agreement
from lowering.hoist_metadata import HoistMetadata
from tests.lowering.layers import batch, inference_graph, ops, routed, text, two_groups, weights

COUNT = torch.tensor([5], dtype=torch.int32)


def test_the_check_comes_first_in_the_chain():
    def model(x: Tensor, count: Tensor) -> Tensor:
        return ops.rsv_combine(x, count, ops.metadata_update(count, "local"), 8, "local")

    module, inputs = inference_graph(model, batch(), COUNT)
    before = module(*inputs)
    outcome = Agreement().run(module.graph)
    module.graph.lint()
    module.recompile()
    assert_expected_inline(
        text(module.graph),
        """\
_make_token_default = prims._make_token()
with_effects_2 = !agree(_make_token_default, in0, 'metadata_update(); rsv_combine(expert_output=bfloat16[8,32])', 'local')
getitem_4 = with_effects_2[0]
with_effects = !metadata_update(getitem_4, in0, 'local')
getitem = with_effects[0]
getitem_1 = with_effects[1]
with_effects_1 = !rsv_combine(getitem, in1, in0, getitem_1, 8, 'local')
getitem_2 = with_effects_1[0]
getitem_3 = with_effects_1[1]
return (getitem_3)""",  # noqa: E501
    )
    assert outcome.done == ["group 'local': metadata_update(); rsv_combine(expert_output=bfloat16[8,32])"]
    assert torch.equal(before[0], module(*inputs)[0])
    assert not Agreement().run(module.graph).done  # a graph that has one gets no second


def test_a_graph_that_does_not_communicate_gets_no_check():
    module, _ = inference_graph(torch.sin, batch())
    before = text(module.graph)
    assert not Agreement().run(module.graph).done and text(module.graph) == before


def test_each_group_compares_its_own_ops():
    done = Agreement().run(two_groups()).done
    assert len(done) == 2 and done[0] == "group 'other': metadata_update()"
    assert done[1].startswith("group 'local': moe_layer(") and "metadata_update" not in done[1]


def test_equal_layers_are_written_once_and_T_is_left_out():
    def model(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
        for _ in range(3):
            x = x + routed(x, w, count, max_tokens=24)
        return x

    module, _ = inference_graph(model, batch(), weights(), COUNT)
    HoistMetadata().run(module.graph)
    assert_expected_inline(
        "\n".join(Agreement().run(module.graph).done),
        """group 'local': metadata_update(); 3 x [agv_dispatch(hidden=bfloat16[T,32], topk_ids=int64[T,2], topk_weights=bfloat16[T,2], max_tokens=24); rsv_combine(expert_output=bfloat16[24,32])]""",  # noqa: E501
    )


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([], []),
        (["a"], ["a"]),
        (["a", "a", "a"], ["3 x [a]"]),
        (["m", "d", "c", "d", "c", "x"], ["m", "2 x [d; c]", "x"]),
        (["m", "d", "c", "m", "d", "c"], ["2 x [m; d; c]"]),
        (["a", "b", "c", "a"], ["a", "b", "c", "a"]),
    ],
)
def test_compression(lines: list[str], expected: list[str]):
    assert list(agreement._compress(lines)) == expected


def compile_and_run(rank: int, ranks: int, case: str, emit: Emit) -> dict[str, Any]:
    """One rank: whether lowering changed a bit, or the error."""
    torch.set_num_threads(1)
    store = dist.distributed_c10d._get_default_store()
    timeout_s = 5.0 if case == "absent" else 40.0
    ws = moe_ops.init_workspace(None, max_tokens_per_rank=8, hidden_size=32, top_k=2, timeout_s=timeout_s)
    w = weights(rank)
    w["gate_up"], w["down"] = w["gate_up"][2 * rank : 2 * rank + 2], w["down"][2 * rank : 2 * rank + 2]
    w["router"] = weights()["router"]
    rows = 8 - 3 * rank if case == "capacity" else 8
    layers = 2 if case == "layers" and rank == 1 else 1
    max_tokens = 20 if case == "shape" and rank == 1 else 16
    lowering.enable(without=["elide_barriers"] if case == "meetings" and rank == 1 else [])

    def model(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
        for _ in range(layers):
            x = x + routed(x, w, count, group=ws.group_name, start=2 * rank, max_tokens=max_tokens)
        return x

    x, count = batch(rank)[:rows], torch.tensor([3 + rank], dtype=torch.int32)
    result: dict[str, Any] = {}
    try:
        if case == "absent" and rank == 1:
            store.wait(["done"], timedelta(seconds=60))
        else:
            with torch.no_grad():
                compiled = torch.compile(model, fullgraph=True)
                out = [compiled(x, w, count) for _ in range(2)][1]
                lowering.disable()
                torch._dynamo.reset()
                result["equal"] = torch.equal(out, torch.compile(model, fullgraph=True)(x, w, count))
    except lowering.AgreementError as error:
        result["error"] = str(error)
    store.set("done", "1")
    return result


def two_ranks(case: str) -> list[dict[str, Any]]:
    """What each of two processes reports."""
    return run_ranks(compile_and_run, case, ranks=2, device="cpu", on_event=print)


def test_ranks_that_agree_go_on_and_lowering_changes_no_bit():
    """Their capacities T differ, which is no disagreement."""
    assert two_ranks("capacity") == [{"equal": True}] * 2


@pytest.mark.parametrize("case", ["layers", "shape"])
def test_a_difference_is_an_error_that_shows_both(case: str):
    for rank, report in enumerate(two_ranks(case)):
        error = report["error"]
        assert "agree: ranks compiled different communication." in error
        assert f"Rank {rank}: " in error and f"Rank {1 - rank}: " in error
        assert ("2 x [" in error) == (case == "layers") and ("max_tokens=20" in error) == (case == "shape")


def test_a_rank_that_keeps_its_meetings_is_told_before_the_first():
    """One rank leaves ``elide_barriers`` out. Its layer would wait for a meeting to which nobody comes."""
    for rank, report in enumerate(two_ranks("meetings")):
        kept, dropped = (f"Rank {number}: metadata_update(); moe_layer(" for number in (1, 0))
        mine, _, theirs = report["error"].partition(f". Rank {1 - rank}: ")
        text = {rank: mine, 1 - rank: f"Rank {1 - rank}: {theirs}"}
        assert kept in text[1] and "entry_barrier=True" in text[1] and "entry_barrier=False" not in text[1]
        assert dropped in text[0] and "entry_barrier=False" in text[0] and "entry_barrier=True" not in text[0]


def test_a_rank_that_does_not_come_is_an_error_not_a_hang():
    first, _ = two_ranks("absent")
    assert "rank 1 did not come to compare graphs within 5 s" in first["error"]
    assert "Rank 0 is about to run: metadata_update(); moe_layer(" in first["error"]


# What each of two ranks brings, one after the other; blank: it does not come.
TEXTS = {"late": ("aab", "aab"), "absent": ("aa", " a"), "second": ("aacd", "a bd")}


def compare(rank: int, ranks: int, case: str, emit: Emit) -> list[str]:
    """What comes of each text that this rank brings to a comparison: the text, or the error."""
    ws = moe_ops.init_workspace(None, max_tokens_per_rank=8, hidden_size=32, top_k=2, timeout_s=1.5)
    said = []
    for number, one in enumerate(TEXTS[case][rank]):
        if case == "late" and number == 0 and rank == 1:
            time.sleep(2)
        try:
            if one != " ":
                agreement.agree(torch.zeros(1), one, ws.group_name)
            said.append(one)
        except lowering.AgreementError as error:
            said.append(str(error))
        dist.barrier()
    return said


def test_a_rank_that_came_late_can_agree_later():
    """Neither counts the meeting that failed, so the next one is the same for both."""
    for said in run_ranks(compare, "late", ranks=2, device="cpu", on_event=print):
        assert "did not come to compare graphs within 1.5 s" in said[0] and said[1:] == ["a", "b"]


def test_a_rank_that_did_not_come_goes_on_to_the_meeting_where_the_others_are():
    first, second = run_ranks(compare, "absent", ranks=2, device="cpu", on_event=print)
    assert "rank 1 did not come to compare graphs within 1.5 s" in first[0] and first[1:] == ["a"]
    assert second == [" ", "a"]


def test_every_new_text_is_compared_once():
    for rank, said in enumerate(run_ranks(compare, "second", ranks=2, device="cpu", on_event=print)):
        assert said[:2] == ["a", "a "[rank]] and said[3] == "d"
        assert f"Rank {rank}: {'cb'[rank]}. Rank {1 - rank}: {'bc'[rank]}." in said[2]

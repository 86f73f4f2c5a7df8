"""Rows travel only where their experts are: what ranks tell each other, the pass, and whole layers in the emulator."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch import Tensor
from torch.fx import Graph

import moe_ops
from lowering import AgreementError, route_rows
from lowering.effects import effect_ops
from lowering.passes import Options, run_passes
from moe_ops.emulator import Rank, run_ranks
from moe_ops.errors import ArgumentError
from moe_ops.placement import Placements
from moe_ops.workspace import resolve
from tests.lowering.layers import T, batch, inference_graph, routed, text, weights

ops = torch.ops.moe_ep
COUNT = torch.tensor([5], dtype=torch.int32)
EVEN, UNEVEN = ((0, 2), (2, 2), (4, 2)), ((0, 2), (2, 2), (4, 1))


def test_only_a_declared_even_split_counts():
    told = Placements([EVEN])
    assert [told.experts_per_rank(rank, 2 * rank, 2) for rank in range(3)] == [2, 2, 2]
    assert told.experts_per_rank(0, 0, 3) == told.experts_per_rank(1, 0, 2) == 0
    assert Placements([UNEVEN]).experts_per_rank(0, 0, 2) == Placements().experts_per_rank(0, 0, 2) == 0
    assert Placements([((2, 2), (0, 2))]).experts_per_rank(0, 2, 2) == 0  # in another order of ranks
    told.add(EVEN)
    told.add(((0, 3), (3, 3), (6, 3)))
    assert len(told.splits) == 2 and told.experts_per_rank(2, 6, 3) == 3 and told.experts_per_rank(2, 4, 2) == 2


def test_splits_that_look_alike_somewhere_are_not_used_anywhere():
    told = Placements([EVEN, UNEVEN])
    assert [told.experts_per_rank(rank, 2 * rank, 2) for rank in range(3)] == [0, 0, 0]


def test_one_rank_has_nobody_to_tell():
    ws = resolve("local", "test")
    assert moe_ops.place_experts(ws, 0, 4) == 0 and not ws.placements.splits
    with pytest.raises(ArgumentError, match="first = -1, count = 4; pass at least 0 and 1"):
        moe_ops.place_experts(ws, -1, 4)


def two_layers(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
    for _ in range(2):
        x = x + routed(x, w, count, max_tokens=3 * T)
    return x


def lower(monkeypatch: pytest.MonkeyPatch, **changes: object) -> tuple[Graph, list[str]]:
    """The graph, and what the pass said, for a rank 0 of three that holds four experts."""
    told = Placements([tuple((4 * rank, 4) for rank in range(3))])
    facts = {"rank": 0, "world_size": 3, "transport": "p2p", "placements": told} | changes
    monkeypatch.setattr(route_rows, "get_workspace", lambda group: SimpleNamespace(**facts))
    module, _ = inference_graph(two_layers, batch(), weights(), COUNT)
    outcome = run_passes(module.graph, Options(frozenset({"agreement"}))).outcome("route_rows")
    return module.graph, [*outcome.done, *(refusal.reason for refusal in outcome.refused)]


def splits(graph: Graph) -> list[int]:
    """``experts_per_rank`` of each layer."""
    return [layer.arguments["experts_per_rank"] for layer in effect_ops(graph, "moe_layer")]


def test_graph(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(route_rows, "LEAST_BYTES", 0)
    routed_only, _ = lower(monkeypatch)
    assert_expected_inline(
        "\n".join(line for line in text(routed_only).splitlines() if "!" in line),
        """\
with_effects = !metadata_update(_make_token_default, in0, 'local')
with_effects_8 = !moe_layer(getitem, in1, getitem_3, getitem_2, in3, in4, in0, getitem_1, 0, 24, [], 'local', scale=1.0, round_each=True, combine_dtype=None, norm_weight=None, norm_eps=0.0, norm_shift=0.0, norm_round_first=True, activation=silu, alpha=None, limit=None, gated=True, transposed=False, interleaved=False, gate_up_bias=None, down_bias=None, tokens_hint=None, batch_invariant=False, experts_per_rank=4, entry_barrier=False)
with_effects_9 = !moe_layer(getitem_24, add, getitem_13, getitem_12, in3, in4, in0, getitem_1, 0, 24, [], 'local', scale=1.0, round_each=True, combine_dtype=None, norm_weight=None, norm_eps=0.0, norm_shift=0.0, norm_round_first=True, activation=silu, alpha=None, limit=None, gated=True, transposed=False, interleaved=False, gate_up_bias=None, down_bias=None, tokens_hint=None, batch_invariant=False, experts_per_rank=4, entry_barrier=False)""",  # noqa: E501
    )
    to_all, _ = lower(monkeypatch, placements=Placements())
    assert text(to_all) == text(routed_only).replace("experts_per_rank=4, ", "")


def test_every_layer_gets_its_split(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(route_rows, "LEAST_BYTES", 0)
    graph, said = lower(monkeypatch)
    assert splits(graph) == [4, 4] and len(said) == 2
    # 24 rows of 64 bytes, two thirds of them from others, of which 4 in 9 have neither expert here
    said_of_bytes = "about 455 bytes stay off the wire to each rank, and from each"
    assert said[0].endswith(f"4 experts on each of 3 ranks; {said_of_bytes}")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"transport": "nccl"}, "nccl moves whole batches"),
        ({"transport": "emulator-multicast"}, "a multicast store reaches every rank anyway"),
        ({"placements": Placements()}, "the ranks have not told each other which experts they hold"),
        ({"placements": Placements([((0, 4), (4, 4), (8, 3))])}, "experts 0 to 3 here are no part of a declared split"),
        ({}, "455 bytes would stay off the wire: less than 200000"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(monkeypatch: pytest.MonkeyPatch, changes: dict, reason: str):
    graph, said = lower(monkeypatch, **changes)
    assert splits(graph) == [0, 0] and len(said) == 2 and all(text.startswith(reason) for text in said)


def test_one_rank_is_not_mentioned(monkeypatch: pytest.MonkeyPatch):
    graph, said = lower(monkeypatch, world_size=1)
    assert splits(graph) == [0, 0] and not said


# ---- whole layers in the emulator ----

H, K, I, LAYERS = 32, 2, 16, 2
LIVES = (4, 1)


def tensor(seed: int, *size: int) -> Tensor:
    return (torch.randn(*size, generator=torch.Generator().manual_seed(seed)) / 4).bfloat16()


def split(experts: int, world: int, rank: int) -> tuple[int, int]:
    each, more = divmod(experts, world)
    return rank * each + min(rank, more), each + (rank < more)


def layers_of(rank: Rank, experts: int, without: list[str]) -> dict:
    """Lowered with rows routed, and unlowered: bits, the graph, and how many rows this rank never got."""
    torch.set_num_threads(1)
    route_rows.LEAST_BYTES = 0
    dist.init_process_group("gloo", store=rank.store, rank=rank.rank, world_size=rank.world_size)
    ws = moe_ops.init_workspace(None, max_tokens_per_rank=4, hidden_size=H, top_k=K, transport="emulator", timeout_s=60)
    first, count = split(experts, rank.world_size, rank.rank)
    per_rank = moe_ops.place_experts(ws, first, count)
    router = tensor(1, H, experts)
    whole = [(tensor(10 + n, experts, 2 * I, H), tensor(30 + n, experts, H, I)) for n in range(LAYERS)]
    local = [[weight[first : first + count].contiguous() for weight in pair] for pair in whole]

    def model(x: Tensor, live: Tensor) -> Tensor:
        for gate_up, down in local:
            metadata = ops.metadata_update(live, ws.group_name)
            chosen, ids = (x @ router).float().softmax(-1).topk(K, -1)
            rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, live, metadata, rank.world_size * 4, ws.group_name)
            y = ops.fused_moe(rows, ids, chosen, gate_up, down, metadata[0:1], first)
            x = x + ops.rsv_combine(y, live, metadata, 4, ws.group_name)
        return x

    gathered, unread = ws.layer_batch(4 * rank.world_size, torch.int64, torch.bfloat16), 0
    module, inputs = inference_graph(model, tensor(50 + rank.rank, 4, H), torch.tensor([4], dtype=torch.int32))
    (live,) = (value for value in inputs if isinstance(value, Tensor) and value.dtype == torch.int32)

    def run() -> list[Tensor]:
        nonlocal unread
        results = []
        for lives in LIVES:
            live.fill_((rank.rank + lives) % 5)
            gathered.hidden.fill_(torch.nan)
            rank.meet()
            results.append(module(*inputs)[0][: int(live)])
            valid = sum((peer + lives) % 5 for peer in range(rank.world_size))
            unread += int(gathered.hidden[:valid].isnan().any(1).sum())
            rank.meet()
        return results

    try:
        plain, unread = run(), 0
        report = run_passes(module.graph, Options(frozenset(without if rank.rank == 1 else [])))
        module.recompile()
        equal = all(map(torch.equal, plain, run()))
        said = {"done": report.outcome("route_rows").done, "fingerprint": report.outcome("agreement").done}
        return said | {"equal": equal, "per_rank": per_rank, "unread": unread}
    except AgreementError as error:
        return {"error": str(error)}
    finally:
        ws.close()
        dist.destroy_process_group()


@pytest.mark.parametrize(("world", "experts"), [(2, 8), (3, 9), (4, 8)])
def test_bits_stay_and_rows_that_nobody_needs_stay_away(world: int, experts: int):
    reports = run_ranks(world, layers_of, experts, [], timeout_s=200)
    for report in reports:
        assert report["equal"] and len(report["done"]) == LAYERS and report["per_rank"] == experts // world, report
        assert f"experts_per_rank={experts // world}" in report["fingerprint"][0]
    assert sum(report["unread"] for report in reports) > 0


def test_an_uneven_split_sends_every_row_to_all():
    for report in run_ranks(3, layers_of, 7, [], timeout_s=200):
        assert report["equal"] and not report["done"] and report["per_rank"] == report["unread"] == 0, report
        assert "experts_per_rank=0" in report["fingerprint"][0]


def test_ranks_that_decide_differently_are_told():
    for report in run_ranks(2, layers_of, 8, ["route_rows"], timeout_s=200):
        assert "experts_per_rank=4" in report["error"] and "experts_per_rank=0" in report["error"], report

"""``fused_moe`` and ``align_block_size`` at sizes and in numbers that only a GPU can do: run by ``test_moe_kernels``.

Needs one GPU with 80 GB.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_ops.align import launch_align
from moe_ops.fused_moe import launch_fused_moe, launch_fused_moe_pairs
from moe_ops.fused_moe_config import Plan, Shape, Tiles, default_plan
from moe_ops.moe_reference import fused_moe_reference
from moe_ops.random_layer import make_order_tell
from tests.moe_ops.launched import table_plans
from tests.moe_ops.moe_cases import poisoned_memory
from tests.moe_ops.moe_kernel_checks import PLANS
from tests.tolerances import FUSED_MOE, relative_error

FEW = Tiles(16, 32, 128, 4, 4, swap=True)
MANY = Tiles(128, 128, 64, 8, 3)
BIG_PLANS = {
    "few": Plan(FEW, replace(FEW, block_n=64), pairs=128),
    "few-pointers": Plan(FEW, replace(FEW, block_n=64), pairs=128, tma=False),
    "many": Plan(MANY, MANY),
    "many-pointers": Plan(Tiles(64, 64, 32, 4, 3), Tiles(64, 64, 32, 4, 3), tma=False),
}
BIG_PLANS |= {name: PLANS[name] for name in ("many-flat", "many-special", "many-rest", "many-wide")}


@pytest.fixture(autouse=True)
def _give_back():
    yield
    torch.cuda.empty_cache()


def _layer(rows: int, top_k: int, experts: int, hidden: int, inner: int) -> list[Tensor]:
    """hidden, ids, weights, gate_up, down."""
    make = torch.Generator("cuda").manual_seed(rows)

    def normal(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device="cuda").normal_(std=size[-1] ** -0.5, generator=make)

    ids = torch.randint(0, experts, (rows, 1), device="cuda", generator=make)
    ids = (ids + torch.arange(top_k, device="cuda")) % experts
    weights = torch.rand(rows, top_k, device="cuda", generator=make)
    return [normal(rows, hidden), ids, weights, normal(experts, 2 * inner, hidden), normal(experts, hidden, inner)]


def _live(count: int) -> Tensor:
    return torch.tensor([count], dtype=torch.int32, device="cuda")


def _check_rows(out: Tensor, layer: list[Tensor], rows: Tensor) -> None:
    hidden, ids, weights, gate_up, down = layer
    wanted = fused_moe_reference(
        hidden[rows].double(), ids[rows], weights[rows].double(), gate_up, down, _live(rows.numel()), 0
    )
    assert relative_error(out[rows], wanted) <= FUSED_MOE[torch.bfloat16]


@pytest.mark.parametrize(
    ("tokens", "plan", "local"),
    [(1, None, 16), (16, None, 16), (64, None, 16), (512, None, 16), (512, "many-rest", 16), (512, "many-wide", 16)]
    + [(1200, plan, 4) for plan in ("many-rest", "many-flat")],  # rows with one local pair of four
)
def test_a_thousand_replays_with_other_live_counts(tokens, plan, local):
    """Row r of every replay has the bits that it has in an eager call with all rows live."""
    layer = _layer(tokens, 4, 16, 512, 256)
    layer[3:] = [weight[:local] for weight in layer[3:]]
    chosen = replace(PLANS[plan], lone=True) if plan else default_plan(Shape(16, 4, 512, 256, tokens))
    live = _live(tokens)
    wanted = launch_fused_moe(*layer, live, 0, plan=chosen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = launch_fused_moe(*layer, live, 0, plan=chosen)
    wrong = torch.zeros(1, dtype=torch.int64, device="cuda")
    for step in range(1000):
        count = step * 37 % (tokens + 1)
        live.fill_(count)
        out.fill_(float("nan"))
        graph.replay()
        wrong += (out[:count] != wanted[:count]).sum()
    assert int(wrong) == 0


@pytest.mark.parametrize("plan", BIG_PLANS)
def test_weights_beyond_2_31_elements(plan):
    layer = _layer(32, 2, 65, 4096, 4096)
    assert layer[3].numel() > 2**31
    layer[1][-4:] = torch.tensor([63, 64], device="cuda")  # the last experts, whose weights lie beyond 2^31
    out = launch_fused_moe(*layer, _live(32), 0, plan=BIG_PLANS[plan])
    _check_rows(out, layer, torch.arange(32, device="cuda"))


@pytest.mark.parametrize("plan", [name for name in BIG_PLANS if name.startswith("many")])
def test_rows_beyond_2_31_elements(plan):
    """M * H, M * K * H and M * K * I are all above 2^31."""
    layer = _layer(1_100_000, 2, 4, 2048, 1024)
    rows = layer[0].shape[0]
    assert min(rows * 2048, rows * 2 * 1024) > 2**31
    out = launch_fused_moe(*layer, _live(rows), 0, plan=BIG_PLANS[plan])
    _check_rows(out, layer, torch.cat([torch.arange(64), torch.arange(rows - 64, rows)]).cuda())


def test_few_rows_live_of_many():
    """The few-rows kernels with rows far apart: a capacity of 2^31 elements, 40 of its rows live."""
    layer = _layer(1_100_000, 2, 4, 2048, 1024)
    out = launch_fused_moe(*layer, _live(40), 0, plan=BIG_PLANS["few"])
    _check_rows(out, layer, torch.arange(40, device="cuda"))


@pytest.mark.parametrize("experts", [3, 256])
def test_align_of_almost_2_31_pairs(experts):
    rows, top_k, block, step = 2**28 - 2**17, 8, 64, 2**27
    ids = torch.empty(rows, top_k, dtype=torch.int32, device="cuda").random_(-1, experts + 1)
    pairs = ids.numel()
    sorted_ids, expert_ids, total = launch_align(ids, _live(rows), block, experts, 0)
    used, flat, seen = int(total), ids.view(-1), 0
    assert used % block == 0 and (expert_ids[used // block :] == -1).all()
    for begin in range(0, used, step):
        part = sorted_ids[begin : min(begin + step, used)]
        expert = expert_ids[begin // block : (begin + part.numel()) // block].repeat_interleave(block)
        real = part < pairs
        assert (flat[part[real]] == expert[real]).all()
        follows = (expert[1:] == expert[:-1]) & real[1:]  # pairs ascend within an expert, padding comes last
        assert (part[1:] > part[:-1])[follows].all() and real[:-1][follows].all()
        seen += int(real.sum())
    assert seen == sum(int(((p >= 0) & (p < experts)).sum()) for p in flat.split(step))


ROUTINGS = ["holes", "one", "every third", "none"]


def _odd_layer(routing: str, live: int) -> tuple[list[Tensor], int, int]:
    """The middle half of 32 experts is local, sizes are no tile's multiples, and what nobody may read is NaN.

    ``holes``: a third of the ids is -1; ``one``: all pairs to one local expert; ``every third``: two thirds of the
    experts have no pair; ``none``: no pair is local.
    """
    layer, start, local = _layer(4099, 8, 32, 1000, 712), 8, 16
    hidden, ids, weights = layer[:3]
    if routing == "holes":
        ids[torch.rand(ids.shape, device="cuda") < 1 / 3] = -1
    elif routing == "every third":
        ids -= ids % 3
    else:
        ids[:] = start + local - 1 if routing == "one" else start + local
    weights[(ids < start) | (ids >= start + local)] = float("nan")
    hidden[live:], ids[live:] = float("nan"), start
    layer[3:] = [weight[start : start + local].contiguous() for weight in layer[3:]]
    return layer, start, local


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("plan", BIG_PLANS)
def test_large_calls_of_odd_routing_in_poisoned_memory(plan, routing):
    live = 4001
    layer, start, local = _odd_layer(routing, live)
    out = torch.full((4099, 1000), 7.0, dtype=torch.bfloat16, device="cuda")
    with poisoned_memory():
        launch_fused_moe(*layer, _live(live), start, plan=BIG_PLANS[plan], out=out)
    assert torch.isfinite(out[:live]).all() and (out[live:] == 7).all()
    hidden, ids, weights, gate_up, down = layer
    lacks_pair = ((ids < start) | (ids >= start + local)).all(1)[:live]
    assert not out[:live][lacks_pair].any() and bool(lacks_pair.all()) == (routing == "none")
    rows = torch.randperm(live, device="cuda")[:300]
    wanted = fused_moe_reference(
        hidden[rows].double(), ids[rows], weights[rows].double(), gate_up, down, _live(300), start
    )  # fmt: skip
    assert relative_error(out[rows], wanted) <= FUSED_MOE[torch.bfloat16]


@pytest.mark.parametrize("plan", BIG_PLANS)
def test_no_row_is_live(plan):
    layer, start, _ = _odd_layer("one", 0)
    out = torch.full((4099, 1000), 7.0, dtype=torch.bfloat16, device="cuda")
    with poisoned_memory():
        launch_fused_moe(*layer, _live(0), start, plan=BIG_PLANS[plan], out=out)
    assert (out == 7).all()


def _counts_of_table() -> dict[Shape, list[int]]:
    counts: dict[Shape, list[int]] = {}
    for shape, _ in table_plans():
        counts.setdefault(replace(shape, tokens=0), []).append(shape.tokens)
    return counts


def _as_gpt_oss_lies(gate_up: Tensor, down: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """The same weights transposed, gate and up in turns; and the arguments that say so, with biases and a limit."""
    experts, width, hidden = gate_up.shape
    in_turns = gate_up.view(experts, 2, width // 2, hidden).transpose(1, 2).reshape(gate_up.shape)
    up, out = (torch.randn(experts, 1, dtype=down.dtype, device="cuda") for _ in range(2))
    biases = {"gate_up_bias": up.expand(-1, width).contiguous(), "down_bias": out.expand(-1, hidden).contiguous()}
    form = {"activation": "swiglu_oai", "alpha": 1.702, "limit": 7.0, "transposed": True, "interleaved": True}
    return [weight.transpose(1, 2).contiguous() for weight in (in_turns, down)], form | biases


COUNTS = _counts_of_table()
LAYERS = [(shape, gpt_oss) for shape in COUNTS for gpt_oss in (False, True) if not gpt_oss or shape.hidden == 2880]


@pytest.mark.parametrize(("shape", "gpt_oss"), LAYERS, ids=str)
def test_batch_invariant_rows_keep_their_bits_at_every_count_of_the_table(shape, gpt_oss):
    """Every plan of the table meets the one for the most rows. Half of the slots are other ranks'."""
    most, form = max(COUNTS[shape]), {}
    layer = _layer(most, shape.top_k, shape.experts, shape.hidden, shape.inner)
    make_order_tell(layer[0], layer[3], layer[4])
    layer[1][torch.rand(layer[1].shape, device="cuda") < 0.5] = shape.experts
    if gpt_oss:
        layer[3:], form = _as_gpt_oss_lies(layer[3], layer[4])
    whole = launch_fused_moe(*layer, _live(most), 0, batch_invariant=True, **form)
    for count in COUNTS[shape]:
        rows = [tensor[-count:] for tensor in layer[:3]]
        part = launch_fused_moe(*rows, *layer[3:], _live(count), 0, batch_invariant=True, **form)
        assert torch.equal(part, whole[-count:]), count


@pytest.mark.parametrize("tokens", [4, 64, 512])
def test_batch_invariant_pairs_of_tuned_plans_do_not_depend_on_the_rank_split(tokens):
    """Qwen3-30B's experts on one rank and on 2, 4 and 8, which take the table's plans for other numbers of experts."""
    hidden, ids, weights, gate_up, down = _layer(tokens, 8, 128, 2048, 768)
    make_order_tell(hidden, gate_up, down)
    whole = launch_fused_moe_pairs(hidden, ids, weights, gate_up, down, _live(tokens), 0, batch_invariant=True)[0]
    for share in (64, 32, 16):
        for start in range(0, 128, share):
            own, mine = slice(start, start + share), (ids // share == start // share).view(-1)
            pairs = launch_fused_moe_pairs(
                hidden, ids, weights, gate_up[own], down[own], _live(tokens), start, batch_invariant=True
            )[0]  # fmt: skip
            assert torch.equal(pairs[mine], whole[mine])

"""The Triton kernels of ``align_block_size`` and ``fused_moe``: run by ``test_moe_kernels`` (no test file itself).

The interpreter has no bf16 dot, so there the element type is fp16.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from moe_ops import fused_moe_launch
from moe_ops.align import align_block_size, launch_align
from moe_ops.fused_moe import launch_fused_moe
from moe_ops.fused_moe_config import Plan, Tiles
from moe_ops.topk_sum import topk_sum_reference
from moe_ops.topk_sum_launch import sum_pairs
from tests.moe_ops.moe_cases import FORMS, Case, build, check

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float16)
DIVISIBLE = Case(rows=37, top_k=3, hidden=128, inner=64, live=35)
ODD = Case(rows=21, top_k=3, hidden=56, inner=40, live=20)  # tails everywhere; strides still suit bulk copies
SLICE = Case(rows=640, top_k=7, experts=56, local=6, hidden=56, inner=40, live=600)  # align in two launches
UNALIGNED = Case(rows=21, top_k=3, hidden=57, inner=39, live=20)  # no bulk copies

T16 = Tiles(16, 32, 64, 4, 3)
T16S = replace(T16, swap=True)
T64 = Tiles(64, 32, 32, 4, 3)
T64S = replace(T64, swap=True)
T192 = Tiles(192, 32, 32, 4, 3)
PLANS = {
    "default": None,
    "few": Plan(T16, T16, pairs=128),
    "few-swap": Plan(T16S, replace(T16S, block_n=64), pairs=128),
    "few-chunks": Plan(T16S, T16S, pairs=16),
    "few-fewer-pairs-than-experts": Plan(T16S, T16S, pairs=2),
    "few-one-block": Plan(T64S, T64S, pairs=64),
    "few-slots": Plan(T16S, T64S, pairs=64, slots=2),
    "few-bisect": Plan(T64S, T64S, pairs=128),
    "few-pointers": Plan(T16, T16, pairs=64, tma=False),
    "many": Plan(T64, T64),
    "many-flat": Plan(replace(T64, flat=True), replace(T64, flat=True)),
    "many-special": Plan(replace(T64, block_m=128), Tiles(128, 128, 64, 4, 3, special=True)),
    "many-swap": Plan(T64S, T64S, group=1, programs=3),
    "many-128": Plan(replace(T64, block_m=128), replace(T64S, block_m=128)),
    "many-rest": Plan(replace(T64, block_m=128, flat=True), Tiles(128, 128, 64, 4, 3, special=True), rest=4),
    "many-rest-halves": Plan(replace(T64, block_m=128), replace(T64, block_m=128, flat=True), rest=2),
    "many-wide": Plan(T192, replace(T192, block_n=64, block_k=64)),
    "many-16": Plan(T16, T16S, group=2),
    "many-pointers": Plan(T64, T64, tma=False),
}


def run(*arguments, **options):
    return launch_fused_moe(*arguments, **options)


@pytest.mark.parametrize("case", [DIVISIBLE, ODD, UNALIGNED], ids=["divisible", "odd", "unaligned"])
@pytest.mark.parametrize("plan", PLANS)
def test_plans(plan, case):
    check(run, case, FORMS["swiglu"], DTYPE, DEVICE, plan=PLANS[plan])


@pytest.mark.parametrize("plan", ["few-swap", "few-pointers", "many", "many-128", "many-special", "many-wide"])
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, plan):
    check(run, ODD, FORMS[form], DTYPE, DEVICE, plan=PLANS[plan])


@pytest.mark.parametrize("plan", ["default", "few-chunks", "few-fewer-pairs-than-experts", "many-128"])
@pytest.mark.parametrize(
    "change",
    [
        {"live": 0}, {"rows": 1, "live": 1}, {"routing": "one"}, {"routing": "none"},
        {"local": 1, "experts": 1, "start": 0}, {"index_dtype": torch.int32, "weight_dtype": torch.bfloat16},
        {"top_k": 1}, {"top_k": 0}, {"rows": 0, "live": 0}, {"experts": 64, "local": 33},
    ],
    ids=str,
)  # fmt: skip
def test_edges(change, plan):
    check(run, replace(ODD, **change), {}, DTYPE, DEVICE, plan=PLANS[plan])


@pytest.mark.parametrize("plan", PLANS)
def test_equal_runs_have_equal_bits(plan):
    arguments, options = build(replace(ODD, live=None), {}, DTYPE, DEVICE)
    first = run(*arguments, plan=PLANS[plan], **options)
    again = run(*arguments, plan=PLANS[plan], **options)
    assert torch.equal(first, again) and first.data_ptr() != again.data_ptr()


def test_out_is_written_in_its_dtype_and_rows_past_the_count_are_left():
    arguments, _ = build(ODD, {}, DTYPE, DEVICE)
    out = torch.full((ODD.rows, ODD.hidden), 7.0, device=DEVICE)
    assert run(*arguments, out=out) is out
    wanted = run(*arguments, out_dtype=torch.float32)
    assert torch.equal(out[: ODD.live], wanted[: ODD.live]) and (out[ODD.live :] == 7).all()


def _slice(plan: Plan, change: dict) -> tuple[tuple, torch.Tensor, torch.Tensor]:
    """Arguments of a call of ``SLICE`` with NaN weights of remote slots, live rows by number of local slots, result."""
    case = replace(SLICE, **change)
    arguments, _ = build(case, {}, DTYPE, DEVICE)
    ids, weights = arguments[1:3]
    local = (ids >= case.start) & (ids < case.start + case.local)
    weights[~local] = float("nan")
    return arguments, local[: case.live].sum(1), run(*arguments, plan=replace(plan, lone=False))


MANY = [name for name in PLANS if name.startswith("many")]


@pytest.fixture
def poison():
    """``torch.empty`` gives NaN and the largest integers."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize(
    ("plan", "change"),
    [(name, {}) for name in MANY]
    + [("many-special", {"index_dtype": torch.int32, "start": 0}), ("many-flat", {"top_k": 16, "local": 3})],
    ids=str,
)
def test_rows_with_one_local_slot_have_the_bits_of_the_sum(plan, change):
    arguments, locals_, wanted = _slice(PLANS[plan], change)
    got = run(*arguments, plan=replace(PLANS[plan], lone=True))
    assert all((locals_ == count).sum() > 9 for count in range(3))
    assert torch.equal(got[: SLICE.live], wanted[: SLICE.live]) and torch.isfinite(wanted[: SLICE.live]).all()


@pytest.mark.parametrize("plan", ["many-flat", "many-special", "many-rest"])
def test_rows_with_one_local_slot_are_there_before_the_sum_which_leaves_them(plan, monkeypatch):
    arguments, locals_, wanted = _slice(PLANS[plan], {})
    whole_sum = fused_moe_launch.sum_pairs
    monkeypatch.setattr(fused_moe_launch, "sum_pairs", lambda *_, **__: None)
    out = torch.full((SLICE.rows, 2 * SLICE.hidden), 7.0, dtype=DTYPE, device=DEVICE)[:, : SLICE.hidden]
    run(*arguments, plan=replace(PLANS[plan], lone=True), out=out)
    lone = torch.cat([locals_ == 1, torch.zeros(SLICE.rows - SLICE.live, dtype=torch.bool, device=DEVICE)])
    assert torch.equal(out[lone], wanted[lone]) and (out[~lone] == 7).all()

    monkeypatch.setattr(fused_moe_launch, "sum_pairs", lambda pairs, *rest, **options: whole_sum(
        torch.where(lone.repeat_interleave(SLICE.top_k)[:, None], float("nan"), pairs), *rest, **options
    ))  # fmt: skip
    out.fill_(7)
    run(*arguments, plan=replace(PLANS[plan], lone=True), out=out)
    assert torch.equal(out[: SLICE.live], wanted[: SLICE.live]) and (out[SLICE.live :] == 7).all()
    span = SLICE.start, SLICE.local, {"PDL": False}
    out[: SLICE.live][locals_ == 1] = 3
    whole_sum(wanted.repeat_interleave(SLICE.top_k, 0), *arguments[1:3], arguments[5], out, *span, lone=True)
    assert (out[: SLICE.live][locals_ == 1] == 3).all() and (out[: SLICE.live][locals_ != 1] != 3).any(1).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_lone_pairs_weight_may_be_anything(value):
    arguments, locals_, _ = _slice(PLANS["many"], {})
    arguments[2].fill_(value)
    got, wanted = (run(*arguments, plan=replace(PLANS["many"], lone=lone))[: SLICE.live] for lone in (True, False))
    assert torch.equal(got.nan_to_num(3.0), wanted.nan_to_num(3.0)) and torch.equal(got.isnan(), wanted.isnan())
    assert not torch.isfinite(got[locals_ > 0]).all(1).any() and (got[locals_ == 0] == 0).all()


def test_a_new_thread():
    """Descriptors need a current CUDA context, which a thread that never called CUDA lacks."""
    arguments, _ = build(ODD, {}, DTYPE, DEVICE)
    wanted = run(*arguments)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(run, *arguments).result()
    assert torch.equal(got[: ODD.live], wanted[: ODD.live])


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("rows", "top_k", "local", "start", "experts", "hidden"),
    [(9, 8, 2, 0, 16, 300), (7, 3, 5, 2, 12, 64), (5, 20, 8, 3, 64, 96), (4, 8, 8, 0, 8, 64), (3, 1, 1, 4, 8, 2049)],
)
def test_the_sum_has_equal_bits_in_both_forms(rows, top_k, local, start, experts, hidden, index_dtype):
    """Remote slots and rows that are not live hold NaN, which nobody may read."""
    make = torch.Generator().manual_seed(top_k)
    ids = torch.randint(-1, experts, (rows, top_k), generator=make, dtype=index_dtype)
    ids[0], ids[-1] = -1, start
    remote = ((ids < start) | (ids >= start + local)).view(-1)
    remote[-top_k:] = True
    pairs, weights = torch.randn(rows * top_k, hidden, generator=make).to(DTYPE), torch.rand(rows, top_k)
    pairs[remote], weights.view(-1)[remote] = float("nan"), float("nan")
    live = torch.tensor([rows - 1], dtype=torch.int32, device=DEVICE)
    ids, weights, pairs = ids.to(DEVICE), weights.to(DEVICE), pairs.to(DEVICE)
    few, many = (torch.full((rows, hidden), 7.0, dtype=DTYPE, device=DEVICE) for _ in range(2))
    for out, is_many in ((few, False), (many, True)):
        sum_pairs(pairs, ids, weights, live, out, start, local, {"PDL": False}, many=is_many)
    assert torch.equal(few, many) and (few[-1] == 7).all() and (few[0] == 0).all()
    wanted = topk_sum_reference(pairs, ids, weights, live, start, local)
    assert torch.allclose(few[:-1].float(), wanted[:-1].float(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("block", [16, 64, 256])
@pytest.mark.parametrize(
    ("rows", "top_k", "local", "start", "live"),
    [
        (2, 2, 2, 0, 2),
        (7, 3, 5, 2, 5),
        (700, 8, 16, 16, 690),
        (5, 2, 1, 0, 0),
        (3, 2, 100, 0, 3),
        (600, 8, 3, 0, 600),
        (250, 8, 40, 3, 240),
        (300, 8, 40, 3, 280),
        (513, 8, 200, 1, 70),
        (4500, 8, 129, 0, 4490),
        (8300, 8, 16, 2, 8290),  # few experts: three chunks a program
    ],
)
def test_align(rows, top_k, local, start, live, block):
    check_align(rows, top_k, local, start, live, block)


@pytest.mark.parametrize(
    ("rows", "top_k", "local", "start", "live", "block"),
    [(60, 8, 600, 1, 58, 16), (160, 8, 1024, 0, 155, 128), (520, 8, 1000, 2, 510, 16), (300, 8, 520, 0, 300, 128)],
)
def test_align_with_many_experts(rows, top_k, local, start, live, block):
    """One launch and two, up to the largest number of experts."""
    check_align(rows, top_k, local, start, live, block)


def check_align(rows: int, top_k: int, local: int, start: int, live: int, block: int) -> None:
    """All outputs equal the reference's; some ids are far out of range."""
    make = torch.Generator().manual_seed(rows)
    ids = torch.randint(-1, start + local + 3, (rows, top_k), generator=make)
    ids[torch.rand(rows, top_k, generator=make) < 0.1] = 2**32 + start
    count = torch.tensor([live], dtype=torch.int32)
    wanted = align_block_size(ids, count, block, local, start)
    got = launch_align(ids.to(DEVICE), count.to(DEVICE), block, local, start)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, wanted, strict=True))


def test_align_literals():
    """The example in the kernel's docstring, at the smallest block size of the op."""
    ids, count = torch.tensor([[1, 0], [1, 2]], device=DEVICE), torch.tensor([2], dtype=torch.int32, device=DEVICE)
    sorted_ids, expert_ids, total = launch_align(ids, count, 16, 2, 0)
    assert sorted_ids.tolist() == [1] + [4] * 15 + [0, 2] + [4] * (sorted_ids.numel() - 18)
    assert expert_ids.tolist()[:2] == [0, 1] and set(expert_ids.tolist()[2:]) <= {-1} and total.tolist() == [32]

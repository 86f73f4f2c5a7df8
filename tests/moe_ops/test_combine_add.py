"""rsv_combine_add: the meaning in plain torch, and the kernel (rows and pairs) in the emulator."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe_ops import reference
from moe_ops.combine_add import Epilogue, Norm, Pairs, apply_epilogue, launch_combine_add
from moe_ops.emulator import Rank, run_ranks
from moe_ops.errors import ArgumentError, DtypeError, ShapeError
from moe_ops.symmetric import Layout

ops = torch.ops.moe_ep
COUNT = torch.tensor([1], dtype=torch.int32)
METADATA = torch.tensor([1, 0, 1], dtype=torch.int32)


@dataclass(frozen=True)
class Case:
    """One call on every rank; ``top_k`` 0: rows, else pairs."""

    counts: tuple[int, ...]
    top_k: int = 0
    addends: int = 1
    round_each: bool = True
    scale: float = 1.0
    hidden_size: int = 40
    dtype: torch.dtype = torch.bfloat16
    out_dtype: torch.dtype = torch.bfloat16
    rows: int = 4
    strided: bool = False
    padding: int = 0  # behind a row of weights, as in the layer batch
    norm: tuple[float, float, bool] | None = None  # eps, shift, round_first


CASES = [
    Case((2, 3)),
    Case((2, 3), addends=2, scale=2.5),
    Case((2, 3), addends=3, scale=0.3, round_each=False),
    Case((0, 4), addends=0, scale=2.5, hidden_size=7),
    Case((4, 1), top_k=3),
    Case((4, 1), top_k=3, addends=2, strided=True),
    Case((3, 2), top_k=4, padding=4),
    Case((2, 2), top_k=2, hidden_size=9, dtype=torch.float16, out_dtype=torch.float32, addends=2),
    Case((3, 0), top_k=1, dtype=torch.float32, out_dtype=torch.float32, addends=1),
    Case((3, 1), addends=2, out_dtype=torch.float16),
    Case((2, 3), norm=(1e-6, 0.0, True)),
    Case((4, 0), top_k=3, addends=2, norm=(1e-5, 0.0, False), hidden_size=264),
    Case((2, 2), top_k=2, hidden_size=9, dtype=torch.float16, out_dtype=torch.float32, norm=(0.5, 1.0, False)),
    Case((3, 1), addends=0, hidden_size=600, strided=True, norm=(1e-6, 1.0, True)),
]


def random_tensor(seed: int, rows: int, case: Case, dtype: torch.dtype, live: int | None = None) -> Tensor:
    """``(rows, H)``, NaN from row ``live`` on; transposed in memory where the case is strided."""
    values = torch.randn(rows, case.hidden_size, generator=torch.Generator().manual_seed(seed)) * 3
    if live is not None:
        values[live:] = torch.nan
    return values.to(dtype).T.contiguous().T if case.strided else values.to(dtype)


def pairs_of(case: Case, rank: int, max_tokens: int) -> Pairs:
    """Pairs of one rank; rank r has experts 2r and 2r+1; pairs of other ranks and of dead rows are NaN."""
    generator = torch.Generator().manual_seed(77)
    valid = sum(case.counts)
    ids = torch.randint(-1, 2 * len(case.counts), (max_tokens, case.top_k), generator=generator)
    ids[valid:] = -1
    weights = torch.rand(max_tokens, case.top_k + case.padding, generator=generator)[:, : case.top_k]
    local = (ids >= 2 * rank) & (ids < 2 * rank + 2)
    rows = random_tensor(rank, max_tokens * case.top_k, case, case.dtype)
    rows[~local.flatten()] = torch.nan
    return Pairs(rows, ids, weights, 2 * rank, 2)


def summed(pairs: Pairs, case: Case) -> Tensor:
    """What ``fused_moe`` would return: local slots in order, fp32, rounded once."""
    total = torch.zeros(pairs.topk_ids.shape[0], case.hidden_size)
    rows = pairs.rows.float().reshape(*pairs.topk_ids.shape, -1)
    for slot in range(case.top_k):
        ids = pairs.topk_ids[:, slot]
        local = ((ids >= pairs.expert_start) & (ids < pairs.expert_start + pairs.num_experts))[:, None]
        total += torch.where(local, pairs.topk_weights[:, slot, None] * rows[:, slot], 0.0)
    return total.to(case.dtype)


def assert_normalised(got: Tensor, want: Tensor) -> None:
    """Equal up to the order of the sum of squares: two roundings of the dtype, one before and one after the weight."""
    torch.testing.assert_close(got, want, rtol=max(2 * torch.finfo(want.dtype).eps, 1e-6), atol=0.0)


def check_case(rank: Rank, case: Case) -> None:
    """The kernel equals the oracle and ``apply_epilogue``, bit for bit, also where it asks experts' ranks only."""
    world, max_tokens = len(case.counts), len(case.counts) * case.rows + 1
    channel = rank.channel(Layout(world, case.rows + 1, case.hidden_size, max(case.top_k, 1), case.dtype))
    if case.top_k:
        all_pairs = [pairs_of(case, peer, max_tokens) for peer in range(world)]
        source, outputs = all_pairs[rank.rank], [summed(pairs, case) for pairs in all_pairs]
    else:
        outputs = [random_tensor(peer, max_tokens, case, case.dtype, sum(case.counts)) for peer in range(world)]
        source = outputs[rank.rank]
    addends = [random_tensor(50 + i, case.rows, case, case.out_dtype) for i in range(case.addends)]
    norm = None
    if case.norm:
        norm = Norm(random_tensor(60, 1, case, case.out_dtype)[0], *case.norm)
    epilogue = Epilogue(addends, case.scale, case.round_each, norm)
    rows = reference.rsv_combine(outputs, case.counts, [case.rows] * world, case.out_dtype)[rank.rank]
    count = torch.tensor([case.counts[rank.rank]], dtype=torch.int32)
    metadata = reference.metadata(case.counts)[rank.rank]
    for per_rank in (0, 2):  # ``pairs_of`` gives two experts to each rank
        got = launch_combine_add(channel, source, count, metadata, case.rows, epilogue, case.out_dtype, per_rank)
        want = apply_epilogue(rows, epilogue)
        if norm is not None:  # a sum in another order
            assert_normalised(got[1], want[1])
            got, want = got[0], want[0]
        assert torch.equal(got, want), (case, got, want)
    rank.meet()
    channel.close()


def check_roundings_of_a_norm(rank: Rank, round_first: bool) -> None:
    """Sums of squares that are exact in any order: then every rounding is that of ``apply_epilogue``, bit for bit."""
    case = Case((2, 2), hidden_size=256)
    channel = rank.channel(Layout(2, case.rows, case.hidden_size, 1, case.dtype))
    half = torch.randint(0, 4, (8, 256), generator=torch.Generator().manual_seed(1))
    half = torch.tensor([-1.0, -0.5, 0.5, 1.0])[half].bfloat16()  # both ranks add the same
    norm = Norm(random_tensor(60, 1, case, case.out_dtype)[0], 1e-6, 0.0, round_first)
    count, metadata = torch.tensor([2], dtype=torch.int32), reference.metadata(case.counts)[rank.rank]
    got = launch_combine_add(
        channel, half, count, metadata, case.rows, Epilogue([], 1.0, True, norm), case.out_dtype, 0
    )
    rows = reference.rsv_combine([half, half], case.counts, [case.rows] * 2, case.out_dtype)[rank.rank]
    want, other = (
        apply_epilogue(rows, Epilogue([], 1.0, True, norm._replace(round_first=first)))
        for first in (round_first, not round_first)
    )
    assert torch.equal(got, want) and not torch.equal(want, other)
    rank.meet()
    channel.close()


@pytest.mark.parametrize("round_first", [True, False])
def test_a_norm_rounds_where_the_model_does(round_first: bool):
    run_ranks(2, check_roundings_of_a_norm, round_first)


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_kernel_equals_the_oracle(case: Case):
    run_ranks(len(case.counts), check_case, case)


@pytest.mark.parametrize("counts", [(2,), (1, 0, 3), (3, 1, 2, 4)], ids=str)
def test_other_world_sizes(counts: tuple[int, ...]):
    run_ranks(len(counts), check_case, Case(counts, top_k=2, addends=1))


def test_literal():
    """Rank's row is 3; times 2 plus 10; the dead row is 0, so only the addend remains."""
    y = torch.tensor([[3.0, 4.0], [torch.nan, torch.nan]]).bfloat16()
    addend = torch.full((2, 2), 10.0, dtype=torch.bfloat16)
    out = ops.rsv_combine_add(y, COUNT, METADATA, 2, [addend], "local", scale=2.0)
    assert out.tolist() == [[16.0, 18.0], [10.0, 10.0]]


def test_norm_literal():
    """Row (3, 4): mean of squares 12.5, of (0, 0) only eps; the weight is 2 and 1, shifted by 1 where asked."""
    y, weight = torch.tensor([[3.0, 4.0], [torch.nan, torch.nan]]).bfloat16(), torch.tensor([2.0, 1.0]).bfloat16()
    out = ops.rsv_combine_add(y, COUNT, METADATA, 2, [], "local", norm_weight=weight, norm_eps=3.5)
    assert out.tolist() == [[[3.0, 4.0], [0.0, 0.0]], [[1.5, 1.0], [0.0, 0.0]]]
    shifted = ops.rsv_combine_add(y, COUNT, METADATA, 2, [], "local", norm_weight=weight, norm_eps=3.5, norm_shift=1.0)
    assert shifted[1].tolist() == [[2.25, 2.0], [0.0, 0.0]]


@pytest.mark.parametrize("round_first", [True, False])
def test_norm_is_what_models_write(round_first: bool):
    y, weight, metadata = torch.randn(64, 33).bfloat16(), torch.randn(33).bfloat16(), METADATA * 64
    x, normed = ops.rsv_combine_add(
        y, metadata[:1], metadata, 64, [y], "local", norm_weight=weight, norm_eps=1e-6, norm_round_first=round_first
    )
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    assert torch.equal(x, y + y)
    assert torch.equal(normed, weight * wide.to(x.dtype) if round_first else (weight * wide).to(x.dtype))


def test_rounding_each_step_is_what_the_ops_alone_do():
    generator = torch.Generator().manual_seed(0)
    y, a, b = (torch.randn(64, 33, generator=generator).bfloat16() for _ in range(3))
    count, metadata = torch.tensor([60], dtype=torch.int32), torch.tensor([60, 0, 60], dtype=torch.int32)
    alone = ops.rsv_combine(y, count, metadata, 64, "local")
    joined = ops.rsv_combine_add(y, count, metadata, 64, [a, b], "local", scale=0.3)
    assert torch.equal(joined, alone * 0.3 + a + b)
    once = ops.rsv_combine_add(y, count, metadata, 64, [a, b], "local", scale=0.3, round_each=False)
    assert torch.equal(once, (alone.float() * 0.3 + a.float() + b.float()).bfloat16())
    assert not torch.equal(once, joined)


def test_opcheck():
    y, addend = torch.randn(4, 8).bfloat16(), torch.randn(2, 8).bfloat16()
    norm = {"norm_weight": y[0], "norm_eps": 1e-6, "norm_round_first": False}
    for options in ({"scale": 2.0}, norm):
        torch.library.opcheck(ops.rsv_combine_add, (y, COUNT, METADATA, 2, [addend, addend], "local"), options)


@pytest.mark.parametrize(
    ("addends", "error", "message"),
    [
        ([torch.zeros(3, 8, dtype=torch.bfloat16)], ShapeError, r"addends\[0\] has shape \(3, 8\); pass .* = \(2, 8\)"),
        ([torch.zeros(2, 8)], DtypeError, r"addends\[0\] is torch.float32; convert it to one of bfloat16"),
        ([torch.zeros(2, 8, dtype=torch.bfloat16)] * 5, ArgumentError, "5 addends; pass at most 4"),
    ],
)
def test_mistakes_are_named(addends: list[Tensor], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        ops.rsv_combine_add(torch.zeros(4, 8).bfloat16(), COUNT, METADATA, 2, addends, "local")


@pytest.mark.parametrize(
    ("width", "weight", "error", "message"),
    [
        (8, torch.zeros(9).bfloat16(), ShapeError, r"norm_weight has shape \(9,\); pass \(H,\) = \(8,\)"),
        (8, torch.zeros(8), DtypeError, "norm_weight is torch.float32; convert it to one of bfloat16"),
        (8200, torch.zeros(8200).bfloat16(), ArgumentError, "norm_weight with H = 8200; at most 8192"),
    ],
)
def test_mistakes_of_a_norm_are_named(width: int, weight: Tensor, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        ops.rsv_combine_add(
            torch.zeros(4, width).bfloat16(), COUNT, METADATA, 2, [], "local", norm_weight=weight, norm_eps=1e-6
        )

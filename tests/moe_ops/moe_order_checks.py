"""The order in which ``fused_moe`` adds: run by ``test_moe_kernels``, interpreted or on a GPU (no test file itself).

Every element of both products is one chain over the columns, 16 at a time, whatever tile it is in.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_ops.fused_moe import launch_fused_moe, launch_fused_moe_pairs
from moe_ops.fused_moe_config import Plan, Shape, default_plan, invariant_plan
from moe_ops.random_layer import make_order_tell
from tests.moe_ops.moe_cases import Case, build, check
from tests.moe_ops.moe_kernel_checks import DEVICE, DIVISIBLE, DTYPE, ODD, ON_GPU, PLANS, UNALIGNED
from tests.moe_ops.tensor_cores import tensor_cores

__all__ = ["tensor_cores"]
pytestmark = pytest.mark.usefixtures("tensor_cores")


def _telling(case: Case) -> tuple:
    """A call whose bits depend on the order of additions."""
    arguments, _ = build(case, {}, DTYPE, DEVICE)
    make_order_tell(arguments[0], arguments[3], arguments[4])
    return arguments


def _unequal(one: Tensor, other: Tensor) -> float:
    return float((one != other).float().mean())


@pytest.mark.parametrize("case", [DIVISIBLE, ODD, UNALIGNED], ids=["divisible", "odd", "unaligned"])
@pytest.mark.parametrize("plan", PLANS)
def test_plans_add_in_one_order(plan, case):
    arguments = _telling(case)
    got = launch_fused_moe(*arguments, plan=PLANS[plan])
    wanted = launch_fused_moe(*arguments, batch_invariant=True)
    assert torch.equal(got[: case.live], wanted[: case.live])


def test_another_order_would_show():
    """The same products from the last column to the first."""
    hidden, ids, weights, gate_up, down, *rest = _telling(replace(DIVISIBLE, live=None))
    one = launch_fused_moe(hidden, ids, weights, gate_up, down, *rest)
    back = launch_fused_moe(hidden.flip(1), ids, weights, gate_up.flip(2).contiguous(), down, *rest)
    inner = gate_up.unflatten(1, (2, -1)).flip(2).flatten(1, 2)
    other = launch_fused_moe(hidden, ids, weights, inner, down.flip(2).contiguous(), *rest)
    assert torch.isfinite(one).all() and min(_unequal(one, back), _unequal(one, other)) > 0.1


# Hints of which ``default_plan`` makes four kinds of plan, for 8 experts and K 4.
HINTED = Case(rows=150, top_k=4, experts=8, local=8, start=0, hidden=40, inner=32, live=140)
KINDS = {
    "few rows": (4, 9, 16, 32),
    "weights on the left": (33, 63),
    "blocks of 64": (64, 128),
    "blocks of 128": (129, 150, 1000),
}


def _hinted_plan(hint: int) -> Plan:
    return default_plan(Shape(HINTED.local, HINTED.top_k, HINTED.hidden, HINTED.inner, min(hint, HINTED.rows)))


def _kind(plan: Plan) -> tuple[bool, bool, int]:
    return plan.pairs > 0, plan.gate_up.swap, 0 if plan.gate_up.swap else plan.gate_up.block_m


def test_the_hints_are_of_four_kinds():
    kinds = {kind for hints in KINDS.values() for kind in {_kind(_hinted_plan(hint)) for hint in hints}}
    assert len(kinds) == len(KINDS) and len({_hinted_plan(hint) for hint in KINDS["few rows"]}) > 1


def test_hints_give_equal_bits_and_may_be_too_low():
    """Of the 140 live rows most hints know nothing."""
    check(launch_fused_moe, HINTED, {}, DTYPE, DEVICE)
    check(launch_fused_moe, HINTED, {}, DTYPE, DEVICE, tokens_hint=4)
    arguments = _telling(HINTED)
    wanted = launch_fused_moe(*arguments)[: HINTED.live]
    for hint in (hint for hints in KINDS.values() for hint in hints):
        assert torch.equal(launch_fused_moe(*arguments, tokens_hint=hint)[: HINTED.live], wanted), hint


def _rows(arguments: tuple, rows: Tensor) -> tuple:
    """A call with these rows alone."""
    hidden, ids, weights, gate_up, down, live, start = arguments
    return hidden[rows], ids[rows], weights[rows], gate_up, down, torch.full_like(live, rows.numel()), start


@pytest.mark.parametrize("rows", [1, 5, 37])
def test_batch_invariant_rows_do_not_depend_on_the_batch(rows):
    arguments = _telling(replace(DIVISIBLE, live=None))
    order = torch.arange(DIVISIBLE.rows, device=DEVICE).flip(0)[:rows]
    part = launch_fused_moe(*_rows(arguments, order), batch_invariant=True)
    assert torch.equal(part, launch_fused_moe(*arguments, batch_invariant=True)[order])


MOST = 1500 if ON_GPU else 300


@pytest.mark.parametrize("rows", [1, 6, 40, 60])
def test_batch_invariance_holds_across_plans(rows):
    """Counts far apart meet other tiles and kernels, and yet equal bits."""
    case = Case(rows=MOST, top_k=4, hidden=256 if ON_GPU else 64, inner=192 if ON_GPU else 64)
    shape = Shape(case.local, case.top_k, case.hidden, case.inner, rows)
    assert invariant_plan(shape) != invariant_plan(replace(shape, tokens=MOST))
    arguments = _telling(case)
    last = torch.arange(MOST - rows, MOST, device=DEVICE)
    part = launch_fused_moe(*_rows(arguments, last), batch_invariant=True)
    assert torch.equal(part, launch_fused_moe(*arguments, batch_invariant=True)[last])


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rows", [1, 5, 10, 60, 200])  # of which the tiles of some depend on the split
def test_batch_invariant_pairs_do_not_depend_on_the_rank_split(rows, ranks):
    """A rank that has all experts makes the pairs that ranks with a part of them make, to the bit."""
    case = Case(rows=rows, top_k=3, experts=8, local=8, start=0, hidden=64, inner=48)
    hidden, ids, weights, gate_up, down, live, _ = _telling(case)
    whole = launch_fused_moe_pairs(hidden, ids, weights, gate_up, down, live, 0, batch_invariant=True)[0]
    share, seen = case.local // ranks, 0
    for start in range(0, case.local, share):
        own = slice(start, start + share)
        part = launch_fused_moe_pairs(
            hidden, ids, weights, gate_up[own], down[own], live, start, batch_invariant=True
        )[0]  # fmt: skip
        mine = ((ids >= start) & (ids < start + share)).view(-1)
        assert torch.equal(part[mine], whole[mine])
        seen += int(mine.sum())
    assert seen == int(((ids >= 0) & (ids < case.local)).sum()) > 0

"""``rsv_combine``'s kernel in the emulator, and generated sequences of all three ops."""

from __future__ import annotations

import pytest
import torch

from moe_ops import reference
from moe_ops.combine import launch_combine
from moe_ops.emulator import Rank, run_ranks
from tests.moe_ops.emulated import WORLDS, Shape, check_shapes, close_channel, generate, open_channel, run_combine

VARIANTS = pytest.mark.parametrize("multicast", [False, True], ids=["p2p", "multicast"])
ALL_OPS = ("metadata", "dispatch", "combine")


@VARIANTS
def test_example_of_the_docstring(multicast: bool):
    run_ranks(2, check_shapes, [Shape((1, 2), hidden_size=16, rows=2)], ("combine",), multicast=multicast)


@VARIANTS
@pytest.mark.parametrize("world", WORLDS)
def test_equals_the_oracle(world: int, multicast: bool):
    rows = 2
    some = tuple((3 * rank + 1) % (rows + 1) for rank in range(world))
    shapes = [
        Shape(some, rows=rows, hidden_size=37, strided=True, out_dtype=torch.float32),
        Shape((0,) * (world - 1) + (rows,), rows=rows, hidden_size=264, dtype=torch.float16, out_dtype=torch.float16),
        Shape((rows,) * world, rows=rows, hidden_size=43, dtype=torch.float32, spare=3),
        Shape(some, rows=rows, hidden_size=16, out_dtype=torch.float32),
    ]
    run_ranks(world, check_shapes, shapes, ("combine",) * 2, multicast=multicast)


def combine_values(rank: Rank, values: list[float], live: int) -> list[float]:
    """Every element of rank r's output is ``values[r]``. Returns the combined rows 0 and 1, one element of each."""
    shape = Shape((live,) * rank.world_size, rows=2, hidden_size=8, out_dtype=torch.float32, dtype=torch.float32)
    channel = open_channel(rank, shape.layout)
    output = torch.full((shape.max_tokens, 8), values[rank.rank])
    metadata = reference.metadata(shape.counts)[rank.rank]
    count = torch.tensor([live], dtype=torch.int32)
    got = launch_combine(channel, output, count, metadata, 2, torch.float32)
    close_channel(rank, channel)
    return got[:, 0].tolist()


def test_adds_in_rank_order():
    """2^24 + 1 rounds to 2^24 in fp32, so the order of the three terms shows."""
    assert run_ranks(3, combine_values, [2.0**24, 1.0, -(2.0**24)], 2) == [[0.0, 0.0]] * 3
    assert run_ranks(3, combine_values, [2.0**24, -(2.0**24), 1.0], 2) == [[1.0, 1.0]] * 3


@VARIANTS
def test_rows_past_the_live_ones_are_zero(multicast: bool):
    nan = float("nan")
    results = run_ranks(2, combine_values, [nan, nan], 1, multicast=multicast)
    assert all(row[0] != row[0] and row[1] == 0.0 for row in results)
    assert run_ranks(2, combine_values, [nan, nan], 0, multicast=multicast) == [[0.0, 0.0]] * 2


def two_calls(rank: Rank, first: Shape, second: Shape) -> None:
    channel = open_channel(rank, first.layout)
    kept = run_combine(rank, first, channel)
    copy = kept.clone()
    for _ in range(3):
        run_combine(rank, second, channel)
    assert torch.equal(kept, copy)
    close_channel(rank, channel)


@VARIANTS
def test_later_calls_leave_the_first_result_alone(multicast: bool):
    run_ranks(2, two_calls, Shape((4, 2)), Shape((3, 4), seed=1), multicast=multicast)


CASES = {1: 100, 2: 150, 3: 120, 4: 80, 5: 30, 8: 20}  # of each world, half over multicast: 500


@VARIANTS
@pytest.mark.parametrize("world", CASES)
def test_generated_cases(world: int, multicast: bool):
    """Random sizes, dtypes, strides and counts through all three ops, bit for bit."""
    shapes = [generate(world, seed) for seed in range(multicast, CASES[world], 2)]
    run_ranks(world, check_shapes, shapes, ALL_OPS, multicast=multicast, timeout_s=280)


@VARIANTS
def test_ops_in_any_order(multicast: bool):
    """The slots alternate with the call, not with the op."""
    orders = [("combine", "dispatch", "dispatch", "metadata", "combine", "combine"), ("dispatch", "combine") * 2]
    for steps in orders:
        run_ranks(3, check_shapes, [Shape((2, 0, 1), rows=2)], steps, multicast=multicast)

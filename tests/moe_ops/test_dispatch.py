"""``agv_dispatch``'s kernel in the emulator: bit for bit what the oracle gives, over peer pointers and multicast."""

from __future__ import annotations

import pytest
import torch

from moe_ops import reference
from moe_ops.dispatch import launch_dispatch
from moe_ops.emulator import Rank, run_ranks
from moe_ops.symmetric import Failure, read_record
from tests.moe_ops.emulated import (
    WORLDS,
    Shape,
    check_shapes,
    close_channel,
    local_count,
    open_channel,
    run_dispatch,
)

VARIANTS = pytest.mark.parametrize("multicast", [False, True], ids=["p2p", "multicast"])


@VARIANTS
def test_example_of_the_docstring(multicast: bool):
    run_ranks(2, check_shapes, [Shape((1, 2), hidden_size=16, rows=2)], ("dispatch",), multicast=multicast)


@VARIANTS
@pytest.mark.parametrize("world", WORLDS)
def test_equals_the_oracle(world: int, multicast: bool):
    rows = 2
    some = tuple((3 * rank + 1) % (rows + 1) for rank in range(world))
    one = (0,) * (world - 1) + (rows,)
    shapes = [
        Shape(some, rows=rows, hidden_size=37, ids=torch.int32, weights=torch.bfloat16),
        Shape(one, rows=rows, hidden_size=264, top_k=4, dtype=torch.float16, spare=3),
        Shape((rows,) * world, rows=rows, hidden_size=16, strided=True, top_k=1, weights=torch.float16),
        Shape((0,) * world, rows=rows, hidden_size=8, top_k=2, dtype=torch.float32),
    ]
    run_ranks(world, check_shapes, shapes, ("dispatch",) * 2, multicast=multicast)


@VARIANTS
def test_ranks_with_different_batch_sizes(multicast: bool):
    shape = Shape((3, 0, 1), rows=3, rows_of_rank=(3, 0, 2), capacity=3)
    run_ranks(3, check_shapes, [shape], ("dispatch", "combine", "dispatch"), multicast=multicast)


def two_calls(rank: Rank, first: Shape, second: Shape) -> None:
    channel = open_channel(rank, first.layout)
    kept = run_dispatch(rank, first, channel)
    copies = [tensor.clone() for tensor in kept]
    for _ in range(3):
        run_dispatch(rank, second, channel)
    valid = sum(first.counts)
    assert all(torch.equal(mine[:valid], copy[:valid]) for mine, copy in zip(kept, copies, strict=True))
    close_channel(rank, channel)


@VARIANTS
def test_later_calls_leave_the_first_result_alone(multicast: bool):
    run_ranks(2, two_calls, Shape((4, 2)), Shape((3, 4), seed=1), multicast=multicast)


def over_capacity(rank: Rank, shape: Shape, metadata: list[list[int]], counts: list[int], max_tokens: int) -> Failure:
    """A call with wrong counts: no byte outside the dispatch slots changes. Returns the record."""
    channel = open_channel(rank, shape.layout)
    before = channel.buffer.local[shape.layout.combine_offset :].clone()
    batch = reference.Batch(*shape.batches()[rank.rank])
    launch_dispatch(
        channel,
        *batch,
        torch.tensor([counts[rank.rank]], dtype=torch.int32),
        torch.tensor(metadata[rank.rank], dtype=torch.int32),
        max_tokens,
    )
    rank.meet()
    assert torch.equal(channel.buffer.local[shape.layout.combine_offset :], before)
    failure = read_record(channel.record)
    close_channel(rank, channel)
    assert failure is not None
    return failure


@VARIANTS
def test_one_row_too_many_is_reported_here_and_aborts_the_others(multicast: bool):
    shape = Shape((2, 2), rows=2)
    metadata = [[5, 0, 3], [5, 3, 3]]
    mine, other = run_ranks(2, over_capacity, shape, metadata, [3, 2], 8, multicast=multicast)
    assert (mine.kind, mine.op, mine.ranks, mine.rows, mine.limit) == ("capacity", "agv_dispatch", [0], 3, 2)
    assert (other.kind, other.ranks) in (("capacity", [1]), ("aborted", [0]))


def test_more_valid_rows_than_the_output_holds():
    shape = Shape((2, 2), rows=2)
    for rank, failure in enumerate(run_ranks(2, over_capacity, shape, [[4, 0, 2], [4, 2, 2]], [2, 2], 3)):
        assert (failure.kind, failure.ranks, failure.rows, failure.limit) == ("capacity", [rank], 4, 3)


def test_metadata_of_other_counts():
    shape = Shape((2, 2), rows=2)
    first, second = run_ranks(2, over_capacity, shape, [[3, 0, 2], [3, 2, 2]], [1, 2], 4)
    assert (second.kind, second.rows, second.limit) == ("capacity", 4, 3)
    assert (first.kind, first.ranks) == ("aborted", [1])


def capacity_edge(rank: Rank, shape: Shape) -> int:
    channel = open_channel(rank, shape.layout)
    run_dispatch(rank, shape, channel)
    assert read_record(channel.record) is None
    close_channel(rank, channel)
    return int(local_count(shape, rank))


def test_every_row_of_the_capacity_is_usable():
    assert run_ranks(2, capacity_edge, Shape((3, 3), rows=3, capacity=3)) == [3, 3]
    assert run_ranks(2, capacity_edge, Shape((3, 1), rows=3, capacity=9, spare=1)) == [3, 1]

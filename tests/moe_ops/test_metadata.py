"""``metadata_update``'s kernel in the emulator."""

from __future__ import annotations

import pytest
import torch

from moe_ops.emulator import Rank, run_ranks
from moe_ops.metadata import launch_metadata
from moe_ops.symmetric import Layout, read_record
from tests.moe_ops.emulated import WORLDS, Shape, check_shapes, close_channel, open_channel

LAYOUT = {"hidden_size": 8, "top_k": 1, "dtype": torch.bfloat16}


def launch_with_count(rank: Rank, counts: tuple[int, ...], capacity: int) -> tuple[list[int], object]:
    channel = open_channel(rank, Layout(rank.world_size, capacity, **LAYOUT))
    got = launch_metadata(channel, torch.tensor([counts[rank.rank]], dtype=torch.int32))
    failure = read_record(channel.record)
    close_channel(rank, channel)
    return got.tolist(), failure


def test_example_of_the_docstring():
    results = run_ranks(3, launch_with_count, (3, 0, 5), 5)
    assert [values for values, _ in results] == [[8, 0, 5], [8, 3, 5], [8, 3, 5]]


@pytest.mark.parametrize("world", [*WORLDS, 5])
def test_equals_the_oracle(world: int):
    shapes = [Shape(tuple((rank * a + b) % 5 for rank in range(world))) for a, b in ((1, 0), (3, 2), (0, 4), (0, 0))]
    run_ranks(world, check_shapes, shapes, ("metadata",) * 3)


def test_count_over_capacity_is_reported_by_every_rank():
    for _, failure in run_ranks(3, launch_with_count, (1, 7, 6), 5):
        assert (failure.kind, failure.op, failure.ranks) == ("capacity", "metadata_update", [1, 2])
        assert (failure.rows, failure.limit) == (7, 5)


def test_count_at_capacity_is_fine():
    for values, failure in run_ranks(2, launch_with_count, (5, 5), 5):
        assert failure is None and values[0] == 10

"""Which launch a communication kernel gets: the table is whole, and follows values that all ranks share."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from moe_ops.comm_launch import TABLE, WARP, choose_launch, routed_ids
from moe_ops.symmetric import MAX_BLOCKS, Channel, Layout

OPS = ("agv_dispatch", "rsv_combine", "agv_dispatch_into", "rsv_combine_from")


def channel(world: int, device: str = "cuda", multicast: bool = False) -> Channel:
    """As much of a channel as the choice looks at."""
    layout = Layout(world, 16, 7168, 8, torch.bfloat16)
    state = SimpleNamespace(device=SimpleNamespace(type=device))
    return cast(Channel, SimpleNamespace(world_size=world, layout=layout, state=state, multicast=multicast))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("world", [2, 4])
def test_table_is_whole(world: int, op: str):
    entries = json.loads(TABLE.read_text())[str(world)][op]
    limits = [entry["max_bytes"] for entry in entries]
    assert limits[-1] is None and limits[:-1] == sorted(set(limits[:-1]))
    for entry in entries:
        assert 1 <= entry["blocks"] <= MAX_BLOCKS
        assert entry["chunks"] >= WARP * entry["warps"]
        assert entry["chunks"].bit_count() == entry["warps"].bit_count() == 1


@pytest.mark.parametrize("op", OPS)
def test_other_worlds_use_the_next_smaller_one(op: str):
    for rows in (8, 256, 2048, 16384):
        assert choose_launch(op, rows, channel(3)) == choose_launch(op, rows, channel(2))
        assert choose_launch(op, rows, channel(8)) == choose_launch(op, rows, channel(4))
    assert choose_launch(op, 8, channel(2)) != choose_launch(op, 8192, channel(2))


def test_the_emulator_takes_as_few_blocks_as_show_the_order():
    assert choose_launch("rsv_combine", 8192, channel(4, "cpu")).blocks == 2


def test_rows_are_routed_where_a_rank_lacks_experts_for_one_row_in_twenty():
    assert routed_ids(channel(4), 8, 64) == 8  # (3/4)^8 = 10%
    assert routed_ids(channel(8), 6, 32) == 8  # lanes: a power of two
    assert routed_ids(channel(2), 1, 4) == 1
    assert routed_ids(channel(2), 8, 128) == 0  # 0.4%
    assert routed_ids(channel(4), 8, 0) == 0  # not promised
    assert routed_ids(channel(4, multicast=True), 8, 64) == 0  # a multicast store reaches all

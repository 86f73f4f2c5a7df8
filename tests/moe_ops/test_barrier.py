"""The exchange barrier in the emulator: bounded waits, what a failure tells whom, epochs that wrap around."""

from __future__ import annotations

import ctypes
import time
from dataclasses import dataclass

import pytest
import torch

from moe_ops import symmetric
from moe_ops.emulator import Rank, run_ranks
from moe_ops.errors import CapacityError, PeerTimeoutError
from moe_ops.metadata import launch_metadata
from moe_ops.symmetric import Channel, Failure, Layout, read_record
from tests.moe_ops.emulated import STEPS, Shape, check_shapes, close_channel, open_channel

TIMEOUT_S = 2.0  # ranks share two cores with other tests: a good round must fit
SLACK_S = 2.0
SHAPE = Shape((2, 1, 2), rows=2, hidden_size=16)
OPS = {"metadata": "metadata_update", "dispatch": "agv_dispatch", "combine": "rsv_combine"}


@dataclass
class Outcome:
    """What one rank saw: the record, and how long the op took."""

    failure: Failure | None
    seconds: float = 0.0


def timed(rank: Rank, step: str, channel: Channel) -> Outcome:
    """One op whose result may be unspecified."""
    started = time.monotonic()
    try:
        STEPS[step](rank, SHAPE, channel)
    except AssertionError:
        assert read_record(channel.record) is not None
    return Outcome(read_record(channel.record), time.monotonic() - started)


def last_rank_stays_away(rank: Rank, step: str) -> list[Outcome]:
    """One good round; then only ranks 0 and 1 call ``step``, and more ops after that; then all go on after a reset."""
    channel = open_channel(rank, SHAPE.layout, timeout_s=TIMEOUT_S)
    STEPS[step](rank, SHAPE, channel)
    rank.meet()
    outcomes = (
        [timed(rank, later, channel) for later in (step, "combine", "dispatch", "metadata")] if rank.rank < 2 else []
    )
    rank.meet()
    symmetric.reset(channel)
    rank.meet()
    assert timed(rank, step, channel).failure is None
    close_channel(rank, channel)
    return outcomes


@pytest.mark.parametrize("multicast", [False, True], ids=["p2p", "multicast"])
@pytest.mark.parametrize("step", OPS)
def test_survivors_name_the_missing_rank_and_leave_in_time(step: str, multicast: bool):
    *survivors, _ = run_ranks(3, last_rank_stays_away, step, multicast=multicast)
    for first, *later in survivors:
        assert first.failure == Failure("timeout", OPS[step], 1, [2])
        assert first.seconds < TIMEOUT_S + SLACK_S
        assert all(outcome.failure == first.failure for outcome in later)  # the first failure stays on record
        assert sum(outcome.seconds for outcome in later) < SLACK_S  # and nobody waits again


def signal_by_hand(channel: Channel, to: int, block: int, epoch: int) -> None:
    """The word that this rank's block would send, to one peer only."""
    layout, rank = channel.layout, channel.rank
    word = ((epoch & 1) * symmetric.MAX_BLOCKS + block) * layout.world_size + rank
    address = int(channel.buffer.peer_ptrs[to]) + 8 * word
    ctypes.c_uint64.from_address(address).value = (epoch + 1) << 32


def dies_between_two_signals(rank: Rank) -> Outcome:
    """Rank 2 reaches rank 0 in call 0 and then stops: rank 0 gets as far as call 1, rank 1 does not."""
    channel = open_channel(
        rank, Layout(3, 1, 8, 1, torch.bfloat16), timeout_s=2 * TIMEOUT_S if rank.rank == 0 else TIMEOUT_S
    )
    if rank.rank == 2:
        signal_by_hand(channel, to=0, block=0, epoch=0)
    rank.meet()
    started = time.monotonic()
    if rank.rank < 2:
        for _ in range(2 - rank.rank):
            launch_metadata(channel, torch.ones(1, dtype=torch.int32))
    outcome = Outcome(read_record(channel.record), time.monotonic() - started)
    rank.meet()
    close_channel(rank, channel)
    return outcome


def test_a_rank_further_ahead_names_the_dead_rank_not_the_one_that_gave_up():
    ahead, behind, _ = run_ranks(3, dies_between_two_signals)
    assert behind.failure == Failure("timeout", "metadata_update", 0, [2])
    assert ahead.failure == Failure("timeout", "metadata_update", 1, [2])
    assert ahead.seconds < 2 * TIMEOUT_S  # told, not timed out


def comes_late(rank: Rank) -> Outcome:
    """The last rank calls the op after the others have given up on it."""
    channel = open_channel(rank, SHAPE.layout, timeout_s=TIMEOUT_S)
    if rank.rank < 2:
        outcome = timed(rank, "dispatch", channel)
    rank.meet()
    if rank.rank == 2:
        outcome = timed(rank, "dispatch", channel)
    close_channel(rank, channel)
    return outcome


def test_a_late_rank_learns_that_the_others_went_on_without_it():
    *_, late = run_ranks(3, comes_late)
    assert late.failure == Failure("timeout", "agv_dispatch", 0, [2])
    assert late.seconds < TIMEOUT_S + SLACK_S


@pytest.mark.parametrize("epoch", [2**31 - 3, 2**32 - 3, 2**33 - 2])
def test_epochs_wrap_around(epoch: int):
    """Tags are 31 bits wide; a wait takes the one it expects and no other."""
    steps = ("metadata", "dispatch", "combine", "combine", "metadata", "dispatch")
    run_ranks(2, check_shapes, [Shape((2, 1), rows=2)], steps, epoch)


def two_channels(rank: Rank) -> None:
    """Two workspaces used in turn, with other sizes and different numbers of calls."""
    first, second = Shape((2, 1), rows=2), Shape((0, 3), rows=3, hidden_size=16, seed=3)
    channels = [open_channel(rank, shape.layout) for shape in (first, second)]
    for step in ("dispatch", "metadata", "combine"):
        STEPS[step](rank, first, channels[0])
        for _ in range(2):
            STEPS[step](rank, second, channels[1])
    for channel in channels:
        close_channel(rank, channel)


def test_two_workspaces_do_not_disturb_each_other():
    run_ranks(2, two_channels)


def test_a_peer_may_be_one_call_ahead():
    """Many calls back to back, without a host in between, each rank at its own pace."""
    run_ranks(3, check_shapes, [Shape((1, 0, 2), rows=2, hidden_size=8)], ("metadata", "dispatch") * 10)


def test_an_untouched_record_says_nothing():
    assert read_record(torch.zeros(symmetric.RECORD_WORDS, dtype=torch.int64)) is None


def test_failures_become_the_exceptions_of_the_contract():
    error = Failure("timeout", "agv_dispatch", 7, [1, 3]).as_error(2.5)
    assert isinstance(error, PeerTimeoutError)
    assert (error.op, error.epoch, error.missing_ranks, error.timeout_s) == ("agv_dispatch", 7, [1, 3], 2.5)
    full = Failure("capacity", "rsv_combine", 0, [1], rows=300, limit=256).as_error(1.0)
    assert isinstance(full, CapacityError) and "300" in str(full) and "256" in str(full)
    assert isinstance(Failure("aborted", "rsv_combine", 0, [1]).as_error(1.0), CapacityError)

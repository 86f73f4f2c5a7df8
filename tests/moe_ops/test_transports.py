"""Every transport that a CPU has gives the oracle's bits, and its failures have names. GPUs: ``rank_checks.py``."""

from __future__ import annotations

import weakref
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import moe_ops
from moe_ops import errors, transports
from moe_ops.emulator import Rank, run_ranks
from tests.moe_ops import rank_checks

TRANSPORTS = ("gloo", "emulator", "emulator-multicast")
EXACT = (
    "check_random_rounds",
    "check_two_calls_keep_results",
    "check_zero_copy",
    "check_routed",
    "check_plain_buffer_is_refused",
    "check_overlapping_groups",
)
FAILURES = ("check_count_over_capacity", "check_missing_rank")


def in_group(rank: Rank, name: str, transport: str) -> None:
    """One check of ``rank_checks`` in a gloo group of its own."""
    store = dist.PrefixStore(name, rank.store)
    dist.init_process_group(
        "gloo", store=store, rank=rank.rank, world_size=rank.world_size, timeout=timedelta(seconds=30)
    )
    try:
        getattr(rank_checks, name)(rank_checks.Setup(transport, rows=3, hidden_size=24, top_k=2, rounds=3))
    finally:
        for workspace in list(moe_ops.workspace._WORKSPACES.values()):
            workspace.close()
        dist.destroy_process_group()


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("check", EXACT)
@pytest.mark.parametrize("world", [2, 3])
def test_equal_to_the_oracle(world: int, check: str, transport: str) -> None:
    run_ranks(world, in_group, check, transport)


@pytest.mark.parametrize("transport", ["gloo", "emulator"])
def test_fp32_in_rank_order(transport: str) -> None:
    run_ranks(3, in_group, "check_fp32_order", transport)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("check", FAILURES)
def test_failures_have_names(check: str, transport: str) -> None:
    run_ranks(3, in_group, check, transport)


def one_rank(rank: Rank) -> None:
    """A group of one needs no workspace; with one, nothing changes."""
    dist.init_process_group("gloo", store=rank.store, rank=0, world_size=1)
    try:
        name = dist.group.WORLD.group_name
        count = torch.tensor([2], dtype=torch.int32)
        assert torch.ops.moe_ep.metadata_update(count, name).tolist() == [2, 0, 2]
        ws = moe_ops.init_workspace(None, max_tokens_per_rank=4, hidden_size=8, top_k=2)
        assert (ws.transport, ws.memory()) == ("local", [])
        assert torch.ops.moe_ep.metadata_update(count, name).tolist() == [2, 0, 2]
        ws.close()
    finally:
        dist.destroy_process_group()


def test_one_rank_needs_no_workspace() -> None:
    run_ranks(1, one_rank)


def settings(rank: Rank) -> None:
    """The same values again are no-ops, others errors; memory is known before it is allocated."""
    dist.init_process_group("gloo", store=rank.store, rank=rank.rank, world_size=rank.world_size)
    sizes = {"max_tokens_per_rank": 4, "hidden_size": 8, "top_k": 2}
    try:
        ws = moe_ops.init_workspace(None, **sizes, transport="emulator")
        assert moe_ops.init_workspace(None, **sizes, transport="emulator") is ws
        with pytest.raises(errors.WorkspaceError, match=r"hidden_size=8 \(now 16\)"):
            moe_ops.init_workspace(None, **sizes | {"hidden_size": 16}, transport="emulator")
        before = ws.memory()
        assert [info.allocated for info in before] == [False] * len(before) and sum(i.nbytes for i in before) > 0
        ws.allocate()
        later = {"layer batch", "layer output"}  # allocated by the first op that uses them
        assert ws.memory() == [info._replace(allocated=info.name not in later) for info in before]
        assert ws.layer_output(4).shape == (4, 8) and ws.empty(3, 5, torch.float32).shape == (3, 5)
        assert [info.name for info in ws.memory() if not info.allocated] == ["layer batch"]
        assert ws.memory()[-1] == moe_ops.BufferInfo("callers", 128, True)
        _misuse(ws)
        ws.close()
        ws.close()
        with pytest.raises(errors.WorkspaceError, match=r"call moe_ops\.init_workspace"):
            torch.ops.moe_ep.metadata_update(torch.ones(1, dtype=torch.int32), ws.group_name)
        mine = sizes | {"top_k": 2 + rank.rank}
        with pytest.raises(errors.WorkspaceError, match="pass the same values on every rank"):
            moe_ops.init_workspace(None, **mine)
    finally:
        dist.destroy_process_group()


def _misuse(ws: moe_ops.Workspace) -> None:
    """Calls whose sizes are not the workspace's."""
    count, metadata = torch.ones(1, dtype=torch.int32), torch.tensor([1, 0, 1], dtype=torch.int32)

    def dispatch(rows: int, hidden: int, top_k: int) -> None:
        ids = torch.zeros(rows, top_k, dtype=torch.int32)
        x = torch.zeros(rows, hidden, dtype=torch.bfloat16)
        torch.ops.moe_ep.agv_dispatch(x, ids, ids.float(), count, metadata, 32, ws.group_name)

    with pytest.raises(errors.CapacityError, match="5 rows exceed max_tokens_per_rank=4; call init_workspace"):
        dispatch(5, 8, 2)
    with pytest.raises(errors.ShapeError, match="H = 16, but the workspace was set up for H = 8"):
        dispatch(2, 16, 2)
    with pytest.raises(errors.ShapeError, match="K = 3, but the workspace was set up for K = 2"):
        dispatch(2, 8, 3)


def test_settings() -> None:
    run_ranks(2, settings)


def test_without_a_workspace() -> None:
    count = torch.ones(1, dtype=torch.int32)
    with pytest.raises(errors.WorkspaceError, match=r"no process group is named 'nope'.*init_workspace"):
        torch.ops.moe_ep.metadata_update(count, "nope")
    with pytest.raises(errors.WorkspaceError, match="init_process_group first"):
        moe_ops.init_workspace(None, max_tokens_per_rank=1, hidden_size=8, top_k=1)


def test_a_group_name_that_torch_remembers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would wait for the ranks of the group that had the name before."""

    class Group:
        group_name = "0"

    old, new = Group(), Group()
    monkeypatch.setitem(transports._rendezvous_groups, "0", weakref.ref(old))
    with pytest.raises(errors.TransportError, match=r"remembers an earlier group named '0'.*new_group"):
        transports.allocate_symmetric(new, 16, torch.device("cpu"), 1.0)  # pyright: ignore[reportArgumentType]


def test_peer_timeout_travels_between_processes() -> None:
    import pickle

    error = errors.PeerTimeoutError("rsv_combine", 7, [2, 3], 1.5)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.op, copy.epoch, copy.missing_ranks, copy.timeout_s) == ("rsv_combine", 7, [2, 3], 1.5)
    assert "rank(s) 2, 3 did not arrive at communication call 7 within 1.5 s" in str(copy)

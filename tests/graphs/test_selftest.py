"""``moe-ep selftest``: it passes here, and a wrong bit, an idle transport or a dead rank ends it with an error."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import pytest
import torch
from torch.distributed import distributed_c10d

from graphs import cli, selftest
from graphs.launch import Emit
from moe_ops import collectives, dispatch, reference, selfcheck
from moe_ops.workspace import resolve

KEYS = ["transport", "reason", "rounds", "passed", "problem", "bytes_moved"]
ROW_BYTES = {40: 80 + 32 + 32, 129: 272 + 32 + 32}  # hidden, ids and weights of a bf16 row, in chunks of 16


def run_selftest(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> tuple:
    """Exit status of the command and what it printed."""
    monkeypatch.setattr(sys, "argv", ["moe-ep", "selftest", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), capfd.readouterr().out


def expected_bytes(multicast: bool) -> int:
    """By hand: a pushed row goes to one other rank of two; by multicast to both."""
    rows = {s.hidden_size: sum(sum(selftest._counts(2, s.rows, r)) for r in range(s.rounds)) for s in SIZES}
    return sum(rows[hidden_size] * ROW_BYTES[hidden_size] for hidden_size in rows) * (2 if multicast else 1)


SIZES = selftest.SIZES["cpu"]


def test_passes_and_prints_one_json_object(monkeypatch, capfd):
    status, out = run_selftest(monkeypatch, capfd, "--json")
    report = json.loads(out)
    assert list(report) == ["ranks", "transports", "passed"]
    assert (status, report["ranks"], report["passed"]) == (0, 2, True), report
    assert all(list(verdict) == KEYS for verdict in report["transports"])
    moved = {verdict["transport"]: verdict["bytes_moved"] for verdict in report["transports"]}
    assert moved == {"gloo": None, "emulator": expected_bytes(False), "emulator-multicast": expected_bytes(True)}
    assert {verdict["rounds"] for verdict in report["transports"]} == {sum(sizes.rounds for sizes in SIZES)}


_run_rank = selftest.run_rank


def with_wrong_bit(rank: int, ranks: int, transport: str, emit: Emit) -> Any:
    """One bit of rank 1's combined rows is not the oracle's."""
    right = reference.rsv_combine

    def wrong(*arguments: Any) -> list[torch.Tensor]:
        sums = right(*arguments)
        sums[1].view(torch.int16)[0, 0] ^= 1
        return sums

    selfcheck.reference.rsv_combine = wrong
    return _run_rank(rank, ranks, transport, emit)


def with_idle_transport(rank: int, ranks: int, transport: str, emit: Emit) -> Any:
    """Right results, but by gloo: nobody writes to a peer's memory."""
    name = distributed_c10d._get_default_group().group_name
    dispatch.launch_dispatch = lambda channel, *tensors: collectives.agv_dispatch(resolve(name, "test"), *tensors)
    return _run_rank(rank, ranks, transport, emit)


def with_dead_rank(rank: int, ranks: int, transport: str, emit: Emit) -> Any:
    """Rank 1 is gone before it says anything."""
    if rank == 1:
        os._exit(3)
    return _run_rank(rank, ranks, transport, emit)


@pytest.mark.parametrize(
    ("fault", "problem"),
    [
        (with_wrong_bit, "rank 1: H = 40, live rows (4, 4): combined rows differ from the oracle at [0, 0]"),
        (with_idle_transport, "rank 0: H = 40, live rows (4, 4): peers moved 0 bytes in place of 576"),
        (with_dead_rank, "rank 1: ended with exit code 3"),
    ],
)
def test_a_fault_is_named_and_ends_with_an_error(monkeypatch, capfd, fault, problem: str):
    monkeypatch.setattr(selftest, "run_rank", fault)
    monkeypatch.setattr(selftest, "available_transports", lambda device, ranks: ["emulator"])
    status, out = run_selftest(monkeypatch, capfd)
    assert status == 1
    assert "DIFFERS" in out and problem in " ".join(out.split())

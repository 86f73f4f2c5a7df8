"""Starting ranks: results in order, and an end with the cause when one fails or dies, while the others wait for it."""

import os
import signal
import time

import pytest
import torch
import torch.distributed as dist

from graphs import launch
from graphs.errors import RankFailedError

SOON_S = 60  # starting takes seconds; the waits in these ranks would take much longer


def add_ranks(rank: int, ranks: int, job: int, emit) -> int:
    total = torch.tensor(rank + job)
    dist.all_reduce(total)
    emit((rank, "added"))
    print("a rank prints")
    return int(total) * 10 + rank


def fail_on_one(rank: int, ranks: int, how: str, emit) -> None:
    if rank == 1:
        if how == "raise":
            raise ValueError("wrong on purpose")
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def test_results_events_and_clean_stdout(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(launch, "START_METHOD", "spawn")  # as users start ranks
    events = []
    results = launch.run_ranks(add_ranks, 5, ranks=2, device="cpu", on_event=events.append)
    assert results == [110, 111]
    assert sorted(events) == [(0, "added"), (1, "added")]
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("a rank prints") == 2


@pytest.mark.parametrize(
    ("how", "message"),
    [("raise", "rank 1: ValueError: wrong on purpose"), ("kill", "rank 1: ended with exit code -9 before it was done")],
)
def test_failing_rank_ends_the_others(monkeypatch: pytest.MonkeyPatch, how: str, message: str):
    monkeypatch.setattr(launch, "GRACE_S", 1.0)  # nobody has more to say
    start = time.monotonic()
    with pytest.raises(RankFailedError, match=message):
        launch.run_ranks(fail_on_one, how, ranks=2, device="cpu", on_event=print)
    assert time.monotonic() - start < SOON_S


def test_stdout_is_kept_for_the_result(capfd: pytest.CaptureFixture[str]):
    with launch.stdout_kept_clean() as stdout:
        print("noise")
        os.system("echo noise of a child")
        os.write(stdout, b"result\n")
    print("after")
    assert capfd.readouterr().out == "result\nafter\n"


def test_recognises_torchrun(monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert not launch.under_torchrun()
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "1")
    assert launch.under_torchrun()

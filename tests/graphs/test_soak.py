"""A few seconds of ``soak.py``, and what the others see when a rank dies while requests are being served."""

import os
import signal
from collections.abc import Iterator

import pytest

import graphs
from graphs.errors import RankFailedError
from graphs.launch import run_ranks
from tests.graphs.serve_cases import served_model
from tests.graphs.soak import Soak, run_rank

PATIENCE_S = 1.0


def test_short_soak():
    job = Soak(minutes=0.15, compile=False)
    seen = run_ranks(run_rank, job, ranks=2, device="cpu", on_event=print)
    for rank in seen:
        assert rank["flat"] and not rank["wrong"], (job, rank)
    assert sum(rank["requests"] for rank in seen) > 3 and len({rank["rounds"] for rank in seen}) == 1


def serve_until_killed(rank: int, ranks: int, job: None, emit) -> None:
    model = graphs.shard_experts(served_model("mixtral"), max_tokens_per_rank=64, timeout_s=PATIENCE_S)
    loop = graphs.DecodeLoop(model, batch=2, max_len=40, compile=False, look_every=4)

    def requests() -> Iterator[graphs.Request]:
        for number in range(1000):
            if rank == 1 and number == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            yield graphs.Request([1, 2, 3 + number % 50], max_new_tokens=20)

    for answer in loop.serve(requests()):
        emit((rank, len(answer.tokens)))


def test_killed_rank_is_a_peer_timeout_on_the_others():
    events: list[tuple[int, int]] = []
    with pytest.raises(RankFailedError, match=r"rank 0: PeerTimeoutError: .*rank\(s\) 1 did not arrive") as failed:
        run_ranks(serve_until_killed, None, ranks=2, device="cpu", on_event=events.append)
    assert "rank 1: ended with exit code -9" in str(failed.value)
    assert (0, 20) in events and (1, 20) in events

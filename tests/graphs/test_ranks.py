"""Sharded models over two and three ranks: the checks of ``rank_jobs.py``, one group of processes for all of them."""

from pathlib import Path

import pytest

from graphs.launch import run_ranks
from tests.graphs.rank_jobs import CHECKS, run_checks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str | None]]:
    job = (list(CHECKS), str(tmp_path_factory.mktemp("two")))
    return run_ranks(run_checks, job, ranks=2, device="cpu", on_event=print)


@pytest.mark.parametrize("check", CHECKS)
def test_two_ranks(two_ranks: list[dict[str, str | None]], check: str):
    problems = [f"rank {rank}:\n{outcome[check]}" for rank, outcome in enumerate(two_ranks) if outcome[check]]
    assert not problems, "\n".join(problems)


def test_three_ranks_split_unevenly_and_one_is_idle(tmp_path: Path):
    outcomes = run_ranks(
        run_checks, (["uneven split", "chunked prefill"], str(tmp_path)), ranks=3, device="cpu", on_event=print
    )
    problems = [text for outcome in outcomes for text in outcome.values() if text]
    assert not problems, "\n".join(problems)

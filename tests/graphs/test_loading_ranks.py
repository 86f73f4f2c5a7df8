"""Loading on three ranks: the checks of ``loading_jobs.py``."""

from __future__ import annotations

from typing import Any

import pytest

from graphs.launch import run_ranks
from tests.graphs.loading_jobs import MIB, Growth, run_loading

pytestmark = pytest.mark.timeout(900)  # the first test waits for the ranks, which do the work of all
MEMBERS = {3: (0, 1, 2), 2: (0, 2), 1: (1,)}  # size of the group -> its ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(run_loading, str(tmp_path_factory.mktemp("big")), ranks=3, device="cpu", on_event=print)


@pytest.mark.parametrize("size", MEMBERS)
def test_a_group_may_be_smaller_than_the_world(found: list[dict[str, Any]], size: int):
    for rank in MEMBERS[size]:
        assert found[rank][f"forward, EP={size}"] is None, found[rank][f"forward, EP={size}"]


def test_a_gate_that_is_not_known_on_several_ranks(found: list[dict[str, Any]]):
    assert [ranked["own gate"] for ranked in found] == [None, None, None]


@pytest.mark.parametrize("size", MEMBERS)
def test_peak_memory(found: list[dict[str, Any]], size: int):
    """A rank never holds more than its own parameters, one layer's experts of its own twice, and 16 MiB."""
    for rank in MEMBERS[size]:
        growth = found[rank][f"memory, EP={size}"]
        assert isinstance(growth, Growth), growth
        print(f"EP={size} rank {rank}: parameters {growth.parameters / MIB:.0f} MiB, peak {growth.peak / MIB:.0f} MiB")
        assert growth.parameters < (96 / size + 4) * MIB
        assert growth.peak < growth.parameters + (2 * 96 / 4 / size + 16) * MIB

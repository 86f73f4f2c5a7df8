"""Every class of transformers' experts interface on a tiny model: the checks of ``model_jobs.py``."""

from __future__ import annotations

import pytest

from graphs.launch import run_ranks
from tests.graphs import model_table
from tests.graphs.model_jobs import CHECKS, run_models
from tests.graphs.tiny_models import experts_classes

Outcomes = list[dict[str, dict[str, str | None]]]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return run_ranks(run_models, list(experts_classes()), ranks=2, device="cpu", on_event=print)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", experts_classes())
def test_model(outcomes: Outcomes, name: str, check: str):
    found = [(rank, ranked[name][check]) for rank, ranked in enumerate(outcomes) if check in ranked[name]]
    assert len(found) == (2 if check == "two ranks" else 1)
    problems = [f"rank {rank}:\n{text}" for rank, text in found if text]
    assert not problems, "\n".join(problems)


def test_the_page_of_models_is_what_is_generated():
    """Rows do not depend on the version; the page is of the version that has the most."""
    written = model_table.PAGE.read_text()
    for line in model_table.rows():
        assert line in written, f"run python -m tests.graphs.model_table: {line}"
    if len(experts_classes()) == written.count("Experts |"):
        assert model_table.page() == written

"""Tests of this folder begin with the passes as imported; graphs that they explain go through the protocol's model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import lowering
from lowering import torch_compat
from tests.lowering.launches import Step, check_code


@pytest.fixture(autouse=True)
def as_imported() -> Iterator[None]:
    """The passes as ``import lowering`` leaves them, for each test and for another folder's after it."""
    torch_compat.install_pass(None)
    lowering.enable()
    yield
    torch_compat.install_pass(None)
    lowering.enable()


@pytest.fixture(autouse=True)
def schedules() -> Iterator[list[tuple[Step, ...]]]:
    """What the graphs communicate that the test explains, as Inductor scheduled them; each was found safe.

    ``test_models.py`` so has decode steps of real architectures checked, without another compile.
    """
    seen: list[tuple[Step, ...]] = []
    original = torch_compat.output_code

    def output_code(*args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        result, sources = original(*args, **kwargs)
        seen.extend(steps for source in sources for steps in check_code(source))
        return result, sources

    with pytest.MonkeyPatch.context() as patch:  # not the test's own, which would then outlast a file's fixtures
        patch.setattr(torch_compat, "output_code", output_code)
        yield seen

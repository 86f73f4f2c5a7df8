"""Where the checks of ``moe_property_checks`` run."""

from __future__ import annotations

import pytest

from tests.moe_ops.interpreted import run_checks


def test_properties_in_the_interpreter():
    run_checks("moe_property_checks.py", interpret=True)


@pytest.mark.gpu("1 H200: the compiled kernels, bf16")
def test_properties_on_the_gpu():
    run_checks("moe_property_checks.py", interpret=False)

"""Where the checks of ``moe_kernel_checks``, ``moe_order_checks``, ``moe_argument_checks``, ``moe_gpu_checks`` run."""

from __future__ import annotations

import pytest

from tests.moe_ops.interpreted import run_checks


def test_kernels_in_the_interpreter():
    run_checks("moe_kernel_checks.py", interpret=True)


def test_arguments_in_the_interpreter():
    run_checks("moe_argument_checks.py", interpret=True)


def test_order_in_the_interpreter():
    run_checks("moe_order_checks.py", interpret=True)


@pytest.mark.gpu("1 H200: the compiled kernels, bf16")
def test_order_on_the_gpu():
    run_checks("moe_order_checks.py", interpret=False)


@pytest.mark.gpu("1 H200: the compiled kernels, bf16")
def test_arguments_on_the_gpu():
    run_checks("moe_argument_checks.py", interpret=False)


@pytest.mark.gpu("1 H200: the compiled kernels, bf16")
def test_kernels_on_the_gpu():
    run_checks("moe_kernel_checks.py", interpret=False)


@pytest.mark.gpu("1 H200: 1000 replays, and sizes beyond 2^31 elements")
def test_large_and_often_on_the_gpu():
    run_checks("moe_gpu_checks.py", interpret=False)

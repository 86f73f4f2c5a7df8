"""Test settings: one thread a process, what runs where, and how the time that all tests take is kept short."""

import os
from pathlib import Path

import tests.startup.sitecustomize  # noqa: F401

# Inherited by every process that a test starts, and read by torch when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # else a pool of processes for each that compiles
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")  # else each compiles and runs three programs to see what works
if (startup := str(Path(__file__).parent / "startup")) not in os.environ.get("PYTHONPATH", ""):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [startup, os.environ.get("PYTHONPATH")]))

import pytest
import torch

torch.set_num_threads(1)
if os.environ.get("TRITON_INTERPRET") == "1":  # kernel checks in a process of their own: the interpreter made faster
    from moe_ops.emulator import hook

    hook.install()

# Under ``pytest -n`` a file stays on one worker; these, which take longest, are given out first.
LONGEST = (
    "test_killed_rank", "test_models", "test_zero_copy", "test_combine", "test_ptx", "test_examples", "test_two_nodes",
    "test_transports", "test_protocol", "test_cli", "test_packaging", "test_on_emulator", "test_moe_kernels",
    "test_ranks", "test_passes",
)  # fmt: skip


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    if getattr(config.option, "numprocesses", None):
        config.option.dist, config.option.loadscopereorder = "loadfile", False


@pytest.fixture(scope="session", autouse=True)
def forked_ranks() -> None:
    """Ranks start in milliseconds in place of seconds."""
    from tests import collector, forked  # noqa: F401

    forked.install()


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test's inputs do not depend on the tests that ran before it."""
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` name the machine that runs them; ``docs/gpu-runs.md`` says when they last did."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))
    if torch.cuda.is_available():
        return
    for item in items:
        if (marker := item.get_closest_marker("gpu")) is not None:
            machine = marker.args[0] if marker.args else "1 GPU"
            item.add_marker(pytest.mark.skip(reason=f"needs {machine}; last passed: docs/gpu-runs.md"))

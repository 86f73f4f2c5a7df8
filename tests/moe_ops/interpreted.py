"""Run a file of kernel checks in a process of its own: in Triton's interpreter, or as compiled on a GPU.

Triton decides at import whether it interprets, so this cannot be switched inside one process.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run_checks(file: str, *, interpret: bool, timeout_s: float = 280) -> None:
    """``pytest`` on ``tests/moe_ops/<file>``; its output becomes the message where a check fails."""
    arguments = ["-x", "-p", "no:cacheprovider", "-p", "no:xdist", str(HERE / file)]
    status, printed = (_forked if interpret else _started)(arguments, timeout_s)
    assert status == 0, printed[-8000:]
    assert " passed" in printed and "skipped" not in printed, printed[-2000:]


def _started(arguments: list[str], timeout_s: float) -> tuple[int, str]:
    """Exit status and output of pytest in a new interpreter."""
    command = [sys.executable, "-m", "pytest", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    return done.returncode, done.stdout + done.stderr


def _forked(arguments: list[str], timeout_s: float) -> tuple[int | None, str]:
    """The same in a fork of the process that interprets and has imported everything (``tests/forked.py``)."""
    with tempfile.NamedTemporaryFile("r") as output:
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=_check, args=(arguments, output.name), daemon=True)
        with mock.patch.dict(os.environ, TRITON_INTERPRET="1"):
            process.start()
        process.join(timeout_s)
        process.kill()
        process.join()
        return process.exitcode, output.read()


def _check(arguments: list[str], output: str) -> None:
    """Body of the fork."""
    os.chdir(ROOT)
    file = os.open(output, os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.exit(pytest.main(arguments))

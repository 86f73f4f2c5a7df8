"""Run a file of kernel checks in a process of its own: in Triton's interpreter, or as compiled on a GPU.

Triton decides at import whether it interprets, so this cannot be switched inside one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run_checks(file: str, *, interpret: bool, timeout_s: float = 280) -> None:
    """``pytest`` on ``tests/moe_ops/<file>``; its output becomes the message where a check fails."""
    settings = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""} if interpret else {}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(
        command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]

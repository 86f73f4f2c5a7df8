"""Ranks of tests as forks of a process that has imported everything: importing torch and transformers takes seconds.

Triton decides at import whether it interprets, so there are two such servers; the environment in which a rank is
started chooses. Ranks of users are spawned, as those of ``tests/graphs/test_launch.py`` and of every command's test.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from multiprocessing import forkserver
from threading import Lock
from unittest import mock

_starting = Lock()
STARTERS = ("graphs.launch", "moe_ops.emulator.ranks")
INTERPRETED = [
    "torch._inductor.compile_fx", "graphs.selftest", "tests.moe_ops.preload", "tests.moe_ops.rank_checks",
    "tests.moe_ops.emulated", "tests.collector",
]  # fmt: skip
COMPILED = [
    "torch._inductor.compile_fx", "graphs.cli", "accelerate", "tests.graphs.model_jobs", "tests.graphs.soak",
    "tests.collector",
]  # fmt: skip


@cache
def server(interpreted: bool) -> forkserver.ForkServer:
    """The process to fork; it takes this one's environment and output, an interpreting one without the GPUs."""
    started = forkserver.ForkServer()
    started.set_forkserver_preload(INTERPRETED if interpreted else COMPILED)
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""} if interpreted else {}):
        started.ensure_running()
    return started


def _connect(fds: list[int]) -> tuple[int, int]:
    with _starting:
        chosen = server(os.environ.get("TRITON_INTERPRET") == "1")
    return chosen.connect_to_new_process(fds)


def install() -> None:
    """From now on, this process forks its ranks; after collection, when what the tests import is there."""
    for name in STARTERS:
        if name in sys.modules:
            sys.modules[name].START_METHOD = "forkserver"
    forkserver.connect_to_new_process = _connect

"""What outlives a CUDA graph must not lie in the graph's memory pool.

While ``torch.compile(mode="reduce-overhead")`` warms a graph up, all that its thread allocates comes from the pool of
the graph, and torch raises if any of it is still there afterwards. An op that sets up its workspace at its first call
does so in just that run. The pool is bound to the thread, so a thread of its own allocates from the common memory.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")


def outside_pools(make: Callable[[], Result], device: torch.device) -> Result:
    """``make()``, whose tensors on ``device`` come from no graph's pool. Raises what ``make`` raises."""
    if device.type != "cuda":
        return make()

    def on_device() -> Result:
        with torch.cuda.device(device):
            return make()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(on_device).result()

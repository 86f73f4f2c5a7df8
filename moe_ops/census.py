"""Who is missing? Names the ranks that did not arrive when a collective on the CPU fails or times out.

A failed collective says that something broke, not who. So every rank that sees a failure signs the
group's store, waits a moment for the others to do the same, and names those that did not. Nothing
is sent while all goes well.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from .errors import PeerTimeoutError

GRACE_S = 1.0  # added to timeout_s: a rank that failed at once waits for those still inside their wait


class Census:
    """Counts this rank's collectives and turns their failures into ``PeerTimeoutError``."""

    def __init__(self, store: dist.Store, prefix: str, rank: int, world_size: int, timeout_s: float):
        self.store, self.prefix, self.rank, self.world_size = store, prefix, rank, world_size
        self.timeout_s = timeout_s
        self.epoch = 0

    @contextmanager
    def watch(self, op: str) -> Iterator[None]:
        """Run one collective; if it raises, raise ``PeerTimeoutError`` naming the ranks that are gone."""
        started = time.monotonic()
        try:
            yield
        except RuntimeError as error:
            deadline = started + self.timeout_s + GRACE_S
            missing = self._missing(deadline)
            if not missing:  # everyone is alive: the call itself was wrong
                raise
            raise PeerTimeoutError(op, self.epoch, missing, self.timeout_s) from error
        self.epoch += 1

    def _missing(self, deadline: float) -> list[int]:
        """The ranks that did not see the failure by ``deadline``."""
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        return absentees(self.store, self.prefix, self.rank, others, deadline, self.timeout_s)


def absentees(
    store: dist.Store, prefix: str, rank: int, suspects: list[int], deadline: float, timeout_s: float
) -> list[int]:
    """Sign as alive, and wait until ``deadline`` (monotonic) for the suspects to sign; returns those that did not.

    A rank that waits for a dead one is late itself, wherever it waits; its signature tells it from the dead.
    """
    lately = timeout_s + 2 * GRACE_S
    try:
        store.set_timeout(timedelta(seconds=GRACE_S))
        store.set(f"{prefix}/failed/{rank}", repr(time.time()))
        while suspects and time.monotonic() < deadline:
            time.sleep(0.02)
            suspects = [peer for peer in suspects if not _signed(store, f"{prefix}/failed/{peer}", lately)]
    except RuntimeError:  # the store died with the process that served it, by default rank 0
        return [0] if 0 in suspects else suspects
    return suspects


def _signed(store: dist.Store, key: str, lately: float) -> bool:
    """Whether ``key`` was signed in the last ``lately`` seconds; an older signature is of an earlier failure."""
    return store.check([key]) and abs(time.time() - float(store.get(key))) < lately

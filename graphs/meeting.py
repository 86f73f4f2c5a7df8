"""How the ranks of a decode loop agree, on the host, while their devices work: a few numbers through the group's store.

No device waits for a meeting, and a meeting waits for no device. A rank that does not come within ``timeout_s``
raises ``PeerTimeoutError`` on the others.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from moe_ops import get_workspace
from moe_ops.transports import exchange, group_store
from moe_ops.workspace import DEFAULT_TIMEOUT_S

from .experts import ExpertParallelState


class Meetings:
    """All meetings of one loop. ``group`` None: this rank alone. Collective: made in the same order on all ranks."""

    def __init__(self, group: dist.ProcessGroup | None, timeout_s: float):
        self.group, self.timeout_s, self.number = group, timeout_s, 0
        if group is not None:
            self._store, self._rank = group_store(group), group.rank()
            name = f"moe_ep/loop/{group.group_name}"
            self._key = f"{name}/{self._store.add(f'{name}/loops/{self._rank}', 1)}"

    def meet(self, value: Any) -> list[Any]:
        """``value`` (JSON) of every rank, in rank order."""
        if self.group is None:
            return [value]
        key, self.number = f"{self._key}/{self.number}", self.number + 1
        everyone = exchange(self._store, "decode loop", key, self._rank, self.group.size(), value, self.timeout_s)
        if self.number > 2:  # whoever is at this meeting has read the one before last
            self._store.delete_key(f"{self._key}/{self.number - 3}/{self._rank}")
        return everyone


def meetings_of(state: ExpertParallelState) -> Meetings:
    """Of a model's group, with its patience."""
    workspace = get_workspace(state.group_name)
    if workspace is None:
        return Meetings(None, DEFAULT_TIMEOUT_S)
    return Meetings(workspace.group, workspace.config.timeout_s)

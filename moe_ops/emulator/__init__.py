"""The GPU kernels on CPUs: several processes, shared memory, Triton's interpreter, and our PTX in numpy.

``run_ranks`` runs a function on several ranks (tests, selftest). ``make_buffer`` gives a process group
its shared memory; for that, TRITON_INTERPRET=1 must be in the environment before Triton is imported.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist

from moe_ops.errors import TransportError

from .ranks import Rank, RankError, RankPool, run_ranks

if TYPE_CHECKING:
    from moe_ops.symmetric import SymmetricBuffer

__all__ = ["Rank", "RankError", "RankPool", "make_buffer", "run_ranks"]


def make_buffer(group: dist.ProcessGroup, nbytes: int, timeout_s: float) -> SymmetricBuffer:
    """``nbytes`` of zeroed shared memory on every rank of a CPU ``group`` (all on one machine); collective.

    Also lets Triton's interpreter run our inline assembly in this process. Raises ``TransportError``
    where Triton compiles for a GPU in place of interpreting.
    """
    import triton

    if not triton.knobs.runtime.interpret:  # pyright: ignore[reportAttributeAccessIssue]
        raise TransportError("the emulator needs TRITON_INTERPRET=1 in the environment before Triton is imported.")
    from . import hook, memory

    hook.install()
    return memory.allocate_for_group(group, nbytes, timeout_s)

"""The GPU kernels on CPUs: several processes, shared memory, Triton's interpreter, and our PTX in numpy.

``TRITON_INTERPRET=1`` must be in the environment before Triton is imported. ``make_buffer`` gives a
process group its shared memory; ``run_ranks`` runs a function on several ranks (tests, selftest).
"""

from .machine import UnknownPtxError, execute, install
from .memory import allocate_shared, make_buffer

__all__ = ["UnknownPtxError", "allocate_shared", "execute", "install", "make_buffer"]

"""Finds copies around the ops: in what Inductor's kernels do, once it has decided what each of them does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from .schedule import Launch

_CALL = re.compile(r"(?:\w+ = )?torch\.ops\.moe_ep\.(?P<op>\w+)\.\w+\(")
_OURS = "moe_ep."
# Calls of torch's own library that compute; any other call of it counts as a copy. Other libraries' ops compute.
_COMPUTING = re.compile(
    r"(?:extern_kernels|aten)\.(?:_?(?:mm|addmm|bmm|baddbmm|addmv|mv|dot|int_mm|scaled_mm|grouped_mm|scaled_grouped_mm|"
    r"convolution|topk|sort|cumsum|cumprod|histc|bincount|multinomial|searchsorted|bucketize|index_put|scatter_reduce|"
    r"scatter_add|logcumsumexp|fft_\w+|linalg_\w+|scaled_dot_product_\w+|flash_attention\w*|efficient_attention\w*)_?)$"
)
_TORCHS_OWN = ("aten.", "prims.", "extern_kernels.")


class Copy(NamedTuple):
    """A kernel (by the ops it came from) or a call that only moves data to or from ``op``, by way of ``buffer``."""

    kernel: str
    op: str
    buffer: str


def ops_in_code(source: str) -> list[str]:
    """Names of the ops in the order in which the generated ``source`` calls them."""
    return [match["op"] for line in source.splitlines() if (match := _CALL.match(line.strip()))]


def copies_among(launches: Iterable[Launch]) -> list[Copy]:
    """Launches that move what an op wrote to another buffer, or move to a buffer that an op reads.

    A kernel is judged by its stores: one of data that nothing was computed from is a copy, whatever else it does. It is
    named once for each op beside it, so that one between two ops is not overlooked by who leaves out one of them.
    """
    launches = list(launches)
    ours = [(launch, launch.called.removeprefix(_OURS)) for launch in launches if launch.called.startswith(_OURS)]
    readers = {buffer: op for launch, op in ours for buffer in launch.reads}
    writers = {store.buffer: op for launch, op in ours for store in launch.stores}
    found = []
    for launch in launches:
        beside = [(writers[s], s) for sources, _ in _moves(launch) for s in sorted(sources) if s in writers]
        beside += [(readers[target], target) for _, target in _moves(launch) if target in readers]
        found += [Copy(launch.origins, op, buffer) for op, buffer in dict(reversed(beside)).items()]
    return found


def _moves(launch: Launch) -> list[tuple[frozenset[str], str]]:
    """From which buffers, and to which, data is moved without being changed."""
    if not launch.called:
        return [(store.moved_from, store.buffer) for store in launch.stores if store.moved_from]
    return [(launch.reads, store.buffer) for store in launch.stores] if _is_copying(launch.called) else []


def _is_copying(called: str) -> bool:
    """Whether a call may be a copy: what is not known to compute is."""
    unnamed = "." not in called  # Inductor's own calls, such as a copy into a graph's input
    return unnamed or (called.startswith(_TORCHS_OWN) and not _COMPUTING.match(called))

"""Finds copies around the ops: in the inference graph, and in the code that Inductor generated."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

_CALL = re.compile(r"(?:(?P<out>\w+) = )?torch\.ops\.moe_ep\.(?P<op>\w+)\.\w+\((?P<args>.*)\)")
_BUFFER = re.compile(r"\b(?:buf|arg|primals_)\w*")
# Kernels are named after the ops they came from; one that only moves data has only these in its name.
_MOVES = {"", "clone", "contiguous", "copy", "to", "cat", "constant", "pad", "nd"}
_VIEWS = {"t", "transpose", "permute", "view", "reshape", "slice", "select", "expand", "squeeze", "unsqueeze", "split"}
_KERNEL = re.compile(r"(?P<name>(?:triton_\w+?|cpp)_fused_(?P<ops>\w+?)_(?P<number>\d+))(?:\.run)?\((?P<args>.*)\)")
_ALIAS = re.compile(r"^(?P<out>buf\d+) = (?P<source>buf\d+)(?:\[\d+\])?(?:; del \w+.*)?(?:\s*#.*)?$")


class Copy(NamedTuple):
    """A kernel that only moves data to or from an op."""

    kernel: str
    op: str
    buffer: str


def copies_in_code(source: str) -> list[Copy]:
    """Kernels of the generated ``source`` that only copy, and whose input or output an op also touches."""
    ops, roots = _ops_by_buffer(source)
    found = []
    for name, buffers in _moving_kernels(source):
        touched = next(((b, ops[roots.get(b, b)]) for b in buffers if roots.get(b, b) in ops), None)
        if touched is not None:
            found.append(Copy(name, touched[1], touched[0]))
    return found


def ops_in_code(source: str) -> list[str]:
    """Names of the ops in the order in which the generated ``source`` calls them."""
    return [match["op"] for match in _CALL.finditer(source)]


def _ops_by_buffer(source: str) -> tuple[dict[str, str], dict[str, str]]:
    """Which op reads or writes each buffer, and the buffer that each name stands for."""
    ops: dict[str, str] = {}
    roots: dict[str, str] = {}
    for line in map(str.strip, source.splitlines()):
        if alias := _ALIAS.match(line):
            roots[alias["out"]] = roots.get(alias["source"], alias["source"])
        elif call := _CALL.match(line):
            names: list[str] = [*_BUFFER.findall(call["args"]), call["out"] or ""]
            ops.update({roots.get(name, name): str(call["op"]) for name in names if name.startswith("buf")})
    return ops, roots


def _moving_kernels(source: str) -> Iterator[tuple[str, list[str]]]:
    for line in map(str.strip, source.splitlines()):
        kernel = _KERNEL.match(line)
        if kernel is not None and _only_moves(kernel["ops"]):
            yield kernel["name"], _BUFFER.findall(kernel["args"])
        elif ".copy_(" in line or ".clone(" in line:
            yield line.split("(")[0], _BUFFER.findall(line)


def _only_moves(ops: str) -> bool:
    """``clone``, ``_to_copy_t``: every op in a kernel's name moves data or views it."""
    return set(ops.split("_")) <= _MOVES | _VIEWS

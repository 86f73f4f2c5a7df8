"""A small PTX machine: runs the text of our inline assembly on numpy arrays and raw host addresses.

It parses the text of ``moe_ops/ptx.py`` (nothing is matched by function name) and knows only the
instructions below; any other text raises, so that an emulated kernel never does something else than
its PTX says.

Element ``i`` of a tensor is thread ``i`` of the block. Words of a signal are single atomic accesses
of the C++ library behind Triton's interpreter; a multicast address stands for the same offset in every
rank's buffer (``add_multicast_range``).
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from triton._C.libtriton import interpreter as native


class UnknownPtxError(NotImplementedError):
    """Inline assembly that the emulator does not know: add the instruction to this file."""


class _Statement(NamedTuple):
    guard: str | None  # predicate register
    opcode: str
    operands: tuple[str, ...]


class _Range(NamedTuple):
    start: int
    nbytes: int
    targets: tuple[int, ...]  # address of the buffer on each rank


_multicast_ranges: list[_Range] = []


def add_multicast_range(start: int, nbytes: int, targets: list[int]) -> None:
    """Make ``[start, start + nbytes)`` a multicast address range over the buffers at ``targets`` (rank order).

    A range that overlaps it is of memory that is gone: of a buffer that nobody released, after an error.
    """
    _multicast_ranges[:] = [e for e in _multicast_ranges if e.start + e.nbytes <= start or start + nbytes <= e.start]
    _multicast_ranges.append(_Range(start, nbytes, tuple(targets)))


def remove_multicast_range(start: int) -> None:
    """Forget the range that starts at ``start``."""
    _multicast_ranges[:] = [entry for entry in _multicast_ranges if entry.start != start]


_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


@cache
def _parse(text: str) -> tuple[_Statement, ...]:
    body = text.strip()
    if body.startswith("{"):
        body = body[1 : body.rindex("}")]
    statements = []
    for line in filter(None, (part.strip() for part in body.split(";"))):
        guard = None
        if line.startswith("@"):
            guard, line = line[1:].split(None, 1)
        opcode, _, rest = line.partition(" ")
        if opcode != ".reg":
            statements.append(_Statement(guard, opcode, tuple(_OPERAND.findall(rest))))
    return tuple(statements)


def _multicast_targets(address: np.ndarray) -> list[np.ndarray]:
    """The addresses behind multicast ones, by rank; those of one access may lie in several ranges."""
    targets: list[np.ndarray] | None = None
    found = np.zeros(address.shape, dtype=bool)
    for entry in _multicast_ranges:
        here = (address >= entry.start) & (address < entry.start + entry.nbytes)
        if here.any():
            targets = targets or [np.zeros_like(address) for _ in entry.targets]
            for array, target in zip(targets, entry.targets, strict=True):
                array[here] = address[here] - entry.start + target
            found |= here
    if targets is None or not found.all():
        raise ValueError(f"multimem: {int(address[~found][0]):#x} is not a multicast address")
    return targets


def _load(address: np.ndarray, dtype: type) -> np.ndarray:
    on = np.ones(address.shape, dtype=bool)
    return native.load(address.astype(np.uint64), on, np.zeros(address.shape, dtype), np.dtype(dtype))


def _store(address: np.ndarray, value: np.ndarray) -> None:
    native.store(address.astype(np.uint64), np.ascontiguousarray(value), np.ones(address.shape, dtype=bool))


def _atomic(operation: object, address: np.ndarray, value: np.ndarray, order: object) -> np.ndarray:
    on = np.ones(address.shape, dtype=bool)
    return native.atomic_rmw(operation, address.astype(np.uint64), value, on, order)


def _words_to_float(words: np.ndarray, kind: str) -> np.ndarray:
    """int32 words as fp32 values: (n,) for f32, (n, 2) for pairs of 16-bit values."""
    if kind == "f32":
        return words.view(np.float32)
    halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, 2)
    if kind == "f16x2":
        return halves.view(np.float16).astype(np.float32)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _float_to_words(values: np.ndarray, kind: str) -> np.ndarray:
    """The inverse, rounding fp32 to nearest even."""
    if kind == "f32":
        return values.view(np.int32)
    if kind == "f16x2":
        with np.errstate(over="ignore"):  # to infinity, as the instruction does
            halves = values.astype(np.float16).view(np.uint16)
    else:
        bits = np.ascontiguousarray(values).view(np.uint32)
        rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & np.uint32(1))) >> 16
        halves = np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)
    return np.ascontiguousarray(halves).view(np.int32).reshape(-1)


class _Thread:
    """Registers of all elements of one inline assembly call, and the instructions on them."""

    def __init__(self, operands: list[np.ndarray], count: int):
        self.count = count
        self.registers: dict[str, np.ndarray] = {f"${i}": value for i, value in enumerate(operands)}

    def read(self, name: str) -> np.ndarray:
        if name in self.registers:
            return self.registers[name]
        if name.lstrip("-").isdigit():
            return np.full(self.count, int(name), dtype=np.int64)
        specials: dict[str, Callable[[], np.ndarray]] = {
            "%tid.x": lambda: np.arange(self.count, dtype=np.int64),
            "%laneid": lambda: np.arange(self.count, dtype=np.int64) % 32,
            "%globaltimer": lambda: np.full(self.count, time.monotonic_ns(), dtype=np.int64),
        }
        if name not in specials:
            raise UnknownPtxError(f"emulator: unknown PTX operand {name!r}; add it to {__name__}.")
        return specials[name]()

    def write(self, name: str, value: np.ndarray, on: np.ndarray) -> None:
        """Set register ``name`` where ``on``; ``value`` holds only those elements."""
        if on.all():
            self.registers[name] = value
        elif on.any():
            fresh = self.registers[name].copy()
            fresh[on] = value
            self.registers[name] = fresh

    def address(self, operand: str, on: np.ndarray) -> np.ndarray:
        base, _, offset = operand.strip("[]").partition("+")
        return self.read(base)[on] + int(offset or 0)

    def step(self, statement: _Statement) -> None:
        on = np.ones(self.count, dtype=bool) if statement.guard is None else self.registers[statement.guard]
        if statement.opcode not in _INSTRUCTIONS:
            raise UnknownPtxError(f"emulator: unknown PTX instruction {statement.opcode!r}; add it to {__name__}.")
        if on.any():
            _INSTRUCTIONS[statement.opcode](self, statement.operands, on)


_INTEGER = {"mov.b32": np.int32, "mov.u32": np.int32, "mov.b64": np.int64, "mov.u64": np.int64}


def _mov(dtype: type) -> Callable[[_Thread, tuple[str, ...], np.ndarray], None]:
    def run(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
        thread.write(operands[0], thread.read(operands[1])[on].astype(dtype), on)

    return run


def _setp(compare: Callable, combine: bool = False) -> Callable[[_Thread, tuple[str, ...], np.ndarray], None]:
    def run(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
        result = compare(thread.read(operands[1]), thread.read(operands[2]))
        thread.registers[operands[0]] = result & thread.read(operands[3]) if combine else result

    return run


def _vector(operand: str) -> list[str]:
    return [name.strip() for name in operand.strip("{}").split(",")]


def _block_or(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
    """An emulated block is one thread of execution, so its vote is its own."""
    thread.registers[operands[0]] = thread.read(operands[2])


def _select(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
    chosen = np.where(thread.read(operands[3]), thread.read(operands[1]), thread.read(operands[2]))
    thread.write(operands[0], chosen.astype(np.int32)[on], on)


def _load_vector(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
    address = thread.address(operands[1], on)
    for i, name in enumerate(_vector(operands[0])):
        thread.write(name, _load(address + 4 * i, np.int32), on)


def _store_vector(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
    address = thread.address(operands[0], on)
    for i, name in enumerate(_vector(operands[1])):
        _store(address + 4 * i, thread.read(name)[on].astype(np.int32))


def _store_multicast(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
    for address in _multicast_targets(thread.address(operands[0], on)):
        for i, name in enumerate(_vector(operands[1])):
            _store(address + 4 * i, thread.read(name)[on].astype(np.int32))


def _reduce_multicast(kind: str) -> Callable[[_Thread, tuple[str, ...], np.ndarray], None]:
    """Sums in rank order, in fp32, rounded once. (A switch may take another order.)"""

    def run(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
        addresses = _multicast_targets(thread.address(operands[1], on))
        for i, name in enumerate(_vector(operands[0])):
            total = _words_to_float(_load(addresses[0] + 4 * i, np.int32), kind)
            for address in addresses[1:]:
                total = total + _words_to_float(_load(address + 4 * i, np.int32), kind)
            thread.write(name, _float_to_words(total, kind), on)

    return run


def _signal(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
    address, word = thread.address(operands[0], on), thread.read(operands[1])[on].astype(np.int64)
    _atomic(native.RMW_OP.XCHG, address, word, native.MEM_SEMANTIC.RELEASE)


_last_poll = (0, b"")
_SHORT_S, _LONG_S = 0.001, 0.05
_pause = _SHORT_S


def _poll(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
    """Sleeps when nothing has changed since the last poll, the longer the longer: ranks share cores."""
    global _last_poll, _pause
    address = thread.address(operands[1], on)
    nothing = np.zeros(address.shape, dtype=np.int64)
    words = _atomic(native.RMW_OP.OR, address, nothing, native.MEM_SEMANTIC.ACQUIRE)
    thread.write(operands[0], words, on)
    seen = (int(address[0]), words.tobytes())
    if seen == _last_poll:
        time.sleep(_pause)
        _pause = min(2 * _pause, _LONG_S)
    else:
        _pause = _SHORT_S
    _last_poll = seen


def _store_word(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
    _store(thread.address(operands[0], on), thread.read(operands[1])[on].astype(np.int64))


def _compare_and_swap(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
    address = thread.address(operands[1], on).astype(np.uint64)
    expected, value = (thread.read(name)[on].astype(np.int64) for name in operands[2:4])
    old = native.atomic_cas(address, expected, value, native.MEM_SEMANTIC.RELAXED)
    thread.write(operands[0], old, on)


def _round_pair(kind: str) -> Callable[[_Thread, tuple[str, ...], np.ndarray], None]:
    def run(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
        high, low = (thread.read(name)[on] for name in operands[1:3])
        thread.write(operands[0], _float_to_words(np.stack([low, high], axis=1), kind), on)

    return run


def _nothing(thread: _Thread, operands: tuple[str, ...], on: np.ndarray) -> None:
    """A prefetch, or a fence: the emulated accesses are in program order already (x86), or atomic."""


_INSTRUCTIONS: dict[str, Callable[[_Thread, tuple[str, ...], np.ndarray], None]] = {
    **{opcode: _mov(dtype) for opcode, dtype in _INTEGER.items()},
    "setp.ne.b32": _setp(np.not_equal),
    "setp.eq.u32": _setp(np.equal),
    "setp.eq.b64": _setp(np.equal),
    "setp.lt.u32": _setp(np.less),
    "setp.ne.and.b32": _setp(np.not_equal, combine=True),
    "ld.global.v4.b32": _load_vector,
    "st.global.v4.b32": _store_vector,
    "st.global.b64": _store_word,
    "barrier.cta.red.or.pred": _block_or,
    "selp.b32": _select,
    "st.release.sys.global.b64": _signal,
    "st.relaxed.sys.global.b64": _signal,
    "ld.acquire.sys.global.b64": _poll,
    "ld.relaxed.sys.global.b64": _poll,
    "atom.relaxed.gpu.global.cas.b64": _compare_and_swap,
    "multimem.st.relaxed.sys.global.v4.f32": _store_multicast,
    "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2": _reduce_multicast("bf16x2"),
    "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2": _reduce_multicast("f16x2"),
    "multimem.ld_reduce.relaxed.sys.global.add.v4.f32": _reduce_multicast("f32"),
    "cvt.rn.bf16x2.f32": _round_pair("bf16x2"),
    "cvt.rn.f16x2.f32": _round_pair("f16x2"),
    "cp.async.bulk.prefetch.L2.global": _nothing,
    "fence.proxy.alias": _nothing,
    "fence.acq_rel.cta": _nothing,
}


def execute(text: str, inputs: list[np.ndarray], outputs: list[np.dtype]) -> list[np.ndarray]:
    """Run PTX ``text``: operands ``$0...`` are ``outputs`` (dtypes), then ``inputs`` (1-D arrays of one length)."""
    count = inputs[0].size if inputs else 1
    undefined = [np.full(count, -1).astype(dtype) for dtype in outputs]
    thread = _Thread([*undefined, *(value.reshape(-1) for value in inputs)], count)
    for statement in _parse(text):
        thread.step(statement)
    return [thread.registers[f"${i}"] for i in range(len(outputs))]

"""The emulator itself: ranks that fail, memory that goes away, and the Triton it needs."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_ops.emulator import Rank, RankError, RankPool, make_buffer, run_ranks
from moe_ops.errors import TransportError
from moe_ops.symmetric import Layout

LAYOUT = Layout(2, 4, 16, 2, torch.bfloat16)


def fail_on(rank: Rank, bad: int) -> int:
    if rank.rank == bad:
        raise ValueError("a mistake of mine")
    return rank.rank


def test_results_come_in_rank_order():
    assert run_ranks(3, fail_on, -1) == [0, 1, 2]


def test_an_error_names_its_rank_and_the_pool_goes_on():
    with pytest.raises(RankError, match="rank 1: ValueError: a mistake of mine"):
        run_ranks(2, fail_on, 1)
    assert run_ranks(2, fail_on, -1) == [0, 1]


def hang_or_exit(rank: Rank, how: str) -> None:
    if rank.rank == 0:
        if how == "exit":
            os._exit(3)
        time.sleep(60)


@pytest.mark.parametrize(("how", "message"), [("hang", "no answer in time"), ("exit", "its process ended")])
def test_a_rank_that_does_not_return(how: str, message: str):
    pool = RankPool()
    try:
        pool.run(1, fail_on, (-1,))  # starting the process does not count
        started = time.monotonic()
        with pytest.raises(RankError, match=message):
            pool.run(1, hang_or_exit, (how,), timeout_s=1.0)
        assert time.monotonic() - started < 10
        assert pool.run(1, fail_on, (-1,)) == [0]
    finally:
        pool.close()


def share_memory(rank: Rank) -> list[int]:
    """Every rank writes its byte into the peer's memory through the peer's address. Returns files left behind."""
    import ctypes

    def files() -> set[Path]:
        return set(Path("/dev/shm").glob(f"moe_ep_{os.getpid()}_*"))

    before = files()  # of a process that was killed and had this one's number
    channel = rank.channel(LAYOUT)
    peer = 1 - rank.rank
    ctypes.memset(int(channel.buffer.peer_ptrs[peer]) + 7, rank.rank + 1, 1)
    rank.meet()
    seen = int(channel.buffer.local[7])
    left = files() - before
    channel.close()
    return [seen, len(left)]


def test_memory_is_shared_and_leaves_no_file():
    assert run_ranks(2, share_memory) == [[2, 0], [1, 0]]


def multicast_is_no_memory(rank: Rank) -> bool:
    """Whether the page at the multicast address is inaccessible, as /proc tells it."""
    channel = rank.channel(LAYOUT)
    address = channel.buffer.multicast_ptr
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line.split()[1].startswith("---")
    return False


def test_addresses_of_a_buffer_that_nobody_released_are_the_next_ones():
    from moe_ops.emulator import machine

    machine.add_multicast_range(4096, 64, [1 << 20, 2 << 20])
    machine.add_multicast_range(4128, 64, [3 << 20, 4 << 20, 5 << 20])
    try:
        targets = machine._multicast_targets(np.array([4128, 4190]))
        assert [target.tolist() for target in targets] == [[n << 20, (n << 20) + 62] for n in (3, 4, 5)]
    finally:
        machine.remove_multicast_range(4128)
    assert machine._multicast_ranges == []


def test_a_plain_access_to_a_multicast_address_faults():
    assert run_ranks(2, multicast_is_no_memory) == [True, True]


def test_without_the_interpreter_the_error_says_what_to_do():
    with pytest.raises(TransportError, match="TRITON_INTERPRET=1"):
        make_buffer(None, 16, 1.0)  # pyright: ignore[reportArgumentType]


def overflow(rank: Rank) -> list[str]:
    """What the interpreter makes of a sum, a difference and a product that fit int32, and of three that do not."""
    from moe_ops.emulator.hook import install
    from tests.moe_ops import overflow_kernels as kernels

    install()
    out, said = torch.zeros(1, dtype=torch.int32), []
    for kernel, fits, x, y in (
        (kernels.add_kernel, 2**31 - 2, 2**31 - 1, 1), (kernels.sub_kernel, -(2**31) + 1, -(2**31), 1),
        (kernels.mul_kernel, 2**15, 2**16, 2**15),
    ):  # fmt: skip
        kernel[(1,)](out, fits, y)
        said.append(str(int(out)))
        try:
            kernel[(1,)](out, x, y)
        except Exception as error:
            said.append(str(error.__cause__ or error))
    return said


def test_an_integer_that_overflows_is_an_error():
    sums = [2**31 - 1, "add", -(2**31), "sub", 2**30, "mul"]
    expected = [f"int32 overflow detected for operation {s}" if isinstance(s, str) else str(s) for s in sums]
    assert run_ranks(1, overflow) == [expected]


def types_and_values(rank: Rank) -> list[str]:
    """Where a block's type or a value's shape, made once, is not what Triton makes each time; no line when all are."""
    import triton.language as tl

    from moe_ops.emulator import hook

    hook.install()
    word = tl.int64
    pointers = (tl.pointer_type(word), tl.pointer_type(word, "shared"), tl.pointer_type(word, const=True))
    wrong = []
    for kind in (tl.float16, *pointers):
        for shape in ([4], [2, 8], [tl.constexpr(8), 2], tl.tuple([8, 2])):
            for _ in range(2):
                made, plain = tl.block_type(kind, shape), tl.block_type.__new__(tl.block_type)
                hook._slow_block_type(plain, kind, shape)
                value = tl.tensor("handle", made)
                same = made == plain and (made.name, made.numel) == (plain.name, plain.numel)
                sizes = [size.value for size in value.shape], value.numel.value, value.dtype == kind
                if not same or sizes != ([*plain.shape], plain.numel, True):
                    wrong.append(f"{made}, {sizes}, not {plain}")
    for shape, error in (([3], ValueError), ([2, 8.0], TypeError), ([], TypeError), ([2**30], ValueError)):
        for _ in range(2):
            try:
                wrong.append(str(tl.block_type(tl.float16, shape)))
            except error:
                continue
    return wrong


def test_types_made_once_are_those_that_triton_makes_each_time():
    assert run_ranks(1, types_and_values) == [[]]


def operands_and_casts(rank: Rank) -> list[str]:
    """Where operands or casts, found the short way, are not what Triton makes of them; no line when all are."""
    import itertools

    import triton.language as tl
    from triton.runtime.interpreter import TensorHandle, interpreter_semantic

    from moe_ops.emulator import hook

    hook.install()

    def value(kind: tl.dtype, *shape: int) -> tl.tensor:
        data = np.full(shape or (1,), 3, dtype=hook._slow_np_dtype(kind))
        return tl.tensor(TensorHandle(data, kind), tl.block_type(kind, [*shape]) if shape else kind)

    def outcome(function: Callable, *args: object) -> list[object]:
        try:
            values = function(interpreter_semantic, *args)
        except Exception as error:
            return [type(error).__name__]
        values = values if isinstance(values, tuple) else (values,)
        return [(v.type.name, v.dtype.name, v.handle.data.dtype, v.handle.data.tolist()) for v in values]

    def compare(fast: Callable, slow: Callable, *args: object) -> None:
        for _ in range(2):  # the second time from what the first has kept
            got, wanted = outcome(fast, *args), outcome(slow, *args)
            counts[fast.__name__] += "Error" not in str(wanted)
            if got != wanted:
                wrong.append(f"{fast.__name__}{args}: {got}, not {wanted}")

    wrong: list[str] = []
    counts: Counter[str] = Counter()
    pointers = [tl.pointer_type(tl.int32), tl.pointer_type(tl.int32, const=True)]
    kinds = [tl.int1, tl.int32, tl.int64, tl.uint32, tl.float16, tl.bfloat16, tl.float32, *pointers]
    values = [value(kind, *shape) for kind in kinds for shape in ((), (4,), (2, 1), (2, 4))]
    numbers = [0, 1, -1, 2**31, 2**40, True, 2.5, -0.0]
    flags = itertools.cycle(itertools.product([True, False], repeat=4))
    for lhs, rhs in [*itertools.product(values, [*values, *numbers]), *itertools.product(numbers, values)]:
        compare(hook._operands, hook._slow_operands, lhs, rhs, *next(flags))
    for lhs, rhs in itertools.product(values, values):
        compare(hook._broadcast, hook._slow_broadcast, lhs, rhs)
        compare(hook._cast, hook._slow_cast, lhs, rhs.dtype)
    return wrong or [f"{name}: {min(count, 500)} agree" for name, count in sorted(counts.items())]


def test_operands_found_the_short_way_are_those_that_triton_finds():
    agreed = [f"{name}: 500 agree" for name in ("_broadcast", "_cast", "_operands")]
    assert run_ranks(1, operands_and_casts) == [agreed]

"""The inline assembly: what it means (on the emulator's PTX machine) and what it compiles to (for GPUs not here)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from moe_ops import ptx
from moe_ops.combine_add import whole_rows
from moe_ops.emulator import machine
from tests.moe_ops.compiled import (
    EXPECTED_VARIANTS,
    FORMS,
    Variant,
    asm_layouts,
    compile_kernel,
    disassemble,
    expected_file,
    ptx_forms,
)

ARCHS = (90, 100)
INT32 = np.dtype(np.int32)
DATA = [
    Variant(kernel, multicast, aligned, arch)
    for kernel in ("dispatch", "combine")
    for multicast in (False, True)
    for aligned in (True, False)
    for arch in ARCHS
]
BUFFERS = [
    Variant(kernel, multicast, aligned, arch, alone=alone)
    for kernel in ("dispatch_into", "combine_from")
    for multicast in (False, True)
    for aligned, alone in ((True, False), (True, True), (False, True))
    for arch in ARCHS
]
# The combine of a layer, W = 2 to 8, and with a norm: whole rows of H = 2048, 4096 and 7168 (``whole_rows``).
JOINED = [Variant("combine_add", world=world, warps=4) for world in (2, 8)]
JOINED += [
    Variant("combine_add", multicast, True, arch, world, warps=warps, chunks=octets, norm=1)
    for octets, warps in map(whole_rows, (2048, 4096, 7168))
    for world, multicast in ((2, False), (4, True), (8, False))
    for arch in ARCHS
]
JOINED += [Variant("combine_add", aligned=False, warps=4, norm=2), Variant("combine_add", routed=True, norm=2)]
JOINED += [Variant("combine_add", norm=kind, behind=True) for kind in (0, 1)]
BUFFERS += [Variant(kernel, routed=True, arch=arch) for kernel in ("dispatch_into", "combine_from") for arch in ARCHS]
NO_SPILLS = [Variant("metadata", arch=arch) for arch in ARCHS] + DATA + BUFFERS + JOINED


def name_of(variant: Variant) -> str:
    joined = ""
    if variant.kernel == "combine_add":
        joined = f"-w{variant.world}-{variant.chunks}-norm{variant.norm}" + "-behind" * variant.behind
    return f"{expected_file(variant).stem}-{'aligned' if variant.aligned else 'ragged'}{joined}-sm{variant.arch}"


def addresses(array: np.ndarray, stride: int = 16) -> np.ndarray:
    return array.ctypes.data + stride * np.arange(array.nbytes // stride, dtype=np.int64)


def run(asm: object, *inputs: np.ndarray, outputs: int = 1) -> list[np.ndarray]:
    return machine.execute(getattr(asm, "value", asm), list(inputs), [INT32] * outputs)


def test_masked_load_gives_zeros_and_touches_nothing():
    memory = np.arange(8, dtype=np.int32)
    where = addresses(memory)
    where[1] = 8  # a fault, if it were read
    got = run(ptx._LOAD_CHUNK, where, np.array([1, 0], dtype=np.int32), outputs=4)
    assert [word.tolist() for word in got] == [[0, 0], [1, 0], [2, 0], [3, 0]]


def test_loads_of_several_peers_come_in_order():
    first, second = np.arange(4, dtype=np.int32), np.arange(4, 8, dtype=np.int32)
    on = np.array([1], dtype=np.int32)
    got = run(ptx._load_all_text(2), addresses(first), addresses(second), on, on, outputs=8)
    assert [int(word[0]) for word in got] == list(range(8))


@pytest.fixture
def multicast_of_two():
    """Two ranks' memory, and the multicast address of both."""
    ranks, start = [np.zeros(8, dtype=np.int32) for _ in range(2)], 1 << 60
    machine.add_multicast_range(start, 32, [rank.ctypes.data for rank in ranks])
    yield ranks, start
    machine.remove_multicast_range(start)


def test_multicast_store_reaches_every_rank(multicast_of_two):
    ranks, start = multicast_of_two
    words = [np.array([value, 10 + value], dtype=np.int32) for value in range(4)]
    where = start + np.array([0, 16], dtype=np.int64)
    run(ptx._MULTICAST_CHUNK, where, *words, np.array([0, 1], dtype=np.int32))
    for rank in ranks:
        assert rank.tolist() == [0, 0, 0, 0, 10, 11, 12, 13]


def test_multicast_reduce_adds_in_fp32_and_rounds_once(multicast_of_two):
    ranks, start = multicast_of_two
    third = ranks[0].copy()
    machine.remove_multicast_range(start)
    machine.add_multicast_range(start, 32, [array.ctypes.data for array in (*ranks, third)])
    for array, value in zip((*ranks, third), (256.0, 1.0, 1.0), strict=True):
        array.view(np.uint16)[:] = torch.full((16,), value).bfloat16().view(torch.uint16).numpy()
    got = run(ptx._REDUCE_BF16, np.array([start]), np.array([1], dtype=np.int32), outputs=4)
    # bf16 alone gives 256 + 1 = 256, twice
    assert torch.from_numpy(got[0]).view(torch.bfloat16).tolist() == [258.0, 258.0]


def test_multicast_address_outside_its_range_raises(multicast_of_two):
    _, start = multicast_of_two
    with pytest.raises(ValueError, match="not a multicast address"):
        run(ptx._REDUCE_FP32, np.array([start + 32]), np.array([1], dtype=np.int32), outputs=4)


@pytest.mark.parametrize(("kind", "dtype"), [("bf16x2", torch.bfloat16), ("f16x2", torch.float16)])
def test_rounding_equals_torch(kind: str, dtype: torch.dtype):
    special = [0.0, -0.0, 1.00390625, 1.01171875, 3.3895e38, 1e-40, float("inf"), -float("inf"), 65519.0, 65520.0]
    values = torch.cat([torch.tensor(special), torch.randn(1000) * 10, torch.randn(1000) * 1e-6])
    low, high = values, values.flip(0)
    (words,) = run(f"cvt.rn.{kind}.f32 $0, $2, $1;", low.numpy(), high.contiguous().numpy())
    pairs = torch.from_numpy(words).view(dtype).view(-1, 2)
    assert torch.equal(pairs[:, 0], low.to(dtype)) and torch.equal(pairs[:, 1], high.to(dtype))


@pytest.mark.parametrize("text", ["ld.global.v8.b32 $0, [$1];", "mov.u32 $0, %clock;"])
def test_unknown_assembly_is_refused(text: str):
    with pytest.raises(machine.UnknownPtxError):
        run(text, np.zeros(1, dtype=np.int64))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("variant", EXPECTED_VARIANTS, ids=lambda v: expected_file(v).stem)
def test_instruction_forms_are_the_expected_ones(variant: Variant, arch: int):
    """16-byte accesses on the aligned path, fp32 accumulation, .sys acquire and release, no trap, one block barrier.

    After a wanted change: ``python -m tests.moe_ops.compiled``.
    """
    assert ptx_forms(variant._replace(arch=arch)) == expected_file(variant).read_text()


def count(variant: Variant, form: str) -> int:
    """How often the expected file has the form."""
    assert form in FORMS
    lines = expected_file(variant).read_text().splitlines()
    return next((int(line.split()[0]) for line in lines if line.split()[1] == form), 0)


def test_expected_files_have_the_wide_accesses_of_the_contract():
    store, reduce, plain = FORMS[0], FORMS[1], "st.global.v4.b32"
    for aligned in (True, False):
        push, pull = Variant("dispatch", True, aligned), Variant("combine", True, aligned)
        assert count(push, store) == 2 and count(push, reduce) == 0  # hidden, routing: one store for all ranks
        assert count(pull, reduce) == 1 and count(pull, store) == 0
        for kernel in ("dispatch", "combine"):
            assert count(Variant(kernel, False, aligned), store) == count(Variant(kernel, False, aligned), reduce) == 0
    for alone in (True, False):
        push, pull = Variant("dispatch_into", True, alone=alone), Variant("combine_from", True, alone=alone)
        assert count(push, store) == 1 and count(push, plain) == 0  # straight to its place on all ranks
        assert count(pull, reduce) == 1 and count(pull, "ld.global.v4.b32") == 0
        push, pull = Variant("dispatch_into", alone=alone), Variant("combine_from", alone=alone)
        assert count(push, plain) == push.world and count(push, "ld.global.v4.b32") == 1
        assert count(pull, "ld.global.v4.b32") == pull.world and count(pull, plain) == 1


def test_expected_files_have_release_and_acquire_where_the_contract_says():
    """By kernel: meetings, those whose signal releases, those whose poll acquires."""
    meetings = {"metadata": (1, 0, 0), "dispatch": (1, 1, 1), "combine": (1, 1, 1)}
    meetings |= {("dispatch_into", False): (1, 1, 0), ("dispatch_into", True): (2, 1, 1)}
    meetings |= {("combine_from", False): (1, 0, 1), ("combine_from", True): (2, 1, 1)}
    for variant in EXPECTED_VARIANTS:
        key = variant.kernel if variant.kernel in meetings else (variant.kernel, variant.alone)
        total, released, acquired = meetings[key]
        # a meeting's abort is sent for both parities and recorded; a capacity is recorded once
        assert count(variant, "st.release.sys.global.b64") == released + 3 * total + 1, variant
        assert count(variant, "st.relaxed.sys.global.b64") == total - released
        # one poll before the loop and one in it
        assert count(variant, "ld.acquire.sys.global.b64") == 2 * acquired
        assert count(variant, "ld.relaxed.sys.global.b64") == 2 * (total - acquired)
        # the block meets to agree on poison (a single warp need not), before a release, and to advance
        assert count(variant, "bar.sync") == (variant.kernel != "metadata") + released
        assert count(variant, "barrier.cta.red.or.pred") == total - 1
        assert count(variant, "trap") == 0


@pytest.mark.parametrize("variant", [Variant("metadata", arch=arch) for arch in ARCHS] + DATA + BUFFERS, ids=name_of)
def test_signal_is_issued_once_for_each_peer(variant: Variant):
    """One element a lane, repeated by every warp, and a guard that lets only the first warp store."""
    signals = asm_layouts(variant, "%tid.x")
    meetings = 2 if variant.alone else 1
    assert len(signals) == meetings
    assert all(signal[:3] == (32, 1, 32) for signal in signals)
    assert compile_kernel(variant)["ptx"].count("setp.lt.u32 p, t, 32;") == meetings


@pytest.mark.parametrize("variant", DATA + BUFFERS, ids=name_of)
def test_chunks_are_stored_once(variant: Variant):
    """No element of a store lies on two threads."""
    stores = asm_layouts(variant, "multimem.st" if variant.multicast else "st.global.v4")
    if "dispatch" in variant.kernel or (not variant.multicast and variant.aligned):
        assert stores
    for layout in stores:
        assert layout.per_thread * layout.threads * layout.warps <= layout.elements


@pytest.mark.parametrize("variant", NO_SPILLS, ids=name_of)
def test_no_spills(variant: Variant):
    cubin = disassemble(variant)
    assert cubin.stack == 0
    assert not [line for line in cubin.instructions if "LDL" in line or "STL" in line]


@pytest.mark.parametrize("world", (2, 4, 8))
@pytest.mark.parametrize(("kernel", "copies"), [("combine", 1), ("combine_from", 0)])
def test_all_peers_are_loaded_before_the_first_addition(kernel: str, copies: int, world: int):
    code = disassemble(Variant(kernel, world=world)).instructions
    first = next(i for i, line in enumerate(code) if "FADD" in line)
    loads = [i for i, line in enumerate(code) if "LDG.E.128" in line]
    assert len(loads) == world + copies  # copies into the own slot
    assert max(loads) < first


def test_a_dispatch_lets_experts_start_once_its_rows_are_signalled():
    text = compile_kernel(Variant("dispatch_into", warps=4, chunks=128, behind=True))["ptx"]
    let = text.index("griddepcontrol.launch_dependents")
    assert text.index("st.release.sys.global.b64") < let < text.index("ld.acquire.sys.global.b64")
    assert "griddepcontrol.wait" not in text  # the first of its chain


def test_a_combine_behind_experts_waits_for_them_before_it_reads_their_pairs():
    """Counts, epoch, addresses and poison are older than the experts; ids and pairs come behind the wait."""
    text, plain = (compile_kernel(Variant("combine_add", behind=behind))["ptx"] for behind in (True, False))
    assert text.count("griddepcontrol.wait") == 1 and "griddepcontrol" not in plain
    before = text[: text.index("griddepcontrol.wait")]
    assert before.count("ld.global") >= 5 and "ld.global.v4" not in before and "st.global.v4" not in before


def test_a_norm_adds_one_reduction_of_the_block():
    """Two block barriers, for the sum of squares; no memory is asked for twice."""
    plain, norm = (Variant("combine_add", world=2, warps=8, norm=kind) for kind in (0, 1))
    forms = [dict(map(reversed, map(str.split, ptx_forms(v).splitlines()))) for v in (plain, norm)]
    count_of = [{form: int(number) for form, number in found.items()} for found in forms]
    more = {form: count_of[1][form] - count_of[0].get(form, 0) for form in count_of[1]}
    assert {form: number for form, number in more.items() if number and not form.startswith("cvt")} == {
        "bar.sync": 2, "ld.global.v4.b32": 1, "st.global.v4.b32": 1
    }  # fmt: skip

"""The kernels of ``fused_moe`` and ``align_block_size`` compiled for an H200 that is not here."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_ops import (
    align_kernels,
    fused_moe_few_kernels,
    fused_moe_many_kernels,
    fused_moe_rest_kernels,
    fused_moe_wide_kernels,
    topk_sum_kernels,
)  # fmt: skip
from moe_ops.fused_moe_config import Plan, Shape, Tiles, default_plan, invariant_plan

QWEN = {tokens: Shape(128, 8, 2048, 768, tokens) for tokens in (1, 16, 64, 512, 8192)}
INTS = (
    "num_rows", "x_stride", "expert_start", "num_experts", "hidden", "inner", "num_pairs", "top_k", "sorted_size",
    "out_stride", "share", "blocks", "positions", "programs", "width",
)  # fmt: skip
DIVISIBLE = ("x_stride", "hidden", "inner", "out_stride", "width")  # by 16, which lets loads be wide
FORM = {
    "TOP_K": 8, "ACT": "silu", "GATED": True, "TRANSPOSED": False, "INTERLEAVED": False, "HAS_BIAS": False,
    "HAS_LIMIT": False, "TMA": True, "EVEN_K": True, "PDL": True, "BOX_ROWS": True, "GROUP": 8, "BY_PAIR": False,
    "LONE": False, "KEEP": False,
}  # fmt: skip


class Code(NamedTuple):
    """What came out: Triton's GPU IR, PTX, registers a thread, bytes of stack (spills live there)."""

    ttgir: str
    ptx: str
    registers: int
    stack: int

    def has(self, form: str) -> bool:
        return form in self.ptx


def _type_of(name: str, box: dict[str, str]) -> str:
    if name in box:
        return box[name]
    if name in ("alpha", "limit"):
        return "fp32"
    if name in INTS:
        return "i32"
    if name in ("ids_ptr", "place_ptr"):
        return "*i64"
    if name in ("weights_ptr", "factor_ptr"):
        return "*fp32"
    return "*i32" if name in ("valid_ptr", "sorted_ptr", "expert_ids_ptr", "total_ptr", "counts_ptr") else "*bf16"


def compiled(kernel: Any, constants: dict[str, Any], warps: int, stages: int, box: dict[str, str]) -> Code:
    """Compile for sm_90; arguments that a kernel has as constexpr take ``constants``, descriptors ``box``."""
    names = kernel.arg_names
    values = {name: constants[name] for name in names if name.isupper()}
    types = {name: "constexpr" if name in values else _type_of(name, box) for name in names}
    aligned = [n for n in names if n in DIVISIBLE or types[n].startswith("*")]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, types, {(names.index(n),): v for n, v in values.items()}, attributes)
    options = {"num_warps": warps, "num_stages": stages}
    asm = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm
    return Code(asm["ttgir"], asm["ptx"], *_usage(asm["cubin"]))


def _usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return int(found[1]), int(found[2])


@cache
def gemms(plan: Plan) -> tuple[Code, Code]:
    """Both GEMMs of a plan."""
    if plan.pairs:
        kernels = fused_moe_few_kernels.gate_up_few_kernel, fused_moe_few_kernels.down_few_kernel
    else:
        kernels = fused_moe_many_kernels.gate_up_many_kernel, fused_moe_many_kernels.down_many_kernel
    return _gemm(kernels[0], plan, plan.gate_up, 2), _gemm(kernels[1], plan, plan.down, 1)


def _gemm(kernel: Any, plan: Plan, tiles: Tiles, parts: int, **more: Any) -> Code:
    box = {"w": f"tensordesc<bf16[1,{parts},{tiles.block_n},{tiles.block_k}]>"}
    if not tiles.special:
        box["act"] = f"tensordesc<bf16[{tiles.block_m},{tiles.block_k}]>"
    constants = FORM | {
        "PAIRS": plan.pairs, "PREFETCH": plan.prefetch,
        "SWAP": tiles.swap, "FLAT": tiles.flat, "SPECIAL": tiles.special, "WHOLE": plan.rest > 0, "PARTS": 2,
        "BLOCK_M": tiles.block_m, "BLOCK_N": tiles.block_n, "BLOCK_K": tiles.block_k,
    } | more  # fmt: skip
    return compiled(kernel, constants, tiles.num_warps, tiles.num_stages, box)


PLANS = {f"T={tokens}": default_plan(shape) for tokens, shape in QWEN.items()}
PLANS |= {f"invariant T={tokens}": invariant_plan(shape) for tokens, shape in QWEN.items()}


@pytest.mark.parametrize("name", PLANS)
def test_gemms_use_the_tensor_cores_and_bulk_copies_and_spill_nothing(name):
    for code in gemms(PLANS[name]):
        assert code.stack == 0
        assert code.has("wgmma.mma_async") and not code.has("mma.sync.aligned.m16")
        assert code.has("cp.async.bulk.tensor.4d")
        assert code.has("griddepcontrol")


@pytest.mark.parametrize("name", PLANS)
def test_the_second_gemm_waits_for_the_first(name):
    first, second = gemms(PLANS[name])
    chain = PLANS[name].pairs > 0  # then the first GEMM is the first kernel of the chain, and align is not
    assert first.has("griddepcontrol.wait") != chain and second.has("griddepcontrol.wait")
    assert first.has("griddepcontrol.launch_dependents") and second.has("griddepcontrol.launch_dependents")


def test_experts_behind_a_dispatch_wait_for_it_before_anything_else():
    """And let the next kernel start only then: what that one reads ahead of its own wait is older than the dispatch."""
    plan = PLANS["T=1"]
    text = _gemm(fused_moe_few_kernels.gate_up_few_kernel, plan, plan.gate_up, 2, PDL=2).ptx
    wait = text.index("griddepcontrol.wait")
    assert text.count("griddepcontrol.wait") == 1 and wait < text.index("griddepcontrol.launch_dependents")
    assert "ld.global" not in text[:wait]


def test_few_rows_fill_the_machine():
    """Registers leave room for four programs an SM, and weights are asked for before the wait."""
    first, second = gemms(PLANS["T=1"])
    assert max(first.registers, second.registers) <= 128
    asked = second.ptx.index("cp.async.bulk.prefetch.L2.global")
    assert asked < second.ptx.index("griddepcontrol.wait", asked) < second.ptx.index("wgmma.mma_async", asked)
    assert "setp.lt.u32 p, t, " in second.ptx  # a thread for each column asks


@pytest.mark.parametrize("by_pair", [False, True])
def test_chunks_carry_no_ids(by_pair):
    """Of a carried tensor that is used in several layouts, Triton 3.6 takes the first chunk's for one of them."""
    constants = FORM | {"PAIRS": 16, "BY_PAIR": by_pair, "PREFETCH": 0, "SWAP": True}
    constants |= {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}
    for name, parts in (("gate_up_few_kernel", 2), ("down_few_kernel", 1)):
        box = {"w": f"tensordesc<bf16[1,{parts},32,64]>"}
        code = compiled(getattr(fused_moe_few_kernels, name), constants, 4, 3, box)
        loops = [line for line in code.ttgir.split("\n") if "scf.for" in line]
        assert len(loops) >= 4 and not any("xi64" in loop or "xi32" in loop for loop in loops)


def test_many_rows_reach_the_second_gemm_by_bulk_copies_alone():
    _, second = gemms(PLANS["T=8192"])
    assert second.has("cp.async.bulk.tensor.2d") and not second.has("cp.async.cg.shared")


def test_interleaved_and_transposed_weights_need_no_spill():
    for transposed, interleaved in ((True, True), (True, False), (False, True)):
        parts, wide = (1, 64) if interleaved else (2, 32)
        box = f"[1,128,{parts},{wide}]" if transposed else f"[1,{parts},{wide},128]"
        constants = FORM | {
            "TRANSPOSED": transposed, "INTERLEAVED": interleaved, "ACT": "swiglu_oai", "HAS_BIAS": True,
            "HAS_LIMIT": True, "PAIRS": 128, "SWAP": True, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128,
        }  # fmt: skip
        code = compiled(fused_moe_few_kernels.gate_up_few_kernel, constants, 4, 4, {"w": f"tensordesc<bf16{box}>"})
        assert code.stack == 0 and code.has("wgmma.mma_async")


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("bins", [8, 256, 1024])
def test_align_spills_nothing(bins, one):
    groups, size = (4, 32) if bins <= 32 else (1, 128)
    rest = {"BLOCK": 64, "BINS": bins, "ROWS": 4096 // bins, "GROUPS": groups, "SIZE": size, "SHARE": 32, "BLOCKS": 4}
    rest |= {"PART": 512, "PARTS": 4, "CHUNK": 512, "FILL": 256, "ONE": one, "PDL": True, "LONE": 8}
    two = rest | {"BINS": max(bins, 16), "ROWS": 4096 // max(bins, 16)}  # as launched
    kernels = (align_kernels._align_kernel, rest, 8), (align_kernels._count_kernel, two, 4)
    for kernel, constants, warps in (*kernels, (align_kernels._scatter_kernel, two, 4)):
        # a few registers at 1024 experts with Triton 3.9
        assert compiled(kernel, constants, warps, 3, {}).stack <= (8 if bins == 1024 else 0)


@pytest.mark.parametrize("kernel", ["topk_sum_kernel", "topk_sum_local_kernel"])
def test_the_sum_spills_nothing_and_leaves_room_for_many_programs(kernel):
    constants = {"TOP_K": 8, "BLOCK_H": 1024, "SLOTS": 8, "LONE": True, "PDL": True}
    local = kernel == "topk_sum_local_kernel"
    constants |= {"BLOCK_H": 512} if local else {}
    code = compiled(getattr(topk_sum_kernels, kernel), constants, 1 if local else 4, 3, {})
    assert code.stack == 0 and code.has("ld.global.v4") and not code.has("bar.sync")
    assert code.registers <= (64 if local else 48)  # 32 programs of one warp an SM, ten of four


def test_a_flat_loop_and_warps_of_their_own_spill_nothing():
    flat, special = Tiles(128, 256, 64, 8, 3, flat=True), Tiles(128, 256, 64, 4, 4, special=True)
    plain, flat_code, special_code = (
        _gemm(fused_moe_many_kernels.down_many_kernel, Plan(tiles, tiles), tiles, 1)
        for tiles in (replace(flat, flat=False), flat, special)
    )
    assert plain.stack == flat_code.stack == special_code.stack == 0
    assert special_code.has("setmaxnreg") and not plain.has("setmaxnreg")
    # each multiplying group loads its own half of the rows
    assert special_code.ptx.count("tensormap.replace.tile.box_dim") == 2 and special_code.registers <= 168


def test_the_first_gemms_flat_loop_carries_its_pairs_once():
    """As the gather wants them, not as the store would: 169 registers, else 255 and spills (Triton 3.9)."""
    tiles = Tiles(128, 128, 64, 8, 4, flat=True)
    code = _gemm(fused_moe_many_kernels.gate_up_many_kernel, Plan(tiles, tiles), tiles, 2)
    assert code.stack == 0 and code.registers <= 200


@pytest.mark.parametrize("tiles", [Tiles(128, 128, 64, 8, 6), Tiles(64, 128, 64, 4, 4)], ids=["halves", "quarters"])
def test_parts_of_tiles_spill_nothing_and_end_after_the_kernel_before(tiles):
    for kernel, parts in (
        (fused_moe_rest_kernels.gate_up_rest_kernel, 2),
        (fused_moe_rest_kernels.down_rest_kernel, 1),
    ):
        code = _gemm(kernel, Plan(tiles, tiles), replace(tiles, block_n=tiles.block_n // parts), parts)
        assert code.stack == 0 and code.has("wgmma.mma_async")
        assert code.ptx.rindex("griddepcontrol.wait") > code.ptx.rindex("wgmma.mma_async")


LONE_TILES = {
    "flat": Tiles(128, 256, 64, 8, 4, flat=True),
    "flat-64": Tiles(64, 128, 64, 4, 4, flat=True),
    "special": Tiles(128, 256, 64, 4, 4, special=True),
    "plain": Tiles(128, 256, 64, 8, 3),
    "swap": Tiles(64, 128, 64, 4, 4, swap=True),
    "rest": Tiles(128, 128, 64, 8, 6),
}


@pytest.mark.parametrize("name", LONE_TILES)
def test_rows_for_the_result_cost_no_second_store_and_no_spill(name):
    tiles = LONE_TILES[name]
    rest = fused_moe_rest_kernels.down_rest_kernel if name == "rest" else fused_moe_many_kernels.down_many_kernel
    without, code = (_gemm(rest, Plan(tiles, tiles), tiles, 1, LONE=lone) for lone in (False, True))
    stores = [c.ptx.count("st.global.v4") for c in (without, code)]
    assert stores[0] == stores[1] > 0 and "st.global.b16" not in code.ptx
    assert code.stack == 0
    if tiles.flat:  # what a loop over all tiles carries is an element a thread
        loops = [line for line in code.ttgir.splitlines() if "scf.for" in line and "iter_args" in line]
        assert loops and not any("xi32, #ttg.slice" in loop or "xi64, #ttg.slice" in loop for loop in loops)


def test_many_rows_wait_for_align_before_others_may_start():
    """The kernels of what is left read what align wrote without waiting for it themselves."""
    whole = replace(PLANS["T=8192"], rest=2)
    for code in gemms(whole):
        assert code.ptx.index("griddepcontrol.wait") < code.ptx.index("griddepcontrol.launch_dependents")


@pytest.mark.parametrize("bias", [False, True])
def test_blocks_of_192_rows_fit_into_the_registers(bias):
    constants = FORM | {"ROWS": 128, "TAIL_ROWS": 64, "BLOCK_K": 64, "CHUNK": 64, "HAS_BIAS": bias}
    first = {
        "w": "tensordesc<bf16[1,2,2,64,64]>",
        "act": "tensordesc<bf16[128,128]>",
        "tail": "tensordesc<bf16[64,128]>",
    }
    second = {
        "w": "tensordesc<bf16[1,1,1,256,64]>",
        "act": "tensordesc<bf16[128,64]>",
        "tail": "tensordesc<bf16[64,64]>",
    }
    gate_up = compiled(fused_moe_wide_kernels.gate_up_wide_kernel, constants | {"BLOCK_N": 128}, 8, 3, first)
    down = compiled(fused_moe_wide_kernels.down_wide_kernel, constants | {"BLOCK_N": 256}, 8, 3, second)
    # with a bias, which no plan of the table meets in such blocks, Triton 3.9 spills four registers; 3.6 none
    assert max(gate_up.stack, down.stack) <= (16 if bias else 0)
    for code in (gate_up, down):
        assert code.has("wgmma.mma_async") and code.has("cp.async.bulk.tensor.5d") and code.has("griddepcontrol.wait")
    assert gate_up.has("cp.async.bulk.tensor.2d.global.shared")  # the activation leaves as a box, too

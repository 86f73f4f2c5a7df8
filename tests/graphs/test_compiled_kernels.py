"""The decode step's own kernels compiled for an H200 that is not here: nothing spills, loads are asynchronous."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphs.attention_kernels import _attend_kernel
from graphs.attention_launch import JOINED, SHORT_BLOCK, SHORT_STAGES, sizes, split
from graphs.rotated_attention_kernels import _rotate_and_attend_kernel
from moe_ops.thin_linear import tiles
from moe_ops.thin_linear_kernels import _thin_linear_kernel

BF16 = "*bf16"
HEADS = {
    "GROUP": 8, "ROWS": 16, "DEPTH": 128, "DEPTH_V": 128, "DEPTH_PAD": 128, "DEPTH_V_PAD": 128, "SPAN": 512,
    "SPANS": 1, "PDL": False,
}  # fmt: skip
ATTENTION = {
    "q_ptr": BF16, "k_ptr": BF16, "v_ptr": BF16, "mask_ptr": "*u8", "out_ptr": BF16, "stats_ptr": BF16,
    "mask_stride": "i32", "scale": "fp32", "kv_heads": "i32", "length": "i32",
}  # fmt: skip
NEW_TOKEN = ATTENTION | {
    "new": (BF16, BF16, BF16), "norms": (BF16, BF16), "query_eps": "fp32", "key_eps": "fp32",
    "angles": ("*fp32", "*fp32"), "cache": (BF16, BF16), "columns_ptr": "*i64",
}  # fmt: skip


def compiled(kernel: Any, types: dict[str, Any], constants: dict[str, Any], aligned: tuple[str, ...] = ()) -> Any:
    """PTX, registers and bytes of stack for sm_90; pointers and ``aligned`` numbers are divisible by 16."""
    names = kernel.arg_names
    options = {name: constants[name] for name in ("num_warps", "num_stages")}
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attributes = {}
    for i, (name, kind) in enumerate(signature.items()):
        for path, one in [((i, j), k) for j, k in enumerate(kind)] if isinstance(kind, tuple) else [((i,), kind)]:
            if one.startswith("*") or name in aligned:
                attributes[path] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(names.index(n),): v for n, v in constants.items()}, attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        text = subprocess.run([str(tool), "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return made.asm["ptx"], int(found[1]), int(found[2])


def test_decode_attention():
    constants = HEADS | {"BLOCK": SHORT_BLOCK, "num_warps": 4, "num_stages": SHORT_STAGES}
    ptx, registers, stack = compiled(_attend_kernel, ATTENTION, constants)
    assert stack == 0 and registers <= 128, (registers, stack)
    assert "cp.async.cg" in ptx


def test_heads_smaller_than_a_tensor_core_product_compile():
    query, keys, values = torch.empty(1, 2, 4), torch.empty(1, 1, 128, 4), torch.empty(1, 1, 128, 2)
    constants = sizes(query, keys, values, split(query, keys, values, None)) | {"PDL": False}
    ptx, _, stack = compiled(_attend_kernel, ATTENTION, constants)
    assert stack == 0 and "mma.sync" in ptx


@pytest.mark.parametrize("norms", [(True, True), (False, False)])
def test_attention_of_a_new_token(norms: tuple[bool, bool]):
    constants = HEADS | JOINED | {"TURNED": 128, "NORMS": norms}
    ptx, registers, stack = compiled(_rotate_and_attend_kernel, NEW_TOKEN, constants)
    assert stack == 0 and registers <= 128, (registers, stack)
    assert "cp.async.cg" in ptx
    assert len(re.findall(r"st\.global", ptx)) >= 3, "the answer, the new key, the new value"


def _thin_linear(rows: int, widths: tuple[int, ...], piece: int, out: str) -> tuple[str, int, int]:
    constants = {"num_warps": 4, "EVEN_K": True} | tiles(rows, widths, piece)
    many = len(widths)
    types = {
        "x_ptr": BF16, "weights": (BF16,) * many, "outs": (out,) * many, "widths": ("i32",) * many, "rows": "i32",
        "depth": "i32", "piece": "i32",
    }  # fmt: skip
    return compiled(_thin_linear_kernel, types, constants, aligned=("widths", "depth", "piece"))


@pytest.mark.parametrize(("rows", "widths"), [(16, (4096, 512, 512)), (16, (2048,)), (32, (2048,)), (64, (128,))])
def test_thin_linear(rows: int, widths: tuple[int, ...]):
    ptx, registers, stack = _thin_linear(rows, widths, 0, BF16)
    assert stack == 0 and registers <= 192, (registers, stack)
    assert "cp.async.cg" in ptx


@pytest.mark.parametrize(("rows", "width", "piece"), [(8, 128, 512), (64, 128, 512), (8, 256, 1024), (64, 256, 1024)])
def test_thin_linear_in_pieces(rows: int, width: int, piece: int):
    """A piece in one step is loaded through registers: all of it is asked for before any is used."""
    ptx, registers, stack = _thin_linear(rows, (width,), piece, "*fp32")
    assert stack == 0 and registers <= 255, (registers, stack)
    assert len(re.findall(r"ld\.global\S*\.v4", ptx)) >= 8 or "cp.async.cg" in ptx

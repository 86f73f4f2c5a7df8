"""The communication kernels compiled for GPUs that are not here, and what to look for in the result.

``python -m tests.moe_ops.compiled`` rewrites the expected files after a wanted change.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moe_ops.barrier import Peers
from moe_ops.chunks import Place, Rows, Slots
from moe_ops.combine_add_kernels import NormRow, Routing, _combine_add_kernel
from moe_ops.combine_from_kernels import _combine_from_kernel
from moe_ops.combine_kernels import _combine_kernel
from moe_ops.dispatch_into_kernels import _dispatch_into_kernel
from moe_ops.dispatch_kernels import Batch, _dispatch_kernel
from moe_ops.metadata_kernels import _metadata_kernel

EXPECTED = Path(__file__).parent / "expected"
WORLD = 4
FORMS = (
    "multimem.st.relaxed.sys.global.v4.f32",
    "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2",
    "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2",
    "multimem.ld_reduce.relaxed.sys.global.add.v4.f32",
    "st.global.v4.b32",
    "ld.global.v4.b32",
    "st.release.sys.global.b64",
    "st.relaxed.sys.global.b64",
    "ld.acquire.sys.global.b64",
    "ld.relaxed.sys.global.b64",
    "atom.relaxed.gpu.global.cas.b64",
    "fence.proxy.alias",
    "fence.acq_rel.cta",
    "cvt.rn.bf16x2.f32",
    "bar.sync",
    "barrier.cta.red.or.pred",
    "trap",
)
KERNELS = {
    "metadata": _metadata_kernel,
    "dispatch": _dispatch_kernel,
    "combine": _combine_kernel,
    "combine_add": _combine_add_kernel,
    "dispatch_into": _dispatch_into_kernel,
    "combine_from": _combine_from_kernel,
}


class Variant(NamedTuple):
    """One compiled kernel. ``aligned``: all rows are whole 16-byte chunks; ``alone``: with both barriers.

    ``norm``: of ``combine_add``, which sums pairs and adds one tensor. ``behind``: it starts while the experts' last
    kernel runs, or ``dispatch_into`` lets their first one start.
    """

    kernel: str
    multicast: bool = False
    aligned: bool = True
    arch: int = 90
    world: int = WORLD
    dtype: str = "bf16"
    warps: int = 8
    chunks: int = 256
    alone: bool = False
    routed: bool = False
    norm: int = 0
    behind: bool = False


def _rows(kind: str) -> Rows:
    return Rows(f"*{kind}", "i32", "i32", "i32")


def _place(kind: str) -> Place:
    return Place(f"*{kind}", "*i64", "i64", "i64", "i64", "i32")


def _signature(variant: Variant) -> dict[str, Any]:
    common: dict[str, Any] = {"peers": Peers("*i64", "i64", "*i64", "i64", "i64", "i32")}
    counts = dict.fromkeys(("local_tokens_ptr", "metadata_ptr"), "*i32")
    limits = {"row_limit": "i32", "max_tokens": "i32"}
    if variant.kernel == "metadata":
        return common | {"local_tokens_ptr": "*i32", "out_ptr": "*i32", "rank_capacity": "i32"}
    batch = Batch(_rows(variant.dtype), _rows("i32"), _rows("fp32"))
    rows = _rows(variant.dtype)
    if variant.kernel == "dispatch_into":
        out = Batch(_place(variant.dtype), _place("i32"), _place("fp32"))
        return (
            common | {"source": batch, "out": out, "live_ptr": "*i32"} | counts | limits | {"experts_per_rank": "i32"}
        )
    if variant.kernel == "combine_from":
        common |= {"source": _place(variant.dtype), "out": rows, "addends": (rows,), "scale": "fp32"}
        common |= {"ids": _rows("i32"), "experts_per_rank": "i32"}
        return common | counts | limits | {"num_rows": "i32"}
    common["slots"] = Slots("i64", "i64", "i32")
    if variant.kernel == "combine_add":
        common |= {"source": rows, "routing": Routing("*i64", "*fp32", "i32", "i32", "i32", "i32"), "out": rows}
        common |= {"addends": (rows,), "scale": "fp32", "norm": NormRow(rows, "fp32", "fp32")}
        return common | counts | limits | {"num_rows": "i32"}
    if variant.kernel == "dispatch":
        return common | {"source": batch, "out": batch} | counts | limits
    return common | {"source": rows, "out": rows} | counts | limits | {"num_rows": "i32"}


def _constants(variant: Variant) -> dict[str, Any]:
    if variant.kernel == "metadata":
        return {"W": variant.world}
    values: dict[str, Any] = {"W": variant.world, "N": variant.chunks, "MULTICAST": variant.multicast}
    if variant.kernel == "dispatch_into":
        return values | {
            "ALIGNED": variant.aligned, "ENTRY": variant.alone, "ROUTED": 8 * variant.routed,
            "PDL": variant.behind,
        }  # fmt: skip
    if variant.kernel == "combine_from":
        return (
            values
            | {"ADDENDS": 0, "ROUND_EACH": False, "ALIGNED": variant.aligned}
            | {"EXIT": variant.alone, "ROUTED": 8 * variant.routed}
        )
    values |= {"ALIGNED_IN": variant.aligned, "ALIGNED_OUT": variant.aligned}
    if variant.kernel == "combine_add":
        values |= {"TOP_K": 8, "ADDENDS": 1, "ROUND_EACH": False, "NORM": variant.norm, "ROUTED": 8 * variant.routed}
        values["PDL"] = variant.behind
    if variant.kernel == "dispatch":
        values |= {"R": 32 * variant.warps, "ALIGNED_ROUTING": variant.aligned}
    return values


@cache
def compile_kernel(variant: Variant) -> dict[str, Any]:
    """The artefacts of ``triton.compile``: ``ttgir``, ``ptx``, ``cubin``."""
    constants = _constants(variant)
    signature = _signature(variant) | dict.fromkeys(constants, "constexpr")
    source = ASTSource(KERNELS[variant.kernel], signature=signature, constexprs=constants)
    warps = 1 if variant.kernel == "metadata" else variant.warps
    return triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options={"num_warps": warps}).asm


def ptx_forms(variant: Variant) -> str:
    """How often each of our instruction forms stands in the PTX, one a line; forms that do not occur are left out."""
    code = compile_kernel(variant)["ptx"]
    lines = [re.sub(r"^\s*(@!?%?\w+\s+)?", "", line) for part in code.split("\n") for line in part.split(";")]
    found = Counter(form for line in lines for form in FORMS if line.startswith(form + " ") or line == form)
    return "".join(f"{found[form]:3} {form}\n" for form in FORMS if found[form])


class Cubin(NamedTuple):
    """What the disassembler says."""

    instructions: list[str]
    registers: int
    stack: int


def disassemble(variant: Variant) -> Cubin:
    """SASS, registers and stack bytes (spills) of the cubin."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compile_kernel(variant)["cubin"])
        file.flush()
        run = [str(tool), "-sass", "-res-usage", file.name]
        text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    code = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", text, re.MULTILINE)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert code and usage
    return Cubin(code, int(usage[1]), int(usage[2]))


class AsmLayout(NamedTuple):
    """How the elements of one inline assembly op lie on a block's threads."""

    elements: int
    per_thread: int
    threads: int  # of a warp
    warps: int


def asm_layouts(variant: Variant, text: str) -> list[AsmLayout]:
    """The layouts of the inline assembly ops whose text contains ``text``, from Triton's GPU IR."""
    code = compile_kernel(variant)["ttgir"]
    layouts = {
        name: tuple(map(int, sizes))
        for name, *sizes in re.findall(
            r"^(#\w+) = #ttg\.blocked<\{sizePerThread = \[(\d+)\], threadsPerWarp = \[(\d+)\], warpsPerCTA = \[(\d+)\]",
            code,
            re.MULTILINE,
        )
    }
    found = []
    for line in code.split("\n"):
        if "elementwise_inline_asm" in line and text in line:
            match = re.search(r"tensor<(\d+)x\w+, (#\w+)>", line)
            assert match, line
            found.append(AsmLayout(int(match[1]), *layouts[match[2]]))
    return found


SLOT_KERNELS = ("dispatch", "combine")
BUFFER_KERNELS = ("dispatch_into", "combine_from")
EXPECTED_VARIANTS = [
    Variant("metadata"),
    *(Variant(kernel, multicast, aligned) for kernel in SLOT_KERNELS
      for multicast in (False, True) for aligned in (True, False)),
    *(Variant(kernel, multicast, alone=alone) for kernel in BUFFER_KERNELS
      for multicast in (False, True) for alone in (True, False)),
    *(Variant(kernel, routed=True) for kernel in BUFFER_KERNELS),
]  # fmt: skip


def expected_file(variant: Variant) -> Path:
    parts = [variant.kernel]
    if variant.kernel != "metadata":
        parts.append("multicast" if variant.multicast else "p2p")
    if variant.kernel in SLOT_KERNELS:
        parts.append("aligned" if variant.aligned else "ragged")
    if variant.kernel in BUFFER_KERNELS:
        parts.append("alone" if variant.alone else "in-turns")
    return EXPECTED / f"{'-'.join(parts + ['routed'] * variant.routed)}.txt"


if __name__ == "__main__":
    EXPECTED.mkdir(exist_ok=True)
    for entry in EXPECTED_VARIANTS:
        expected_file(entry).write_text(ptx_forms(entry))

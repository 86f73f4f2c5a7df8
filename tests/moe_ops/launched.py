"""What a call of ``fused_moe`` launches on an H200, compiled here for the arguments of each launch.

``python -m tests.moe_ops.launched`` compiles every plan of the committed table, a line a kernel, and fails where one
spills: some minutes, less where Triton's cache has them. ``... launched gpt-oss`` compiles the plans of its shape as it
calls them: transposed, interleaved, with biases, alpha and limit.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from moe_ops import fused_moe_launch, pdl, topk_sum_launch
from moe_ops.fused_moe import launch_fused_moe
from moe_ops.fused_moe_config import Plan, Shape, load_table

GPU, SMS, TARGET = "NVIDIA H200", 132, GPUTarget("cuda", 90, 32)


class Usage(NamedTuple):
    """What a compiled kernel takes: registers and bytes of stack of a thread, bytes of shared memory of a program.

    ``spills``: instructions that access the stack. A stack that nothing accesses costs nothing.
    """

    registers: int
    stack: int
    shared: int
    spills: int


class Launch(NamedTuple):
    """A kernel and what it is compiled for."""

    kernel: str
    source: ASTSource
    options: dict[str, Any]

    def compiled(self) -> CompiledKernel:
        return triton.compile(self.source, target=TARGET, options=self.options)

    def key(self) -> str:
        return f"{self.source.hash()} {self.options}"


def usage(code: CompiledKernel) -> Usage:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code.asm["cubin"])
        file.flush()
        found = re.search(r"REG:(\d+) STACK:(\d+)", _cuobjdump("-res-usage", file.name))
        assert found
        registers, stack = map(int, found.groups())
        sass = _cuobjdump("-sass", file.name) if stack else ""
    return Usage(registers, stack, code.metadata.shared, len(re.findall(r"\s(?:STL|LDL)\b", sass)))


def _cuobjdump(*arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), *arguments], capture_output=True, text=True, check=True).stdout


def _launch(kernel: JITFunction, arguments: tuple, options: dict[str, Any]) -> Launch:
    """As ``JITFunction.run`` would compile it."""
    backend = make_backend(TARGET)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *arguments, **options
    )
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    return Launch(kernel.__name__, ASTSource(kernel, signature, constants, attributes), parsed.__dict__)


def launches(shape: Shape, plan: Plan, gpt_oss: bool = False) -> list[Launch]:
    """What one call with ``shape.tokens`` rows launches, in order; ``gpt_oss``: in that model's form."""
    seen: list[Launch] = []

    def record(kernel: JITFunction, *arguments: Any, grid: object, warmup: bool, **options: Any) -> None:
        seen.append(_launch(kernel, arguments, options))

    with ExitStack() as patches, torch.device("meta"):
        patches.enter_context(patch.object(JITFunction, "run", record))
        patches.enter_context(patch.object(pdl, "supports_pdl", lambda device: True))
        for module in (fused_moe_launch, topk_sum_launch):
            patches.enter_context(patch.object(module, "device_of", lambda tensor: (GPU, SMS)))
        launch_fused_moe(*_arguments(shape, gpt_oss), **(_gpt_oss(shape) if gpt_oss else {}), plan=plan)
    return seen


def _of(*size: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(size, dtype=dtype)


def _gpt_oss(shape: Shape) -> dict[str, Any]:
    biases = {"gate_up_bias": _of(shape.experts, 2 * shape.inner), "down_bias": _of(shape.experts, shape.hidden)}
    return {"activation": "swiglu_oai", "alpha": 1.702, "limit": 7.0, "transposed": True, "interleaved": True} | biases


def _arguments(shape: Shape, transposed: bool) -> tuple[Any, ...]:
    pairs, count = (shape.tokens, shape.top_k), _of(1, dtype=torch.int32)
    up, down = (2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)
    up, down = (_of(shape.experts, *(size[::-1] if transposed else size)) for size in (up, down))
    ids, weights = _of(*pairs, dtype=torch.int64), _of(*pairs, dtype=torch.float32)
    return _of(shape.tokens, shape.hidden), ids, weights, up, down, count, 0


def table_plans() -> Iterator[tuple[Shape, Plan]]:
    """Every plan of the committed table with the size that it was measured at."""
    for key, plans in load_table("nvidia_h200").items():
        sizes = map(int, re.findall(r"\d+", key))
        experts, top_k, hidden, inner = sizes
        for tokens, entry in plans.items():
            yield Shape(experts, top_k, hidden, inner, int(tokens)), Plan.from_json(entry)


def _main() -> None:
    gpt_oss, seen = sys.argv[1:] == ["gpt-oss"], dict[str, Usage]()
    for shape, plan in table_plans():
        for launch in launches(shape, plan, gpt_oss) if not gpt_oss or shape.hidden == 2880 else ():
            if launch.key() not in seen:
                used = seen[launch.key()] = usage(launch.compiled())
                print(f"{shape.key():20} T={shape.tokens:<5} {launch.kernel:24}", *used, flush=True)
    spilling = sum(used.spills > 0 for used in seen.values())
    print(f"{len(seen)} kernels, {spilling} spill (registers, stack, shared memory, accesses to the stack)")
    sys.exit(spilling > 0)


if __name__ == "__main__":
    _main()

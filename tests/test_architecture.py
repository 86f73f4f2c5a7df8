"""The rules that keep the three packages apart, checked on the syntax trees of the shipped files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("moe_ops", "lowering", "graphs")  # each imports only from itself and from those before it
MAX_LINES = 400

# Private torch API has one place to land in each layer when a torch version changes it.
TORCH_ADAPTERS = {"lowering/torch_compat.py", "moe_ops/registration.py", "moe_ops/transports.py"}
INLINE_ASM_FILES = {"moe_ops/ptx.py", "moe_ops/barrier.py"}
TRANSFORMERS_ADAPTERS = {"graphs/hf_compat.py", "graphs/hf_ep.py", "graphs/hf_slots.py"}


def shipped_files() -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for layer in LAYERS for p in (ROOT / layer).rglob("*.py"))


def names_of(source: str, path: str) -> Iterator[tuple[int, str]]:
    """``(line, dotted name)`` of every import and every attribute chain, relative imports resolved."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            chain, inner = [node.attr], node.value
            while isinstance(inner, ast.Attribute):
                chain.append(inner.attr)
                inner = inner.value
            if isinstance(inner, ast.Name):
                yield node.lineno, ".".join([inner.id, *reversed(chain)])


def wrong_directions(source: str, path: str) -> list[str]:
    allowed = LAYERS[: LAYERS.index(path.split("/")[0]) + 1]
    return [
        f"{path}:{line}: {name} is to the right of {path.split('/')[0]}"
        for line, name in names_of(source, path)
        if name.split(".")[0] in LAYERS and name.split(".")[0] not in allowed
    ]


def private_torch(source: str, path: str) -> list[str]:
    """Uses of private ``torch`` names; ``torch._check`` is documented, and ``aten._to_copy`` only an op's name."""
    if path in TORCH_ADAPTERS:
        return []
    found = []
    for line, name in names_of(source, path):
        parts = name.split(".")
        hidden = [p for p in parts[1:] if p.startswith("_") and not p.startswith("__")]
        public = parts[1:2] == ["ops"] or (hidden and hidden[0].startswith("_check"))
        if parts[0] == "torch" and hidden and not public:
            found.append(f"{path}:{line}: {name} is private torch API; put it in one of {sorted(TORCH_ADAPTERS)}")
    return found


def stray_asm(source: str, path: str) -> list[str]:
    if path in INLINE_ASM_FILES or path.startswith("moe_ops/emulator/"):
        return []
    return [
        f"{path}:{line}: inline asm; put it in {sorted(INLINE_ASM_FILES)}"
        for line, name in names_of(source, path)
        if name.endswith("inline_asm_elementwise")
    ]


def stray_transformers(source: str, path: str) -> list[str]:
    """transformers only in ``graphs``; what changes between versions (its submodules) only in the adapter."""
    found = []
    for line, name in names_of(source, path):
        parts = name.split(".")
        if parts[0] != "transformers" or path in TRANSFORMERS_ADAPTERS:
            continue
        if not path.startswith("graphs/"):
            found.append(f"{path}:{line}: {name}; only graphs may import transformers")
        elif len(parts) > 2:
            where = sorted(TRANSFORMERS_ADAPTERS)
            found.append(f"{path}:{line}: {name} is not at transformers' top level; put it in one of {where}")
    return found


def untyped(source: str, path: str) -> list[str]:
    """Functions with an argument or a result that has no type; device code has none, its constants apart."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        bare = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
        if bare or (node.returns is None and node.name != "__init__"):
            found.append(f"{path}:{node.lineno}: {node.name} has no type for {', '.join(bare) or 'its result'}")
    return found


RULES = {
    "import direction": wrong_directions,
    "private torch API": private_torch,
    "inline asm": stray_asm,
    "transformers": stray_transformers,
    "type hints": untyped,
}


@pytest.mark.parametrize("rule", RULES)
def test_shipped_files_keep_the_rule(rule: str):
    found = [line for path in shipped_files() for line in RULES[rule]((ROOT / path).read_text(), path)]
    assert not found, "\n".join(dict.fromkeys(found))


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        ("import direction", "moe_ops/align.py", "import lowering"),
        ("import direction", "moe_ops/align.py", "def f():\n    from graphs.cli import main"),
        ("import direction", "lowering/passes.py", "from graphs import report"),
        ("private torch API", "lowering/passes.py", "from torch._inductor import config"),
        ("private torch API", "moe_ops/align.py", "import torch\ntorch._dynamo.reset()"),
        ("private torch API", "graphs/report.py", "import torch._higher_order_ops.wrap"),
        ("inline asm", "moe_ops/dispatch_kernels.py", "tl.inline_asm_elementwise('')"),
        ("transformers", "moe_ops/align.py", "import transformers"),
        ("type hints", "moe_ops/align.py", "def f(x) -> int: ..."),
        ("type hints", "moe_ops/align.py", "class A:\n    def f(self): ..."),
        ("transformers", "graphs/experts.py", "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS"),
    ],
)
def test_rule_finds_a_breach(rule: str, path: str, source: str):
    assert RULES[rule](source, path)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        ("import direction", "graphs/cli.py", "from lowering import enable\nfrom moe_ops.errors import MoeEpError"),
        ("import direction", "moe_ops/emulator/run.py", "from ..errors import MoeEpError"),
        ("private torch API", "lowering/torch_compat.py", "from torch._inductor import config"),
        ("private torch API", "moe_ops/align.py", "torch._check(x)\ntorch.ops.aten._to_copy.default"),
        ("inline asm", "moe_ops/ptx.py", "tl.inline_asm_elementwise('')"),
        ("transformers", "graphs/decode.py", "from transformers import AutoModelForCausalLM"),
        ("type hints", "moe_ops/align_kernels.py", "@triton.jit\ndef f(x_ptr, N: tl.constexpr): ..."),
        ("type hints", "moe_ops/align.py", "class A:\n    def __init__(self, x: int): ..."),
    ],
)
def test_rule_allows(rule: str, path: str, source: str):
    assert not RULES[rule](source, path)


def test_files_are_short():
    paths = [p for top in (*LAYERS, "tests", "benchmarks") for p in (ROOT / top).rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in paths if (n := len(p.read_text().splitlines())) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines: {long}"

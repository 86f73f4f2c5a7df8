"""What a lowered graph communicates, as launches for the protocol's model: from the graph, or from Inductor's code.

The code is what runs: Inductor's scheduler has put every call in its place. It is read as text, with nothing of the
passes or of what they believe.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch.fx import Graph

from lowering.effects import effect_ops
from tests.protocol.sequence import Step, Verdict, check_sequence

SLOTS = {"agv_dispatch": "agv_dispatch", "rsv_combine": "rsv_combine", "rsv_combine_add": "rsv_combine",
         "fused_moe_combine": "rsv_combine", "metadata_update": "metadata_update"}  # fmt: skip
LAYERS = ("moe_layer", "moe_layer_shared")


def launches(graph: Graph) -> list[Step]:
    """The graph's ordered ops as the model's launches."""
    return [step for op in effect_ops(graph) for step in _steps(op.name, op.arguments.get("entry_barrier", True))]


def launches_in_code(source: str) -> dict[str, tuple[Step, ...]]:
    """The same of Inductor's code, by group, in the order of its calls. Ops that meet nobody have no group."""
    steps: dict[str, tuple[Step, ...]] = {}
    for name, arguments in _calls(source):
        if "group_name" in arguments:
            group, entry = arguments["group_name"], arguments.get("entry_barrier", True)
            steps[group] = steps.get(group, ()) + tuple(_steps(name, entry))
    return steps


def _steps(name: str, entry_barrier: bool) -> Iterator[Step]:
    """One op; x is the layer batch."""
    if name in SLOTS:
        yield Step(SLOTS[name])
    elif name in LAYERS:
        yield Step("dispatch_into", writes=("x",), barrier=entry_barrier)
        yield Step("local", reads=("x",))
        yield Step("rsv_combine")
    else:
        assert name == "agree", name  # launches nothing


def _calls(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """``(op, arguments that are literals, by name)`` of every call of an op of ``moe_ep``."""
    prefix, found = "torch.ops.moe_ep.", []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith(prefix):
            found.append(node)
    for call in sorted(found, key=lambda node: (node.lineno, node.col_offset)):
        name = ast.unparse(call.func).removeprefix(prefix).removesuffix(".default")
        declared = getattr(torch.ops.moe_ep, name).default._schema.arguments
        given = {argument.name: value for argument, value in zip(declared, call.args)}
        given |= {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
        yield name, {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}


def without_meetings(steps: Sequence[Step]) -> tuple[Step, ...] | None:
    """The steps without those on which the first dropped entry behind a layer relies: all since that layer's experts.

    None if no layer follows another with its entry dropped.
    """
    experts = None
    for number, step in enumerate(steps):
        if step.kind == "dispatch_into" and not step.barrier and experts is not None:
            return (*steps[: experts + 1], *steps[number:])
        if step.kind == "local":
            experts = number
    return None


@cache
def verdict(steps: tuple[Step, ...]) -> Verdict:
    """What the protocol's model says of them; equal graphs are explored once."""
    return check_sequence(steps)


def check_code(source: str) -> list[tuple[Step, ...]]:
    """Assert that what ``source`` launches is safe, and would not be without the meetings that it relies on."""
    checked = []
    for steps in launches_in_code(source).values():
        assert verdict(steps).ok, verdict(steps).counterexample
        if (fewer := without_meetings(steps)) is not None:
            assert not verdict(fewer).ok, fewer
        checked.append(steps)
    return checked

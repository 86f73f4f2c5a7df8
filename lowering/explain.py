"""``lowering.explain``: compile a model anew and say what the passes did to it, and what they refused and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from moe_ops.workspace import get_workspace

from . import torch_compat
from .copies import Copy, copies_among, ops_in_code
from .errors import LoweringError
from .passes import enabled_options
from .picture import draw
from .report import RECENT, GraphReport, layers_are_viewed
from .schedule import scheduled_launches


@dataclass
class Explanation:
    """All that is known about one compilation; ``str()`` prints it, ``to_json()`` for programs.

    ``compiled_graphs``: graphs that Dynamo captured (1 is the aim); ``partitions``: pieces that a compiled graph was
    cut into; ``cudagraph_skips``: why no CUDA graph was recorded; ``copies``: kernels that only move data to or from
    an op; ``symmetric_memory``: bytes by group and buffer.
    """

    active: bool
    compiled_graphs: int
    graph_breaks: dict[str, int]
    partitions: int
    cudagraph_skips: int
    ops: dict[str, int]
    graphs: list[GraphReport]
    copies: list[Copy]
    symmetric_memory: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_json(self) -> str:
        """The same as text for programs."""
        return json.dumps(asdict(self) | {"copies": [copy._asdict() for copy in self.copies]}, indent=2)

    def to_svg(self) -> str:
        """A picture of one layer before and after the passes; raises ``LoweringError`` where no graph has a layer."""
        graph = next((graph for graph in self.graphs if graph.before and graph.after), None)
        if graph is None or graph.before is None or graph.after is None:
            raise LoweringError(
                "explain: no graph holds a layer of moe_ep ops; pass a model whose experts use them, on several ranks."
            )
        return draw(graph.before, graph.after)

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def explain(model: Callable, *args: Any, mode: str | None = None, **kwargs: Any) -> Explanation:
    """Compile ``model`` (or what is behind a compiled one) for these arguments, run it once, and report.

    The model runs for real, so every rank must call this. Compiled functions are forgotten before and after, and
    caches are not used. ``mode``: as in ``torch.compile``; "reduce-overhead" by default where there is CUDA. Raises
    ``LoweringError`` where Inductor is to write C++ (``cpp_wrapper``).
    """
    if not torch_compat.writes_python():
        raise LoweringError(
            "explain: torch._inductor.config.cpp_wrapper is True, and calls of ops in C++ are not what explain reads; "
            "set it to False for this call: the passes do the same either way."
        )
    mode = mode or ("reduce-overhead" if torch.cuda.is_available() else "default")
    torch_compat.reset_compiler()
    RECENT.clear()
    before = torch_compat.compile_counters()
    with torch.no_grad(), torch_compat.without_caches(), layers_are_viewed():
        compiled = torch.compile(torch_compat.uncompiled(model), mode=mode)
        with scheduled_launches() as launches:
            _, sources = torch_compat.output_code(compiled, *args, **kwargs)
    after = torch_compat.compile_counters()
    torch_compat.reset_compiler()
    calls = [op for source in sources for op in ops_in_code(source)]
    seen = [launch.called.removeprefix("moe_ep.") for launch in launches if launch.called.startswith("moe_ep.")]
    assert Counter(calls) == Counter(seen), f"the schedule is not that of the code: {Counter(seen)}, {Counter(calls)}"
    return Explanation(
        active=enabled_options() is not None,
        compiled_graphs=_grew(before, after, "stats", "unique_graphs"),
        graph_breaks=_breaks(before, after),
        partitions=_grew(before, after, "inductor", "cudagraph_partitions"),
        cudagraph_skips=_grew(before, after, "inductor", "cudagraph_skips"),
        ops=dict(Counter(calls)),
        graphs=list(RECENT),
        copies=copies_among(launches),
        symmetric_memory=_memory(list(RECENT)),
    )


def _grew(before: dict, after: dict, group: str, name: str) -> int:
    return after.get(group, {}).get(name, 0) - before.get(group, {}).get(name, 0)


def _breaks(before: dict, after: dict) -> dict[str, int]:
    old = before.get("graph_break", {})
    grown = {reason: count - old.get(reason, 0) for reason, count in after.get("graph_break", {}).items()}
    return {reason: count for reason, count in grown.items() if count}


def _memory(graphs: list[GraphReport]) -> dict[str, dict[str, int]]:
    """Symmetric memory of every group that the graphs communicate over, by buffer, in bytes."""
    workspaces = {group: get_workspace(group) for graph in graphs for group in graph.groups}
    return {group: {info.name: info.nbytes for info in ws.memory()} for group, ws in workspaces.items() if ws}


def _lines(explanation: Explanation) -> list[str]:
    lines = [
        f"lowering: {'on' if explanation.active else 'OFF (call lowering.enable())'}",
        f"graphs: {explanation.compiled_graphs}, graph breaks: {sum(explanation.graph_breaks.values())}, "
        f"partitions: {explanation.partitions}, cudagraph skips: {explanation.cudagraph_skips}",
        "ops: " + (", ".join(f"{count} {name}" for name, count in explanation.ops.items()) or "none of moe_ep"),
    ]
    for number, graph in enumerate(explanation.graphs):
        lines += [f"graph {number}:", *_graph_lines(graph)]
    lines += [f"copy: {copy.kernel} beside {copy.op} ({copy.buffer})" for copy in explanation.copies]
    lines += ["copies around the ops: " + str(len(explanation.copies))]
    for group, buffers in explanation.symmetric_memory.items():
        listing = ", ".join(f"{name} {nbytes}" for name, nbytes in buffers.items()) or "none"
        lines.append(f"symmetric memory of group {group!r}, bytes: {listing}")
    return lines


def _graph_lines(graph: GraphReport) -> list[str]:
    lines = []
    if graph.before and graph.after:
        counts = zip(graph.before.totals().items(), graph.after.totals().values())
        lines.append("  a layer, by its graph: " + ", ".join(f"{name} {old} -> {new}" for (name, old), new in counts))
    for outcome in graph.outcomes:
        state = f"{len(outcome.done)} done, {len(outcome.refused)} refused" if outcome.enabled else "switched off"
        lines.append(f"  {outcome.name}: {state}")
        lines += [f"    + {done}" for done in outcome.done]
        lines += [f"    - {refusal.node}: {refusal.reason}" for refusal in outcome.refused]
    return lines

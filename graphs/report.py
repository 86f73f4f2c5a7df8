"""What a decode run reports, and how the compiler's part of it is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from lowering.torch_compat import CompileCounts, compile_counts


class GraphStats(NamedTuple):
    """One rank's compilation, from the first step to the last."""

    graph_breaks: int
    recompiles: int
    cuda_graphs: int


class CompileMeter:
    """Counts since its creation; what is compiled after ``warm()`` is a recompile."""

    def __init__(self) -> None:
        self._start = compile_counts()
        self._warm: CompileCounts | None = None

    def warm(self) -> None:
        """Say that everything has run once."""
        self._warm = compile_counts()

    def read(self) -> GraphStats:
        """Breaks since the start, graphs captured since ``warm()``, CUDA graphs recorded since the start."""
        now, warm = compile_counts(), self._warm or self._start
        return GraphStats(
            graph_breaks=now.graph_breaks - self._start.graph_breaks,
            recompiles=now.graphs - warm.graphs,
            cuda_graphs=now.cuda_graphs - self._start.cuda_graphs,
        )


def over_ranks(stats: Sequence[GraphStats]) -> GraphStats:
    """One line for all ranks: breaks and recompiles added up; CUDA graphs of a rank, 0 if any rank has none."""
    recorded = [s.cuda_graphs for s in stats]
    return GraphStats(
        graph_breaks=sum(s.graph_breaks for s in stats),
        recompiles=sum(s.recompiles for s in stats),
        cuda_graphs=max(recorded) if min(recorded) > 0 else 0,
    )


@dataclass(frozen=True)
class DecodeReport:
    """Result of one ``moe-ep decode``; the fields are the keys of ``--json``."""

    ranks: int
    device: str
    transport: str
    transport_reason: str
    graph_breaks: int
    recompiles: int
    cuda_graphs: int
    tokens: int  # decoded over all ranks, the first token of each prompt included
    tokens_per_s: float  # over all ranks, without the steps that compile
    matches_reference: bool | None  # None: not compared
    gpu_idle: float | None = None  # share of the traced time between two launches; None: not traced, or no GPU

    def as_dict(self) -> dict[str, object]:
        """Plain values, for JSON; ``gpu_idle`` only if it was measured."""
        values = asdict(self)
        return {name: value for name, value in values.items() if name != "gpu_idle" or value is not None}

    def rows(self) -> list[tuple[str, str]]:
        """Label and text, for a table."""
        match = {True: "yes, every token", False: "NO", None: "not compared"}[self.matches_reference]
        idle = [] if self.gpu_idle is None else [("GPU idle between replays", f"{self.gpu_idle:.2%}")]
        return [
            ("ranks", f"{self.ranks} on {self.device}"),
            ("transport", f"{self.transport} ({self.transport_reason})"),
            ("graph breaks", str(self.graph_breaks)),
            ("recompiles after warm-up", str(self.recompiles)),
            ("CUDA graphs per rank", str(self.cuda_graphs)),
            ("tokens", str(self.tokens)),
            ("tokens/s", f"{self.tokens_per_s:.1f}"),
            *idle,
            ("matches plain Hugging Face", match),
        ]

"""The rows that ``bench_decode`` measures: table, CSV, plot.

    python benchmarks/decode_report.py rows.csv plot.png     # the plot of all rows of a CSV, of several runs
"""

from __future__ import annotations

import csv
import sys
from dataclasses import Field, asdict, dataclass, fields
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass
class Line:
    """One row of the table; ``batch`` per rank, ``tokens_per_s`` over all ranks."""

    model: str
    layers: int
    ranks: int
    batch: int
    max_len: int
    filled: int
    variant: str
    step_ms: float
    tokens_per_s: float
    times_faster: float | None  # than transformers in this run
    cuda_graphs: int
    compile_s: float
    error: float  # of the first logits, median over rows; see ``compare``


def show(lines: list[Line], csv_path: Path | None, plot_path: Path | None) -> None:
    """A table on the terminal; rows appended to the CSV; a plot of them."""
    table = Table(*(field.name for field in fields(Line)))
    for line in lines:
        table.add_row(*map(str, asdict(line).values()))
    Console(width=200).print(table)
    if csv_path is not None:
        new = not csv_path.exists()
        csv_path.parent.mkdir(parents=True, exist_ok=True)
        with csv_path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Line)])
            if new:
                writer.writeheader()
            writer.writerows(map(asdict, lines))
        print("\n".join(scaling(csv_path)))
    if plot_path is not None:
        plot(lines, plot_path)


def scaling(csv_path: Path) -> list[str]:
    """How tokens/s grow with the ranks at an equal batch a rank, from a CSV; of equal rows the last counts."""
    with csv_path.open() as file:
        rows = {(r["variant"], int(r["batch"]), r["max_len"], int(r["ranks"])): r for r in csv.DictReader(file)}
    found = []
    for (variant, batch, max_len, ranks), row in sorted(rows.items()):
        fewer = rows.get((variant, batch, max_len, ranks // 2))
        if ranks % 2 == 0 and fewer is not None:
            grown = float(row["tokens_per_s"]) / float(fewer["tokens_per_s"])
            change = f"{grown:.2f} x the tokens/s from {ranks // 2} to {ranks} ranks"
            found.append(f"{variant}, batch {batch} a rank: {change}")
    return found


def plot(lines: list[Line], path: Path) -> None:
    """Step time over the batch of a rank: one panel for each number of ranks, one curve a variant and cache length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ranks = sorted({line.ranks for line in lines})
    figure, panels = pyplot.subplots(1, len(ranks), figsize=(4.2 * len(ranks), 3.6), sharey=True, squeeze=False)
    for axes, count in zip(panels[0], ranks, strict=True):
        here = [line for line in lines if line.ranks == count]
        for key in sorted({(line.variant, line.max_len) for line in here}):
            curve = sorted((line.batch, line.step_ms) for line in here if (line.variant, line.max_len) == key)
            axes.plot(*zip(*curve, strict=True), marker="o", label=f"{key[0]}, cache of {key[1]}")
        batches = sorted({line.batch for line in here})
        axes.set(title=f"{count} GPU{'s' * (count > 1)}", xlabel="sequences a rank", xscale="log", ylim=(0, None))
        axes.set_xticks(batches, list(map(str, batches)))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    panels[0][0].set_ylabel("ms a decode step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def read(path: Path) -> list[Line]:
    """The rows of a CSV."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [Line(**{field.name: _parse(field, row[field.name]) for field in fields(Line)}) for row in rows]


def _parse(field: Field, text: str) -> object:
    kinds = {"str": str, "int": int, "float": float, "float | None": lambda value: float(value) if value else None}
    return kinds[str(field.type)](text)


if __name__ == "__main__":
    plot(read(Path(sys.argv[1])), Path(sys.argv[2]))

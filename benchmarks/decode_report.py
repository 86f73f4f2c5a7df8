"""The rows that ``bench_decode`` measures: table, CSV, plot."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, fields
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
    """A table on the terminal; rows appended to the CSV; a plot of all of the CSV's rows."""
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
    """Step time over batch, one curve a variant and cache length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for key in sorted({(line.ranks, line.max_len, line.variant) for line in lines}):
        curve = [line for line in lines if (line.ranks, line.max_len, line.variant) == key]
        label = f"{key[2]}, {key[0]} GPU, cache {key[1]}"
        axes.plot([line.batch for line in curve], [line.step_ms for line in curve], marker="o", label=label)
    axes.set(xlabel="sequences a rank", ylabel="ms a decode step", xscale="log", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, bbox_inches="tight")

"""Which tiles ``fused_moe`` launches: a tuned table where there is one, heuristics for the rest.

A plan changes speed, never the meaning: every plan is right for every live count.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class Tiles:
    """One GEMM launch: rows x columns x depth of a tile (columns of I in the first GEMM: gate and up both).

    ``swap`` makes the weights the left operand of the tensor cores (bulk copies only): for few rows.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False


@dataclass(frozen=True)
class Plan:
    """``pairs > 0``: the few-rows kernels, that many pairs a chunk. ``pairs == 0``: align, then persistent kernels.

    ``group`` is the number of row blocks that share a weight tile in L2; ``programs`` the persistent
    programs per SM; ``small_m`` the rows of an expert's last block where that suffices (0: never);
    ``tma`` bulk copies of weights where their strides allow; ``pdl`` programmatic dependent launch;
    ``prefetch`` bytes a program of the second few-rows kernel asks L2 for before the first one ends (16 | prefetch).
    """

    gate_up: Tiles
    down: Tiles
    pairs: int = 0
    group: int = 8
    programs: int = 1
    small_m: int = 0
    tma: bool = True
    pdl: bool = True
    prefetch: int = 0

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Plan:
        own = {field.name: entry[field.name] for field in fields(Plan) if field.name in entry}
        return Plan(**own | {"gate_up": Tiles(**entry["gate_up"]), "down": Tiles(**entry["down"])})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Shape:
    """What a plan may depend on: sizes of one rank's layer and its typical number of live rows."""

    experts: int
    top_k: int
    hidden: int
    inner: int
    tokens: int

    def key(self) -> str:
        return f"E{self.experts}-K{self.top_k}-H{self.hidden}-I{self.inner}"


FEW_PAIRS = 1024  # above it, finding the routing in every program costs more than an align launch


def _power_of_two(value: int, low: int, high: int) -> int:
    return min(max(1 << max(value - 1, 0).bit_length(), low), high)


def default_plan(shape: Shape) -> Plan:
    """Heuristics from the sizes alone; ``tune`` may beat them."""
    pairs = shape.tokens * shape.top_k
    rows = _power_of_two(shape.tokens, 16, 64)  # a token picks an expert once: more rows are rare
    if pairs <= FEW_PAIRS:
        tiles = Tiles(rows, 32, 128, 4, 4, swap=True)
        return Plan(tiles, replace(tiles, block_n=64), pairs=_power_of_two(pairs, 16, FEW_PAIRS))
    if pairs // shape.experts <= 64:
        tiles = Tiles(64, 64, 64, 4, 4)
        return Plan(tiles, replace(tiles, block_n=128), programs=2)
    return Plan(Tiles(128, 128, 64, 8, 4), Tiles(128, 256, 64, 8, 4), small_m=64)


def invariant_plan(shape: Shape) -> Plan:
    """One tile shape for all counts: a row meets the same instructions in the same order whatever the batch is."""
    gate_up, down = Tiles(64, 32, 64, 4, 4, swap=True), Tiles(64, 64, 64, 4, 4, swap=True)
    pairs = shape.tokens * shape.top_k
    few = _power_of_two(pairs, 16, FEW_PAIRS) if pairs <= FEW_PAIRS else 0
    return Plan(gate_up, down, pairs=few, programs=2)


@cache
def load_table(gpu: str) -> dict[str, dict[str, Any]]:
    """``{shape key: {tokens: plan}}`` of one GPU name; empty where nothing was tuned."""
    path = TABLES / f"{gpu}.json"
    return json.loads(path.read_text())["plans"] if path.exists() else {}


def table_name(gpu: str) -> str:
    return gpu.lower().replace(" ", "_").replace("/", "_")


def choose_plan(shape: Shape, gpu: str, batch_invariant: bool = False) -> Plan:
    """The tuned plan of the nearest token count above (or the largest below), else the default."""
    if batch_invariant:
        return invariant_plan(shape)
    tuned = load_table(table_name(gpu)).get(shape.key())
    if not tuned:
        return default_plan(shape)
    counts = sorted(map(int, tuned))
    nearest = next((count for count in counts if count >= shape.tokens), counts[-1])
    return Plan.from_json(tuned[str(nearest)])

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
WIDE_ROWS = 192  # of a block whose tiles are two products, of 128 and 64 rows


@dataclass(frozen=True)
class Tiles:
    """One GEMM launch: rows x columns x depth of a tile (columns of I in the first GEMM: gate and up both).

    ``swap`` makes the weights the left operand of the tensor cores (bulk copies only): for few rows.
    ``block_m = WIDE_ROWS`` (many rows, both GEMMs): see ``fused_moe_wide_kernels``; where they do not suit, 128 rows.
    ``flat`` (many rows) runs all tiles of a program as one pipelined loop. ``special`` (many rows, second GEMM, bulk
    copies) gives loads, and each half of ``block_m = 128``, warps of their own, ``num_warps`` each.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool = False
    flat: bool = False
    special: bool = False


@dataclass(frozen=True)
class Plan:
    """``pairs > 0``: the few-rows kernels, that many pairs a chunk. ``pairs == 0``: align, then persistent kernels.

    ``group`` is the number of row blocks that share a weight tile in L2; ``programs`` the persistent programs per SM;
    ``rest`` (many rows, blocks of 128, ``programs`` 1): a last round with few tiles is launched in parts of tiles, 2 or
    4 of each; 0: as the others;
    ``tma`` bulk copies of weights where their strides allow; ``pdl`` programmatic dependent launch;
    ``prefetch`` bytes a program of the second few-rows kernel asks L2 for before the first one ends (16 | prefetch),
    the first ones of each of its columns.
    ``slots`` (few rows): programs for each tile, about as many as there are local pairs; more pairs are looped over.
    0: one for each pair of a chunk, or for each expert where these are fewer.
    ``lone`` (many rows): the second GEMM writes rows with one local pair to the result where it can.
    ``keep`` (blocks of powers of two) asks L2 to evict other lines before those that a GEMM writes and the next kernel
    reads.
    ``invariant``: whether ``moe-ep tune`` found that it gives the bits of ``invariant_plan``; None: it was not asked.
    """

    gate_up: Tiles
    down: Tiles
    pairs: int = 0
    group: int = 8
    programs: int = 1
    rest: int = 0
    tma: bool = True
    pdl: bool = True
    prefetch: int = 0
    slots: int = 0
    lone: bool = False
    keep: bool = False
    invariant: bool | None = None

    @staticmethod
    def from_json(entry: dict[str, Any]) -> Plan:
        own: dict[str, Any] = {field.name: entry[field.name] for field in fields(Plan) if field.name in entry}
        own |= {name: Tiles(**entry[name]) for name in ("gate_up", "down")}
        return Plan(**own)

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


FEW_PAIRS = 128  # above it (H200, Qwen3-30B, 512 pairs: 400 against 282 us) an align launch pays
TALLEST_BLOCK = 128  # rows; a tuned plan with shorter blocks says nothing of more rows than it was measured with
MAX_FEW_PAIRS = 1024  # what one chunk of the few-rows kernels holds
KEPT_BYTES = 16 << 20  # of activations and pairs that L2 is asked to keep; an H200's holds 50 MB


def _power_of_two(value: int, low: int, high: int) -> int:
    return min(max(1 << max(value - 1, 0).bit_length(), low), high)


def keeping(plan: Plan, shape: Shape) -> Plan:
    """``plan`` with ``keep`` on where what both GEMMs write is small (16-bit elements), and off elsewhere.

    All M * K pairs are counted, whoever has them. A rule, because ``tune`` cannot tell: what is kept outlives its
    flush, so that a repeated call finds more than a layer does. From graphs of layers (``bench_fused_moe --layers``).
    """
    return replace(plan, keep=2 * shape.tokens * shape.top_k * (shape.hidden + shape.inner) <= KEPT_BYTES)


def default_plan(shape: Shape) -> Plan:
    """Heuristics from the sizes alone, chosen from tuned plans of an H200; ``tune`` may beat them."""
    return keeping(_default_tiles(shape), shape)


def _default_tiles(shape: Shape) -> Plan:
    pairs = shape.tokens * shape.top_k
    mean = pairs / shape.experts  # with experts spread over ranks the true mean is smaller
    if pairs <= FEW_PAIRS:
        rows = _power_of_two(shape.tokens, 16, 64)  # a token picks an expert once: more rows are rare
        tiles, chunk = Tiles(rows, 32, 128, 4, 4, swap=True), _power_of_two(pairs, 16, FEW_PAIRS)
        return Plan(tiles, replace(tiles, block_n=64), pairs=chunk, prefetch=65536)
    if mean < 32:  # weights are the left operand; short blocks
        rows = _power_of_two(int(2 * mean), 16, 64)
        return Plan(Tiles(rows, 64, 128, 4, 4, swap=True), Tiles(rows, 128, 64, 4, 4, swap=True), programs=16)
    if mean <= 64:
        return Plan(Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 4), programs=16)
    return Plan(Tiles(128, 128, 64, 8, 4), Tiles(128, 256, 64, 8, 3))


def invariant_plan(shape: Shape) -> Plan:
    """Plans between which a row's bits do not change: ``default_plan`` with the weights as left operand throughout.

    Every element is then a chain of ``wgmma`` over 16 columns at a time from zero on, however many rows are beside it
    and however the depth is cut. Without bulk copies that operand order is not to be had and the instruction depends
    on the rows of a tile: then one tile serves all counts.
    """
    if _streamed(shape):
        plan = default_plan(shape)
        return replace(plan, gate_up=replace(plan.gate_up, swap=True), down=replace(plan.down, swap=True))
    pairs = shape.tokens * shape.top_k
    gate_up, down = Tiles(16, 32, 128, 4, 4, swap=True), Tiles(16, 64, 128, 4, 4, swap=True)
    if pairs <= FEW_PAIRS:
        return Plan(gate_up, down, pairs=_power_of_two(pairs, 16, FEW_PAIRS), prefetch=65536)
    return Plan(gate_up, down, programs=16)


def _streamed(shape: Shape) -> bool:
    """Whether bulk copies can bring the weights: strides are multiples of 16 bytes."""
    return shape.hidden % 8 == 0 and shape.inner % 8 == 0


@cache
def load_table(gpu: str) -> dict[str, dict[str, Any]]:
    """``{shape key: {tokens: plan}}`` of one GPU name; empty where nothing was tuned."""
    path = TABLES / f"{gpu}.json"
    return json.loads(path.read_text())["plans"] if path.exists() else {}


def table_name(gpu: str) -> str:
    return gpu.lower().replace(" ", "_").replace("/", "_")


def choose_plan(shape: Shape, gpu: str, batch_invariant: bool = False) -> Plan:
    """The tuned plan of the nearest token count above (or the largest below, if for many rows), else the default.

    ``batch_invariant`` takes it where it has the bits of ``invariant_plan``: by measurement, or, if nobody measured it,
    as its tiles have the weights as left operand.
    """
    plan = _tuned_plan(shape, gpu)
    if not batch_invariant:
        return plan or default_plan(shape)
    fixed = invariant_plan(shape)
    if plan is None or plan.invariant is False or not (plan.tma and _streamed(shape)):
        return fixed
    return plan if plan.invariant else _weights_left(plan, fixed)


def _weights_left(plan: Plan, fixed: Plan) -> Plan:
    """``plan``, or for few rows with tiles of ``fixed`` where its own have the weights on the right; else ``fixed``."""
    if plan.gate_up.swap and plan.down.swap:
        return plan
    if not plan.pairs:  # both GEMMs share the blocks of align
        return fixed
    gate_up, down = (
        own if own.swap else replace(other, block_m=own.block_m)
        for own, other in ((plan.gate_up, fixed.gate_up), (plan.down, fixed.down))
    )
    return replace(plan, gate_up=gate_up, down=down)


def _tuned_plan(shape: Shape, gpu: str) -> Plan | None:
    tuned = load_table(table_name(gpu)).get(shape.key())
    if not tuned:
        return None
    counts = sorted(map(int, tuned))
    nearest = next((count for count in counts if count >= shape.tokens), counts[-1])
    plan = Plan.from_json(tuned[str(nearest)])
    if nearest >= shape.tokens:
        return plan
    return keeping(plan, shape) if plan.gate_up.block_m >= TALLEST_BLOCK else None

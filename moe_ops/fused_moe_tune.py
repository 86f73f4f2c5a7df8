"""Measure plans of ``fused_moe`` on the GPU at hand and keep the best in a table. Never needed for correctness."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property, partial
from itertools import islice
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from .errors import ArgumentError
from .fused_moe import launch_fused_moe
from .fused_moe_config import (
    FEW_PAIRS,
    MAX_FEW_PAIRS,
    TABLES,
    WIDE_ROWS,
    Plan,
    Shape,
    Tiles,
    default_plan,
    invariant_plan,
    keeping,
    load_table,
    table_name,
)
from .graph_timer import GraphTimer
from .random_layer import MAX_ERROR, Answer, make_order_tell, random_layer

_SHARED_BYTES = 227 << 10  # of one SM of an H100 or H200
_COMPILE_THREADS = 12
_LONG_US = 1500.0  # calls that take longer vary less and are repeated less
_DECIDED = 4, 40  # plans of a search that are measured once more, and samples of each


def _fits(tiles: Tiles, parts: int) -> bool:
    stage = (tiles.block_m + parts * tiles.block_n) * tiles.block_k * 2
    return tiles.num_stages * stage <= _SHARED_BYTES - 2048


def _few_tiles(rows: int, parts: int) -> Iterator[Tiles]:
    """Weight-streaming tiles; ``parts`` 2 for gate and up, whose tile is twice as wide as ``block_n``."""
    for wide, depth, stages in (
        (64, 128, 3), (64, 128, 4), (64, 128, 6), (64, 256, 3), (64, 256, 5), (64, 64, 6), (64, 64, 10),
        (128, 64, 4), (128, 64, 5), (128, 64, 6), (128, 128, 3), (128, 128, 5),
        (256, 64, 3), (256, 64, 4), (256, 128, 2),
    ):  # fmt: skip
        for warps in (4, 8) if wide == 256 else (4,):
            yield Tiles(rows, wide // parts, depth, warps, stages, swap=True)
    if rows <= 32:
        for wide, depth, stages in (
            (16, 256, 4), (16, 512, 3), (32, 128, 5), (32, 256, 3), (32, 256, 6), (64, 128, 4), (64, 256, 3),
        ):  # fmt: skip
            yield Tiles(rows, wide // parts, depth, 4, stages)


def _many_tiles(rows: int, parts: int) -> Iterator[Tiles]:
    for wide, depth, warps, stages in (
        (64, 128, 4, 4), (128, 64, 4, 3), (128, 64, 4, 4), (128, 128, 4, 3), (128, 64, 8, 4), (128, 128, 8, 3),
        (256, 64, 4, 2), (256, 64, 8, 3), (256, 64, 8, 4), (256, 128, 8, 2), (256, 32, 8, 6),
    ):  # fmt: skip
        if rows * wide > 64 * 256 * (warps // 4):  # accumulators: 128 registers a thread
            continue
        tiles = Tiles(rows, wide // parts, depth, warps, stages)
        yield tiles
        yield replace(tiles, flat=True)
        if rows < 128 and wide > 64:
            yield replace(tiles, swap=True)
    if rows == 128 and parts == 1:
        for stages in (3, 4):
            yield Tiles(rows, 256, 64, 4, stages, special=True)


def _wide_tiles(parts: int) -> Iterator[Tiles]:
    for wide, depth, stages in ((256, 64, 3), (128, 64, 4), (256, 32, 6)):
        yield Tiles(WIDE_ROWS, wide // parts, depth, 8, stages)


def _few_starts(shape: Shape) -> Iterator[Plan]:
    chunk = 1 << max(shape.tokens * shape.top_k - 1, 15).bit_length()
    for rows in (16, 32, 64):
        if rows < 2 * max(shape.tokens, 16):
            tiles = Tiles(rows, 32, 128, 4, 4, swap=True)
            yield Plan(tiles, replace(tiles, block_n=64), pairs=chunk, prefetch=65536)
    yield Plan(Tiles(16, 16, 256, 4, 3), Tiles(16, 32, 256, 4, 3), pairs=chunk, prefetch=65536)
    yield Plan(Tiles(16, 16, 128, 4, 5), Tiles(16, 32, 128, 4, 5), pairs=chunk, prefetch=65536, tma=False)


def _many_starts(shape: Shape) -> Iterator[Plan]:
    pairs = shape.tokens * shape.top_k
    if pairs <= 64 * shape.experts:
        for rows in (16, 32, 64):
            yield Plan(Tiles(rows, 64, 128, 4, 4, swap=True), Tiles(rows, 128, 64, 4, 4, swap=True), programs=16)
    if pairs >= 8 * shape.experts:
        yield Plan(Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 4, 4), programs=16)
        yield Plan(Tiles(64, 128, 64, 8, 4), Tiles(64, 256, 64, 8, 4))
        yield Plan(Tiles(128, 128, 64, 8, 4), Tiles(128, 256, 64, 8, 3))
        yield Plan(Tiles(128, 64, 64, 4, 3), Tiles(128, 128, 64, 4, 3), programs=2)
        yield Plan(Tiles(WIDE_ROWS, 128, 64, 8, 3), Tiles(WIDE_ROWS, 256, 64, 8, 3), group=4)


def starting_plans(shape: Shape) -> Iterator[Plan]:
    """One plan for each way of launching that may suit ``shape``; the tiles are varied from there."""
    yield from (keeping(plan, shape) for plan in _starts(shape))


def _starts(shape: Shape) -> Iterator[Plan]:
    pairs = shape.tokens * shape.top_k
    yield default_plan(shape)
    if pairs <= MAX_FEW_PAIRS:
        yield from _few_starts(shape)
    if pairs >= FEW_PAIRS // 2:
        yield from _many_starts(shape)


def neighbours(plan: Plan, which: str) -> Iterator[Plan]:
    """``plan`` with other tiles for one of its two GEMMs (``which``: gate_up or down)."""
    rows, parts = plan.gate_up.block_m, 2 if which == "gate_up" else 1
    if rows == WIDE_ROWS:
        candidates = _wide_tiles(parts)
    else:
        candidates = _few_tiles(rows, parts) if plan.pairs or rows < 64 else _many_tiles(rows, parts)
    for tiles in candidates:
        if _fits(tiles, parts):
            yield replace(plan, **{which: tiles})


def launching_variants(plan: Plan) -> Iterator[Plan]:
    """``plan`` with other persistent grids and L2 groups, or another prefetch; without dependent launch."""
    yield replace(plan, pdl=not plan.pdl)
    if plan.pairs:
        for size in (0, 16384, 65536, 262144):
            yield replace(plan, prefetch=size)
        for slots in (0, 2, 4, 8, 16):
            yield replace(plan, slots=slots)
        return
    yield replace(plan, lone=not plan.lone)
    for group in (1, 2, 4, 8, 16, 32):
        yield replace(plan, group=group)
    for programs in (1, 2, 3, 4, 16):
        yield replace(plan, programs=programs)
    if plan.gate_up.block_m == 128:
        for parts in (2, 4):
            yield replace(plan, rest=parts)


class Tuner:
    """Coordinate descent over plans for one shape: way of launching, first GEMM, second GEMM, grid."""

    def __init__(self, shape: Shape, total_experts: int, timer: GraphTimer, device: torch.device):
        self.shape, self._timer = shape, timer
        (self.hidden, self.ids, self.weights), (self.gate_up, self.down) = random_layer(shape, total_experts, device)
        self.live = torch.tensor([shape.tokens], dtype=torch.int32, device=device)
        self._none = torch.zeros_like(self.live)
        self.results: dict[Plan, float] = {}

    def call(self, plan: Plan | None, live: Tensor | None = None) -> Tensor:
        return launch_fused_moe(
            self.hidden, self.ids, self.weights, self.gate_up, self.down, self.live if live is None else live, 0,
            plan=plan, tokens_hint=self.shape.tokens,
        )  # fmt: skip

    @cached_property
    def _answer(self) -> Answer:
        return Answer(self)

    def _is_right(self, plan: Plan) -> bool:
        error = self._answer.error_of(self.call(plan))
        if not error <= MAX_ERROR:
            print(f"  skipped {plan}: relative error {error:.1e}", flush=True)
        return error <= MAX_ERROR

    def _compiles(self, plan: Plan) -> bool:
        try:
            self.call(plan, self._none)
        except Exception as error:  # a candidate may exceed the registers or the shared memory of this GPU
            print(f"  skipped {plan}: {str(error).splitlines()[0][:120]}", flush=True)
            return False
        return True

    def best(self, plans: Iterable[Plan], repeats: int) -> Plan:
        """Measure what was not measured yet; return the fastest of ``plans``."""
        wanted = list(dict.fromkeys(plans))
        fresh = [plan for plan in wanted if plan not in self.results]
        # synchronize: a new thread has no current context, which tensor descriptors need
        with ThreadPoolExecutor(_COMPILE_THREADS, initializer=torch.cuda.synchronize) as pool:
            works = list(pool.map(self._compiles, fresh))
        torch.cuda.synchronize()
        for plan, usable in zip(fresh, works, strict=True):
            self.results[plan] = self._timer.median_us(lambda p=plan: self.call(p), repeats) if usable else inf
        return min(wanted, key=self.results.__getitem__)

    def decide(self, plans: list[Plan], rounds: int) -> Plan:
        """The fastest of measured ``plans`` by samples taken in turns: the least of many medians is partly luck."""
        samples = self._timer.in_turns([partial(self.call, plan) for plan in plans], rounds)
        self.results |= {plan: median(each) for plan, each in zip(plans, samples, strict=True)}
        return min(plans, key=self.results.__getitem__)

    def search(self, repeats: int = 8, finalists: int = 2) -> tuple[Plan, float]:
        """The fastest plan found and its microseconds."""
        starts = list(starting_plans(self.shape))
        if self.results[self.best(starts, repeats)] > _LONG_US:
            repeats = min(repeats, 3)
        starts.sort(key=self.results.__getitem__)
        for plan in starts[:finalists]:
            for vary in (partial(neighbours, which="gate_up"), partial(neighbours, which="down"), launching_variants):
                plan = self.best([plan, *vary(plan)], repeats)
        number, rounds = _DECIDED
        ranked = [plan for plan in sorted(self.results, key=self.results.__getitem__) if self.results[plan] < inf]
        usable = list(islice(filter(self._is_right, ranked), number))
        if not usable:
            raise ArgumentError(f"tune: no plan of {self.shape} is right on this GPU; see above what each said.")
        plan = self.decide(usable, rounds)
        return plan, self.results[plan]

    def has_invariant_bits(self, plan: Plan) -> bool | None:
        """Whether ``plan`` adds up in the order of ``invariant_plan``, None where that one does not run on this GPU.

        Of this count; that ``invariant_plan`` adds alike for all counts is its design. Changes the layer: ask it last.
        """
        fixed = invariant_plan(self.shape)
        if not self._compiles(fixed):
            return None
        make_order_tell(self.hidden, self.gate_up, self.down)
        return torch.equal(self.call(plan), self.call(fixed))


def _read(path: Path, gpu: str) -> dict[str, Any]:
    """The table at ``path``, an empty one where there is none yet. Raises ``ArgumentError`` before time is spent."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ArgumentError(f"tune: {path} can't be written; pass with --out a file in a folder that can.")
    if not path.exists():
        return {"gpu": gpu, "plans": {}}
    try:
        table = json.loads(path.read_text())
        mine = table["plans"] is not None and table["gpu"] == gpu
    except (ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            f"tune: {path} is no table of plans ({error!r}); move it away or pass another --out."
        ) from None
    if not mine:
        raise ArgumentError(f"tune: {path} is of {table['gpu']}, this GPU is {gpu}; pass another --out.")
    return table


def save_plan(path: Path, gpu: str, shape: Shape, plan: Plan, microseconds: float, source: str) -> None:
    """Add one entry to a table, which later calls read if it is the installed one."""
    table = _read(path, gpu)
    entry = plan.to_json() | {"us": round(microseconds, 2), "from": source}
    plans = table["plans"].setdefault(shape.key(), {})
    plans[str(shape.tokens)] = entry
    table["plans"][shape.key()] = dict(sorted(plans.items(), key=lambda item: int(item[0])))
    whole = path.with_suffix(".new")  # an interrupt in the middle of writing must not cost the table
    whole.write_text(json.dumps(table, indent=1) + "\n")
    whole.replace(path)
    load_table.cache_clear()


def tuned_already(path: Path, shape: Shape) -> bool:
    return path.exists() and str(shape.tokens) in json.loads(path.read_text())["plans"].get(shape.key(), {})


def tune(
    shapes: Iterable[tuple[Shape, int]],
    *,
    out: Path | None = None,
    source: str = "moe-ep tune",
    progress: Callable[[str], None] = print,
) -> Path:
    """Tune every ``(shape, total experts)`` that the table at ``out`` lacks, one entry written at a time (so an
    interrupted run resumes). Needs a CUDA device. Returns the table's path."""
    device = torch.device("cuda", torch.cuda.current_device())
    gpu = torch.cuda.get_device_name(device)
    path, timer = out or TABLES / f"{table_name(gpu)}.json", GraphTimer(device)
    _read(path, gpu)
    for shape, total_experts in shapes:
        if tuned_already(path, shape):
            progress(f"{shape.key()} T={shape.tokens}: already in {path.name}")
            continue
        tuner = Tuner(shape, total_experts, timer, device)
        plan, microseconds = tuner.search()
        plan = replace(plan, invariant=tuner.has_invariant_bits(plan))
        save_plan(path, gpu, shape, plan, microseconds, source)
        progress(f"{shape.key()} T={shape.tokens}: {microseconds:.1f} us, {len(tuner.results)} plans, {plan}")
        del tuner
        torch.cuda.empty_cache()
    return path

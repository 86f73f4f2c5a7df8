"""Random ``fused_moe`` calls, and the check of one against fp64: for every backend and device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_ops.moe_reference import fused_moe_reference
from tests.tolerances import FUSED_MOE, relative_error

FORMS: dict[str, dict[str, Any]] = {
    "swiglu": {},
    "deepseek-v4": {"limit": 0.7},
    "gpt-oss": {"activation": "swiglu_oai", "alpha": 1.702, "limit": 0.5, "transposed": True, "interleaved": True,
                "bias": True},
    "privacy-filter": {"activation": "swiglu_oai", "alpha": 1.702, "limit": 0.5, "transposed": True, "bias": True},
    "minimax-m3": {"activation": "swiglu_oai", "alpha": 1.3, "limit": 0.9},
    "gemma": {"activation": "gelu_tanh"},
    "gelu": {"activation": "gelu", "interleaved": True},
    "nemotron": {"activation": "relu2", "gated": False},
    "ungated-transposed": {"activation": "gelu", "gated": False, "transposed": True, "bias": True},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Sizes of one call: ``rows`` of which ``live`` (all if None) count; ids go to ``experts`` in all."""

    rows: int = 7
    top_k: int = 2
    experts: int = 8
    local: int = 4
    start: int = 2
    hidden: int = 48
    inner: int = 40
    live: int | None = None
    routing: str = "random"  # random: also -1 and far out of range; one: every pair to one local expert; none
    index_dtype: torch.dtype = torch.int64
    weight_dtype: torch.dtype = torch.float32
    seed: int = 0


def _ids(case: Case, make: torch.Generator) -> Tensor:
    size = case.rows, case.top_k
    if case.routing == "one":
        ids = torch.full(size, case.start + case.local - 1)
    elif case.routing == "none":
        ids = torch.full(size, case.start + case.local)
    else:
        ids = torch.randint(-1, case.experts + 1, size, generator=make)
        wild = torch.rand(size, generator=make) < 0.05
        far = 2**33 + case.start if case.index_dtype == torch.int64 else 2**31 - 1
        ids = torch.where(wild, far, ids)
    return ids.to(case.index_dtype)


def build(
    case: Case, form: dict[str, Any], dtype: torch.dtype, device: str = "cpu"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments and keyword arguments; rows that are not live hold NaN, and ids that would be local."""
    make = torch.Generator().manual_seed(case.seed)
    options = {name: value for name, value in form.items() if name != "bias"}
    transposed, width = options.get("transposed", False), case.inner * (2 if options.get("gated", True) else 1)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(size, generator=make) * scale).to(dtype).to(device)

    hidden, ids = normal(case.rows, case.hidden), _ids(case, make)
    live = case.rows if case.live is None else case.live
    hidden[live:] = float("nan")
    ids[live:] = case.start
    up_size = (case.hidden, width) if transposed else (width, case.hidden)
    down_size = (case.inner, case.hidden) if transposed else (case.hidden, case.inner)
    weights = torch.rand(case.rows, case.top_k, generator=make).to(case.weight_dtype)
    if form.get("bias"):
        options["gate_up_bias"], options["down_bias"] = normal(case.local, width), normal(case.local, case.hidden)
    arguments = (
        hidden, ids.to(device), weights.to(device), normal(case.local, *up_size, scale=case.hidden**-0.5),
        normal(case.local, *down_size, scale=case.inner**-0.5),
        torch.tensor([live], dtype=torch.int32, device=device), case.start,
    )  # fmt: skip
    return arguments, options


def oracle(arguments: tuple[Any, ...], options: dict[str, Any]) -> Tensor:
    """fp64 on the arguments as they are, live rows only."""
    wide = [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    more = {n: v.double() if isinstance(v, Tensor) else v for n, v in options.items()}
    return fused_moe_reference(*wide, **more)[: int(arguments[5])]


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor that torch makes without values holds NaN, or its integer type's largest value.

    So the scratch of a launcher does: who reads a row of it that nobody wrote shows.
    """
    assert torch.utils.deterministic.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def check(
    run: Callable[..., Tensor], case: Case, form: dict[str, Any], dtype: torch.dtype, device: str = "cpu", **extra: Any
) -> Tensor:
    """Run one call in poisoned memory, compare its live rows with fp64, and return the whole result.

    On a GPU once more without poison: filling comes between launches that otherwise overlap.
    """
    arguments, options = build(case, form, dtype, device)
    with poisoned_memory():
        got = run(*arguments, **options, **extra)
    wanted = oracle(arguments, options)
    live = got[: wanted.shape[0]]
    if device == "cuda":
        assert torch.equal(run(*arguments, **options, **extra)[: live.shape[0]], live)
    assert got.dtype == dtype and got.shape == arguments[0].shape
    assert torch.isfinite(live).all()
    error = relative_error(live, wanted)
    assert error <= FUSED_MOE[dtype], f"relative error {error:.2e} for {case} {form} {extra}"
    return got

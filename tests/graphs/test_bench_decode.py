"""The decode benchmark: a dry run on the CPU, and what it makes of a profile."""

from __future__ import annotations

import csv
import importlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(params=["kernel_times", "decode_report"])
def module(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A file of ``benchmarks``, imported as its scripts import it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(request.param)


def test_dry_run_compares_and_writes_rows(tmp_path: Path):
    out = tmp_path / "decode.csv"
    command = [sys.executable, str(BENCHMARKS / "bench_decode.py"), "--model", "tiny", "--layers", "2", "--batch", "3"]
    options = ["--max-len", "64", "--steps", "2", "--backend", "eager", "--csv", str(out)]
    settings = os.environ | {"PYTHONPATH": os.pathsep.join([str(BENCHMARKS.parent), os.environ["PYTHONPATH"]])}
    done = subprocess.run([*command, *options], env=settings, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    with out.open() as file:
        theirs, ours = csv.DictReader(file)
    assert (theirs["variant"], ours["variant"]) == ("transformers", "moe_ep")
    assert theirs["batch"] == ours["batch"] == "3"
    assert 0 < float(ours["error"]) < 0.05  # of bf16 logits: equal up to roundings, and compared at all
    assert float(ours["times_faster"]) == pytest.approx(float(theirs["step_ms"]) / float(ours["step_ms"]), rel=0.01)


@pytest.mark.parametrize("module", ["kernel_times"], indirect=True)
def test_profile_adds_up_by_group_and_tells_replays_apart(module: ModuleType):
    """Two replays of three kernels and one lone launch between them, which counts as idle time between."""
    kernels = [
        module.Kernel("gate_up_few_kernel", 0, 6, 1), module.Kernel("nvjet_sm90", 7, 2, 1),
        module.Kernel("_attend_kernel", 9, 1, 1),
        module.Kernel("lone_copy", 14, 1, 9),
        module.Kernel("gate_up_few_kernel", 20, 4, 2), module.Kernel("nvjet_sm90", 24, 2, 2),
        module.Kernel("_attend_kernel", 26, 4, 2),
    ]  # fmt: skip
    found = module.summarise(kernels)
    assert found.step_us == 15
    assert found.groups == {"experts": (5, 1), "attention": (2.5, 1), "dense GEMM": (2, 1)}
    assert found.idle_inside == pytest.approx(1 / 30) and found.idle_between == pytest.approx(9 / 30)
    assert "15.0 us" in found.text()


@pytest.mark.parametrize("module", ["decode_report"], indirect=True)
def test_scaling_compares_equal_batches_of_a_rank(module: ModuleType, tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text(
        "variant,batch,max_len,ranks,tokens_per_s\nmoe_ep,8,320,2,100\nmoe_ep,8,320,4,190\nmoe_ep,32,320,4,500\n"
    )
    assert module.scaling(path) == ["moe_ep, batch 8 a rank: 1.90 x the tokens/s from 2 to 4 ranks"]

"""The checks of ``bench_fused_moe.py --steps`` on the kernels themselves, in Triton's interpreter."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import moe_steps
from shapes import SHAPES

CPU = torch.device("cpu")


def test_align_passes_its_check(monkeypatch):
    monkeypatch.setattr(moe_steps, "CALLS", 2)
    for step in moe_steps.align_steps(8, 2, 16, CPU):
        step.check()


def test_the_sum_passes_its_check(monkeypatch):
    monkeypatch.setattr(moe_steps, "CALLS", 2)
    layer = replace(SHAPES["qwen3-30b-ep8"], local_experts=4, experts=16, top_k=3, hidden=64)
    for step in moe_steps.sum_steps(layer, 5, CPU):
        step.check()

"""Products in Triton's interpreter that add as a Hopper GPU's tensor cores do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

_COLUMNS = 16  # of bf16 or fp16, that one instruction adds to an fp32 accumulator


def _product(builder: Any, left: Any, right: Any, acc: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """``acc + left @ right``, 16 columns at a time from the first on; 16 products are added up exactly.

    numpy's order depends on the sizes of both, an instruction's does not. (Any divisor of a tile's depth would prove as
    much of a kernel: that its elements are chains. How many an instruction adds is the GPU's.)
    """
    total = acc.data
    for k in range(0, left.data.shape[-1], _COLUMNS):
        part = slice(k, k + _COLUMNS)
        products = left.data[..., part].astype(np.float64) @ right.data[..., part, :].astype(np.float64)
        total = (total + products).astype(acc.data.dtype)
    return type(acc)(total, acc.dtype.scalar)


@pytest.fixture
def tensor_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no GPU."""
    if not torch.cuda.is_available():
        from triton.runtime.interpreter import InterpreterBuilder

        monkeypatch.setattr(InterpreterBuilder, "create_dot", _product)

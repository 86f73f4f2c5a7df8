"""Kernels of our own ops are compiled in threads; Triton itself is replaced by a record of what it was asked for."""

import logging
import threading
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph

import moe_ops  # noqa: F401  registers the ops
from lowering import compile_ahead as ahead
from lowering.effects import short_name
from moe_ops.registration import CUDA_IMPLEMENTATIONS

jit = pytest.importorskip("triton.runtime.jit", reason="Triton exists for Linux only; CI has it")


def _kernel(x, n):
    pass


KERNEL = jit.JITFunction(_kernel)
OP = torch.ops.moe_ep.thin_linear.default


class Pair(NamedTuple):
    data: Any
    stride: int


@pytest.fixture
def asked(monkeypatch) -> list[tuple]:
    """``(arguments, grid, warmup)`` of every call that reached Triton."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    calls: list[tuple] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **_: Any) -> None:
        calls.append((args, grid, warmup))

    monkeypatch.setattr(jit.JITFunction, "run", run)
    monkeypatch.setattr(TensorDescriptor, "__post_init__", TensorDescriptor.__post_init__)
    monkeypatch.setattr(ahead, "_under_way", [])
    return calls


def finish() -> None:
    """Wait as the next launch does, and launch."""
    KERNEL[(7,)](1, 2)


def test_a_rehearsed_launch_compiles_for_what_it_was_given(asked):
    x = torch.zeros(4, dtype=torch.bfloat16)
    ahead.rehearse([lambda: KERNEL[(100,)](Pair(x, 3), 5)])
    finish()
    ((pair, number), grid, warmup), launched = asked
    assert type(pair) is Pair and type(pair.data) is jit.MockTensor and pair.data.dtype == torch.bfloat16
    assert (pair.stride, number, grid, warmup) == (3, 5, (1,), True)
    assert launched == ((1, 2), (7,), False), "a launch of another thread is a launch, behind the rehearsals"


def test_launches_wait_for_rehearsals(asked):
    go = threading.Event()
    threading.Timer(0.3, go.set).start()
    ahead.rehearse([lambda: (go.wait(), KERNEL[(1,)](3, 4))])
    finish()
    assert [warmup for _, _, warmup in asked] == [True, False]


def test_triton_is_its_own_again_behind_the_rehearsals(asked):
    from triton.tools.tensor_descriptor import TensorDescriptor

    own = jit.JITFunction.run, TensorDescriptor.__post_init__
    for _ in range(2):
        ahead.rehearse([lambda: KERNEL[(1,)](3, 4)])
        assert jit.JITFunction.run is not own[0]
        finish()
        assert (jit.JITFunction.run, TensorDescriptor.__post_init__) == own


def test_a_failure_is_left_to_the_launch(asked, caplog):
    def fail() -> None:
        raise ValueError("no plan for 3 rows")

    with caplog.at_level(logging.INFO, logger="lowering"):
        ahead.rehearse([fail])
        finish()
    assert [warmup for _, _, warmup in asked] == [False]
    assert "a kernel is not compiled ahead: ValueError: no plan for 3 rows" in caplog.text


def graph_of(device: str, *widths: int) -> Graph:
    """``thin_linear`` of one batch with weights of each of ``widths``."""
    graph = Graph()
    x, *weights = (graph.placeholder(f"in{number}") for number in range(1 + len(widths)))
    with FakeTensorMode():
        for node, width in zip((x, *weights), (4, *widths), strict=True):
            node.meta["val"] = torch.empty(width, 16, dtype=torch.bfloat16, device=device)
    for weight in weights:
        graph.call_function(OP, (x, [weight]))
    graph.output(())
    return graph


def test_equal_calls_are_rehearsed_once_and_on_cuda_only(asked, monkeypatch):
    seen = []

    def launcher(x: Tensor, weights: list[Tensor]) -> None:
        seen.append((x.is_cuda, x.shape[0], weights[0].shape[0]))
        KERNEL[(1,)](x, weights[0])

    monkeypatch.setitem(CUDA_IMPLEMENTATIONS, OP, launcher)
    ahead.compile_ahead(graph_of("cuda", 8, 8, 24))
    finish()
    assert sorted(seen) == [(True, 4, 8), (True, 4, 24)]
    assert [warmup for _, _, warmup in asked] == [True, True, False]
    ahead.compile_ahead(graph_of("cpu", 8))
    assert len(seen) == 2


def test_ops_in_which_ranks_meet_are_never_rehearsed():
    ordered = {"metadata_update", "agv_dispatch", "rsv_combine", "rsv_combine_add", "moe_layer", "agree"}
    names = {short_name(op) for op in CUDA_IMPLEMENTATIONS}
    assert {"fused_moe", "thin_linear"} <= names and not names & ordered

"""``bench_fused_moe.py``: what is wrong is not timed."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moe_ops.align import align_block_size
from moe_ops.graph_timer import GraphTimer
from moe_ops.moe_reference import fused_moe_reference
from moe_ops.random_layer import MAX_ERROR
from moe_ops.topk_sum import topk_sum_reference
from tests.moe_ops.interpreted import run_checks

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


class Counter:
    """In place of a ``GraphTimer``."""

    def __init__(self):
        self.timed = 0

    def median_us(self, call, repeats: int) -> float:
        call()
        self.timed += 1
        return float(self.timed)

    def samples(self, call, repeats: int, flush: bool) -> list[float]:
        assert not flush
        return [self.median_us(call, repeats)] * repeats


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("moe_steps")


def aligned(steps: ModuleType, spoil) -> object:
    """A step of align whose three results ``spoil`` may change."""
    ids, live = torch.tensor([[0, 2], [2, 1], [2, 0]]), torch.tensor([3], dtype=torch.int32)

    def call():
        results = align_block_size(ids, live, steps.BLOCK, 3, 0)
        spoil(*results)
        return results

    return steps.Step(call, partial(steps.check_align, call, ids, live, 3))


def summed(steps: ModuleType, spoil) -> object:
    """A step of the sum, two of three experts local, whose result ``spoil`` may change."""
    ids, live = torch.tensor([[0, 2], [2, 1], [1, 0]]), torch.tensor([3], dtype=torch.int32)
    inputs = torch.randn(6, 32, dtype=torch.bfloat16), ids, torch.rand(3, 2), live
    out = torch.empty(3, 32, dtype=torch.bfloat16)

    def call():
        out.copy_(topk_sum_reference(*inputs, 0, 2))
        spoil(out)

    return steps.Step(call, partial(steps.check_sum, call, inputs, out, 2))


def nothing(*results: torch.Tensor) -> None:
    """Leaves results as they are."""


def test_right_steps_are_timed_alone_and_together(steps):
    for make in (aligned, summed):
        timer = Counter()
        line = steps.step_line("a step", [make(steps, nothing), make(steps, nothing)], timer, 1)
        assert line.split() == ["a", "step", "1.0", "1.0"] and timer.timed == 2


@pytest.mark.parametrize(
    ("make", "spoil", "message"),
    [
        (aligned, lambda sorted_ids, experts, total: sorted_ids[:2].copy_(sorted_ids[:2].flip(0)), "sorted_token_ids"),
        (aligned, lambda sorted_ids, experts, total: sorted_ids[-1:].zero_(), "sorted_token_ids"),
        (aligned, lambda sorted_ids, experts, total: experts[-1:].zero_(), "expert_ids"),
        (aligned, lambda sorted_ids, experts, total: total.add_(1), "num_tokens_post_padded"),
        (summed, lambda out: out[1].mul_(1.05), "relative error"),
        (summed, lambda out: out[2, 31].fill_(float("nan")), "relative error"),
    ],
)
def test_a_wrong_step_is_not_timed_even_if_it_is_the_last(steps, make, spoil, message):
    timer = Counter()
    with pytest.raises(AssertionError, match=f"{message}.*not timed"):
        steps.step_line("a step", [make(steps, nothing), make(steps, spoil)], timer, 1)
    assert timer.timed == 0


def test_a_layer_takes_its_share_of_a_graph_that_nothing_is_written_before(steps):
    """Of which ``Counter`` makes sure; the replays that settle the clock do not count."""
    layers, timer, made = importlib.import_module("moe_layers"), Counter(), []
    assert layers.us_of_a_layer([lambda: made.append(1), lambda: made.append(2)], timer, 3) == timer.timed / 2 == 0.5
    assert made == [1, 2]
    late = SimpleNamespace(samples=lambda call, repeats, flush: [9.0] * (repeats - 3) + [4.0] * 3)
    assert layers.us_of_a_layer([lambda: None] * 2, late, 3) == 2.0


@pytest.mark.parametrize("flush", [True, False])
def test_l2_is_flushed_before_every_replay_but_of_what_reads_enough_itself(monkeypatch, flush):
    """In turns; the flush is before the first event, so that it is not timed."""
    timer, done = object.__new__(GraphTimer), []
    event = SimpleNamespace(record=lambda: done.append("event"), elapsed_time=lambda end: 0.002)
    monkeypatch.setattr(GraphTimer, "flush", lambda timer: done.append("flush"))
    monkeypatch.setattr(GraphTimer, "_captured", staticmethod(lambda call: SimpleNamespace(replay=call)))
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = [lambda: done.append("a"), lambda: done.append("b")]
    assert timer.in_turns(calls, 2, flush) == [[2.0, 2.0], [2.0, 2.0]]
    assert done == [what for name in "abab" for what in ["flush"] * flush + ["event", name, "event"]]


def test_kernels_in_the_interpreter():
    run_checks("bench_step_checks.py", interpret=True)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("bench_fused_moe")


@pytest.fixture
def layer(bench: ModuleType) -> SimpleNamespace:
    """What ``Answer`` reads of a ``Tuner``: two local experts of three, five rows."""
    torch.manual_seed(0)
    return SimpleNamespace(
        shape=SimpleNamespace(tokens=5), hidden=torch.randn(5, 16, dtype=torch.bfloat16),
        ids=torch.tensor([[0, 1], [1, 2], [0, 2], [1, 0], [0, 1]]), weights=torch.rand(5, 2),
        gate_up=torch.randn(2, 24, 16, dtype=torch.bfloat16), down=torch.randn(2, 16, 12, dtype=torch.bfloat16),
    )  # fmt: skip


def right_result(layer: SimpleNamespace) -> torch.Tensor:
    live = torch.tensor([5], dtype=torch.int32)
    return fused_moe_reference(layer.hidden, layer.ids, layer.weights, layer.gate_up, layer.down, live, 0)


def test_a_wrong_plan_ends_the_benchmark(bench: ModuleType, layer: SimpleNamespace) -> None:
    answer, right = bench.Answer(layer), right_result(layer)
    assert bench.checked("right", lambda: right, answer) <= MAX_ERROR
    for wrong in (right * 1.02, right.roll(1, 0), torch.full_like(right, torch.nan)):
        with pytest.raises(AssertionError, match=r"wrong: relative error .* not timed"):
            bench.checked("wrong", lambda wrong=wrong: wrong, answer)


def test_a_wrong_peer_is_named_and_has_no_time(
    bench: ModuleType, layer: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    answer, right, timer = bench.Answer(layer), right_result(layer), Counter()
    assert bench.peer_us("a peer", lambda: right, answer, timer, 3) == 1.0
    assert capsys.readouterr().out == ""
    assert bench.peer_us("a peer", lambda: right * 1.1, answer, timer, 3) is None
    assert timer.timed == 1 and "a peer: relative error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--shapes", "foo,mixtral"], "--shapes foo: pass some of qwen3-30b"),
        (["--tokens", "1;4"], "pass counts from 1 up"), (["--tokens", "0"], "pass counts from 1 up"),
        (["--csv", "/no/such/x.csv"], "there is no folder /no/such"), (["--plot", "/no/such/x.png"], "make it first"),
        ([], "there is no CUDA device here"),
    ],
)  # fmt: skip
def test_options_that_mean_nothing_end_it_before_it_begins(bench, monkeypatch, capsys, options, hint):
    monkeypatch.setattr("sys.argv", ["bench_fused_moe.py", *options])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        bench.main()
    assert hint in capsys.readouterr().err


def test_points_measured_before_an_interrupt_are_in_the_csv(bench, monkeypatch, tmp_path):
    def measure(layer: object, tokens: int, *rest: object) -> object:
        if tokens == 16:
            raise KeyboardInterrupt
        return bench.Point(layer.name, tokens, 20.0, 10.0, 0.5, 10.0, 1e-3, None)

    out = tmp_path / "out.csv"
    monkeypatch.setattr("sys.argv", ["bench", "--shapes", "mixtral", "--tokens", "1,4,16,64", "--csv", str(out)])
    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(bench, "GraphTimer", lambda *_: SimpleNamespace(empty_us=lambda: 4.0))
    for name, value in (("is_available", True), ("empty_cache", None)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    with pytest.raises(KeyboardInterrupt):
        bench.main()
    assert [line.split(",")[:2] for line in out.read_text().splitlines()[1:]] == [["mixtral", "1"], ["mixtral", "4"]]

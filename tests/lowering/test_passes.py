"""The hook: on by import, switches, the user's own passes, the caches of compiled graphs."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import lowering
from lowering import torch_compat
from lowering.passes import RECENT, Lowering, Options, run_passes
from tests.lowering.layers import batch, inference_graph, routed, weights

COUNT = torch.tensor([5], dtype=torch.int32)
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _fresh():
    """Each test starts without a compiled function."""
    torch._dynamo.reset()
    RECENT.clear()
    with torch_compat.without_caches():
        yield


def two_layers(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
    for _ in range(2):
        x = x + (routed(x, w, count) + x @ w["shared"])
    return x


def run() -> Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(two_layers, fullgraph=True)(batch(), weights(), COUNT)


class UserPass(CustomGraphPass):
    """Counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, graph: Graph) -> None:
        self.calls += 1

    def uuid(self) -> str:
        return "mine"


def test_enable_is_idempotent():
    installed = config.post_grad_custom_pre_pass
    lowering.enable()
    assert config.post_grad_custom_pre_pass is installed and isinstance(installed, Lowering)


def test_import_turns_it_on_without_transformers():
    script = (
        "import sys, lowering; from torch._inductor import config;"
        "print(type(config.post_grad_custom_pre_pass).__name__, 'transformers' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.stdout.split() == ["Lowering", "False"], result.stderr


def test_every_pass_can_be_left_out_by_name():
    assert lowering.NAMES[0] == "hoist_metadata"
    for name in lowering.NAMES:
        module, inputs = inference_graph(two_layers, batch(), weights(), COUNT)
        before = module(*inputs)[0]
        report = run_passes(module.graph, Options(without=frozenset([name]), inexact=True))
        module.recompile()
        assert not report.outcome(name).enabled and not report.outcome(name).done
        assert all(outcome.enabled for outcome in report.outcomes if outcome.name != name)
        assert torch.equal(before, module(*inputs)[0])


def test_passes_that_change_bits_run_only_where_that_is_allowed():
    def running() -> set[str]:
        run()
        return {outcome.name for outcome in RECENT[-1].outcomes if outcome.enabled}

    exact = set(lowering.NAMES) - set(lowering.INEXACT)
    assert running() == exact
    with lowering.allow_inexact():
        assert running() == set(lowering.NAMES)
        assert Lowering(Options(inexact=True)).uuid() != Lowering(Options()).uuid()
    assert running() == exact
    lowering.disable()
    with lowering.allow_inexact():
        assert lowering.enabled_options() is None


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(lowering.UnknownPassError, match="no pass is named hoist; the names are hoist_metadata, "):
        lowering.enable(without=["hoist"])


def test_lowered_equals_unlowered():
    lowered = run()
    assert RECENT
    lowering.disable()
    assert torch.equal(lowered, run()) and len(RECENT) == 1


@pytest.mark.parametrize("first", ["user", "lowering"])
def test_the_users_pass_keeps_running(first: str):
    mine = UserPass()
    if first == "user":
        lowering.disable()
        config.post_grad_custom_pre_pass = mine
        lowering.enable()
    else:
        config.post_grad_custom_pre_pass = mine
        lowering.enable()
    run()
    assert mine.calls == 1 and len(RECENT) == 1
    lowering.disable()
    assert config.post_grad_custom_pre_pass is mine


def test_a_plain_callable_keeps_running_and_nothing_is_cached():
    graphs: list[Graph] = []
    config.post_grad_custom_pre_pass = graphs.append
    lowering.enable()
    run()
    assert len(graphs) == 1 and len(RECENT) == 1
    assert config.post_grad_custom_pre_pass.uuid() is None


def test_the_cache_key_knows_options_and_user_passes():
    keys = [config.post_grad_custom_pre_pass.uuid()]
    lowering.enable(without=["hoist_metadata"])
    keys.append(config.post_grad_custom_pre_pass.uuid())
    config.post_grad_custom_pre_pass = UserPass()
    lowering.enable()
    keys.append(config.post_grad_custom_pre_pass.uuid())
    assert len({json.dumps(key) for key in keys}) == 3 and "mine" in json.dumps(keys[2])


def test_graphs_without_our_ops_are_left_alone():
    with torch.no_grad():
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    assert not RECENT


def test_passes_take_a_small_part_of_a_compilation():
    def model(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
        for _ in range(6):
            x = x + (routed(x, w, count) + x @ w["shared"])
        return x

    module, _ = inference_graph(model, batch(), weights(), COUNT)
    begin = time.perf_counter()
    run_passes(module.graph)
    passes = time.perf_counter() - begin
    lowering.disable()
    torch._dynamo.reset()
    begin = time.perf_counter()
    with torch.no_grad():
        torch.compile(model, fullgraph=True)(batch(), weights(), COUNT)
    assert passes < 0.1 * (time.perf_counter() - begin)  # measured: 0.002


def test_unknown_torch_is_a_clear_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__version__", "3.0.1")
    with pytest.raises(lowering.UnsupportedTorchError, match=r"torch 3\.0\.1 is not supported; install torch >= 2\.11"):
        lowering.enable()


_CACHE_SCRIPT = """
import json, torch
import lowering
from tests.lowering.layers import batch, weights
from tests.lowering.test_passes import COUNT, two_layers
from lowering import agreement
calls = []
real = agreement.resolve
agreement.resolve = lambda *args: (calls.append(args), real(*args))[1]
with torch.no_grad():
    out = torch.compile(two_layers, fullgraph=True)(batch(), weights(), COUNT)
counters = torch._dynamo.utils.counters
print(json.dumps({"hit": counters["inductor"]["fxgraph_cache_hit"], "reports": len(lowering.passes.RECENT),
                  "agreed": len(calls), "out": out.float().tolist()}))
"""


def test_a_new_process_loads_the_lowered_graph_from_the_cache(tmp_path: Path):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    results = []
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", _CACHE_SCRIPT],
            cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = results
    assert (first["hit"], first["reports"]) == (0, 1)
    assert (second["hit"], second["reports"]) == (1, 0)
    assert first["agreed"] == second["agreed"] == 1
    assert first["out"] == second["out"]

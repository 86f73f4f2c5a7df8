"""The hook: on by import, switches, the user's own passes, the caches of compiled graphs."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import lowering
import moe_ops
from lowering import passes, torch_compat
from lowering.effects import moe_nodes
from lowering.passes import RECENT, Lowering, Options, run_passes
from moe_ops import workspace
from moe_ops.placement import Placements
from tests.lowering.layers import batch, inference_graph, routed, weights

COUNT = torch.tensor([5], dtype=torch.int32)
ROOT = Path(__file__).resolve().parents[2]
UNLOWERED = {"metadata_update", "agv_dispatch", "fused_moe", "rsv_combine"}


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
    """Notes which ops of ``moe_ep`` each graph has that it gets."""

    def __init__(self) -> None:
        self.calls: list[set[str]] = []

    def __call__(self, graph: Graph) -> None:
        self.calls.append({name for name, _ in moe_nodes(graph)})

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
    assert mine.calls == [UNLOWERED] and len(RECENT) == 1  # it ran first
    lowering.disable()
    assert config.post_grad_custom_pre_pass is mine


def test_a_list_of_user_passes_keeps_running():
    """torch 2.13 takes one in the slot."""
    mine = [UserPass(), UserPass()]
    config.post_grad_custom_pre_pass = mine
    lowering.enable()
    run()
    assert [one.calls for one in mine] == [[UNLOWERED]] * 2 and len(RECENT) == 1
    lowering.disable()
    assert config.post_grad_custom_pre_pass == mine


@pytest.mark.skipif(torch_compat.torch_version() < (2, 12), reason="torch has such passes from 2.12 on")
def test_a_pass_that_wants_to_know_its_graph_is_told():
    from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass

    told: list[bool] = []

    class Told(CustomInferenceAwareGraphPass):
        def __call__(self, graph: Graph, is_inference: bool) -> None:
            told.append(is_inference)

        def uuid(self) -> str:
            return "told"

    config.post_grad_custom_pre_pass = Told()
    lowering.enable()
    run()
    assert told == [True]


def test_what_is_not_said_stays_as_it_was():
    lowering.enable(without=["route_rows"], inexact=True)
    lowering.enable(rounding="eager")
    assert lowering.enabled_options() == Options(frozenset({"route_rows"}), "eager", True)


def test_caches_keep_ordered_ops_only_while_it_is_on():
    with config.patch(unsafe_marked_cacheable_functions={"mine": "1"}):
        lowering.enable()
        assert len(config.unsafe_marked_cacheable_functions) == 2
        lowering.disable()
        assert config.unsafe_marked_cacheable_functions == {"mine": "1"}
        lowering.enable()


def test_a_plain_callable_keeps_running_and_nothing_is_cached():
    graphs: list[Graph] = []
    config.post_grad_custom_pre_pass = graphs.append
    lowering.enable()
    run()
    assert len(graphs) == 1 and len(RECENT) == 1
    assert config.post_grad_custom_pre_pass.uuid() is None


def install_user_pass() -> None:
    config.post_grad_custom_pre_pass = UserPass()
    lowering.enable()


def edit(package: Path) -> None:
    (package / "errors.py").write_text((package / "errors.py").read_text() + "# edited")


CACHE_KEY: dict[str, Callable[[Path, SimpleNamespace], object]] = {
    "sources of lowering": lambda root, group: edit(root / "lowering"),
    "sources of moe_ops": lambda root, group: edit(root / "moe_ops"),
    "without": lambda root, group: lowering.enable(without=["hoist_metadata"]),
    "rounding": lambda root, group: lowering.enable(rounding="eager"),
    "inexact": lambda root, group: lowering.enable(inexact=True),
    "transports": lambda root, group: setattr(group, "transport", "p2p"),
    "placements": lambda root, group: group.placements.add(((0, 2), (2, 2))),
    "user's pass": lambda root, group: install_user_pass(),
}


@pytest.mark.parametrize("part", CACHE_KEY)
def test_the_cache_key_knows(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In copies of the sources, and with a group's workspace beside; nothing else changes the key."""
    group = SimpleNamespace(transport="gloo", placements=Placements())
    monkeypatch.setitem(workspace._WORKSPACES, "group", group)
    for module, name in ((passes, "lowering"), (moe_ops, "moe_ops")):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        monkeypatch.setattr(module, "__file__", str(tmp_path / name / "__init__.py"))

    def key() -> str:
        return json.dumps(config.post_grad_custom_pre_pass.uuid())

    before = key()
    (tmp_path / "lowering" / "notes.txt").write_text("no code")
    lowering.disable()
    lowering.enable()
    assert key() == before
    CACHE_KEY[part](tmp_path, group)
    assert key() != before


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

"""``moe-ep explain``: two ranks, the decode step of a model, JSON on stdout and a picture in a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from graphs import cli

ROOT = Path(__file__).resolve().parents[2]


def test_json_and_picture(tmp_path: Path):
    command = [sys.executable, "-m", "graphs.cli", "explain", "qwen3_moe", "--ranks", "2", "--device", "cpu"]
    options = ["--json", "--svg", str(tmp_path / "layer.svg"), "--without", "fuse_combine"]
    done = subprocess.run(
        [*command, *options], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=290,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["compiled_graphs"] == 1 and found["graph_breaks"] == {} and found["copies"] == []
    assert found["ops"] == {"agree": 1, "metadata_update": 1, "moe_layer": 2}
    enabled = {outcome["name"]: outcome["enabled"] for outcome in found["graphs"][0]["outcomes"]}
    assert enabled["join_layer"] and not enabled["fuse_combine"]
    assert (tmp_path / "layer.svg").read_text().startswith("<svg")


def test_an_unknown_pass_is_one_line(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    command = ["moe-ep", "explain", "qwen3_moe", "--without", "nothing", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capfd.readouterr().err
    assert ended.value.code == 1 and "no pass is named nothing; the names are hoist_metadata" in said
    assert "Traceback" not in said

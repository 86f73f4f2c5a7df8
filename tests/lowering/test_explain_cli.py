"""``moe-ep explain``: two ranks, the decode step of a model, JSON on stdout and a picture in a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import huggingface_hub
import pytest

from graphs import cli, launch
from graphs.errors import CheckpointError
from graphs.loading import resolve_folder


def explain(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command, its ranks in processes of their own."""
    monkeypatch.setattr(sys, "argv", ["moe-ep", "explain", "qwen3_moe", "--device", "cpu", *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0), *capfd.readouterr()


def test_json_and_picture(monkeypatch, capfd, tmp_path: Path):
    options = ("--json", "--svg", str(tmp_path / "layer.svg"), "--without", "fuse_combine")
    status, out, errors = explain(monkeypatch, capfd, "--ranks", "2", *options)
    assert status == 0, errors[-3000:]
    found = json.loads(out)
    assert found["compiled_graphs"] == 1 and found["graph_breaks"] == {} and found["copies"] == []
    assert found["ops"] == {"agree": 1, "metadata_update": 1, "moe_layer": 2}
    enabled = {outcome["name"]: outcome["enabled"] for outcome in found["graphs"][0]["outcomes"]}
    assert enabled["join_layer"] and not enabled["fuse_combine"]
    assert (tmp_path / "layer.svg").read_text().startswith("<svg")


def test_one_rank_has_no_layer_to_draw(monkeypatch, capfd, tmp_path: Path):
    status, _, errors = explain(monkeypatch, capfd, "--ranks", "1", "--svg", str(tmp_path / "layer.svg"))
    assert status == 1 and "one rank alone exchanges nothing" in errors and "pass --ranks 2" in errors
    assert "Traceback" not in errors and not list(tmp_path.iterdir())


def test_an_unknown_pass_is_one_line(monkeypatch, capfd):
    status, _, errors = explain(monkeypatch, capfd, "--without", "nothing")
    assert status == 1 and "no pass is named nothing; the names are hoist_metadata" in errors
    assert "Traceback" not in errors


def test_a_picture_in_no_folder_is_refused_before_any_rank_starts(monkeypatch, capfd, tmp_path: Path):
    monkeypatch.setattr(launch, "run_ranks", lambda *_, **__: pytest.fail("ranks were started"))
    status, _, errors = explain(monkeypatch, capfd, "--ranks", "2", "--svg", str(tmp_path / "none" / "layer.svg"))
    assert status == 1 and "is no folder; make it first" in errors and "Traceback" not in errors


def test_a_model_that_the_hub_does_not_have_is_one_line(monkeypatch):
    def unknown(name: str, **options: object) -> str:
        raise OSError("404 Client Error\nand a page of explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unknown)
    with pytest.raises(CheckpointError, match=r"no folder, and the Hub does not give it: 404 Client Error$"):
        resolve_folder("nobody/nothing")

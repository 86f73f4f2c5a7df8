"""``moe-ep decode`` as a user runs it, and how it ends when something is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from graphs import cli, job, verify
from graphs.checkpoints import make_checkpoint
from graphs.errors import RankFailedError
from graphs.report import DecodeReport, GraphStats, over_ranks
from moe_ops.errors import ArgumentError
from tests.graphs.model_cases import plain_answers, plain_model, prompts_of

KEYS = [
    "ranks", "device", "transport", "transport_reason", "graph_breaks", "recompiles", "cuda_graphs", "tokens",
    "tokens_per_s", "matches_reference",
]  # fmt: skip
REPORT = DecodeReport(2, "cpu", "gloo", "why", 0, 0, 0, 10, 5.0, True)


def moe_ep(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does, from this checkout."""
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    program = [sys.executable, *launcher, "-m", "graphs", *arguments]
    return subprocess.run(program, capture_output=True, text=True, timeout=280, env=environment)


def test_main_job_prints_one_json_object():
    done = moe_ep("decode", "--json", "--tokens", "12", "--batch", "3")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line)
    assert list(report) == KEYS
    speed = report.pop("tokens_per_s")
    assert speed > 0
    assert report == {
        "ranks": 2, "device": "cpu", "transport": "gloo", "transport_reason": report["transport_reason"],
        "graph_breaks": 0, "recompiles": 0, "cuda_graphs": 0, "tokens": (3 + 2) * 12, "matches_reference": True,
    }  # fmt: skip


def test_under_torchrun_with_a_checkpoint_of_the_users(tmp_path: Path):
    folder = make_checkpoint(tmp_path, "mixtral", torch.bfloat16)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = (
        "decode",
        "--model",
        str(folder),
        "--tokens",
        "6",
        "--batch",
        "2",
        "--dtype",
        "bfloat16",
        "--no-compile",
    )
    done = moe_ep(*arguments, launcher=torchrun)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert rows["ranks"].strip() == "2 on cpu" and rows["matches plain Hugging Face"].strip().startswith("yes")
    assert rows["tokens"].strip() == str((2 + 1) * 6)


REQUESTS = """
{"prompt": "the cat sat", "max_new_tokens": 5}
[5, 6, 7]

{"prompt": [9, 8], "temperature": 0.8, "top_p": 0.9, "seed": 3, "stop_ids": []}
"""


def with_tokenizer(folder: Path) -> Path:
    """A checkpoint whose tokenizer knows 512 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["[UNK]", "the", "cat", "sat", *(f"w{number}" for number in range(4, 512))]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)
    return folder


def test_requests_of_a_file_are_answered_in_its_order(monkeypatch, capfd, tmp_path: Path):
    folder = with_tokenizer(make_checkpoint(tmp_path / "model", "mixtral"))
    (tmp_path / "prompts.jsonl").write_text(REQUESTS)
    arguments = ("--requests", str(tmp_path / "prompts.jsonl"), "--tokens", "4", "--profile", str(tmp_path / "trace"))
    command = ("decode", "--model", str(folder), "--device", "cpu", "--batch", "2", "--no-compile", *arguments)
    status = run_in_process(monkeypatch, *command)
    done = capfd.readouterr()
    assert status == 0, done.err
    first, second, third = map(json.loads, done.out.splitlines())
    plain = plain_model("mixtral")
    assert first["tokens"] == plain_answers(plain, [[1, 2, 3]], 5)[0]
    assert first["text"] == " ".join(["[UNK]", "the", "cat", "sat"][t] if t < 4 else f"w{t}" for t in first["tokens"])
    assert second["tokens"] == plain_answers(plain, [[5, 6, 7]], 4)[0]
    assert len(third["tokens"]) == 4
    assert [answer["line"] for answer in (first, second, third)] == [2, 3, 5]
    assert {answer["reason"] for answer in (first, second, third)} == {"length"}
    assert "yes, every token" in done.err
    assert sorted(path.name for path in (tmp_path / "trace").iterdir()) == ["rank0.json", "rank1.json"]


def run_in_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit status of ``moe-ep`` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["moe-ep", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(("matches", "status"), [(True, 0), (False, 1), (None, 0)])
def test_exit_status_tells_the_match(monkeypatch, capfd, tmp_path: Path, matches: bool | None, status: int):
    report = DecodeReport(**REPORT.as_dict() | {"matches_reference": matches})
    monkeypatch.setattr(cli, "start_ranks", lambda *_: job.Outcome(report, []))
    assert run_in_process(monkeypatch, "decode", "--model", str(tmp_path), "--json") == status
    assert json.loads(capfd.readouterr().out)["matches_reference"] is matches


def test_failed_rank_is_one_line_and_a_status(monkeypatch, capfd, tmp_path: Path):
    def fail(*_):
        raise RankFailedError("rank 1: ended with exit code -9 before it was done")

    monkeypatch.setattr(cli, "start_ranks", fail)
    assert run_in_process(monkeypatch, "decode", "--model", str(tmp_path)) == 1
    captured = capfd.readouterr()
    assert captured.out == "" and "error: rank 1: ended with exit code -9" in captured.err


def test_checkpoint_that_does_not_exist(monkeypatch, capfd):
    assert run_in_process(monkeypatch, "decode", "--model", "/nowhere/at/all") == 1
    assert "error: /nowhere/at/all is not a folder" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("gpus", "asked", "ranks", "chosen"),
    [
        (0, "auto", None, ("cpu", 2)),
        (1, "auto", None, ("cuda", 1)),
        (1, "auto", 2, ("cpu", 2)),
        (1, "cpu", None, ("cpu", 2)),
        (8, "auto", None, ("cuda", 2)),
        (8, "auto", 4, ("cuda", 4)),
        (8, "cpu", 4, ("cpu", 4)),
    ],
)
def test_choice_of_device(monkeypatch, gpus: int, asked: str, ranks: int | None, chosen: tuple[str, int]):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert cli.choose_device(asked, ranks, None) == chosen


def test_options_that_cannot_be(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ArgumentError, match="2 ranks need a GPU each, here are 1"):
        cli.choose_device("cuda", 2, None)
    with pytest.raises(ArgumentError, match="pass auto, cpu or cuda"):
        cli.choose_device("tpu", None, None)
    with pytest.raises(ArgumentError, match="float32: on cuda pass one of bfloat16, float16"):
        cli.choose_dtype("float32", "cuda")
    assert cli.choose_dtype("auto", "cpu") == "float32" and cli.choose_dtype("auto", "cuda") == "bfloat16"


def test_comparison_finds_one_wrong_token():
    model = plain_model("qwen3_moe")
    prompts = prompts_of((3, 6))
    answers = plain_answers(model, prompts, 8)
    assert verify.compare(model, prompts, answers) == verify.Comparison(16, 16, None)
    wrong = answers[1][5]
    answers[1][5] = (wrong + 1) % 512
    result = verify.compare(model, prompts, answers)
    assert result.identical == 15
    assert result.mismatch == f"prompt 1, token 5: {answers[1][5]}, the reference chose {wrong}"


class FixedLogits(torch.nn.Module):
    """In half precision token 0 wins by a rounding that fp32 does not see; token 2 is clearly worse, everywhere."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype, self.device = dtype, torch.device("cpu")

    def float(self) -> "FixedLogits":
        self.dtype = torch.float32
        return self

    def forward(self, ids: torch.Tensor) -> SimpleNamespace:
        first = 8.0 if self.dtype == torch.float32 else 8.0625
        logits = torch.tensor([first, 8.0, 7.0], dtype=self.dtype)
        return SimpleNamespace(logits=logits.expand(*ids.shape, 3))

    def generate(self, ids: torch.Tensor, max_new_tokens: int, **_: object) -> torch.Tensor:
        return torch.cat([ids, ids.new_zeros(1, max_new_tokens)], dim=1)


def test_comparison_forgives_a_rounding_in_half_precision_but_no_error():
    assert verify.compare(FixedLogits(torch.bfloat16), [[1]], [[0, 1, 0]]) == verify.Comparison(2, 3, None)
    wrong = verify.compare(FixedLogits(torch.bfloat16), [[1]], [[0, 2, 0]]).mismatch
    assert wrong is not None and wrong.startswith("prompt 0, token 1: 2, the reference chose 0")
    assert verify.compare(FixedLogits(torch.float32), [[1]], [[0, 1, 0]]).mismatch is not None


def test_ranks_decode_unequal_numbers_of_prompts():
    work = job.DecodeJob("", tokens=4, batch=3, device="cpu", dtype="float32")
    prompts = [job.make_prompts(work, rank, 512) for rank in range(4)]
    assert [len(p) for p in prompts] == [3, 2, 1, 3]
    assert len({tuple(map(tuple, p)) for p in prompts}) == 4
    assert all(3 <= len(one) <= 12 and min(one) > 0 for p in prompts for one in p)


def test_report_over_ranks_hides_nothing():
    assert over_ranks([GraphStats(0, 0, 1), GraphStats(0, 0, 1)]) == (0, 0, 1)
    assert over_ranks([GraphStats(0, 1, 1), GraphStats(2, 0, 3)]) == (2, 1, 3)
    assert over_ranks([GraphStats(0, 0, 1), GraphStats(0, 0, 0)]) == (0, 0, 0)


def test_table_names_what_the_report_holds():
    table = cli.as_table(REPORT)
    for text in ("gloo (why)", "graph breaks", "recompiles", "CUDA graphs", "tokens/s", "yes, every token"):
        assert text in table


TUNE = {"experts": 8, "top_k": 2, "hidden": 64, "inner": 64}


def test_tune_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="no CUDA device"):
        cli.tune(**TUNE)


def test_tune_gives_each_rank_its_share_and_checks_counts(monkeypatch, tmp_path):
    from moe_ops import fused_moe_tune

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fused_moe_tune, "tune", lambda shapes, out, progress: asked.extend(shapes) or out)
    cli.tune(**TUNE, ranks=3, tokens="1,64", out=tmp_path)
    assert [(shape.experts, shape.tokens, total) for shape, total in asked] == [(3, 1, 8), (3, 64, 8)]
    asked.clear()
    for wrong, hint in (
        ({"tokens": "1;64"}, "commas"), ({"tokens": "0"}, "from 1 up"), ({"tokens": "²"}, "from 1 up"),
        ({"top_k": 9}, "at most --experts"), ({"experts": 2000}, "at most 1024 experts"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match=hint):
            cli.tune(**TUNE | wrong)
    assert not asked

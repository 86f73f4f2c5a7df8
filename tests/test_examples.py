"""The scripts of ``examples/`` run as their first lines say."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.graphs.model_cases import plain_answers, plain_model

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
PROMPTS = [[11, 12, 13], [21], [31, 32]]


def run(name: str, *launcher: str) -> str:
    """What an example prints."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]])}
    program = [sys.executable, *launcher, str(ROOT / "examples" / name)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Prompts and what plain Hugging Face answers."""
    answers = plain_answers(plain_model("qwen3_moe"), PROMPTS, 16)
    return [f"{prompt} -> {answer}" for prompt, answer in zip(PROMPTS, answers, strict=True)]


def test_one_process(expected: list[str]):
    assert run("one_process.py").splitlines() == expected


def test_expert_parallel(expected: list[str]):
    ranks = ("rank 0: ", "rank 0: ", "rank 1: ")
    # two processes write to one pipe: a line's end may come behind the other's line
    assert sorted(re.findall(r"rank \d: \[.*?\] -> \[.*?\]", run("expert_parallel.py", *TORCHRUN))) == [
        rank + line for rank, line in zip(ranks, expected, strict=True)
    ]


def test_continuous_requests():
    found = re.findall(r"^request (\d+) \((stop|length)\): \[(.*)\]$", run("continuous_requests.py"), re.MULTILINE)
    assert sorted(int(number) for number, _, _ in found) == list(range(10))
    for number, reason, tokens in found:
        count = len(tokens.split(", "))
        assert count == (12 if int(number) % 2 else 24) or (reason == "stop" and tokens.endswith("7"))


def test_every_example_is_under_test():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "one_process.py", "expert_parallel.py", "continuous_requests.py",
    }  # fmt: skip

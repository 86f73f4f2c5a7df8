"""Files of requests: what a line may say, and the line that a mistake is in."""

from pathlib import Path

import pytest

from graphs.checkpoints import tiny_config
from graphs.errors import RequestError
from graphs.request_file import Checkpoint, answer_line, read_requests
from graphs.requests import Answer, Request


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Without weights and tokenizer; token 7 ends a text."""
    from transformers import GenerationConfig

    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_config().save_pretrained(folder)
    GenerationConfig(eos_token_id=7).save_pretrained(folder)
    return Checkpoint(folder)


def test_lines(tmp_path: Path, checkpoint: Checkpoint):
    path = tmp_path / "requests.jsonl"
    path.write_text(
        '\n[3, 4]\n  \n{"prompt": [5], "top_k": 2, "temperature": 1, "max_new_tokens": 9, "stop_ids": []}\n'
    )
    assert read_requests(path, checkpoint, 6) == [
        (2, Request((3, 4), 6, stop_ids=(7,))),
        (4, Request((5,), 9, temperature=1, top_k=2)),
    ]
    answer = Answer(0, Request((3, 4)), [8, 7], "stop")
    assert answer_line(2, answer, checkpoint) == {"line": 2, "tokens": [8, 7], "reason": "stop"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "not JSON .*column 2"),
        ('{"max_new_tokens": 3}', 'no "prompt"'),
        ('"some text"', "the prompt is text, but .* has no tokenizer; pass token numbers"),
        ("[1, true]", r"prompt = \[1, True\]; pass text or a list"),
        ("[]", "an empty prompt"),
        ("17", "prompt = 17; pass text"),
        ("[600]", "token 600 is outside the vocabulary of 512"),
        ('{"prompt": [1], "topk": 3}', "unknown key 'topk'; known are prompt, stop_ids, max_new_tokens"),
        ('{"prompt": [1], "top_k": "3"}', "top_k = '3'; pass a number"),
        ('{"prompt": [1], "top_k": 1.5}', "top_k = 1.5; pass a number"),
        ('{"prompt": [1], "stop_ids": 2}', "stop_ids = 2; pass a list"),
        ('{"prompt": [1], "max_new_tokens": 0}', "max_new_tokens=0"),
        ('{"prompt": [1], "top_p": 2}', "top_p=2"),
    ],
)
def test_a_mistake_names_its_line(tmp_path: Path, checkpoint: Checkpoint, line: str, message: str):
    path = tmp_path / "requests.jsonl"
    path.write_text(f"[1]\n\n{line}\n[oops\n")
    with pytest.raises(RequestError, match=rf"requests\.jsonl line 3: {message}"):
        read_requests(path, checkpoint, 6)


def test_no_requests(tmp_path: Path, checkpoint: Checkpoint):
    with pytest.raises(RequestError, match=r"--requests .*none\.jsonl: there is no such file"):
        read_requests(tmp_path / "none.jsonl", checkpoint, 6)
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(RequestError, match="holds no request"):
        read_requests(tmp_path / "empty", checkpoint, 6)

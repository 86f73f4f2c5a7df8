"""Requests from a file, one JSON value a line: a prompt, or an object with a prompt and what to do with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import RequestError
from .requests import Answer, Request, problem_with

_NUMBERS: dict[str, tuple[type, ...]] = {
    "max_new_tokens": (int,),
    "temperature": (int, float),
    "top_k": (int,),
    "top_p": (int, float),
    "seed": (int,),
}


class Checkpoint:
    """What a request file needs to know about a checkpoint."""

    def __init__(self, folder: str | Path):
        from transformers import AutoConfig

        self.folder = Path(folder)
        self.vocabulary: int = AutoConfig.from_pretrained(self.folder).get_text_config().vocab_size

    @cached_property
    def tokenizer(self) -> Any:
        """transformers' tokenizer, or None if the checkpoint has none."""
        from transformers import AutoTokenizer

        if not any((self.folder / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
            return None
        return AutoTokenizer.from_pretrained(self.folder)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """End-of-text tokens of the checkpoint."""
        from transformers import GenerationConfig

        if not (self.folder / "generation_config.json").exists():
            return ()
        ids = GenerationConfig.from_pretrained(self.folder).eos_token_id
        return () if ids is None else tuple(ids) if isinstance(ids, Sequence) else (ids,)

    def text(self, tokens: Sequence[int]) -> str | None:
        """What tokens say, None without a tokenizer."""
        return None if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)


def read_requests(path: Path, checkpoint: Checkpoint, max_new_tokens: int) -> list[tuple[int, Request]]:
    """Line number and request of every line that is not empty; raises ``RequestError`` naming the first bad line.

    A line is ``"text"``, ``[1, 2, 3]`` or ``{"prompt": either, "max_new_tokens": 32, "temperature": 0.7, "top_k": 50,
    "top_p": 0.9, "seed": 1, "stop_ids": [2]}``, all but the prompt optional.
    """
    if not path.is_file():
        raise RequestError(f"--requests {path}: there is no such file.")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            request = _request(_parsed(line), checkpoint, max_new_tokens)
            length = len(request.prompt_ids) + (request.max_new_tokens or 0)
            problem = problem_with(request, max(length, 2), checkpoint.vocabulary, samples=True)
            if problem:
                raise RequestError(problem)
        except RequestError as error:
            raise RequestError(f"{path} line {number}: {error}") from None
        found.append((number, request))
    if not found:
        raise RequestError(f"--requests {path}: the file holds no request.")
    return found


def answer_line(number: int, answer: Answer, checkpoint: Checkpoint) -> dict[str, Any]:
    """An answer as one JSON object; ``text`` only if the checkpoint has a tokenizer."""
    text = checkpoint.text(answer.tokens)
    shown = {} if text is None else {"text": text}
    return {"line": number, **shown, "tokens": answer.tokens, "reason": answer.reason}


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise RequestError(f"not JSON ({error.msg} at column {error.colno}).") from None
    return value if isinstance(value, dict) else {"prompt": value}


def _request(value: dict[str, Any], checkpoint: Checkpoint, max_new_tokens: int) -> Request:
    value = dict(value)
    if "prompt" not in value:
        raise RequestError('no "prompt"; pass text or a list of token numbers.')
    prompt = _prompt(value.pop("prompt"), checkpoint)
    stop_ids = value.pop("stop_ids", checkpoint.stop_ids)
    if not _are_tokens(stop_ids):
        raise RequestError(f"stop_ids = {stop_ids!r}; pass a list of token numbers.")
    for name, got in value.items():
        if name not in _NUMBERS:
            raise RequestError(f"unknown key {name!r}; known are prompt, stop_ids, {', '.join(_NUMBERS)}.")
        if isinstance(got, bool) or not isinstance(got, _NUMBERS[name]):
            raise RequestError(f"{name} = {got!r}; pass a number.")
    return Request(prompt, **{"max_new_tokens": max_new_tokens, **value}, stop_ids=tuple(stop_ids))


def _prompt(value: Any, checkpoint: Checkpoint) -> tuple[int, ...]:
    if isinstance(value, str):
        if checkpoint.tokenizer is None:
            raise RequestError(f"the prompt is text, but {checkpoint.folder} has no tokenizer; pass token numbers.")
        return tuple(checkpoint.tokenizer(value)["input_ids"])
    if not _are_tokens(value):
        raise RequestError(f"prompt = {value!r}; pass text or a list of token numbers.")
    return tuple(value)


def _are_tokens(value: Any) -> bool:
    whole = isinstance(value, (list, tuple))
    return whole and all(isinstance(token, int) and not isinstance(token, bool) for token in value)

"""What a decode loop is asked for, and what it answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_STOP_IDS = 8  # of one request; a fixed size, so that the step's shapes do not depend on requests


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it.

    ``max_new_tokens`` None: as many as ``max_len`` leaves room for. ``temperature`` 0 chooses the likeliest token;
    above 0 it draws, after the cuts ``top_k`` (0: none) and ``top_p`` (1: none), reproducibly from ``seed``. A token
    of ``stop_ids`` ends the answer and is its last token.
    """

    prompt_ids: Sequence[int]
    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_ids: Sequence[int] = field(default=())

    def last_position(self, max_len: int) -> int:
        """Position of the last token that the answer may have."""
        room = max_len - len(self.prompt_ids)
        return len(self.prompt_ids) + min(room, self.max_new_tokens or room) - 1


@dataclass(frozen=True)
class Answer:
    """The tokens after a prompt. ``reason``: "stop" (a stop token came), "length", or "running" (not finished)."""

    request_id: int
    request: Request
    tokens: list[int]
    reason: str


def problem_with(request: Request, max_len: int, vocabulary: int, samples: bool) -> str | None:
    """Why a loop cannot take ``request``, as a sentence, or None."""
    size = len(request.prompt_ids)
    bad = [token for token in (*request.prompt_ids, *request.stop_ids) if not 0 <= token < vocabulary]
    wanted = request.max_new_tokens
    problems = [
        (size == 0, "an empty prompt; pass at least one token."),
        (size >= max_len, f"a prompt of {size} tokens leaves no room in max_len={max_len}; pass a larger max_len."),
        (bool(bad), f"token {bad[0] if bad else ''} is outside the vocabulary of {vocabulary}."),
        (wanted is not None and wanted < 1, f"max_new_tokens={wanted}; pass at least 1."),
        (
            wanted is not None and size + wanted > max_len,
            f"{size} prompt tokens and max_new_tokens={wanted} exceed max_len={max_len}; pass a larger max_len.",
        ),
        (not request.temperature >= 0, f"temperature={request.temperature}; pass 0 (greedy) or more."),
        (request.top_k < 0, f"top_k={request.top_k}; pass 0 (no cut) or more."),
        (not 0 < request.top_p <= 1, f"top_p={request.top_p}; pass a share above 0, at most 1 (no cut)."),
        (
            len(request.stop_ids) > MAX_STOP_IDS,
            f"{len(request.stop_ids)} stop tokens; a request may have {MAX_STOP_IDS}.",
        ),
        (not -(2**63) <= request.seed < 2**63, f"seed={request.seed} does not fit into 64 bits."),
        (
            request.temperature > 0 and not samples,
            f"temperature={request.temperature}, but this loop only chooses greedily; "
            "make it with DecodeLoop(..., sampler=graphs.sample).",
        ),
    ]
    return next((text for wrong, text in problems if wrong), None)

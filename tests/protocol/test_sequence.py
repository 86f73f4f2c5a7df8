"""``check_sequence`` accepts what is safe and shows what goes wrong in what is not."""

from __future__ import annotations

import pytest

from .sequence import Step, check_sequence

META = Step("metadata_update")
INTO, INTO_ALONE = (Step("dispatch_into", writes=("x",), barrier=barrier) for barrier in (False, True))
EXPERTS, READERS = Step("local", ("x",), ("y",)), Step("local", ("x",))
FROM, FROM_ALONE = (Step("combine_from", reads=("y",), barrier=barrier) for barrier in (False, True))
OTHER_INTO = Step("dispatch_into", writes=("z",), barrier=False)
SLOTS = Step("rsv_combine")


@pytest.mark.parametrize(
    "steps",
    [
        [META, INTO, EXPERTS, FROM],
        [META, *[INTO, EXPERTS, FROM] * 2],
        [INTO, READERS, SLOTS],
        [INTO, READERS, META],
        [INTO_ALONE, READERS],
        [INTO_ALONE, EXPERTS, FROM_ALONE],
        [INTO_ALONE, INTO_ALONE, READERS],
        [INTO, EXPERTS, FROM, OTHER_INTO],
    ],
    ids=lambda steps: "-".join(step.kind + "!" * step.barrier for step in steps),
)
def test_safe(steps: list[Step]):
    verdict = check_sequence(steps)
    assert verdict.ok, verdict.counterexample


@pytest.mark.parametrize(
    ("steps", "buffer"),
    [
        ([INTO, READERS], "'x'"),  # replays border on themselves
        ([META, INTO, READERS, INTO, READERS], "'x'"),  # two dispatches in a row
        ([INTO, INTO, READERS], "'x'"),
        ([Step("local", writes=("y",)), FROM], "'y'"),  # the next writer does not wait for the readers
        ([INTO, EXPERTS, FROM, Step("local", writes=("y",))], "'y'"),
        ([OTHER_INTO, EXPERTS, FROM, Step("local", reads=("z",)), OTHER_INTO], "'z'"),
    ],
    ids=lambda value: "-".join(step.kind for step in value) if isinstance(value, list) else value,
)
def test_unsafe(steps: list[Step], buffer: str):
    verdict = check_sequence(steps)
    assert not verdict.ok and verdict.counterexample is not None
    assert "race" in verdict.counterexample and buffer in verdict.counterexample
    assert "counted modulo" in verdict.counterexample

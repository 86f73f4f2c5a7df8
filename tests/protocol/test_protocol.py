"""The protocol of docs/protocol.md holds in every order of steps, and each of its mechanisms is needed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .explore import explore, walk, walks
from .kernels import FAULTS, Op
from .machine import Case, Violation

# i, f: dispatch_into and combine_from, safe alone; I, F: without the second meeting; e, g: local, as experts are
KINDS = {"m": "metadata", "d": "dispatch", "c": "combine", "i": "into", "f": "from", "e": "local", "g": "local"}
READS = {"f": ("y",), "e": ("x",)}
WRITES = {"i": ("x",), "e": ("y",), "g": ("y",)}
COUNTS = {2: ((1, 2), (2, 1), (0, 3)), 3: ((1, 0, 2), (2, 1, 1), (0, 0, 1))}


def case(
    world: int, text: str, grids: tuple[int, ...] = (1,), *, graph: int = 0, counts=None, per: int = 1, **options
) -> Case:
    """Ops by letter (``"mdc"``), with grids and counts taken in turn, ``per`` ops with the same counts.

    ``graph``: ops in the captured graph.
    """
    counts = counts or COUNTS[world]
    ops = [
        Op(
            KINDS[letter.lower()], counts[i // per % len(counts)], grids[i % len(grids)], i % (graph or len(text)),
            READS.get(letter.lower(), ()), WRITES.get(letter.lower(), ()), letter.islower(),
        )
        for i, letter in enumerate(text)
    ]  # fmt: skip
    return Case(world, tuple(ops), **options)


def any_of(*blocks: tuple[int, int]) -> frozenset[tuple[int, int]]:
    return frozenset(blocks)


MIXES = ["".join(letters) for letters in product("mdc", repeat=3)]


@pytest.mark.parametrize("text", MIXES)
def test_all_orders_of_three_calls_on_two_ranks(text: str):
    assert explore(case(2, text, (2, 1, 2)), reduced=False) > 1


@pytest.mark.parametrize("text", MIXES)
def test_all_orders_of_three_calls_on_three_ranks(text: str):
    assert explore(case(3, text), reduced=False) > 1


@pytest.mark.parametrize("text", ["mdcd", "ddcc", "cdmm"])
def test_all_orders_of_blocks_of_two_warps(text: str):
    assert explore(case(2, text, warps=2), reduced=False) > 1


def test_all_orders_of_two_blocks_on_three_ranks():
    assert explore(case(3, "dc", (2,), counts=((1, 0, 1),)), reduced=False) > 1


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("graph", ["d", "dc", "mdc", "mdcdc"])
def test_replays_of_a_graph_with_changing_counts(world: int, graph: str):
    explore(case(world, graph * 6, (3, 2, 1, 2), graph=len(graph), warps=2))


def test_tags_wrap_around():
    explore(case(2, "dcm" * 9, (2, 1), modulus=8))


@pytest.mark.parametrize("idle", [i for i in range(1, 20) if (i + 1) % 8])
def test_a_block_wakes_after_tags_wrapped_around(idle: int):
    """Block 1 sleeps for ``idle`` calls. (Only its very first tag again, after exactly 2^31 calls, would deceive.)"""
    explore(case(2, "d" * (idle + 1), (1,) * idle + (2,), modulus=8))


@pytest.mark.parametrize("text", ["d", "dc", "dcd", "ccc", "mdc"])
@pytest.mark.parametrize("mortal", [None, 1])
def test_giving_up_never_spoils_a_healthy_rank(text: str, mortal: int | None):
    """Two ranks, any poll may run out of time, at any point; rank 1 may die at any point."""
    explore(case(2, text, timeouts=any_of((0, 0), (1, 0)), mortal=mortal))


@pytest.mark.parametrize("mortal", [None, 1])
def test_giving_up_of_one_of_two_blocks(mortal: int | None):
    explore(case(2, "dc", (2,), timeouts=any_of((0, 0), (0, 1)), mortal=mortal))


@pytest.mark.parametrize(
    ("text", "impatient", "mortal"), [("dc", (0,), None), ("c", (0, 1), 2), ("d", (0, 1, 2), None)]
)
def test_giving_up_among_three_ranks(text: str, impatient: tuple[int, ...], mortal: int | None):
    explore(case(3, text, counts=((1, 1, 1),), timeouts=any_of(*((rank, 0) for rank in impatient)), mortal=mortal))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("layer", ["IeF", "Iec", "IeFm", "IedFd"])
def test_buffers_of_callers_in_strict_turns(world: int, layer: str):
    """Dispatch into x, experts from x to y, combine from y, again and again: no second meeting is needed."""
    explore(case(world, layer * 6, (3, 2, 1, 2), graph=len(layer), per=len(layer), warps=2))


@pytest.mark.parametrize("text", ["IeFIeF", "mIeFI"])
def test_all_orders_of_strict_turns(text: str):
    assert explore(case(2, text, per=3), reduced=False) > 1
    assert explore(case(2, text[:3], (2,), per=3), reduced=False) > 1


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("text", ["ieiieffef", "gfgfff", "iedifcimf", "iefIefieF"])
def test_buffers_of_callers_in_any_order(world: int, text: str):
    """Each op alone meets often enough for anything before and after it."""
    explore(case(world, text * 2, (2, 1, 2), graph=len(text), per=len(text), warps=2))


@pytest.mark.parametrize("text", ["iei", "gfg", "ie", "gf"])
def test_all_orders_of_ops_that_meet_twice(text: str):
    assert explore(case(2, text, (2,), per=9, counts=((1, 2),)), reduced=False) > 1
    assert explore(case(2, text, per=9, warps=2), reduced=False) > 1


@pytest.mark.parametrize("text", ["iei", "gf", "gfm", "IeFI", "eFIe"])
@pytest.mark.parametrize("mortal", [None, 1])
def test_giving_up_with_buffers_of_callers(text: str, mortal: int | None):
    explore(case(2, text, per=9, counts=((1, 1),), timeouts=any_of((0, 0), (1, 0)), mortal=mortal))


GIVES_UP = {"timeouts": any_of((1, 0))}
# By fault: a case that is right without it, and the kinds of violation that it leads to.
CAUGHT = {
    "no_wait": (case(2, "dc", (2,)), {"race", "output"}),
    "wait_for_one": (case(3, "d"), {"race", "output"}),
    "own_word_only": (case(2, "d"), {"race", "output"}),
    "signal_first": (case(2, "d"), {"race", "output"}),
    "relaxed_signal": (case(2, "d"), {"race"}),
    "relaxed_poll": (case(2, "d"), {"race"}),
    "no_block_barrier": (case(2, "c", warps=2), {"race"}),
    "one_warp_polls": (case(2, "d", warps=2), {"race", "output"}),
    "one_slot": (case(2, "dd"), {"race"}),
    "slot_of_graph": (case(2, "cc", graph=1), {"race"}),
    "epoch_of_graph": (case(2, "mdmd", graph=2), {"race", "output"}),
    "epoch_stays": (case(2, "dd"), {"race", "output"}),
    "own_epoch_only": (case(2, "ddd", (2, 1, 2)), {"race", "output"}),
    "early_epoch": (case(2, "d", warps=2), {"race"}),
    "local_rows": (case(2, "d", (2,)), {"race", "output"}),
    "one_word_set": (case(2, "mm"), {"output"}),
    "one_word_set_equal": (case(2, "dd"), {"deadlock"}),
    "unsigned": (case(2, "d" * 9, modulus=8), {"race", "output"}),
    "signed": (case(2, "d" * 6, (1, 1, 1, 1, 1, 2), modulus=8), {"race", "output"}),
    "grid_of_rank": (case(2, "d", counts=((1, 2),)), {"race", "output"}),
    "poisoned_signals": (case(2, "dd", counts=((1, 1),), **GIVES_UP), {"race", "output"}),
    "poisoned_writes": (case(2, "ddd", counts=((1, 1),), **GIVES_UP), {"race"}),
    "private_poison": (case(2, "ddd", counts=((1, 1),), **GIVES_UP), {"race"}),
    "no_entry": (case(2, "iei", per=3), {"race", "state"}),
    "no_exit": (case(2, "gfg", per=3), {"race", "state"}),
    "entry_relaxed": (case(2, "iei", per=3), {"race"}),
    "exit_relaxed": (case(2, "gfg", per=3), {"race"}),
    "from_relaxed": (case(2, "gF", per=3), {"race"}),
    "second_epoch_stays": (case(2, "im"), {"race", "output", "deadlock", "state"}),
    "unguarded": (case(2, "IeFIe", per=9, counts=((1, 1),), timeouts=any_of((0, 0))), {"race"}),
}


@pytest.mark.parametrize("fault", CAUGHT)
def test_fault_is_caught(fault: str):
    sound, kinds = CAUGHT[fault]
    explore(sound)
    for reduced in (True, False):
        with pytest.raises(Violation) as caught:
            explore(replace(sound, faults=frozenset({fault})), reduced=reduced)
        assert caught.value.kind in kinds, caught.value


def test_fault_is_caught_poison_by_warp():
    """Too many states for every order: of 600 random ones, some go wrong with the fault, and none without."""
    sound = case(2, "c", (2,), counts=((1, 2),), warps=2, timeouts=any_of((0, 0)))
    assert all(walks(sound, 600))
    with pytest.raises(Violation, match="wanted"):
        list(walks(replace(sound, faults=frozenset({"poison_by_warp"})), 600))


def test_fault_is_caught_no_vote():
    """Likewise: one warp's entry meeting fails, and the other would speak for the block."""
    sound = case(2, "ie", per=2, counts=((1, 1),), warps=2, timeouts=any_of((1, 0)))
    assert all(walks(sound, 600))
    with pytest.raises(Violation, match=r"is written|wanted"):
        list(walks(replace(sound, faults=frozenset({"no_vote"})), 600))


@pytest.mark.parametrize("resident", [1, 2])
def test_fault_is_caught_blocks_start_in_any_order(resident: int):
    """More blocks than run at a time need their order: the lowest unfinished one runs on every rank."""
    sound = case(2, "d", (2 * resident,), counts=((2, 2),), resident=resident, in_order=True)
    explore(sound)
    explore(replace(sound, resident=2 * resident, in_order=False))
    with pytest.raises(Violation, match="deadlock"):
        explore(replace(sound, in_order=False))


def test_every_fault_has_its_test():
    assert set(FAULTS) == {*CAUGHT, "poison_by_warp", "no_vote"}


def verdict(some: Case, reduced: bool) -> bool:
    try:
        explore(some, reduced=reduced)
    except Violation:
        return False
    return True


@pytest.mark.parametrize("fault", [*FAULTS, "none"])
def test_reduction_agrees_with_all_orders(fault: str):
    """The reduction of ``Machine`` drops no violation, in cases small enough for both."""
    faults = frozenset({fault} - {"none"})
    for world, text, grids, warps in (2, "dc", (2,), 1), (2, "cmd", (1,), 2), (2, "mdd", (2, 1), 1), (3, "cd", (1,), 1):
        some = case(world, text, grids, warps=warps, graph=1, faults=faults)
        assert verdict(some, True) == verdict(some, False), (fault, some)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    world = draw(st.integers(2, 4))
    counts = st.tuples(*[st.integers(0, 3)] * world)
    ops = st.builds(Op, st.sampled_from(["metadata", "dispatch", "combine"]), counts, st.integers(1, 4))
    return Case(
        world,
        tuple(draw(st.lists(ops, min_size=1, max_size=8))),
        warps=draw(st.integers(1, 2)),
        timeouts=draw(st.frozensets(st.tuples(st.integers(0, world - 1), st.integers(0, 3)), max_size=2)),
        modulus=draw(st.sampled_from([16, 1 << 31])),
    )


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(cases(), st.integers(0, 1 << 30))
def test_random_orders_of_larger_cases(some: Case, seed: int):
    walk(some, seed=seed)

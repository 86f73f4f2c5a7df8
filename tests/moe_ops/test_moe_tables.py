"""What users of an H200 run: plans of the committed table, compiled here, and those that batch-invariant mode takes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_ops.fused_moe_config import WIDE_ROWS, Plan, Shape, Tiles, choose_plan, load_table
from tests.moe_ops.launched import GPU, launches, table_plans, usage

PLANS = {f"{shape.key()} T={shape.tokens}": (shape, plan) for shape, plan in table_plans()}


def _kind(plan: Plan) -> tuple[object, ...]:
    up, down = plan.gate_up, plan.down
    return (
        plan.pairs > 0,
        up.block_m == WIDE_ROWS,
        up.swap,
        down.swap,
        up.flat,
        down.flat,
        down.special,
        plan.rest,
        plan.lone,
    )


def _accumulators(plan: Plan) -> int:
    """Of a thread, of the fuller GEMM."""
    up, down = plan.gate_up, plan.down
    return max(2 * up.block_m * up.block_n // up.num_warps, down.block_m * down.block_n // down.num_warps)


# Of each kind the plan with the most accumulators; ``python -m tests.moe_ops.launched`` compiles the whole table.
POINTS = list(
    {_kind(PLANS[name][1]): name for name in sorted(PLANS, key=lambda name: _accumulators(PLANS[name][1]))}.values()
)
SHARED = 227 * 1024  # bytes that a program can ask for
TOKENS = sorted({1, 2, 3, 5, 33, 1000, 4097, 20000} | {near for n in range(14) for near in (2**n, 2**n + 1)})


@pytest.mark.parametrize("point", POINTS)
def test_plans_of_the_table_fit_and_spill_nothing(point):
    """Compiled with the arguments of the launch: descriptors, strides, what is left of a last round."""
    (_, plan), seen = PLANS[point], launches(*PLANS[point])
    assert seen[-1].kernel.startswith("topk_sum")
    gemms = [launch for launch in seen if launch.kernel.startswith(("gate_up", "down"))]
    assert len(gemms) == (4 if plan.rest else 2)
    for launch in gemms:
        code, tiles = launch.compiled(), plan.gate_up if launch.kernel.startswith("gate_up") else plan.down
        used = usage(code)
        assert used.spills == 0, launch.kernel
        assert used.shared <= SHARED, launch.kernel
        assert ("wgmma.mma_async" in code.asm["ptx"]) == (tiles.swap or tiles.block_m >= 64), launch.kernel
        assert "cp.async.bulk.tensor" in code.asm["ptx"]


@pytest.mark.parametrize("tokens", [16, 512])
def test_plans_of_gpt_oss_spill_nothing_in_its_own_form(tokens):
    """Transposed, interleaved, with biases and a limit: few and many rows."""
    for launch in launches(*PLANS[f"E128-K4-H2880-I2880 T={tokens}"], gpt_oss=True):
        used = usage(launch.compiled())
        assert used.spills == 0 and used.shared <= SHARED, launch.kernel


def test_a_kernel_that_spills_would_show():
    """Four warps hold a tile of 128 x 256 in all of their registers."""
    tiles = Tiles(128, 256, 64, 4, 3)
    down = next(
        launch for launch in launches(Shape(8, 2, 512, 512, 2048), Plan(tiles, tiles)) if "down" in launch.kernel
    )
    assert usage(down.compiled()).spills > 0


def _invariant_plans() -> list[tuple[Shape, Plan]]:
    """What batch-invariant mode takes for every shape of the table, and a rank's share of it, at many counts."""
    layers = {replace(shape, tokens=0) for shape, _ in PLANS.values()}
    layers |= {replace(layer, experts=layer.experts // ranks) for layer in layers for ranks in (2, 4, 8)}
    counts = sorted({*TOKENS, *(shape.tokens + step for shape, _ in PLANS.values() for step in (-1, 0, 1))} - {0})
    shapes = [replace(layer, tokens=tokens) for layer in layers if layer.experts for tokens in counts]
    return [(shape, choose_plan(shape, GPU, batch_invariant=True)) for shape in shapes]


def test_batch_invariant_mode_takes_plans_whose_bits_agree():
    """Those of the table that were found to, on the GPU; elsewhere the weights are on the left of every product."""
    tuned = {Plan.from_json(entry) for table in load_table("nvidia_h200").values() for entry in table.values()}
    plans = _invariant_plans()
    for shape, plan in plans:
        found = plan in tuned and plan.invariant
        assert plan.tma and (found or (plan.gate_up.swap and plan.down.swap)), (shape, plan)
    taken = {plan for _, plan in plans}
    assert tuned <= taken and len(taken - tuned) > 5  # both ways are there to be checked


def test_batch_invariant_mode_costs_nothing_at_the_points_of_the_table():
    assert all(choose_plan(shape, GPU, batch_invariant=True) == plan for shape, plan in PLANS.values())


@pytest.mark.parametrize(
    ("point", "keep", "lone"),
    [
        ("E128-K8-H2048-I768 T=16", True, False), ("E128-K4-H2880-I2880 T=512", False, False),
        ("E128-K8-H2048-I768 T=2048", True, False), ("E16-K8-H2048-I768 T=2048", True, True),
    ],
)  # fmt: skip
def test_l2_is_asked_to_keep_what_the_next_kernel_reads(point, keep, lone):
    """Of all that a call launches the stores of the GEMMs alone; with few rows, many, of a last round and lone ones."""
    shape, plan = PLANS[point]
    for launch in launches(shape, replace(plan, lone=lone)):
        asked = "st.global.L1::evict_last.L2::cache_hint" in launch.compiled().asm["ptx"]
        assert asked == (keep and launch.kernel.startswith(("gate_up", "down"))), launch.kernel


@pytest.mark.parametrize("point", ["E128-K8-H2048-I768 T=16", "E128-K4-H2880-I2880 T=512"])
def test_plans_with_the_weights_on_the_left_multiply_by_wgmma_alone(point):
    for launch in launches(*PLANS[point]):
        ptx = launch.compiled().asm["ptx"]
        if launch.kernel.startswith(("gate_up", "down")):
            assert "wgmma.mma_async" in ptx and "mma.sync.aligned.m" not in ptx


@pytest.mark.parametrize("point", PLANS)
def test_what_a_plan_asks_for_reaches_its_kernels(point):
    shape, plan = PLANS[point]
    for launch in launches(shape, plan):
        if not launch.kernel.startswith(("gate_up", "down")):
            continue
        given = {launch.source.fn.arg_names[at[0]]: value for at, value in launch.source.constants.items()}
        tiles = plan.gate_up if launch.kernel.startswith("gate_up") else plan.down
        wanted = {"PDL": plan.pdl, "SWAP": tiles.swap, "TMA": plan.tma, "GROUP": plan.group, "KEEP": plan.keep}
        wanted |= {"PREFETCH": plan.prefetch}
        if "rest" not in launch.kernel:
            wanted |= {"FLAT": tiles.flat, "SPECIAL": tiles.special, "WHOLE": plan.rest > 0, "BLOCK_N": tiles.block_n}
        known = wanted.keys() & given.keys()
        assert {"PDL", "GROUP" if not plan.pairs else "SWAP"} <= known
        assert ("KEEP" in known) == (tiles.block_m != WIDE_ROWS)
        assert {name: given[name] for name in known} == {name: wanted[name] for name in known}, launch.kernel

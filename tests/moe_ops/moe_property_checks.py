"""What holds of every call of ``fused_moe``'s kernels, whatever its sizes: run by ``test_moe_properties``.

As in ``moe_kernel_checks``: fp16 in the interpreter, bf16 on a GPU. There a few cases only, as each compiles kernels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_ops import fused_moe_into
from moe_ops.fused_moe import launch_fused_moe, launch_fused_moe_pairs
from moe_ops.fused_moe_config import Plan, Shape, default_plan
from tests.moe_ops.moe_cases import FORMS, Case, build, check, oracle, poisoned_memory
from tests.moe_ops.moe_kernel_checks import DEVICE, DTYPE, ON_GPU, PLANS
from tests.tolerances import FUSED_MOE, relative_error

LAYOUT_PLANS, ROUNDING_PLANS = ["few-swap", "many-wide"], ["few-swap", "few-pointers", "many", "many-wide"]
if not ON_GPU:
    LAYOUT_PLANS += ["few-pointers", "many", "many-special", "many-rest"]
    ROUNDING_PLANS += ["many-flat", "many-rest", "default"]
CASES = st.builds(
    Case,
    rows=st.integers(1, 20), top_k=st.integers(1, 6), experts=st.integers(1, 14), local=st.integers(1, 6),
    start=st.integers(0, 5), hidden=st.integers(24, 90), inner=st.integers(8, 72), live=st.integers(0, 20),
    routing=st.sampled_from(["random", "random", "random", "one", "none"]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]), seed=st.integers(0, 2**16),
)  # fmt: skip


@given(
    case=CASES, form=st.sampled_from(sorted(FORMS)), plan=st.sampled_from(["default"] * 4 + sorted(PLANS)),
    whole=st.booleans(), hint=st.integers(0, 40),
)  # fmt: skip
@example(Case(20, 6, experts=2, local=1, start=1, hidden=64, inner=64, live=20), "swiglu", "default", True, 1)
@settings(max_examples=8 if ON_GPU else 80, deadline=None, derandomize=True, database=None)
def test_any_call_is_right(case: Case, form: str, plan: str, whole: bool, hint: int) -> None:
    """Ids are -1, other ranks', or wild; experts may have no pair or all; ``whole``: rows that bulk copies can read.

    In fp16 everywhere: bf16's tolerance is of the mean over more elements than these results have.
    """
    if whole:
        case = replace(case, hidden=case.hidden // 8 * 8, inner=case.inner // 8 * 8)
    case = replace(case, live=min(case.rows, case.live or 0), experts=max(case.experts, case.start + 1))
    check(launch_fused_moe, case, FORMS[form], torch.float16, DEVICE, plan=PLANS[plan], tokens_hint=hint)


# Hints of which ``default_plan`` makes one regime, for 8 experts and K 4. Those of few rows choose tiles of 16 and, on
# a GPU, 32 rows: numpy, for the interpreter, adds in an order that depends on the tile's size.
HINTED = Case(rows=150, top_k=4, experts=8, local=8, start=0, hidden=40, inner=32, live=140)
REGIMES = {
    "few rows": (4, 9, 16, *[32] * ON_GPU),
    "weights on the left": (33, 63),
    "blocks of 64": (64, 128),
    "blocks of 128": (129, 150, 1000),
}


def _regime(plan: Plan) -> tuple[bool, bool, int]:
    return plan.pairs > 0, plan.gate_up.swap, 0 if plan.gate_up.swap else plan.gate_up.block_m


def test_the_hints_are_of_four_regimes():
    plans = {name: [_hinted_plan(hint) for hint in hints] for name, hints in REGIMES.items()}
    assert all(len({_regime(plan) for plan in regime}) == 1 for regime in plans.values())
    assert len({_regime(regime[0]) for regime in plans.values()}) == len(plans)
    assert len(set(plans["few rows"])) > 1  # and some of one regime choose other tiles


def _hinted_plan(hint: int) -> Plan:
    sizes = HINTED.local, HINTED.top_k, HINTED.hidden, HINTED.inner
    return default_plan(Shape(*sizes, min(hint, HINTED.rows)))


@pytest.mark.parametrize("regime", REGIMES)
def test_hints_of_one_regime_give_equal_bits_and_a_hint_may_be_too_low(regime):
    """Of the 140 live rows most hints know nothing."""
    results = [
        check(launch_fused_moe, HINTED, {}, DTYPE, DEVICE, tokens_hint=hint)[: HINTED.live] for hint in REGIMES[regime]
    ]
    assert all(torch.equal(results[0], result) for result in results[1:])


def _order_tells(case: Case) -> tuple[torch.Tensor, ...]:
    """A call in which another order of additions changes bits of the pairs: large products that cancel, far apart."""
    arguments, _ = build(case, {}, DTYPE, DEVICE)
    hidden, gate_up, down, inner = arguments[0], arguments[3], arguments[4], case.inner
    hidden[:, 0], hidden[:, -1] = 256.0, -256.0
    gate_up[..., 0] = gate_up[..., -1] = 1.0
    gate_up[:, inner - 1], gate_up[:, -1] = gate_up[:, 0], gate_up[:, inner]
    down[..., 0], down[..., -1] = 64.0, -64.0
    return arguments


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("rows", [1, 5, 60, *[10, 200] * ON_GPU])  # the last with tiles that depend on the split
def test_batch_invariant_pairs_do_not_depend_on_the_rank_split(rows, ranks):
    """A rank that has all experts makes the pairs that ranks with a part of them make, to the bit."""
    case = Case(rows=rows, top_k=3, experts=8, local=8, start=0, hidden=64, inner=48)
    hidden, ids, weights, gate_up, down, live, _ = _order_tells(case)
    whole = launch_fused_moe_pairs(hidden, ids, weights, gate_up, down, live, 0, batch_invariant=True)[0]
    share, seen = case.local // ranks, 0
    for start in range(0, case.local, share):
        own = slice(start, start + share)
        part = launch_fused_moe_pairs(
            hidden, ids, weights, gate_up[own], down[own], live, start, batch_invariant=True
        )[0]  # fmt: skip
        mine = ((ids >= start) & (ids < start + share)).view(-1)
        assert torch.equal(part[mine], whole[mine])
        seen += int(mine.sum())
    assert seen == int(((ids >= 0) & (ids < case.local)).sum()) > 0


class _NoCopyOf(TorchDispatchMode):
    """Fails where an operator reads one of ``weights`` other than to view it, or makes a tensor of their size."""

    def __init__(self, *weights: torch.Tensor):
        super().__init__()
        self.storages = {weight.untyped_storage().data_ptr() for weight in weights}
        self.limit, self.made = min(weight.nbytes for weight in weights), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        reads = any(self._is_weight(leaf) for leaf in tree_leaves((args, kwargs)))
        for made in filter(torch.is_tensor, tree_leaves(out)):
            view = self._is_weight(made)
            assert view or made.numel() == 0 or not reads, f"{func} reads a weight"
            assert view or made.untyped_storage().nbytes() < self.limit, f"{func} makes {tuple(made.shape)}"
            self.made += not view
        return out

    def _is_weight(self, leaf: object) -> bool:
        return isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() in self.storages


@pytest.mark.parametrize("plan", LAYOUT_PLANS)
@pytest.mark.parametrize("form", ["swiglu", "gelu", "privacy-filter", "gpt-oss"])
def test_weights_are_read_as_they_lie(form, plan):
    """Default, interleaved, transposed, and both: no operator but views reads them, and nothing as large is made."""
    case = Case(rows=2, top_k=1, experts=16, local=16, start=0, hidden=128, inner=128)
    arguments, options = build(case, FORMS[form], DTYPE, DEVICE)
    with _NoCopyOf(arguments[3], arguments[4]) as watch:
        out = launch_fused_moe(*arguments, **options, plan=PLANS[plan])
    assert watch.made >= 3  # the scratch tensors and the result, at least
    assert relative_error(out, oracle(arguments, options)) <= FUSED_MOE[DTYPE]


def _cancelling(activation: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A call whose result is lost where what goes into the activation is rounded to 16 bits.

    ``swiglu_oai``: the product is 1 + noise of 1/512 and its bias -2, so that ``up + 1`` is the noise. ``silu``: a gate
    of -17 + noise, where an error of the gate is a relative one of exp(gate); up is large, lest the result vanish.
    """
    oai = activation == "swiglu_oai"
    form = {"activation": activation, "alpha": 1.0, "bias": True} if oai else {}
    case = Case(rows=16, top_k=2, experts=4, local=4, start=0, hidden=64, inner=64)
    (hidden, ids, weights, gate_up, *rest), options = build(case, form, DTYPE, DEVICE)
    ids = ids.clamp(0, 3)
    hidden[:, 0] = 1.0
    gate, up = gate_up[:, : case.inner], gate_up[:, case.inner :]
    if oai:
        up /= 512
        up[..., 0] = 1.0
        options["gate_up_bias"][:, case.inner :] = -2.0
        options["down_bias"].zero_()
    else:
        gate /= 8
        gate[..., 0], up[..., 0] = -17.0, 16384.0
    return (hidden, ids, weights, gate_up, *rest), options


@pytest.mark.parametrize("plan", ROUNDING_PLANS)
@pytest.mark.parametrize("activation", ["swiglu_oai", "silu"])
def test_nothing_is_rounded_before_the_activation(activation, plan):
    arguments, options = _cancelling(activation)
    wanted = oracle(arguments, options)
    got = launch_fused_moe(*arguments, **options, plan=PLANS[plan])
    assert relative_error(got, wanted) <= FUSED_MOE[DTYPE]


@pytest.mark.parametrize("activation", ["swiglu_oai", "silu"])
def test_rounding_before_the_activation_would_show(activation, monkeypatch):
    """The call above is one that tells: rounded once more there, the reference itself is far off."""
    from moe_ops import moe_reference

    arguments, options = _cancelling(activation)
    wanted, apply = oracle(arguments, options), moe_reference.apply_activation
    monkeypatch.setattr(
        moe_reference, "apply_activation", lambda x, *rest, **more: apply(x.to(DTYPE).to(x.dtype), *rest, **more)
    )
    assert relative_error(oracle(arguments, options), wanted) > 3 * FUSED_MOE[DTYPE]


@pytest.mark.parametrize("dtype", [DTYPE, torch.float32])
def test_into_writes_live_rows_of_the_buffer_alone(dtype):
    """``fused_moe`` to the bit; other rows and the buffer's columns beside its own stay."""
    case = Case(rows=21, top_k=3, hidden=56, inner=40, live=17)
    arguments, options = build(case, FORMS["minimax-m3"], DTYPE, DEVICE)
    buffer = torch.full((case.rows, case.hidden + 8), 7.0, dtype=dtype, device=DEVICE)
    with poisoned_memory():
        fused_moe_into._cuda(*arguments, buffer[:, : case.hidden], **options)
        wanted = launch_fused_moe(*arguments, **options, out_dtype=dtype)
    assert torch.equal(buffer[: case.live, : case.hidden], wanted[: case.live])
    assert (buffer[case.live :] == 7).all() and (buffer[:, case.hidden :] == 7).all()
    error = relative_error(buffer[: case.live, : case.hidden], oracle(arguments, options))
    assert error <= FUSED_MOE[DTYPE]

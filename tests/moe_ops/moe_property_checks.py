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
from moe_ops.fused_moe import launch_fused_moe
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

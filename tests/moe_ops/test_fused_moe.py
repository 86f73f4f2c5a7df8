"""``fused_moe`` on the CPU: literals, HF's eager experts, fp64, what it refuses, what it never reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import moe_ops  # noqa: F401  registers the ops
from moe_ops.errors import ArgumentError, DtypeError, ShapeError
from tests.moe_ops.moe_cases import FORMS, Case, build, check

fused_moe = torch.ops.moe_ep.fused_moe
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def test_literals():
    # one expert that keeps its gate and doubles: down(relu2(x * 3)), weight 0.5; the second slot is remote
    out = fused_moe(
        torch.tensor([[2.0], [-1.0]]), torch.tensor([[4, 0], [4, 4]]), torch.tensor([[0.5, 9.0], [1.0, 1.0]]),
        torch.tensor([[[3.0]]]), torch.tensor([[[2.0]]]), torch.tensor([2], dtype=torch.int32), 4,
        activation="relu2", gated=False,
    )  # fmt: skip
    assert out.tolist() == [[36.0], [0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_against_fp64(form, dtype):
    check(fused_moe, Case(rows=19, live=17, top_k=3), FORMS[form], dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(live=0),
        Case(rows=0),
        Case(rows=1, top_k=1),
        Case(routing="one"),
        Case(routing="none"),
        Case(index_dtype=torch.int32, weight_dtype=torch.bfloat16),
        Case(hidden=1, inner=1),
    ],
    ids=str,
)
def test_edges(case):
    out = check(fused_moe, case, {}, torch.float32)
    if case.routing == "none" or case.live == 0:
        assert not out[: case.live].any()


@pytest.mark.parametrize("model", ["mixtral", "gpt_oss", "deepseek_v4", "minimax_m3_vl", "nemotron_h"])
def test_equals_hf_eager_to_the_bit(model):
    experts, form = hf_experts(model)
    make = torch.Generator().manual_seed(1)
    hidden, ids = torch.randn(9, 16, generator=make), torch.randint(0, 4, (9, 2), generator=make)
    weights = torch.rand(9, 2, generator=make)
    up = experts.gate_up_proj if form.get("gated", True) else experts.up_proj
    with torch.no_grad():
        wanted = type(experts).forward.__wrapped__(experts, hidden, ids, weights)
        got = fused_moe(hidden, ids, weights, up, experts.down_proj, torch.tensor([9], dtype=torch.int32), 0, **form)
    assert torch.equal(got, wanted)


def hf_experts(model: str):
    """A tiny experts module of transformers, its weights random, and the op's keyword arguments for it."""
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    name, sizes, form = {
        "mixtral": ("MixtralExperts", {"num_local_experts": 4, "intermediate_size": 24, "hidden_act": "silu"}, {}),
        "gpt_oss": (
            "GptOssExperts",
            # the last two are constants in transformers 5.17, read from the configuration since 5.23
            {"num_local_experts": 4, "intermediate_size": 24, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
            {"activation": "swiglu_oai", "alpha": 1.702, "limit": 7.0, "transposed": True, "interleaved": True},
        ),
        "deepseek_v4": (
            "DeepseekV4Experts",
            {"num_local_experts": 4, "intermediate_size": 24, "hidden_act": "silu", "swiglu_limit": 0.3},
            {"limit": 0.3},
        ),
        "minimax_m3_vl": (
            "MiniMaxM3VLExperts",
            {"num_local_experts": 4, "intermediate_size": 24, "swiglu_alpha": 1.5, "swiglu_limit": 0.3},
            {"activation": "swiglu_oai", "alpha": 1.5, "limit": 0.3},
        ),
        "nemotron_h": (
            "NemotronHExperts",
            {"n_routed_experts": 4, "moe_intermediate_size": 24, "moe_latent_size": None, "mlp_hidden_act": "relu2"},
            {"activation": "relu2", "gated": False},
        ),
    }[model]  # fmt: skip
    config = type("Config", (), {"hidden_size": 16, "_experts_implementation": "eager", **sizes})()
    experts = getattr(modeling, name)(config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.normal_(std=0.5)
    if model == "gpt_oss":
        form |= {"gate_up_bias": experts.gate_up_proj_bias, "down_bias": experts.down_proj_bias}
    return experts, form


def test_out_dtype_and_strided_hidden():
    (hidden, *rest), _ = build(Case(), {}, torch.bfloat16)
    wide = torch.full((hidden.shape[0], hidden.shape[1] + 3), float("nan"), dtype=hidden.dtype)
    wide[:, : hidden.shape[1]] = hidden
    got = fused_moe(wide[:, : hidden.shape[1]], *rest, out_dtype=torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got.bfloat16(), fused_moe(hidden, *rest))


def test_two_calls_keep_the_first_result():
    arguments, _ = build(Case(), {}, torch.float32)
    first = fused_moe(*arguments)
    kept = first.clone()
    fused_moe(arguments[0] * 2, *arguments[1:])
    assert torch.equal(first, kept)


BAD = [
    ({"activation": "swish"}, ArgumentError, "pass one of silu"),
    ({"activation": "swiglu_oai"}, ArgumentError, "pass alpha"),
    ({"alpha": 1.0}, ArgumentError, "pass alpha with"),
    ({"activation": "gelu", "limit": 1.0}, ArgumentError, "leave limit out"),
    ({"limit": -1.0}, ArgumentError, "above 0"),
    ({"limit": float("nan")}, ArgumentError, "above 0"),
    ({"gated": False, "interleaved": True}, ArgumentError, "pass gated=True"),
    ({"transposed": True}, ShapeError, "do not fit"),
    ({"gated": False}, ShapeError, "do not fit"),
    ({"tokens_hint": -1}, ArgumentError, "below 0"),
    ({"out_dtype": torch.int8}, DtypeError, "bfloat16"),
    ({"down_bias": torch.zeros(4, 3)}, ShapeError, "contiguous tensor of shape"),
    ({"gate_up_bias": torch.zeros(4, 80, dtype=torch.float64)}, DtypeError, "float32"),
]


@pytest.mark.parametrize(("options", "error", "hint"), BAD, ids=lambda value: str(value)[:40])
def test_refuses_options(options, error, hint):
    arguments, _ = build(Case(), {}, torch.float32)
    with pytest.raises(error, match=hint):
        fused_moe(*arguments, **options)


@pytest.mark.parametrize(
    ("position", "value", "error", "hint"),
    [
        (0, torch.zeros(7, 48, dtype=torch.bfloat16), DtypeError, "cast hidden"),
        (0, torch.zeros(7, 47), ShapeError, "do not fit"),
        (0, torch.zeros(6, 48), ShapeError, "one row of ids"),
        (1, torch.zeros(7, 3, dtype=torch.int64), ShapeError, "one weight for each id"),
        (3, torch.zeros(4, 48, 80).transpose(1, 2), ShapeError, "pass it contiguous"),
        (4, torch.zeros(3, 48, 40), ShapeError, "do not fit"),
        (6, -1, ArgumentError, "below 0"),
    ],
)
def test_refuses_tensors(position, value, error, hint):
    arguments = list(build(Case(), {}, torch.float32)[0])
    arguments[position] = value
    with pytest.raises(error, match=hint):
        fused_moe(*arguments)


@pytest.mark.parametrize("form", ["swiglu", "gpt-oss"])
def test_opcheck(form):
    arguments, options = build(replace(Case(), live=5), FORMS[form], torch.float32)
    arguments[0][5:] = 0  # opcheck compares results, and rows that are not live are unspecified
    torch.library.opcheck(fused_moe.default, arguments, options)


def test_refuses_experts_without_inner_columns():
    hidden, ids, weights, gate_up, down, live, start = build(Case(), {}, torch.float32)[0]
    with pytest.raises(ShapeError, match="I of 1 or more"):
        fused_moe(hidden, ids, weights, gate_up[:, :0].contiguous(), down[..., :0].contiguous(), live, start)


def test_a_count_below_zero_is_no_row():
    """As the kernels take it: nothing of a result is then specified, but nothing is read either."""
    arguments = list(build(Case(), {}, torch.float32)[0])
    arguments[5] = torch.tensor([-3], dtype=torch.int32)
    assert not fused_moe(*arguments).any()
    ids, local, start = arguments[1], arguments[3].shape[0], arguments[6]
    *_, total = torch.ops.moe_ep.align_block_size(ids, arguments[5], 16, local, start)
    assert total.item() == 0

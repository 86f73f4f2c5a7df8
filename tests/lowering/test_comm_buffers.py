"""Experts and the combine behind them become one op, or the reason why not is reported."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lowering import comm_buffers, effects
from lowering.comm_buffers import CommBuffers
from lowering.effects import effect_ops
from lowering.fuse_combine import FuseCombine
from tests.lowering.layers import K, T, batch, inference_graph, ops, text, weights

COUNT = torch.tensor([5], dtype=torch.int32)


def experts(x: Tensor, w: dict[str, Tensor], valid: Tensor, **options: object) -> Tensor:
    ids = torch.zeros(T, K, dtype=torch.int64)
    return ops.fused_moe(x, ids, torch.ones(T, K), w["gate_up"], w["down"], valid, 0, **options)


def plain(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return ops.rsv_combine(experts(x, w, metadata[0:1]), count, metadata, T, "local")


def with_options(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    y = experts(x, w, metadata[0], activation="gelu", tokens_hint=3)
    return ops.rsv_combine(y, count, metadata, T, "local", out_dtype=torch.float32)


def with_residual(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return x + ops.rsv_combine(experts(x, w, metadata[0:1]), count, metadata, T, "local")


def no_experts(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return ops.rsv_combine(x, count, metadata, T, "local")


def added_too(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    y = experts(x, w, metadata[0:1])
    return ops.rsv_combine(y, count, metadata, T, "local") + y


def returned_too(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> tuple[Tensor, Tensor]:
    y = experts(x, w, metadata[0:1])
    return ops.rsv_combine(y, count, metadata, T, "local"), y.relu()


def another_count(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return ops.rsv_combine(experts(x, w, count), count, metadata, T, "local")


def another_number(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return ops.rsv_combine(experts(x, w, metadata[2:3]), count, metadata, T, "local")


def another_dtype(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    y = experts(x, w, metadata[0:1], out_dtype=torch.float16)
    return ops.rsv_combine(y, count, metadata, T, "local")


def lower(model: Callable) -> tuple[str, list[str], list[str]]:
    """Text after the pass, what it did, what it refused; the interpreted graph gives the same bits."""
    module, inputs = inference_graph(model, batch(), weights(), COUNT, torch.tensor([5, 0, 5], dtype=torch.int32))
    before = module(*inputs)[0]
    FuseCombine().run(module.graph)
    outcome = CommBuffers().run(module.graph)
    module.graph.lint()
    module.recompile()
    assert torch.equal(before, module(*inputs)[0])
    return text(module.graph), outcome.done, [refusal.reason for refusal in outcome.refused]


def test_two_ops_become_one():
    graph, done, refused = lower(plain)
    assert_expected_inline(
        graph,
        """\
_make_token_default = prims._make_token()
slice_1 = slice.Tensor(in0, 0, 0, 1)
full = full([8, 2], 0, dtype=torch.int64, layout=torch.strided, device=cpu, pin_memory=False)
full_1 = full([8, 2], 1, dtype=torch.float32, layout=torch.strided, device=cpu, pin_memory=False)
with_effects_1 = !fused_moe_combine(_make_token_default, in1, full, full_1, in2, in3, in4, in0, 0, 8, [], 'local', activation=silu, alpha=None, limit=None, gated=True, transposed=False, interleaved=False, gate_up_bias=None, down_bias=None, tokens_hint=None, batch_invariant=False, scale=1.0, round_each=True, norm_weight=None, norm_eps=0.0, norm_shift=0.0, norm_round_first=True, combine_dtype=None)
getitem_2 = with_effects_1[0]
getitem_3 = with_effects_1[1]
return (getitem_3)""",  # noqa: E501
    )
    assert done == ["with_effects_1: fused_moe and with_effects share a slot, 512 bytes stay unwritten"]
    assert not refused


def test_options_and_epilogue_come_along():
    graph, done, _ = lower(with_options)
    assert len(done) == 1 and "activation=gelu" in graph and "tokens_hint=3" in graph
    assert "combine_dtype=torch.float32" in graph
    graph, done, _ = lower(with_residual)
    assert len(done) == 1 and "rsv_combine" not in graph and " add" not in graph


def test_refusals_and_their_reasons():
    lines = []
    for model in (no_experts, added_too, returned_too, another_count, another_number, another_dtype):
        graph, done, refused = lower(model)
        assert not done and "fused_moe_combine" not in graph
        lines.append(f"{model.__name__}: {'; '.join(refused)}")
    assert_expected_inline(
        "\n".join(lines),
        """\
no_experts: arg1_1 comes from no fused_moe: it is copied into the slot
added_too: fused_moe is also added to the combine's result
returned_too: fused_moe has 2 readers
another_count: fused_moe counts its rows with another tensor than the combine's metadata
another_number: fused_moe counts its rows with another tensor than the combine's metadata
another_dtype: fused_moe returns torch.float16, the slot holds torch.bfloat16""",
    )


def test_a_transport_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch):
    """On CUDA, where every collective is launches of its own."""
    monkeypatch.setattr(comm_buffers, "is_one_kernel", lambda op: False)
    graph, done, refused = lower(plain)
    assert not done and refused == [effects.NO_KERNEL] and "!rsv_combine" in graph


def test_transports_with_kernels(monkeypatch: pytest.MonkeyPatch):
    """Of a graph on CUDA; before a group has a workspace, its transport is not known."""
    module, _ = inference_graph(no_experts, batch(), weights(), COUNT, torch.tensor([5, 0, 5], dtype=torch.int32))
    (combine,) = effect_ops(module.graph)
    combine.node.meta["val"] = (None, SimpleNamespace(device=torch.device("cuda")))
    joins = set()
    for transport in ("multicast", "p2p", "local", "nccl", "gloo", None):
        monkeypatch.setattr(effects, "transport_of", lambda group, transport=transport: transport)
        joins |= {transport} if effects.is_one_kernel(combine) else set()
    assert joins == {"multicast", "p2p", "local"}

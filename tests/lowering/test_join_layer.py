"""Dispatch, experts and combine become one op, or the reason why not is reported."""

from collections.abc import Callable

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor

from lowering import comm_buffers, torch_compat
from lowering.comm_buffers import CommBuffers
from lowering.effects import EffectOp, effect_ops
from lowering.fuse_combine import FuseCombine
from lowering.join_layer import JoinLayer
from tests.lowering.layers import T, batch, give_to_group, inference_graph, ops, routed, text, weights

COUNT = torch.tensor([5], dtype=torch.int32)
METADATA = torch.tensor([5, 0, 5], dtype=torch.int32)


def layer(
    x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor, **options: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer whose parts may differ: rows, capacity, what is read, how often."""
    ids, chosen = torch.zeros(T, 2, dtype=torch.int64), torch.ones(T, 2)
    rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, count, metadata, options.get("max_tokens", T), "local")
    y = ops.fused_moe(rows, ids, chosen, w["gate_up"], w["down"], metadata[0:1], 0)
    return ops.rsv_combine(y, count, metadata, options.get("rows", T), "local"), rows, y


def plain(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return layer(x, w, count, metadata)[0]


def with_residual(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return x @ w["shared"] + x + layer(x, w, count, metadata)[0]


def two_layers(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return plain(x + plain(x, w, count, metadata), w, count, metadata)


def batch_read_elsewhere(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    out, rows, _ = layer(x, w, count, metadata)
    return out + rows


def experts_read_elsewhere(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    out, _, y = layer(x, w, count, metadata)
    return out + y


def ids_read_elsewhere(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    ids, chosen = torch.zeros(T, 2, dtype=torch.int64), torch.ones(T, 2)
    rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, count, metadata, T, "local")
    y = ops.fused_moe(rows, ids, chosen, w["gate_up"], w["down"], metadata[0:1], 0)
    return ops.rsv_combine(y, count, metadata, T, "local") * ids.sum()


def fewer_rows(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    return layer(x, w, count, metadata, rows=T - 1)[0]


def another_count(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    ids, chosen = torch.zeros(T, 2, dtype=torch.int64), torch.ones(T, 2)
    rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, metadata[2:3], metadata, T, "local")
    y = ops.fused_moe(rows, ids, chosen, w["gate_up"], w["down"], metadata[0:1], 0)
    return ops.rsv_combine(y, count, metadata, T, "local")


def another_metadata(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    ids, chosen = torch.zeros(T, 2, dtype=torch.int64), torch.ones(T, 2)
    rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, count, metadata + 0, T, "local")
    y = ops.fused_moe(rows, ids, chosen, w["gate_up"], w["down"], metadata[0:1], 0)
    return ops.rsv_combine(y, count, metadata, T, "local")


def other_ids(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    ids, chosen = torch.zeros(T, 2, dtype=torch.int64), torch.ones(T, 2)
    rows, _, _ = ops.agv_dispatch(x, ids, chosen, count, metadata, T, "local")
    y = ops.fused_moe(rows, ids + 1, chosen, w["gate_up"], w["down"], metadata[0:1], 0)
    return ops.rsv_combine(y, count, metadata, T, "local")


def something_between(x: Tensor, w: dict[str, Tensor], count: Tensor, metadata: Tensor) -> Tensor:
    ids, chosen = torch.zeros(T, 2, dtype=torch.int64), torch.ones(T, 2)
    rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, count, metadata, T, "local")
    other = ops.metadata_update(metadata[2:3], "local")
    y = ops.fused_moe(rows, ids, chosen, w["gate_up"], w["down"], metadata[0:1], 0)
    return ops.rsv_combine(y, count, metadata, T, "local") + other[0]


def lower(model: Callable) -> tuple[str, list[str], list[str]]:
    """Text after the pass, what it did, what it refused; the interpreted graph gives the same bits."""
    module, inputs = inference_graph(model, batch(), weights(), COUNT, METADATA)
    before = module(*inputs)[0]
    FuseCombine().run(module.graph, "eager")
    CommBuffers().run(module.graph)
    outcome = JoinLayer().run(module.graph)
    module.graph.lint()
    module.recompile()
    assert torch.equal(before, module(*inputs)[0])
    return text(module.graph), outcome.done, [refusal.reason for refusal in outcome.refused]


def test_three_ops_become_one():
    graph, done, refused = lower(plain)
    assert_expected_inline(
        graph,
        """\
_make_token_default = prims._make_token()
full = full([8, 2], 0, dtype=torch.int64, layout=torch.strided, device=cpu, pin_memory=False)
full_1 = full([8, 2], 1, dtype=torch.float32, layout=torch.strided, device=cpu, pin_memory=False)
slice_1 = slice.Tensor(in0, 0, 0, 1)
with_effects_3 = !moe_layer(_make_token_default, in1, full, full_1, in2, in3, in4, in0, 0, 8, [], 'local', scale=1.0, round_each=True, combine_dtype=None, norm_weight=None, norm_eps=0.0, norm_shift=0.0, norm_round_first=True, activation=silu, alpha=None, limit=None, gated=True, transposed=False, interleaved=False, gate_up_bias=None, down_bias=None, tokens_hint=None, batch_invariant=False)
getitem_8 = with_effects_3[0]
getitem_9 = with_effects_3[1]
return (getitem_9)""",  # noqa: E501
    )
    assert done == [
        "with_effects_3: with_effects and with_effects_2; the gathered batch, 512 bytes, stays inside"
    ] and not refused  # fmt: skip


def test_addends_come_along_and_every_layer_joins():
    graph, done, _ = lower(with_residual)
    assert len(done) == 1 and "!moe_layer" in graph and "fused_moe" not in graph and "agv_dispatch" not in graph
    graph, done, _ = lower(two_layers)
    assert len(done) == 2 and graph.count("!moe_layer") == 2 and graph.count("!") == 2


def test_refusals_and_their_reasons():
    lines = []
    for model in (
        batch_read_elsewhere, experts_read_elsewhere, ids_read_elsewhere, fewer_rows, another_count, another_metadata,
        other_ids, something_between,
    ):  # fmt: skip
        graph, done, refused = lower(model)
        assert not done and "!agv_dispatch" in graph
        lines.append(f"{model.__name__}: {'; '.join(refused)}")
    assert_expected_inline(
        "\n".join(lines),
        """\
batch_read_elsewhere: the gathered hidden is also added to the combine's result
experts_read_elsewhere: the next ordered op is rsv_combine_add, not experts joined with their combine
ids_read_elsewhere: the gathered topk_ids is also read by sum_1
fewer_rows: with_effects_2 returns 7 rows, this rank sends 8
another_count: with_effects_2 has another local_tokens
another_metadata: with_effects_2 has another metadata
other_ids: with_effects_2 takes its topk_ids from elsewhere
something_between: the next ordered op is metadata_update, not experts joined with their combine""",
    )


def tear_off(rest: EffectOp) -> None:
    """Another chain of tokens, which says nothing of what the dispatch's chain waits for."""
    (first,) = rest.node.graph.find_nodes(op="call_function", target=torch.ops.prims._make_token.default)
    with rest.node.graph.inserting_before(first):
        rest.node.update_arg(0, torch_compat.insert_call(rest.node.graph, first.target))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda rest: give_to_group(rest, "other"), "with_effects_2 has another group_name"),
        (tear_off, "with_effects_2 is not the next op in the chain of tokens"),
    ],
    ids=["group", "tokens"],
)
def test_experts_of_another_group_or_chain_do_not_join(change: Callable[[EffectOp], None], reason: str):
    module, _ = inference_graph(plain, batch(), weights(), COUNT, METADATA)
    CommBuffers().run(module.graph)
    _, rest = effect_ops(module.graph)
    change(rest)
    outcome = JoinLayer().run(module.graph)
    assert not outcome.done and [refusal.reason for refusal in outcome.refused] == [reason]


def test_a_transport_without_kernels_keeps_the_ops(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(comm_buffers, "is_one_kernel", lambda op: False)
    graph, done, refused = lower(plain)
    assert not done and "!agv_dispatch" in graph and "!rsv_combine" in graph
    assert refused == ["the next ordered op is rsv_combine, not experts joined with their combine"]


def test_a_whole_layer_with_its_router():
    module, inputs = inference_graph(routed, batch(), weights(), COUNT)
    before = module(*inputs)[0]
    CommBuffers().run(module.graph)
    assert len(JoinLayer().run(module.graph).done) == 1
    module.recompile()
    assert torch.equal(before, module(*inputs)[0])

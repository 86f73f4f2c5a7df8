"""What the ops owe PyTorch: opcheck, and communication that the compiler neither moves nor drops."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._pytree import tree_map_only

import moe_ops

ops = torch.ops.moe_ep
T, K, H, I, E, M = 3, 2, 8, 4, 4, 6
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu("one H200"))]


def arguments(device: str) -> dict[str, tuple]:
    """A small call of every op, one rank, all rows live (opcheck compares results, others are unspecified)."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    hidden, ids = torch.randn(T, H, dtype=dtype), torch.randint(0, E, (T, K), dtype=torch.int32)
    weights, count = torch.rand(T, K), torch.tensor([T], dtype=torch.int32)
    metadata = torch.tensor([T, 0, T], dtype=torch.int32)
    gate_up, down = torch.randn(E, 2 * I, H, dtype=dtype), torch.randn(E, H, I, dtype=dtype)
    routed, shared = (hidden, ids, weights, gate_up, down, count), [torch.randn(H, 4, dtype=dtype) for _ in range(2)]
    layer, addends = (*routed, metadata, 0, T), [torch.randn(T, H, dtype=dtype)]
    # fmt: off
    calls = {
        "metadata_update": (count, "local"),
        "agv_dispatch": (hidden, ids, weights, count, metadata, T, "local"),
        "align_block_size": (ids, count, 16, E, 0),
        "fused_moe": (*routed, 0),
        "rsv_combine": (hidden, count, metadata, T, "local"),
        "agv_dispatch_into": (
            hidden, ids, weights, count, metadata,
            torch.zeros_like(hidden), torch.zeros_like(ids), torch.zeros_like(weights), "local",
        ),
        "rsv_combine_from": (hidden, count, metadata, T, [], "local"),
        "fused_moe_into": (*routed, 0, torch.zeros_like(hidden)),
        "expert_linear": (hidden, ids, gate_up, count, 0),
        "topk_sum": (torch.randn(T * K, H, dtype=dtype), ids, weights, count, 0, E),
        "rsv_combine_add": (hidden, count, metadata, T, addends, "local"),
        "fused_moe_combine": (*layer, addends, "local"),
        "moe_layer": (*layer, addends, "local"),
        "moe_layer_shared": (*layer, addends, hidden, shared, torch.randn(4, H, dtype=dtype), 1, "local"),
    }
    # fmt: on
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), calls)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", sorted(arguments("cpu")))
def test_opcheck(name: str, device: str) -> None:
    torch.library.opcheck(getattr(ops, name).default, arguments(device)[name])


def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The communication ops that run, in order."""
    seen: list[str] = []

    def logged(resolve: Callable) -> Callable:
        def call(group_name: str, op: str) -> object:
            seen.append(op)
            return resolve(group_name, op)

        return call

    for module in (moe_ops.metadata, moe_ops.dispatch, moe_ops.combine):
        monkeypatch.setattr(module, "resolve", logged(module.resolve))
    return seen


def test_inductor_keeps_order_and_unused_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that no data joins: one's result is not used, the others' are used in another order than they are made."""
    seen = spy(monkeypatch)
    call = arguments("cpu")

    def program(x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        late = ops.rsv_combine(x, *call["rsv_combine"][1:])
        ops.metadata_update(*call["metadata_update"])
        early = ops.rsv_combine(y * 2, *call["rsv_combine"][1:])
        gathered = ops.agv_dispatch(*call["agv_dispatch"])[0]
        return early.sin() + gathered, late.cos()

    x, y = call["rsv_combine"][0], call["rsv_combine"][0] + 1
    with torch.no_grad():
        wanted = program(x, y)
        in_program = list(seen)
        assert in_program == ["rsv_combine", "metadata_update", "rsv_combine", "agv_dispatch"]
        compiled = torch.compile(program, fullgraph=True)
        compiled(x, y)
        seen.clear()
        got = compiled(x, y)
    assert seen == in_program
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)

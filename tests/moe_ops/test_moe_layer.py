"""moe_layer and moe_layer_shared: bit-equal to dispatch, experts, combine and the ops around them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from moe_ops import fused_moe_launch
from moe_ops.buffers import SymmetricTensors
from moe_ops.combine_add import Epilogue, Norm, Pairs, apply_epilogue
from moe_ops.emulator import Rank, run_ranks
from moe_ops.errors import ArgumentError, ShapeError
from moe_ops.fused_moe import launch_fused_moe_pairs
from moe_ops.local_combine import launch_local_combine
from moe_ops.symmetric import Layout, SymmetricBuffer
from tests.moe_ops.interpreted import run_checks

ops = torch.ops.moe_ep
M, T, H, K, E, I, S = 6, 4, 32, 2, 4, 16, 24
COUNT = torch.tensor([3], dtype=torch.int32)
METADATA = torch.tensor([3, 0, 3], dtype=torch.int32)


def arguments(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Row 3 is not live: its weight is NaN."""
    generator = torch.Generator().manual_seed(0)
    values = {
        "hidden": torch.randn(T, H, generator=generator).to(dtype),
        "topk_ids": torch.randint(0, E, (T, K), generator=generator),
        "topk_weights": torch.rand(T, K, generator=generator),
        "gate_up": (torch.randn(E, 2 * I, H, generator=generator) / 4).to(dtype),
        "down": (torch.randn(E, H, I, generator=generator) / 4).to(dtype),
    }
    values["topk_weights"][3] = torch.nan
    return values


def shared_weights() -> tuple[Tensor, Tensor, Tensor]:
    """gate (H, S), up (H, S), down (S, H); the first two as views of what HF stores."""
    generator = torch.Generator().manual_seed(1)
    gate, up = (torch.randn(S, H, generator=generator).bfloat16() for _ in range(2))
    return gate.T, up.T, torch.randn(S, H, generator=generator).bfloat16()


def alone(values: dict[str, Tensor], addends: list[Tensor], max_tokens: int = M, **options: object) -> Tensor:
    hidden, ids, weights, gate_up, down = values.values()
    rows, ids, weights = ops.agv_dispatch(hidden, ids, weights, COUNT, METADATA, max_tokens, "local")
    y = ops.fused_moe(rows, ids, weights, gate_up, down, METADATA[0:1], 0, **options)
    out = ops.rsv_combine(y, COUNT, METADATA, T, "local")
    for addend in addends:
        out = out + addend
    return out


@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"tokens_hint": 2, "batch_invariant": True}], ids=str)
@pytest.mark.parametrize("max_tokens", [T, M])
def test_equals_the_ops_alone(options: dict, max_tokens: int):
    values, addends = arguments(), [torch.randn(T, H).bfloat16() for _ in range(2)]
    joined = ops.moe_layer(*values.values(), COUNT, METADATA, 0, max_tokens, addends, "local", **options)
    assert torch.equal(joined, alone(values, addends, max_tokens, **options))
    assert torch.equal(joined[3], addends[0][3] + addends[1][3])  # a dead row


@pytest.mark.parametrize("position", [-1, 0, 1])
@pytest.mark.parametrize("fused", [False, True])
def test_the_shared_expert_beside(position: int, fused: bool):
    values, (gate, up, down) = arguments(), shared_weights()
    weights = [torch.cat([gate, up], 1)] if fused else [gate, up]
    addend = torch.randn(T, H).bfloat16()
    x = values["hidden"]
    act = (F.silu((x @ gate).float()) * (x @ up).float()).bfloat16()
    out, beside = ops.moe_layer_shared(
        *values.values(), COUNT, METADATA, 0, M, [addend], x, weights, down, position, "local"
    )
    assert torch.equal(beside, act @ down)
    order = {-1: [addend], 0: [beside, addend], 1: [addend, beside]}[position]
    assert torch.equal(out, alone(values, order))


def test_without_its_last_product_and_rounded_after_each_step():
    values, (gate, up, _) = arguments(), shared_weights()
    x = values["hidden"]
    call = (*values.values(), COUNT, METADATA, 0, M, [], x, [gate, up], None, -1, "local")
    _, once = ops.moe_layer_shared(*call)
    _, each = ops.moe_layer_shared(*call, shared_round_each=True)
    assert torch.equal(once, (F.silu((x @ gate).float()) * (x @ up).float()).bfloat16())
    assert torch.equal(each, F.silu(x @ gate) * (x @ up)) and not torch.equal(once, each)


@pytest.mark.parametrize("position", [-1, 0])
@pytest.mark.parametrize("fused", [False, True])
def test_the_thin_shared_expert(position: int, fused: bool):
    """Each product summed in fp32 and rounded once; whatever is added where, as with the library's products."""
    values, (gate, up, down) = arguments(), shared_weights()
    weights, x = [torch.cat([gate, up], 1)] if fused else [gate, up], values["hidden"]
    projected = [(x.float() @ weight.float()).bfloat16().float() for weight in (gate, up)]
    act = (F.silu(projected[0]) * projected[1]).bfloat16()
    call = (*values.values(), COUNT, METADATA, 0, M, [], x, weights)
    out, beside = ops.moe_layer_shared(*call, down, position, "local", shared_thin=True)
    assert torch.equal(beside, (act.float() @ down.float()).bfloat16())
    assert torch.equal(out, alone(values, [beside] if position == 0 else []))
    assert torch.equal(ops.moe_layer_shared(*call, None, -1, "local", shared_thin=True)[1], act)


def test_thin_kernels_in_the_interpreter():
    run_checks("thin_shared_checks.py", interpret=True)


@pytest.mark.gpu("1 H200: the compiled kernels, bf16")
def test_thin_kernels_on_the_gpu():
    run_checks("thin_shared_checks.py", interpret=False)


def local_combines(rank: Rank) -> None:
    """The one-launch combine of a single rank equals the plain steps, rows and pairs, whatever dead rows hold."""
    _ = rank.channel(Layout(1, 4, 40, 3, torch.bfloat16))  # installs the interpreter's hooks
    generator = torch.Generator().manual_seed(2)
    for width, top_k, addends, round_each in ((40, 3, 2, False), (9, 2, 1, True), (8, 0, 0, True), (1032, 0, 2, False)):
        rows = torch.randn(T * max(top_k, 1), width, generator=generator).bfloat16()
        more = [torch.randn(T, width, generator=generator).bfloat16() for _ in range(addends)]
        epilogue, source, want = Epilogue(more, 0.5, round_each), rows, rows.float()
        if top_k:
            ids = torch.randint(-1, E, (T, top_k), generator=generator)
            weights = torch.rand(T, top_k + 5, generator=generator)[:, :top_k]  # rows apart, as in the layer batch
            weights[3] = torch.nan
            rows[((ids < 1) | (ids > 2)).flatten()] = torch.nan  # not written: experts 1 and 2 are here
            source, parts = Pairs(rows, ids, weights, 1, 2), rows.float().view(T, top_k, width)
            here = ((ids >= 1) & (ids <= 2))[..., None]
            want = torch.zeros(T, width)
            for slot in range(top_k):
                want += torch.where(here[:, slot], weights[:, slot, None] * parts[:, slot], 0.0)
        want = torch.where(torch.arange(T)[:, None] < COUNT, want, 0.0).bfloat16()
        got = launch_local_combine(source, COUNT, T, epilogue, torch.bfloat16)
        assert torch.equal(got, apply_epilogue(want, epilogue)), (width, top_k)
        with_norm = epilogue._replace(norm=Norm(rows[0, :width].abs().nan_to_num(1.0), 1e-6, 0.5, round_each))
        both = launch_local_combine(source, COUNT, T, with_norm, torch.bfloat16)
        assert torch.equal(both[0], got)
        torch.testing.assert_close(both[1], apply_epilogue(want, with_norm)[1], rtol=2**-6, atol=0.0)


def test_local_combine():
    run_ranks(1, local_combines)


class Called(TorchDispatchMode):
    """Names of the ops of torch that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_experts_read_the_layer_batch_where_it_lies(monkeypatch: pytest.MonkeyPatch):
    """GPT-OSS: four weights of 16 bits a row lie 16 bytes apart; what the experts launch copies nothing first."""
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)
    monkeypatch.setattr(fused_moe_launch, "device_of", lambda tensor: ("NVIDIA H200", 132))
    with torch.device("meta"):
        layout, count = Layout(2, T, H, 4, torch.bfloat16), torch.empty(1, dtype=torch.int32)
        memory = SymmetricTensors(layout, lambda nbytes: SymmetricBuffer(torch.empty(nbytes, dtype=torch.uint8), count))
        batch = memory.layer_batch(2 * T, torch.int64, torch.bfloat16)
        experts = [torch.empty(E, 2 * I, H).bfloat16(), torch.empty(E, H, I).bfloat16()]
        with Called() as called:
            pairs, _, weights = launch_fused_moe_pairs(*batch, *experts, count, 0)
    assert weights.stride() == (8, 1) and pairs.shape == (2 * T * 4, H)
    assert not called.names & {"clone", "copy_", "_to_copy", "contiguous"}, called.names


def test_opcheck():
    values, (gate, up, down) = arguments(), shared_weights()
    addends = [torch.randn(T, H).bfloat16()]
    norm = {"norm_weight": torch.randn(H).bfloat16(), "norm_eps": 1e-6}
    for options in ({}, norm):
        torch.library.opcheck(ops.moe_layer, (*values.values(), COUNT, METADATA, 0, M, addends, "local"), options)
    shared = (values["hidden"], [gate, up], down, 1)
    call = (*values.values(), COUNT, METADATA, 0, M, addends, *shared, "local")
    torch.library.opcheck(ops.moe_layer_shared, call, norm)


def test_mistakes_are_named():
    values, (gate, up, down) = arguments(), shared_weights()
    x, call = values["hidden"], (*values.values(), COUNT, METADATA, 0, M, [])
    with pytest.raises(ShapeError, match=r"moe_layer_shared: shared_gate_up\[1\] is \(32, 23\)"):
        ops.moe_layer_shared(*call, x, [gate, up[:, :-1]], down, -1, "local")
    with pytest.raises(ShapeError, match="shared_thin with 65 rows; pass at most 64"):
        ops.moe_layer_shared(*call, x.new_zeros(65, H), [gate, up], down, -1, "local", shared_thin=True)
    with pytest.raises(ArgumentError, match="3 tensors in shared_gate_up"):
        ops.moe_layer_shared(*call, x, [gate, up, up], down, -1, "local")
    with pytest.raises(ShapeError, match="shared_position = 0, but the shared expert does not return"):
        ops.moe_layer_shared(*call, x, [gate, up], None, 0, "local")

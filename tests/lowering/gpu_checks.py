"""Lowering on GPUs: bits of the joined kernels, one CUDA graph, no copies, changing counts.

torchrun --nproc-per-node 2 tests/lowering/gpu_checks.py [words: only checks whose name has one of them]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import lowering
import moe_ops
from lowering import route_rows, torch_compat
from tests.lowering.gpu_steps import check_launches, check_step

ops = torch.ops.moe_ep
T, H, K, E, I, LAYERS = 8, 1024, 4, 16, 256, 2
INEXACT = 0.02  # of a row's norm, in every row: their routers decide clearly, so that no rounding flips a route
MARGIN = 0.05  # of the last score chosen, to the next: 13 steps of bf16


def tensor(seed: int, *size: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda", dtype=torch.bfloat16) * scale


def make_model(group: str, rank: int, world: int, shared: str) -> Callable[[Tensor, Tensor], Tensor]:
    """LAYERS layers with a residual, each asking for its own metadata; ``margins`` gets those of each router.

    ``shared``, the shared expert: "none", "added" at once, "gated", or "wide" (in three dimensions).
    """
    local, width = E // world, 512
    router, gate, up = tensor(1, H, E, scale=H**-0.5), *(tensor(n, width, H, scale=H**-0.5) for n in (2, 3))
    last, sigmoid = tensor(4, H, width, scale=width**-0.5), tensor(5, 1, H, scale=H**-0.5)
    gate_up = [tensor(10 + 100 * rank + n, local, 2 * I, H, scale=H**-0.5) for n in range(LAYERS)]
    down = [tensor(50 + 100 * rank + n, local, H, I, scale=I**-0.5) for n in range(LAYERS)]

    def mlp(x: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), last)

    def model(x: Tensor, count: Tensor, margins: list[Tensor] | None = None) -> Tensor:
        for n in range(LAYERS):
            metadata = ops.metadata_update(count, group)
            if margins is not None:
                margins.append(margin(x @ router))
            chosen, ids = (x @ router).softmax(-1).topk(K, -1)
            rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, count, metadata, world * T, group)
            y = ops.fused_moe(rows, ids, chosen, gate_up[n], down[n], metadata[0:1], rank * local)
            out = ops.rsv_combine(y, count, metadata, T, group)
            if shared == "added":
                out = out + mlp(x)
            elif shared == "gated":
                out = out + torch.sigmoid(F.linear(x, sigmoid)) * mlp(x)
            elif shared == "wide":
                out = (out.view(2, -1, H) + mlp(x.view(2, -1, H))).view(-1, H)
            x = x + out
        return x

    return model


def margin(logits: Tensor) -> Tensor:
    """(T,): by how much the last expert chosen is ahead of the next, as a part of its score."""
    last, following = logits.float().softmax(-1).topk(K + 1, -1).values[:, -2:].unbind(-1)
    return (last - following) / last


def clear_rows(model: Callable, rank: int) -> Tensor:
    """``(T, H)`` in which all routers of ``model`` decide clearly, out of more; collective."""
    rows, found = tensor(20 + rank, 16 * T, H), []
    count = torch.tensor([T], dtype=torch.int32, device="cuda")
    for some in rows.split(T):
        margins: list[Tensor] = []
        model(some, count, margins)
        found.append(torch.stack(margins).amin(0))
    least = torch.cat(found)
    best = least.argsort(descending=True)[:T]
    assert float(least[best].min()) > MARGIN, least[best]
    return rows[best]


def check_joined_kernels(group: str, rank: int, world: int) -> None:
    """fused_moe_combine and moe_layer equal the ops one by one, bit for bit, for few and many rows."""
    local = E // world
    for rows in (1, 3, T, 64):
        gathered = world * rows
        gate_up, down = tensor(3 + rank, local, 2 * I, H, scale=H**-0.5), tensor(7 + rank, local, H, I, scale=I**-0.5)
        generator = torch.Generator("cuda").manual_seed(5 + rank)
        ids = torch.randint(0, E, (rows, K), generator=generator, device="cuda")
        weights = torch.rand(rows, K, generator=generator, device="cuda")
        hidden, addends = tensor(4 + rank, rows, H), [tensor(8 + rank, rows, H), tensor(9 + rank, rows, H)]
        for live in {0, rows // 2, rows}:
            count = torch.tensor([max(live - rank, 0)], dtype=torch.int32, device="cuda")
            metadata = ops.metadata_update(count, group)
            batch = ops.agv_dispatch(hidden, ids, weights, count, metadata, gathered, group)
            y = ops.fused_moe(*batch, gate_up, down, metadata[0:1], rank * local)
            alone = ops.rsv_combine(y, count, metadata, rows, group)
            arguments = (gate_up, down, count, metadata, rank * local)
            assert torch.equal(ops.fused_moe_combine(*batch, *arguments, rows, [], group), alone), (rows, live)
            joined = ops.fused_moe_combine(*batch, *arguments, rows, addends, group)
            assert torch.equal(joined, alone + addends[0] + addends[1]), (rows, live)
            for entry_barrier in (True, False, False):
                call = (hidden, ids, weights, *arguments, gathered)
                layer = ops.moe_layer(*call, addends, group, entry_barrier=entry_barrier)
                assert torch.equal(layer, joined), (rows, live, entry_barrier)
                check_shared_expert(call, joined, addends, group)
            routed = ops.moe_layer(*call, addends, group, entry_barrier=False, experts_per_rank=local)
            assert torch.equal(routed, joined), (rows, live)


def check_norm(group: str, rank: int, world: int) -> None:
    """A combine that normalises: rows as without, bit for bit; their norm but for the order of a sum."""
    local = E // world
    for rows, round_first in ((1, True), (3, False), (T, True), (64, False)):
        gate_up, down = tensor(3 + rank, local, 2 * I, H, scale=H**-0.5), tensor(7 + rank, local, H, I, scale=I**-0.5)
        ids = torch.randint(0, E, (rows, K), generator=torch.Generator("cuda").manual_seed(5 + rank), device="cuda")
        weights, weight = torch.rand(rows, K, device="cuda"), tensor(30, H)
        norm = {"norm_weight": weight, "norm_eps": 1e-6, "norm_round_first": round_first}
        for live in {0, rows // 2, rows}:
            count = torch.tensor([max(live - rank, 0)], dtype=torch.int32, device="cuda")
            metadata = ops.metadata_update(count, group)
            call = (tensor(4 + rank, rows, H), ids, weights, gate_up, down, count, metadata, rank * local, world * rows)
            x = ops.moe_layer(*call, [tensor(8 + rank, rows, H)], group)
            both = ops.moe_layer(*call, [tensor(8 + rank, rows, H)], group, **norm)
            wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
            want = weight * wide.to(x.dtype) if round_first else (weight * wide).to(x.dtype)
            assert torch.equal(both[0], x), (rows, live)
            torch.testing.assert_close(both[1], want, rtol=2**-6, atol=0.0)


def check_shared_expert(call: tuple, joined: Tensor, addends: list[Tensor], group: str) -> None:
    """Beside the layer: the bits of Inductor's own code, and no influence on the layer."""
    x, width = call[0], 384
    gate, up = (tensor(60 + n, width, H, scale=H**-0.5).t() for n in range(2))
    down = tensor(63, width, H, scale=width**-0.5)
    out, beside = ops.moe_layer_shared(*call, addends, x, [gate, up], down, -1, group)
    assert torch.equal(out, joined)
    act = _act(x @ gate, x @ up)
    assert torch.equal(beside, act @ down)
    _, act_alone = ops.moe_layer_shared(*call, addends, x, [torch.cat([gate, up], 1)], None, -1, group)
    both = x @ torch.cat([gate, up], 1)
    assert torch.equal(act_alone, _act(*both.chunk(2, -1)))
    for position in (-1, 0, len(addends)):
        thin, alone = ops.moe_layer_shared(*call, addends, x, [gate, up], down, position, group, shared_thin=True)
        within = {"rtol": 2e-2, "atol": 2e-2 * float(beside.abs().max())}  # a sum in another order, rounded twice
        torch.testing.assert_close(alone, beside, **within)
        torch.testing.assert_close(thin, joined + alone if position >= 0 else joined, **within)


@torch.compile(dynamic=True)
def _act(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def check_one_graph(model: Callable, x: Tensor, rounding: str, transport: str, layer: str) -> None:
    """One CUDA graph, no partition, no skip, no copy beside an op; every layer is one op."""
    lowering.enable(rounding=rounding, inexact=False)
    count = torch.tensor([T], dtype=torch.int32, device="cuda")
    explanation = lowering.explain(model, x, count, mode="reduce-overhead")
    if dist.get_rank() == 0:
        print(explanation, flush=True)
    assert explanation.compiled_graphs == 1 and not explanation.graph_breaks
    assert explanation.partitions <= 1 and explanation.cudagraph_skips == 0
    assert explanation.copies == [], explanation.copies
    assert explanation.ops["metadata_update"] == 1
    if transport in ("p2p", "multicast", "local"):
        assert explanation.ops[layer] == LAYERS, explanation.ops


def replay(model: Callable, x: Tensor, counts: list[int]) -> list[Tensor]:
    """Results of a CUDA graph over changing live counts."""
    torch._dynamo.reset()
    before = torch_compat.compile_counts()
    compiled = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    count = torch.zeros(1, dtype=torch.int32, device="cuda")
    results = []
    with torch.no_grad():
        for live in [T, T, T, *counts]:
            count.fill_(live)
            torch.compiler.cudagraph_mark_step_begin()
            results.append(compiled(x, count).clone())
    after = torch_compat.compile_counts()
    assert after.graphs - before.graphs == 1 and after.cuda_graphs >= 1, (before, after)
    return results[3:]


def check_model(shared: str, group: str, rank: int, world: int, transport: str) -> None:
    """Lowered equals unlowered bit for bit, captured, with changing live counts; inexact within rounding."""
    model = make_model(group, rank, world, shared)
    x = clear_rows(model, rank)
    layer = "moe_layer" if shared == "none" else "moe_layer_shared"
    for rounding in ("compiled", "eager"):
        check_one_graph(model, x, rounding, transport, layer)
    counts = [max(live - rank, 0) for live in (T, 3, 0, 5, T)]
    lowering.enable(rounding="compiled")
    lowered = replay(model, x, counts)
    lowering.enable(inexact=True)
    inexact = replay(model, x, counts)
    lowering.disable()
    plain = replay(model, x, counts)
    for n, (one, other, near) in enumerate(zip(lowered, plain, inexact, strict=True)):
        assert torch.equal(one[: counts[n]], other[: counts[n]]), (shared, n)
        if counts[n]:
            off = (near - other)[: counts[n]].float().norm(dim=1) / other[: counts[n]].float().norm(dim=1)
            assert bool((off < INEXACT).all()), (shared, n, off)


def main() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))
    world, failed = dist.get_world_size(), 0
    ws = moe_ops.init_workspace(None, max_tokens_per_rank=64, hidden_size=H, top_k=K, timeout_s=60)
    ws.allocate()
    moe_ops.place_experts(ws, rank * (E // world), E // world)
    route_rows.LEAST_BYTES = 0
    checks: list[tuple[str, Callable[[], None]]] = []
    if ws.transport in ("p2p", "multicast"):
        layers = dist.new_group()
        checks.append(("launches", lambda: check_launches(layers)))
    group = dist.new_group()  # a workspace of its own: the models' sizes are others
    for family in ("gpt_oss", "qwen3_moe", "deepseek_v3") if world > 1 else ():
        checks.append((f"step, {family}", lambda f=family: check_step(f, group, ws.transport)))
    checks += [
        ("joined kernels", lambda: check_joined_kernels(ws.group_name, rank, world)),
        ("joined kernels, W = 1", lambda: check_joined_kernels("local", 0, 1)),
        ("norm", lambda: check_norm(ws.group_name, rank, world)),
        ("norm, W = 1", lambda: check_norm("local", 0, 1)),
    ]
    for shared in ("none", "added", "gated", "wide"):
        checks.append((f"model, {shared}", lambda s=shared: check_model(s, ws.group_name, rank, world, ws.transport)))
    for shared in ("none", "gated"):
        checks.append((f"model, {shared}, W = 1", lambda s=shared: check_model(s, "local", 0, 1, "local")))
    words = sys.argv[1:] or [""]
    for name, check in checks:
        if not any(word in name for word in words):
            continue
        began = time.monotonic()
        try:
            check()
            verdict = "passed"
        except Exception as error:
            verdict, failed = f"FAILED {type(error).__name__}: {str(error)[:600]}", failed + 1
        seconds = time.monotonic() - began
        print(f"rank {rank} of {world}, {ws.transport}: {name}: {verdict} ({seconds:.0f} s)", flush=True)
    ws.check()
    dist.barrier()
    os._exit(int(failed > 0))  # NCCL work captured in graphs can hang its own shutdown


if __name__ == "__main__":
    main()

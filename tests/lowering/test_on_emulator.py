"""Whole compiled layers on the kernels in the emulator: lowered equals unlowered, bit for bit, with changing counts."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import moe_ops
from moe_ops.emulator import Rank, run_ranks

ops = torch.ops.moe_ep
T, H, K, E, I, S, LAYERS = 4, 32, 2, 5, 16, 24, 2


def tensor(seed: int, *size: int) -> Tensor:
    return (torch.randn(*size, generator=torch.Generator().manual_seed(seed)) / 4).bfloat16()


def split(rank: int, world: int) -> tuple[int, int]:
    """Uneven: the first ranks have one expert more."""
    base, more = divmod(E, world)
    return rank * base + min(rank, more), base + (rank < more)


def compiled_layers(rank: Rank, shared: str) -> dict:
    """What one rank saw: ops after lowering, fingerprint, meetings, and whether the bits are equal."""
    import lowering
    from lowering import torch_compat
    from lowering.passes import RECENT

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=rank.store, rank=rank.rank, world_size=rank.world_size)
    transport = "emulator-multicast" if rank.multicast else "emulator"
    ws = moe_ops.init_workspace(None, max_tokens_per_rank=T, hidden_size=H, top_k=K, transport=transport, timeout_s=60)
    start, count_here = split(rank.rank, rank.world_size)
    router, gate, up, down = tensor(1, H, E), tensor(2, S, H), tensor(3, S, H), tensor(4, H, S)
    experts = [(tensor(10 + n, E, 2 * I, H), tensor(30 + n, E, H, I)) for n in range(LAYERS)]
    local = [[weight[start : start + count_here].contiguous() for weight in pair] for pair in experts]

    def model(x: Tensor, live: Tensor) -> Tensor:
        for gate_up, last in local:
            metadata = ops.metadata_update(live, ws.group_name)
            chosen, ids = (x @ router).float().softmax(-1).topk(K, -1)
            rows, ids, chosen = ops.agv_dispatch(x, ids, chosen, live, metadata, rank.world_size * T, ws.group_name)
            y = ops.fused_moe(rows, ids, chosen, gate_up, last, metadata[0:1], start)
            out = ops.rsv_combine(y, live, metadata, T, ws.group_name)
            if shared == "added":
                out = out + F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
            elif shared == "gated":
                s = F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
                out = out + torch.sigmoid(x[:, :1]) * s
            x = x + out
        return x

    x, lives = tensor(50 + rank.rank, T, H), [(rank.rank + step) % (T + 1) for step in (3, 0, 4, 2)]

    def run() -> tuple[list[Tensor], int]:
        torch._dynamo.reset()
        begin = int(ws.channel.state[1])
        with torch.no_grad(), torch_compat.without_caches():
            compiled = torch.compile(model, fullgraph=True)
            results = [compiled(x, torch.tensor([live], dtype=torch.int32))[:live] for live in lives]
        return results, int(ws.channel.state[1]) - begin

    try:
        lowering.enable(rounding="compiled", without=[])
        lowered, meetings = run()
        report = RECENT[-1]
        lowering.disable()
        plain, more = run()
        ws.close()
    finally:
        dist.destroy_process_group()
    return {
        "equal": all(map(torch.equal, lowered, plain)),
        "ops": report.ops_after,
        "fingerprint": report.outcome("agreement").done,
        "meetings a step": (meetings / len(lives), more / len(lives)),
        "memory": {info.name: info.nbytes for info in ws.memory()},
    }


@pytest.mark.parametrize(
    ("world", "shared", "multicast"), [(2, "gated", False), (2, "none", True), (3, "added", False), (4, "gated", True)]
)
def test_lowered_equals_unlowered(world: int, shared: str, multicast: bool):
    reports = run_ranks(world, compiled_layers, shared, multicast=multicast, timeout_s=200)
    layer = "moe_layer" if shared == "none" else "moe_layer_shared"
    for report in reports:
        assert report["equal"] and report["ops"] == {"agree": 1, "metadata_update": 1, layer: LAYERS}, report
        assert report["meetings a step"] == (1 + 2 * LAYERS, 3 * LAYERS)
        assert report["fingerprint"] == reports[0]["fingerprint"]  # experts are split unevenly: no rank's own numbers
        assert "layer batch" in report["memory"]
    assert "2 x [moe_layer(hidden=bfloat16[T,32]" in reports[0]["fingerprint"][0]
    assert "entry_barrier=False" in reports[0]["fingerprint"][0]

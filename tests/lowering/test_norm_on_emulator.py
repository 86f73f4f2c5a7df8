"""Compiled layers whose norms joined their combines, on the kernels in the emulator, against unlowered code."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import moe_ops
from moe_ops.emulator import Rank, run_ranks
from tests.lowering.test_on_emulator import tensor

ops = torch.ops.moe_ep
T, H, K, E, I, LAYERS = 4, 264, 2, 4, 16, 2  # rows of more than one chunk a lane


def compiled_layers(rank: Rank) -> dict:
    """What one rank saw: ops after lowering, its fingerprint, meetings, and how far the results are apart."""
    import lowering
    from lowering import torch_compat
    from lowering.passes import RECENT

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=rank.store, rank=rank.rank, world_size=rank.world_size)
    transport = "emulator-multicast" if rank.multicast else "emulator"
    ws = moe_ops.init_workspace(None, max_tokens_per_rank=T, hidden_size=H, top_k=K, transport=transport, timeout_s=60)
    each = E // rank.world_size
    router, shared, scales = tensor(1, H, E), tensor(2, H, H), [tensor(5 + n, H) + 1 for n in range(LAYERS)]
    local = [
        (tensor(10 + 10 * n + rank.rank, each, 2 * I, H), tensor(40 + 10 * n + rank.rank, each, H, I))
        for n in range(LAYERS)
    ]

    def model(x: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """The residual stream after the first layer, whose bits no norm has changed yet, and the last norm's rows."""
        x, first = x.view(T, 1, H), x
        h = x.view(T, H)
        for n, (gate_up, down) in enumerate(local):
            metadata = ops.metadata_update(live, ws.group_name)
            chosen, ids = (h @ router).float().softmax(-1).topk(K, -1)
            rows, ids, chosen = ops.agv_dispatch(h, ids, chosen, live, metadata, rank.world_size * T, ws.group_name)
            y = ops.fused_moe(rows, ids, chosen, gate_up, down, metadata[0:1], rank.rank * each)
            c = ops.rsv_combine(y, live, metadata, T, ws.group_name).view(x.shape)
            x = x + (c + (h @ shared).view(x.shape))
            first = x if n == 0 else first
            wide = x.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            h = (scales[n] * wide.to(x.dtype)).view(T, H)
        return first, h

    x, lives = tensor(50 + rank.rank, T, H), [(rank.rank + step) % (T + 1) for step in (3, 0, 4)]

    def run(inexact: bool | None) -> tuple[list[tuple[Tensor, Tensor]], float]:
        torch._dynamo.reset()
        lowering.disable() if inexact is None else lowering.enable(rounding="compiled", without=[], inexact=inexact)
        begin = int(ws.channel.state[1])
        with torch.no_grad(), torch_compat.without_caches():
            compiled = torch.compile(model, fullgraph=True)
            results = [compiled(x, torch.tensor([live], dtype=torch.int32)) for live in lives]
        return results, (int(ws.channel.state[1]) - begin) / len(lives)

    try:
        lowered, meetings = run(True)
        report = RECENT[-1]
        plain, _ = run(None)
        ws.close()
    finally:
        dist.destroy_process_group()
    return {
        "ops": report.ops_after,
        "joined": report.outcome("fuse_norm").done,
        "fingerprint": report.outcome("agreement").done,
        "meetings a step": meetings,
        "residual equal": all(torch.equal(a[0], b[0]) for a, b in zip(lowered, plain, strict=True)),
        "norm apart": max((a[1] - b[1]).abs().max().item() for a, b in zip(lowered, plain, strict=True)),
    }


@pytest.mark.parametrize(("world", "multicast"), [(2, True), (4, False)])
def test_norms_that_joined(world: int, multicast: bool):
    for report in run_ranks(world, compiled_layers, multicast=multicast, timeout_s=200):
        assert report["ops"] == {"agree": 1, "metadata_update": 1, "moe_layer": LAYERS}, report
        assert len(report["joined"]) == LAYERS and report["meetings a step"] == 1 + 2 * LAYERS
        assert "norm_weight=bfloat16[264]" in report["fingerprint"][0]
        assert report["residual equal"], report
        assert 0 < report["norm apart"] <= 2**-4, report  # of values up to 4: one or two of bf16's steps

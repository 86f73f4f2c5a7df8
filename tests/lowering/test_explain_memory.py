"""explain: symmetric memory by group and buffer, of two ranks over the emulator."""

from __future__ import annotations

import torch
import torch.distributed as dist
from expecttest import assert_expected_inline
from torch import Tensor

import lowering
import moe_ops
from moe_ops.emulator import Rank, run_ranks
from tests.lowering.layers import E, H, K, T, batch, routed, weights


def explained_layer(rank: Rank) -> dict:
    """What ``explain`` says of the memory behind a layer that became one op."""
    torch.set_num_threads(1)
    lowering.enable(rounding="compiled", without=[], inexact=False)  # whatever an earlier test left on or off
    dist.init_process_group("gloo", store=rank.store, rank=rank.rank, world_size=rank.world_size)
    ws = moe_ops.init_workspace(None, max_tokens_per_rank=T, hidden_size=H, top_k=K, transport="emulator", timeout_s=60)
    here, w = E // rank.world_size, weights()
    for name in ("gate_up", "down"):
        w[name] = w[name][rank.rank * here : (rank.rank + 1) * here].contiguous()

    def model(x: Tensor, count: Tensor) -> Tensor:
        return x + routed(x, w, count, group=ws.group_name, start=rank.rank * here, max_tokens=rank.world_size * T)

    try:
        explanation = lowering.explain(model, batch(rank.rank), torch.tensor([T - rank.rank], dtype=torch.int32))
        return {
            "ops": explanation.ops,
            "memory": explanation.symmetric_memory.get(ws.group_name),
            "text": [line for line in str(explanation).splitlines() if line.startswith("symmetric memory")],
        }
    finally:
        ws.close()
        dist.destroy_process_group()


def test_every_buffer_is_listed_with_its_bytes():
    first, second = run_ranks(2, explained_layer, timeout_s=200)
    assert first["ops"] == {"agree": 1, "metadata_update": 1, "moe_layer": 1}
    assert first["memory"] == second["memory"]
    # 16 rows of both ranks: 64 bytes, 16 of ids, 16 of weights (padded); dispatch and combine have two slots each
    assert_expected_inline(
        "\n".join(f"{name}: {nbytes}" for name, nbytes in first["memory"].items()),
        """\
signals: 32768
dispatch: 3072
combine: 2048
layer batch: 1536
layer output: 1024""",
    )
    listing = ", ".join(f"{name} {nbytes}" for name, nbytes in first["memory"].items())
    assert len(first["text"]) == 1 and first["text"][0].endswith(f", bytes: {listing}")

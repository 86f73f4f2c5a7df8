"""What every transport must do, as functions that each rank of a group calls; nothing here knows the transport.

On a CPU ``test_transports.py`` runs them over gloo and over the emulated kernels. On GPUs:

    torchrun --nproc-per-node 2 tests/moe_ops/rank_checks.py
"""

from __future__ import annotations

import faulthandler
import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

import moe_ops
from moe_ops import reference
from moe_ops.errors import CapacityError, PeerTimeoutError, SymmetricMemoryError
from moe_ops.selfcheck import Case, check_round, make_data

ops = torch.ops.moe_ep


@dataclass
class Setup:
    """The group under test and the sizes to use."""

    transport: str
    group: dist.ProcessGroup | None = None
    rows: int = 6
    hidden_size: int = 40
    top_k: int = 3
    timeout_s: float = 30.0
    rounds: int = 4

    def workspace(self, **changes: object) -> moe_ops.Workspace:
        """A workspace with these sizes, some of them changed."""
        values: dict = {
            "max_tokens_per_rank": self.rows,
            "hidden_size": self.hidden_size,
            "top_k": self.top_k,
            "transport": self.transport,
            "timeout_s": self.timeout_s,
        }
        return moe_ops.init_workspace(self.group, **(values | changes))


def random_counts(world: int, rows: int, seed: int) -> tuple[int, ...]:
    """Live rows of every rank; zeros and full ranks come often."""
    rng = random.Random(seed)
    return tuple(rng.choice((0, rows, rng.randint(0, rows))) for _ in range(world))


def check_random_rounds(setup: Setup) -> None:
    """Metadata, dispatch and combine equal the oracle bit for bit, for changing counts and ragged H."""
    for hidden_size in (setup.hidden_size, 8, 7, 129):
        ws = setup.workspace(hidden_size=hidden_size)
        for seed in range(setup.rounds):
            counts = random_counts(ws.world_size, setup.rows, seed)
            problem = check_round(ws, Case(seed, counts))
            assert problem is None, (hidden_size, counts, problem)
        ws.close()


def check_fp32_order(setup: Setup) -> None:
    """Combine adds in fp32 in rank order: with values that make the order show, all bits equal the oracle."""
    ws = setup.workspace()
    counts = random_counts(ws.world_size, setup.rows, 5)
    generator = torch.Generator().manual_seed(0)
    outputs = [
        (torch.randn(setup.rows * ws.world_size, setup.hidden_size, generator=generator) * 2.0 ** (rank % 3)).bfloat16()
        for rank in range(ws.world_size)
    ]
    local = torch.tensor([counts[ws.rank]], dtype=torch.int32, device=ws.device)
    metadata = ops.metadata_update(local, ws.group_name)
    for dtype in (torch.bfloat16, torch.float32):
        got = ops.rsv_combine(
            outputs[ws.rank].to(ws.device), local, metadata, setup.rows, ws.group_name, out_dtype=dtype
        )
        want = reference.rsv_combine(outputs, counts, [setup.rows] * ws.world_size, dtype)[ws.rank]
        assert torch.equal(got.cpu(), want)
    ws.close()


def check_two_calls_keep_results(setup: Setup) -> None:
    """Two ops of a kind back to back: the second must not touch what the first returned."""
    ws = setup.workspace()
    kept = []
    for seed in (1, 2, 3):
        counts = random_counts(ws.world_size, setup.rows, seed)
        batches, outputs, most = make_data(ws, Case(seed, counts))
        mine = [tensor.to(ws.device) for tensor in batches[ws.rank]]
        local = torch.tensor([counts[ws.rank]], dtype=torch.int32, device=ws.device)
        metadata = ops.metadata_update(local, ws.group_name)
        results = [ops.agv_dispatch(*mine, local, metadata, most, ws.group_name)[1] for _ in range(2)]
        results += [
            ops.rsv_combine(outputs[ws.rank].to(ws.device), local, metadata, setup.rows, ws.group_name)
            for _ in range(2)
        ]
        want = [reference.agv_dispatch(batches, counts, most).topk_ids] * 2
        want += [reference.rsv_combine(outputs, counts, [setup.rows] * ws.world_size)[ws.rank]] * 2
        kept += list(zip(results, want, strict=True))
    assert all(torch.equal(got.cpu(), want) for got, want in kept)
    ws.close()


def check_graph_replays(setup: Setup, replays: int = 1000) -> None:
    """A captured metadata, dispatch and combine, replayed with changing counts, equals the oracle (CUDA)."""
    ws = setup.workspace()
    batches, outputs, most = make_data(ws, Case(0, (0,) * ws.world_size))
    mine = [tensor.to(ws.device) for tensor in batches[ws.rank]]
    output = outputs[ws.rank].to(ws.device)
    local = torch.zeros(1, dtype=torch.int32, device=ws.device)

    def step() -> tuple[torch.Tensor, ...]:
        metadata = ops.metadata_update(local, ws.group_name)
        gathered = ops.agv_dispatch(*mine, local, metadata, most, ws.group_name)
        return metadata, *gathered, ops.rsv_combine(output, local, metadata, setup.rows, ws.group_name)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for replay in range(replays):
        counts = random_counts(ws.world_size, setup.rows, replay)
        local.fill_(counts[ws.rank])
        graph.replay()
        if replay % 10 == 0:
            valid, want = sum(counts), reference.agv_dispatch(batches, counts, most)
            assert torch.equal(results[1][:valid].cpu(), want.hidden[:valid])
            assert torch.equal(results[2].cpu(), want.topk_ids)
            sums = reference.rsv_combine(outputs, counts, [setup.rows] * ws.world_size)
            assert torch.equal(results[-1].cpu(), sums[ws.rank])
    torch.cuda.synchronize()
    ws.check()
    graph.reset()
    ws.close()


class Layer:
    """One MoE layer's communication over symmetric buffers; its experts are an elementwise stand-in, exact in bf16."""

    def __init__(self, ws: moe_ops.Workspace, most: int, alone: bool):
        self.ws, self.most, self.alone = ws, most, alone
        self.batch = ws.layer_batch(most, torch.int32, torch.float32)
        self.output = ws.layer_output(most)

    def __call__(self, batch: reference.Batch, local: torch.Tensor, metadata: torch.Tensor) -> torch.Tensor:
        name = self.ws.group_name
        ops.agv_dispatch_into(*batch, local, metadata, *self.batch, name, entry_barrier=self.alone)
        torch.mul(self.batch.hidden, self.ws.rank + 1, out=self.output)
        rows = batch.hidden.shape[0]
        return ops.rsv_combine_from(self.output, local, metadata, rows, [], name, exit_barrier=self.alone)

    def expected(self, batch: reference.Batch, count: int) -> torch.Tensor:
        """Small integers times 1 + 2 + ... + W: no rounding."""
        total = sum(range(1, self.ws.world_size + 1))
        live = torch.arange(batch.hidden.shape[0])[:, None] < count
        return torch.where(live, batch.hidden * total, 0)


def check_zero_copy(setup: Setup) -> None:
    """Layers over symmetric buffers, in strict turns without their extra barriers and alone with them."""
    for hidden_size in (setup.hidden_size, 129):
        ws = setup.workspace(hidden_size=hidden_size)
        for alone in (False, True):
            for seed in range(setup.rounds):
                counts = random_counts(ws.world_size, setup.rows, seed)
                batches, _, most = make_data(ws, Case(seed, counts))
                layer = Layer(ws, most, alone)
                mine = reference.Batch(*(tensor.to(ws.device) for tensor in batches[ws.rank]))
                local = torch.tensor([counts[ws.rank]], dtype=torch.int32, device=ws.device)
                metadata = ops.metadata_update(local, ws.group_name)
                sums = [layer(mine, local, metadata) for _ in range(3)]
                want = layer.expected(batches[ws.rank], counts[ws.rank])
                assert all(torch.equal(got.cpu(), want) for got in sums), (hidden_size, alone, counts)
                gathered = reference.agv_dispatch(batches, counts, most)
                assert torch.equal(layer.batch.topk_ids.cpu(), gathered.topk_ids)
        ws.close()


def check_routed(setup: Setup) -> None:
    """Hidden rows that travel only to and from the ranks of their experts give the same sums."""
    ws = setup.workspace()
    per_rank = -(-1000 // ws.world_size)  # ``make_data`` draws ids below 1000
    for seed in range(setup.rounds):
        counts = random_counts(ws.world_size, setup.rows, seed)
        batches, _, most = make_data(ws, Case(seed, counts))
        layer = Layer(ws, most, False)
        mine = reference.Batch(*(tensor.to(ws.device) for tensor in batches[ws.rank]))
        local = torch.tensor([counts[ws.rank]], dtype=torch.int32, device=ws.device)
        metadata = ops.metadata_update(local, ws.group_name)
        for _ in range(2):
            ops.agv_dispatch_into(
                *mine, local, metadata, *layer.batch, ws.group_name, entry_barrier=False, experts_per_rank=per_rank
            )
            ids = layer.batch.topk_ids
            here = ((ids >= 0) & (ids // per_rank == ws.rank)).any(1)
            layer.output.copy_(torch.where(here[:, None], layer.batch.hidden * (ws.rank + 1), 0))
            # before the combine, which lets the peers go on: a row of an earlier turn must not serve
            layer.batch.hidden.fill_(torch.nan)
            got = ops.rsv_combine_from(
                layer.output, local, metadata, setup.rows, [], ws.group_name, exit_barrier=False,
                topk_ids=mine.topk_ids, experts_per_rank=per_rank,
            )  # fmt: skip
            ids = batches[ws.rank].topk_ids
            owners = torch.where(ids >= 0, ids // per_rank, -1)
            factor = sum((rank + 1) * (owners == rank).any(1) for rank in range(ws.world_size))
            live = torch.arange(setup.rows) < counts[ws.rank]
            want = torch.where(live[:, None], batches[ws.rank].hidden * factor[:, None], 0)
            assert torch.equal(got.cpu(), want.to(got.dtype)), (counts, seed)
    ws.close()


def check_plain_buffer_is_refused(setup: Setup) -> None:
    """A tensor that peers cannot reach is an error that names how to get one."""
    ws = setup.workspace()
    local = torch.zeros(1, dtype=torch.int32, device=ws.device)
    metadata = torch.zeros(3, dtype=torch.int32, device=ws.device)
    plain = torch.zeros(setup.rows, setup.hidden_size, dtype=ws.config.dtype, device=ws.device)
    try:
        ops.rsv_combine_from(plain, local, metadata, 1, [], ws.group_name)
    except SymmetricMemoryError as error:
        assert "pass a tensor of workspace.empty" in str(error)
    else:
        raise AssertionError("no SymmetricMemoryError")
    mine = ws.empty(setup.rows, setup.hidden_size, ws.config.dtype)
    assert ops.rsv_combine_from(mine, local, metadata, 1, [], ws.group_name).tolist() == [[0.0] * setup.hidden_size]
    ws.close()


def check_zero_copy_replays(setup: Setup, replays: int = 1000) -> None:
    """A captured step of three layers in strict turns, no extra barrier, replayed with changing counts (CUDA)."""
    ws = setup.workspace()
    batches, _, most = make_data(ws, Case(0, (0,) * ws.world_size))
    mine = reference.Batch(*(tensor.to(ws.device) for tensor in batches[ws.rank]))
    local = torch.zeros(1, dtype=torch.int32, device=ws.device)
    layer = Layer(ws, most, False)

    def step() -> list[torch.Tensor]:
        metadata = ops.metadata_update(local, ws.group_name)
        return [layer(mine, local, metadata) for _ in range(3)]

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    for replay in range(replays):
        count = random_counts(ws.world_size, setup.rows, replay)[ws.rank]
        local.fill_(count)
        graph.replay()
        if replay % 10 == 0:
            want = layer.expected(batches[ws.rank], count)
            assert all(torch.equal(got.cpu(), want) for got in results), replay
    torch.cuda.synchronize()
    ws.check()
    graph.reset()
    ws.close()


def check_overlapping_groups(setup: Setup) -> None:
    """Two workspaces with ranks in common, used in turn."""
    everyone = setup.workspace()
    everyone.allocate()  # larger groups first: see Workspace._check_rendezvous
    pair = dist.new_group([0, 1])
    if everyone.rank < 2:
        small = Setup(setup.transport, pair, rows=3, hidden_size=16, top_k=2).workspace()
        for seed in range(4):
            assert check_round(small, Case(seed, random_counts(2, 3, seed))) is None
    for seed in range(2):
        assert check_round(everyone, Case(seed, random_counts(everyone.world_size, setup.rows, seed))) is None
    if everyone.rank < 2:
        small.close()
    everyone.close()


def check_missing_rank(setup: Setup) -> None:
    """The last rank stays away: the others raise within timeout_s + 2 s, name it, and go on after reset()."""
    timeout = 3.0
    ws = setup.workspace(timeout_s=timeout)
    absent = ws.world_size - 1
    assert check_round(ws, Case(0, random_counts(ws.world_size, setup.rows, 0))) is None
    local = torch.ones(1, dtype=torch.int32, device=ws.device)
    started = time.monotonic()
    if ws.rank != absent:
        try:
            ops.metadata_update(local, ws.group_name)
            if ws.device.type == "cuda":
                torch.cuda.synchronize()
            ws.check()
        except PeerTimeoutError as error:
            assert error.missing_ranks == [absent] and error.op == "metadata_update", error
        else:
            raise AssertionError("no PeerTimeoutError")
        assert time.monotonic() - started < timeout + 2
    else:
        time.sleep(timeout + 1)
    if setup.transport in ("gloo", "nccl"):
        return  # a failed collective leaves torch's own group unusable; a new group is needed
    ws = ws.reset()
    assert check_round(ws, Case(1, random_counts(ws.world_size, setup.rows, 1))) is None
    ws.close()


def check_count_over_capacity(setup: Setup) -> None:
    """A live count above T is reported, and no row is written outside a buffer."""
    ws = setup.workspace()
    hidden = torch.zeros(setup.rows, setup.hidden_size, dtype=ws.config.dtype, device=ws.device)
    ids = torch.zeros(setup.rows, setup.top_k, dtype=torch.int32, device=ws.device)
    local = torch.full((1,), setup.rows + 1, dtype=torch.int32, device=ws.device)
    most = setup.rows * ws.world_size
    metadata = torch.tensor([most, setup.rows * ws.rank, setup.rows], dtype=torch.int32, device=ws.device)
    try:
        ops.agv_dispatch(hidden, ids, ids.float(), local, metadata, most, ws.group_name)
        if ws.device.type == "cuda":
            torch.cuda.synchronize()
        ws.check()
    except CapacityError:
        pass
    else:
        raise AssertionError("no CapacityError")
    ws.close()


def main() -> None:
    """Every check on the GPUs that torchrun gave, p2p and nccl, a line each."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    faulthandler.dump_traceback_later(40, repeat=True)  # a hang must say where
    dist.init_process_group("nccl")  # no device_id: it would split communicators for the smaller group, which hung
    common: list[Callable[[Setup], None]] = [check_random_rounds, check_fp32_order, check_two_calls_keep_results]
    common += [check_zero_copy, check_routed, check_plain_buffer_is_refused, check_zero_copy_replays]
    # the overlapping groups come last: afterwards these ranks can set up no more symmetric memory together
    kernels = [check_graph_replays, check_count_over_capacity, check_missing_rank, check_overlapping_groups]
    failures = 0
    for transport, checks in (("p2p", common + kernels), ("nccl", [*common, check_graph_replays])):
        for check in checks:
            started = time.monotonic()
            try:
                check(Setup(transport, rows=48, hidden_size=2048, top_k=8, rounds=12))
                verdict = "passed"
            except Exception as error:
                verdict, failures = f"FAILED: {type(error).__name__}: {error}", failures + 1
                if workspace := moe_ops.get_workspace(dist.group.WORLD.group_name):
                    workspace.close()
            print(f"rank {rank} {transport:5} {check.__name__:32} {verdict} {time.monotonic() - started:.1f} s")
            sys.stdout.flush()
            dist.barrier()
    print(f"rank {rank}: {failures} failed")
    sys.stdout.flush()
    dist.barrier()
    os._exit(failures != 0)  # NCCL work captured in graphs can hang its own shutdown


if __name__ == "__main__":
    main()

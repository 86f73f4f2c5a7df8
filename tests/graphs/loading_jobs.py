"""What three ranks check about loading: memory per size of the group, groups smaller than the world."""

from __future__ import annotations

import ctypes
import gc
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import graphs
from graphs import hf_compat
from graphs.checkpoints import make_checkpoint, tiny_model
from graphs.gates import OwnCode, recognise
from graphs.sharding import dense_parts, expert_range
from moe_ops import get_workspace
from tests.graphs.model_cases import plain_model, prompts_of

MIB = 2**20
# 96 MiB of experts in 12 of 8 MiB over 4 layers; the rest of the model is 3 MiB
BIG: dict[str, Any] = {"hidden_size": 256, "moe_intermediate_size": 683, "num_experts": 12, "num_hidden_layers": 4}
SIZES: dict[str, Any] = {"max_tokens_per_rank": 64, "timeout_s": 60.0}


def anonymous_bytes() -> int:
    """Memory of this process that no file backs: pages of a mapped checkpoint do not count."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon in /proc/self/status")


class Growth(NamedTuple):
    """What a piece of work added, in bytes: at its peak, and kept afterwards; and what it should keep."""

    peak: int
    kept: int
    parameters: int


@contextmanager
def watched(peak: list[int]) -> Iterator[None]:
    """Put the highest ``anonymous_bytes`` seen meanwhile into ``peak``."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        peak[0] = max(peak[0], anonymous_bytes())


def give_back() -> None:
    """Return what was freed to the system, so that it is not counted as held, nor reused unseen."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)


def groups_of(world_size: int) -> dict[int, dist.ProcessGroup]:
    """Groups by size: the world, ranks 0 and 2, rank 1 alone. Collective; all ranks make all groups."""
    pair, alone = dist.new_group([0, 2]), dist.new_group([1])
    assert world_size == 3 and dist.group.WORLD is not None
    return {3: dist.group.WORLD, 2: pair, 1: alone}


def measure(folder: Path, group: dist.ProcessGroup) -> Growth:
    """Load once and see what it takes."""
    give_back()
    before = anonymous_bytes()
    peak = [before]
    with watched(peak), hf_compat.quiet():
        model = graphs.from_pretrained(folder, group=group, **SIZES)
    give_back()
    kept, parameters = anonymous_bytes() - before, sum(p.numel() * p.element_size() for p in model.parameters())
    close(group)
    return Growth(peak[0] - before, kept, parameters)


def close(group: dist.ProcessGroup) -> None:
    if (workspace := get_workspace(group.group_name)) is not None:
        dist.barrier(group)
        workspace.close()


def check_forward(rank: int, folder: Path, group: dist.ProcessGroup) -> None:
    """A group's ranks share experts among themselves alone: their own batches, the whole model's answers."""
    plain = plain_model("qwen3_moe")
    ids = torch.tensor(prompts_of([4 + rank] * 2, seed=rank))
    model = graphs.from_pretrained(folder, group=group, **SIZES)
    held = model.model.layers[0].mlp.experts.gate_up_proj.shape[0]
    assert held == len(expert_range(8, group.size(), group.rank()))
    whole = dict(dense_parts(plain))
    assert {n: t.shape for n, t in dense_parts(model)} == {n: t.shape for n, t in whole.items()}
    with torch.no_grad():
        got, wanted = model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    close(group)


def check_own_gate(rank: int, group: dist.ProcessGroup) -> None:
    """Experts with an activation that the fused op does not have, split unevenly: the model's own code on each rank."""
    plain = plain_model("qwen3_moe", hidden_act="relu")
    ids = torch.tensor(prompts_of([4 + rank] * 2, seed=rank))
    model = graphs.shard_experts(tiny_model("qwen3_moe", hidden_act="relu"), group, **SIZES)
    assert isinstance(recognise(model.model.layers[0].mlp.experts), OwnCode)
    with torch.no_grad():
        got, wanted = model(ids, use_cache=False).logits, plain(ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    close(group)


def run_loading(rank: int, world_size: int, folder: str, emit: Any = None) -> dict[str, Any]:
    """Body of one rank: by check what it found, or a traceback."""
    torch.set_num_threads(1)
    tiny, big = Path(folder) / "tiny", Path(folder) / "big"
    if rank == 0:
        make_checkpoint(tiny)
        make_checkpoint(big, **BIG)
    dist.barrier()
    groups, found = groups_of(world_size), {}

    def note(name: str, work: Callable[[], Any]) -> None:
        try:
            found[name] = work()
        except Exception:
            found[name] = traceback.format_exc()

    for size, group in groups.items():
        if dist.get_process_group_ranks(group).count(rank):
            note(f"forward, EP={size}", lambda group=group: check_forward(rank, tiny, group))
            note(f"memory, EP={size}", lambda group=group: measure(big, group))
        dist.barrier()
    note("own gate", lambda: check_own_gate(rank, groups[3]))
    return found

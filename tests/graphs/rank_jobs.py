"""What the ranks of a group check about sharded models; ``test_ranks.py`` starts them once and reads the results.

On GPUs, with the transport that the machine offers:

    torchrun --nproc-per-node 2 tests/graphs/rank_jobs.py
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import graphs
from graphs.checkpoints import make_checkpoint, tiny_model
from graphs.errors import RequestError, ShardingError
from lowering.torch_compat import compile_counts
from moe_ops import get_workspace
from moe_ops.errors import CapacityError
from tests.graphs.model_cases import FAMILIES, GraphKeeper, plain_answers, plain_model, prompts_of
from tests.graphs.serve_cases import LONGEST, arrivals, served_model

TOKENS = 12
# One workspace serves a group, so all models here share these sizes: H = 128 and K = 2, as the tiny models have.
SIZES: dict[str, Any] = {"max_tokens_per_rank": 64, "timeout_s": 60.0}


def lengths_of(rank: int) -> tuple[int, ...]:
    """Prompt lengths of a rank: every rank has its own number of prompts, rank 2 has none."""
    return ((3, 9, 5), (7,), (), (2, 4))[rank % 4]


def decode_own_prompts(rank: int, model: Any, expected: list[list[int]], **loop_options: Any) -> graphs.DecodeLoop:
    """Decode this rank's prompts and compare with ``expected``."""
    loop = graphs.DecodeLoop(model, batch=max(len(lengths_of(rank)), 1), max_len=9 + TOKENS, **loop_options)
    loop.prefill(prompts_of(lengths_of(rank), seed=rank))
    loop.run(TOKENS - 1)
    assert loop.tokens() == expected
    return loop


def check_family(family: str, rank: int, folder: Path) -> None:
    """Sharded loading and decoding gives what the whole model gives on one process, from one clean graph."""
    expected = plain_answers(plain_model(family), prompts_of(lengths_of(rank), seed=rank), TOKENS)
    model = graphs.from_pretrained(folder / family, **SIZES)
    keeper, before = GraphKeeper(), compile_counts()
    decode_own_prompts(rank, model, expected, backend=keeper)
    after = compile_counts()
    assert (after.graphs - before.graphs, after.graph_breaks - before.graph_breaks) == (1, 0)
    assert keeper.integer_inputs() == keeper.unbacked() == []
    layers = keeper.calls("fused_moe")
    assert layers == keeper.calls("agv_dispatch") == keeper.calls("rsv_combine") == 2
    assert keeper.calls("metadata_update") == 1  # once a step, however many layers


def check_inductor_with_changing_live_counts(rank: int, folder: Path) -> None:
    """Compiled by Inductor: slots leave at different steps on different ranks, down to none, without recompiling."""
    prompts = prompts_of((4, 2, 6), seed=rank)
    expected = plain_answers(plain_model("qwen3_moe"), prompts, TOKENS)
    loop = graphs.DecodeLoop(graphs.from_pretrained(folder / "qwen3_moe", **SIZES), batch=3, max_len=6 + TOKENS)
    loop.prefill(prompts)
    loop.run(2)
    before, steps = compile_counts(), 3
    for step in range(TOKENS - 3):
        live = max(3 - (step + rank) // 2, 0)
        loop.set_live(live)
        loop.run(1)
        steps += 1
        assert loop.tokens()[:live] == [answer[:steps] for answer in expected[:live]], (step, live)
    assert compile_counts().graphs == before.graphs


def check_uneven_split(rank: int, folder: Path) -> None:
    """Seven experts do not divide by the group; a model that is already built is sharded in place."""
    options = {"num_experts": 7}
    expected = plain_answers(plain_model("qwen3_moe", **options), prompts_of(lengths_of(rank), seed=rank), TOKENS)
    model = graphs.shard_experts(tiny_model("qwen3_moe", **options), **SIZES)
    decode_own_prompts(rank, model, expected, compile=False)


def check_chunked_prefill(rank: int, folder: Path) -> None:
    """Prompts longer than the capacity go through in chunks, the same number of forwards on every rank."""
    prompts = prompts_of((50 - 10 * rank, 3, 20), seed=rank)
    expected = plain_answers(plain_model("mixtral"), prompts, 4)
    loop = graphs.DecodeLoop(graphs.from_pretrained(folder / "mixtral", **SIZES), batch=3, max_len=54, compile=False)
    assert loop._prefill is not None and tuple(loop._prefill.ids.shape) == (2, 32)  # 64 tokens of capacity
    loop.prefill(prompts)
    loop.run(3)
    assert loop.tokens() == expected


def check_serving(rank: int, folder: Path) -> None:
    """Requests come and go, rank 1 has fewer: each answer is that of the request alone, from one graph."""
    model = graphs.from_pretrained(folder / "deepseek_v3", **SIZES)
    keeper, before = GraphKeeper(), compile_counts()
    options: dict[str, Any] = {"sampler": graphs.sample, "batch_invariant": True, "backend": keeper}
    loop = graphs.DecodeLoop(model, batch=3 + rank, max_len=LONGEST, look_every=4, **options)
    answers = list(loop.serve(arrivals(random.Random(rank), 6 - 4 * rank)))
    own = [dist.new_group([number]) for number in range(dist.get_world_size())][rank]
    whole = graphs.shard_experts(served_model("deepseek_v3"), own, max_tokens_per_rank=64)
    alone = graphs.DecodeLoop(whole, batch=1, max_len=LONGEST, sampler=graphs.sample, compile=False)
    for answer in answers:
        (wanted,) = alone.serve([answer.request])
        assert (answer.tokens, answer.reason) == (wanted.tokens, wanted.reason)
    after = compile_counts()
    assert len(answers) == 6 - 4 * rank and after.graphs - before.graphs == 1
    assert keeper.integer_inputs() == keeper.unbacked() == []


def check_plain_forward(rank: int, folder: Path) -> None:
    """Outside a loop all rows of a forward count, whatever their number on each rank."""
    ids = torch.tensor(prompts_of([5 + rank] * 2, seed=rank))
    model = graphs.from_pretrained(folder / "olmoe", **SIZES)
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        torch.testing.assert_close(logits, plain_model("olmoe")(ids, use_cache=False).logits, rtol=0, atol=1e-5)


def check_generate(rank: int, folder: Path) -> None:
    """transformers' own loop on the sharded model, every rank its own prompt; rank 1 stops early."""
    ids = torch.tensor(prompts_of([4 + rank], seed=rank))
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = plain_model("qwen3_moe")
    answer = plain.generate(ids, **options)
    if rank == 1:
        options["eos_token_id"] = int(answer[0, -4])
    expected = plain.generate(ids, **options)
    assert expected.shape[1] == ids.shape[1] + (6 if rank == 0 else 3)
    model = graphs.from_pretrained(folder / "qwen3_moe", **SIZES)
    for cache in ({}, {"cache_implementation": "static"}):
        got = model.generate(ids, synced_gpus=True, **options, **cache)
        assert torch.equal(got[:, : expected.shape[1]], expected), cache


def check_errors_reach_every_rank(rank: int, folder: Path) -> None:
    """A mistake on one rank is an error on all of them, so that none waits for the others."""
    model = graphs.from_pretrained(folder / "mixtral", **SIZES)
    with _raises(RequestError, "max_len differs between ranks"):
        graphs.DecodeLoop(model, batch=1, max_len=10 + rank)
    with _raises(CapacityError, "batch=65 exceeds max_tokens_per_rank=64"):
        graphs.DecodeLoop(model, batch=65 if rank == 0 else 1, max_len=10)
    loop = graphs.DecodeLoop(model, batch=1, max_len=10, compile=False)
    with _raises(RequestError, "rank 1: a prompt of 10 tokens"):
        loop.prefill([[1] * (10 if rank == 1 else 2)])
    with _raises(RequestError, "rank 0: submit: token 999 is outside the vocabulary"):
        list(loop.serve([graphs.Request([999])] if rank == 0 else []))
    with _raises(RequestError, r"about to run \[3, 4\] steps; make the same calls"):
        loop.run(3 + rank)
    with _raises(CapacityError, "66 tokens exceeds max_tokens_per_rank=64"), torch.no_grad():
        model(torch.ones(2, 33, dtype=torch.long))


def check_ranks_must_hold_the_same_dense_parts(rank: int, folder: Path) -> None:
    """A router that differs in one bit on one rank is found."""
    model = tiny_model("mixtral")
    router = model.model.layers[1].mlp.gate.weight.data
    router[3, 5] += 1e-6 * rank
    with _raises(ShardingError, "differ in 1 dense parts, first model.layers.1.mlp.gate.weight"):
        graphs.shard_experts(model, **SIZES)


def check_unsharded_model_is_refused(rank: int, folder: Path) -> None:
    """A whole model on each of several ranks is most likely a mistake."""
    with _raises(RequestError, r"not sharded.*graphs.from_pretrained"):
        graphs.DecodeLoop(tiny_model("mixtral"), batch=1, max_len=8)


def _raises(error: type[Exception], message: str) -> Any:
    import pytest

    return pytest.raises(error, match=message)


def _family_check(family: str) -> Callable[[int, Path], None]:
    return lambda rank, folder: check_family(family, rank, folder)


CHECKS: dict[str, Callable[[int, Path], None]] = {
    **{family: _family_check(family) for family in FAMILIES},
    "inductor, changing live counts": check_inductor_with_changing_live_counts,
    "uneven split": check_uneven_split,
    "chunked prefill": check_chunked_prefill,
    "serving": check_serving,
    "plain forward": check_plain_forward,
    "generate": check_generate,
    "errors reach every rank": check_errors_reach_every_rank,
    "dense parts": check_ranks_must_hold_the_same_dense_parts,
    "unsharded model": check_unsharded_model_is_refused,
}


def run_checks(rank: int, world_size: int, job: tuple[list[str], str], emit: Any = None) -> dict[str, str | None]:
    """Body of one rank: every check by name, with what went wrong or None."""
    torch.set_num_threads(1)
    names, folder = job
    if rank == 0:
        for family in FAMILIES:
            make_checkpoint(Path(folder) / family, family)
    dist.barrier()
    outcomes: dict[str, str | None] = {}
    for name in names:
        start = time.perf_counter()
        try:
            CHECKS[name](rank, Path(folder))
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
        torch._dynamo.reset()
        if rank == 0:
            print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
        if (workspace := get_workspace(dist.group.WORLD.group_name)) is not None:
            dist.barrier()
            workspace.close()
    return outcomes


if __name__ == "__main__":
    dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        results = run_checks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), (list(CHECKS), shared[0]))
        dist.barrier()
    bad = {name: text for name, text in results.items() if text}
    print("\n".join(f"{name}:\n{text}" for name, text in bad.items()) or "all passed")
    sys.exit(bool(bad))

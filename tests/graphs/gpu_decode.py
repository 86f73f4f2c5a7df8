"""The compiled decode step on GPUs: one CUDA graph a rank, replayed with changing live counts, equal to eager.

    torchrun --nproc-per-node 2 tests/graphs/gpu_decode.py

Two loops over one model, one compiled, one eager. Before every step the eager loop takes over the compiled
one's state, so that both answer the same question and a rounding cannot feed on itself.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphs
from graphs.checkpoints import make_checkpoint
from graphs.report import CompileMeter
from moe_ops import get_workspace
from tests.graphs.model_cases import FAMILIES, plain_model, prompts_of
from tests.tolerances import MODEL_BF16_OVER_PLAIN, relative_error

REPLAYS, LOOK_EVERY = 200, 10
BATCH, PROMPT = 4, 5
# Eager rounds every intermediate to bf16 and Inductor does not; logits are sums of H = 128 products of such values.
LOGITS_RELATIVE_ERROR = 2e-2


class Recorder(nn.Module):
    """Greedy choice that also keeps the logits (B, V)."""

    logits: Tensor

    def __init__(self, vocabulary: int):
        super().__init__()
        zeros = torch.zeros(BATCH, vocabulary, dtype=torch.bfloat16, device="cuda")
        self.register_buffer("logits", zeros, persistent=False)

    def forward(self, logits: Tensor) -> Tensor:
        self.logits.copy_(logits)
        return logits.argmax(-1)


def take_over(target: graphs.DecodeLoop, source: graphs.DecodeLoop) -> None:
    """Copy everything that a step reads."""
    for name in ("tokens", "positions", "mask", "history", "column"):
        getattr(target._step, name).copy_(getattr(source._step, name))
    for mine, theirs in zip(target._step.cache.layers, source._step.cache.layers, strict=True):
        for name, value in vars(theirs).items():
            if isinstance(value, Tensor):
                getattr(mine, name).copy_(value)
    target.length, target.generated = source.length, source.generated


def check_family(family: str, rank: int, folder: Path) -> str:
    """Replay; returns what was seen."""
    model = graphs.from_pretrained(
        folder / family, dtype=torch.bfloat16, device="cuda", max_tokens_per_rank=64, timeout_s=60.0
    )
    ours_over_plain = bf16_errors(family)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    recorders = [Recorder(vocabulary), Recorder(vocabulary)]
    sizes = {"batch": BATCH, "max_len": PROMPT + REPLAYS + 8}
    meter = CompileMeter()
    compiled, eager = (
        graphs.DecodeLoop(model, sampler=recorder, compile=compile, **sizes)
        for recorder, compile in zip(recorders, (True, False), strict=True)
    )
    for loop in (compiled, eager):
        loop.prefill(prompts_of((PROMPT,) * BATCH, seed=rank))
    compiled.run(4)
    meter.warm()
    errors = []
    for step in range(REPLAYS):
        live = (step // LOOK_EVERY + step + rank) % (BATCH + 1)
        compiled.set_live(live)
        look = step % LOOK_EVERY == 0
        if look:
            take_over(eager, compiled)
        compiled.run(1)
        if look:
            eager.run(1)
            got, want = (recorder.logits[:live] for recorder in recorders)
            if live:
                assert want.norm() > 0 and want.isfinite().all()
                errors.append(relative_error(got, want))
    stats = meter.read()
    assert stats.cuda_graphs == 1, stats
    assert (stats.graph_breaks, stats.recompiles) == (0, 0), stats
    worst = max(errors)
    assert len(errors) >= REPLAYS // LOOK_EVERY // 2, len(errors)
    assert worst < LOGITS_RELATIVE_ERROR, worst
    assert ours_over_plain < MODEL_BF16_OVER_PLAIN, ours_over_plain
    return (
        f"{ours_over_plain:.2f} x the bf16 error of plain eager; {REPLAYS} replays of {stats.cuda_graphs} CUDA graph, "
        f"logits within {worst:.1e} of eager ({len(errors)} looks)"
    )


@torch.no_grad()
def bf16_errors(family: str) -> float:
    """Error of our logits against fp32, over that of plain Hugging Face in bf16; one process, eager."""
    ids = torch.tensor(prompts_of([32] * 8), device="cuda")
    model = plain_model(family, torch.bfloat16).cuda()
    plain = model(ids, use_cache=False).logits
    model.set_experts_implementation("moe_ep")
    ours = model(ids, use_cache=False).logits
    model.set_experts_implementation("eager")
    exact = model.float()(ids, use_cache=False).logits
    return relative_error(ours, exact) / relative_error(plain, exact)


def main() -> None:
    """All families; exit status 1 if any rank failed."""
    rank = int(os.environ.get("LOCAL_RANK", 0))
    torch.cuda.set_device(rank)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=torch.device("cuda", rank))
    failed = 0
    with tempfile.TemporaryDirectory() as own:
        shared = [own]
        dist.broadcast_object_list(shared)
        folder = Path(shared[0])
        for family in FAMILIES:
            if rank == 0:
                make_checkpoint(folder / family, family, torch.bfloat16)
            dist.barrier()
            try:
                verdict = check_family(family, rank, folder)
            except Exception as error:
                verdict, failed = f"FAILED {type(error).__name__}: {error}", failed + 1
            print(f"rank {rank} {family}: {verdict}", flush=True)
            torch._dynamo.reset()
            torch.compiler.cudagraph_mark_step_begin()
            if (workspace := get_workspace(dist.group.WORLD.group_name)) is not None:
                workspace.close()
            dist.barrier()
    sys.stdout.flush()
    os._exit(failed != 0)  # NCCL work captured in graphs can hang its own shutdown


if __name__ == "__main__":
    main()

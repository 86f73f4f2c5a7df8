"""The compiled decode step on GPUs: one CUDA graph a rank, replayed with changing live counts, equal to eager.

    torchrun --nproc-per-node 2 tests/graphs/gpu_decode.py

Three loops over one model: captured (what users run), compiled but not captured, eager. Before every look the
other two take over the captured one's state, so that all answer the same question and a rounding cannot feed on
itself. Replays must equal the uncaptured run bit for bit. Eager rounds elsewhere, which now and then makes a router
choose another expert: nine rows of ten must agree, with Inductor told to round where eager does.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
import torch._inductor.config
import torch.distributed as dist
from torch import Tensor, nn

import graphs
from graphs.checkpoints import make_checkpoint
from graphs.report import CompileMeter
from graphs.sampling import Choice
from moe_ops import get_workspace
from tests.graphs.model_cases import FAMILIES, plain_model, prompts_of
from tests.tolerances import MODEL_BF16_OVER_PLAIN, relative_error

REPLAYS, LOOK_EVERY = 200, 10
BATCH, PROMPT = 4, 5
LOGITS_RELATIVE_ERROR = 2e-2  # a few bf16 roundings (4e-3 each) through two layers
ROWS_WITHIN = 0.9


class Recorder(nn.Module):
    """Greedy choice that also keeps the logits (B, V)."""

    logits: Tensor

    def __init__(self, vocabulary: int):
        super().__init__()
        zeros = torch.zeros(BATCH, vocabulary, dtype=torch.bfloat16, device="cuda")
        self.register_buffer("logits", zeros, persistent=False)

    def forward(self, logits: Tensor, choice: Choice) -> Tensor:
        self.logits.copy_(logits)
        return logits.argmax(-1)


def take_over(target: graphs.DecodeLoop, source: graphs.DecodeLoop) -> None:
    """Copy everything that a step reads."""
    mine = dict(target._step.named_buffers(remove_duplicate=True))
    for name, buffer in source._step.named_buffers():
        if not name.startswith(("model.", "state.", "sampler.")):
            mine[name].copy_(buffer)
    for ours, theirs in zip(target._step.cache.layers, source._step.cache.layers, strict=True):
        ours.keys.copy_(theirs.keys)
        ours.values.copy_(theirs.values)


def check_family(family: str, rank: int, folder: Path) -> str:
    """Replay; returns what was seen."""
    model = graphs.from_pretrained(
        folder / family, dtype=torch.bfloat16, device="cuda", max_tokens_per_rank=64, timeout_s=60.0
    )
    ours_over_plain = bf16_errors(family)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    sizes = {"batch": BATCH, "max_len": PROMPT + REPLAYS + 8}
    meter = CompileMeter()
    recorders = [Recorder(vocabulary) for _ in range(3)]
    options = ({}, {"backend": "inductor"}, {"compile": False})
    loops = [graphs.DecodeLoop(model, sampler=r, **sizes, **o) for r, o in zip(recorders, options, strict=True)]
    for loop in loops:
        loop.prefill(prompts_of((PROMPT,) * BATCH, seed=rank))
        loop.run(4)
    captured, *others = loops
    meter.warm()
    errors: list[float] = []
    for step in range(REPLAYS):
        live = (step // LOOK_EVERY + step + rank) % (BATCH + 1)
        captured.set_live(live)
        look = step % LOOK_EVERY == 0
        for other in others if look else ():
            take_over(other, captured)
        captured.run(1)
        for other in others if look else ():
            other.run(1)
        if look:
            got, same, want = (recorder.logits for recorder in recorders)
            assert torch.equal(got, same), f"step {step}: the replay differs from the uncaptured run"
            errors += [relative_error(g, w) for g, w in zip(got[:live], want[:live], strict=True)]
            assert not live or want[:live].norm() > 0
    stats = meter.read()
    assert stats.cuda_graphs == 1, stats
    assert (stats.graph_breaks, stats.recompiles) == (0, 0), stats
    within = sum(error < LOGITS_RELATIVE_ERROR for error in errors) / len(errors)
    assert len(errors) >= REPLAYS // LOOK_EVERY and within >= ROWS_WITHIN, sorted(errors)
    assert ours_over_plain < MODEL_BF16_OVER_PLAIN, ours_over_plain
    return (
        f"{stats.cuda_graphs} CUDA graph, {REPLAYS} replays, equal to uncaptured; eager: {within:.0%} of {len(errors)} "
        f"rows within {LOGITS_RELATIVE_ERROR}; bf16 error {ours_over_plain:.2f} x that of plain Hugging Face"
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
    torch._inductor.config.emulate_precision_casts = True
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

"""Every class of the experts interface on one GPU in bf16: eager, and a compiled decode step in a CUDA graph.

    python tests/graphs/gpu_models.py [class ...]

As near to fp32 as plain Hugging Face is, for the median token. Several processes share the GPU: most of the time is
compilation. Prints a line for each class, and exits with 1 if one failed.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
from typing import Any

import torch
from torch import Tensor

import lowering  # noqa: F401  its passes run in every compilation
from graphs import gates
from graphs.report import CompileMeter
from tests.graphs import model_jobs
from tests.graphs.tiny_models import answer, build, experts_classes, own_experts, tokens
from tests.tolerances import MODEL_BF16_OVER_PLAIN

PROCESSES = 12
OWN = " with its gate as own code"  # after a class's name: the path of gates that fused_moe does not have
LENGTH = 12  # of which the last are decoded one by one: warm-up, recording and replays


def steps(model: Any, run: Any, name: str, ids: Tensor) -> Tensor:
    """What a compiled (or plain) model answers, step by step where it has a static cache."""
    if name in model_jobs.WITHOUT_CACHE:
        return torch.cat([answer(run, ids, use_cache=False).clone() for _ in range(4)])
    return model_jobs.Decoding(model, ids).steps(run)


@torch.no_grad()
def check(name: str) -> str:
    name, own, _ = name.partition(OWN)
    entry, ids = experts_classes()[name], tokens(8, LENGTH).cuda()
    plain, ours = (build(entry, torch.bfloat16).cuda() for _ in range(2))
    for module in own_experts(ours, entry) if own else ():
        module._apply_gate = module._apply_gate  # on the instance, where it could be anything
    exact = build(entry, torch.bfloat16).float().cuda()
    exact_eager, plain_eager = (model_jobs.forward(model, "eager", ids) for model in (exact, plain))
    near = MODEL_BF16_OVER_PLAIN * model_jobs.median_error(plain_eager, exact_eager)
    eager_error = model_jobs.median_error(model_jobs.forward(ours, "moe_ep", ids), exact_eager)
    gate = gates.recognise(own_experts(ours, entry)[0])
    path = "own code" if isinstance(gate, gates.OwnCode) else gate.activation
    line = f"{path}, eager {eager_error / near * MODEL_BF16_OVER_PLAIN:.2f}"
    if not eager_error < near:
        return f"FAILED {line} x plain's error"
    if name in model_jobs.DATA_DEPENDENT or name in model_jobs.NO_GRAPH:
        return f"ok {line}, no graph: {(model_jobs.DATA_DEPENDENT | model_jobs.NO_GRAPH)[name]}"
    wanted, got_plain = steps(exact, exact, name, ids), steps(plain, plain, name, ids)
    meter = CompileMeter()
    got = steps(ours, torch.compile(ours, mode="reduce-overhead", fullgraph=True, dynamic=False), name, ids)
    stats = meter.read()
    ratio = model_jobs.median_error(got, wanted) / model_jobs.median_error(got_plain, wanted)
    line += f", compiled {ratio:.2f} x plain's error, {stats.cuda_graphs} CUDA graphs, {stats.graph_breaks} breaks"
    return f"{'ok' if ratio < MODEL_BF16_OVER_PLAIN else 'FAILED'} {line}"


def work(name: str) -> tuple[str, str]:
    start = time.perf_counter()
    model_jobs.COLUMNS = LENGTH
    try:
        result = check(name)
    except Exception:
        print(f"{name}:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        result = f"FAILED {traceback.format_exc().strip().splitlines()[-1][:150]}"
    torch._dynamo.reset()
    return name, f"{result} ({time.perf_counter() - start:.0f} s)"


if __name__ == "__main__":
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    names = sys.argv[1:] or [*experts_classes(), f"MixtralExperts{OWN}", f"GptOssExperts{OWN}"]
    failed = 0
    with multiprocessing.get_context("spawn").Pool(min(PROCESSES, len(names))) as pool:
        for name, result in pool.imap_unordered(work, names):
            print(f"{name}: {result}", flush=True)
            failed += result.startswith("FAILED")
    print(f"{len(names) - failed} of {len(names)} passed")
    sys.exit(bool(failed))

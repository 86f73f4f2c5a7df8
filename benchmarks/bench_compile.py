"""How long a decode step takes to compile: lowered, lowered with passes that may change bits, and not lowered.

    python benchmarks/bench_compile.py

The step that ``graphs.DecodeLoop`` compiles, of a model with ``--layers`` layers of true dimensions on one device. A
figure is the median over ``--rounds`` fresh processes with empty caches (Inductor's and Triton's), the ways in turn,
exact in the first round only: three rounds take four minutes. It holds the seconds from the first call to its result,
with tracing, passes, Triton and the first launches of our own kernels, without imports and weights. Of a process it
also says where they went: ``kernels``, Triton kernels that Inductor wrote; ``ours``, seconds in which this process
compiled kernels of our own (in threads, where lowering knows them ahead), ``each`` by name; ``collector``, seconds of
Python's garbage collector; seconds of torch's phases (``PHASES``; the first ones hold later ones).
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

WAYS = ("plain", "exact", "inexact")
PHASES = {
    "dynamo": "_compile.compile_inner", "aot": "create_aot_dispatcher_function", "inductor": "compile_fx_inner",
    "passes": "_recursive_post_grad_passes", "lower": "GraphLowering.run", "schedule": "Scheduler.__init__",
    "write": "Scheduler.codegen", "load": "PyCodeCache.load_by_key_path",
    "wait": "async_compile.wait", "tune": "CachingAutotuner.benchmark_all_configs",
}  # fmt: skip


def compile_once(way: str, model: str, layers: int, batch: int) -> dict:
    """In this process: seconds to the first result, and how many Triton kernels were written for it."""
    from decode_models import OurStep, build, config_of

    import graphs
    import graphs.decode  # registers the ops that lowering puts into a step
    import lowering
    from graphs.attention import use_decode_attention
    from graphs.hf_slots import adapt_attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built = build(config_of(model, layers, 64), device)
    graphs.shard_experts(built, None, max_tokens_per_rank=batch)
    if device.type == "cuda":
        use_decode_attention(built)
    adapt_attention(built)
    lowering.disable() if way == "plain" else lowering.enable(inexact=way == "inexact")
    ours = watch_triton()
    with torch.no_grad():
        step = OurStep(built, batch, 64)
        step.fill(8)
        options: dict[str, Any] | None = {"triton.cudagraphs": True} if device.type == "cuda" else None
        how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "options": options}
        compiled = torch.compile(step, **how)
        _wait()
        ours.clear()  # filling the cache launched some
        collecting = watch_collector()
        began = time.perf_counter()
        compiled()
        _wait()
    seconds = time.perf_counter() - began
    written = sum(path.read_text().count("@triton.jit") for path in _cache().rglob("*.py"))
    found = {"way": way, "seconds": round(seconds, 2), "kernels": written, "ours": round(sum(ours.values()), 2)}
    return found | {"collector": round(sum(collecting), 2), "phases": phases(), "each": ours}


def watch_collector() -> list[float]:
    """Seconds of each garbage collection from now on."""
    found: list[float] = []
    began = 0.0

    def collect(phase: str, _: dict) -> None:
        nonlocal began
        if phase == "start":
            began = time.perf_counter()
        else:
            found.append(time.perf_counter() - began)

    gc.callbacks.append(collect)
    return found


def watch_triton() -> dict[str, float]:
    """Seconds that this process spends on compiling each kernel, from now on; Inductor's are compiled in others."""
    found: dict[str, float] = {}

    def compiled(*, src: Any, times: Any, cache_hit: bool, **_: Any) -> None:
        if not cache_hit:
            found[f"{src.name} {len(found)}"] = round(times.total / 1e6, 3)

    if torch.cuda.is_available():
        from triton import knobs

        knobs.compilation.listener = compiled
    return found


def phases() -> dict[str, float]:
    """Seconds of ``PHASES`` so far."""
    from torch._dynamo.utils import compilation_time_metrics as spent

    return {name: round(sum(spent.get(key, ())), 2) for name, key in PHASES.items()}


def _cache() -> Path:
    return Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def in_fresh_process(way: str, model: str, layers: int, batch: int) -> dict:
    """``compile_once`` where nothing has been compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/{name}" for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
        command = [sys.executable, __file__, "--child", way, "--model", model, "--layers", str(layers)]
        done = subprocess.run(
            [*command, "--batch", str(batch)], env=os.environ | caches, capture_output=True, text=True, timeout=300
        )
    if done.returncode:
        raise RuntimeError(f"{way}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def summary(lines: list[dict], plain: list[dict]) -> str:
    """One way's medians beside those of ``plain``."""

    def median(of: Callable[[dict], float], lines: list[dict] = lines) -> float:
        return statistics.median(map(of, lines))

    seconds = median(lambda line: line["seconds"])
    ratio = seconds / median(lambda line: line["seconds"], plain)
    spent = {name: median(lambda line, name=name: line["phases"][name]) for name in PHASES}
    spent |= {name: median(lambda line, name=name: line[name]) for name in ("ours", "collector")}
    parts = ", ".join(f"{name} {value:.2f}" for name, value in spent.items())
    return f"{lines[0]['way']}: {seconds:.2f} s, {ratio:.2f} x plain ({len(lines)} processes); {parts}"


def main(
    model: str = "qwen3-30b-a3b",
    layers: int = 12,
    batch: int = 16,
    rounds: int = 3,
    out: Annotated[Path | None, typer.Option(help="JSON of all processes")] = None,
    child: Annotated[str | None, typer.Option(help="compile this way, here and once", hidden=True)] = None,
) -> None:
    """A line each process; then a line each way: median seconds, their ratio to plain, and where they went."""
    if child:
        print(json.dumps(compile_once(child, model, layers, batch)))
        return
    lines = []
    for number in range(rounds):
        for way in WAYS if number == 0 else ("plain", "inexact"):
            lines.append(in_fresh_process(way, model, layers, batch))
            print(json.dumps(lines[-1]), flush=True)
    for way in WAYS:
        print(summary([line for line in lines if line["way"] == way], [x for x in lines if x["way"] == "plain"]))
    if out is not None:
        out.write_text(json.dumps(lines))


if __name__ == "__main__":
    typer.run(main)

"""Requests that arrive while others are being decoded: they take slots as these become free, on the same graph.

    python examples/continuous_requests.py

Greedy and sampled requests side by side. A sampled one gives the same tokens whatever else is in the batch, because
its draws depend on its seed and on the position alone.
"""

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import graphs
from graphs.checkpoints import make_checkpoint


def arriving(count: int) -> Iterator[graphs.Request | None]:
    """Requests as a server would hand them on; ``None`` where none is there at the moment."""
    rng = random.Random(0)
    for number in range(count):
        while rng.random() < 0.5:
            yield None
        prompt = [rng.randrange(1, 512) for _ in range(rng.randrange(1, 20))]
        if number % 2:
            yield graphs.Request(prompt, max_new_tokens=12, temperature=0.8, top_k=50, top_p=0.95, seed=number)
        else:
            yield graphs.Request(prompt, max_new_tokens=24, stop_ids=(7,))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = graphs.from_pretrained(make_checkpoint(Path(folder)), max_tokens_per_rank=256)
    loop = graphs.DecodeLoop(model, batch=4, max_len=64, sampler=graphs.sample, look_every=4)
    for answer in loop.serve(arriving(10)):
        print(f"request {answer.request_id} ({answer.reason}): {answer.tokens}", flush=True)


if __name__ == "__main__":
    main()

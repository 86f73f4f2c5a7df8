"""Decode a few prompts with an MoE model in one process: one compiled step, on a GPU one CUDA graph.

    python examples/one_process.py [--model FOLDER_OR_HUB_NAME]

Without a model, a small random one is made, so that this runs anywhere.
"""

import argparse
import tempfile
from pathlib import Path

import graphs
from graphs.checkpoints import make_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = arguments.model or make_checkpoint(Path(folder))
        model = graphs.from_pretrained(path, max_tokens_per_rank=256)
    loop = graphs.DecodeLoop(model, batch=4, max_len=64)
    prompts = [[11, 12, 13], [21], [31, 32]]  # token numbers, of any lengths
    for prompt, answer in zip(prompts, loop.generate(prompts, max_new_tokens=16), strict=True):
        print(prompt, "->", answer)


if __name__ == "__main__":
    main()

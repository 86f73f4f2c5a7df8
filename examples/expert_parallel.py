"""Experts spread over ranks; every rank decodes prompts of its own, and their numbers need not be equal.

    torchrun --nproc-per-node 2 examples/expert_parallel.py [--model FOLDER_OR_HUB_NAME]

Each rank reads only its share of the experts. The same program runs on several machines.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

import graphs
from graphs.checkpoints import make_checkpoint


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    arguments = parser.parse_args()
    local_rank, on_gpu = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    with tempfile.TemporaryDirectory() as own:
        path = [arguments.model or own]
        dist.broadcast_object_list(path)  # without a model, all read what rank 0 has made
        if arguments.model is None and rank == 0:
            make_checkpoint(Path(own))
        dist.barrier()
        model = graphs.from_pretrained(path[0], max_tokens_per_rank=256, dtype="bfloat16" if on_gpu else "auto")
        dist.barrier()  # before rank 0 removes it
    loop = graphs.DecodeLoop(model, batch=2, max_len=64)
    prompts = [[11, 12, 13], [21]] if rank == 0 else [[31, 32]]  # a rank may also have none
    for prompt, answer in zip(prompts, loop.generate(prompts, max_new_tokens=16), strict=True):
        print(f"rank {rank}: {prompt} -> {answer}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

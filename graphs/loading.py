"""``from_pretrained`` that reads only this rank's experts from a safetensors checkpoint.

transformers does the loading, with its own renaming and merging rules. Two things are ours: the model it
builds already has expert parameters of this rank's size, and the tensors it is given are read lazily, so
that other ranks' experts never leave the disk. No part of transformers' own parallelism is used.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from moe_ops.transports import group_device
from moe_ops.workspace import DEFAULT_TIMEOUT_S

from . import hf_compat, quantized
from .errors import CheckpointError, UnsupportedModelError
from .hf_compat import Model
from .sharding import attach, default_group, expert_range, group_rank, group_size, localize


def from_pretrained(
    path: str | Path,
    *,
    group: dist.ProcessGroup | None = None,
    max_tokens_per_rank: int,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    top_k: int | None = None,
    transport: str = "auto",
    timeout_s: float = DEFAULT_TIMEOUT_S,
    dequantize: bool = False,
    **kwargs: Any,
) -> Model:
    """A causal language model with this rank's experts only, run by ``"moe_ep"``; collective over ``group``.

    ``path``: a folder with ``config.json`` and safetensors files, or a name on the Hub; ``group`` and
    ``max_tokens_per_rank``, ``top_k``, ``transport``, ``timeout_s`` as in ``shard_experts``; ``dtype``: "auto" takes
    the checkpoint's; ``device``: where to load (default: current CUDA device if the group serves CUDA, else
    CPU); ``dequantize``: read FP8 or MXFP4 weights as ``dtype`` ("auto": bf16), which are refused otherwise; other
    keywords go to transformers' ``from_pretrained``.
    Raises ``UnsupportedModelError``, ``CheckpointError``, ``ShardingError``.
    """
    from transformers import AutoConfig

    group = default_group(group)
    folder = resolve_folder(path)
    config = kwargs.pop("config", None) or AutoConfig.from_pretrained(folder)
    stored_as = hf_compat.quantization(config)
    if not (dequantize and stored_as and stored_as.method in quantized.METHODS):
        hf_compat.refuse_quantized(config)
    cls = hf_compat.causal_lm_class(config)
    world_size, rank = group_size(group), group_rank(group)
    device = torch.device(device) if device is not None else default_device(group)
    meta = build_on_meta(cls, config)
    with open_tensors(folder) as tensors:
        if stored_as:
            dtype = torch.bfloat16 if dtype == "auto" else resolve_dtype(dtype, config, tensors)
            tensors = quantized.dequantized(tensors, stored_as.method, dtype, stored_as.block)
            config = hf_compat.without_quantization(config)
        model, info = hf_compat.load_with_state_dict(
            local_class(cls, world_size, rank),
            config,
            select_experts(meta, tensors, world_size, rank),
            dtype=resolve_dtype(dtype, config, tensors),
            **hf_compat.device_kwargs(device),
            **kwargs,
        )
    model.__class__ = cls
    hf_compat.set_generation_config(model, folder)
    check_loaded(model, meta, info, world_size, rank)
    return attach(
        model.to(device).eval(),
        group,
        max_tokens_per_rank=max_tokens_per_rank,
        top_k=top_k,
        transport=transport,
        timeout_s=timeout_s,
    )


def default_device(group: dist.ProcessGroup | None) -> torch.device:
    """The current CUDA device if the group's backend serves CUDA (or there is no group), else the CPU."""
    cuda = torch.cuda.is_available() and (group is None or group_device(group).type == "cuda")
    return torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")


def resolve_folder(path: str | Path) -> Path:
    """A local folder; a name on the Hub is downloaded first."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or str(path).startswith((".", "/", "~")):
        raise CheckpointError(f"{path} is not a folder; pass the folder that holds config.json and the weights.")
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except (OSError, ValueError) as error:  # what huggingface_hub raises: no such name, no network
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{path} is no folder, and the Hub does not give it: {reason}") from error


def build_on_meta(cls: type, config: Any) -> Model:
    """The whole model without memory: names and shapes."""
    with torch.device("meta"):
        return cls(config)


def local_class(cls: type, world_size: int, rank: int) -> type:
    """``cls`` whose instances have expert parameters of this rank's size from the start."""

    def __init__(self, *args: Any, **kwargs: Any):
        cls.__init__(self, *args, **kwargs)
        localize(self, world_size, rank, take=torch.empty_like)

    # The name stays: transformers looks its conversion rules up by it.
    return type(cls.__name__, (cls,), {"__init__": __init__, "__module__": cls.__module__})


class ExpertRows:
    """Rows ``[start, stop)`` of a tensor on disk, read when transformers asks for its value."""

    def __init__(self, stored: Any, mine: range):
        self._stored, self._mine = stored, mine

    def __getitem__(self, index: Any) -> torch.Tensor:
        assert index is Ellipsis, f"transformers reads a whole tensor with [...], not {index!r}"
        return self._stored[self._mine.start : self._mine.stop]

    def get_shape(self) -> list[int]:
        return [len(self._mine), *self._stored.get_shape()[1:]]

    def get_dtype(self) -> str:
        return self._stored.get_dtype()


@contextmanager
def open_tensors(folder: Path) -> Iterator[dict[str, Any]]:
    """Lazy slices of all tensors of a safetensors checkpoint, by key."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    absent = [name for name in names if not (folder / name).exists()]
    if absent:
        raise CheckpointError(
            f"{folder} has no {absent[0]}; pass a complete safetensors checkpoint "
            "(convert other formats with transformers: from_pretrained(...).save_pretrained(new_path))."
        )
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(folder / name, framework="pt")) for name in names]
        yield {key: file.get_slice(key) for file in files for key in file.keys()}  # noqa: SIM118  no mapping


def select_experts(meta: Model, tensors: dict[str, Any], world_size: int, rank: int) -> dict[str, Any]:
    """What this rank reads: dense tensors whole, its own experts, nothing of the others."""
    keys = hf_compat.KeyMap(meta)
    owners = {
        f"{name}.{part}": module.num_experts
        for name, module in hf_compat.experts_modules(meta).items()
        for part in hf_compat.expert_parameters(module)
    }
    chosen: dict[str, Any] = {}
    for key, stored in tensors.items():
        place = keys.locate(key)
        num_experts = owners.get(place.parameter)
        if num_experts is None:
            chosen[key] = stored
            continue
        mine = expert_range(num_experts, world_size, rank)
        if place.expert is None:
            chosen[key] = _fused_rows(key, stored, num_experts, mine)
        elif place.expert in mine:
            chosen[key] = stored
    return chosen


def _fused_rows(key: str, stored: Any, num_experts: int, mine: range) -> ExpertRows:
    if stored.get_shape()[0] != num_experts:
        raise UnsupportedModelError(
            f"{key} has shape {stored.get_shape()}, not {num_experts} experts first; load the model with "
            "transformers and split it with graphs.shard_experts."
        )
    return ExpertRows(stored, mine)


def resolve_dtype(dtype: torch.dtype | str, config: Any, tensors: dict[str, Any]) -> torch.dtype:
    """``dtype`` as torch's; "auto" is the configuration's, else that of the checkpoint's first float tensor."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return getattr(torch, dtype)
    named = getattr(config, "dtype", None)
    if named is not None:
        return named if isinstance(named, torch.dtype) else getattr(torch, named)
    stored = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    found = (stored[t.get_dtype()] for t in tensors.values() if t.get_dtype() in stored)
    return next(found, torch.float32)


def check_loaded(model: Model, meta: Model, info: dict[str, Any], world_size: int, rank: int) -> None:
    """Raise ``CheckpointError`` unless every tensor has a value, experts this rank's size, the rest full size."""
    problems = hf_compat.missing_weights(info)
    localize(meta, world_size, rank, take=torch.empty_like)
    wanted, got = meta.state_dict(), model.state_dict()
    problems += [f"missing: {name}" for name in wanted.keys() - got.keys()]
    for name, tensor in got.items():
        if tensor.is_meta:
            problems.append(f"no value: {name}")
        elif name in wanted and tensor.shape != wanted[name].shape:
            problems.append(f"{name} is {tuple(tensor.shape)}, not {tuple(wanted[name].shape)}")
    problems += [f"no value: buffer {name}" for name, buffer in model.named_buffers() if buffer.is_meta]
    if problems:
        raise CheckpointError(f"the checkpoint does not fit {type(model).__name__}: {'; '.join(problems[:5])}.")

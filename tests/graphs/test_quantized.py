"""FP8 and MXFP4 checkpoints: every rank reads its own experts, equal to the dequantised checkpoint bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

import graphs
from graphs import checkpoints, hf_compat, loading, quantized
from graphs.errors import CheckpointError, UnsupportedModelError

FP8_MAX = 448.0
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}


def to_fp8(weight: Tensor, block: int = 128) -> tuple[Tensor, Tensor]:
    """``(q, scale)`` of a (R, C) or (E, R, C) weight, a scale for each block of rows and columns."""
    rows, columns = weight.shape[-2:]
    grid = -(-rows // block), -(-columns // block)
    padded = torch.zeros(*weight.shape[:-2], grid[0] * block, grid[1] * block)
    padded[..., :rows, :columns] = weight
    blocks = padded.unflatten(-1, (grid[1], block)).unflatten(-3, (grid[0], block))  # [..., gr, b, gc, b]
    scale = blocks.abs().amax(dim=(-3, -1)).clamp(min=1e-6) / FP8_MAX
    q = (blocks / scale[..., :, None, :, None]).flatten(-4, -3).flatten(-2)[..., :rows, :columns]
    return q.contiguous().to(torch.float8_e4m3fn), scale


def write(folder: Path, tensors: dict[str, Tensor], quantization: dict | None) -> Path:
    """A checkpoint with these tensors and the configuration that lies in ``folder``'s parent."""
    folder.mkdir()
    config = json.loads((folder.parent / "config.json").read_text())
    if quantization:
        config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def fp8_pair(folder: Path, family: str, fused: bool = False) -> tuple[Path, Path]:
    """An FP8 checkpoint of ``family`` and the bf16 one of the same values."""
    checkpoints.make_checkpoint(folder, family, torch.bfloat16)
    tensors = load_file(folder / "model.safetensors")
    if fused:
        tensors = dict(checkpoints.tiny_model(family, torch.bfloat16).state_dict())
    stored, plain = dict(tensors), dict(tensors)
    for key, weight in tensors.items():
        if (key.endswith("_proj.weight") or "experts." in key) and weight.dim() > 1 and "gate.weight" not in key:
            q, scale = to_fp8(weight.float())
            stored[key], stored[f"{key}_scale_inv"] = q, scale
            wide = scale.repeat_interleave(128, -2).repeat_interleave(128, -1)
            plain[key] = (q.float() * wide[..., : weight.shape[-2], : weight.shape[-1]]).bfloat16()
    assert sum("scale_inv" in key for key in stored) > 4
    return write(folder / "fp8", stored, FP8), write(folder / "plain", plain, None)


def mxfp4_pair(folder: Path) -> tuple[Path, Path]:
    """A gpt-oss checkpoint with random packed experts, and what transformers makes of them."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    checkpoints.make_checkpoint(folder, "gpt_oss", torch.bfloat16)
    stored = load_file(folder / "model.safetensors")
    plain, make = dict(stored), torch.Generator().manual_seed(0)
    for key in [k for k in stored if k.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, depth, width = stored.pop(key).shape  # transposed: (E, in, out)
        blocks = torch.randint(0, 256, (experts, width, depth // 32, 16), generator=make, dtype=torch.uint8)
        scales = torch.randint(118, 124, (experts, width, depth // 32), generator=make, dtype=torch.uint8)
        stored[f"{key}_blocks"], stored[f"{key}_scales"] = blocks, scales
        plain[key] = convert_moe_packed_tensors(blocks, scales)
    return write(folder / "mxfp4", stored, MXFP4), write(folder / "plain", plain, None)


CASES = {
    "qwen3_moe, fp8": lambda folder: fp8_pair(folder, "qwen3_moe"),
    "deepseek_v3, fp8": lambda folder: fp8_pair(folder, "deepseek_v3"),
    "qwen3_moe, fp8, experts in one tensor": lambda folder: fp8_pair(folder, "qwen3_moe", fused=True),
    "gpt_oss, mxfp4": mxfp4_pair,
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_dequantized_checkpoint(tmp_path: Path, case: str):
    packed, plain = CASES[case](tmp_path)
    wanted = graphs.from_pretrained(plain, max_tokens_per_rank=1)
    got = graphs.from_pretrained(packed, max_tokens_per_rank=1, dequantize=True)
    assert got.dtype == torch.bfloat16 and getattr(got.config, "quantization_config", None) is None
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(got.state_dict()[name], tensor), name
    ids = torch.randint(1, 512, (2, 5))
    with torch.no_grad():
        assert torch.equal(got(ids).logits, wanted(ids).logits)


class Counting:
    """A stored tensor that counts the elements read of it."""

    def __init__(self, stored):
        self._stored, self.read = stored, 0

    def __getitem__(self, index):
        value = self._stored[index]
        self.read += value.numel()
        return value

    def __getattr__(self, name: str):
        return getattr(self._stored, name)


@pytest.mark.parametrize("case", CASES)
def test_other_ranks_experts_are_not_read(tmp_path: Path, case: str):
    """Three ranks, eight experts: each element of an expert and of its scales is read by one rank, once."""
    packed, _ = CASES[case](tmp_path)
    config = transformers.AutoConfig.from_pretrained(packed)
    stored_as = hf_compat.quantization(config)
    config = hf_compat.without_quantization(config)
    cls = hf_compat.causal_lm_class(config)
    read: dict[str, int] = {}
    for rank in range(3):
        meta = loading.build_on_meta(cls, config)
        with loading.open_tensors(packed) as tensors:
            counting = {key: Counting(stored) for key, stored in tensors.items()}
            whole = quantized.dequantized(counting, stored_as.method, torch.bfloat16, stored_as.block)
            chosen = loading.select_experts(meta, whole, 3, rank)
            model, info = hf_compat.load_with_state_dict(
                loading.local_class(cls, 3, rank), config, chosen, dtype=torch.bfloat16
            )
        loading.check_loaded(model, meta, info, 3, rank)
        for key, stored in counting.items():
            read[key] = read.get(key, 0) + stored.read
    sizes = {key: tensor.numel() for key, tensor in load_file(packed / "model.safetensors").items()}
    experts = [key for key in sizes if "mlp.experts." in key]
    assert len(experts) > 4
    assert {key: read[key] for key in experts} == {key: sizes[key] for key in experts}


def test_fp8_literals():
    q = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]).to(torch.float8_e4m3fn)
    scale = torch.tensor([[10.0, 100.0]])
    assert quantized.fp8_blocks(q, scale, dtype=torch.float32, block=(2, 2)).tolist() == [[10, 20, 300], [40, 50, 600]]
    assert quantized.fp8_blocks(q, torch.tensor(2.0), dtype=torch.float32).tolist() == [[2, 4, 6], [8, 10, 12]]
    two = quantized.fp8_blocks(
        q[None].expand(2, -1, -1), torch.stack((scale, -scale)), dtype=torch.float32, block=(2, 2)
    )
    assert torch.equal(two[0], -two[1])


def test_mxfp4_literals():
    blocks = torch.zeros(1, 2, 1, 16, dtype=torch.uint8)
    blocks[0, 0, 0, 0] = 0x71  # 0.5, then 6
    blocks[0, 1, 0, 15] = 0xA0  # 0, then -1
    out = quantized.mxfp4_blocks(blocks, torch.tensor([[[127], [128]]], dtype=torch.uint8), dtype=torch.bfloat16)
    assert out.shape == (1, 32, 2)
    assert out[0, :2, 0].tolist() == [0.5, 6.0] and out[0, 31, 1] == -2.0 and int(out.count_nonzero()) == 3


def test_refused_without_asking_and_with_another_method(tmp_path: Path):
    checkpoints.make_checkpoint(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    packed = write(tmp_path / "packed", tensors, FP8)
    with pytest.raises(UnsupportedModelError, match=r"quantized \(fp8\).*dequantize=True"):
        graphs.from_pretrained(packed, max_tokens_per_rank=1)
    other = write(tmp_path / "other", tensors, {"quant_method": "gptq", "bits": 4})
    with pytest.raises(UnsupportedModelError, match=r"quantized \(gptq\).*Save a dequantized copy"):
        graphs.from_pretrained(other, max_tokens_per_rank=1, dequantize=True)


def test_missing_and_wrong_scales(tmp_path: Path):
    packed, _ = fp8_pair(tmp_path, "qwen3_moe")
    file = packed / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.1.mlp.experts.3.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != f"{key}_scale_inv"}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{key} is FP8 and has no {key}_scale_inv"):
        graphs.from_pretrained(packed, max_tokens_per_rank=1, dequantize=True)
    save_file(tensors | {f"{key}_scale_inv": torch.ones(2, 2)}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"scales of shape \[2, 2\]; blocks of 128 x 128 need \[1, 1\]"):
        graphs.from_pretrained(packed, max_tokens_per_rank=1, dequantize=True)
    save_file(tensors | {key: torch.zeros(96, 64, dtype=torch.uint8)}, file, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"up_proj.weight is stored as U8, which is not fp8"):
        graphs.from_pretrained(packed, max_tokens_per_rank=1, dequantize=True)


def test_plain_checkpoints_do_not_mind(tmp_path: Path):
    checkpoints.make_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert graphs.from_pretrained(tmp_path, max_tokens_per_rank=1, dequantize=True).dtype == torch.bfloat16

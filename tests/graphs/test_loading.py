"""Loading: what each rank reads, for any split, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import graphs
from graphs import checkpoints, hf_compat, loading
from graphs.errors import CheckpointError, ShardingError, TransformersVersionError, UnsupportedModelError
from graphs.sharding import expert_range, localize
from tests.graphs.model_cases import FAMILIES, plain_model
from tests.graphs.tiny_models import build, experts_classes, model_class, tiny_config

CAUSAL_MODELS = [n for n, entry in experts_classes().items() if "ForCausalLM" in model_class(entry).__name__]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {f: checkpoints.make_checkpoint(tmp_path_factory.mktemp(f), f) for f in FAMILIES}


def load_rank(folder: Path, world_size: int, rank: int):
    """What ``from_pretrained`` loads on one rank, without its group."""
    config = transformers.AutoConfig.from_pretrained(folder)
    cls = hf_compat.causal_lm_class(config)
    meta = loading.build_on_meta(cls, config)
    with loading.open_tensors(folder) as tensors:
        chosen = loading.select_experts(meta, tensors, world_size, rank)
        model, info = hf_compat.load_with_state_dict(
            loading.local_class(cls, world_size, rank), config, chosen, dtype=torch.float32
        )
    loading.check_loaded(model, meta, info, world_size, rank)
    return model, chosen


def test_split_of_experts():
    assert [expert_range(8, 3, r) for r in range(3)] == [range(0, 3), range(3, 6), range(6, 8)]
    assert [expert_range(4, 4, r) for r in range(4)] == [range(0, 1), range(1, 2), range(2, 3), range(3, 4)]
    with pytest.raises(ShardingError, match="4 experts cannot be split over 5 ranks"):
        expert_range(4, 5, 0)


@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_rank_holds_its_experts_and_all_of_the_rest(folders, family: str, world_size: int):
    for rank in {0, world_size // 2, world_size - 1}:
        expected = plain_model(family)
        localize(expected, world_size, rank, take=torch.clone)
        model, _ = load_rank(folders[family], world_size, rank)
        want, got = expected.state_dict(), model.state_dict()
        assert want.keys() == got.keys()
        for name in want:
            assert torch.equal(want[name], got[name]), name


@pytest.mark.parametrize("name", CAUSAL_MODELS)
def test_every_class_loads_its_share(tmp_path: Path, name: str):
    """Each family's own checkpoint layout and renaming rules, on an uneven split: 4 experts over 3 ranks."""
    entry = experts_classes()[name]
    build(entry).save_pretrained(tmp_path)
    for rank in (0, 2):
        expected = build(entry)
        localize(expected, 3, rank, take=torch.clone)
        with hf_compat.quiet():
            got = load_rank(tmp_path, 3, rank)[0].state_dict()
        assert expected.state_dict().keys() == got.keys()
        for key, tensor in expected.state_dict().items():
            assert torch.equal(got[key], tensor), key


def test_experts_inside_a_vision_language_model(tmp_path: Path):
    text = tiny_config(experts_classes()["Qwen3VLMoeTextExperts"])
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
        "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(
        text_config=text.to_dict(), vision_config=vision, image_token_id=60, video_token_id=61
    )
    plain = transformers.Qwen3VLMoeForConditionalGeneration(config).eval()
    plain.set_experts_implementation("eager")
    plain.save_pretrained(tmp_path)
    model, ids = graphs.from_pretrained(tmp_path, max_tokens_per_rank=1, dtype="float32"), torch.randint(1, 59, (2, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)
    share, _ = load_rank(tmp_path, 3, 1)
    assert {m.down_proj.shape[0] for m in hf_compat.experts_modules(share).values()} == {1}


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # one tensor an expert; one for all experts
def test_other_ranks_experts_are_not_read(folders, family: str):
    _, everything = load_rank(folders[family], 1, 0)
    _, mine = load_rank(folders[family], 4, 1)

    def numbers(chosen) -> dict[bool, int]:
        sizes = {True: 0, False: 0}
        for key, stored in chosen.items():
            sizes["experts." in key] += torch.Size(stored.get_shape()).numel()
        return sizes

    assert numbers(mine) == {True: numbers(everything)[True] // 4, False: numbers(everything)[False]}


def test_one_process_load_equals_hugging_face(folders):
    ids = torch.randint(1, 512, (2, 5))
    for family, folder in folders.items():
        plain = transformers.AutoModelForCausalLM.from_pretrained(folder, experts_implementation="eager")
        model = graphs.from_pretrained(folder, max_tokens_per_rank=1)
        assert type(model) is type(plain) and model.config._experts_implementation == "moe_ep", family
        with torch.no_grad():
            torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=1e-5)


def test_dtype_is_the_checkpoints_unless_asked_for(tmp_path: Path):
    checkpoints.make_checkpoint(tmp_path, dtype=torch.bfloat16)
    assert graphs.from_pretrained(tmp_path, max_tokens_per_rank=1).dtype == torch.bfloat16
    assert graphs.from_pretrained(tmp_path, max_tokens_per_rank=1, dtype="float32").dtype == torch.float32


def test_several_files_and_their_index(tmp_path: Path):
    plain = checkpoints.tiny_model()
    plain.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, _ = load_rank(tmp_path, 1, 0)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_weight_that_is_missing_is_an_error(tmp_path: Path):
    checkpoints.make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.gate." not in k}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"does not fit Qwen3MoeForCausalLM: missing_keys: .*layers.1.mlp.gate"):
        graphs.from_pretrained(tmp_path, max_tokens_per_rank=1)


def test_expert_that_is_missing_is_an_error(tmp_path: Path):
    checkpoints.make_checkpoint(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if "layers.1.mlp.experts.5." not in k}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"mismatched_keys: .*layers.1.mlp.experts"):
        graphs.from_pretrained(tmp_path, max_tokens_per_rank=1)


def test_folder_without_weights_is_an_error(tmp_path: Path):
    checkpoints.tiny_config().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no model.safetensors; pass a complete safetensors checkpoint"):
        graphs.from_pretrained(tmp_path, max_tokens_per_rank=1)
    with pytest.raises(CheckpointError, match="is not a folder"):
        graphs.from_pretrained(tmp_path / "nowhere", max_tokens_per_rank=1)


def test_quantized_checkpoint_is_refused_before_anything_is_read(tmp_path: Path):
    checkpoints.tiny_config().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"quantized \(fp8\)"):
        graphs.from_pretrained(tmp_path, max_tokens_per_rank=1)


def test_model_outside_the_interface_is_refused_with_the_reason(tmp_path: Path):
    config = transformers.Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, intermediate_size_mlp=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=16, num_local_experts=4, pad_token_id=0,
    )  # fmt: skip
    # transformers takes the setting, records it and ignores it
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="moe_ep")
    reason = r"Llama4ForCausalLM .*'llama4_text'.* not supported.*dense batched product.*ignores it"
    with pytest.raises(UnsupportedModelError, match=reason):
        graphs.use_experts(model)
    with pytest.raises(UnsupportedModelError, match=reason):
        graphs.shard_experts(model, max_tokens_per_rank=1)
    with pytest.raises(UnsupportedModelError, match=reason):
        graphs.DecodeLoop(model, batch=1, max_len=8)
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=reason):
        graphs.from_pretrained(tmp_path, max_tokens_per_rank=1)


@pytest.mark.parametrize("kind", [name for name in hf_compat.OUTSIDE_REASONS if name != "aria"])
def test_models_outside_the_interface_are_what_the_reasons_say(kind: str):
    """None of them has joined the interface; aria has, in 5.23."""
    folder = Path(transformers.__file__).parent / "models" / kind
    assert folder.is_dir()
    assert "@use_experts_implementation" not in (folder / f"modeling_{kind}.py").read_text()
    assert hf_compat.outside_reason(f"{kind}_text") == hf_compat.OUTSIDE_REASONS[kind]


def test_use_experts_sets_the_implementation():
    model = graphs.use_experts(checkpoints.tiny_model())
    assert model.config._experts_implementation == "moe_ep"
    model.model.layers[0].mlp.experts.to(torch.float64)
    with pytest.raises(UnsupportedModelError, match="float64"):
        graphs.use_experts(model)


def test_sharding_twice_is_an_error():
    model = graphs.shard_experts(checkpoints.tiny_model(), max_tokens_per_rank=1)
    with pytest.raises(ShardingError, match="already sharded"):
        graphs.shard_experts(model, max_tokens_per_rank=1)


@pytest.mark.parametrize(("found", "message"), [(None, "is not installed"), ("5.16.3", "5.16.3 is older than 5.17")])
def test_wrong_transformers_version(found, message: str):
    with pytest.raises(TransformersVersionError, match=rf"{message}.*pip install 'transformers>=5.17'"):
        hf_compat.check_version(found)


def test_without_transformers_only_what_needs_it_fails():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import graphs, graphs.cli\n"
        "try: graphs.from_pretrained\n"
        "except graphs.errors.TransformersVersionError as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "transformers is not installed; install it with" in done.stdout, done.stderr


@pytest.mark.parametrize("version", ["5.17.0", "5.18.1", "5.23.0", "6.0.0.dev0"])
def test_right_transformers_version(version: str):
    hf_compat.check_version(version)

"""Everything that depends on a transformers version, 5.17 to 5.23: the one file to touch when it moves."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import nn

from . import quantized
from .errors import TransformersVersionError, UnsupportedModelError

MIN_VERSION = (5, 17)

# What transformers builds: modules with attributes that no type declares.
Model = Any
Experts = Any


def check_version(found: str | None) -> None:
    """Raise ``TransformersVersionError`` unless ``found`` is a version that has the experts interface."""
    wanted = ".".join(map(str, MIN_VERSION))
    hint = f"install it with: pip install 'transformers>={wanted}' safetensors"
    if found is None:
        raise TransformersVersionError(f"transformers is not installed; {hint}.")
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < MIN_VERSION:
        raise TransformersVersionError(f"transformers {found} is older than {wanted}; {hint}.")


def installed_version() -> str | None:
    """Version of the transformers that ``import`` finds, None if there is none."""
    try:
        import transformers
    except ModuleNotFoundError:
        return None
    return getattr(transformers, "__version__", None) or _metadata_version()


def _metadata_version() -> str | None:
    try:
        return version("transformers")
    except PackageNotFoundError:
        return None


check_version(installed_version())

import transformers  # noqa: E402
from transformers import activations, conversion_mapping, core_model_loading  # noqa: E402
from transformers.integrations import moe as hf_moe  # noqa: E402

DEFAULT_APPLY_GATE = hf_moe._default_apply_gate

# Activation of the default gate -> its name in fused_moe. Matched by identity: a subclass may compute anything.
_ACTIVATIONS: tuple[tuple[object, str], ...] = (
    (activations.SiLUActivation, "silu"),
    (nn.SiLU, "silu"),
    (nn.functional.silu, "silu"),
    (activations.GELUActivation, "gelu"),
    (activations.GELUTanh, "gelu_tanh"),
    (activations.ReLUSquaredActivation, "relu2"),
)

# Why the experts of these are out of reach; transformers accepts the setting for them and ignores it.
OUTSIDE_REASONS = {
    "aria": "its experts run as two grouped products of its own, outside the interface, before transformers 5.23",
    "dbrx": "its experts keep all their rows in one two-dimensional matrix",
    "doge": "its experts are retrieved from product keys",
    "jetmoe": "its experts split tokens with sizes read on the host",
    "llama4": "its experts run as one dense batched product over all experts",
    "longcat_flash": "its experts are a list of separate modules with identity experts among them",
    "nllb_moe": "its experts are separate modules, chosen by a mask of tokens",
    "step3p7": "its experts have a forward of their own that is not registered with the interface",
    "switch_transformers": "its experts are separate modules, chosen by a mask of tokens",
}

# Names that the interface gives to what holds experts; transformers' own implementations know no others.
EXPERT_PARAMETERS = frozenset(f"{part}_proj{bias}" for part in ("gate_up", "up", "down") for bias in ("", "_bias"))


def register_experts(name: str, function: Callable) -> None:
    """Make ``function(module, hidden_states, top_k_index, top_k_weights)`` an experts implementation."""
    hf_moe.ALL_EXPERTS_FUNCTIONS.register(name, function)


def register_attention(name: str, function: Callable) -> None:
    """Make ``function`` an attention implementation that is given the masks of ``sdpa``; again is a no-op."""
    transformers.AttentionInterface.register(name, function)
    transformers.AttentionMaskInterface.register(name, transformers.AttentionMaskInterface()["sdpa"])


def sdpa_attention(*args: Any, **kwargs: Any) -> tuple[Any, None]:
    """transformers' own ``sdpa`` attention."""
    return transformers.AttentionInterface()["sdpa"](*args, **kwargs)


def attention_name(model: Model) -> str:
    """The attention implementation that a model is set to."""
    return model.config._attn_implementation


def runs_plain_sdpa(model: Model) -> bool:
    """Whether a model runs ``sdpa`` and would run another implementation the same way.

    Some models ask for the implementation's name to prepare masks of their own (sparse attention): left alone.
    """
    if attention_name(model) != "sdpa":
        return False
    source = inspect.getsource(inspect.getmodule(type(model)) or type(model))
    return re.search(r"_attn_implementation (==|!=|in|not in) ", source) is None


def activation_name(act_fn: object) -> str | None:
    """Name in ``fused_moe`` of an activation, None if it has none. Traced by ``torch.compile``."""
    for known, name in _ACTIVATIONS:
        if act_fn is known or type(act_fn) is known:
            return name
    return None


def is_experts(module: nn.Module) -> bool:
    """True for a module whose forward goes through transformers' experts interface."""
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts", "down_proj")
    return all(hasattr(module, flag) for flag in flags) and hasattr(type(module).forward, "__wrapped__")


def experts_modules(model: Model) -> dict[str, Experts]:
    """Experts modules of a model by name, in the order of its layers; raises ``UnsupportedModelError`` if none."""
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    if not found:
        kind = getattr(getattr(model, "config", None), "model_type", "?")
        raise UnsupportedModelError(
            f"{type(model).__name__} (model type {kind!r}) is not supported by 'moe_ep': {outside_reason(kind)}. "
            "transformers accepts the setting for it and ignores it; run it with transformers alone."
        )
    return found


def outside_reason(model_type: str) -> str:
    """Why the experts of a model without the interface are out of reach."""
    family = next((name for name in OUTSIDE_REASONS if model_type == name or model_type.startswith(f"{name}_")), "")
    return OUTSIDE_REASONS.get(family, "none of its modules uses transformers' experts interface")


def expert_parameters(module: Experts) -> dict[str, nn.Parameter]:
    """The parameters of an experts module that hold experts along their first dimension: all, or one rank's share."""
    return {n: p for n, p in module.named_parameters(recurse=False) if n in EXPERT_PARAMETERS}


class Quantization(NamedTuple):
    """How a checkpoint's weights are stored: transformers' name of the method, rows and columns that share a scale."""

    method: str
    block: tuple[int, int]


def quantization(config: Any) -> Quantization | None:
    """What ``config.quantization_config`` says, None for plain weights."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    get = found.get if isinstance(found, dict) else lambda key: getattr(found, key, None)
    method = getattr(get("quant_method"), "value", get("quant_method"))
    rows, columns = get("weight_block_size") or quantized.FP8_BLOCK
    return Quantization(str(method), (rows, columns))


def without_quantization(config: Any) -> Any:
    """A copy of ``config`` for weights that are dequantised while they are read."""
    plain = copy.deepcopy(config)
    del plain.quantization_config
    return plain


def refuse_quantized(config: Any) -> None:
    """Raise ``UnsupportedModelError`` for a checkpoint or model with quantized weights (FP8, MXFP4, ...)."""
    found = quantization(config)
    if found is None:
        return
    if found.method in quantized.METHODS:
        hint = "Load it with graphs.from_pretrained(path, dequantize=True), which reads it as bf16."
    else:
        hint = (
            "Save a dequantized copy with transformers first: from_pretrained(path, dtype='bfloat16', "
            "quantization_config=<its config class>(dequantize=True)).save_pretrained(new_path)."
        )
    raise UnsupportedModelError(
        f"the weights are quantized ({found.method}); 'moe_ep' takes bf16, fp16 or (on the CPU) fp32 experts. {hint}"
    )


def top_k(config: Any) -> int:
    """Experts per token (K) from a model's configuration."""
    text = config.get_text_config()
    for name in ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "moe_k", "top_k_experts"):
        value = getattr(text, name, None)
        if isinstance(value, int):
            return value
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:
            return int(value[0])
    raise UnsupportedModelError(
        f"{type(text).__name__} does not tell how many experts a token goes to; pass top_k=... explicitly."
    )


def prefill_kwargs(model: Model) -> dict[str, Any]:
    """Arguments that make a forward return the logits of the last position only, where the model can."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}


def causal_lm_class(config: Any) -> type:
    """The text generation class of a configuration."""
    named = [getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ()]
    mapped = transformers.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    for candidate in (*named, mapped):
        if isinstance(candidate, type) and hasattr(candidate, "generate"):
            return candidate
    raise UnsupportedModelError(
        f"no text generation class for model type {config.model_type!r} in transformers "
        f"{transformers.__version__}; upgrade transformers, or build the model yourself and call shard_experts."
    )


class ExpertKey(NamedTuple):
    """Where a checkpoint tensor goes: ``parameter`` of the model, and which ``expert`` of it (None: all)."""

    parameter: str
    expert: int | None


class KeyMap:
    """Finds which tensors of a checkpoint hold experts, with transformers' own conversion rules."""

    def __init__(self, meta_model: Model):
        rules = conversion_mapping.get_model_conversion_mapping(meta_model)
        self._prefix = meta_model.base_model_prefix
        self._state_dict = meta_model.state_dict()
        self._renamings = [r for r in rules if isinstance(r, core_model_loading.WeightRenaming)]
        self._converters = [r for r in rules if isinstance(r, core_model_loading.WeightConverter)]
        self._by_source = {source: c for c in self._converters for source in c.source_patterns}

    def locate(self, key: str) -> ExpertKey:
        """The parameter that ``key`` feeds, and its expert if the checkpoint stores experts one by one."""
        parameter, source = self._rename(key, self._converters)
        if source is None or not self._merges(source):
            return ExpertKey(parameter, None)
        renamed, _ = self._rename(key, [])
        pattern = re.escape(source).replace(r"\*", r"(\d+)").replace(r"\^", "^").replace(r"\$", "$")
        match = re.search(pattern, renamed) or re.search(r"experts\.(\d+)\.", renamed)
        return ExpertKey(parameter, int(match.group(1)) if match and match.groups() else None)

    def _rename(self, key: str, converters: list) -> tuple[str, str | None]:
        return core_model_loading.rename_source_key(key, self._renamings, converters, self._prefix, self._state_dict)

    def _merges(self, source: str) -> bool:
        merge = core_model_loading.MergeModulelist
        return any(isinstance(op, merge) for op in self._by_source[source].operations)


def load_with_state_dict(cls: type, config: Any, state_dict: dict[str, Any], **kwargs: Any) -> tuple[Any, dict]:
    """``cls.from_pretrained`` on tensors that are read when they are needed; returns model and loading info.

    Sizes that do not fit are left to the info, which names them; transformers' own error does not.
    """
    return cls.from_pretrained(
        None, config=config, state_dict=state_dict, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
    )


def set_generation_config(model: Model, folder: Any) -> None:
    """Read ``generation_config.json``, which a load from a state dict leaves out."""
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)


def device_kwargs(device: torch.device) -> dict[str, Any]:
    """How to ask ``from_pretrained`` for a device; without accelerate the model is moved afterwards."""
    if device.type == "cpu" or not transformers.utils.is_accelerate_available():
        return {}
    return {"device_map": {"": device}}


@contextmanager
def quiet(silence: bool = True) -> Iterator[None]:
    """No progress bars and no loading reports while weights are read."""
    if not silence:
        yield
        return
    logging, was_on = transformers.utils.logging, transformers.utils.logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_on:
            logging.enable_progress_bar()


def missing_weights(info: dict[str, Iterable]) -> list[str]:
    """What a load left without a value from the checkpoint, as text."""
    kinds = ("missing_keys", "mismatched_keys", "conversion_errors", "error_msgs")
    return [f"{kind}: {item}" for kind in kinds for item in info.get(kind) or ()]

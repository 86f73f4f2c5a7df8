"""Hugging Face MoE models on ``moe_ops``: experts implementation, sharded loading, decode loop, command line.

``import graphs`` registers the experts implementation ``"moe_ep"`` with transformers, so that
``model.set_experts_implementation("moe_ep")`` works. Without transformers the import succeeds and only
what needs it raises ``TransformersVersionError``.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from . import errors

if TYPE_CHECKING:
    from .decode import DecodeLoop
    from .hf_ep import distributed_config, set_ep_options
    from .loading import from_pretrained
    from .requests import Answer, Request
    from .sampling import sample
    from .sharding import expert_parallel_state, shard_experts, use_experts

_PUBLIC = {
    "Answer": "requests",
    "DecodeLoop": "decode",
    "distributed_config": "hf_ep",
    "Request": "requests",
    "expert_parallel_state": "sharding",
    "from_pretrained": "loading",
    "sample": "sampling",
    "set_ep_options": "hf_ep",
    "shard_experts": "sharding",
    "use_experts": "sharding",
}
__all__ = [
    "Answer",
    "DecodeLoop",
    "Request",
    "distributed_config",
    "errors",
    "expert_parallel_state",
    "from_pretrained",
    "sample",
    "set_ep_options",
    "shard_experts",
    "use_experts",
]

if importlib.util.find_spec("transformers") is not None:
    from . import experts, hf_ep  # noqa: F401  both register "moe_ep"


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'graphs' has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)

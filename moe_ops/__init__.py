"""Expert-parallel MoE inference as five PyTorch ops, ``torch.ops.moe_ep.*``.

Importing this package registers the ops and does nothing else; it needs no GPU, no Triton and no
process group. ``init_workspace`` sets up what the communication ops of a group use.
"""

from . import (
    align,
    combine,
    combine_add,
    combine_from,
    dispatch,
    dispatch_into,
    errors,
    expert_linear,
    fused_moe,
    fused_moe_into,
    metadata,
    moe_combine,
    moe_layer,
    thin_linear,
    topk_sum,
)
from .group_setup import init_workspace, place_experts
from .workspace import BufferInfo, Workspace, get_workspace

__all__ = [
    "BufferInfo",
    "Workspace",
    "align",
    "combine",
    "combine_add",
    "combine_from",
    "dispatch",
    "dispatch_into",
    "errors",
    "expert_linear",
    "fused_moe",
    "fused_moe_into",
    "get_workspace",
    "init_workspace",
    "metadata",
    "moe_combine",
    "moe_layer",
    "place_experts",
    "thin_linear",
    "topk_sum",
]
__version__ = "0.1.0"

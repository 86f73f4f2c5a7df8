"""``align_block_size``: sort (token, slot) pairs by local expert and pad each expert to whole blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ArgumentError, ShapeError
from .moe_reference import align_reference, padded_pairs
from .registration import register_op
from .shapes import BLOCK_SIZES, INDEX_DTYPES, check_dtype, check_rank, check_same_device, check_scalar_count

_OP = "align_block_size"
MAX_PAIRS = 2**31 - 1  # pair indices and the sentinel are int32
MAX_LOCAL_EXPERTS = 1024


def check_pairs(op: str, topk_ids: Tensor) -> None:
    """Pair indices must fit int32."""
    if topk_ids.numel() > MAX_PAIRS:
        raise ShapeError(
            f"{op}: topk_ids {tuple(topk_ids.shape)} has {topk_ids.numel()} pairs, more than {MAX_PAIRS}; "
            "split the batch."
        )


def _check(
    topk_ids: Tensor, valid_tokens: Tensor, block_size: int, num_local_experts: int, local_expert_start: int
) -> None:
    check_rank(_OP, "topk_ids", topk_ids, 2, "(M, K)")
    check_dtype(_OP, "topk_ids", topk_ids, INDEX_DTYPES)
    check_scalar_count(_OP, "valid_tokens", valid_tokens)
    check_same_device(_OP, topk_ids=topk_ids, valid_tokens=valid_tokens)
    check_pairs(_OP, topk_ids)
    if block_size not in BLOCK_SIZES:
        raise ArgumentError(f"{_OP}: block_size={block_size}; pass one of {BLOCK_SIZES}.")
    if not 1 <= num_local_experts <= MAX_LOCAL_EXPERTS or local_expert_start < 0:
        raise ArgumentError(
            f"{_OP}: num_local_experts={num_local_experts}, local_expert_start={local_expert_start}; "
            f"pass 1 to {MAX_LOCAL_EXPERTS} experts and a start of at least 0."
        )
    _positions(topk_ids, block_size, num_local_experts)


def _positions(topk_ids: Tensor, block_size: int, num_local_experts: int) -> int:
    """Length of ``sorted_token_ids``, which ``num_tokens_post_padded`` may be: int32, too."""
    size = padded_pairs(topk_ids.numel(), num_local_experts, block_size)
    if size > MAX_PAIRS:
        raise ShapeError(
            f"{_OP}: topk_ids {tuple(topk_ids.shape)} padded to blocks of {block_size} for each of "
            f"{num_local_experts} experts takes up to {size} positions, more than {MAX_PAIRS}; split the batch."
        )
    return size


def _empty_outputs(topk_ids: Tensor, block_size: int, num_local_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    size = _positions(topk_ids, block_size, num_local_experts)
    make = lambda length: torch.empty(length, dtype=torch.int32, device=topk_ids.device)  # noqa: E731
    return make(size), make(size // block_size), make(1)


def _fake(
    topk_ids: Tensor, valid_tokens: Tensor, block_size: int, num_local_experts: int, local_expert_start: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(topk_ids, valid_tokens, block_size, num_local_experts, local_expert_start)
    return _empty_outputs(topk_ids, block_size, num_local_experts)


def _cpu(
    topk_ids: Tensor, valid_tokens: Tensor, block_size: int, num_local_experts: int, local_expert_start: int
) -> tuple[Tensor, Tensor, Tensor]:
    _check(topk_ids, valid_tokens, block_size, num_local_experts, local_expert_start)
    return align_reference(topk_ids, valid_tokens, block_size, num_local_experts, local_expert_start)


def launch_align(
    topk_ids: Tensor, valid_tokens: Tensor, block_size: int, num_local_experts: int, local_expert_start: int,
    behind_dispatch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The Triton implementation: one launch, two above 2048 pairs. ``behind_dispatch``: see ``fused_moe_launch``."""
    _check(topk_ids, valid_tokens, block_size, num_local_experts, local_expert_start)
    return align_blocks(
        topk_ids, valid_tokens, block_size, num_local_experts, local_expert_start, behind_dispatch
    )  # fmt: skip


def align_blocks(
    topk_ids: Tensor, valid_tokens: Tensor, block_size: int, num_local_experts: int, local_expert_start: int,
    behind_dispatch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``launch_align`` of checked arguments, for any block size."""
    from .align_kernels import launch

    outputs = _empty_outputs(topk_ids, block_size, num_local_experts)
    sizes = block_size, num_local_experts, local_expert_start
    launch(topk_ids.contiguous(), valid_tokens, outputs, *sizes, behind_dispatch=behind_dispatch)
    return outputs


def align_with_destinations(
    topk_ids: Tensor, topk_weights: Tensor, valid_tokens: Tensor, block_size: int, num_local_experts: int,
    local_expert_start: int, pairs: Tensor, out: Tensor,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:  # fmt: skip
    """``align_blocks`` of contiguous (M, K), more than ``align_kernels.ONE_LAUNCH_PAIRS``, and where pairs go.

    The latter is (S,) int64 and fp32, set where ``sorted_token_ids`` names a pair: see
    ``fused_moe_lone_kernels.destinations``.
    """
    from .align_kernels import launch

    outputs = _empty_outputs(topk_ids, block_size, num_local_experts)
    place, factor = (outputs[0].new_empty(outputs[0].shape, dtype=kind) for kind in (torch.int64, torch.float32))
    lone = topk_weights, pairs, out, place, factor
    launch(topk_ids, valid_tokens, outputs, block_size, num_local_experts, local_expert_start, lone)
    return outputs, (place, factor)


align_block_size = register_op(
    "align_block_size(Tensor topk_ids, Tensor valid_tokens, int block_size, int num_local_experts, "
    "int local_expert_start) -> (Tensor sorted_token_ids, Tensor expert_ids, Tensor num_tokens_post_padded)",
    fake=_fake,
    cpu=_cpu,
    cuda=launch_align,
)
"""``torch.ops.moe_ep.align_block_size.default``.

topk_ids: (M, K) int32 or int64; valid_tokens: one int32; block_size: a power of two from 16 to 256.

Returns, all int32 and of static length:
``sorted_token_ids``        (S,) pair indices ``row*K + slot``, expert by expert, ascending within one, each
                            expert padded to a multiple of ``block_size`` with the sentinel ``M*K``; so is the rest.
                            ``S = M*K + min(E_l, M*K) * (block_size - 1)`` rounded up to ``block_size``
``expert_ids``              (S / block_size,) local expert of each block, -1 past the end
``num_tokens_post_padded``  (1,) how much of ``sorted_token_ids`` is used

Ids outside ``[local_expert_start, local_expert_start + E_l)`` and rows >= ``valid_tokens`` take no part.
Raises ``ShapeError`` (S above 2^31 - 1), ``DtypeError``, ``DeviceError``, ``ArgumentError``.
"""

"""``fused_moe_combine``: the experts and the combine behind them as one op, with nothing copied in between.

The compiler puts it in place of ``fused_moe`` and ``rsv_combine`` (or ``rsv_combine_add``), where nobody else reads
what lies between (``lowering/comm_buffers.py``). On p2p and multicast the combine kernel itself sums the experts'
pairs, straight into its slot of symmetric memory: one launch and two passes over (M, H) less. Elsewhere the two ops
run one after the other. Results are bit-equal to theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .combine_add import NORM, Epilogue, Norm, Pairs, check_epilogue, combine_and_add, launch_combine_add
from .errors import DtypeError
from .fused_moe import fused_moe, launch_fused_moe_pairs
from .local_combine import launch_local_combine
from .registration import register_op
from .shapes import check_dtype
from .workspace import resolve

_OP = "fused_moe_combine"
EXPERTS = (
    'str activation="silu", float? alpha=None, float? limit=None, bool gated=True, bool transposed=False, '
    "bool interleaved=False, Tensor? gate_up_bias=None, Tensor? down_bias=None, int? tokens_hint=None, "
    "bool batch_invariant=False"
)


def _fake(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, local_tokens: Tensor,
    metadata: Tensor, local_expert_start: int, num_rows: int, addends: Sequence[Tensor], group_name: str, *,
    scale: float = 1.0, round_each: bool = True, combine_dtype: torch.dtype | None = None,
    norm_weight: Tensor | None = None, norm_eps: float = 0.0, norm_shift: float = 0.0, norm_round_first: bool = True,
    **experts: Any,
) -> Tensor:  # fmt: skip
    y = fused_moe(hidden, topk_ids, topk_weights, gate_up, down, metadata[0:1], local_expert_start, **experts)
    dtype = combine_dtype or torch.bfloat16
    norm = Norm.of(norm_weight, norm_eps, norm_shift, norm_round_first)
    epilogue = Epilogue(addends, scale, round_each, norm)
    check_epilogue(_OP, epilogue, y, num_rows, dtype)
    return epilogue.new_output(y, num_rows, dtype)


def _run(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, local_tokens: Tensor,
    metadata: Tensor, local_expert_start: int, num_rows: int, addends: Sequence[Tensor], group_name: str, *,
    scale: float = 1.0, round_each: bool = True, combine_dtype: torch.dtype | None = None,
    norm_weight: Tensor | None = None, norm_eps: float = 0.0, norm_shift: float = 0.0, norm_round_first: bool = True,
    before_combine: Callable[[], object] | None = None, experts_per_rank: int = 0, behind_dispatch: bool = False,
    **experts: Any,
) -> Tensor:  # fmt: skip
    """``before_combine`` is called when the addends must be there; ``experts_per_rank``: see ``launch_combine_add``.

    ``behind_dispatch``: the launch before this op on this stream is ``dispatch_into``.
    """
    norm = Norm.of(norm_weight, norm_eps, norm_shift, norm_round_first)
    dtype, epilogue = combine_dtype or torch.bfloat16, Epilogue(addends, scale, round_each, norm)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise DtypeError(f"{_OP}: combine_dtype = {combine_dtype}; pass bfloat16, float16 or float32.")
    check_epilogue(_OP, epilogue, hidden, num_rows, dtype)
    ws = resolve(group_name, _OP)
    arguments = (hidden, topk_ids, topk_weights, gate_up, down, metadata[0:1], local_expert_start)
    one_kernel = hidden.is_cuda and (ws.channel is not None or ws.world_size == 1)
    if one_kernel and ws.world_size > 1:
        check_dtype(_OP, "hidden", hidden, (ws.config.dtype,))
        ws.check_call(_OP, rows=num_rows, hidden_size=hidden.shape[1], top_k=topk_ids.shape[1], device=hidden.device)
        ws.check()
    if one_kernel:
        pairs = launch_fused_moe_pairs(*arguments, **experts, behind_dispatch=behind_dispatch)
        experts_output = Pairs(*pairs, local_expert_start, gate_up.shape[0])
    else:
        experts_output = fused_moe(*arguments, **experts)
    if before_combine is not None:
        before_combine()
    if not isinstance(experts_output, Pairs):
        return combine_and_add(_OP, ws, experts_output, local_tokens, metadata, num_rows, epilogue, dtype)
    behind_experts = before_combine is None and topk_ids.numel() > 0
    if ws.channel is None:
        return launch_local_combine(experts_output, local_tokens, num_rows, epilogue, dtype, behind_experts)
    return launch_combine_add(
        ws.channel, experts_output, local_tokens, metadata, num_rows, epilogue, dtype, experts_per_rank, behind_experts
    )


fused_moe_combine = register_op(
    "fused_moe_combine(Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor down, "
    "Tensor local_tokens, Tensor metadata, int local_expert_start, int num_rows, Tensor[] addends, str group_name, *, "
    f"float scale=1.0, bool round_each=True, ScalarType? combine_dtype=None, {NORM}, {EXPERTS}) -> Tensor",
    fake=_fake,
    cpu=_run,
    cuda=_run,
    ordered=True,
)

"""``moe_layer``: dispatch, experts and combine of a layer as one op; ``moe_layer_shared``: and a shared expert beside.

The compiler puts them in place of ``agv_dispatch`` and ``fused_moe_combine``, where nobody else reads what lies
between (``lowering/join_layer.py``, ``lowering/overlap_shared.py``). Their meaning is that of the ops one after the
other, on every transport, to the bit.

What becomes possible: the gathered batch is seen by nobody but the experts, so it need not be a tensor of its own. On
p2p and multicast the experts read it where the peers have put it: in the workspace's layer batch (docs/protocol.md,
"Buffers of callers"). ``entry_barrier=False`` leaves out the meeting before the peers write there; legal where, since
the last op that used the layer batch, every rank has met all others, as it does in the combine that ends each of these
ops. ``experts_per_rank``, if not 0, promises that expert ``e`` lies on rank ``e // experts_per_rank``: rows then travel
only to and from ranks with an expert for them. A group of one rank gathers nothing at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from . import dispatch, moe_combine
from .combine_add import NORM
from .dispatch_into import dispatch_into
from .errors import ShapeError
from .reference import Batch
from .registration import register_op
from .shared_expert import Beside, SharedExpert, check_shared
from .workspace import Workspace, resolve

_OP, _OP_SHARED = "moe_layer", "moe_layer_shared"


def _fake(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, local_tokens: Tensor,
    metadata: Tensor, local_expert_start: int, max_tokens: int, addends: Sequence[Tensor], group_name: str,
    entry_barrier: bool = True, experts_per_rank: int = 0, **options: Any,
) -> Tensor:  # fmt: skip
    batch = dispatch._fake(hidden, topk_ids, topk_weights, local_tokens, metadata, max_tokens, group_name)
    return moe_combine._fake(
        *batch, gate_up, down, local_tokens, metadata, local_expert_start, hidden.shape[0], addends, group_name,
        **options,
    )  # fmt: skip


def _run(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, local_tokens: Tensor,
    metadata: Tensor, local_expert_start: int, max_tokens: int, addends: Sequence[Tensor], group_name: str,
    entry_barrier: bool = True, experts_per_rank: int = 0, **options: Any,
) -> Tensor:  # fmt: skip
    ways = {"entry_barrier": entry_barrier, "experts_per_rank": experts_per_rank}
    batch, behind_dispatch = _gather(
        resolve(group_name, _OP), Batch(hidden, topk_ids, topk_weights), local_tokens, metadata, max_tokens, **ways
    )
    return moe_combine._run(
        *batch, gate_up, down, local_tokens, metadata, local_expert_start, hidden.shape[0], addends, group_name,
        experts_per_rank=experts_per_rank, behind_dispatch=behind_dispatch, **options,
    )  # fmt: skip


def _gather(
    ws: Workspace, batch: Batch, local_tokens: Tensor, metadata: Tensor, max_tokens: int, **ways: Any
) -> tuple[Batch, bool]:
    """The batch for the experts of this op alone: read before the op ends, never returned.

    And whether the stream's last launch is a dispatch behind which experts may start early.
    """
    if ws.world_size == 1 and batch.hidden.is_cuda and max_tokens == batch.hidden.shape[0]:
        dispatch._check(*batch, local_tokens, metadata, max_tokens)
        return batch, False
    if ws.channel is None or max_tokens > ws.layout.capacity:
        return Batch(*dispatch._run(*batch, local_tokens, metadata, max_tokens, ws.group_name)), False
    dispatch._check(*batch, local_tokens, metadata, max_tokens)
    gathered = ws.layer_batch(max_tokens, batch.topk_ids.dtype, batch.topk_weights.dtype)
    dispatch_into(ws, batch, local_tokens, metadata, gathered, experts_follow=True, **ways)
    return gathered, batch.hidden.is_cuda


def _shared_expert(
    shared_x: Tensor, shared_gate_up: Sequence[Tensor], shared_down: Tensor | None, position: int, round_each: bool,
    thin: bool, hidden: Tensor,
) -> SharedExpert:  # fmt: skip
    shared = SharedExpert(shared_x, shared_gate_up, shared_down, round_each, thin)
    check_shared(_OP_SHARED, shared)
    if position >= 0 and (shared_down is None or shared_x.shape[0] != hidden.shape[0]):
        raise ShapeError(
            f"{_OP_SHARED}: shared_position = {position}, but the shared expert does not return (T, H); "
            "pass shared_down and T rows, or shared_position=-1."
        )
    return shared


def _insert(addends: Sequence[Tensor], position: int, result: Tensor) -> Sequence[Tensor]:
    return [*addends[:position], result, *addends[position:]] if position >= 0 else addends


def _fake_shared(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, local_tokens: Tensor,
    metadata: Tensor, local_expert_start: int, max_tokens: int, addends: Sequence[Tensor], shared_x: Tensor,
    shared_gate_up: Sequence[Tensor], shared_down: Tensor | None, shared_position: int, group_name: str, *,
    shared_round_each: bool = False, shared_thin: bool = False, **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shared = _shared_expert(
        shared_x, shared_gate_up, shared_down, shared_position, shared_round_each, shared_thin, hidden
    )
    result = shared.new_result()
    out = _fake(
        hidden, topk_ids, topk_weights, gate_up, down, local_tokens, metadata, local_expert_start, max_tokens,
        _insert(addends, shared_position, result), group_name, **options,
    )  # fmt: skip
    return out, result


def _run_shared(
    hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor, gate_up: Tensor, down: Tensor, local_tokens: Tensor,
    metadata: Tensor, local_expert_start: int, max_tokens: int, addends: Sequence[Tensor], shared_x: Tensor,
    shared_gate_up: Sequence[Tensor], shared_down: Tensor | None, shared_position: int, group_name: str, *,
    shared_round_each: bool = False, shared_thin: bool = False, entry_barrier: bool = True, experts_per_rank: int = 0,
    **options: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shared = _shared_expert(
        shared_x, shared_gate_up, shared_down, shared_position, shared_round_each, shared_thin, hidden
    )
    beside = Beside(shared)
    try:
        ways = {"entry_barrier": entry_barrier, "experts_per_rank": experts_per_rank}
        ws = resolve(group_name, _OP_SHARED)
        batch, behind_dispatch = _gather(
            ws, Batch(hidden, topk_ids, topk_weights), local_tokens, metadata, max_tokens, **ways
        )
        out = moe_combine._run(
            *batch, gate_up, down, local_tokens, metadata, local_expert_start, hidden.shape[0],
            _insert(addends, shared_position, beside.result), group_name,
            experts_per_rank=experts_per_rank, before_combine=beside.join if shared_position >= 0 else None,
            behind_dispatch=behind_dispatch, **options,
        )  # fmt: skip
    finally:
        result = beside.join()
    return out, result


_LAYER = (
    "Tensor hidden, Tensor topk_ids, Tensor topk_weights, Tensor gate_up, Tensor down, Tensor local_tokens, "
    "Tensor metadata, int local_expert_start, int max_tokens, Tensor[] addends"
)
_OPTIONS = (
    "bool entry_barrier=True, int experts_per_rank=0, float scale=1.0, bool round_each=True, "
    f"ScalarType? combine_dtype=None, {NORM}, {moe_combine.EXPERTS}"
)

moe_layer = register_op(
    f"{_OP}({_LAYER}, str group_name, *, {_OPTIONS}) -> Tensor", fake=_fake, cpu=_run, cuda=_run, ordered=True
)
"""``(T, H)``: ``fused_moe_combine`` of what ``agv_dispatch`` gathers, with ``num_rows`` = T; (2, T, H) with a norm."""

moe_layer_shared = register_op(
    f"{_OP_SHARED}({_LAYER}, Tensor shared_x, Tensor[] shared_gate_up, Tensor? shared_down, int shared_position, "
    f"str group_name, *, bool shared_round_each=False, bool shared_thin=False, {_OPTIONS}) -> (Tensor, Tensor)",
    fake=_fake_shared,
    cpu=_run_shared,
    cuda=_run_shared,
    ordered=True,
)
"""``moe_layer``'s result, and the shared expert's (``shared_expert.SharedExpert``), computed beside it.

``shared_position``: where among the addends the shared expert's result is added, -1 for nowhere. ``shared_thin``: by
kernels of our own for few rows, with sums in another order.
"""

"""``metadata_update``: how many live rows all ranks have, and where this rank's begin."""

from __future__ import annotations

from torch import Tensor

from . import collectives
from .registration import register_op
from .shapes import check_scalar_count
from .symmetric import Channel
from .workspace import resolve

_OP = "metadata_update"


def _check(local_tokens: Tensor) -> None:
    check_scalar_count(_OP, "local_tokens", local_tokens)


def _fake(local_tokens: Tensor, group_name: str) -> Tensor:
    _check(local_tokens)
    return local_tokens.new_empty(3)


def launch_metadata(channel: Channel, local_tokens: Tensor) -> Tensor:
    """The kernel over symmetric memory: one program."""
    from .metadata_kernels import _metadata_kernel

    out = local_tokens.new_empty(3)
    _metadata_kernel[(1,)](
        channel.peers(),
        local_tokens,
        out,
        channel.layout.max_tokens_per_rank,
        W=channel.world_size,
        num_warps=1,  # pyright: ignore[reportCallIssue]
    )
    return out


def _run(local_tokens: Tensor, group_name: str) -> Tensor:
    _check(local_tokens)
    ws = resolve(group_name, _OP)
    ws.check()
    if ws.channel is None:
        return collectives.metadata_update(ws, local_tokens)
    out = launch_metadata(ws.channel, local_tokens)
    if not local_tokens.is_cuda:
        ws.check()
    return out


metadata_update = register_op(
    "metadata_update(Tensor local_tokens, str group_name) -> Tensor", fake=_fake, cpu=_run, cuda=_run, ordered=True
)

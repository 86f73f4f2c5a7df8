"""The combine of a group of one rank, with what is joined to it, as one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .combine_add import Epilogue, Pairs, all_aligned, kernel_norm, kernel_routing, whole_rows
from .comm_launch import is_aligned, rows_of
from .pdl import chain_link

_OCTETS = 128  # of a row in one program: 1024 elements, an access of 16 bytes a thread


def launch_local_combine(
    source: Tensor | Pairs, local_tokens: Tensor, num_rows: int, epilogue: Epilogue, out_dtype: torch.dtype | None,
    behind_experts: bool = False,
) -> Tensor:  # fmt: skip
    """``(num_rows, H)``: the live rows of ``source``, rounded, scaled, plus the addends; dead rows count as zeros.

    With a norm ``(2, num_rows, H)``, as ``rsv_combine_add``.

    ``source``: expert output (M, H) with M >= num_rows, or its pairs (M * K, H).
    ``behind_experts``: see ``combine_add.launch_combine_add``.
    """
    from .local_combine_kernels import _local_combine_kernel

    pairs = source if isinstance(source, Pairs) else None
    rows = pairs.rows if pairs is not None else source
    assert isinstance(rows, Tensor)
    out = epilogue.new_output(rows, num_rows, out_dtype)
    if out.numel() == 0:
        return out
    flat = out.view(-1, out.shape[-1])
    norm, kind = kernel_norm(epilogue.norm, flat)
    octets, warps = whole_rows(rows.shape[1]) if kind else (_OCTETS, 4)
    _local_combine_kernel[(num_rows, -(-rows.shape[1] // (8 * octets)))](
        rows_of(rows),
        kernel_routing(pairs, local_tokens),
        rows_of(flat),
        tuple(map(rows_of, epilogue.addends)) or (rows_of(flat),),
        epilogue.scale,
        norm,
        local_tokens,
        num_rows,
        N=octets,
        TOP_K=pairs.topk_ids.shape[1] if pairs is not None else 0,
        ADDENDS=len(epilogue.addends),
        ROUND_EACH=epilogue.round_each,
        NORM=kind,
        ALIGNED_IN=is_aligned(rows),
        ALIGNED_OUT=all_aligned(flat, epilogue),
        num_warps=warps,  # pyright: ignore[reportCallIssue]
        **chain_link(behind_experts, out.device),
    )
    return out

"""Schema, fake, CPU and CUDA implementation of an op, registered in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("moe_ep", "DEF")

# Ranks meet inside the communication ops, so a compiler must keep their number and order. On: each is an
# ordered effect (a token threads through the graph). Off: only data dependence orders them.
ORDERED_EFFECTS = True

# Of ops that launch kernels of their own and in which ranks do not meet: ``lowering`` compiles them ahead.
CUDA_IMPLEMENTATIONS: dict[torch._ops.OpOverload, Callable] = {}


def register_op(
    schema: str,
    *,
    fake: Callable,
    cpu: Callable,
    cuda: Callable,
    tags: tuple[torch.Tag, ...] = (),
    ordered: bool = False,
) -> torch._ops.OpOverload:
    """Define ``moe_ep::<schema>`` and return its overload. ``ordered``: an op in which ranks meet.

    ``fake`` gives the outputs' shapes from meta tensors alone and runs the same checks as the two
    implementations. Outputs are fresh tensors: no implementation may return an input, a view of
    one, or a buffer that lives longer than the call. A second registration of a name raises.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"moe_ep::{name}", fake, lib=LIBRARY)
    base, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.moe_ep, base), overload or "default")
    if not ordered and cuda is not cpu:
        CUDA_IMPLEMENTATIONS[op] = cuda
    if ordered and ORDERED_EFFECTS:
        _declare_ordered(op)
    return op


def _declare_ordered(op: torch._ops.OpOverload) -> None:
    from torch._higher_order_ops import effects

    # _EffectType is torch <= 2.11's name, EffectType the later one
    kind = getattr(effects, "_EffectType", None) or effects.EffectType
    effects._register_effectful_op(op, kind.ORDERED)

"""Schema, fake, CPU and CUDA implementation of an op, registered in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("moe_ep", "DEF")


def register_op(
    schema: str, *, fake: Callable, cpu: Callable, cuda: Callable, tags: tuple[torch.Tag, ...] = ()
) -> torch._ops.OpOverload:
    """Define ``moe_ep::<schema>`` and return its overload.

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
    return getattr(getattr(torch.ops.moe_ep, base), overload or "default")

"""Why nothing that Inductor generates writes to symmetric memory here: torch 2.11 skips the input of such a buffer.

An op whose lowering realises its input as an Inductor communication buffer, behind a pointwise op. In torch 2.11 the
pointwise kernel runs in place in the new, unwritten buffer (``cpp_fused_add_silu_0(buf1)`` never reads ``buf0``); 2.13
has the check that was missing. Symmetric memory needs GPUs, so the buffer is plain memory full of NaN; which kernel is
generated is decided before.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._inductor import ir
from torch._inductor.codegen import wrapper
from torch._inductor.comm_lowering import realize_as_comm_buffer
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering

import lowering
from lowering import torch_compat
from tests.lowering.layers import batch, routed, weights

COUNT = torch.tensor([5], dtype=torch.int32)


@pytest.fixture
def consume(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch._ops.OpOverload]:
    """An op that doubles its input, which Inductor must put into a communication buffer."""
    library = torch.library.Library("moe_ep_pitfall", "DEF")
    library.define("consume(Tensor x) -> Tensor")
    library.impl("consume", lambda x: x * 2, "CPU")
    torch.library.register_fake("moe_ep_pitfall::consume", torch.empty_like, lib=library)
    op = torch.ops.moe_ep_pitfall.consume.default

    @register_lowering(op, type_promotion_kind=None)
    def _(x: ir.TensorBox) -> ir.TensorBox:
        realize_as_comm_buffer(x, ir.CommBufferType.SYMM_MEM, "0")
        return fallback_handler(op, add_to_fallback_set=False)(x)

    def allocate(self: wrapper.AllocateLine, code: wrapper.IndentedBuffer) -> None:
        size = tuple(map(int, self.node.get_size()))
        code.writeline(f"{self.node.get_name()} = torch.full({size}, float('nan'))")

    monkeypatch.setattr(wrapper.AllocateLine, "_codegen_comm_buffer", allocate)
    yield op
    lowerings.pop(op, None)
    library._destroy()


def test_a_comm_buffer_behind_a_pointwise_op(consume: torch._ops.OpOverload):
    def model(x: Tensor, w: Tensor) -> Tensor:
        y = x @ w
        return consume(F.silu(y) + y)

    x, w = torch.randn(16, 16), torch.randn(16, 16)
    torch._dynamo.reset()
    with torch.no_grad(), torch_compat.without_caches():
        result, (code,) = torch_compat.output_code(torch.compile(model), x, w)
    calls = [line.strip() for line in code.splitlines() if line.strip().startswith("cpp_fused_add_silu_0(")]
    if torch_compat.torch_version() < (2, 13):
        assert calls == ["cpp_fused_add_silu_0(buf1)"] and result.isnan().all()  # the buffer's own NaN
    else:
        assert calls == ["cpp_fused_add_silu_0(buf0, buf1)"]
        torch.testing.assert_close(result, model(x, w))


def test_lowered_layers_have_no_such_buffer(monkeypatch: pytest.MonkeyPatch):
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a communication buffer of Inductor's")

    monkeypatch.setattr(ir.CommBufferLayout, "__init__", refuse)

    def model(x: Tensor, w: dict[str, Tensor], count: Tensor) -> Tensor:
        return x + (routed(x, w, count) + (x @ w["shared"]).sin())

    explanation = lowering.explain(model, batch(), weights(), COUNT)
    assert explanation.ops["moe_layer"] == 1

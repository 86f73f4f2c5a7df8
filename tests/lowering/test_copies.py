"""Copies around the ops are found by what kernels do, whatever the ops are called that they came from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import lowering
from lowering import schedule
from lowering.copies import Copy, copies_among, ops_in_code
from lowering.schedule import Launch, Store
from lowering.torch_compat import Buffer, Scheduled
from tests.lowering.layers import H, T, batch, ops

COUNT = torch.tensor([5], dtype=torch.int32)
ORDER = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4])


def between_combines(move: Callable[[Tensor], Tensor]) -> list[Copy]:
    """What is reported of ``move``, which stands between two combines."""

    def model(x: Tensor, count: Tensor) -> Tensor:
        metadata = ops.metadata_update(count, "local")
        y = move(ops.rsv_combine(x, count, metadata, T, "local"))
        return ops.rsv_combine(y.contiguous(), count, metadata, T, "local")

    return lowering.explain(model, batch(), COUNT).copies


def scattered(y: Tensor) -> Tensor:
    return torch.slice_scatter(torch.zeros_like(y), y[:4], 0, 2, 6)


def unsafe_view(y: Tensor) -> Tensor:
    return torch.ops.aten._unsafe_view(y.view(T, 2, -1).transpose(0, 1).contiguous(), [T, -1])


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda y: y.view(2, T // 2, H).transpose(0, 1).contiguous().view(T, H),
    "stack": lambda y: torch.stack([y, y], 1).view(-1, H)[:T],
    "cat": lambda y: torch.cat([y[4:], y[:4]]),
    "unsafe_view": unsafe_view,
    "index_select": lambda y: torch.index_select(y, 0, ORDER),
    "slice_scatter": scattered,
    "as_strided": lambda y: torch.as_strided(y, [T, H], [H // 2, 1]),
    "roll": lambda y: y.roll(1, 0),
    "pad": lambda y: torch.nn.functional.pad(y[:, :-1], (0, 1)),
    "cast": lambda y: y.float().clone()[:, ORDER.repeat(4)].bfloat16(),
}


@pytest.mark.parametrize("case", MOVES)
def test_what_only_moves_data_is_a_copy(case: str):
    assert {copy.op for copy in between_combines(MOVES[case])} == {"rsv_combine"}


def test_a_copy_of_what_the_graph_is_given_into_an_op_is_found():
    def model(x: Tensor, count: Tensor) -> Tensor:
        return ops.rsv_combine(x.t().contiguous(), count, ops.metadata_update(count, "local"), T, "local")

    found = lowering.explain(model, batch().t().contiguous(), COUNT).copies
    assert [copy.op for copy in found] == ["rsv_combine"]


def test_a_call_of_clone_is_a_copy():
    """Complex numbers: Inductor writes no kernel for them."""

    def model(x: Tensor, count: Tensor) -> Tensor:
        metadata = ops.metadata_update(count, "local")
        y = ops.rsv_combine(x, count, metadata, T, "local", out_dtype=torch.float32)
        pairs = torch.view_as_complex(y.view(T, H // 2, 2)).t().contiguous()
        return torch.view_as_real(pairs).relu()

    assert [copy.kernel for copy in lowering.explain(model, batch(), COUNT).copies] == ["aten.clone"]


COMPUTES: dict[str, Callable[[Tensor], Tensor]] = {
    "stack of two": lambda y: torch.stack([y.relu(), y.sigmoid()], 1).view(-1, H)[:T],
    "choice by data": lambda y: torch.where(y > 0, y, 0),
    "norm, moved": lambda y: torch.nn.functional.rms_norm(y, (H,)).roll(1, 0),
    "product, library": lambda y: (y @ torch.eye(H, dtype=y.dtype)).topk(H).values.cumsum(0).to(y.dtype),
    "view": lambda y: y.view(T, 2, H // 2).view(T, H),
}


@pytest.mark.parametrize("case", COMPUTES)
def test_what_computes_is_none(case: str):
    assert between_combines(COMPUTES[case]) == []


def test_a_copy_that_shares_a_kernel_with_a_sum_is_found():
    """``y + 1`` is stored and so is y, transposed: one kernel, and half of it is a copy."""

    def model(x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        metadata = ops.metadata_update(count, "local")
        y = ops.rsv_combine(x, count, metadata, T, "local")
        return y + 1, torch.stack([y, y])

    found = lowering.explain(model, batch(), COUNT).copies
    assert found and all(copy.op == "rsv_combine" for copy in found)


def launch(called: str, read: str, written: str, moved: bool = False) -> Launch:
    moved_from = frozenset([read]) if moved else frozenset()
    return Launch(called, called or "clone", frozenset([read]), (Store(written, moved_from),))


def test_calls_of_torch_that_are_not_known_to_compute_count():
    layer = launch("moe_ep.moe_layer", "buf1", "buf2")
    for called, copies in (
        ("aten.mm", False), ("extern_kernels.addmm", False), ("aten._scaled_dot_product_flash_attention", False),
        ("mkldnn._linear_pointwise", False), ("moe_ep.thin_linear", False),
        ("aten.clone", True), ("aten.copy_", True), ("aten.some_new_op", True), ("InplaceCopyFallback", True),
    ):  # fmt: skip
        expected = [Copy(called, "moe_layer", "buf2")] if copies else []
        assert copies_among([layer, launch(called, "buf2", "buf3")]) == expected, called
    assert copies_among([layer, launch("", "buf5", "buf6", moved=True)]) == []  # beside no op
    assert copies_among([layer, launch("", "buf1", "buf6", moved=True)]) == []  # for somebody else
    assert copies_among([layer, launch("", "arg0_1", "buf1", moved=True)]) == [Copy("clone", "moe_layer", "buf1")]


def test_a_copy_between_two_ops_names_both():
    """Else who leaves out the copies of one op would overlook one that another op reads."""
    router, layer = launch("moe_ep.thin_linear", "buf0", "buf1"), launch("moe_ep.moe_layer", "buf2", "buf3")
    found = copies_among([router, launch("", "buf1", "buf2", moved=True), layer])
    assert {(copy.op, copy.buffer) for copy in found} == {("thin_linear", "buf1"), ("moe_layer", "buf2")}


def loop_of(written: str, read: str | None) -> Scheduled:
    """A scheduled loop that casts ``read``, or one that a template computes."""

    def body(do: Callable) -> None:
        do("store", (written, 0, do("to_dtype", (do("load", (read, 0), {}), torch.bfloat16), {})), {})

    outputs = (Buffer(written, None, frozenset(["OUTPUT"])),)
    reads = frozenset([read] if read else [])
    return Scheduled("loop", f"op of {written}", "", (), outputs, reads, False, body if read else None)


def test_what_ends_a_product_in_its_own_kernel_is_none():
    """Inductor's templates of products: a cast behind one is stored by it."""
    alone = schedule._generated([[loop_of("buf1", "buf0")]], {})
    behind = schedule._generated([[loop_of("buf0", None), loop_of("buf1", "buf0")]], {})
    assert [store.moved_from for store in alone.stores] == [{"buf0"}]
    assert [store.moved_from for store in behind.stores] == [frozenset()] * 2


def test_ops_are_read_from_the_code():
    code = """
        buf3 = torch.ops.moe_ep.rsv_combine.default(buf1, arg1_1, buf0, 8, 'local')
        # %rsv_combine : torch.ops.moe_ep.rsv_combine.default(
        torch.ops.moe_ep.agree.default('local', 'text')
    """
    assert ops_in_code(code) == ["rsv_combine", "agree"]

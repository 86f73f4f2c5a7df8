"""``align_block_size`` on the CPU: literals, then properties, then what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moe_ops  # noqa: F401  registers the ops
from moe_ops.errors import ArgumentError, DtypeError, ShapeError
from moe_ops.shapes import BLOCK_SIZES

align = torch.ops.moe_ep.align_block_size


def count(value: int) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.int32)


def test_literals():
    ids = torch.tensor([[1, 0], [1, 2], [0, -1], [0, 0]])
    sorted_ids, expert_ids, total = align(ids, count(3), 16, 2, 0)
    # pairs 1 and 4 go to expert 0, 0 and 2 to expert 1; 3 is remote, 5 nobody's, row 3 not live
    assert sorted_ids.tolist() == [1, 4] + [8] * 14 + [0, 2] + [8] * 14 + [8] * 16
    assert expert_ids.tolist() == [0, 1, -1]
    assert total.tolist() == [32]
    assert {t.dtype for t in (sorted_ids, expert_ids, total)} == {torch.int32}


def test_an_id_is_compared_before_it_is_narrowed():
    ids = torch.tensor([[2**32, 2**33 + 1, 1]])  # the first two are 0 and 1 in their low 32 bits
    assert align(ids, count(1), 16, 2, 0)[0].tolist()[:2] == [2, 3]


@given(
    rows=st.integers(0, 40), top_k=st.integers(1, 8), local=st.integers(1, 20), start=st.integers(0, 5),
    block=st.sampled_from(BLOCK_SIZES), wide=st.booleans(), data=st.data(),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_properties(rows, top_k, local, start, block, wide, data):
    live, seed = data.draw(st.integers(0, rows)), data.draw(st.integers(0, 2**16))
    make = torch.Generator().manual_seed(seed)
    ids = torch.randint(-1, start + local + 3, (rows, top_k), generator=make)
    ids = ids if wide else ids.int()
    sorted_ids, expert_ids, total = align(ids, count(live), block, local, start)
    sentinel, used = rows * top_k, int(total)
    assert used % block == 0 and sorted_ids.numel() % block == 0
    assert expert_ids.numel() * block == sorted_ids.numel()
    assert (sorted_ids[used:] == sentinel).all() and (expert_ids[used // block :] == -1).all()
    flat = ids.reshape(-1).tolist()
    for expert in range(local):
        wanted = [pair for pair in range(live * top_k) if flat[pair] == start + expert]
        got = sorted_ids.reshape(-1, block)[expert_ids == expert].reshape(-1).tolist()
        assert got == wanted + [sentinel] * (-len(wanted) % block)


@pytest.mark.parametrize(
    ("change", "error", "hint"),
    [
        ({"block_size": 8}, ArgumentError, "pass one of"),
        ({"block_size": 48}, ArgumentError, "pass one of"),
        ({"num_local_experts": 0}, ArgumentError, "1 to 1024"),
        ({"num_local_experts": 1025}, ArgumentError, "1 to 1024"),
        ({"local_expert_start": -1}, ArgumentError, "at least 0"),
        ({"topk_ids": torch.zeros(4, 2)}, DtypeError, "int32"),
        ({"topk_ids": torch.zeros(4, dtype=torch.int32)}, ShapeError, r"\(M, K\)"),
        ({"topk_ids": torch.zeros(1, dtype=torch.int32).expand(2**20, 2**11)}, ShapeError, "split the batch"),
        ({"valid_tokens": torch.zeros(2, dtype=torch.int32)}, ShapeError, "one int32"),
        ({"valid_tokens": torch.zeros(1, dtype=torch.int64)}, DtypeError, "int32"),
    ],
)
def test_refuses(change, error, hint):
    arguments = {
        "topk_ids": torch.zeros(4, 2, dtype=torch.int32), "valid_tokens": count(4), "block_size": 16,
        "num_local_experts": 2, "local_expert_start": 0,
    }  # fmt: skip
    with pytest.raises(error, match=hint):
        align(**arguments | change)


@pytest.mark.parametrize(("experts", "block"), [(1024, 256), (3, 16)])
def test_positions_fit_into_int32(experts, block):
    """Of the pairs that fit into int32 the last ones need positions that do not."""
    most = 2**31 - block - experts * (block - 1)  # positions are a multiple of the block
    with torch.device("meta"):
        live = torch.empty(1, dtype=torch.int32)
        sorted_ids, expert_ids, total = align(torch.empty(most, 1, dtype=torch.int32), live, block, experts, 0)
        with pytest.raises(ShapeError, match=r"positions.*split the batch"):
            align(torch.empty(most + 1, 1, dtype=torch.int32), live, block, experts, 0)
    assert sorted_ids.numel() == 2**31 - block
    assert expert_ids.numel() == sorted_ids.numel() // block and total.numel() == 1


def test_opcheck():
    ids = torch.tensor([[1, 0], [1, 2], [0, -1]], dtype=torch.int32)
    torch.library.opcheck(align.default, (ids, count(3), 16, 2, 0))

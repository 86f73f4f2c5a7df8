"""``agv_dispatch_into`` and ``rsv_combine_from`` in the emulator: the oracle's bits, in turns and in any order."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_ops import reference
from moe_ops.buffers import SymmetricTensors
from moe_ops.combine_add import Epilogue, apply_epilogue
from moe_ops.combine_from import NO_EPILOGUE, Routing, launch_combine_from
from moe_ops.dispatch_into import launch_dispatch_into
from moe_ops.emulator import Rank, run_ranks
from moe_ops.errors import SymmetricMemoryError
from moe_ops.symmetric import read_record
from tests.moe_ops.emulated import STEPS, Shape, close_channel, generate, local_count, open_channel

VARIANTS = pytest.mark.parametrize("multicast", [False, True], ids=["p2p", "multicast"])
WORLDS = (1, 2, 3, 4, 5, 8)


class Ground:
    """One rank's channel and buffers, and what each op must give. ``alone``: with the barriers that make it safe."""

    def __init__(self, rank: Rank, shape: Shape, epoch: int = 0):
        self.rank, self.channel = rank, open_channel(rank, shape.layout, epoch=epoch)
        self.buffers = SymmetricTensors(shape.layout, rank.buffer)
        self.batch = self.buffers.layer_batch(shape.max_tokens, shape.ids, shape.weights)
        self.output = self.buffers.layer_output(shape.max_tokens)
        for segment in self.buffers.segments:
            segment.buffer.local.fill_(0xFF)
        rank.meet()

    def dispatch(self, shape: Shape, alone: bool, out: reference.Batch | None = None) -> None:
        """The gathered batch is the oracle's where rows are specified."""
        out = out or self.batch
        batches, metadata = shape.batches(), reference.metadata(shape.counts)[self.rank.rank]
        live = launch_dispatch_into(
            self.channel, self.buffers, batches[self.rank.rank], local_count(shape, self.rank), metadata, out,
            entry_barrier=alone,
        )  # fmt: skip
        want = reference.agv_dispatch(batches, shape.counts, out.hidden.shape[0])
        valid = sum(shape.counts)
        assert live.tolist() == [valid]
        for name, mine, expected in zip(out._fields, out, want, strict=True):
            assert torch.equal(mine[:valid], expected[:valid]), (name, mine[:valid], expected[:valid])
        assert torch.equal(out.topk_ids[valid:], want.topk_ids[valid:])

    def combine(self, shape: Shape, alone: bool, epilogue: Epilogue = NO_EPILOGUE) -> Tensor:
        """This rank's output goes into its buffer; the sum is the oracle's."""
        outputs, me = [out[: self.output.shape[0]] for out in shape.outputs()], self.rank.rank
        self.output.copy_(outputs[me])
        rows = [shape.rows_on(r) for r in range(shape.world)]
        got = launch_combine_from(
            self.channel, self.buffers, self.output, local_count(shape, self.rank),
            reference.metadata(shape.counts)[me], rows[me], epilogue, shape.out_dtype, exit_barrier=alone,
        )  # fmt: skip
        wire = shape.dtype if self.rank.multicast else shape.out_dtype
        want = reference.rsv_combine(outputs, shape.counts, rows, wire)[me].to(shape.out_dtype)
        want = apply_epilogue(want, epilogue)
        assert torch.equal(got, want), (got, want)
        return got

    def close(self) -> None:
        assert read_record(self.channel.record) is None
        self.rank.meet()
        self.buffers.release()
        close_channel(self.rank, self.channel)


def in_turns(rank: Rank, shapes: list[Shape], alone: bool) -> int:
    """Dispatch, then combine, again and again; the buffers are the same, with other data each time."""
    for shape in shapes:
        ground = Ground(rank, shape)
        for turn in range(3):
            again = replace(shape, seed=shape.seed + 7 * turn)
            ground.dispatch(again, alone)
            ground.combine(again, alone)
        meetings = 12 if alone else 6
        assert ground.channel.state.tolist() == [0] + [meetings] * (len(ground.channel.state) - 1)
        ground.close()
    return len(shapes)


@VARIANTS
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "elided"])
@pytest.mark.parametrize("world", WORLDS)
def test_in_turns(world: int, alone: bool, multicast: bool):
    rows = 2
    some = tuple((3 * rank + 1) % (rows + 1) for rank in range(world))
    shapes = [
        Shape(some, rows=rows, hidden_size=37, ids=torch.int32, weights=torch.bfloat16),
        Shape((rows,) * world, rows=rows, hidden_size=264, top_k=8, dtype=torch.float16, out_dtype=torch.float32),
    ]
    run_ranks(world, in_turns, shapes, alone, multicast=multicast)


CASES = {1: 40, 2: 60, 3: 60, 4: 40, 5: 16, 8: 10}


@VARIANTS
@pytest.mark.parametrize("world", CASES)
def test_generated_cases(world: int, multicast: bool):
    """Random sizes, dtypes, strides and counts, three turns each."""
    shapes = [generate(world, 5000 + seed) for seed in range(multicast, CASES[world], 2)]
    assert run_ranks(world, in_turns, shapes, False, multicast=multicast, timeout_s=280) == [len(shapes)] * world


def any_order(rank: Rank, shape: Shape, steps: str) -> None:
    """d, c: the forms that are safe alone; D, C, M: the ops with slots of their own, between them."""
    ground, letters = Ground(rank, shape), {"D": "dispatch", "C": "combine", "M": "metadata"}
    for number, step in enumerate(steps):
        again = replace(shape, seed=number)
        if step in letters:
            STEPS[letters[step]](rank, again, ground.channel)
        else:
            {"d": ground.dispatch, "c": ground.combine}[step](again, True)
    ground.close()


@VARIANTS
@pytest.mark.parametrize("steps", ["dddccc", "ccdd", "dDcCM" * 2, "DdMdCcCc"])
def test_alone_in_any_order(steps: str, multicast: bool):
    run_ranks(3, any_order, Shape((2, 0, 1), rows=2, hidden_size=16), steps, multicast=multicast)


def with_epilogue(rank: Rank, shape: Shape, round_each: bool) -> None:
    ground = Ground(rank, shape)
    generator = torch.Generator().manual_seed(rank.rank)
    addends = [torch.randn(shape.rows, shape.hidden_size, generator=generator).to(shape.out_dtype) for _ in range(2)]
    ground.combine(shape, True, Epilogue(addends, 0.3, round_each))
    ground.close()


@VARIANTS
@pytest.mark.parametrize("round_each", [True, False])
def test_epilogue(round_each: bool, multicast: bool):
    run_ranks(2, with_epilogue, Shape((2, 3), hidden_size=36), round_each, multicast=multicast)


def own_buffers(rank: Rank, shape: Shape) -> list[str]:
    """Three tensors of separate allocations; leading rows of larger ones; then what is refused."""
    ground = Ground(rank, shape)
    rows = shape.max_tokens + 5
    sizes = ((shape.hidden_size, shape.dtype), (shape.top_k, shape.ids), (shape.top_k, shape.weights))
    whole = reference.Batch(*(ground.buffers.empty(rows, columns, dtype) for columns, dtype in sizes))
    ground.dispatch(shape, True, reference.Batch(*(tensor[: shape.max_tokens] for tensor in whole)))
    ground.dispatch(shape, True, reference.Batch(*(tensor[2:] for tensor in whole)))
    refused = []
    plain = torch.empty(rows, shape.hidden_size, dtype=shape.dtype)
    for bad in (plain, whole.hidden[:, 1:], whole.hidden[::2]):
        try:
            ground.buffers.find("op", "it", bad)
        except SymmetricMemoryError as error:
            refused.append(str(error))
    ground.close()
    return refused


@VARIANTS
def test_buffers_of_the_caller(multicast: bool):
    for refused in run_ranks(2, own_buffers, Shape((2, 3), hidden_size=20), multicast=multicast):
        assert "is no symmetric memory of this group" in refused[0] and "pass a tensor of workspace.empty" in refused[0]
        assert all("has strides" in text for text in refused[1:]) and len(refused) == 3


def routed(rank: Rank, shape: Shape, experts_per_rank: int) -> int:
    """Rows travel to and from ranks with an expert for them only; returns how many hidden rows did not come."""
    ground, me = Ground(rank, shape), rank.rank
    batches, metadata = shape.batches(), reference.metadata(shape.counts)[me]
    count, valid = local_count(shape, rank), sum(shape.counts)
    want = reference.agv_dispatch(batches, shape.counts, shape.max_tokens)
    mine = reference.Batch(*batches[me])
    launch_dispatch_into(
        ground.channel, ground.buffers, mine, count, metadata, ground.batch, entry_barrier=False,
        experts_per_rank=experts_per_rank,
    )  # fmt: skip
    ids = want.topk_ids[:valid]
    here = [((ids >= 0) & (ids // experts_per_rank == r)).any(1) for r in range(rank.world_size)]
    assert torch.equal(ground.batch.topk_ids, want.topk_ids)
    assert torch.equal(ground.batch.topk_weights[:valid], want.topk_weights[:valid])
    expected = torch.where(here[me][:, None], want.hidden[:valid], torch.nan)  # bytes 0xFF are NaN: never written
    assert torch.equal(ground.batch.hidden[:valid].nan_to_num(7e3), expected.nan_to_num(7e3))

    outputs = [output.clone() for output in shape.outputs()]
    for r, output in enumerate(outputs):
        output[:valid][~here[r]] = 0
    ground.output.copy_(outputs[me])
    ground.output[:valid][~here[me]] = torch.nan  # not read
    got = launch_combine_from(
        ground.channel, ground.buffers, ground.output, count, metadata, shape.rows, exit_barrier=False,
        routing=Routing(mine.topk_ids, experts_per_rank),
    )  # fmt: skip
    assert torch.equal(got, reference.rsv_combine(outputs, shape.counts, [shape.rows] * shape.world)[me])
    ground.close()
    return int((~here[me]).sum())


@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_rows_travel_where_their_experts_are(world: int):
    counts = tuple((rank * 3 + 1) % 5 for rank in range(world))
    for shape in (
        Shape(counts, hidden_size=264, top_k=1, ids=torch.int32),
        Shape(counts, hidden_size=40, top_k=3, strided=True, seed=3),
    ):
        assert sum(run_ranks(world, routed, shape, -(-300 // world))) > 0


def misses_a_meeting(rank: Rank, shape: Shape, step: str, first: bool) -> tuple:
    """The last rank misses both of the op's two meetings (``first``), or comes to one and goes."""
    ground = Ground(rank, shape)
    ground.channel.timeout_ns = 2_000_000_000  # as in test_barrier: a good meeting must fit
    op = ground.dispatch if step == "d" else ground.combine
    if rank.rank < 2 or not first:
        try:
            op(shape, rank.rank < 2)
        except AssertionError:
            assert rank.rank == 2 or read_record(ground.channel.record) is not None
    rank.meet()
    failure = read_record(ground.channel.record)
    return (failure.kind, failure.ranks) if failure else ()


@VARIANTS
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("step", ["d", "c"])
def test_a_rank_that_stays_away_is_named(step: str, first: bool, multicast: bool):
    shape = Shape((2, 1, 2), rows=2, hidden_size=16)
    results = run_ranks(3, misses_a_meeting, shape, step, first, multicast=multicast)
    assert results[:2] == [("timeout", [2])] * 2

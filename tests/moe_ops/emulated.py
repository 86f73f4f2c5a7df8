"""Cases that the tests of the communication kernels share, and the functions that each rank runs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_ops import reference
from moe_ops.combine import launch_combine
from moe_ops.dispatch import launch_dispatch
from moe_ops.emulator import Rank
from moe_ops.metadata import launch_metadata
from moe_ops.symmetric import Channel, Layout

WORLDS = (1, 2, 3, 4, 8)


@dataclass(frozen=True)
class Shape:
    """Sizes and dtypes of one case; ``counts``: live rows of every rank.

    ``rows``: T of every rank, unless ``rows_of_rank`` says otherwise; ``capacity``: max_tokens_per_rank (0: rows);
    ``spare``: M - W * T.
    """

    counts: tuple[int, ...]
    hidden_size: int = 40
    top_k: int = 3
    rows: int = 4
    capacity: int = 0
    dtype: torch.dtype = torch.bfloat16
    ids: torch.dtype = torch.int64
    weights: torch.dtype = torch.float32
    out_dtype: torch.dtype = torch.bfloat16
    strided: bool = False
    spare: int = 0
    seed: int = 0
    rows_of_rank: tuple[int, ...] = field(default=())

    @property
    def world(self) -> int:
        return len(self.counts)

    @property
    def max_tokens(self) -> int:
        return self.world * self.rows + self.spare

    @property
    def layout(self) -> Layout:
        return Layout(self.world, self.capacity or self.rows, self.hidden_size, self.top_k, self.dtype)

    def rows_on(self, rank: int) -> int:
        return self.rows_of_rank[rank] if self.rows_of_rank else self.rows

    def batches(self) -> list[reference.Batch]:
        """Every rank's input, the same on all ranks; rows that are not live are NaN and wild ids."""
        return [self._batch(rank, count) for rank, count in enumerate(self.counts)]

    def outputs(self) -> list[Tensor]:
        """Every rank's expert output (M, H); rows past the live ones are NaN."""
        outputs = []
        for rank in range(self.world):
            generator = torch.Generator().manual_seed(1000 * self.seed + 500 + rank)
            output = torch.randn(self.max_tokens, self.hidden_size, generator=generator) * 2.0 ** (rank % 5)
            output[sum(self.counts) :] = torch.nan
            outputs.append(self._place(output.to(self.dtype)))
        return outputs

    def _batch(self, rank: int, count: int) -> reference.Batch:
        generator = torch.Generator().manual_seed(1000 * self.seed + rank)
        rows = self.rows_on(rank)
        hidden = torch.randn(rows, self.hidden_size, generator=generator)
        hidden[count:] = torch.nan
        ids = torch.randint(-1, 300, (rows, self.top_k), generator=generator)
        weights = torch.rand(rows, self.top_k, generator=generator)
        return reference.Batch(
            self._place(hidden.to(self.dtype)), self._place(ids.to(self.ids)), self._place(weights.to(self.weights))
        )

    def _place(self, tensor: Tensor) -> Tensor:
        """The same values, where asked for with strides that no chunk fits."""
        if not self.strided:
            return tensor
        wide = torch.empty(tensor.shape[1] + 1, tensor.shape[0] + 2, dtype=tensor.dtype)
        view = wide[1:, :-2].T
        view.copy_(tensor)
        return view


def local_count(shape: Shape, rank: Rank) -> Tensor:
    return torch.tensor([shape.counts[rank.rank]], dtype=torch.int32)


def run_metadata(rank: Rank, shape: Shape, channel: Channel) -> Tensor:
    """``metadata_update``, compared with the oracle."""
    got = launch_metadata(channel, local_count(shape, rank))
    assert torch.equal(got, reference.metadata(shape.counts)[rank.rank]), got
    return got


def run_dispatch(rank: Rank, shape: Shape, channel: Channel) -> reference.Batch:
    """``agv_dispatch`` of the oracle's metadata; compared bit for bit where rows are specified."""
    metadata = reference.metadata(shape.counts)[rank.rank]
    batches = shape.batches()
    got = reference.Batch(
        *launch_dispatch(channel, *batches[rank.rank], local_count(shape, rank), metadata, shape.max_tokens)
    )
    want = reference.agv_dispatch(batches, shape.counts, shape.max_tokens)
    valid = sum(shape.counts)
    for name, mine, expected in zip(got._fields, got, want, strict=True):
        assert mine.dtype == expected.dtype and mine.shape == expected.shape, name
        assert torch.equal(mine[:valid], expected[:valid]), (name, mine[:valid], expected[:valid])
    assert torch.equal(got.topk_ids[valid:], want.topk_ids[valid:])
    return got


def run_combine(rank: Rank, shape: Shape, channel: Channel) -> Tensor:
    """``rsv_combine``: bit-equal to the oracle over peer pointers; over multicast rounded on the way."""
    metadata = reference.metadata(shape.counts)[rank.rank]
    outputs = shape.outputs()
    rows = [shape.rows_on(r) for r in range(shape.world)]
    got = launch_combine(
        channel, outputs[rank.rank], local_count(shape, rank), metadata, rows[rank.rank], shape.out_dtype
    )
    if rank.multicast:  # the switch hands out sums in the wire's dtype
        wired = reference.rsv_combine(outputs, shape.counts, rows, shape.dtype)[rank.rank]
        want = wired.to(shape.out_dtype)
    else:
        want = reference.rsv_combine(outputs, shape.counts, rows, shape.out_dtype)[rank.rank]
    assert got.dtype == shape.out_dtype
    assert torch.equal(got, want), (got, want)
    return got


STEPS = {"metadata": run_metadata, "dispatch": run_dispatch, "combine": run_combine}


def open_channel(rank: Rank, layout: Layout, **options: Any) -> Channel:
    """A fresh channel whose data regions hold NaN, so that a row read before it was written shows."""
    channel = rank.channel(layout, **options)
    channel.buffer.local[layout.signal_bytes :] = 0xFF
    rank.meet()
    return channel


def close_channel(rank: Rank, channel: Channel) -> None:
    rank.meet()
    channel.close()


def check_shapes(rank: Rank, shapes: list[Shape], steps: tuple[str, ...], epoch: int = 0) -> int:
    """Every step on every shape, each on a fresh channel. Returns the number of comparisons."""
    for shape in shapes:
        channel = open_channel(rank, shape.layout, epoch=epoch)
        for step in steps:
            STEPS[step](rank, shape, channel)
        assert channel.record.tolist() == [0, 0, 0, 0]
        assert channel.state.tolist() == [0] + [epoch + len(steps)] * (len(channel.state) - 1)
        close_channel(rank, channel)
    return len(shapes) * len(steps)


def generate(world: int, seed: int) -> Shape:
    """A random case: ragged and aligned sizes, all dtypes, no rows, all on one rank, full ranks."""
    rng = random.Random(f"{world}/{seed}")
    rows = rng.randint(1, 3)
    kind = rng.choice(("any", "any", "full", "none", "one"))
    owner = rng.randrange(world)
    counts = {
        "any": [rng.randint(0, rows) for _ in range(world)],
        "full": [rows] * world,
        "none": [0] * world,
        "one": [rows if rank == owner else 0 for rank in range(world)],
    }[kind]
    return Shape(
        counts=tuple(counts),
        hidden_size=rng.choice((1, 7, 8, 16, 40, rng.randint(2, 300))),
        top_k=rng.choice((1, 2, 4, 8, rng.randint(1, 9))),
        rows=rows,
        capacity=rows + rng.choice((0, 0, 1, 5)),
        dtype=rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
        ids=rng.choice((torch.int32, torch.int64)),
        weights=rng.choice((torch.float32, torch.bfloat16, torch.float16)),
        out_dtype=rng.choice((torch.bfloat16, torch.bfloat16, torch.float16, torch.float32)),
        strided=rng.random() < 0.25,
        spare=rng.choice((0, 0, 3)),
        seed=seed,
    )

"""The kernel of ``rotate_and_attend`` against plain torch; in Triton's interpreter or on a GPU."""

from __future__ import annotations

import pytest
import torch

from graphs.attention import reference
from graphs.attention_launch import launch_with_new_token
from graphs.rotated_attention import NewToken, prepared
from tests.tolerances import relative_error

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter's bf16 products are slow; in bf16 weights, query and result are rounded once each
DTYPE, WITHIN = (torch.bfloat16, 1e-2) if torch.cuda.is_available() else (torch.float32, 4e-6)
SIZES = [  # batch, heads, key heads, length, depth, depth of values, columns that turn
    (6, 8, 2, 300, 64, 64, 64),
    (6, 3, 3, 129, 48, 32, 16),
    (7, 32, 4, 520, 128, 128, 128),
    (6, 20, 1, 64, 16, 16, 8),
]


def token(
    batch: int, heads: int, kv_heads: int, length: int, depth: int, depth_v: int, turned: int, norms: bool
) -> NewToken:  # fmt: skip
    """A new token at a column of its own in every row; before it a prefix, a window, holes or nothing is seen."""
    generator = torch.Generator(DEVICE).manual_seed(length)

    def random(*size: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
        return torch.randn(*size, generator=generator, device=DEVICE).to(dtype)

    columns = torch.tensor([(0, length - 1, 5, length // 2, 31, 32)[i % 6] for i in range(batch)], device=DEVICE)
    at, column = columns[:, None], torch.arange(length, device=DEVICE)
    seen = column <= at
    seen[1::6] &= column > at[1::6] - 9
    seen[2::6] &= column % 2 == 1
    seen[3::6] &= column < at[3::6]  # not itself
    angles = random(batch, turned, dtype=torch.float32)
    keys, values = random(batch, kv_heads, length, depth), random(batch, kv_heads, length, depth_v)
    unseen = (~seen)[:, None, :, None]
    keys, values = keys.masked_fill(unseen, float("nan")), values.masked_fill(unseen, float("nan"))
    weights = (random(depth), random(depth)) if norms else (None, None)
    return NewToken(
        random(batch, heads, depth), random(batch, kv_heads, depth), random(batch, kv_heads, depth_v), *weights, 1e-6,
        1e-3, angles.cos(), angles.sin(), keys, values, columns, seen[:, None, None], depth**-0.5,
    )  # fmt: skip


def with_own_cache(given: NewToken) -> NewToken:
    return given._replace(keys=given.keys.clone(), values=given.values.clone())


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("chosen", [{}, {"span": 128}, {"span": 256, "BLOCK": 16}])
@pytest.mark.parametrize("sizes", SIZES)
def test_kernel_equals_plain_torch(sizes: tuple[int, ...], chosen: dict[str, int], norms: bool):
    given = token(*sizes, norms)
    wanted = with_own_cache(given)
    row, angles = torch.arange(sizes[0], device=DEVICE), (given.cos, given.sin)
    wanted.keys[row, :, given.columns] = prepared(given.key, given.key_norm, given.key_eps, *angles)
    wanted.values[row, :, given.columns] = given.value
    query = prepared(given.query, given.query_norm, given.query_eps, *angles)
    answer = reference(query, wanted.keys.nan_to_num(0.0), wanted.values, given.mask[:, 0, 0], given.scale)
    got = launch_with_new_token(given, **chosen)
    assert relative_error(got, answer) < WITHIN
    for ours, theirs in ((given.keys, wanted.keys), (given.values, wanted.values)):
        written = torch.zeros_like(ours, dtype=torch.bool)
        written[row, :, given.columns] = True
        assert torch.equal(ours[~written].nan_to_num(7.0), theirs[~written].nan_to_num(7.0)), "other columns stay"
        assert relative_error(ours[written], theirs[written]) < WITHIN
    assert torch.equal(given.values[row, :, given.columns], given.value)


def test_a_row_does_not_depend_on_the_others():
    given = token(*SIZES[0], True)
    batch = launch_with_new_token(with_own_cache(given))
    for i in (0, 2, 5):
        tensors = ("query", "key", "value", "cos", "sin", "keys", "values", "columns", "mask")
        alone = given._replace(**{name: getattr(given, name)[i : i + 1].clone() for name in tensors})
        assert torch.equal(launch_with_new_token(alone)[0], batch[i])


def test_worked_example_of_the_kernel():
    """Row 1 2 3 4 with its first two columns turned by a right angle: -2 1 3 4 is what the cache gets."""
    one = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]], device=DEVICE, dtype=DTYPE)
    angle, cache = torch.ones(1, 2, device=DEVICE), torch.zeros(1, 1, 8, 4, device=DEVICE, dtype=DTYPE)
    column, mask = torch.tensor([3], device=DEVICE), torch.ones(1, 1, 1, 8, dtype=torch.bool, device=DEVICE)
    given = NewToken(one, one, one, None, None, 0.0, 0.0, angle * 0, angle, cache, cache.clone(), column, mask, 1.0)
    launch_with_new_token(given)
    assert given.keys[0, 0, 3].tolist() == [-2.0, 1.0, 3.0, 4.0] and given.keys.count_nonzero() == 4
    assert given.values[0, 0, 3].tolist() == [1.0, 2.0, 3.0, 4.0] and given.values.count_nonzero() == 4


def test_worked_example_of_the_softmax():
    """A query of zeros sees the new token's column and the one before it alike."""
    one, zeros = (torch.tensor([[[3.0, 4.0]]], device=DEVICE, dtype=DTYPE) * factor for factor in (1, 0))
    values = torch.tensor([[[[1.0, 5.0], [9.0, 9.0]]]], device=DEVICE, dtype=DTYPE)
    keys, angle = torch.zeros_like(values), torch.ones(1, 2, device=DEVICE)
    column, mask = torch.tensor([1], device=DEVICE), torch.ones(1, 1, 1, 2, dtype=torch.bool, device=DEVICE)
    given = NewToken(zeros, one, one, None, None, 0.0, 0.0, angle * 0, angle, keys, values, column, mask, 1.0)
    assert launch_with_new_token(given).tolist() == [[[2.0, 4.5]]]
    assert keys[0, 0].tolist() == [[0.0, 0.0], [-4.0, 3.0]] and values[0, 0].tolist() == [[1.0, 5.0], [3.0, 4.0]]

"""The sampler: distribution, cuts, and draws that depend on seed and position alone."""

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from graphs.sampling import PARTS, Choice, exponential, greedy, sample, threshold

VOCABULARY = 40


def choice(rows: int, **values: float) -> Choice:
    """The same wishes for every row, positions 0, 1, ..."""
    whole = {"positions": torch.arange(rows), "top_k": torch.zeros(rows, dtype=torch.int64)}
    asked = {"temperature": 1.0, "top_p": 1.0, "seed": 5, **values}
    filled = {name: torch.full((rows,), value) for name, value in asked.items()}
    return Choice(**{**whole, **filled})


def logits_of(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(seed)).mul(2).expand(rows, -1)


def test_draws_follow_the_softmax():
    rows = 40000
    logits = logits_of(rows)
    drawn = sample(logits, choice(rows, temperature=1.5)).bincount(minlength=VOCABULARY)
    expected = (logits[0] / 1.5).softmax(0) * rows
    chi_square = ((drawn - expected) ** 2 / expected).sum()
    assert chi_square < 75  # 39 degrees of freedom: above 75 once in 2000 seeds


def test_cuts_are_those_of_transformers():
    rows = 4000
    logits = logits_of(rows)
    for top_k, top_p in ((5, 1.0), (0, 0.7), (8, 0.8), (1, 0.2), (0, 1e-6), (100, 0.99)):
        kept = logits[:1] / 0.7
        for warper in ([TopKLogitsWarper(top_k)] if top_k else []) + [TopPLogitsWarper(top_p)]:
            kept = warper(torch.zeros(1, 1), kept)
        allowed = set((kept[0] > float("-inf")).nonzero().flatten().tolist())
        drawn = set(sample(logits, choice(rows, temperature=0.7, top_k=top_k, top_p=top_p)).tolist())
        assert drawn <= allowed and len(drawn) > 0.5 * len(allowed), (top_k, top_p)
        one, scaled = choice(1, top_k=top_k, top_p=top_p), logits[:1] / 0.7
        assert int((scaled >= threshold(scaled, one.top_k, one.top_p)).sum()) == len(allowed)


def test_a_draw_depends_on_seed_and_position_alone():
    logits = logits_of(6, seed=3)
    asked = choice(6)._replace(positions=torch.tensor([7, 8, 7, 7, 9, 8]), seed=torch.tensor([1, 1, 1, 2, 2**40, 1]))
    noise = exponential(asked.seed, asked.positions, VOCABULARY)
    assert torch.equal(noise[0], noise[2]) and torch.equal(noise[1], noise[5])
    different = {tuple(row.tolist()) for row in noise}
    assert len(different) == 4 and bool((noise > 0).all()) and bool(noise.isfinite().all())
    alone = sample(logits[1:2], Choice(*(value[1:2] for value in asked)))
    assert int(alone[0]) == int(sample(logits, asked)[1])


@pytest.mark.parametrize("size", [PARTS * 5, 1000], ids=["looked through in parts", "in one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_takes_the_lowest_of_the_likeliest(size: int, dtype: torch.dtype):
    logits = torch.randn(5, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[1], logits[2, [3, 4, size - 1]], logits[3, size - 1], logits[4, 7] = 1.0, 9.0, 9.0, torch.nan
    chosen = greedy(logits, choice(5))
    assert torch.equal(chosen, logits.argmax(dim=-1))
    assert chosen[1:].tolist() == [0, 3, size - 1, 7]


def test_temperature_zero_is_greedy_beside_rows_that_draw():
    logits = logits_of(64)
    asked = choice(64)._replace(temperature=(torch.arange(64) % 2).float())
    drawn = sample(logits, asked)
    assert set(drawn[::2].tolist()) == {int(logits[0].argmax())} and len(set(drawn[1::2].tolist())) > 3


def test_compiled_noise_is_the_same():
    asked = choice(8, seed=-7)
    noise = torch.compile(exponential, fullgraph=True)(asked.seed, asked.positions, VOCABULARY)
    torch.testing.assert_close(noise, exponential(asked.seed, asked.positions, VOCABULARY), rtol=1e-5, atol=0)

"""Requests that come and go: every answer is that of the request alone, from one graph."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphs
from graphs.attention import use_decode_attention
from graphs.errors import RequestError, UnsupportedModelError
from graphs.sampling import Choice
from lowering.torch_compat import compile_counts
from tests.graphs.model_cases import GraphKeeper, plain_answers, plain_model, prompts_of
from tests.graphs.serve_cases import LONGEST, SERVED, arrivals, served_model


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", SERVED)
def test_every_answer_is_that_of_the_request_alone_from_one_graph(family: str):
    keeper, before = GraphKeeper(), compile_counts()
    options: dict[str, Any] = {"max_len": LONGEST, "sampler": graphs.sample, "backend": keeper}
    loop = graphs.DecodeLoop(served_model(family), batch=3, look_every=5, **options)
    answers = list(loop.serve(arrivals(random.Random(1), 8)))
    assert len(answers) == 8
    for answer in answers:
        (alone,) = loop.serve([answer.request])
        assert (alone.tokens, alone.reason) == (answer.tokens, answer.reason)
    after = compile_counts()
    assert (after.graphs - before.graphs, after.graph_breaks - before.graph_breaks) == (1, 0)
    assert keeper.integer_inputs() == keeper.unbacked() == []


@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss"])
def test_greedy_answers_are_those_of_plain_hugging_face(family: str):
    plain = served_model(family)
    plain.set_experts_implementation("eager")
    prompts = prompts_of((3, 40, 1, 9, 33, 2))
    expected = plain_answers(plain, prompts, 12)
    options: dict[str, Any] = {"backend": "eager", "compile_prefill": True}
    if family == "glm4_moe":
        assert use_decode_attention(plain)  # what GPUs use
        options = {"compile": False}
    loop = graphs.DecodeLoop(plain, batch=2, max_len=52, look_every=3, **options)
    assert loop.generate(prompts, 12) == expected


def test_stop_tokens_end_an_answer_and_free_the_slot():
    loop = graphs.DecodeLoop(served_model("mixtral"), batch=1, max_len=40, look_every=4, compile=False)
    (whole,) = loop.generate([[3, 1, 4]], 20)
    stop = whole[6]
    ended = whole[: whole.index(stop) + 1]
    requests = [graphs.Request([3, 1, 4], 20, stop_ids=(511, stop)), graphs.Request([3, 1, 4], 5)]
    assert [(answer.tokens, answer.reason) for answer in loop.serve(requests)] == [
        (ended, "stop"),
        (whole[:5], "length"),
    ]


def test_recurrent_layers_are_fed_through_the_step():
    from transformers import AutoModelForCausalLM, Lfm2MoeConfig

    torch.manual_seed(0)
    config = Lfm2MoeConfig(
        vocab_size=512, hidden_size=64, num_hidden_layers=3, num_dense_layers=1, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
        layer_types=["conv", "full_attention", "conv"], initializer_range=0.12,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.set_experts_implementation("eager")
    prompts = prompts_of((3, 9, 1, 5))
    expected = plain_answers(model, prompts, 8)
    loop = graphs.DecodeLoop(model, batch=2, max_len=20, look_every=3, compile=False)
    assert loop.generate(prompts, 8) == expected
    loop.prefill(prompts[:2])
    loop.run(7)
    assert loop.tokens() == expected[:2]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_generate_works_on_the_model_of_a_loop(family: str):
    """transformers' own loop: its static cache (with windows), left padding, sampling from its own generator."""
    plain = served_model(family)
    plain.set_experts_implementation("eager")
    ids = torch.tensor([[0, 0, 5, 6, 7], [1, 2, 3, 4, 5]])
    options: dict[str, Any] = {"attention_mask": (ids > 0).long(), "max_new_tokens": 8, "pad_token_id": 0}
    settings = ({}, {"cache_implementation": "static"}, {"cache_implementation": "static", "do_sample": True})

    def answers(model: Any) -> list[Tensor]:
        torch.manual_seed(0)
        return [model.generate(ids, **{"do_sample": False, **options, **setting}) for setting in settings]

    expected = answers(plain)
    model = served_model(family)
    loop = graphs.DecodeLoop(model, batch=2, max_len=16, compile=False)
    assert loop.generate([[5, 6, 7], [1, 2, 3, 4, 5]], 8) == [row[5:].tolist() for row in expected[0]]
    for got, wanted in zip(answers(model), expected, strict=True):
        assert torch.equal(got, wanted)


class Recorder(nn.Module):
    """Greedy choice that keeps the logits of one slot."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, logits: Tensor, choice: Choice) -> Tensor:
        self.seen.append(logits.clone())
        return logits.argmax(-1)


@pytest.mark.parametrize("invariant", [True, False])
def test_no_bit_depends_on_slot_or_neighbours(invariant: bool):
    """Batch-invariant: equal bits. By default: another order of adding, of the size of fp32 roundings."""
    watched, *others = prompts_of((7, 3, 40, 5, 2))
    recorder = Recorder()
    options: dict[str, Any] = {"sampler": recorder, "batch_invariant": invariant, "compile": False}
    loop = graphs.DecodeLoop(served_model("deepseek_v3"), batch=4, max_len=LONGEST, **options)

    def logits_beside(before: list[list[int]], after: list[list[int]]) -> Tensor:
        for prompt in (*before, watched, *after):
            loop.submit(graphs.Request(prompt, 6))
        recorder.seen.clear()
        assert len(loop.run(6)) == len(before) + 1 + len(after)
        return torch.stack([logits[len(before)] for logits in recorder.seen])

    alone = logits_beside([], [])
    for before, after in ((others[:1], []), ([], others[:3]), (others[1:], []), (others[:1], others[2:])):
        beside = logits_beside(before, after)
        if invariant:
            assert torch.equal(beside, alone)
        else:
            torch.testing.assert_close(beside, alone, rtol=0, atol=2e-5)


def test_a_bad_request_among_good_ones():
    loop = graphs.DecodeLoop(served_model("mixtral"), batch=1, max_len=8, compile=False)
    with pytest.raises(RequestError, match="rank 0: submit: an empty prompt"):
        list(loop.serve([graphs.Request([1, 2], 2), graphs.Request([])]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_ids": []}, "an empty prompt"),
        ({"prompt_ids": [1] * 8}, "a prompt of 8 tokens leaves no room in max_len=8"),
        ({"prompt_ids": [1, 512]}, "token 512 is outside the vocabulary of 512"),
        ({"stop_ids": [-1]}, "token -1 is outside the vocabulary"),
        ({"max_new_tokens": 0}, "max_new_tokens=0; pass at least 1"),
        ({"max_new_tokens": 7}, "2 prompt tokens and max_new_tokens=7 exceed max_len=8"),
        ({"temperature": -1.0}, "temperature=-1.0; pass 0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": 0.5}, "only chooses greedily; make it with .*sampler=graphs.sample"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"stop_ids": range(9)}, "9 stop tokens; a request may have 8"),
        ({"seed": 2**63}, "does not fit into 64 bits"),
    ],
)
def test_requests_that_do_not_fit(options: dict[str, Any], message: str):
    loop = graphs.DecodeLoop(served_model("mixtral"), batch=1, max_len=8, compile=False)
    with pytest.raises(RequestError, match=f"submit: .*{message}"):
        loop.submit(graphs.Request(**{"prompt_ids": [1, 2], **options}))


def test_attention_without_a_mask_per_row_is_refused():
    model = plain_model("mixtral")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match="'flex_attention'; load the model with attn_implementation='sdpa'"):
        graphs.DecodeLoop(model, batch=1, max_len=8)

"""The decode loop in one process: tokens, one graph, live counts, and what it refuses."""

import pytest
import torch

import graphs
from graphs.checkpoints import tiny_model
from graphs.errors import RequestError
from lowering.torch_compat import compile_counts
from tests.graphs.model_cases import FAMILIES, GraphKeeper, plain_answers, plain_model, prompts_of


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_plain_hugging_face_from_one_graph(family: str):
    model = plain_model(family)
    prompts = prompts_of((3, 9, 5))
    expected = plain_answers(model, prompts, 16)
    keeper, before = GraphKeeper(), compile_counts()
    loop = graphs.DecodeLoop(model, batch=4, max_len=9 + 16, backend=keeper)
    loop.prefill(prompts)
    loop.run(15)
    assert loop.tokens() == expected
    after = compile_counts()
    assert (after.graphs - before.graphs, after.graph_breaks - before.graph_breaks) == (1, 0)
    assert keeper.integer_inputs() == keeper.unbacked() == []
    assert keeper.calls("fused_moe") == 2


def test_inductor_gives_the_same_tokens_and_live_counts_change_without_recompiling():
    model = plain_model("qwen3_moe")
    prompts = prompts_of((4, 2, 6, 3))
    expected = plain_answers(model, prompts, 22)
    loop = graphs.DecodeLoop(model, batch=4, max_len=6 + 22)
    loop.prefill(prompts)
    loop.run(1)
    before, steps = compile_counts(), 2
    for live in (4, 3, 3, 2, 1):  # slots leave from the end; those before them must not notice
        loop.set_live(live)
        loop.run(4)
        steps += 4
        assert loop.tokens()[:live] == [answer[:steps] for answer in expected[:live]]
    assert compile_counts().graphs == before.graphs


def test_second_prefill_starts_over_on_the_same_graph():
    model = plain_model("mixtral")
    loop = graphs.DecodeLoop(model, batch=3, max_len=20, backend="aot_eager")
    answers = []
    for lengths in ((5, 3, 2), (1, 9), (7,)):
        prompts = prompts_of(lengths, seed=sum(lengths))
        loop.prefill(prompts)
        loop.run(6)
        answers.append((loop.tokens(), prompts))
    graphs_so_far = compile_counts().graphs
    model.set_experts_implementation("eager")  # the loop's model, without its compiled step
    for tokens, prompts in answers:
        assert tokens == plain_answers(model, prompts, 7)
    assert compile_counts().graphs == graphs_so_far


def test_uncompiled_step_gives_the_same_tokens():
    model = plain_model("olmoe")
    prompts = prompts_of((2, 3))
    expected = plain_answers(model, prompts, 6)
    loop = graphs.DecodeLoop(model, batch=2, max_len=9, compile=False)
    loop.prefill(prompts)
    steps: list[int] = []
    loop.run(5, on_step=steps.append)
    assert loop.tokens() == expected and steps == [0, 1, 2, 3, 4]


def test_model_forward_outside_the_loop_counts_all_rows():
    model = plain_model("mixtral")
    ids = torch.tensor(prompts_of((7, 7, 7)))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        loop = graphs.DecodeLoop(model, batch=2, max_len=9, compile=False)
        loop.prefill(prompts_of((2,)))
        loop.run(2)
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1]] * 4, "4 prompts for 3 slots"),
        ([[]], "an empty prompt"),
        ([[1] * 8], "a prompt of 8 tokens leaves no room in max_len=8"),
        ([[1, 512]], "token 512 is outside the vocabulary of 512"),
        ([[-1]], "token -1 is outside"),
    ],
)
def test_prompts_that_do_not_fit(prompts, message: str):
    loop = graphs.DecodeLoop(tiny_model(), batch=3, max_len=8, compile=False)
    with pytest.raises(RequestError, match=message):
        loop.prefill(prompts)


def test_other_misuse():
    with pytest.raises(RequestError, match="batch=0"):
        graphs.DecodeLoop(tiny_model(), batch=0, max_len=8)
    loop = graphs.DecodeLoop(tiny_model(), batch=2, max_len=8, compile=False)
    with pytest.raises(RequestError, match="live=3; pass 0 to 2"):
        loop.set_live(3)


def test_a_slot_that_is_full_stops_by_itself():
    loop = graphs.DecodeLoop(plain_model("mixtral"), batch=2, max_len=8, compile=False)
    loop.prefill([[1, 2, 3], [4, 5]])
    assert loop.run(3) == []
    finished = loop.run(20)
    assert [(len(answer.tokens), answer.reason) for answer in finished] == [(5, "length"), (6, "length")]
    assert loop.tokens() == [answer.tokens for answer in finished]

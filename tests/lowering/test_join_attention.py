"""What stands around a decode step's attention joins it."""

import pytest
import torch
from expecttest import assert_expected_inline
from torch import Tensor
from torch._inductor import config as inductor_config

import graphs.attention  # noqa: F401  registers both ops
from lowering import join_attention, torch_compat
from lowering.join_attention import JoinAttention
from tests.lowering.layers import inference_graph, text
from tests.tolerances import relative_error

B, HEADS, KV, LENGTH, DEPTH = 3, 4, 2, 10, 8
PASS = JoinAttention()
IN_PLACE = {"keep_inference_input_mutations": True}  # as Inductor asks for it


def norm(x: Tensor, weight: Tensor | None) -> Tensor:
    """As transformers writes it."""
    if weight is None:
        return x
    y = x.float()
    return weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``x (B, heads, 1, D)``, all of its columns or the first ones."""
    width = cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    half = torch.cat((-turned[..., width // 2 :], turned[..., : width // 2]), dim=-1)
    turned = turned * cos + half * sin
    return turned if width == x.shape[-1] else torch.cat((turned, rest), dim=-1)


def neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Columns 2 c and 2 c + 1 turn together: not what the op does."""
    half = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return x * cos + half * sin


def put(cache: Tensor, column: Tensor, new: Tensor) -> None:
    """Write ``new (B, 1, heads, D)`` at a column of each row."""
    cache[torch.arange(B)[:, None], :, column[:, None]] = new


def put_backwards(cache: Tensor, column: Tensor, new: Tensor) -> None:
    cache[torch.arange(B - 1, -1, -1)[:, None], :, column[:, None]] = new


def put_added(cache: Tensor, column: Tensor, new: Tensor) -> None:
    torch.ops.aten.index_put_(cache, [torch.arange(B)[:, None], None, column[:, None]], new, True)


def attention(q, k, v, wq, wk, angles, keys, values, column, mask, turn=rotate, put=put, apart=0):
    """A layer's attention for one token a row: projections (B, heads * D), cache written in place."""
    cos, sin = (function(angles)[:, None].to(q.dtype)[:, None] for function in (torch.cos, torch.sin))
    query = turn(norm(q.view(B, 1, HEADS, DEPTH), wq).transpose(1, 2), cos, sin)
    key = turn(norm(k.view(B, 1, KV, DEPTH), wk).transpose(1, 2), cos, sin)
    put(keys, column, key.transpose(1, 2))
    put(values, column.roll(apart) if apart else column, v.view(B, 1, KV, DEPTH))
    return torch.ops.moe_ep.decode_attention(query[:, :, 0], keys, values, mask, 0.5).flatten(1)


def arguments(normed: bool = True, width: int = DEPTH, dtype: torch.dtype = torch.bfloat16) -> list:
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(dtype)

    angle = torch.randn(B, width // 2, generator=generator).repeat(1, 2)
    column = torch.tensor([0, 9, 4])
    mask = (torch.arange(LENGTH) <= column[:, None])[:, None, None]
    weights = (random(DEPTH), random(DEPTH)) if normed else (None, None)
    projections = [random(B, heads * DEPTH) for heads in (HEADS, KV, KV)]
    caches = [random(B, KV, LENGTH, DEPTH) for _ in range(2)]
    return [*projections, *weights, angle, *caches, column, mask]


def test_graph():
    module, _ = inference_graph(attention, *arguments(), **IN_PLACE)
    outcome = PASS.run(module.graph)
    assert outcome.done == ["rotate_and_attend_default: decode_attention, index_put, index_put_1"]
    module.graph.lint()
    assert_expected_inline(text(module.graph), """\
cos = cos(in0)
sin = sin(in0)
unsqueeze_5 = unsqueeze(in1, 1)
view_2 = view(in2, [3, 1, 2, 8])
reshape_default = reshape(in3, [3, 4, 8])
reshape_default_1 = reshape(in4, [3, 2, 8])
reshape_default_2 = reshape(view_2, [3, 2, 8])
reshape_default_3 = reshape(cos, [3, 8])
reshape_default_4 = reshape(sin, [3, 8])
reshape_default_5 = reshape(unsqueeze_5, [3])
rotate_and_attend_default = rotate_and_attend(reshape_default, reshape_default_1, reshape_default_2, in5, in6, 1e-06, 1e-06, reshape_default_3, reshape_default_4, in7, in8, reshape_default_5, in9, 0.5)
view_3 = view(rotate_and_attend_default, [3, 32])
return (view_3)""")  # noqa: E501


@pytest.mark.parametrize("width", [DEPTH, DEPTH // 2], ids=["all columns", "half of them"])
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "plain"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_values_compiled(dtype: torch.dtype, normed: bool, width: int):
    results, outcomes = [], []

    def run(graph):
        outcomes.append(PASS.run(graph))

    for graph_pass in (None, run):
        torch._dynamo.reset()
        given = arguments(normed, width, dtype)
        passes = inductor_config.patch(post_grad_custom_pre_pass=graph_pass)
        with torch.no_grad(), passes, torch_compat.without_caches():
            out = torch.compile(attention, fullgraph=True, dynamic=False)(*given)
        results.append((out, *given[6:8]))
    assert len(outcomes[0].done) == 1, outcomes[0].refused
    for got, wanted in zip(*results, strict=True):
        assert relative_error(got, wanted) < (1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda *given: attention(*given, turn=neighbours), "not rotated half by half"),
        (lambda *given: attention(*given[:6], given[6].sin(), *given[7:]), "a cache that is an input of the graph"),
        (lambda *given: attention(*given) + given[6].sum(), "that it alone reads"),
        (lambda *given: attention(*given[:6], given[6], given[6], *given[8:]), "that it alone reads"),
        (lambda *given: attention(*given, apart=1), "keys and values are written at different columns"),
        (lambda *given: attention(*given, put=put_backwards), "a cache that is an input of the graph"),
        (lambda *given: attention(*given, put=put_added), "a cache that is an input of the graph"),
    ],
    ids=[
        "neighbours", "no input", "another reader", "one cache for both", "other columns", "other rows", "added",
    ],
)
def test_refused(function, reason: str):
    module, _ = inference_graph(function, *arguments(), **IN_PLACE)
    outcome = PASS.run(module.graph)
    assert not outcome.done
    assert [reason in refusal.reason for refusal in outcome.refused] == [True], outcome.refused
    module.graph.lint()


def test_a_cache_with_gaps_is_refused():
    given = arguments()
    given[6:8] = [torch.stack([cache, cache], -1)[..., 0] for cache in given[6:8]]
    module, _ = inference_graph(attention, *given, **IN_PLACE)
    outcome = PASS.run(module.graph)
    assert not outcome.done and "a cache that is an input of the graph" in outcome.refused[0].reason


def test_a_mean_that_is_spread_over_columns_is_no_norm(monkeypatch: pytest.MonkeyPatch):
    """As many rows and heads as columns, so that a mean fits without its last dimension. It stays before the op."""

    def uneven(x: Tensor, weight: Tensor) -> Tensor:
        y = x[:, 0].float()
        return (weight * (y * torch.rsqrt(y.pow(2).mean(-1) + 1e-6)).to(x.dtype))[:, None]

    for name, value in {"B": DEPTH, "HEADS": DEPTH, "KV": DEPTH, "norm": uneven}.items():
        monkeypatch.setitem(globals(), name, value)
    given = arguments()
    given[8] = torch.arange(B)
    given[9] = (torch.arange(LENGTH) <= given[8][:, None])[:, None, None]
    module, _ = inference_graph(attention, *given, **IN_PLACE)
    assert len(PASS.run(module.graph).done) == 1 and text(module.graph).count("rsqrt(") == 2


def test_refused_where_the_op_is_not_registered(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(join_attention, "_registered", lambda: False)
    module, _ = inference_graph(attention, *arguments(), **IN_PLACE)
    outcome = PASS.run(module.graph)
    assert [refusal.reason for refusal in outcome.refused] == ["moe_ep::rotate_and_attend is not registered"]


def test_no_decode_attention_is_no_match():
    """torch's own attention, rotated and cached in the same way: nothing to do, and nothing to say."""

    def plain(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, column: Tensor) -> Tensor:
        keys[torch.arange(B)[:, None], :, column[:, None]] = k.view(B, 1, KV, DEPTH)
        query, value = q.view(B, HEADS, 1, DEPTH), v.view(B, KV, 1, DEPTH).repeat(1, 1, LENGTH, 1)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, value, enable_gqa=True)

    given = arguments()
    module, _ = inference_graph(plain, *given[:3], given[6], given[8], **IN_PLACE)
    before = text(module.graph)
    outcome = PASS.run(module.graph)
    assert not outcome.done and not outcome.refused and text(module.graph) == before


def test_different_angles_are_refused():
    def two_angles(q, k, v, wq, wk, angles, keys, values, column, mask):
        cos, sin = (function(angles)[:, None, None].to(q.dtype) for function in (torch.cos, torch.sin))
        query = rotate(q.view(B, 1, HEADS, DEPTH).transpose(1, 2), cos, sin)
        key = rotate(k.view(B, 1, KV, DEPTH).transpose(1, 2), sin, cos)
        row = torch.arange(B)[:, None]
        keys[row, :, column[:, None]] = key.transpose(1, 2)
        values[row, :, column[:, None]] = v.view(B, 1, KV, DEPTH)
        return torch.ops.moe_ep.decode_attention(query[:, :, 0], keys, values, mask, 0.5)

    module, _ = inference_graph(two_angles, *arguments(), **IN_PLACE)
    outcome = PASS.run(module.graph)
    assert [refusal.reason for refusal in outcome.refused] == ["query and key are rotated by different angles"]

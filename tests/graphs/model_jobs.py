"""What is checked of every class of the experts interface; ``test_models.py`` starts two ranks once for all of it.

Both ranks take part in the sharded forwards; then each does, by itself, all other checks of every other class.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import graphs
from graphs import gates, hf_compat
from graphs.sharding import hidden_size
from lowering.torch_compat import compile_counts
from moe_ops import get_workspace
from tests.graphs.model_cases import GraphKeeper
from tests.graphs.static_cache import full_length_cache
from tests.graphs.tiny_models import ExpertsClass, answer, build, experts_classes, own_experts, tokens
from tests.tolerances import MODEL_BF16_OVER_PLAIN

LENGTH, BEFORE, COLUMNS = 9, 6, 12  # tokens, of which these come before decoding; columns of the cache
CAPACITY = 64
CHECKS = ("fp32", "bf16", "experts carry weight", "one graph", "two ranks")

# Where a decode step with a static cache is out of transformers' reach: a whole forward is compiled instead.
WITHOUT_CACHE = {
    "DeepseekV4Experts": "transformers has no static cache for its compressed attention",
    "InklingExperts": "transformers' static cache counts the sliding window of its convolution layers in Python",
    "Inkling2Experts": "transformers' static cache counts the sliding window of its convolution layers in Python",
    "MiniMaxExperts": "takes only a cache of its own, which grows",
    "OpenAIPrivacyFilterExperts": "classifies tokens in both directions: no cache",
    "UnlimitedOcrTextExperts": "its sliding window keeps a reference in the cache, which is counted in Python",
}
# Where the model's own code, outside its experts, reads sizes from the device: no CUDA graph.
DATA_DEPENDENT = {"Glm5NextTextExperts": "its sparse attention selects pooled keys with a boolean mask"}
NO_GRAPH = {"Qwen4ExpTextExperts": "its attention's indexer branches in Python on a count from the device"}


@torch.no_grad()
def forward(model: Any, name: str, ids: Tensor) -> Tensor:
    """``answer`` by this experts implementation, without a cache."""
    model.set_experts_implementation(name)
    return answer(model, ids, use_cache=False)


def check_fp32(entry: ExpertsClass) -> None:
    model, ids = build(entry), tokens(2, LENGTH)
    torch.testing.assert_close(forward(model, "moe_ep", ids), forward(model, "eager", ids), rtol=0, atol=1e-5)


def check_bf16(entry: ExpertsClass) -> None:
    """Ours is as near to fp32 as transformers' own eager experts are, for the median token.

    A rounding may flip a router's choice for some token, with either implementation; a wrong expert shows in all.
    """
    ids = tokens(8, 16)
    model = build(entry, torch.bfloat16)
    plain, ours = forward(model, "eager", ids), forward(model, "moe_ep", ids)
    exact = forward(model.float(), "eager", ids)
    assert ours.dtype == plain.dtype
    assert median_error(ours, exact) < MODEL_BF16_OVER_PLAIN * median_error(plain, exact)


def median_error(got: Tensor, wanted: Tensor) -> float:
    """Median over tokens of the relative error of a token's (..., V) outputs."""
    difference, scale = (got.double() - wanted.double()).norm(dim=-1), wanted.double().norm(dim=-1)
    return float((difference / scale).median())


def check_experts_carry_weight(entry: ExpertsClass) -> None:
    """The comparisons here would notice a wrong expert: without experts the result is another one altogether."""
    model, ids = build(entry), tokens(2, LENGTH)
    expected = forward(model, "moe_ep", ids)
    for module in own_experts(model, entry):
        for parameter in module.parameters(recurse=False):
            parameter.data.zero_()
    assert (forward(model, "moe_ep", ids) - expected).abs().max() > 0.3


class Decoding:
    """Teacher-forced steps of one model with a full-length static cache, after ``BEFORE`` tokens of ``ids``."""

    def __init__(self, model: Any, ids: Tensor):
        self.ids, self.cache = ids, full_length_cache(model.config, COLUMNS)
        self.mask = torch.ones(ids.shape[0], COLUMNS, dtype=torch.int64, device=ids.device)
        self.feed(model, 0, BEFORE)

    def feed(self, run: Any, start: int, stop: int) -> Tensor:
        positions = torch.arange(start, stop, device=self.ids.device).expand(self.ids.shape[0], -1)
        return answer(
            run, self.ids[:, start:stop], position_ids=positions, attention_mask=self.mask,
            past_key_values=self.cache, use_cache=True,
        )  # fmt: skip

    def steps(self, run: Any) -> Tensor:
        """(B, steps, V); a copy, since a CUDA graph writes its output again at the next step."""
        columns = range(BEFORE, self.ids.shape[1])
        return torch.cat([self.feed(run, column, column + 1).clone() for column in columns], dim=1)


@torch.no_grad()
def check_one_graph(entry: ExpertsClass) -> None:
    """Compiled with fullgraph: the same logits as eager Hugging Face, one graph for all steps, nothing dynamic."""
    ids, plain, model = tokens(2, LENGTH), build(entry), build(entry)
    plain.set_experts_implementation("eager")
    model.set_experts_implementation("moe_ep")
    keeper, before = GraphKeeper(), compile_counts()
    compiled = torch.compile(model, backend=keeper, fullgraph=True, dynamic=False)
    if entry.name in NO_GRAPH:
        with pytest.raises(torch._dynamo.exc.UserError):
            Decoding(model, ids).steps(compiled)
        return
    if entry.name in WITHOUT_CACHE:
        wanted, got = answer(plain, ids, use_cache=False), answer(compiled, ids, use_cache=False)
    else:
        wanted, got = Decoding(plain, ids).steps(plain), Decoding(model, ids).steps(compiled)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)
    assert compile_counts().graphs - before.graphs == len(keeper.graphs) == 1
    assert keeper.integer_inputs() == []
    assert bool(keeper.unbacked()) == (entry.name in DATA_DEPENDENT), keeper.unbacked()
    modules = hf_compat.experts_modules(model).values()
    own = [m for m in modules if isinstance(gates.recognise(m), gates.OwnCode)]
    assert keeper.calls("fused_moe") <= len(modules) - len(own)
    assert (keeper.calls("expert_linear"), keeper.calls("topk_sum")) == (2 * len(own), len(own))
    assert keeper.calls("fused_moe") + len(own) > 0


def check_two_ranks(entry: ExpertsClass, rank: int) -> None:
    """Every rank its own batch of its own size: as the whole model on one process, and nothing but experts split."""
    ids = tokens(2 + rank, LENGTH - 2 * rank, seed=rank)
    model = build(entry)
    wanted = forward(model, "eager", ids)
    sizes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    experts = {f"{n}.{p}" for n, m in hf_compat.experts_modules(model).items() for p in hf_compat.expert_parameters(m)}
    graphs.shard_experts(model, max_tokens_per_rank=CAPACITY, timeout_s=60.0)
    for name, tensor in model.state_dict().items():
        expected = (sizes[name][0] // 2, *sizes[name][1:]) if name in experts else sizes[name]
        assert tensor.shape == torch.Size(expected), name
    module = own_experts(model, entry)[0]
    workspace = get_workspace(dist.group.WORLD.group_name)
    assert workspace is not None and workspace.config.hidden_size == hidden_size(module)
    torch.testing.assert_close(forward(model, "moe_ep", ids), wanted, rtol=0, atol=1e-5)


ALONE: dict[str, Callable[[ExpertsClass], None]] = {
    "fp32": check_fp32,
    "bf16": check_bf16,
    "experts carry weight": check_experts_carry_weight,
    "one graph": check_one_graph,
}


def outcome(check: Callable[..., None], *arguments: Any) -> str | None:
    """What went wrong, None if nothing did."""
    try:
        check(*arguments)
    except Exception:
        return traceback.format_exc()
    finally:
        torch._dynamo.reset()
    return None


def run_models(rank: int, world_size: int, names: list[str], emit: Any = None) -> dict[str, dict[str, str | None]]:
    """Body of one rank: outcomes by class and check."""
    torch.set_num_threads(1)
    outcomes: dict[str, dict[str, str | None]] = {name: {} for name in names}
    for name in names:
        outcomes[name]["two ranks"] = outcome(check_two_ranks, experts_classes()[name], rank)
        if (workspace := get_workspace(dist.group.WORLD.group_name)) is not None:
            dist.barrier()
            workspace.close()
    for name in names[rank::world_size]:
        entry, start = experts_classes()[name], time.perf_counter()
        outcomes[name] |= {check: outcome(function, entry) for check, function in ALONE.items()}
        print(f"{name}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return outcomes

"""``"moe_ep"`` through transformers' own expert parallelism, where the installed version has it (5.23)."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM

import graphs
from graphs import hf_ep
from graphs.checkpoints import make_checkpoint, tiny_config
from graphs.errors import TransformersVersionError
from graphs.launch import run_ranks
from lowering.torch_compat import compile_counts
from moe_ops.errors import CapacityError
from tests.graphs.model_cases import GraphKeeper, plain_model, prompts_of

CASES = (("qwen3_moe", "moe_ep"), ("qwen3_moe", "grouped_mm"), ("gpt_oss", "moe_ep"), ("deepseek_v3", "moe_ep"))
pytestmark = pytest.mark.timeout(900)
HAS_REGISTRY = hf_ep.EPImplementationInterface is not None
ROWS = 32


def load(folder: Path, experts: str) -> Any:
    config = graphs.distributed_config(folder, max_tokens_per_rank=ROWS)
    options = {"distributed_config": config, "experts_implementation": experts}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@torch.no_grad()
def check(rank: int, folder: Path, family: str, experts: str) -> None:
    """Own batches, also through transformers' experts; one graph; nothing but experts is split."""
    model, plain = load(folder, experts), plain_model(family)
    ids = torch.tensor(prompts_of([5 + rank] * 2, seed=rank))
    wanted = plain(ids, use_cache=False).logits
    torch.testing.assert_close(model(ids, use_cache=False).logits, wanted, rtol=0, atol=1e-5)
    keeper, before = GraphKeeper(), compile_counts()
    compiled = torch.compile(model, backend=keeper, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, wanted, rtol=0, atol=1e-5)
    assert compile_counts().graphs - before.graphs == len(keeper.graphs) == 1
    assert keeper.unbacked() == []
    assert not keeper.numbers()
    layers = sum(name.endswith("experts.down_proj") for name in model.state_dict())
    assert keeper.calls("agv_dispatch") == keeper.calls("rsv_combine") == layers
    split = {name for name, tensor in model.state_dict().items() if isinstance(tensor, dist.tensor.DTensor)}
    assert split == {name for name in model.state_dict() if ".experts." in name}
    with pytest.raises(CapacityError, match=r"34 tokens exceeds max_tokens_per_rank=32; call graphs.set_ep_options"):
        model(torch.ones(2, 17, dtype=torch.int64))


def body(rank: int, world_size: int, folder: str, emit: Any = None) -> dict[str, str | None]:
    """One rank: outcomes by case."""
    torch.set_num_threads(1)
    outcomes: dict[str, str | None] = {}
    for family, experts in CASES:
        path = Path(folder) / family
        if rank == 0 and not path.exists():
            make_checkpoint(path, family)
        dist.barrier()
        try:
            check(rank, path, family, experts)
            outcomes[f"{family}, {experts}"] = None
        except Exception:
            outcomes[f"{family}, {experts}"] = traceback.format_exc()
        torch._dynamo.reset()
    return outcomes


def test_two_ranks_with_their_own_batches(tmp_path: Path):
    """Before 5.23 there is nothing to plug into, which is an error that says so."""
    if not HAS_REGISTRY:
        with pytest.raises(
            TransformersVersionError, match=r"has no EPImplementation; upgrade to 5.23.*from_pretrained"
        ):
            graphs.distributed_config(tiny_config(), max_tokens_per_rank=ROWS, ep_size=2)
        return
    outcomes = run_ranks(body, str(tmp_path), ranks=2, device="cpu", on_event=print)
    problems = [f"{case}:\n{text}" for ranked in outcomes for case, text in ranked.items() if text]
    assert len(outcomes[0]) == len(CASES) and not problems, "\n".join(problems)


def test_registered_where_there_is_a_registry():
    if HAS_REGISTRY:
        assert hf_ep.EPImplementationInterface()["moe_ep"] is hf_ep.MoeEpImplementation
    assert graphs.set_ep_options(max_tokens_per_rank=64).max_tokens_per_rank == 64
    with pytest.raises(TypeError):
        graphs.set_ep_options(max_tokens=64)

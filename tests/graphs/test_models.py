"""Every class of transformers' experts interface on a tiny model: the checks of ``model_jobs.py``."""

from __future__ import annotations

import pytest
import torch

from graphs.launch import run_ranks
from tests.graphs import model_table
from tests.graphs.model_jobs import CHECKS, forward, run_models
from tests.graphs.tiny_models import build, experts_classes, tokens

pytestmark = pytest.mark.timeout(900)  # the first test waits for the ranks, which do the work of all
Outcomes = list[dict[str, dict[str, str | None]]]


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return run_ranks(run_models, list(experts_classes()), ranks=2, device="cpu", on_event=print)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", experts_classes())
def test_model(outcomes: Outcomes, name: str, check: str):
    found = [(rank, ranked[name][check]) for rank, ranked in enumerate(outcomes) if check in ranked[name]]
    assert len(found) == (2 if check == "two ranks" else 1)
    problems = [f"rank {rank}:\n{text}" for rank, text in found if text]
    assert not problems, "\n".join(problems)


def test_the_page_of_models_is_what_is_generated():
    """Rows do not depend on the version; the page is of the version that has the most."""
    written = model_table.PAGE.read_text()
    for line in model_table.rows():
        assert line in written, f"run python -m tests.graphs.model_table: {line}"
    if len(experts_classes()) == written.count("Experts |"):
        assert model_table.page() == written


BESIDE_EXPERTS = {  # class of a style of MoE block -> parameters beside its routed experts that this block has
    "DeepseekV3Experts": "shared_experts",
    "Qwen2MoeExperts": "shared_expert",
    "Glm4MoeExperts": "shared_experts",
    "Ernie4_5_MoeExperts": "shared_experts",
    "HunYuanMoEV1Experts": "shared_mlp",
    "NemotronHExperts": "latent",
}


@pytest.mark.parametrize("name", BESIDE_EXPERTS)
def test_the_tiny_models_have_what_stands_beside_experts(name: str):
    """Shared experts and latent projections are part of what the checks above compare: without them it is another."""
    entry, ids = experts_classes()[name], tokens(2, 9)
    model = build(entry)
    expected = forward(model, "moe_ep", ids)
    found = [p for n, p in model.named_parameters() if BESIDE_EXPERTS[name] in n]
    assert found
    for parameter in found:
        parameter.data.zero_()
    assert (forward(model, "moe_ep", ids) - expected).abs().max() > 0.05


@pytest.mark.parametrize("name", ["DeepseekV3Experts", "Glm4MoeExperts", "NemotronHExperts"])
def test_routed_scaling_carries_weight(name: str):
    entry, ids = experts_classes()[name], tokens(2, 9)
    once, twice = (build(entry, routed_scaling_factor=factor) for factor in (1.5, 3.0))
    difference = forward(twice, "moe_ep", ids) - forward(once, "moe_ep", ids)
    assert difference.abs().max() > 0.1
    torch.testing.assert_close(forward(twice, "moe_ep", ids), forward(twice, "eager", ids), rtol=0, atol=1e-5)

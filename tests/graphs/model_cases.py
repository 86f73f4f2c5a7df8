"""What the tests of ``graphs`` share: prompts, the plain Hugging Face answer, and a look into compiled graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch.fx import GraphModule
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

from graphs.checkpoints import tiny_model
from graphs.verify import reference_tokens

MAIN_FAMILIES = ("qwen3_moe", "mixtral", "olmoe")
FAMILIES = (*MAIN_FAMILIES, "deepseek_v3", "gpt_oss")


def prompts_of(lengths: Sequence[int], seed: int = 1) -> list[list[int]]:
    """Random prompts of these lengths, from the vocabulary of the tiny models."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 512, (n,), generator=generator).tolist() for n in lengths]


def plain_model(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    """The whole tiny model, with Hugging Face's own eager experts."""
    model = tiny_model(family, dtype, **overrides)
    model.set_experts_implementation("eager")
    return model


def plain_answers(model: Any, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """``count`` greedy tokens after each prompt, from ``generate``, one prompt at a time."""
    return [reference_tokens(model, prompt, count) for prompt in prompts]


class GraphKeeper:
    """A ``torch.compile`` backend that runs the traced graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []
        self._compile = aot_autograd(fw_compiler=self._keep)

    def __call__(self, gm: GraphModule, example_inputs: list) -> Callable:
        return self._compile(gm, example_inputs)

    def _keep(self, gm: GraphModule, example_inputs: list) -> Callable:
        self.graphs.append(gm)
        return gm

    def integer_inputs(self) -> list[str]:
        """Graph inputs that are not tensors: a CUDA graph would be recorded anew for each value."""
        return [
            node.name
            for gm in self.graphs
            for node in gm.graph.find_nodes(op="placeholder")
            if not isinstance(node.meta["val"], torch.Tensor)
        ]

    def numbers(self) -> list[str]:
        """Graph inputs that are numbers; of what is no tensor, a mesh or a group is at least the same at every call."""
        kinds = (int, float, torch.SymInt, torch.SymFloat)
        inputs = (node for gm in self.graphs for node in gm.graph.find_nodes(op="placeholder"))
        return [node.name for node in inputs if isinstance(node.meta["val"], kinds)]

    def unbacked(self) -> list[str]:
        """Nodes whose size depends on data."""
        return [n.name for gm in self.graphs for n in gm.graph.nodes if free_unbacked_symbols(n.meta.get("val"))]

    def calls(self, op_name: str) -> int:
        """Calls of ``torch.ops.moe_ep.<op_name>`` in all graphs; ordered ops are an argument of ``with_effects``."""
        op = getattr(torch.ops.moe_ep, op_name).default
        nodes = (node for gm in self.graphs for node in gm.graph.nodes if node.op == "call_function")
        return sum(node.target is op or any(arg is op for arg in node.args) for node in nodes)

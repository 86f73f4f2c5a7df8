"""The one registry of MoE layer shapes that benchmarks, tuning and documents name.

``peer`` is the best fraction of the floor that other implementations reached at each of ``TOKENS`` on one
H200 (the better of vLLM-style Triton kernels and transformers' compiled ``grouped_mm``), as measured before
this project; the benchmark measures the transformers path again in the same run.
"""

from __future__ import annotations

from dataclasses import dataclass

READ_BYTES_PER_S = 4.37e12  # streaming read of one H200
FLOPS_PER_S = 786e12  # bf16 8192^3 matmul of one H200
TOKENS = (1, 4, 16, 64, 128, 256, 512, 2048, 8192)


@dataclass(frozen=True)
class LayerShape:
    """One rank's slice of an MoE layer: ``local_experts`` of ``experts``, top-k, hidden and expert inner size."""

    name: str
    local_experts: int
    experts: int
    top_k: int
    hidden: int
    inner: int
    peer: tuple[float | None, ...]

    def floor_us(self, tokens: int, pairs: int, touched: int) -> float:
        """Least time for ``pairs`` local (row, slot) pairs that touch ``touched`` experts: max of bytes and flops."""
        weights = touched * 3 * self.hidden * self.inner * 2
        activations = 2 * tokens * self.hidden * 2
        flops = pairs * 6 * self.hidden * self.inner
        return 1e6 * max((weights + activations) / READ_BYTES_PER_S, flops / FLOPS_PER_S)


SHAPES = {
    shape.name: shape
    for shape in (
        LayerShape("qwen3-30b", 128, 128, 8, 2048, 768, (0.32, 0.62, 0.80, 0.85, 0.80, 0.77, 0.73, 0.36, 0.34)),
        LayerShape("qwen3-30b-ep8", 16, 128, 8, 2048, 768, (0.07, 0.25, 0.36, 0.45, 0.44, 0.42, 0.39, 0.22, 0.19)),
        LayerShape("mixtral", 8, 8, 2, 4096, 14336, (0.75, 0.89, 0.91, 0.93, 0.88, 0.66, 0.40, 0.69, 0.60)),
        LayerShape("deepseek-v3-ep8", 32, 256, 8, 7168, 2048, (None, 0.74, 0.84, 0.91, 0.87, 0.88, 0.85, 0.56, 0.33)),
        LayerShape("gpt-oss-like", 128, 128, 4, 2880, 2880, (0.54, 0.80, 0.94, 0.96, 0.93, 0.91, 0.89, 0.66, 0.37)),
    )
}


def peer_fraction(shape: LayerShape, tokens: int) -> float | None:
    """Best fraction of the floor known from others, ``None`` where it was not measured."""
    return shape.peer[TOKENS.index(tokens)] if tokens in TOKENS else None

"""Which kernels of a layer's chain of launches wait for which, as compiled for an H200: a wait left out is a race."""

from __future__ import annotations

import pytest

from moe_ops import align_kernels, fused_moe_few_kernels, topk_sum_kernels
from tests.moe_ops.test_moe_compiled import PLANS, _gemm, compiled

ALIGN = {
    "BLOCK": 64, "BINS": 128, "ROWS": 32, "GROUPS": 1, "SIZE": 128, "SHARE": 32, "BLOCKS": 4, "PART": 512, "PARTS": 4,
    "CHUNK": 512, "FILL": 256, "ONE": True, "LONE": 0,
}  # fmt: skip
SUM = {"TOP_K": 8, "BLOCK_H": 512, "SLOTS": 8, "LONE": False}
WAIT, LET = "griddepcontrol.wait", "griddepcontrol.launch_dependents"


@pytest.mark.parametrize("kernel", ["_align_kernel", "_count_kernel"])
@pytest.mark.parametrize("pdl", [0, 1, 2])
def test_the_first_of_a_chain_waits_only_behind_a_dispatch_and_then_before_anything_else(kernel, pdl):
    text = compiled(getattr(align_kernels, kernel), ALIGN | {"PDL": pdl}, 4, 3, {}).ptx
    assert (text.count(WAIT), text.count(LET)) == (int(pdl == 2), int(pdl > 0))
    if pdl == 2:
        assert text.index(WAIT) < text.index(LET) and "ld.global" not in text[: text.index(WAIT)]


def test_align_places_pairs_when_their_counts_are_there():
    text = compiled(align_kernels._scatter_kernel, ALIGN | {"PDL": True}, 4, 3, {}).ptx
    assert "ld.global" in text[: text.index(WAIT)]  # ids: inputs
    assert "st.global" not in text[: text.index(WAIT)] and text.count(WAIT) == 1


@pytest.mark.parametrize("kernel", ["topk_sum_kernel", "topk_sum_local_kernel"])
def test_the_sum_waits_before_it_writes(kernel):
    text = compiled(getattr(topk_sum_kernels, kernel), SUM | {"PDL": True}, 1, 3, {}).ptx
    assert text.count(WAIT) == 1 and "st.global" not in text[: text.index(WAIT)]
    assert "ld.global.v4" not in text[: text.index(WAIT)]  # pairs


def test_the_second_gemm_of_few_rows_has_waited_when_it_ends_even_where_no_row_is_live():
    plan = PLANS["T=1"]
    text = _gemm(fused_moe_few_kernels.down_few_kernel, plan, plan.down, 1).ptx
    assert text.rindex(WAIT) > text.rindex("st.global") and text.count(WAIT) == 2

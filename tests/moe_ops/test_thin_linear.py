"""``thin_linear``: the op, and where its kernel is checked."""

import pytest
import torch

from moe_ops.errors import DtypeError, ShapeError
from moe_ops.thin_linear import MAX_ROWS
from tests.moe_ops.interpreted import run_checks

op = torch.ops.moe_ep.thin_linear


def test_literal():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    first, second = op(x, [torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]), torch.tensor([[10.0, 1.0]])])
    assert first.tolist() == [[1.0, 2.0, 3.0], [3.0, 4.0, 7.0]]
    assert second.tolist() == [[12.0], [34.0]]


def test_opcheck():
    args = (torch.randn(3, 8, dtype=torch.bfloat16), [torch.randn(n, 8, dtype=torch.bfloat16) for n in (4, 6)])
    torch.library.opcheck(op.default, args)
    torch.library.opcheck(op.default, args, {"out_dtype": torch.float32})
    torch.library.opcheck(op.default, args, {"out_dtype": torch.float32, "split": 3})


def test_pieces_literal():
    """Depth 1024 in two pieces: ones times ones and twos."""
    weight = torch.cat([torch.ones(1, 512), torch.full((1, 512), 2.0)], 1)
    (pieces,) = op(torch.ones(2, 1024), [weight], out_dtype=torch.float32, split=2)
    assert pieces.tolist() == [[[512.0], [512.0]], [[1024.0], [1024.0]]]


@pytest.mark.parametrize(
    ("options", "error"), [({"split": 0}, ShapeError), ({"split": 2}, DtypeError)], ids=["none", "dtype"]
)
def test_wrong_pieces_are_refused(options, error):
    with pytest.raises(error, match="split"):
        op(torch.randn(3, 8), [torch.randn(2, 8)], **options)


def test_kernel_in_the_interpreter():
    run_checks("thin_linear_checks.py", interpret=True)


@pytest.mark.gpu("1 H200: the compiled kernel, bf16")
def test_kernel_on_the_gpu():
    run_checks("thin_linear_checks.py", interpret=False)


@pytest.mark.parametrize(
    ("x", "weights", "error"),
    [
        (torch.randn(3, 8), [], ShapeError),
        (torch.randn(3, 8), [torch.randn(2, 8)] * 5, ShapeError),
        (torch.randn(MAX_ROWS + 1, 8), [torch.randn(2, 8)], ShapeError),
        (torch.randn(3, 8), [torch.randn(2, 7)], ShapeError),
        (torch.randn(3, 8, 1), [torch.randn(2, 8)], ShapeError),
        (torch.randn(3, 8), [torch.randn(2, 8).half()], DtypeError),
    ],
)
def test_wrong_arguments_are_refused(x, weights, error):
    with pytest.raises(error, match="thin_linear"):
        op(x, weights)

"""What the emulator changes in Triton's interpreter: it raises at inline assembly and takes three slow detours.

The same in Triton 3.6 to 3.9.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as triton_interpreter

from . import machine


class _Results:
    """What ``create_inline_asm`` returns: the tensors by index."""

    def __init__(self, handles: list[triton_interpreter.TensorHandle]):
        self.handles = handles

    def get_result(self, index: int) -> triton_interpreter.TensorHandle:
        return self.handles[index]


def _create_inline_asm(
    builder: object, text: str, constraints: str, values: list, types: list, is_pure: bool, pack: int
) -> _Results:
    if pack != 1:
        raise machine.UnknownPtxError("emulator: only pack=1 is supported.")
    shape = values[0].data.shape if values else (1,)
    dtypes = [triton_interpreter._get_np_dtype(getattr(kind, "scalar", kind)) for kind in types]
    arrays = machine.execute(text, [value.data for value in values], dtypes)
    return _Results(
        [
            triton_interpreter.TensorHandle(array.reshape(shape), getattr(kind, "scalar", kind))
            for array, kind in zip(arrays, types, strict=True)
        ]
    )


_call_and_patch = triton_interpreter.InterpretedFunction.__call__


def _call_device_function(function: triton_interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
    """A device function called by a kernel, whose launch has patched ``triton.language`` already.

    Triton patches it again for every call, a third of an emulated kernel's time. Its own functions, such as
    ``tl.zeros``, need that, because they know the language by other names.
    """
    if function.fn.__module__.startswith("triton."):
        return _call_and_patch(function, *args, **kwargs)
    return function.rewrite()(*args, **kwargs)


_INTEGER_OPS: dict[str, Callable] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _check_overflow(semantic: TritonSemantic, lhs: Any, rhs: Any, binary_op: Callable) -> None:
    """Triton's check that an integer result fits its type, in numpy: seven emulated operations for each one there."""
    kind = lhs.type.scalar
    if kind.int_bitwidth >= 64 or not semantic.builder.options.sanitize_overflow:
        return
    wide = (operand.handle.data.astype(np.int64) for operand in (lhs, rhs))
    exact = _INTEGER_OPS[binary_op.__name__](*wide)
    fits = kind.get_int_min_value() <= exact.min() and exact.max() <= kind.get_int_max_value()
    assert fits, f"int{kind.int_bitwidth} overflow detected for operation {binary_op.__name__}"


_slow_np_dtype = triton_interpreter._get_np_dtype
_np_dtypes: dict[str, np.dtype] = {}


def _get_np_dtype(kind: Any) -> np.dtype:
    """The numpy type that holds a Triton type; Triton builds its table anew for every question."""
    name = kind.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _slow_np_dtype(kind.scalar)
    return _np_dtypes[name]


def install() -> None:
    """Let Triton's interpreter run our inline assembly, and run faster, in this process, from now on."""
    setattr(triton_interpreter.InterpreterBuilder, "create_inline_asm", _create_inline_asm)  # noqa: B010
    setattr(triton_interpreter.InterpretedFunction, "__call__", _call_device_function)  # noqa: B010
    setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", _check_overflow)  # noqa: B010
    setattr(triton_interpreter, "_get_np_dtype", _get_np_dtype)  # noqa: B010

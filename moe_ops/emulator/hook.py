"""What the emulator changes in Triton's interpreter: it raises at inline assembly and takes slow detours.

The same in Triton 3.6 to 3.9.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
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

    Triton patches it again for every call, half of an emulated kernel's time. Its own functions, such as
    ``tl.zeros``, know the language as ``triton.language.core``, which the first of them patches for good.
    """
    if function.fn.__module__.startswith("triton.") and tl.core.is_builtin(tl.core.load):
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


_NUMBERS = frozenset(("int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"))
_NUMBERS |= {"fp16", "bf16", "fp32", "fp64"}
_slow_operands, _slow_broadcast = TritonSemantic.binary_op_type_checking_impl, TritonSemantic.broadcast_impl_value
_slow_cast, _slow_common_type = TritonSemantic.cast, TritonSemantic.computation_type_impl
_TENSOR: Any = tl.tensor  # whose types have names and shapes that Triton's annotations do not know
_constants: dict[tuple, Any] = {}
_common_types: dict[tuple, Any] = {}


def _operands(
    semantic: TritonSemantic, lhs: Any, rhs: Any, allow_lhs_ptr: bool = False, allow_rhs_ptr: bool = False,
    arithmetic_check: bool = True, div_or_mod: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """Two operands in one type and shape, as most are already; Triton finds that out in a dozen calls."""
    flags = allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod
    if type(lhs) is not _TENSOR or lhs.dtype.name not in _NUMBERS:
        return _slow_operands(semantic, lhs, rhs, *flags)
    if type(rhs) is int:
        return _with_constant(semantic, lhs, rhs, flags)
    if type(rhs) is _TENSOR and lhs.type.name == rhs.type.name and not div_or_mod:  # that wants fp32 for fp16
        return lhs, rhs
    return _slow_operands(semantic, lhs, rhs, *flags)


def _with_constant(semantic: TritonSemantic, lhs: Any, rhs: int, flags: tuple[bool, ...]) -> tuple[Any, Any]:
    """A number in the kernel's text becomes a value once for each type it meets, as values are never written again."""
    key = lhs.type.name, rhs, flags
    if key in _constants:
        return lhs, _constants[key]
    left, right = _slow_operands(semantic, lhs, rhs, *flags)
    if left is lhs:
        _constants[key] = right
    return left, right


def _broadcast(semantic: TritonSemantic, lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """Two values in one shape; as they are if they have one."""
    if lhs.type.is_block() and rhs.type.is_block() and tuple(lhs.type.shape) == tuple(rhs.type.shape):
        return lhs, rhs
    return _slow_broadcast(semantic, lhs, rhs)


def _cast(semantic: TritonSemantic, value: Any, kind: Any, rounding: str | None = None) -> Any:
    """A value in another type; itself if it is of that. Names of pointers leave out what they may differ in."""
    name = value.dtype.name
    return value if name == kind.scalar.name and name in _NUMBERS else _slow_cast(semantic, value, kind, rounding)


def _common_type(
    semantic: TritonSemantic, lhs: Any, lhs_is_number: bool, rhs: Any, rhs_is_number: bool, div_or_mod: bool
) -> Any:
    """The type in which two types meet; Triton asks a dozen questions for every pair of values."""
    key = lhs.name, lhs_is_number, rhs.name, rhs_is_number, div_or_mod
    if key not in _common_types:
        _common_types[key] = _slow_common_type(semantic, lhs, lhs_is_number, rhs, rhs_is_number, div_or_mod)
    return _common_types[key]


_slow_np_dtype = triton_interpreter._get_np_dtype
_np_dtypes: dict[str, np.dtype] = {}


def _get_np_dtype(kind: Any) -> np.dtype:
    """The numpy type that holds a Triton type; Triton builds its table anew for every question."""
    name = kind.scalar.name
    if name not in _np_dtypes:
        _np_dtypes[name] = _slow_np_dtype(kind.scalar)
    return _np_dtypes[name]


_slow_block_type = tl.block_type.__init__
_block_types: dict[tuple, dict[str, Any]] = {}
_tensor_shapes: dict[tuple, tuple[tl.tuple, tl.constexpr]] = {}


def _init_block_type(block: tl.block_type, element_ty: Any, shape: Any) -> None:
    """A block's type; Triton checks its shape and writes its name anew for every value."""
    sizes = tuple(shape)
    if {*map(type, sizes)} != {int}:
        sizes = tuple(tl.core._unwrap_if_constexpr(size) for size in sizes)
        if {*map(type, sizes)} != {int}:
            return _slow_block_type(block, element_ty, shape)
    key = (element_ty.name, getattr(element_ty, "address_space", None), *sizes)
    if key not in _block_types:
        _slow_block_type(block, element_ty, shape)
        _block_types[key] = dict(vars(block))
    vars(block).update(_block_types[key])


def _init_tensor(tensor: tl.tensor, handle: object, kind: Any) -> None:
    """A value; Triton makes its shape of new constants for every one."""
    sizes = tuple(kind.shape) if kind.is_block() else ()
    if sizes not in _tensor_shapes:
        _tensor_shapes[sizes] = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(math.prod(sizes))
    tensor.handle, tensor.type, tensor.dtype = handle, kind, kind.scalar
    tensor.shape, tensor.numel = _tensor_shapes[sizes]


def install() -> None:
    """Let Triton's interpreter run our inline assembly, and run faster, in this process, from now on."""
    setattr(triton_interpreter.InterpreterBuilder, "create_inline_asm", _create_inline_asm)  # noqa: B010
    setattr(triton_interpreter.InterpretedFunction, "__call__", _call_device_function)  # noqa: B010
    setattr(TritonSemantic, "binary_op_sanitize_overflow_impl", _check_overflow)  # noqa: B010
    setattr(TritonSemantic, "binary_op_type_checking_impl", _operands)  # noqa: B010
    setattr(TritonSemantic, "broadcast_impl_value", _broadcast)  # noqa: B010
    setattr(TritonSemantic, "cast", _cast)  # noqa: B010
    setattr(TritonSemantic, "computation_type_impl", _common_type)  # noqa: B010
    setattr(triton_interpreter, "_get_np_dtype", _get_np_dtype)  # noqa: B010
    setattr(tl.block_type, "__init__", _init_block_type)  # noqa: B010
    setattr(tl.tensor, "__init__", _init_tensor)  # noqa: B010

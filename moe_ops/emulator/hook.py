"""What the emulator changes in Triton's interpreter, which raises at inline assembly."""

from __future__ import annotations

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


def _call_device_function(function: triton_interpreter.InterpretedFunction, *args: object, **kwargs: object) -> object:
    """A device function called by a kernel, whose launch has patched ``triton.language`` already.

    Triton 3.6 to 3.9 patch it again for every call, a third of an emulated kernel's time.
    """
    return function.rewrite()(*args, **kwargs)


def install() -> None:
    """Let Triton's interpreter run our inline assembly, in this process, from now on."""
    setattr(triton_interpreter.InterpreterBuilder, "create_inline_asm", _create_inline_asm)  # noqa: B010
    setattr(triton_interpreter.InterpretedFunction, "__call__", _call_device_function)  # noqa: B010

"""Kernels whose int32 result does not fit, for ``test_emulator.py``."""

import triton
import triton.language as tl


@triton.jit
def add_kernel(out_ptr, x, y):
    tl.store(out_ptr, x + y)


@triton.jit
def sub_kernel(out_ptr, x, y):
    tl.store(out_ptr, x - y)


@triton.jit
def mul_kernel(out_ptr, x, y):
    tl.store(out_ptr, x * y)

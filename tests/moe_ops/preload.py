"""What a process that interprets kernels needs before it is forked: the kernels, prepared for the interpreter."""

from __future__ import annotations

from importlib import import_module

from triton.runtime.interpreter import InterpretedFunction

from moe_ops.emulator import hook

MODULES = ("barrier", "chunks", "ptx", "metadata_kernels", "dispatch_kernels", "dispatch_into_kernels")
MODULES += ("combine_kernels", "combine_from_kernels", "combine_add_kernels")

hook.install()
for name in MODULES:
    for function in list(vars(import_module(f"moe_ops.{name}")).values()):
        if isinstance(function, InterpretedFunction):
            function.rewrite()

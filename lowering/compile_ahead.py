"""Compiles the Triton kernels of our own ops in threads, while Inductor is still at work on the graph that holds them.

Inductor compiles the kernels that it writes in worker processes; ours would wait for their first launch, one after the
other. Which ones, and with which constants, only an op's launcher knows. So each op of a graph is *rehearsed*: its CUDA
implementation runs once in a thread, on fake tensors of the shapes in the graph, and where it launches a kernel that
kernel is compiled instead (Triton's ``warmup``). Nothing is allocated or launched. The process's next real launch waits
for rehearsals that are under way; a kernel that they prepared is then found in Triton's own cache, and one that they
did not (another alignment, a failure) is compiled as ever.

Ops in which ranks meet are left out: their launchers need the peers' buffers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from torch import Tensor
from torch.fx import Graph
from torch.fx.node import map_arg

from moe_ops.registration import CUDA_IMPLEMENTATIONS

from . import torch_compat

THREADS = 4  # a decode step has four to eight kernels of ours
_log = logging.getLogger(__name__)
_thread = threading.local()
_under_way: list[Future] = []
_lock = threading.Lock()  # of _under_way and of Triton's two functions


def compile_ahead(graph: Graph) -> None:
    """Start to rehearse every op of ``moe_ep`` on CUDA in ``graph``; calls with equal shapes once."""
    rehearse(_different_calls(graph))


def rehearse(calls: Iterable[Callable[[], object]]) -> None:
    """Run ``calls`` in threads; kernels that they launch are compiled, not launched."""
    pending = list(calls)
    if not pending:
        return
    with_threads = ThreadPoolExecutor(THREADS, thread_name_prefix="moe_ep_compile")
    with _lock:
        _divert_launches()
        _under_way.extend(with_threads.submit(_rehearse, call) for call in pending)
    with_threads.shutdown(wait=False)


def _rehearse(call: Callable[[], object]) -> None:
    _thread.rehearses = True
    try:
        call()
    except Exception as error:  # the launch itself will compile, and raise what there is to raise
        _log.info("moe_ep: a kernel is not compiled ahead: %s: %s", type(error).__name__, error)


def _different_calls(graph: Graph) -> list[Callable[[], object]]:
    calls: dict[Any, Callable[[], object]] = {}
    for node in graph.nodes:
        implementation = CUDA_IMPLEMENTATIONS.get(node.target) if node.op == "call_function" else None
        if implementation is None:
            continue
        if any(read.meta["val"].device.type != "cuda" for read in node.all_input_nodes):
            continue
        given: Any = (node.args, node.kwargs)
        shown = map_arg(given, lambda read: _looks(read.meta["val"]))
        args, kwargs = map_arg(given, lambda read: read.meta["val"])  # pyright: ignore[reportGeneralTypeIssues]
        calls[node.target, repr(shown)] = torch_compat.on_fakes(implementation, args, kwargs)
    return list(calls.values())


def _looks(fake: Tensor) -> Any:
    """All that a launcher can see of it."""
    return tuple(fake.shape), fake.stride(), fake.dtype, fake.device


# ---- Triton: the launches of a thread that rehearses ----


def _divert_launches() -> None:
    """Launches of rehearsing threads compile; the first other one waits for these and puts Triton's own back."""
    from triton.runtime.jit import JITFunction
    from triton.tools.tensor_descriptor import TensorDescriptor

    launcher: Any = JITFunction
    descriptors: Any = TensorDescriptor
    if getattr(launcher.run, "moe_ep", False):
        return
    run, check = launcher.run, descriptors.__post_init__

    def diverted(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if getattr(_thread, "rehearses", False):
            return run(kernel, *map(_stand_in, args), grid=(1,), warmup=True, **kwargs)
        wait(tuple(_under_way))
        with _lock:
            if all(rehearsal.done() for rehearsal in _under_way):
                _under_way.clear()
                if launcher.run is diverted:  # else somebody wrapped it meanwhile, and calls through here for good
                    launcher.run, descriptors.__post_init__ = run, check
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    def checked(descriptor: Any) -> None:
        if not getattr(_thread, "rehearses", False):  # a fake tensor has no address to check
            check(descriptor)

    launcher.run, descriptors.__post_init__ = diverted, checked
    launcher.run.moe_ep = True


def _stand_in(argument: Any) -> Any:
    """What Triton compiles a kernel for: of a tensor its dtype, and that it is aligned."""
    from triton.runtime.jit import MockTensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(argument, Tensor):
        return MockTensor(argument.dtype)
    if isinstance(argument, TensorDescriptor):
        base: Any = MockTensor(argument.base.dtype)
        return TensorDescriptor(base, argument.shape, argument.strides, argument.block_shape)
    if isinstance(argument, tuple):
        parts = map(_stand_in, argument)
        return type(argument)(*parts) if hasattr(argument, "_fields") else tuple(parts)
    return argument

"""All private torch API that ``lowering`` uses: the one place a torch release can break, hence longer than others.

Checked with torch 2.11 (CUDA) and 2.13 (CPU). What differs between them is said at its function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch.fx import Graph, Node

from .errors import UnsupportedTorchError

OLDEST, NEWEST = (2, 11), (2, 13)


def torch_version() -> tuple[int, int]:
    """``(major, minor)`` of this torch."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def check_torch_version() -> None:
    """Raise ``UnsupportedTorchError`` unless this torch's internals are known here."""
    if not OLDEST <= torch_version() <= NEWEST:
        low, high = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
        raise UnsupportedTorchError(
            f"lowering: torch {torch.__version__} is not supported; install torch >= {low}, <= {high}.*, "
            "or use the ops without `import lowering`: results are the same, only slower."
        )


# ---- effectful ops: call_function with_effects(token, op, *args, **kwargs) -> (token, *results) ----


def is_effect(node: Node) -> bool:
    """Whether ``node`` is an ordered op, wrapped so that its token chains it to the one before."""
    return node.op == "call_function" and node.target is torch.ops.higher_order.with_effects


def effect_target() -> Any:
    """The higher-order op that wraps an ordered op."""
    return torch.ops.higher_order.with_effects


_EFFECT_NAME = "torch.ops.higher_order.with_effects"


def let_caches_keep_ordered_ops(on: bool) -> None:
    """Let caches of compiled graphs keep graphs with ordered ops, which torch refuses by default.

    torch has no list of higher-order ops that are safe to cache beyond those it marks itself. This one's whole
    meaning is in its arguments, which are part of the key (script objects are refused separately).
    """
    from torch._inductor import config

    marked = dict(config.unsafe_marked_cacheable_functions)
    marked.pop(_EFFECT_NAME, None)
    config.unsafe_marked_cacheable_functions = marked | ({_EFFECT_NAME: "moe_ep"} if on else {})


OpOverload = torch._ops.OpOverload  # what a node's target is


def schema_arguments(op: OpOverload) -> list[Any]:
    """The declared arguments of an op, in order; each has ``name``, ``kwarg_only``, ``default_value``."""
    return list(op._schema.arguments)


def insert_call(graph: Graph, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A call at the graph's insertion point, with the fake result that Inductor expects of every node."""
    from torch._guards import detect_fake_mode
    from torch.utils._pytree import tree_map_only

    fakes = tree_map_only(Node, lambda node: node.meta["val"], (args, kwargs))
    node = graph.call_function(target, args, kwargs)
    mode = detect_fake_mode(fakes) or detect_fake_mode([n.meta.get("val") for n in graph.nodes])
    assert mode is not None, "no node of the graph has a fake result"
    with mode:
        node.meta["val"] = target(*fakes[0], **fakes[1])
    return node


def realize_target() -> Any:
    """The op that makes Inductor keep a value in memory; torch offers it for its own tests only (2.11 to 2.13)."""
    import torch._inductor.test_operators

    return torch.ops._inductor_test.realize.default


def lower_as(op: OpOverload, build: Callable[..., Any]) -> None:
    """Let Inductor build ``op`` from others: ``build(call, *arguments)``, with ``call(target, ...)`` for each of them.

    For an op that stands for so many others that tracing, faking and visiting each as a node of the graph would take
    long. What ``build`` gets and ``call`` returns has ``dtype`` and ``get_size()``; ``call(..., readers=n)`` tells how
    many will read the result, if not one. May be repeated.
    """
    from torch._inductor.ir import TensorBox
    from torch._inductor.lowering import lowerings, register_lowering

    def call(target: Any, *args: Any, readers: int = 1, **kwargs: Any) -> Any:
        result = lowerings[target](*args, **kwargs)
        if readers > 1 and isinstance(result, TensorBox):  # as for nodes: computed once if it depends on much
            result.mark_reuse(readers)
        return result

    if op not in lowerings:
        register_lowering(op, type_promotion_kind=None)(lambda *args: build(call, *args))


def sort_graph(graph: Graph) -> None:
    """Order nodes so that each comes after its inputs, otherwise as they were."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)


def on_fakes(function: Callable, args: tuple, kwargs: dict[str, Any]) -> Callable[[], object]:
    """A call of ``function`` for another thread, with new fake tensors in the place of those that are given.

    They are looked at here and now: what a fake tensor says of its device depends on what its own mode is doing.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._pytree import tree_map_only

    def later(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        options = {"dtype": tensor.dtype, "device": tensor.device}
        return partial(torch.empty_strided, tuple(tensor.shape), tensor.stride(), **options)

    given = tree_map_only(torch.Tensor, later, (args, kwargs))

    def call() -> object:
        with FakeTensorMode():
            new_args, new_kwargs = tree_map_only(partial, lambda new: new(), given)
            return function(*new_args, **new_kwargs)

    return call


# ---- where a pass hooks in, and what the caches of compiled graphs must know about it ----

_SLOT = "post_grad_custom_pre_pass"


def graph_pass_base() -> type:
    """The class that Inductor's cache accepts as a custom pass: it asks it for ``uuid()``."""
    from torch._inductor.custom_graph_pass import CustomGraphPass

    return CustomGraphPass


def installed_pass() -> Any:
    """What is in the slot for passes that run first on the inference graph, or None."""
    from torch._inductor import config

    return getattr(config, _SLOT)


def install_pass(graph_pass: Any) -> None:
    """Put ``graph_pass`` (or None) into the slot."""
    from torch._inductor import config

    setattr(config, _SLOT, graph_pass)


def as_passes(slot: Any) -> tuple[Any, ...]:
    """The user's passes in a slot; from torch 2.13 it may hold a list."""
    if slot is None:
        return ()
    return tuple(slot) if isinstance(slot, list | tuple) else (slot,)


def run_user_pass(user_pass: Any, graph: Graph) -> None:
    """Call a pass the way Inductor would."""
    try:
        from torch._inductor.custom_graph_pass import CustomInferenceAwareGraphPass
    except ImportError:  # older than 2.12
        CustomInferenceAwareGraphPass = ()
    if isinstance(user_pass, CustomInferenceAwareGraphPass):
        user_pass(graph, is_inference=True)
    else:
        user_pass(graph)


def pass_uuid(user_pass: Any) -> Any | None:
    """The user's pass's own id, or None if it has none: then nothing may be cached."""
    return user_pass.uuid() if isinstance(user_pass, graph_pass_base()) else None


# ---- what the compiler did ----


def rounds_every_step(device_type: str) -> bool:
    """Whether compiled pointwise code rounds after each step, as eager does, or once at its end.

    torch 2.11's C++ code drops the casts between fused steps even when asked to keep them.
    """
    from torch._inductor import config

    return bool(config.emulate_precision_casts) and (device_type != "cpu" or torch_version() >= (2, 13))


def compile_counters() -> dict[str, dict[str, int]]:
    """Dynamo's and Inductor's counters since the process started (or the last reset)."""
    from torch._dynamo.utils import counters

    return {group: dict(values) for group, values in counters.items()}


def reset_compiler() -> None:
    """Forget every compiled function, so that the next call compiles again."""
    torch._dynamo.reset()


@contextmanager
def without_caches() -> Iterator[None]:
    """Compile anew: no graph of an earlier run is read, and none is written. Kernels with equal sources are reused."""
    from torch._functorch import config as functorch_config
    from torch._inductor import config

    graphs = config.patch(fx_graph_cache=False, fx_graph_remote_cache=False)
    with graphs, functorch_config.patch(enable_autograd_cache=False):
        yield


def writes_python() -> bool:
    """Whether Inductor writes its calls of ops in Python, not in C++."""
    from torch._inductor import config

    return not config.cpp_wrapper


def output_code(function: Callable, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """``(result, sources)`` of a call, with the code that Inductor generated for it."""
    from torch._inductor.utils import run_and_get_code

    return run_and_get_code(function, *args, **kwargs)


def uncompiled(function: Any) -> Any:
    """The module or function behind a compiled one; anything else as it is."""
    function = getattr(function, "_orig_mod", function)
    return getattr(function, "_torchdynamo_orig_callable", function)


class CompileCounts(NamedTuple):
    """What the compiler did since the process started (or its counters were reset)."""

    graphs: int  # FX graphs that Dynamo captured
    graph_breaks: int
    cuda_graphs: int  # CUDA graphs recorded by mode="reduce-overhead", still alive


def compile_counts() -> CompileCounts:
    """The counts now; a reader takes differences."""
    counters = compile_counters()
    return CompileCounts(
        graphs=counters.get("stats", {}).get("unique_graphs", 0),
        graph_breaks=sum(counters.get("graph_break", {}).values()),
        cuda_graphs=_recorded_cuda_graphs(),
    )


def _recorded_cuda_graphs() -> int:
    if not torch.cuda.is_available():
        return 0
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(torch.cuda.current_device(), create_if_none_exists=False)
    return 0 if manager is None else sum(_count_nodes(root) for root in manager.get_roots())


def _count_nodes(node: Any) -> int:
    children = [child for nodes in node.children.values() for child in nodes]
    return 1 + sum(map(_count_nodes, children))


# ---- what Inductor scheduled ----


class Buffer(NamedTuple):
    """What a loop or a call writes."""

    name: str
    owner: str | None  # the buffer that it is a part of, a result of, or another name for
    users: frozenset[str]  # loops and calls, by name


class Scheduled(NamedTuple):
    """A loop of a kernel that Inductor writes, a call of an op, or a mere name for a result or a part of a buffer."""

    kind: Literal["loop", "call", "name", "nothing"]
    name: str
    called: str  # such as "moe_ep.moe_layer" or "extern_kernels.mm"; "" for what is no call
    origins: tuple[str, ...]  # the ops that it came from
    outputs: tuple[Buffer, ...]
    reads: frozenset[str]  # buffers; graph inputs are left out
    on_cpu: bool
    run: Callable[[Callable], object] | None = None  # a loop's body, see ``_run_body``; None for a template's, a text


@contextmanager
def schedules_seen_by(look: Callable[[list[list[Scheduled]]], object]) -> Iterator[None]:
    """``look`` gets the schedule of every graph that is compiled meanwhile: kernels and calls, in order."""
    from torch._inductor import config

    users_pass = config._post_fusion_custom_pass

    def show(nodes: list[Any]) -> list[Any]:
        nodes = nodes if users_pass is None else users_pass(nodes)
        look([[_scheduled(m) for m in (getattr(node, "snodes", None) or node.get_nodes())] for node in nodes])
        return nodes

    with config.patch(_post_fusion_custom_pass=show):
        yield


def _scheduled(node: Any) -> Scheduled:
    from torch._inductor.scheduler import ExternKernelSchedulerNode, SchedulerNode
    from torch._inductor.virtualized import V

    device, ir_node = node.get_device(), node.node
    outputs = tuple(_buffer(buffer) for buffer in node.get_outputs())
    kind, called, run, reads = "nothing", "", None, set()
    if isinstance(node, SchedulerNode):
        kind, reads = "loop", node.used_buffer_names()
        run = None if node.is_template() else partial(_run_body, node._body)
    elif isinstance(node, ExternKernelSchedulerNode):
        kind, called = ("call", _called(ir_node)) if _runs(ir_node) else ("name", "")
        reads = {dependency.name for dependency in ir_node.get_read_writes().reads}
    origins = [str(o.target) for o in (ir_node.get_origins() if ir_node else ()) if o.op == "call_function"]
    known = frozenset(name for name in reads if name in V.graph.name_to_buffer)
    on_cpu = device is not None and device.type == "cpu"
    return Scheduled(kind, node.get_name(), called, tuple(origins), outputs, known, on_cpu, run)


def _buffer(buffer: Any) -> Buffer:
    users = frozenset(user.get_name() for user in buffer.users)
    return Buffer(buffer.get_name(), _owner(buffer.node), users)


def _owner(buffer: Any) -> str | None:
    from torch._inductor import ir

    if isinstance(buffer, ir.MultiOutput):
        return buffer.inputs[0].get_name()
    layout = getattr(buffer, "layout", None)
    if isinstance(layout, ir.NonOwningLayout):
        return layout.view.get_name()
    if isinstance(layout, ir.MutationLayoutSHOULDREMOVE):
        return layout.get_buffer().get_name()
    aliases = [*buffer.get_inputs_that_alias_output(), *buffer.get_mutation_names()]
    return aliases[0] if aliases else None


def _runs(kernel: Any) -> bool:
    """Whether it is a call, not a name for a result, and of an op that does more than look at its input as a view."""
    from torch._inductor import ir

    return not isinstance(kernel, ir.MultiOutput | ir.MutationOutput) and not kernel.get_inputs_that_alias_output()


def _called(kernel: Any) -> str:
    overload = getattr(kernel, "op_overload", None)
    called = str(getattr(overload, "name", lambda: "")()).replace("::", ".").split(".out")[0]
    return ".".join(called.split(".")[:2]) or getattr(kernel, "python_kernel_name", None) or type(kernel).__name__


def _run_body(body: Any, do: Callable[[str, tuple, dict[str, Any]], Any]) -> None:
    """Run a loop's body with ``do(step, arguments, keywords)`` in the place of every step of it."""
    from torch._inductor.ops_handler import DefaultHandler
    from torch._inductor.virtualized import V

    class Handler(DefaultHandler):
        def _default(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
            return do(name, args, kwargs)

    with V.set_ops_handler(Handler()):
        body(body.iter_vars, body.reduce_vars, allow_same_symbol_in_index=True)

"""The passes, their order, their switches, and the one hook that runs them.

===================  ===========================================================================
hoist_metadata       one ``metadata_update`` a step, however many layers ask for it
fuse_norm            the next block's RMSNorm, and the adds before it, become part of ``rsv_combine``
fuse_combine         a cast, scaling and adds that follow ``rsv_combine`` become part of it
comm_buffers         experts write into the combine's symmetric memory: nothing is copied in between
join_layer           dispatch joins the experts and their combine: the gathered batch is no tensor any more
overlap_shared       a shared expert runs beside its layer, on a stream of its own
thin_shared          a shared expert of few rows runs on kernels that leave room for the layer beside it
route_rows           rows travel only to and from ranks that hold an expert for them
unroll_topk          a router's top-k becomes maxima, which Inductor joins with what is around them
join_attention       norms, rotation and cache writes of a new token become part of its attention
keep_rotations       sine and cosine of the positions once a step, not in every layer
merge_products       a small batch times several weights is one launch
elide_barriers       a layer's entry wait goes where another op met before; says of every wait why it stays or not
agreement            ranks compare what they compiled before they first communicate
===================  ===========================================================================

The order matters: ``hoist_metadata`` first, because it makes layers alike and shortens the chain of tokens;
``fuse_norm`` before ``fuse_combine``, which takes what it leaves; these before ``comm_buffers`` and that before
``join_layer``, because each takes what joined before; ``overlap_shared`` behind them, because it needs the layer's one
op, and adds that have joined it; so does ``route_rows``;
``agreement`` last, because it describes what is left. A graph without ops of ``moe_ep`` is left as it is.

The passes of ``INEXACT`` may change bits (another order of a sum, another order of equal scores); they run only where
``enable(inexact=True)`` allows it, as the decode loop of ``graphs`` does for its own step.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch.fx import Graph

import moe_ops
from moe_ops.workspace import placements_in_use, transports_in_use

from . import torch_compat
from .agreement import Agreement
from .comm_buffers import CommBuffers
from .compile_ahead import compile_ahead
from .effects import effect_ops, moe_nodes
from .elide_barriers import ElideBarriers
from .errors import UnknownPassError
from .fuse_combine import FuseCombine
from .fuse_norm import FuseNorm
from .hoist_metadata import HoistMetadata
from .join_attention import JoinAttention
from .join_layer import JoinLayer
from .keep_rotations import KeepRotations
from .layer_view import view_layer
from .merge_products import MergeProducts
from .overlap_shared import OverlapShared
from .report import RECENT, GraphReport, Outcome, someone_views_layers
from .route_rows import RouteRows
from .thin_shared import ThinShared
from .unroll_topk import UnrollTopk


class Pass(Protocol):
    """One rewrite. ``run`` changes the graph and returns what it did and what it refused."""

    name: str

    def run(self, graph: Graph, rounding: str) -> Outcome: ...


PASSES: tuple[Pass, ...] = (
    HoistMetadata(),
    FuseNorm(),
    FuseCombine(),
    CommBuffers(),
    JoinLayer(),
    OverlapShared(),
    ThinShared(),
    RouteRows(),
    UnrollTopk(),
    JoinAttention(),
    KeepRotations(),
    MergeProducts(),
    ElideBarriers(),
    Agreement(),
)
INEXACT = ("fuse_norm", "unroll_topk", "join_attention", "merge_products", "thin_shared")
ROUNDINGS = ("compiled", "eager")
NAMES = tuple(p.name for p in PASSES)


@dataclass(frozen=True)
class Options:
    """Which passes run, and where joined values are rounded. Part of the key under which compiled graphs are cached."""

    without: frozenset[str] = frozenset()
    rounding: str = "compiled"
    inexact: bool = False

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise UnknownPassError(f"lowering: rounding = {self.rounding!r}; pass one of {', '.join(ROUNDINGS)}.")
        if unknown := sorted(self.without - set(NAMES)):
            raise UnknownPassError(
                f"lowering: no pass is named {', '.join(unknown)}; the names are {', '.join(NAMES)}."
            )

    def runs(self, name: str) -> bool:
        return name not in self.without and (self.inexact or name not in INEXACT)


class Lowering(torch_compat.graph_pass_base()):
    """What Inductor calls with every inference graph: the user's own passes, then ours."""

    def __init__(self, options: Options, user_passes: tuple[Any, ...] = ()):
        self.options, self.user_passes = options, user_passes

    def __call__(self, graph: Graph) -> None:
        for user_pass in self.user_passes:
            torch_compat.run_user_pass(user_pass, graph)
        if next(moe_nodes(graph), None) is not None:
            RECENT.append(run_passes(graph, self.options))
            compile_ahead(graph)

    def uuid(self) -> Any | None:
        """Identity for the caches: sources, options, transports, the user's passes. None: nothing may be cached."""
        user = [torch_compat.pass_uuid(user_pass) for user_pass in self.user_passes]
        if any(uuid is None for uuid in user):
            return None
        return (
            "moe_ep.lowering",
            _hash_of_sources(Path(__file__).parent, Path(moe_ops.__file__).parent),  # passes ask both
            sorted(self.options.without),
            self.options.rounding,
            self.options.inexact,
            sorted(transports_in_use().items()),
            sorted((group, tuple(told.splits)) for group, told in placements_in_use().items()),
            user,
        )


def run_passes(graph: Graph, options: Options = Options()) -> GraphReport:
    """Run all passes that ``options`` leaves on; the graph is valid again afterwards."""
    before, viewed = _count_ops(graph), someone_views_layers()
    layer = view_layer(graph) if viewed else None
    outcomes = []
    for one in PASSES:
        enabled = options.runs(one.name)
        outcomes.append(one.run(graph, options.rounding) if enabled else Outcome(one.name, enabled=False))
    graph.lint()
    groups = list(dict.fromkeys(op.arguments["group_name"] for op in effect_ops(graph)))
    return GraphReport(before, _count_ops(graph), groups, outcomes, layer, view_layer(graph) if viewed else None)


def enable(without: Iterable[str] | None = None, rounding: str | None = None, inexact: bool | None = None) -> None:
    """Make ``torch.compile`` run the passes; safe to call again.

    ``without``: names of passes to leave out (``lowering.NAMES``). ``rounding``: ``"compiled"`` gives the bits of the
    code that torch generates without the passes, ``"eager"`` those of the ops run one by one, and joins more
    (``fuse_combine``). ``inexact``: run the passes of ``INEXACT`` too. None keeps what was chosen before. Passes that
    the user installed in Inductor's ``post_grad_custom_pre_pass`` run first, whether they came before this call or
    (call it again then) after. Functions that are compiled already keep their code until ``torch._dynamo.reset()``.
    Raises ``UnknownPassError``, and ``UnsupportedTorchError`` where torch's internals are not known here.
    """
    torch_compat.check_torch_version()
    torch_compat.let_caches_keep_ordered_ops(True)
    present = torch_compat.as_passes(torch_compat.installed_pass())
    ours = next((p for p in present if isinstance(p, Lowering)), None)
    options = ours.options if ours else Options()
    if without is not None:
        options = replace(options, without=frozenset(without))
    if rounding is not None:
        options = replace(options, rounding=rounding)
    if inexact is not None:
        options = replace(options, inexact=inexact)
    user = [user_pass for p in present for user_pass in (p.user_passes if isinstance(p, Lowering) else (p,))]
    if len(present) == 1 and ours is not None and options == ours.options:
        return
    torch_compat.install_pass(Lowering(options, tuple(user)))


def disable() -> None:
    """Take the passes out again; the user's own stay."""
    torch_compat.let_caches_keep_ordered_ops(False)
    present = torch_compat.as_passes(torch_compat.installed_pass())
    user = [user_pass for p in present for user_pass in (p.user_passes if isinstance(p, Lowering) else (p,))]
    torch_compat.install_pass(user[0] if len(user) == 1 else (user or None))


def enabled_options() -> Options | None:
    """The options in force, or None if the passes are not installed."""
    present = torch_compat.as_passes(torch_compat.installed_pass())
    return next((p.options for p in present if isinstance(p, Lowering)), None)


@contextmanager
def allow_inexact() -> Iterator[None]:
    """What is compiled in here may use the passes of ``INEXACT``; does nothing where no pass is installed."""
    before = enabled_options()
    if before is None:
        yield
        return
    enable(inexact=True)
    try:
        yield
    finally:
        enable(inexact=before.inexact)


def _count_ops(graph: Graph) -> dict[str, int]:
    return dict(Counter(name for name, _ in moe_nodes(graph)))


def _hash_of_sources(*folders: Path) -> str:
    """A hash of every Python file of these packages: any edit gives new cache entries."""
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()

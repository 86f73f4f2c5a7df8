"""Ranks compare what they compiled before they first communicate.

Before::

    token = _make_token()
    m     = with_effects(token, moe_ep.metadata_update, local_tokens, group)

After::

    token = _make_token()
    a     = with_effects(token, moe_ep.agree, local_tokens, "<what this graph communicates>", group)
    m     = with_effects(a[0], moe_ep.metadata_update, local_tokens, group)

``agree`` is an op of its own, first in the chain of tokens, and its text is a literal of the graph. So it also runs
in a process that loads the compiled graph from a cache, and in a captured graph it costs nothing: it talks to the
group's store from the host, once per text, at the first (warm-up or capturing) run, and launches no kernel.

The text names what all ranks must share and nothing else: the sequence of ops with M, H, K, dtypes and group.
The capacity T of a rank may differ, so it is not part of it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch import Tensor
from torch.fx import Graph, Node

from moe_ops import transports
from moe_ops.registration import register_op
from moe_ops.workspace import Workspace, resolve

from .effects import EffectOp, effect_ops, insert_effect, read
from .errors import AgreementError
from .report import Outcome

LONGEST_PERIOD = 6  # ops of one layer, so that N equal layers become one line


@dataclass(frozen=True)
class FirstMeeting:
    """The first ordered op of a graph, and the groups that its ordered ops communicate over."""

    op: EffectOp
    texts: dict[str, str]  # by group
    anchor: Node  # a tensor on the ops' device: it decides where ``agree`` runs

    def replace(self) -> list[str]:
        """Put one ``agree`` per group before it; returns what was done."""
        graph, token = self.op.node.graph, self.op.token
        for group, text in self.texts.items():
            with graph.inserting_before(self.op.node):
                agree = insert_effect(graph, token, OP, (self.anchor, text, group), {}, (None,))
                token = read(agree, 0)
        self.op.node.update_arg(0, token)
        return [f"group {group!r}: {text}" for group, text in self.texts.items()]


class Agreement:
    """See the module's docstring."""

    name = "agreement"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Insert the check; a graph that communicates nothing is left alone."""
        outcome = Outcome(self.name)
        ops = list(effect_ops(graph))
        if ops and not any(op.name == "agree" for op in ops):
            groups = dict.fromkeys(op.arguments["group_name"] for op in ops)
            texts = {group: fingerprint(ops, group) for group in groups}
            outcome.done = FirstMeeting(ops[0], texts, ops[0].arguments["local_tokens"]).replace()
        return outcome


def fingerprint(ops: Sequence[EffectOp], group: str) -> str:
    """What a graph communicates over ``group``, as text that a person can compare."""
    return "; ".join(_compress([_describe(op) for op in ops if op.arguments["group_name"] == group]))


# What must be equal on all ranks. Experts, capacity T and what a rank does with its own rows may differ; a shared
# expert beside a layer is its own business too. ``experts_per_rank`` is what all say of all: it decides who sends what.
SAME_ON_THE_WIRE = {"moe_layer_shared": "moe_layer"}
SHARED = (
    "hidden", "topk_ids", "topk_weights", "expert_output", "norm_weight", "max_tokens", "entry_barrier",
    "experts_per_rank",
)  # fmt: skip


def _describe(op: EffectOp) -> str:
    """An op with the sizes that all ranks share."""
    parts, op_name = [], SAME_ON_THE_WIRE.get(op.name, op.name)
    for name in SHARED:
        value = op.arguments.get(name)
        if isinstance(value, Node):
            parts.append(f"{name}={_describe_tensor(op_name, name, value.meta['val'])}")
        elif value is not None:
            parts.append(f"{name}={value}")
    return f"{op_name}({', '.join(parts)})"


def _describe_tensor(op: str, name: str, tensor: Tensor) -> str:
    sizes = [str(size) for size in tensor.shape]
    if op in ("agv_dispatch", "moe_layer") and name != "norm_weight":
        sizes[0] = "T"  # of this rank
    return f"{str(tensor.dtype).removeprefix('torch.')}[{','.join(sizes)}]"


def _compress(lines: Sequence[str]) -> Iterator[str]:
    """``a b a b c`` becomes ``2 x [a; b]``, ``c``."""
    start = 0
    while start < len(lines):
        period, count = max(
            ((p, _repeats(lines, start, p)) for p in range(1, LONGEST_PERIOD + 1)),
            key=lambda found: (found[0] * found[1] if found[1] > 1 else 0, -found[0]),
        )
        if count == 1:
            period = 1
        block = "; ".join(lines[start : start + period])
        yield f"{count} x [{block}]" if count > 1 else block
        start += period * count


def _repeats(lines: Sequence[str], start: int, period: int) -> int:
    """How often the ``period`` lines from ``start`` on stand there in a row."""
    block = lines[start : start + period]
    if len(block) < period:
        return 1
    repeats = (lines[at : at + period] == block for at in range(start, len(lines), period))
    return sum(1 for _ in itertools.takewhile(bool, repeats))


# ---- the op ----

_agreed: WeakKeyDictionary[Workspace, set[str]] = WeakKeyDictionary()  # what the ranks of a workspace have compared


def agree(anchor: Tensor, text: str, group_name: str) -> None:
    """Return once every rank of the group has come with the same ``text``; at once if they did before.

    Host only, so it is a no-op in a replayed graph. Raises ``AgreementError`` with both texts if they differ, or if
    a rank does not come within the workspace's ``timeout_s``. Ranks may try again after either.
    """
    workspace = resolve(group_name, "agree")
    if workspace.group is None or workspace.world_size == 1 or text in _agreed.setdefault(workspace, set()):
        return
    store, timeout_s = transports.group_store(workspace.group), workspace.config.timeout_s
    meetings, ends = f"moe_ep/agree/{group_name}", time.monotonic() + timeout_s
    while True:
        number = store.add(f"{meetings}/of_rank/{workspace.rank}", 1)
        meeting = _Meeting(store, f"{meetings}/{number}", workspace.rank, workspace.world_size)
        if meeting.took_place(text, ends - time.monotonic()):
            break
        if time.monotonic() >= ends:
            raise AgreementError(
                f"agree: rank {meeting.absent()} did not come to compare graphs within {timeout_s:g} s: it runs "
                f"another graph, or none. Rank {workspace.rank} is about to run: {text}. "
                "Compile and call the same graphs in the same order on every rank."
            )
    for peer, theirs in enumerate(meeting.texts()):
        if theirs != text:
            raise AgreementError(
                f"agree: ranks compiled different communication. Rank {workspace.rank}: {text}. Rank {peer}: {theirs}. "
                "Give all ranks the same model, max_tokens and passes."
            )
    _agreed[workspace].add(text)


@dataclass(frozen=True)
class _Meeting:
    """One attempt of all ranks to compare: it took place, or was called off, for all of them alike.

    Every rank has the same numbers for them, whether or not it came in time: who comes to one that was called off goes
    on to the next.
    """

    store: dist.Store
    key: str
    rank: int
    world_size: int

    def took_place(self, text: str, timeout_s: float) -> bool:
        """Bring ``text``; wait for the last rank, or call the meeting off after ``timeout_s``."""
        self.store.set(f"{self.key}/text/{self.rank}", text)
        outcome = f"{self.key}/outcome"
        if self.store.add(f"{self.key}/came", 1) == self.world_size:
            self.store.compare_set(outcome, "", "met")
        try:
            self.store.wait([outcome], timedelta(seconds=max(timeout_s, 0.001)))
        except RuntimeError:
            self.store.compare_set(outcome, "", "off")  # no effect if the last rank came just now
        return self.store.get(outcome) == b"met"

    def texts(self) -> list[str]:
        """What each rank brought, in rank order."""
        return [self.store.get(f"{self.key}/text/{peer}").decode() for peer in range(self.world_size)]

    def absent(self) -> int:
        """The first rank that did not come."""
        return next((p for p in range(self.world_size) if not self.store.check([f"{self.key}/text/{p}"])), self.rank)


def _agree_fake(anchor: Tensor, text: str, group_name: str) -> None:
    """No result."""


OP: Any = register_op(
    "agree(Tensor anchor, str text, str group_name) -> ()", fake=_agree_fake, cpu=agree, cuda=agree, ordered=True
)

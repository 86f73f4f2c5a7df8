"""What stands between a decode step's projections becomes part of its attention: norms, rotation, cache writes.

Before::

    q = rotate(rms_norm(q0, wq), cos, sin);  k = rotate(rms_norm(k0, wk), cos, sin)     # pointwise and reductions
    keys_1 = aten.index_put(keys, [row, None, column], k)                               # one kernel each, every layer
    values_1 = aten.index_put(values, [row, None, column], v0)
    y = moe_ep.decode_attention(q, keys_1, values_1, mask, scale)
    aten.copy_(keys, keys_1);  aten.copy_(values, values_1)                             # at the end: their new state

After::

    y = moe_ep.rotate_and_attend(q0, k0, v0, wq, wk, eps, eps, cos, sin, keys, values, column, mask, scale)

The op writes the new column into ``keys`` and ``values`` itself. Legal because nobody else reads them: before the op
nothing does, and what the graph returned as their new state is what they then hold. With ``rotate`` the first R of D
columns, c with c + R / 2, as Llama and most others write it; a norm is optional, and what is not recognised stays in
front of the op as it is. The same values up to rounding: fp32 between the steps, rounded once, as Inductor's fused code
does, but the mean of squares is another sum. Refused where a model rotates otherwise (pairs of neighbours) or attends
to something other than its cache (latent attention).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from . import torch_compat
from .effects import bind, erase_unused, is_moe_op
from .hoist_metadata import value_key
from .report import Outcome
from .rotation_patterns import Turned, base_of, match_turned

aten, prims = torch.ops.aten, torch.ops.prims


@dataclass(frozen=True)
class Written:
    """A cache input, what is written into it at ``column (B, 1)`` of each of its rows, and its new state."""

    cache: Node
    column: Node
    value: Node
    state: Node  # the index_put
    end: Node  # the copy_ at the end of the graph


@dataclass(frozen=True)
class NewToken:
    """All that one op replaces."""

    attention: Node
    query: Turned
    key: Turned
    keys: Written
    values: Written

    def replace(self) -> str:
        """Put the op in place; returns what was done."""
        graph, cache = self.attention.graph, self.keys.cache.meta["val"]
        batch, kv_heads, _, depth = cache.shape
        arguments = bind(self.attention.target, self.attention.args, self.attention.kwargs)
        heads, depth_v = arguments["query"].meta["val"].shape[1], self.values.cache.meta["val"].shape[3]

        def shaped(node: Node, *size: int) -> Node:
            return torch_compat.insert_call(graph, aten.reshape.default, node, list(size))

        with graph.inserting_before(self.attention):
            token = (
                shaped(self.query.source, batch, heads, depth), shaped(self.key.source, batch, kv_heads, depth),
                shaped(self.values.value, batch, kv_heads, depth_v), self.query.norm, self.key.norm,
                self.query.eps, self.key.eps,
                *(shaped(angle, batch, self.query.width) for angle in (self.query.cos, self.query.sin)),
                self.keys.cache, self.values.cache, shaped(self.keys.column, batch), arguments["mask"],
                arguments["scale"],
            )  # fmt: skip
            joined = torch_compat.insert_call(graph, torch.ops.moe_ep.rotate_and_attend.default, *token)
        self.attention.replace_all_uses_with(joined)
        done = f"{joined.name}: {self.attention.name}, {self.keys.state.name}, {self.values.state.name}"
        for end in (self.keys.end, self.values.end):
            graph.erase_node(end)
        erase_unused(self.attention)
        return done


class JoinAttention:
    """See the module's docstring."""

    name = "join_attention"

    def run(self, graph: Graph, rounding: str = "compiled") -> Outcome:
        """Rewrite ``graph``; the outcome lists every decode attention."""
        outcome = Outcome(self.name)
        for node in list(graph.nodes):
            if node.op != "call_function" or not is_moe_op(node.target, "decode_attention"):
                continue
            found = _match(node) if _registered() else "moe_ep::rotate_and_attend is not registered"
            if isinstance(found, str):
                outcome.refuse(node, found)
            else:
                outcome.done.append(found.replace())
        return outcome


def _registered() -> bool:
    return hasattr(torch.ops.moe_ep, "rotate_and_attend")


def _match(attention: Node) -> NewToken | str:
    """What the op can take over, or why it cannot."""
    arguments = bind(attention.target, attention.args, attention.kwargs)
    keys, values = (_written(arguments[name], attention) for name in ("key", "value"))
    if keys is None or values is None:
        return "it does not attend to a cache that is an input of the graph and that it alone reads"
    if value_key(base_of(keys.column)) != value_key(base_of(values.column)):
        return "keys and values are written at different columns"
    query, key = match_turned(arguments["query"]), match_turned(keys.value)
    if query is None or key is None:
        return "its query or key is not rotated half by half"
    if any(value_key(base_of(a)) != value_key(base_of(b)) for a, b in ((query.cos, key.cos), (query.sin, key.sin))):
        return "query and key are rotated by different angles"
    return NewToken(attention, query, key, keys, values)


def _written(state: Any, attention: Node) -> Written | None:
    """The cache behind ``state``, if it is an input with the new token put into every row of it."""
    if not isinstance(state, Node) or state.target is not aten.index_put.default:
        return None
    given = bind(state.target, state.args, state.kwargs)
    cache, indices, value = given["self"], given["indices"], given["values"]
    if cache.op != "placeholder" or len(indices) != 3 or indices[1] is not None or given["accumulate"]:
        return None
    if not cache.meta["val"].is_contiguous():
        return None
    ends = [user for user in state.users if user.target is aten.copy_.default and user.args[0] is cache]
    if len(ends) != 1 or set(state.users) != {attention, ends[0]} or set(cache.users) != {state, ends[0]}:
        return None
    batch, kv_heads, _, depth = cache.meta["val"].shape
    row, column = indices[0], indices[2]
    if not _counts_rows(row, batch) or tuple(column.meta["val"].shape) != (batch, 1) or ends[0].users:
        return None
    if tuple(value.meta["val"].shape) != (batch, 1, kv_heads, depth):
        return None
    return Written(cache, column, value, state, ends[0])


def _counts_rows(row: Any, batch: int) -> bool:
    """Whether ``row`` is 0, 1, ..., batch - 1 as (batch, 1)."""
    if not isinstance(row, Node) or tuple(row.meta["val"].shape) != (batch, 1):
        return False
    iota = base_of(row)
    return iota.target is prims.iota.default and (iota.kwargs["start"], iota.kwargs["step"]) == (0, 1)

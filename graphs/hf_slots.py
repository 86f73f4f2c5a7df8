"""A static cache whose rows are slots, each filled to its own length. With ``hf_compat`` the only file that knows
transformers' insides: where its cache layers are written, and where its masks ask how far a query has come.

The model itself is untouched: it asks the cache how long it is, and gets one length per row; it asks for a mask by
its own rule (causal, sliding window, chunks), and the rule is evaluated per row. So every layer keeps its own window,
and what attention sees is a key tensor (B, heads, L, D) and a mask (B, 1, C, L).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import cache_utils, masking_utils

from .errors import UnsupportedModelError
from .hf_compat import Model

_PLAIN = (cache_utils.StaticLayer, cache_utils.StaticSlidingWindowLayer)
_INDEXED = getattr(cache_utils, "StaticIndexedLayer", None)
_RECURRENT = cache_utils.LinearAttentionCacheLayerMixin


class Rows(nn.Module):
    """Which cache columns a forward of R rows and C columns touches; a module, so that its buffers are static.

    ``starts (R,) int64``: column of each row's first token. ``counts (R,) int64``: tokens of a row that count (None:
    all); the others are written to the last column, which no request ever reads. ``slots (R,) int64``: cache row of
    each row (None: row r is slot r).
    """

    starts: Tensor
    counts: Tensor | None
    slots: Tensor | None

    def __init__(self, rows: int, device: torch.device, picked: bool = False):
        super().__init__()
        for name in ("starts", "counts", "slots"):
            value = torch.zeros(rows, dtype=torch.int64, device=device) if picked or name == "starts" else None
            self.register_buffer(name, value, persistent=False)

    def positions(self, columns: int) -> Tensor:
        """Position of every token: (R, C)."""
        return self.starts[:, None] + torch.arange(columns, device=self.starts.device)

    def targets(self, columns: int, length: int) -> Tensor:
        """Cache column of every token: (R, C)."""
        target = self.positions(columns)
        if self.counts is not None:
            counted = torch.arange(columns, device=target.device) < self.counts[:, None]
            target = torch.where(counted, target, length - 1)
        return target.clamp(max=length - 1)


class SlotLayer(cache_utils.StaticLayer):
    """Keys (B, heads, L, D) and values of one layer; written where ``rows`` says. ``owner`` holds the memory."""

    def __init__(self, batch: int, max_len: int, rows: Rows, owner: SlotLayer | None = None):
        super().__init__(max_cache_len=max_len)
        self.slot_count, self.rows, self.owner = batch, rows, owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for all slots, whatever the number of rows of this forward."""
        shapes = ((self.slot_count, *states.shape[1:]) for states in (key_states, value_states))
        super().lazy_initialization(*(key_states.new_empty(shape) for shape in shapes))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store (R, heads, C, D) of each; returns all columns of the same rows: (R, heads, L, D)."""
        store: Any = self.owner or self
        if not store.is_initialized:
            store.lazy_initialization(key_states, value_states)
        columns = self.rows.targets(key_states.shape[2], self.max_cache_len)  # [R, C]
        return self._write(store.keys, columns, key_states), self._write(store.values, columns, value_states)

    def _write(self, stored: Tensor, columns: Tensor, states: Tensor) -> Tensor:
        slots = self.rows.slots
        row = torch.arange(columns.shape[0], device=columns.device) if slots is None else slots
        stored[row[:, None], :, columns] = states.transpose(1, 2).to(stored.dtype)
        return stored if slots is None else stored[slots]

    def get_seq_length(self) -> Any:
        """One length per row, (R,): where the query of a row begins."""
        return self.rows.starts

    def reset(self) -> None:
        """Nothing to clear: what a slot held before lies behind its mask."""


class IndexedSlotLayer(SlotLayer):
    """A ``SlotLayer`` that also stores the keys of a sparse-attention indexer: (B, L, D)."""

    def __init__(self, batch: int, max_len: int, rows: Rows, owner: SlotLayer | None = None):
        super().__init__(batch, max_len, rows, owner)
        self.indexer_keys: Any = None
        self.is_indexer_initialized = False
        self.indexer_cumulative_length = torch.tensor(0)  # transformers' own counter, not used here

    def update_indexer(self, indexer_key_states: Tensor) -> Tensor:
        """Store (R, C, D); returns (R, L, D)."""
        store: Any = self.owner or self
        if not store.is_indexer_initialized:
            example = indexer_key_states.new_empty(self.slot_count, 1, indexer_key_states.shape[-1])
            cache_utils.StaticIndexedLayer.lazy_initialization_indexer(store, example)
        columns = self.rows.targets(indexer_key_states.shape[1], self.max_cache_len)
        keys: Tensor = store.indexer_keys
        return self._write(keys[:, None], columns, indexer_key_states[:, None])[:, 0]


class SlotCache(cache_utils.Cache):
    """What a model is given as ``past_key_values``; two of them may share one memory (decode and prefill)."""

    def __init__(self, config: Any, batch: int, max_len: int, rows: Rows, owner: SlotCache | None = None):
        plan = transformers.StaticCache(config=config, max_cache_len=max_len).layers
        owners = owner.layers if owner is not None else [None] * len(plan)
        super().__init__(layers=[_slot_layer(*pair, batch, max_len, rows) for pair in zip(plan, owners, strict=True)])
        self.recurrent = any(isinstance(layer, _RECURRENT) and not _is_empty(config, i) for i, layer in enumerate(plan))

    def get_query_offset(self, layer_idx: int = 0) -> Any:
        """Where the queries begin, per row (R,)."""
        return self.get_seq_length(layer_idx)

    def clear_slots(self, slots: Tensor) -> None:
        """Forget the recurrent states of these slots (n,); keys and values need no clearing."""
        for state in self._recurrent_states():
            state.index_fill_(0, slots, 0)

    def begin_recurrence(self) -> None:
        """From now on every forward continues from the states, which are zero for a slot that begins."""
        for layer in self.layers:
            if isinstance(layer, _RECURRENT):
                layer.has_previous_state = dict.fromkeys(layer.has_previous_state, True)

    def _recurrent_states(self) -> list[Tensor]:
        layers = [layer for layer in self.layers if isinstance(layer, _RECURRENT)]
        states = [s for layer in layers for s in (*layer.conv_states.values(), *layer.recurrent_states.values())]
        return [state for state in states if state is not None]


def _is_empty(config: Any, index: int) -> bool:
    """True for a layer without any state, which transformers gives a recurrent placeholder."""
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
    return kinds is not None and kinds[index] in ("moe", "mlp")


def _slot_layer(planned: Any, owner: Any, batch: int, max_len: int, rows: Rows) -> Any:
    """The layer that takes the place of one of ``StaticCache``."""
    if type(planned) in _PLAIN:
        return SlotLayer(batch, max_len, rows, owner)
    if _INDEXED is not None and type(planned) is _INDEXED:
        return IndexedSlotLayer(batch, max_len, rows, owner)
    if type(planned) is cache_utils.LinearAttentionLayer:
        return owner or planned
    raise UnsupportedModelError(
        f"a decode loop has no per-slot form of cache layers of type {type(planned).__name__}; use model.generate."
    )


def _per_row(shared: Callable[..., Any]) -> Callable[..., Any]:
    """A mask function of transformers that also takes one query offset per row."""

    def mask(
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: Any = 0,
        kv_offset: int = 0,
        mask_function: Callable = masking_utils.causal_mask_function,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if not isinstance(q_offset, Tensor) or q_offset.dim() == 0:
            return shared(
                batch_size=batch_size,
                q_length=q_length,
                kv_length=kv_length,
                q_offset=q_offset,
                kv_offset=kv_offset,
                mask_function=mask_function,
                attention_mask=attention_mask,
                **kwargs,
            )
        device = q_offset.device
        row = torch.arange(batch_size, device=device)[:, None, None, None]
        # Padding may lie beyond the end; it must see something, or it turns into NaN and poisons the last column.
        query = (q_offset[:, None] + torch.arange(q_length, device=device)).clamp(max=kv_length - 1)
        query = query[:, None, :, None]  # [R, 1, C, 1]
        key = torch.arange(kv_length, device=device)[None, None, None, :]
        seen = mask_function(row, torch.zeros_like(row[:1]), query, key)
        seen = seen.expand(batch_size, 1, q_length, kv_length)  # [R, 1, C, L] bool
        if shared is not masking_utils.eager_mask:
            return seen
        dtype = kwargs.get("dtype", torch.float32)
        return torch.where(seen, torch.zeros((), dtype=dtype, device=device), torch.finfo(dtype).min)

    return mask


# Attention implementations that read a mask; the others (flash, flex) have no per-row form here.
_MASKS = {name: _per_row(getattr(masking_utils, f"{name}_mask")) for name in ("sdpa", "eager")}
for _name, _mask in _MASKS.items():
    masking_utils.ALL_MASK_ATTENTION_FUNCTIONS.register(_name, _mask)


def adapt_attention(model: Model) -> None:
    """Let the model's masks differ between rows; ``UnsupportedModelError`` where its attention reads no such mask."""
    name = model.config.get_text_config(decoder=True)._attn_implementation
    known = masking_utils.ALL_MASK_ATTENTION_FUNCTIONS
    if name in known and known[name] is masking_utils.sdpa_mask:  # an implementation that borrowed its mask
        known.register(name, _MASKS["sdpa"])
    if name not in known or known[name] not in _MASKS.values():
        raise UnsupportedModelError(
            f"a decode loop cannot use the attention implementation {name!r}; "
            f"load the model with attn_implementation={' or '.join(map(repr, _MASKS))}."
        )

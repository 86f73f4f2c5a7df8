"""A cache of fixed size, for tests that feed a model step by step without ``DecodeLoop``."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import cache_utils


def full_length_cache(config: Any, max_len: int) -> Any:
    """A ``StaticCache`` whose sliding-window layers hold ``max_len`` tokens like the others.

    A sliding layer keeps its fill level as a Python int: an integer graph input that changes every step.
    The attention mask still limits the window.
    """
    cache = transformers.StaticCache(config=config, max_cache_len=max_len)
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, cache_utils.StaticSlidingWindowLayer):
            assert type(layer) is cache_utils.StaticSlidingWindowLayer, type(layer)
            cache.layers[index] = cache_utils.StaticLayer(max_cache_len=max_len)
    return cache

"""Dense keys and values written into pages: in any order, free pages between, NaN wherever nothing is stored."""

from __future__ import annotations

from typing import Any

import numpy as np

import attn_numba as an


def stored(k: np.ndarray, v: np.ndarray, lengths: Any, code: str = "float32", page: int = 64) -> an.PagedKVCache:
    """Return a cache that holds the first tokens of each sequence."""
    B, heads, _, head_size = k.shape
    cache = an.PagedKVCache(B, heads, head_size, v.shape[-1], dtype=code, page=page)
    pool = cache._pool
    pool.wipes = True
    pool.reserve(2 * sum(-(-int(length) // page) for length in lengths))
    pool._free = np.random.default_rng(0).permutation(len(pool)).tolist()
    cache.append(k, v, lengths=lengths)
    return cache

"""Caches of keys and values."""

from __future__ import annotations

from typing import Any

from attn_numba.caches.arguments import at_least
from attn_numba.caches.sequences import Cache

__all__ = ["KVCache", "PagedKVCache"]

CHUNK = 256  # tokens by which a sequence without a capacity grows


class KVCache(Cache):
    """Keys and values of some sequences, each contiguous up to its capacity.

    Parameters
    ----------
    sequences : int
        How many; `fork` adds more.
    key_heads, head_size : int
        Key heads and their size D.
    value_size : int, optional
        E; without it D.
    dtype : {"float32", "float64", "float16", "bfloat16", "int8", "int4"}
        How numbers are stored; int8 takes 10 bits for a number, int4 takes 10 for keys and 6 for values (see Notes).
    capacity : int
        Tokens that a sequence is expected to hold; it may grow beyond, by pieces of this size (at least 256), without
        being moved.

    Notes
    -----
    Any number of threads may decode from a cache at the same time as long as none changes it.

    Integers are codes of the row times a Hadamard matrix, with a scale and a center for each token, head and 16
    numbers. Keys are never stored in four bits: their errors pass through the exponential, and on real data outputs
    would err by 10 % and more.

    Examples
    --------
    >>> import numpy as np
    >>> cache = KVCache(2, key_heads=1, head_size=4)
    >>> cache.append(np.ones((2, 1, 3, 4)), np.ones((2, 1, 3, 4)), lengths=[3, 1])
    >>> cache.fork(0), cache.lengths.tolist()
    (2, [3, 1, 3])
    """

    _kind = 0

    def __init__(
        self, sequences: int, key_heads: int, head_size: int, value_size: int | None = None, *, dtype: Any = "float32",
        capacity: int = 0,
    ) -> None:  # fmt: skip
        page = max(at_least("capacity", capacity, 0), CHUNK)
        super().__init__(sequences, key_heads, head_size, value_size, dtype, page, None)
        if capacity:
            self._pool.reserve(len(self))


class PagedKVCache(Cache):
    """Keys and values of some sequences in pages of one size, which sequences with a common beginning share.

    Parameters
    ----------
    sequences : int
        How many; `fork` adds more.
    key_heads, head_size : int
        Key heads and their size D.
    value_size : int, optional
        E; without it D.
    dtype : {"float32", "float64", "float16", "bfloat16", "int8", "int4"}
        How numbers are stored; int8 takes 10 bits for a number, int4 takes 10 for keys and 6 for values (see Notes).
    capacity : int
        Tokens of each sequence for which memory is taken at once.
    page : int
        Tokens of a page.
    pages : int, optional
        How many pages there are; without it, as many as are needed.

    Notes
    -----
    Any number of threads may decode from a cache at the same time as long as none changes it.

    Integers are codes of the row times a Hadamard matrix, with a scale and a center for each token, head and 16
    numbers. Keys are never stored in four bits: their errors pass through the exponential, and on real data outputs
    would err by 10 % and more.

    References
    ----------
    W. Kwon et al. (2023), "Efficient memory management for large language model serving with PagedAttention".

    Examples
    --------
    >>> import numpy as np
    >>> cache = PagedKVCache(1, key_heads=1, head_size=4, page=2, pages=3)
    >>> cache.append(np.ones((1, 3, 4)), np.ones((1, 3, 4)))
    >>> cache.fork(0), cache.free_pages  # both hold the same two pages
    (1, 1)
    >>> cache.append(np.ones((2, 1, 1, 4)), np.ones((2, 1, 1, 4)))  # into a copy, and into the page itself
    >>> cache.lengths.tolist(), cache.free_pages
    ([4, 4], 0)
    """

    _kind = 1

    def __init__(
        self, sequences: int, key_heads: int, head_size: int, value_size: int | None = None, *, dtype: Any = "float32",
        capacity: int = 0, page: int = 64, pages: int | None = None,
    ) -> None:  # fmt: skip
        limit = None if pages is None else at_least("pages", pages, 0)
        page, capacity = at_least("page", page, 1), at_least("capacity", capacity, 0)
        super().__init__(sequences, key_heads, head_size, value_size, dtype, page, limit)
        self._pool.reserve(len(self) * -(-capacity // page) if limit is None else limit)

    @property
    def page(self) -> int:
        """Tokens of a page."""
        return self._pool.page

    @property
    def free_pages(self) -> int | None:
        """How many pages can still be had; None where there is no limit."""
        return self._pool.free

"""A cache as named arrays, for a file, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from attn_numba.caches.pool import PARTS, Pool
from attn_numba.rules.data import AnyArray
from attn_numba.rules.storage import CODES

__all__ = ["KINDS", "State", "as_arrays", "from_arrays"]

VERSION = 1
KINDS = ("KVCache", "PagedKVCache")
SIZES = ("version", "kind", "dtype", "key_heads", "head_size", "value_size", "page", "limit")


class State(NamedTuple):
    """What makes a cache.

    Attributes
    ----------
    kind : int
        Place of its class in `KINDS`.
    dtype : str
        How numbers are stored: a name of `CODES`.
    sizes : tuple of int
        Key heads, head size and value size.
    pool : Pool
        The pages.
    table : int array (sequences, pages)
        The pages of each sequence.
    lengths : int array (sequences,)
        Their tokens.
    freed : list of int
        The freed sequences.
    """

    kind: int
    dtype: str
    sizes: tuple[int, int, int]
    pool: Pool
    table: AnyArray
    lengths: AnyArray
    freed: list[int]


def as_arrays(state: State) -> dict[str, AnyArray]:
    """Return the arrays that `from_arrays` takes: of the pages, only those that a sequence holds."""
    pool, counts = state.pool, -(-state.lengths // state.pool.page)
    used = np.arange(state.table.shape[1]) < counts[:, None]
    pages, table = np.unique(state.table[used], return_inverse=True)
    numbers = np.full(used.shape, -1, np.int64)
    numbers[used] = table
    limit = -1 if pool.limit is None else pool.limit
    sizes = VERSION, state.kind, list(CODES).index(state.dtype), *state.sizes, pool.page, limit
    found = {
        "sizes": np.array(sizes, np.int64),
        "table": numbers[:, : counts.max(initial=0)],
        "lengths": state.lengths,
        "freed": np.array(state.freed, np.int64),
    }
    for name in PARTS:
        shape, dtype = pool.stored(name)
        found[name] = np.array([pool.part(name, p) for p in pages.tolist()], dtype).reshape(len(pages), *shape)
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def from_arrays(arrays: Mapping[str, Any], where: str) -> State:
    """Return what `as_arrays` was given.

    Raises
    ------
    ValueError
        If the arrays are none of a cache, named by `where`.
    """
    sizes = _named(arrays, "sizes", (len(SIZES),), np.int64, where)
    version, kind, number, key_heads, head_size, value_size, page, limit = sizes.tolist()
    if version != VERSION or kind not in range(len(KINDS)) or not 0 <= number < len(CODES):
        raise ValueError(f"{where}: sizes are {sizes.tolist()}; needed version {VERSION} of a cache that is known")
    if min(key_heads, head_size, value_size, page) < 1 or limit < -1:
        raise ValueError(f"{where}: sizes are {sizes.tolist()}; needed at least 1 of {', '.join(SIZES[3:7])}")
    dtype = list(CODES)[number]
    lengths = _named(arrays, "lengths", (None,), np.int64, where)
    table = _named(arrays, "table", (len(lengths), None), np.int64, where)
    freed = _named(arrays, "freed", (None,), np.int64, where)
    pool = Pool(key_heads, page, (head_size, value_size), CODES[dtype], None if limit < 0 else limit)
    counts = -(-lengths // page)
    if lengths.min(initial=0) < 0 or counts.max(initial=0) > table.shape[1]:
        raise ValueError(
            f"{where}: lengths go from {lengths.min()} to {lengths.max()}; table has {table.shape[1]} pages"
        )
    held = table[np.arange(table.shape[1]) < counts[:, None]]
    count = len(np.asarray(arrays["keys"])) if "keys" in arrays else 0
    if held.size and not 0 <= held.min() <= held.max() < count:
        raise ValueError(f"{where}: table names pages {held.min()} to {held.max()}; there are {count}")
    if freed.size and (not 0 <= freed.min() <= freed.max() < len(lengths) or lengths[freed].any()):
        raise ValueError(f"{where}: freed is {freed.tolist()}; needed sequences without tokens")
    pool.reserve(count)
    pages = [pool.take() for _ in range(count)]
    for name in PARTS:
        shape, kind_of = pool.stored(name)
        stored = _named(arrays, name, (count, *shape), kind_of, where)
        for n, at in enumerate(pages):
            pool.part(name, at)[...] = stored[n]
    pool.hold(np.array(pages, np.int64)[held] if held.size else held)
    pool.release(np.array(pages, np.int64))
    places = np.array([*pages, 0], np.int64)[table]
    return State(kind, dtype, (key_heads, head_size, value_size), pool, places, lengths.copy(), freed.tolist())


def _named(arrays: Mapping[str, Any], name: str, shape: tuple[int | None, ...], dtype: Any, where: str) -> AnyArray:
    if name not in arrays:
        raise ValueError(f"{where} has no {name}; needed a file that a cache was saved to")
    array = np.asarray(arrays[name])
    fits = array.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, array.shape, strict=True))
    if not fits or array.dtype != dtype:
        needed = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(
            f"{where}: {name} has shape {array.shape} and dtype {array.dtype}; needed ({needed}), {np.dtype(dtype)}"
        )
    return array

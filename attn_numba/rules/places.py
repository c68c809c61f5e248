"""Where scores are: the sizes of a call and the indices and positions of its scores."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attn_numba.rules.formula import symbol


class Sizes(NamedTuple):
    """Sizes of one call: sequences, query heads, key heads, queries, keys, head size, value size."""

    B: int
    H: int
    Hk: int
    M: int
    N: int
    D: int
    E: int


class Places(NamedTuple):
    """Where scores are: arrays that broadcast to (B, H, M, N), or symbols.

    `row_i` and `row_j` are rows of q and of k, `i` and `j` their positions.
    """

    b: Any
    h: Any
    i: Any
    j: Any
    row_i: Any
    row_j: Any


SYMBOLS = Places(*(symbol(name) for name in Places._fields))


def places_of(sizes: Sizes, query_offset: Any = 0, key_offset: Any = 0) -> Places:
    """Return all places of a call as int32 arrays that broadcast to (B, H, M, N).

    Parameters
    ----------
    sizes : Sizes
        Sizes of the call.
    query_offset, key_offset : int or int array (B,)
        Position of query row 0 and of key row 0.
    """
    row_i = np.arange(sizes.M, dtype=np.int32)[None, None, :, None]
    row_j = np.arange(sizes.N, dtype=np.int32)[None, None, None, :]
    return Places(
        b=np.arange(sizes.B, dtype=np.int32)[:, None, None, None],
        h=np.arange(sizes.H, dtype=np.int32)[None, :, None, None],
        i=np.asarray(query_offset, np.int32).reshape(-1, 1, 1, 1) + row_i,
        j=np.asarray(key_offset, np.int32).reshape(-1, 1, 1, 1) + row_j,
        row_i=row_i,
        row_j=row_j,
    )

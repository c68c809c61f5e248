"""Weights, masks and entropies made small enough to look at: means over cells of queries and keys.

No picture has room for 16384 x 16384 weights, and no memory either. What is here goes through them in blocks of query
rows and keeps one mean for each cell, a rectangle of neighboring queries and keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from attn_numba.problem import check_shape
from attn_numba.rules import as_mask, places_of
from attn_numba.rules.arguments import check_offsets
from attn_numba.rules.data import AnyArray, as_array, whole_number

__all__ = ["Averages", "average", "average_entropy", "average_mask", "average_weights"]

CELLS = 512
"""Cells along queries and along keys, at most."""
BLOCK = 2**22
"""Weights that are held at a time, about."""


class Averages(NamedTuple):
    """Numbers for pairs of query and key, one mean for each cell.

    Parameters
    ----------
    values : array (..., m, n)
        The means. The last cell of an axis may be a part of one; its mean is over what it has.
    shape : (int, int)
        Queries and keys that were averaged: M, N.
    cell : (int, int)
        Queries and keys of a cell; (1, 1) if every pair has its own.
    """

    values: AnyArray
    shape: tuple[int, int]
    cell: tuple[int, int]

    def at(self, *places: int) -> Averages:
        """Return the averages at a place of the leading axes; an axis of size 1 stands for all of its places."""
        sizes = self.values.shape[: len(places)]
        index = tuple(place if size > 1 else 0 for place, size in zip(places, sizes, strict=True))
        return self._replace(values=self.values[index])


def average(array: Any, cells: int = CELLS) -> Averages:
    """Return the means over cells of an array at hand.

    Parameters
    ----------
    array : array (..., M, N)
        Real numbers or truth values, of which the mean is the part that is True.
    cells : int
        Cells along each of the last two axes, at most.

    Returns
    -------
    Averages
        The array itself where it is small enough and not of truth values.

    Raises
    ------
    TypeError
        If `array` is not of real numbers or truth values, or `cells` is no integer.
    ValueError
        If it has fewer than two axes, or `cells` is below 1.

    Examples
    --------
    >>> import numpy as np
    >>> average(np.arange(12).reshape(3, 4), cells=2)
    Averages(values=array([[ 2.5,  4.5],
           [ 8.5, 10.5]], dtype=float32), shape=(3, 4), cell=(2, 2))
    """
    numbers = as_array(array, "average", "array")
    if numbers.dtype.kind not in "biuf":
        raise TypeError(f"average: array has dtype {numbers.dtype}; needed real numbers or truth values")
    if numbers.ndim < 2:
        raise ValueError(f"average: array has shape {numbers.shape}; needed (..., M, N)")
    M, N = numbers.shape[-2:]
    cell = _cell(M, N, cells)
    return Averages(means(numbers, cell), (M, N), cell)


def average_weights(q: Any, k: Any, *, cells: int = CELLS, **rules: Any) -> Averages:
    """Return the means over cells of the attention weights, never holding more than a block of their rows.

    Except with ``backend="reference"``, which is dense.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries; missing leading axes count as 1.
    k : array (B, Hk, N, D)
        Keys.
    cells : int
        Cells along queries and along keys, at most.
    **rules
        As `attn_numba.weights_of` takes them.

    Returns
    -------
    Averages
        Of (B, H, M, N), in the rank of `q`.

    Raises
    ------
    TypeError, ValueError, NotImplementedError
        As `attn_numba.weights_of`; and as `average` for `cells`.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> average_weights(np.zeros((4, 8)), np.zeros((4, 8)), cells=2, mask=an.Causal()).values.round(4)
    array([[0.5   , 0.    ],
           [0.2917, 0.2083]])
    """
    from attn_numba.explain import weights_of

    q, k = as_array(q, "average_weights", "q"), as_array(k, "average_weights", "k")
    if min(q.ndim, k.ndim) < 2:
        raise ValueError(f"average_weights: q has shape {q.shape}, k {k.shape}; needed (B, H, M, D) and (B, Hk, N, D)")
    M, N = q.shape[-2], k.shape[-2]
    cell = _cell(M, N, cells)
    heads = int(np.prod(q.shape[:-2]))
    # the reference is dense and computes all rows, whichever are asked for: it is asked once
    row_blocks = [slice(0, M)] if rules.get("backend") == "reference" else _row_blocks(M, heads * N, cell[0])
    blocks = [means(weights_of(q, k, rows=rows, **rules), cell) for rows in row_blocks]
    return Averages(np.concatenate(blocks, axis=-2), (M, N), cell)


def average_mask(
    mask: Any, shape: Sequence[int], query_offset: Any = None, key_offset: Any = 0, *, cells: int = CELLS
) -> Averages:
    """Return which part of each cell a mask allows, never holding more than a block of its rows.

    Parameters
    ----------
    mask : mask rule, bool array or None
        As `attn_numba.attention` takes it.
    shape : (B, H, M, N)
        Sequences, query heads, queries, keys.
    query_offset, key_offset : int or int array (B,), optional
        As `attn_numba.attention` takes them.
    cells : int
        Cells along queries and along keys, at most.

    Returns
    -------
    Averages
        0 where no pair of the cell is allowed, 1 where all are; (B, H, m, n), with size 1 for the B or H on which the
        mask does not depend.

    Raises
    ------
    TypeError, ValueError
        As `attn_numba.mask_array`; and as `average` for `cells`.

    Examples
    --------
    >>> import attn_numba as an
    >>> average_mask(an.Causal(), (2, 8, 4, 4), cells=2).values
    array([[[[0.75, 0.  ],
             [1.  , 0.75]]]], dtype=float32)
    """
    sizes = check_shape(shape)
    rule = as_mask(mask)
    query_at, key_at = check_offsets(query_offset, key_offset, sizes, () if rule is None else (rule,))
    cell = _cell(sizes.M, sizes.N, cells)
    blocks = []
    if rule is not None:
        rule.check(sizes, query_at, key_at)
    places = places_of(sizes, query_at, key_at)
    for rows in _row_blocks(sizes.M, sizes.B * sizes.H * sizes.N, cell[0]):
        part = places._replace(i=places.i[:, :, rows], row_i=places.row_i[:, :, rows])
        allowed = np.ones((1, 1, 1, 1), bool) if rule is None else rule.evaluate(part, sizes)
        allowed = allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)
        whole = (*allowed.shape[:2], part.row_i.shape[2], sizes.N)
        blocks.append(means(np.broadcast_to(allowed, whole), cell))
    return Averages(np.concatenate(blocks, axis=-2), (sizes.M, sizes.N), cell)


def average_entropy(entropies: Sequence[Any], counted: Any = None) -> AnyArray:
    """Return the mean entropy of the queries for each layer and head.

    Parameters
    ----------
    entropies : sequence of arrays (B, H, M)
        One for each layer, as `attn_numba.entropy` returns them; missing leading axes count as 1.
    counted : bool array that broadcasts to (B, M), optional
        The queries that count, such as those that are no padding; without it, all.

    Returns
    -------
    array (layers, H)
        In nats; NaN for a mean over no query.

    Raises
    ------
    TypeError
        If `counted` is not of truth values.
    ValueError
        If there is no layer, or shapes differ between layers or do not fit `counted`.

    Examples
    --------
    Two layers of one head; the second of the two queries is padding.

    >>> import numpy as np
    >>> average_entropy([np.array([[[0.0, 1.0]]]), np.array([[[0.5, 1.0]]])], counted=[True, False])
    array([[0. ],
           [0.5]])
    """
    arrays = [as_array(entropy, "average_entropy", "entropies") for entropy in entropies]
    if not arrays:
        raise ValueError("average_entropy: entropies is empty; needed at least one layer")
    if odd := [array.shape for array in arrays if array.shape != arrays[0].shape or not 1 <= array.ndim <= 3]:
        raise ValueError(
            f"average_entropy: entropies have shapes {arrays[0].shape} and {odd[0]}; needed (B, H, M), all"
        )
    stacked = np.stack([array.reshape((1,) * (3 - array.ndim) + array.shape) for array in arrays])
    B, _, M = stacked.shape[1:]
    chosen = np.asarray(True if counted is None else counted)
    if chosen.dtype != bool:
        raise TypeError(f"average_entropy: counted has dtype {chosen.dtype}; needed truth values")
    try:
        chosen = np.broadcast_to(chosen, (B, M))
    except ValueError:
        raise ValueError(f"average_entropy: counted has shape {chosen.shape}; needed ({B}, {M})") from None
    rows = stacked.swapaxes(1, 2)[..., chosen]  # (layers, H, counted queries)
    return rows.mean(-1) if rows.shape[-1] else np.full(rows.shape[:2], np.nan)


def _cell(M: int, N: int, cells: int) -> tuple[int, int]:
    """Return how many queries and keys a cell has."""
    count = whole_number("average", "cells", cells)
    if count < 1:
        raise ValueError(f"average: cells is {count}; needed at least 1")
    return max(1, -(-M // count)), max(1, -(-N // count))


def _row_blocks(M: int, row_size: int, cell_rows: int) -> Iterator[slice]:
    """Yield slices of the query rows: whole cells, of about `BLOCK` numbers together."""
    step = cell_rows * max(1, BLOCK // max(1, row_size * cell_rows))
    return (slice(start, min(M, start + step)) for start in range(0, max(1, M), step))


def means(array: AnyArray, cell: tuple[int, int]) -> AnyArray:
    """Return the means over cells of the last two axes; of truth values, the part of a cell that is True."""
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float32)
    for axis, size in zip((-1, -2), cell[::-1], strict=True):
        starts = np.arange(0, array.shape[axis], size)
        if size > 1:
            counts = np.diff(starts, append=array.shape[axis]).astype(array.dtype)
            array = np.add.reduceat(array, starts, axis) / (counts if axis == -1 else counts[:, None])
    return array

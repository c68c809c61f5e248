"""Sequences of unequal lengths: one after the other, or side by side and filled up."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_numba.problem import host_array
from attn_numba.rules import Padding
from attn_numba.rules.data import AnyArray

__all__ = ["check_starts", "pack", "unpack"]


def pack(padded: Any, lengths: Any) -> tuple[AnyArray, AnyArray]:
    """Return the sequences of a filled up array one after the other, and where each begins.

    Parameters
    ----------
    padded : array (B, L, ...)
        Sequences side by side, such as (B, L, H, D); float64, float32, float16 or bfloat16.
    lengths : int array (B,)
        How many of the L rows of each are its own, from the first on.

    Returns
    -------
    packed : array (T, ...)
        Their rows, T in all; a copy.
    starts : int64 array (B + 1,)
        The first row of each sequence, then T.

    Raises
    ------
    TypeError
        For arguments of the wrong kind.
    ValueError
        For lengths that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> packed, starts = pack(np.array([[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]), [2, 1])
    >>> packed, starts
    (array([1., 2., 3.]), array([0, 2, 3]))
    """
    array = host_array(padded, "padded")
    if array.ndim < 2:
        raise ValueError(f"padded has shape {array.shape}; needed at least two axes, (B, L, ...)")
    counts = np.asarray(lengths)
    if counts.ndim != 1 or (counts.dtype.kind not in "iu" and counts.size):
        raise TypeError(f"lengths is {lengths!r}; needed a list of whole numbers, one for each sequence")
    B, L = array.shape[:2]
    if len(counts) != B:
        raise ValueError(f"lengths has {len(counts)} numbers; padded has {B} sequences")
    if B and not 0 <= counts.min() <= counts.max() <= L:
        raise ValueError(f"lengths are {counts.min()} to {counts.max()}; needed 0 to {L}, the rows of padded")
    starts = np.zeros(B + 1, np.int64)
    np.cumsum(counts, out=starts[1:])
    packed = np.empty((int(starts[-1]), *array.shape[2:]), array.dtype)
    for b in range(B):
        packed[starts[b] : starts[b + 1]] = array[b, : counts[b]]
    return packed, starts


def unpack(packed: Any, starts: Any) -> tuple[AnyArray, Padding]:
    """Return sequences that lie one after the other side by side, filled up with zeros, and the mask of the filling.

    Parameters
    ----------
    packed : array (T, ...)
        Their rows, such as (T, H, D); float64, float32, float16 or bfloat16.
    starts : int array (B + 1,)
        The first row of each sequence, then T.

    Returns
    -------
    padded : array (B, L, ...)
        L is the longest length.
    mask : Padding
        Excludes the filling, as keys and as queries.

    Raises
    ------
    TypeError
        For arguments of the wrong kind.
    ValueError
        For starts that do not fit.

    Examples
    --------
    >>> import numpy as np
    >>> padded, mask = unpack(np.array([1.0, 2.0, 3.0]), [0, 2, 3])
    >>> padded, mask.key_lengths
    (array([[1., 2.],
           [3., 0.]]), array([2, 1], dtype=int32))
    """
    array = host_array(packed, "packed")
    if array.ndim < 1:
        raise ValueError("packed has no axes; needed at least one, (T, ...)")
    begins = check_starts("starts", starts, len(array), "packed")
    counts = np.diff(begins)
    return spread(array, begins), Padding(counts, query_lengths=counts)


def spread(packed: AnyArray, starts: AnyArray) -> AnyArray:
    """Return what `unpack` does, without the mask and for starts that are known to fit."""
    counts = np.diff(starts)
    padded = np.zeros((len(counts), int(counts.max(initial=0)), *packed.shape[1:]), packed.dtype)
    for b, count in enumerate(counts.tolist()):
        padded[b, :count] = packed[starts[b] : starts[b + 1]]
    return padded


def check_starts(name: str, given: Any, rows: int, owner: str) -> AnyArray:
    """Return where sequences begin in an array of so many rows, int64 ``(B + 1,)``.

    Raises
    ------
    TypeError
        If these are not integers.
    ValueError
        If they do not begin with 0, end with the number of rows and never become less.
    """
    starts = np.asarray(given)
    if starts.ndim != 1 or starts.dtype.kind not in "iu":
        raise TypeError(f"{name} is {given!r}; needed a list of whole numbers, (B + 1,)")
    starts = starts.astype(np.int64)
    if not len(starts) or starts[0] != 0 or starts[-1] != rows:
        ends = f"from {starts[0]} to {starts[-1]}" if len(starts) else "empty"
        raise ValueError(f"{name} is {ends}; needed 0 to {rows}, the rows of {owner}")
    falls = np.flatnonzero(np.diff(starts) < 0)
    if len(falls):
        b = int(falls[0])
        raise ValueError(f"{name} has {starts[b]} and then {starts[b + 1]}; needed numbers that never become less")
    return starts

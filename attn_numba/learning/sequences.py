"""Sequences of any lengths in one array, and the batches that training and prediction make of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attn_numba.learning.network import Batch
from attn_numba.sequences import bucket

__all__ = ["KINDS", "Ragged", "Scale", "as_ragged", "kind_of"]

Array = NDArray[Any]
KINDS = ("vectors", "ids", "features")
POOLED = 16  # batches whose sequences are sorted by length among each other


class Ragged:
    """Sequences of unequal length, end to end in one array.

    Parameters
    ----------
    values : array (tokens, D), or (tokens,) for ids and features
        All tokens, sequence after sequence.
    lengths : int array (n,)
        Tokens of each sequence.
    """

    def __init__(self, values: Array, lengths: Array) -> None:
        self.values, self.lengths = values, lengths
        self.starts = np.cumsum(lengths) - lengths

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: Array) -> Batch:
        """Return some of the sequences, filled up with 0, ids with -1, which is no id."""
        lengths = self.lengths[indices]
        steps = np.arange(max(1, lengths.max(initial=1)))
        real = steps < lengths[:, None]
        tokens = self.values[np.where(real, self.starts[indices, None] + steps, 0)]
        if not real.all():
            tokens[~real] = -1 if self.values.dtype.kind in "iu" else 0
        return Batch(tokens, lengths)

    def take(self, indices: Array) -> Ragged:
        """Return some of the sequences."""
        lengths = self.lengths[indices]
        within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        return Ragged(self.values[np.repeat(self.starts[indices], lengths) + within], lengths)

    def buckets(self, limit: int) -> list[Array]:
        """Return indices of sequences of similar length, each of the groups with at most `limit` tokens or one."""
        return [np.asarray(b.indices) for b in bucket(self.lengths, max(limit, int(self.lengths.max(initial=1))))]

    def shuffled(self, size: int, generator: np.random.Generator) -> Iterator[Array]:
        """Yield indices of `size` sequences of similar length, each sequence once, in a drawn order."""
        order = generator.permutation(len(self))
        if (self.lengths != self.lengths[0]).any():
            pools = [order[n : n + POOLED * size] for n in range(0, len(order), POOLED * size)]
            order = np.concatenate([pool[np.argsort(self.lengths[pool], kind="stable")] for pool in pools])
        starts = np.arange(0, len(order), size)
        for start in generator.permutation(starts):
            yield order[start : start + size]


class Scale(NamedTuple):
    """Means and deviations of numbers, by which they are made to have mean 0 and deviation 1.

    Parameters
    ----------
    mean, deviation : float64 array
        One number for each column; a column that does not vary has deviation 1.
    """

    mean: Array
    deviation: Array

    @classmethod
    def of(cls, values: Array, weights: Array) -> Scale:
        """Return that of the columns of values (rows, columns), weighted by rows (rows,).

        Raises
        ------
        ValueError
            If squares of the values leave what float64 holds.
        """
        total = weights.sum()
        with np.errstate(over="ignore", invalid="ignore"):
            mean = weights @ values / total
            deviation = np.sqrt(weights @ (values - mean) ** 2 / total)
        if not np.isfinite(deviation).all():
            raise ValueError(f"a number is {np.abs(values).max():.3g} in size; float64 must hold the squares")
        least = 1e-12 * np.abs(mean)  # what rounding leaves of a column that does not vary
        return cls(mean, np.where(deviation > least, deviation, 1.0))

    def applied(self, values: Array) -> Array:
        """Return the values with mean 0 and deviation 1."""
        return (values - self.mean) / self.deviation

    def undone(self, values: Array) -> Array:
        """Return what became these values."""
        return values * self.deviation + self.mean


def kind_of(X: Any) -> str:
    """Return what the samples of X are: "vectors", "ids" or "features".

    Three axes, or a list of arrays with two, are vectors; a list of integer arrays with one axis is ids; all else is
    features, one token each.

    Examples
    --------
    >>> import numpy as np
    >>> kind_of(np.zeros((5, 3))), kind_of([np.zeros((4, 3)), np.zeros((2, 3))]), kind_of([[1, 2, 3], [4]])
    ('features', 'vectors', 'ids')
    """
    if getattr(X, "ndim", None) == 3:
        return "vectors"
    listed = isinstance(X, (list, tuple)) or (isinstance(X, np.ndarray) and X.ndim == 1 and X.dtype.kind == "O")
    if not listed or not len(X):
        return "features"
    ranks = {np.ndim(x) if hasattr(x, "ndim") else _rank(x) for x in X}
    if ranks == {2}:
        return "vectors"
    if ranks == {1} and all(np.asarray(x).dtype.kind in "iu" for x in X if len(x)):
        return "ids"
    return "features"


def _rank(x: Any) -> int:
    """Return how deep lists are nested, looked at along their first elements."""
    return 1 + _rank(x[0]) if isinstance(x, (list, tuple)) and len(x) else int(isinstance(x, (list, tuple)))


def as_ragged(X: Any, kind: str) -> Ragged:
    """Return sequences of vectors or ids end to end.

    Parameters
    ----------
    X : array (n, L, D), or list of arrays (L_i, D); for ids array (n, L), or list of (L_i,)
        The sequences; some may be empty, but not all.
    kind : {"vectors", "ids"}
        What they are of.

    Raises
    ------
    TypeError
        If a sequence is not of numbers, or ids are not integers.
    ValueError
        If a sequence has another number of axes, vectors differ in size or are not finite, or there is nothing.
    """
    rank = 2 if kind == "vectors" else 1
    arrays = [np.asarray(x) for x in X] if not isinstance(X, np.ndarray) or X.dtype.kind == "O" else X
    if isinstance(arrays, np.ndarray) and arrays.ndim != rank + 1:
        needed = "(n, L, D)" if rank == 2 else "(n, L)"
        raise ValueError(f"X has shape {arrays.shape}; inputs={kind!r} needs {needed}, or a list of sequences")
    if not len(arrays):
        raise ValueError("X has 0 sequences; needed at least 1")
    for place, array in enumerate(arrays):
        if array.ndim != rank and array.size:
            needed = "(L, D)" if rank == 2 else "(L,)"
            raise ValueError(f"X[{place}] has shape {array.shape}; inputs={kind!r} needs {needed}")
        if array.dtype.kind not in ("iu" if kind == "ids" else "iufb") and array.size:
            needed = "integers" if kind == "ids" else "real numbers"
            raise TypeError(f"X[{place}] has dtype {array.dtype}; inputs={kind!r} needs {needed}")
    lengths = np.array([len(array) for array in arrays])
    filled = [array for array in arrays if len(array)]
    if not filled:
        raise ValueError(f"X has {len(arrays)} sequences, all of them empty; needed at least 1 token")
    sizes = {array.shape[1:] for array in filled}
    if len(sizes) > 1:
        raise ValueError(f"X has vectors of sizes {sorted(size[0] for size in sizes)}; needed one size")
    values = np.concatenate(filled)
    if kind == "ids":
        return Ragged(values, lengths)
    values = values.astype(np.float64, copy=False)
    if not np.isfinite(values).all():
        raise ValueError("X holds NaN or infinity; needed finite numbers")
    return Ragged(values, lengths)

"""What is attended to, dense: each number from the weights (B, H, M, N) of `attention`, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_numba.reference.forward import attention
from attn_numba.rules.arguments import ACCUMULATORS, check_count, check_dtypes, check_rows
from attn_numba.rules.results import TopKeys


def weights_of(q: Any, k: Any, *, rows: slice | None = None, **rules: Any) -> np.ndarray:
    """Return the attention weights of some queries.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries. Missing leading axes count as 1.
    k : array (B, Hk, N, D)
        Keys.
    rows : slice, optional
        Which queries, as rows of q, in a step of at least 1; without it, all.
    **rules
        Mask, modifiers and whatever else `attention` takes; `compute_dtype` too.

    Returns
    -------
    array (B, H, rows, N)
        ``w_ij``, before dropout; float64 for float64 inputs, else float32.

    Examples
    --------
    >>> import numpy as np
    >>> from attn_numba.rules import Causal
    >>> weights_of(np.zeros((3, 2)), np.zeros((3, 2)), rows=slice(1, 2), mask=Causal())
    array([[0.5, 0.5, 0. ]])
    """
    weights, dtype = _weights(q, k, rules)
    chosen = check_rows(rows, weights.shape[-2])
    return weights[..., chosen.start : chosen.stop : chosen.step, :].astype(dtype)


def entropy(q: Any, k: Any, **rules: Any) -> np.ndarray:
    """Return the entropy of the weights of each query, in nats.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries. Missing leading axes count as 1.
    k : array (B, Hk, N, D)
        Keys.
    **rules
        Mask, modifiers and whatever else `attention` takes; `compute_dtype` too.

    Returns
    -------
    array (B, H, M)
        ``-sum_j w_ij ln w_ij``, a weight of 0 adding 0; float64 for float64 inputs, else float32.

    Examples
    --------
    >>> import numpy as np
    >>> entropy(np.zeros((1, 2)), np.zeros((4, 2))) / np.log(2)
    array([2.])
    """
    weights, dtype = _weights(q, k, rules)
    logarithms = np.log(np.where(weights == 0, 1, weights))
    return (0 - (weights * logarithms).sum(axis=-1)).astype(dtype)


def top_keys(q: Any, k: Any, count: int, **rules: Any) -> TopKeys:
    """Return the keys of largest weight of each query.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries. Missing leading axes count as 1.
    k : array (B, Hk, N, D)
        Keys.
    count : int
        How many, 0 to N.
    **rules
        Mask, modifiers and whatever else `attention` takes; `compute_dtype` too.

    Returns
    -------
    indices : int64 array (B, H, M, count)
        Rows of k: the largest weight first, and of equal weights the lower row. NaN counts as largest.
    weights : array (B, H, M, count)
        Their weights, as `weights_of` returns them.

    Examples
    --------
    >>> import numpy as np
    >>> top_keys(np.ones((1, 1)), np.array([[1.0], [3.0], [1.0]]), 2).indices
    array([[1, 0]])
    """
    weights, dtype = _weights(q, k, rules)
    number = check_count(count, weights.shape[-1])
    weights = weights.astype(dtype)  # what is rounded to the same number is equal
    indices = np.where(np.isnan(weights), -np.inf, -weights).argsort(axis=-1, kind="stable")[..., :number]
    return TopKeys(indices.astype(np.int64), np.take_along_axis(weights, indices, axis=-1))


def column_sums(q: Any, k: Any, **rules: Any) -> np.ndarray:
    """Return how much weight each key gets from all queries together.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries. Missing leading axes count as 1.
    k : array (B, Hk, N, D)
        Keys.
    **rules
        Mask, modifiers and whatever else `attention` takes; `compute_dtype` too.

    Returns
    -------
    array (B, H, N)
        ``sum_i w_ij``; float64 for float64 inputs, else float32.

    Examples
    --------
    >>> import numpy as np
    >>> from attn_numba.rules import Causal
    >>> column_sums(np.zeros((2, 1)), np.zeros((2, 1)), mask=Causal())
    array([1.5, 0.5])
    """
    weights, dtype = _weights(q, k, rules)
    return weights.sum(axis=-2).astype(dtype)


def _weights(q: Any, k: Any, rules: dict[str, Any]) -> tuple[np.ndarray, np.dtype]:
    """Return the weights in float64, and the dtype of results."""
    q, k = np.asarray(q), np.asarray(k)
    check_dtypes(q.dtype.name, k.dtype.name, k.dtype.name)
    nothing = np.zeros((*k.shape[:-1], 1))  # values, which no weight depends on
    found = attention(q.astype(np.float64), k.astype(np.float64), nothing, **rules, return_weights=True)
    return found.weights, ACCUMULATORS[q.dtype.name]

"""What is attended to: weights, their entropy, the top keys, column sums, and rollout through layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from attn_numba import problem as problems
from attn_numba.api import choose_backend, cpu_engine, ranked
from attn_numba.problem import Problem
from attn_numba.rules.arguments import ACCUMULATORS, check_count, check_rows
from attn_numba.rules.data import AnyArray, real_number
from attn_numba.rules.results import TopKeys

__all__ = ["TopKeys", "column_sums", "entropy", "rollout", "top_keys", "weights_of"]

ROWS_AT_ONCE = 64  # computed at once, those that are left out included, where a slice leaves some out


def weights_of(
    q: Any,
    k: Any,
    *,
    rows: slice | None = None,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    backend: str = "auto",
) -> AnyArray:
    """Return the attention weights of some queries.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries: float64, float32, float16 or bfloat16. Missing leading axes count as 1. Any strides.
    k : array (B, Hk, N, D)
        Keys, of q's dtype; `H` is a multiple of `Hk`, and query head h reads key head ``h // (H // Hk)``.
    rows : slice, optional
        Which queries, as rows of q, such as ``slice(-1, None)`` for the last; any step of at least 1. Without it, all.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset : optional
        The rules, as `attention` takes them. Offsets are those of row 0 of q and k, whatever rows are asked for.
    dropout : Dropout, optional
        Checked, and changes nothing: weights are those before dropout.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes, as in `attention`.

    Returns
    -------
    array (B, H, rows, N)
        ``w_ij``, 0 to 1, in the rank of `q`; float64 for float64 inputs, else float32.

    Raises
    ------
    TypeError
        For arguments of the wrong kind.
    ValueError
        For shapes and values that do not fit, and for rows in a step below 1.
    NotImplementedError
        For what the backend does not offer.

    Notes
    -----
    The weights are those of `attention`; a key that is not allowed has weight 0, as all keys have for a query that may
    attend to none. Rows come out the same, to the last bit, whichever others are asked for with them. Memory is that of
    the result, and where rows are left out that of 64 rows more.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> q, k = np.zeros((3, 2)), np.zeros((3, 2))
    >>> an.weights_of(q, k, rows=slice(1, 2), mask=an.Causal())
    array([[0.5, 0.5, 0. ]])
    """
    name, call = _check(
        q, k, backend, mask=mask, modifiers=modifiers, score=score, normalizer=normalizer, scale=scale,
        query_offset=query_offset, key_offset=key_offset, dropout=dropout,
    )  # fmt: skip
    chosen = check_rows(rows, call.sizes.M)
    if name == "reference":
        from attn_numba import reference

        weights = reference.weights_of(call.q, call.k, rows=rows, **_rules(call))
    else:
        weights = _weights_on_cpu(call, chosen)
    return ranked(weights, call.rank)


def entropy(
    q: Any,
    k: Any,
    *,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    backend: str = "auto",
) -> AnyArray:
    """Return the entropy of the weights of each query, in nats.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries: float64, float32, float16 or bfloat16. Missing leading axes count as 1. Any strides.
    k : array (B, Hk, N, D)
        Keys, of q's dtype; `H` is a multiple of `Hk`, and query head h reads key head ``h // (H // Hk)``.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset : optional
        The rules, as `attention` takes them.
    dropout : Dropout, optional
        Checked, and changes nothing: weights are those before dropout.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes, as in `attention`.

    Returns
    -------
    array (B, H, M)
        In nats; without a sink from 0, where one key has all the weight, to ``ln N``, where all have the same. float64
        for float64 inputs, else float32. One axis less than `q`.

    Raises
    ------
    TypeError
        For arguments of the wrong kind.
    ValueError
        For shapes and values that do not fit.
    NotImplementedError
        For what the backend does not offer.

    Notes
    -----
    ``-sum_j w_ij ln w_ij`` over the keys, a weight of 0 adding 0. A query that may attend to no key has entropy 0. What
    a sink takes is no key's: it adds nothing, and the weights that are left sum to less than 1. ``exp`` of the entropy
    is to how many keys a query attends, in effect: n if n keys have the same weight.

    References
    ----------
    C. Shannon (1948), "A mathematical theory of communication", section 6. Of attention weights: H. Ghader and C. Monz
    (2017), "What does attention in neural machine translation pay attention to?"; J. Vig and Y. Belinkov (2019),
    "Analyzing the structure of attention in a transformer language model".

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> q, k = np.zeros((3, 2)), np.zeros((3, 2))
    >>> np.exp(an.entropy(q, k, mask=an.Causal()))
    array([1., 2., 3.])
    """
    name, call = _check(
        q, k, backend, mask=mask, modifiers=modifiers, score=score, normalizer=normalizer, scale=scale,
        query_offset=query_offset, key_offset=key_offset, dropout=dropout,
    )  # fmt: skip
    if name == "reference":
        from attn_numba import reference

        return ranked(reference.entropy(call.q, call.k, **_rules(call)), call.rank - 1)
    s = call.sizes
    found = np.zeros((s.B, s.H, s.M), call.accumulator)
    _explain_on_cpu(_prepared(call), range(s.M), entropy=found)
    return ranked(found, call.rank - 1)


def top_keys(
    q: Any,
    k: Any,
    count: int,
    *,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    backend: str = "auto",
) -> TopKeys:
    """Return the keys of largest weight of each query.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries: float64, float32, float16 or bfloat16. Missing leading axes count as 1. Any strides.
    k : array (B, Hk, N, D)
        Keys, of q's dtype; `H` is a multiple of `Hk`, and query head h reads key head ``h // (H // Hk)``.
    count : int
        How many keys for each query, 0 to N.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset : optional
        The rules, as `attention` takes them.
    dropout : Dropout, optional
        Checked, and changes nothing: weights are those before dropout.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes, as in `attention`.

    Returns
    -------
    indices : int64 array (B, H, M, count)
        Rows of k, the largest weight first; of equal weights, the lower row. In the rank of `q`.
    weights : array (B, H, M, count)
        Their weights, those of `weights_of`; float64 for float64 inputs, else float32. The two come as a `TopKeys`.

    Raises
    ------
    TypeError
        For arguments of the wrong kind.
    ValueError
        For shapes and values that do not fit.
    NotImplementedError
        For what the backend does not offer.

    Notes
    -----
    All N keys are in the order, those that are not allowed too: they weigh 0, so they come last, or not at all if
    `count` is no more than the number of keys with some weight. NaN counts as largest.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> q, k = np.ones((2, 1)), np.log([[2.0], [4.0], [2.0]])
    >>> found = an.top_keys(q, k, 2)
    >>> found.indices
    array([[1, 0],
           [1, 0]])
    >>> found.weights
    array([[0.5 , 0.25],
           [0.5 , 0.25]])
    """
    name, call = _check(
        q, k, backend, mask=mask, modifiers=modifiers, score=score, normalizer=normalizer, scale=scale,
        query_offset=query_offset, key_offset=key_offset, dropout=dropout,
    )  # fmt: skip
    s = call.sizes
    number = check_count(count, s.N)
    if name == "reference":
        from attn_numba import reference

        indices, weights = reference.top_keys(call.q, call.k, number, **_rules(call))
    else:
        shape = (s.B, s.H, s.M, number)
        indices, weights = np.zeros(shape, np.int64), np.zeros(shape, call.accumulator)
        _explain_on_cpu(_prepared(call), range(s.M if number else 0), top=(indices, weights))
    return TopKeys(ranked(indices, call.rank), ranked(weights, call.rank))


def column_sums(
    q: Any,
    k: Any,
    *,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    backend: str = "auto",
) -> AnyArray:
    """Return how much weight each key gets from all queries together.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries: float64, float32, float16 or bfloat16. Missing leading axes count as 1. Any strides.
    k : array (B, Hk, N, D)
        Keys, of q's dtype; `H` is a multiple of `Hk`, and query head h reads key head ``h // (H // Hk)``.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset : optional
        The rules, as `attention` takes them.
    dropout : Dropout, optional
        Checked, and changes nothing: weights are those before dropout.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes, as in `attention`.

    Returns
    -------
    array (B, H, N)
        ``sum_i w_ij``, 0 to M; float64 for float64 inputs, else float32. One axis less than `q`.

    Raises
    ------
    TypeError
        For arguments of the wrong kind.
    ValueError
        For shapes and values that do not fit.
    NotImplementedError
        For what the backend does not offer.

    Notes
    -----
    Without a sink the sums of all keys add up to the number of queries that may attend to some key. A key that no query
    may attend to has 0.

    References
    ----------
    As the measure of which keys matter: Z. Zhang et al. (2023), "H2O: heavy-hitter oracle for efficient generative
    inference of large language models".

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> an.column_sums(np.zeros((2, 1)), np.zeros((2, 1)), mask=an.Causal())
    array([1.5, 0.5])
    """
    name, call = _check(
        q, k, backend, mask=mask, modifiers=modifiers, score=score, normalizer=normalizer, scale=scale,
        query_offset=query_offset, key_offset=key_offset, dropout=dropout,
    )  # fmt: skip
    if name == "reference":
        from attn_numba import reference

        return ranked(reference.column_sums(call.q, call.k, **_rules(call)), call.rank - 1)
    s = call.sizes
    found = np.zeros((s.B, s.H, s.N), call.accumulator)
    _explain_on_cpu(_prepared(call), range(s.M), sums=found)
    return ranked(found, call.rank - 1)


def rollout(weights_per_layer: Iterable[Any], residual: float = 0.5) -> AnyArray:
    """Return how much of each input there is in each state after several layers.

    Parameters
    ----------
    weights_per_layer : sequence of arrays (B, H, M, M)
        Attention weights of each layer, the first layer first, as `weights_of` returns them: float64, float32, float16
        or bfloat16. Missing leading axes count as 1. Layers share B, M and the dtype; the number of heads may differ.
    residual : float
        Share of a state that goes around the attention, 0 to 1; 0.5 is the residual connection of a transformer.

    Returns
    -------
    array (B, M, M)
        In row i, the shares of the inputs in state i, which sum to 1; float64 for float64 weights, else float32, which
        is also what they are computed in. Always three axes.

    Raises
    ------
    TypeError
        If the weights are not floats, or their dtypes differ.
    ValueError
        If there is no layer, shapes do not fit, or `residual` is not from 0 to 1.
    NotImplementedError
        For arrays on a GPU.

    Notes
    -----
    ``A = residual * I + (1 - residual) * mean_h w_h`` with each row divided by its sum, and the product of the A of all
    layers, later ones on the left. Thus a state with weights of 0, which attends to nothing, stays what it is; without
    a residual nothing is left of it, and its row is 0. Weights that a sink made sum to less than 1 count as if they
    summed to 1 beside the residual's part. NaN and infinity make the rows NaN that depend on them, and no others.

    Memory is that of a few results.

    References
    ----------
    S. Abnar and W. Zuidema (2020), "Quantifying attention flow in transformers".

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> first, second = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 1.0], [0.0, 1.0]])
    >>> an.rollout([first, second])
    array([[[0.75, 0.25],
            [0.5 , 0.5 ]]])
    """
    share = real_number("rollout", "residual", residual)
    if not 0 <= share <= 1:
        raise ValueError(f"rollout: residual is {share}; needed 0 to 1")
    layers = _layers(weights_per_layer)
    with np.errstate(all="ignore"):  # weights may be NaN
        total = _mixing(layers[0], share)
        for layer in layers[1:]:
            total = _product(_mixing(layer, share), total)
    return total


# --- the call ---


def _check(q: Any, k: Any, backend: str, **rules: Any) -> tuple[str, Problem]:
    """Return who computes, and the checked call; k stands for the values, at which nobody looks."""
    name = choose_backend(backend, q, k)
    queries, keys = problems.host_array(q, "q"), problems.host_array(k, "k")
    if queries.dtype != keys.dtype:
        raise TypeError(f"k has dtype {keys.dtype.name}; q has {queries.dtype.name}")
    return name, problems.check(queries, keys, keys, **rules)


def _rules(call: Problem) -> dict[str, Any]:
    """Return the rules of a call as the reference takes them; no result here depends on dropout."""
    return {
        "mask": call.mask, "modifiers": call.modifiers, "score": call.score, "normalizer": call.normalizer,
        "scale": call.scale, "query_offset": call.query_offset, "key_offset": call.key_offset,
    }  # fmt: skip


# --- the CPU ---


def _prepared(call: Problem) -> Problem:
    return cpu_engine().prepared(call)


def _explain_on_cpu(call: Problem, rows: range, **results: Any) -> None:
    """Fill arrays of zeros with what is asked for of these rows of a prepared call, which are one after the other."""
    if call.sizes.B and call.sizes.N and rows:
        cpu_engine().explain(call, rows, **results)


def _weights_on_cpu(call: Problem, rows: range) -> AnyArray:
    """Return the weights of these rows, without those in between."""
    s, call = call.sizes, _prepared(call)
    weights = np.zeros((s.B, s.H, len(rows), s.N), call.accumulator)
    if rows.step == 1:
        _explain_on_cpu(call, rows, weights=weights)
        return weights
    at_once = -(-ROWS_AT_ONCE // rows.step)
    for n in range(0, len(rows), at_once):
        part = rows[n : n + at_once]
        block = range(part[0], part[-1] + 1)
        found = np.zeros((s.B, s.H, len(block), s.N), call.accumulator)
        _explain_on_cpu(call, block, weights=found)
        weights[:, :, n : n + at_once] = found[:, :, :: rows.step]
    return weights


# --- rollout ---


def _layers(weights_per_layer: Iterable[Any]) -> list[AnyArray]:
    """Return the weights of each layer with four axes."""
    if not isinstance(weights_per_layer, Iterable):
        raise TypeError(f"weights_per_layer is {type(weights_per_layer).__name__}; needed a sequence of arrays")
    layers = [_layer(f"weights_per_layer[{n}]", weights) for n, weights in enumerate(weights_per_layer)]
    if not layers:
        raise ValueError("weights_per_layer is empty; needed at least one layer")
    B, _, M, _ = layers[0].shape
    for n, layer in enumerate(layers):
        if layer.dtype != layers[0].dtype:
            raise TypeError(
                f"weights_per_layer[{n}] has dtype {layer.dtype.name}; weights_per_layer[0] has {layers[0].dtype.name}"
            )
        if (layer.shape[0], layer.shape[2]) != (B, M):
            raise ValueError(
                f"weights_per_layer[{n}] has {layer.shape[0]} sequences of {layer.shape[2]} states; "
                f"weights_per_layer[0] has {B} of {M}"
            )
    return layers


def _layer(name: str, weights: object) -> AnyArray:
    if problems.is_device_array(weights):
        raise NotImplementedError(f"{name} is on a GPU; rollout takes arrays in host memory")
    array = problems.host_array(weights, name)
    if not 2 <= array.ndim <= 4 or array.shape[-1] != array.shape[-2]:
        raise ValueError(f"{name} has shape {array.shape}; needed (B, H, M, M), with or without leading axes")
    if array.ndim > 2 and array.shape[-3] < 1:
        raise ValueError(f"{name} has 0 heads; needed at least 1")
    return array[(np.newaxis,) * (4 - array.ndim)]


def _mixing(weights: AnyArray, residual: float) -> AnyArray:
    """Return how much of each state before a layer there is in each state after it, (B, M, M)."""
    B, H, M, _ = weights.shape
    mixing = np.zeros((B, M, M), ACCUMULATORS[weights.dtype.name])
    for h in range(H):  # one after the other, so that the order of a sum does not depend on how they lie in memory
        mixing += weights[:, h]
    mixing *= (1 - residual) / H
    mixing[:, np.arange(M), np.arange(M)] += residual
    total = mixing.sum(axis=-1, keepdims=True)
    mixing /= np.where(total == 0, 1, total)
    return mixing


def _product(mixing: AnyArray, states: AnyArray) -> AnyArray:
    """Return ``mixing @ states``, where 0 times NaN is no part of a sum."""
    spoiled = np.any(~np.isfinite(states), axis=-1, keepdims=True)  # (B, M, 1)
    if not spoiled.any():
        return mixing @ states
    product = mixing @ np.where(spoiled, 0, states)
    product[(spoiled.swapaxes(1, 2) & (mixing != 0)).any(axis=-1)] = np.nan
    return product

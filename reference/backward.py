"""Gradients of attention, dense: the forward pass of `forward.py` undone, step by step, from its last to its first.

With ``L = sum(dout * out)``, the gradient by anything is the derivative of L by it. Letters are those of `forward.py`.

1. ``dv_j = sum_i u_ij dout_i`` with the weights u after dropout; ``dw_ij = dout_i . v_j``, by dropout 0 or divided by
   ``1 - rate``.
2. Normalizer: with ``g = slope(w)``, ``ds = g * (dw - sum(g * dw) / sum(g))``, both sums over the allowed keys of the
   row and the sink, whose dw is 0. `DoubleSoftmax` is two such steps. The gradient by the sink is its ds, summed.
3. Modifiers in reverse: the gradient by a rule's array is ds times the derivative of the new score by its element,
   summed over all places that read it; then ds is multiplied by the derivative of the new score by the old one.
4. Scale, score, maps of the score.
5. A key that is not allowed is *not there*: its gradients are 0, whatever it holds, and it changes no others. A query
   with no allowed key has gradient 0 and gives none, whatever it and its dout hold.
6. Where a derivative does not exist, it is taken from the side on which nothing happens: 0 for the cosine of a zero
   vector, for a weight at the edge of the support of `Sparsemax`, for a span at a key of ratio 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_numba.reference.forward import Call, Steps, checked, computed, weighted_sum
from attn_numba.reference.normalizers import softmax
from attn_numba.rules import DoubleSoftmax, Dropout, Normalizer, Softmax
from attn_numba.rules.arguments import (
    ACCUMULATORS,
    check_differentiable,
    check_gradient,
    check_saved,
)
from attn_numba.rules.data import gathered
from attn_numba.rules.results import Gradients, Learned


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    *,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Dropout | None = None,
    saved: Any = None,
    compute_dtype: Any = None,
) -> Gradients:
    """Return the gradients of ``sum(dout * attention(q, k, v))`` by the inputs and by the arrays of rules.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries. Missing leading axes count as 1.
    k : array (B, Hk, N, D)
        Keys; `H` is a multiple of `Hk`, and query head h reads key head ``h // (H // Hk)``.
    v : array (B, Hk, N, E)
        Values.
    dout : array (B, H, M, E)
        Gradient by the output, in its shape and dtype.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset, dropout : optional
        The rules, as `attention` takes them.
    saved : (out, lse), optional
        Results of the forward call, of `Softmax`. The reference computes them again, and uses these only to see that
        they are of the same call.
    compute_dtype : dtype or str, optional
        Precision to compute in, to see what it loses; float64 if not given. With float16 and bfloat16 the inputs,
        `dout`, the weights before they meet `dout`, and the gradients by scores before they meet K and Q are rounded
        to it, and sums are in float32.

    Returns
    -------
    Gradients
        ``.q``, ``.k``, ``.v`` in the shapes and dtype of the inputs, and ``.of(rule)`` for the arrays of a rule.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, or `dout` or `saved` of another dtype.
    ValueError
        If shapes do not fit, a modifier has no slope, or `saved` is of another call.

    Notes
    -----
    ``dv_j = sum_i w_ij dout_i``; of a softmax ``ds_ij = w_ij (dout_i . v_j - dout_i . out_i)``; of dot products
    ``dq_i = scale sum_j ds_ij k_j`` and ``dk_j = scale sum_i ds_ij q_i``.

    References
    ----------
    T. Dao et al. (2022), "FlashAttention: fast and memory-efficient exact attention with IO-awareness", appendix B.2.
    Sparsemax: A. F. T. Martins and R. F. Astudillo (2016), "From softmax to sparsemax", equation 14. Entmax: B. Peters,
    V. Niculae and A. F. T. Martins (2019), "Sparse sequence-to-sequence models", proposition 2.

    Examples
    --------
    >>> import numpy as np
    >>> from attn_numba.rules import Causal
    >>> q = k = np.zeros((3, 4))
    >>> v = np.array([[1.0], [2.0], [6.0]])
    >>> attention_vjp(q, k, v, np.ones((3, 1)), mask=Causal()).v.ravel().round(3)
    array([1.833, 0.833, 0.333])
    """
    call = checked(
        q, k, v, mask=mask, modifiers=modifiers, score=score, normalizer=normalizer, scale=scale,
        query_offset=query_offset, key_offset=key_offset, dropout=dropout, compute_dtype=compute_dtype,
    )  # fmt: skip
    check_differentiable(call.modifiers)
    dout, dtype, shape = np.asarray(dout), call.q.dtype.name, (*call.q.shape[:-1], call.sizes.E)
    check_gradient(dout.shape, dout.dtype.name, shape, dtype)
    out, lse = check_saved(saved, call.normalizer, shape, dtype)
    found = computed(call)
    if out is not None:
        _require_same(np.asarray(out), np.asarray(lse), call, found)

    sizes, precision, learned = call.sizes, call.precision, Learned(ACCUMULATORS[dtype])
    allowed = found.allowed
    with np.errstate(all="ignore"):  # excluded places may hold anything
        douts = precision.inputs(dout).reshape(sizes.B, sizes.H, sizes.M, sizes.E)
        dv = weighted_sum(precision.rounded(found.used).swapaxes(2, 3), douts, allowed.swapaxes(2, 3))
        dw = np.where(allowed, douts @ found.values.swapaxes(2, 3), 0)
        if call.dropout is not None:
            dw = np.where(found.kept, dw / precision.number(1 - call.dropout.rate), 0).astype(dw.dtype)

        ds, dsink = _normalizer_gradients(call, found, dw)
        for modifier, s in zip(call.modifiers[::-1], found.scores[-2::-1], strict=True):
            if modifier.learned is not None:
                name, axes = modifier.learned
                by_place = np.where(allowed, ds * modifier.learned_derivatives(s, call.places, sizes), 0)
                by_element = by_place.sum(axis=tuple(n for n, axis in enumerate("BHMN") if axis not in axes))
                learned.add(modifier, {name: gathered(by_element, getattr(modifier, name).shape)})
            ds = np.where(allowed, ds * modifier.derivatives(s, call.places, sizes), 0)
        if dsink is not None:
            learned.add(call.normalizer, {"sink": dsink})

        ds = precision.rounded((ds * precision.number(call.scale)).astype(ds.dtype))
        queries, keys, weights = found.mapped_queries, found.mapped_keys, {}
        if call.score.dots:
            dq = weighted_sum(ds, keys, allowed)
            dk = weighted_sum(ds.swapaxes(2, 3), queries, allowed.swapaxes(2, 3))
        else:
            dq, dk, weights = call.score.between_gradients(queries, keys, ds, allowed)
        shared = sizes.H // sizes.Hk
        dk, dv = (x.reshape(sizes.B, sizes.Hk, shared, *x.shape[2:]).sum(axis=2) for x in (dk, dv))
        dq, dk, others = call.score.pulled(found.queries, found.keys, dq, dk)
        learned.add(call.score, others | weights)
    return Gradients(
        *(x.reshape(given.shape).astype(given.dtype) for x, given in ((dq, call.q), (dk, call.k), (dv, call.v))),
        learned.found(),
    )  # fmt: skip


def _normalizer_gradients(call: Call, found: Steps, dw: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the gradients by the final scores (B, H, M, N) and by the sink, in the shape it was given."""
    normalizer, w = call.normalizer, found.weights
    if isinstance(normalizer, DoubleSoftmax):
        first, _ = softmax(found.scores[-1], found.allowed)
        return _step(normalizer, first, _step(normalizer, w, dw, found.allowed)[0], found.allowed)[0], None
    sink = normalizer.sink_array(call.sizes) if isinstance(normalizer, Softmax) else None
    if sink is None:
        return _step(normalizer, w, dw, found.allowed)[0], None
    sink = sink.astype(w.dtype)[..., None]
    of_sink = np.where(sink == -np.inf, 0, np.exp(sink - found.lse)).astype(w.dtype)
    ds, mean = _step(normalizer, w, dw, found.allowed, of_sink)
    return ds, gathered((0 - of_sink * mean).sum(axis=2), normalizer.sink.shape)


def _step(
    normalizer: Normalizer, w: np.ndarray, dw: np.ndarray, allowed: np.ndarray, of_sink: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the gradients by scores and the mean (B, H, M) of dw under ``slope(w)``; the sink has weight `of_sink`."""
    g = np.where(allowed, normalizer.slope(w), 0).astype(w.dtype)
    total = g.sum(axis=-1) + (0 if of_sink is None else normalizer.slope(of_sink))
    mean = np.where(total == 0, 0, (g * dw).sum(axis=-1) / total)  # a row with no key at all
    return np.where(allowed, g * (dw - mean[..., None]), 0).astype(w.dtype), mean.astype(w.dtype)


def _require_same(out: np.ndarray, lse: np.ndarray, call: Call, found: Steps) -> None:
    """Raise a ValueError if results of a forward call are not those of this one, give or take what their dtypes lose.

    Scores may have lost digits in proportion to the largest of them, which the exponential makes shares of the output.
    """
    with np.errstate(all="ignore"):
        used = weighted_sum(found.used, found.values, found.allowed)
        s = np.abs(np.where(found.allowed, found.scores[-1], 0))
        largest = 1 + s.max(initial=0, where=np.isfinite(s))
        products = np.abs(found.values).max(initial=0, where=np.isfinite(found.values))
        for name, array, expected, size in (("lse", lse, found.lse, 1.0), ("out", out, used, products)):
            loss = 2.0 ** {"float64": -26, "float32": -11, "float16": -5, "bfloat16": -3}[array.dtype.name]
            expected = expected.reshape(array.shape).astype(array.dtype).astype(np.float64)
            array = array.astype(np.float64)
            same = np.abs(array - expected) <= loss * largest * size
            same |= ~np.isfinite(array) & ~np.isfinite(expected)
            if name == "lse":
                same &= (array == -np.inf) == (expected == -np.inf)
            if not same.all():
                at = tuple(int(n) for n in np.argwhere(~same)[0])
                raise ValueError(
                    f"saved: {name} is {array[at]:.6g} at {at}; this call gives {expected[at]:.6g}: it is of another"
                )

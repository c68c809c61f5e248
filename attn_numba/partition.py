"""Partial softmax results over disjoint sets of keys, merged into the whole."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attn_numba.rules.arguments import ACCUMULATORS, check_parts
from attn_numba.rules.results import Merged

__all__ = ["merge"]


def merge(outs: Sequence[object], lses: Sequence[object], sink: object = None) -> Merged:
    """Return the result over all keys from results over disjoint sets of them.

    Parameters
    ----------
    outs : sequence of arrays (B, H, M, E)
        Results of the parts, each computed with the positions of the whole and without a sink. Missing leading axes
        count as 1.
    lses : sequence of arrays (B, H, M)
        Their ``lse``, natural; minus infinity where a part has no key for a query.
    sink : float or array, broadcasts to (B, H), optional
        Score of one more key of value 0, given once, here.

    Returns
    -------
    out : array (B, H, M, E)
        In the dtype and rank of the parts.
    lse : array (B, H, M)
        In the dtype of the parts' `lse`.

    Raises
    ------
    TypeError
        If the parts are not arrays of one dtype.
    ValueError
        If there is no part, shapes do not fit, or the sink holds NaN.

    Notes
    -----
    ``lse = log sum_p exp(lse_p)`` and ``out = sum_p exp(lse_p - lse) out_p``, computed in the accumulator's dtype, in
    the order of the parts. A row that sees no key in a part has ``lse`` minus infinity there and takes nothing from it.

    References
    ----------
    M. Milakov and N. Gimelshein (2018), "Online normalizer calculation for softmax", section 3.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> q, k, v = (np.random.default_rng(n).standard_normal((1, 2, 6, 4)) for n in range(3))
    >>> parts = [an.attention(q, k[:, :, s], v[:, :, s], return_lse=True) for s in (slice(0, 2), slice(2, 6))]
    >>> out, lse = an.merge([p.out for p in parts], [p.lse for p in parts])
    >>> bool(np.allclose(out, an.attention(q, k, v)))
    True
    """
    results, sums, extra = check_parts(outs, lses, sink)
    number = ACCUMULATORS[results[0].dtype.name]
    stacked = np.stack(sums).astype(number, copy=False)
    if extra is not None:
        shape = (*extra.shape, sums[0].shape[-1])  # (B, H, M), of which the parts may lack leading axes
        row = np.broadcast_to(extra[..., np.newaxis].astype(number), shape).reshape(sums[0].shape)
        stacked = np.concatenate([stacked, row[np.newaxis]])
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = stacked.max(axis=0)
        shift = np.where(np.isneginf(largest), number.type(0), largest)
        shares = np.exp(stacked - shift)
        total = shares[0].copy()
        for share in shares[1:]:
            total += share
        lse = shift + np.log(total)
        weights = shares / np.where(total == 0, number.type(1), total)
        out, product = np.zeros(results[0].shape, number), np.empty(results[0].shape, number)
        for result, own, weight in zip(results, sums, weights, strict=False):
            np.multiply(weight[..., np.newaxis], result.astype(number, copy=False), out=product)
            product[np.isneginf(own)] = 0  # a row without keys is nothing, whatever it holds
            out += product
    return Merged(out.astype(results[0].dtype, copy=False), lse.astype(sums[0].dtype, copy=False))

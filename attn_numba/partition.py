"""Partial softmax results over disjoint sets of keys, merged into the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from attn_numba.problem import ACCUMULATORS
from attn_numba.rules.base import AnyArray

__all__ = ["Merged", "merge"]


class Merged(NamedTuple):
    """What `merge` returns."""

    out: AnyArray
    lse: AnyArray


def merge(outs: Sequence[object], lses: Sequence[object], sink: object = None) -> Merged:
    """Return the result over all keys from results over disjoint sets of them.

    Parameters
    ----------
    outs : sequence of arrays (..., M, E)
        Results of the parts, each computed with global offsets and without a sink.
    lses : sequence of arrays (..., M)
        Their logarithms of the sum of exponentials, natural.
    sink : float or array, broadcasts to (..., M) after one more axis is appended (so (H,) and (B, H) fit), optional
        Score of one more key of value 0, given once, here.

    Returns
    -------
    out : array (..., M, E), of the parts' dtype
    lse : array (..., M), of the lse's dtype

    Raises
    ------
    TypeError
        If the parts are not arrays of one dtype.
    ValueError
        If there is no part, or shapes differ.

    Notes
    -----
    ``lse = log sum_p exp(lse_p)`` and ``out = sum_p exp(lse_p - lse) out_p``, computed in the accumulator's dtype, in the order of the
    parts. A row that sees no key in a part has lse minus infinity there and takes nothing from it.

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
    results = [_array(x, f"outs[{n}]") for n, x in enumerate(outs)]
    sums = [_array(x, f"lses[{n}]") for n, x in enumerate(lses)]
    if not results or len(results) != len(sums):
        raise ValueError(f"outs has {len(results)} parts and lses {len(sums)}; needed as many of each, at least one")
    for n, (out, lse) in enumerate(zip(results, sums, strict=True)):
        if out.shape != results[0].shape:
            raise ValueError(f"outs[{n}] has shape {out.shape}; outs[0] has {results[0].shape}")
        if lse.shape != out.shape[:-1]:
            raise ValueError(
                f"lses[{n}] has shape {lse.shape}; needed {out.shape[:-1]}, one number for each row of outs[{n}]"
            )
        if out.dtype != results[0].dtype or lse.dtype != sums[0].dtype:
            raise TypeError(
                f"part {n} has dtypes {out.dtype}, {lse.dtype}; part 0 has {results[0].dtype}, {sums[0].dtype}"
            )
    number = ACCUMULATORS[results[0].dtype.name]
    stacked = np.stack([x.astype(number, copy=False) for x in sums])
    if sink is not None:
        last = np.asarray(sink, number)
        try:
            last = np.broadcast_to(last[..., np.newaxis] if last.ndim else last, sums[0].shape)
        except ValueError:
            raise ValueError(f"sink has shape {np.shape(sink)}; needed one that fits {sums[0].shape[:-1]}") from None
        stacked = np.concatenate([stacked, last[np.newaxis]])
    with np.errstate(divide="ignore", invalid="ignore"):
        largest = stacked.max(axis=0)
        shift = np.where(np.isneginf(largest), number.type(0), largest)
        shares = np.exp(stacked - shift)
        total = shares[0].copy()
        for share in shares[1:]:
            total += share
        lse = shift + np.log(total)
        inverse = np.where(total == 0, number.type(0), 1 / np.where(total == 0, number.type(1), total))
    out = np.zeros(results[0].shape, number)
    for result, share in zip(results, shares, strict=False):
        weight = (share * inverse)[..., np.newaxis]
        out += np.where(
            weight == 0, number.type(0), weight * result.astype(number, copy=False)
        )  # 0 times NaN is nothing here
    return Merged(out.astype(results[0].dtype, copy=False), lse.astype(sums[0].dtype, copy=False))


def _array(x: object, name: str) -> AnyArray:
    array = np.asarray(x)
    if array.dtype.name not in ACCUMULATORS:
        raise TypeError(f"{name} has dtype {array.dtype}; needed float64, float32, float16 or bfloat16")
    return array

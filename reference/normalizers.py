"""Normalizers, dense: from the scores of a row (B, H, M, N) to its weights, over the allowed keys.

A row with no allowed key has weights 0. One with a NaN or plus infinity among its allowed scores has NaN for weights.
"""

from __future__ import annotations

import numpy as np

from attn_numba.rules import DoubleSoftmax, Entmax15, Normalizer, Sizes, Softmax, Sparsemax


def normalized(
    normalizer: Normalizer, s: np.ndarray, allowed: np.ndarray, sizes: Sizes
) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the weights (B, H, M, N) and, of a softmax, the logarithm of the sum (B, H, M)."""
    if isinstance(normalizer, Softmax):
        sink = normalizer.sink_array(sizes)
        return softmax(s, allowed, None if sink is None else sink.astype(s.dtype)[:, :, None])
    if isinstance(normalizer, DoubleSoftmax):
        return softmax(softmax(s, allowed)[0], allowed)[0], None
    if isinstance(normalizer, Sparsemax):
        return sparsemax(s, allowed), None
    if isinstance(normalizer, Entmax15):
        return entmax15(s, allowed), None
    raise NotImplementedError(f"backend 'reference' does not compute {type(normalizer).__name__}")


def softmax(s: np.ndarray, allowed: np.ndarray, sink: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Return weights and the logarithm of the sum, over the allowed keys; `sink` (B, H, 1) is one more key."""
    greatest = _greatest(s, allowed)
    if sink is not None:
        greatest = np.maximum(greatest, sink)
    shift = np.where(greatest == -np.inf, 0, greatest).astype(s.dtype)  # a row with no key at all
    powers = np.where(allowed, np.exp(s - shift[..., None]), 0).astype(s.dtype)
    total = powers.sum(axis=-1)
    if sink is not None:
        total = total + np.exp(sink - shift)
    return np.where(allowed, powers / total[..., None], 0).astype(s.dtype), shift + np.log(total)


def sparsemax(s: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return ``max(s - t, 0)``: t is what makes the k largest scores sum to 1, for the k that are above it."""
    z, largest, k = _sorted(s, allowed)
    t = (largest.cumsum(axis=-1) - 1) / k
    return np.where(allowed, np.maximum(z - _of_row(t, largest), 0), 0).astype(s.dtype)


def entmax15(s: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return ``max(s / 2 - t, 0) ** 2``: t is what makes the k largest scores sum to 1, for the k that are above it.

    With the mean of the k largest halves, and the sum of their squared distances from it, t is the smaller root of
    ``k * (mean - t) ** 2 + distances = 1``.
    """
    z, largest, k = _sorted(s / 2, allowed)
    mean = largest.cumsum(axis=-1) / k
    distances = (largest * largest).cumsum(axis=-1) - k * mean * mean
    t = mean - np.sqrt(np.maximum(1 - distances, 0) / k)
    return np.where(allowed, np.maximum(z - _of_row(t, largest), 0) ** 2, 0).astype(s.dtype)


def _greatest(s: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return the greatest allowed score of each row; minus infinity if there is none."""
    return np.where(allowed, s, -np.inf).max(axis=-1, initial=-np.inf).astype(s.dtype)


def _sorted(s: np.ndarray, allowed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the scores less the greatest of their row, the same in descending order, and how many come up to each.

    Excluded ones are minus infinity.
    """
    z = np.where(allowed, s - _greatest(s, allowed)[..., None], -np.inf).astype(s.dtype)
    return z, -np.sort(-z, axis=-1), np.arange(1, z.shape[-1] + 1, dtype=s.dtype)


def _of_row(t: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Return a row's threshold: of all for the k largest scores, the greatest that the k-th is above."""
    return np.where(t < largest, t, -np.inf).max(axis=-1, initial=-np.inf, keepdims=True).astype(t.dtype)

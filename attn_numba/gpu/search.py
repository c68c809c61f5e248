"""Thresholds of sparsemax and entmax-1.5 on the device: Newton's steps from below, row by row.

A row's weights are ``max(x - t, 0)`` or its square, where x are the scores below their largest one (halves of them for
entmax-1.5), and t makes them sum to 1. From t = -1, which is never above it, each step looks at the keys above t: how
many they are, and the sums of ``x - t`` and of its square. Steps from below never pass the solution, so the search of a
row ends when a step changes nothing; rows beside it may go on, and change it no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from attn_numba.gpu.target import SIMULATED, device, types
from attn_numba.rules import Entmax15, Sparsemax

SEARCHED = (Sparsemax, Entmax15)
FIRST = -1.0  # no threshold is below it: the largest score alone would weigh more than 1
MOST_STEPS = 100  # of a search, which ends after three to ten


def searching(normalizer: type, number: np.dtype[Any]) -> Callable[..., Any]:
    """Return the device function of one step.

    Parameters
    ----------
    normalizer : type
        Sparsemax or Entmax15.
    number : dtype
        float32 or float64, of the scores: the search is in float64 always.

    Returns
    -------
    step : device function (threshold, count, total, squares, before)
        All float64: the threshold so far, of the keys above it their count and the sums of ``x - t`` and its square,
        and the count of the step before. Returns the new threshold and whether the search has ended. A total of NaN
        becomes the threshold, and so reaches the whole row.
    """
    wide = (np if SIMULATED else types).float64
    least = 2.0**-50 if np.dtype(number) == np.float64 else 2.0**-22  # a step that ends the search

    @device
    def linear(threshold, count, total, squares, before):
        if not total > 0:
            return wide(threshold + total), True
        step = (total - 1) / count
        return wide(threshold + step), count == before or step <= 0

    @device
    def quadratic(threshold, count, total, squares, before):
        if not total > 0:
            return wide(threshold + total), True
        root = math.sqrt(squares)
        step = (root - 1) * root / total
        return wide(threshold + step), step < least

    return linear if normalizer is Sparsemax else quadratic

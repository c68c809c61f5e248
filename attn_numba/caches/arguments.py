"""Checks of what the methods of a cache are given."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from attn_numba.rules.data import AnyArray

__all__ = ["at_least", "counts_of", "indices_of"]


def at_least(name: str, value: Any, least: int) -> int:
    """Return a whole number that is not too small."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {type(value).__name__}; needed an integer") from None
    if number < least:
        raise ValueError(f"{name} is {number}; needed at least {least}")
    return number


def indices_of(name: str, given: Any, count: int, distinct: bool) -> AnyArray:
    """Return numbers of sequences."""
    array = np.asarray(given)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise TypeError(f"{name} is {given!r}; needed a list of whole numbers")
    array = array.astype(np.int64)
    if array.size and not 0 <= array.min() <= array.max() < count:
        raise ValueError(f"{name} are {array.min()} to {array.max()}; needed 0 to {count - 1}")
    if distinct and len(set(array.tolist())) < len(array):
        raise ValueError(f"{name} are {array.tolist()}; needed each once")
    return array


def counts_of(lengths: Any, count: int, tokens: int) -> AnyArray:
    """Return how many of the tokens each sequence gets."""
    if lengths is None:
        return np.full(count, tokens, np.int64)
    array = np.asarray(lengths)
    if array.shape != (count,) or (array.dtype.kind not in "iu" and array.size):
        raise ValueError(f"lengths is {lengths!r}; needed {count} whole numbers, one for each sequence")
    if array.size and not 0 <= array.min() <= array.max() <= tokens:
        raise ValueError(f"lengths are {array.min()} to {array.max()}; needed 0 to {tokens}, the tokens of k")
    return array.astype(np.int64)

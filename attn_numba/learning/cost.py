"""What a network costs: its parameters, and the products it takes for a sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from attn_numba.learning.network import Design

__all__ = ["Cost", "multiply_adds"]

Array = NDArray[Any]


class Cost(NamedTuple):
    """What a model costs.

    Parameters
    ----------
    parameters : int
        Numbers that are learned.
    multiply_adds : float
        Products, each with its sum, for a sequence in the mean; a pair of tokens that the window hides costs nothing.
    """

    parameters: int
    multiply_adds: float


def multiply_adds(design: Design, lengths: Any, pairs: float | None = None) -> float:
    """Return the products that a network takes for sequences, in the mean.

    Parameters
    ----------
    design : Design
        What the network is made of.
    lengths : int array (n,)
        Tokens of each sequence.
    pairs : float, optional
        Pairs of query and key that an adaptive window leaves, in the mean of blocks, heads and sequences.

    Returns
    -------
    float
        Products, each with its sum, in the mean.

    Notes
    -----
    Counted are the products with weights and those of attention: ``2 C`` for a visible pair of tokens, over the heads.
    Norms, exponentials and sums are not.

    Examples
    --------
    >>> from attn_numba.learning.attending import Rules
    >>> narrow = Design("vectors", 4, 2, Rules(2), window=(1, 1), hidden_size=8)
    >>> wide = Design("vectors", 4, 2, Rules(2), hidden_size=8)
    >>> multiply_adds(wide, [10]) - multiply_adds(narrow, [10])  # 16 for each of 100 - 28 pairs
    1152.0
    """
    rules, C, L = design.rules, design.hidden_size, np.asarray(lengths, np.float64)
    embedding = {"vectors": design.input_size * C, "features": C, "ids": 0}[design.inputs] * L
    visible = L * L if pairs is None else np.full(len(L), pairs)
    if design.window is not None:
        left, right = (L - 1 if side < 0 else np.minimum(side, L - 1) for side in design.window)
        visible = L * (left + right + 1) - (left * (left + 1) + right * (right + 1)) / 2
    block = (2 if rules.score == "uniform" else 4) * C * C * L + 2 * design.expansion * C * C * L
    block += _pair(rules.score, rules.heads, C // rules.heads, C // rules.heads) * visible
    block += _mapped(rules.score, rules.heads, C // rules.heads) * L
    if rules.adaptive:
        block += rules.heads * C * L
    score = "uniform" if design.pooling == "mean" else "dot" if rules.score == "bilinear" else rules.score
    pooling = (_pair(score, rules.heads, C, C // rules.heads) + _mapped(score, rules.heads, C) / 2) * L
    return float(np.mean(embedding + design.layers * block + pooling + C * design.outputs))


def _pair(score: str, heads: int, query_size: int, value_size: int) -> float:
    """Return the products for a pair of query and key, over the heads."""
    return heads * ((0 if score == "uniform" else query_size) + value_size)


def _mapped(score: str, heads: int, size: int) -> float:
    """Return the products that the maps of a score take for a token: those of a query and a key."""
    return {"bilinear": 1, "additive": 2}.get(score, 0) * heads * size * size

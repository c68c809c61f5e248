"""Characters predicted from counts of the one or two before them, interpolated with shorter histories.

References
----------
F. Jelinek and R. Mercer (1980), "Interpolated estimation of Markov source parameters from sparse data" (the model).
A. Dempster, N. Laird and D. Rubin (1977), "Maximum likelihood from incomplete data via the EM algorithm" (its weights).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]
Floats = NDArray[np.float64]

BUCKETS = 12  # histories seen 0, 1, 2 to 3, 4 to 7, ... times have weights of their own
ROUNDS = 60  # of EM; the likelihood rises with each and has settled long before


class Ngram:
    """An interpolated n-gram model.

    Parameters
    ----------
    order : int
        Length of the longest counted run of characters: 1, 2 or 3.
    vocabulary : int
        How many characters there are.
    training : array (length,)
        The tokens that are counted.

    Attributes
    ----------
    weights : array (BUCKETS, order + 1)
        Of the uniform distribution and the counts of 1 to `order` characters, by how often the longest history was
        seen; each row sums to 1. Even until `fit` is called.

    Notes
    -----
    ``p(c | history) = w_0 / vocabulary + sum_n w_n count(last n - 1 characters, c) / count(last n - 1 characters)``; a
    history that was never seen has the probability 0 there, and EM learns to give it no weight.
    """

    def __init__(self, order: int, vocabulary: int, training: Tokens) -> None:
        if order not in (1, 2, 3):
            raise ValueError(f"order is {order}; needed 1, 2 or 3")
        self.order, self.vocabulary = order, vocabulary
        self.counts = []
        for length in range(1, order + 1):
            runs = _numbers(training, length, vocabulary)
            self.counts.append(np.bincount(runs, minlength=vocabulary**length).reshape(-1, vocabulary))
        self.weights = np.full((BUCKETS, order + 1), 1 / (order + 1))

    def fit(self, tokens: Tokens) -> None:
        """Set the weights by EM to those under which tokens `(length,)` are likeliest; no count changes."""
        parts, buckets = self._parts(tokens, self.order - 1)
        for _ in range(ROUNDS):
            shares = self.weights[buckets] * parts
            shares /= shares.sum(axis=1, keepdims=True)
            for bucket in np.unique(buckets):
                self.weights[bucket] = shares[buckets == bucket].mean(axis=0)

    def bits(self, tokens: Tokens, start: int) -> float:
        """Return the mean bits of each of `tokens[start:]`, given those before it; `start` is at least `order - 1`."""
        parts, buckets = self._parts(tokens, start)
        return float(-np.log2((self.weights[buckets] * parts).sum(axis=1)).mean())

    def _parts(self, tokens: Tokens, start: int) -> tuple[Floats, Tokens]:
        """Return each model's probability of each of `tokens[start:]`, `(count, order + 1)`, and its row of weights."""
        found = [np.full(len(tokens) - start, 1 / self.vocabulary)]
        for length, counts in enumerate(self.counts, 1):
            runs = _numbers(tokens[start - length + 1 :], length, self.vocabulary)
            seen = counts.sum(axis=1)[runs // self.vocabulary]
            found.append(counts.reshape(-1)[runs] / np.maximum(seen, 1))
        buckets = np.minimum(np.frexp(seen)[1], BUCKETS - 1)  # 0, 1, 2 to 3, 4 to 7, ... are 0, 1, 2, 3, ...
        return np.stack(found, axis=1), buckets.astype(np.int64)


def _numbers(tokens: Tokens, length: int, vocabulary: int) -> Tokens:
    """Return each run of `length` tokens as one number, its last token the last digit."""
    count = len(tokens) - length + 1
    numbers = np.zeros(count, np.int64)
    for place in range(length):
        numbers = numbers * vocabulary + tokens[place : place + count]
    return numbers

"""Sequences of symbols in which some are marked, at a tempo of their own: the last marked symbol is asked for.

The task is ours. To answer, a token must see as far back as the last mark, which is less than one beat ago: the span
that is needed goes with the tempo of the sequence, which every token knows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BEATS = (2, 4, 8, 16, 32)  # tokens from one mark to the next, one of them for each sequence
SYMBOLS = 8
INPUTS = SYMBOLS + 2  # of a token: which symbol it is, whether it is marked, and the tempo


@dataclass(frozen=True)
class Marks:
    """Sequences and what each token is to say.

    Attributes
    ----------
    tokens : float32 array (n, length, INPUTS)
        The inputs.
    targets : int array (n, length)
        The last marked symbol, the token's own included; -1 before the first mark.
    beats : int array (n,)
        Tokens from one mark to the next.
    """

    tokens: NDArray[np.float32]
    targets: NDArray[np.int64]
    beats: NDArray[np.int64]

    @property
    def asked(self) -> NDArray[np.bool_]:
        """Which tokens there is an answer for, (n, length)."""
        return self.targets >= 0

    def ceiling(self, span: int) -> float:
        """Return the share of answers, in the mean, of who sees `span` tokens before itself and else guesses."""
        places = np.arange(self.targets.shape[1])
        marked = np.where(self.tokens[..., SYMBOLS] > 0, places, -1)
        since = (places - np.maximum.accumulate(marked, axis=1))[self.asked]
        return float(np.where(since <= span, 1.0, 1 / SYMBOLS).mean())


def draw(count: int, length: int, generator: np.random.Generator) -> Marks:
    """Return `count` sequences of `length` tokens, of all tempos alike; the first mark is within the first beat."""
    beats = generator.choice(BEATS, count)
    begins = (generator.random(count) * beats).astype(int)
    symbols = generator.integers(0, SYMBOLS, (count, length))
    since = (np.arange(length) - begins[:, None]) % beats[:, None]  # tokens since the last mark
    last = np.arange(length) - since
    tokens = np.zeros((count, length, INPUTS), np.float32)
    np.put_along_axis(tokens, symbols[..., None], 1, axis=2)
    tokens[..., SYMBOLS] = since == 0
    tokens[..., SYMBOLS + 1] = np.log2(beats)[:, None] - np.log2(BEATS).mean()
    targets = np.where(last < 0, -1, np.take_along_axis(symbols, np.maximum(last, 0), axis=1))
    return Marks(tokens, targets, beats)

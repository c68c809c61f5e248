"""Philox4x32-10: random words as a function of a counter and a key."""

from __future__ import annotations

from typing import Any

import numpy as np

ROUNDS = 10
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
WORD = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)


def philox4x32(counter: tuple[Any, Any, Any, Any], key: Any) -> list[np.ndarray[Any, Any]]:
    """Return four random words for each counter.

    Parameters
    ----------
    counter : four integers or integer arrays that broadcast together
        Words of the counter; of each the low 32 bits count.
    key : two integers
        Words of the key, 0 to ``2**32 - 1``.

    Returns
    -------
    list of four uint32 arrays
        The random words.

    References
    ----------
    J. K. Salmon, M. A. Moraes, R. O. Dror and D. E. Shaw (2011), "Parallel random numbers: as easy as 1, 2, 3",
    section 3.3.

    Examples
    --------
    >>> [hex(word) for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(x).astype(np.int64).astype(np.uint64) & WORD for x in counter))
    k0, k1 = (np.uint64(int(x)) for x in key)
    for _ in range(ROUNDS):
        even, odd = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # of 32-bit words: exact in 64 bits
        c0, c1, c2, c3 = (odd >> HALF) ^ c1 ^ k0, odd & WORD, (even >> HALF) ^ c3 ^ k1, even & WORD
        k0, k1 = (np.uint64((int(k) + int(step)) & 0xFFFFFFFF) for k, step in zip((k0, k1), KEY_STEPS, strict=True))
    return [c.astype(np.uint32) for c in (c0, c1, c2, c3)]

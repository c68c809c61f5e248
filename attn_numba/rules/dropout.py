"""Dropout: weights zeroed at random, by a rule that depends on seed and place alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attn_numba.rules.data import AnyArray, as_array, frozen, real_number
from attn_numba.rules.philox import philox4x32
from attn_numba.rules.places import Places, Sizes

__all__ = ["Dropout"]


@dataclass(frozen=True, eq=False)
class Dropout:
    """Zero weights at random and divide the others by ``1 - rate``; after the normalizer. Positional.

    The weight at (b, h, i, j) is zeroed when word ``j % 4`` of Philox4x32-10 with key `seed` and counter ``(b, h, i,
    j // 4)`` is below ``rate * 2**32``; so which ones are zeroed depends on nothing else. With one seed for each
    sequence the counter has 0 for b, and a sequence's dropout does not depend on its place in the batch.

    Parameters
    ----------
    rate : float
        Share of weights to zero, ``0 <= rate < 1``.
    seed : int or int array (B,)
        0 to ``2**64 - 1``: the low half is the first word of the key, the high half the second.

    Raises
    ------
    TypeError
        If `rate` is not a number or `seed` not of integers.
    ValueError
        If one is out of range, or the seeds do not fit the number of sequences.

    References
    ----------
    N. Srivastava et al. (2014), "Dropout: a simple way to prevent neural networks from overfitting". Philox: J. K.
    Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3".
    """

    rate: float
    seed: Any
    positional: ClassVar[bool] = True
    uses_positions: ClassVar[bool] = True
    first: ClassVar[tuple[int, int]] = (0, 0)  # sequence and query head that b = 0 and h = 0 stand for

    def __post_init__(self) -> None:
        rate = real_number("Dropout", "rate", self.rate)
        if not 0 <= rate < 1:
            raise ValueError(f"Dropout: rate is {rate}; needed 0 <= rate < 1")
        object.__setattr__(self, "rate", rate)
        seeds = as_array(self.seed, "Dropout", "seed")
        if seeds.dtype.kind not in "iu":
            raise TypeError(f"Dropout: seed has dtype {seeds.dtype}; needed integers from 0 to 2**64 - 1")
        if seeds.ndim > 1:
            raise ValueError(
                f"Dropout: seed has shape {seeds.shape}; needed one integer, or one for each sequence, (B,)"
            )
        if seeds.size and seeds.min() < 0:
            raise ValueError(f"Dropout: seed is {seeds.min()}; needed at least 0")
        object.__setattr__(self, "seed", frozen(seeds, np.uint64) if seeds.ndim else int(seeds))

    @property
    def threshold(self) -> int:
        """Words below this are dropped: the least integer not below ``rate * 2**32``."""
        return math.ceil(self.rate * 2**32)

    @property
    def by_sequence(self) -> bool:
        """Whether each sequence has its own seed (and the counter 0 for b)."""
        return isinstance(self.seed, np.ndarray)

    def keys(self, sizes: Sizes) -> AnyArray:
        """Return the two key words of each sequence, uint32 (B, 2).

        Raises
        ------
        ValueError
            If there are seeds for another number of sequences.
        """
        if self.by_sequence and self.seed.shape != (sizes.B,):
            raise ValueError(f"Dropout: seed has shape {self.seed.shape}; needed one integer, or (B,) = ({sizes.B},)")
        seeds = np.broadcast_to(np.asarray(self.seed, np.uint64), (sizes.B,))
        return np.stack([seeds & np.uint64(2**32 - 1), seeds >> np.uint64(32)], axis=-1).astype(np.uint32)

    def kept(self, places: Places, sizes: Sizes) -> AnyArray:
        """Return which weights are kept, a boolean array (B, H, M, N)."""
        result = np.empty((sizes.B, sizes.H, sizes.M, sizes.N), np.bool_)
        if result.size == 0:
            return result
        first_b, first_h = self.first
        heads = first_h + np.arange(sizes.H)[:, None, None]
        for b, key in enumerate(self.keys(sizes)):
            i, j = (np.broadcast_to(x, (sizes.B, *x.shape[1:]))[b].ravel() for x in (places.i, places.j))
            first = j.min() // 4
            groups = np.arange(first, j.max() // 4 + 1)
            counter = (0 if self.by_sequence else first_b + b, heads, i[None, :, None], groups[None, None, :])
            words = np.stack(philox4x32(counter, key), axis=-1)  # (H, M, groups, 4)
            result[b] = words[:, :, j // 4 - first, j % 4] >= self.threshold
        return result


@dataclass(frozen=True, eq=False)
class DropoutPart(Dropout):
    """What a dropout does in a part of a call: there b and h count from the part's first sequence and query head.

    Parameters
    ----------
    rate : float
        As of the whole.
    seed : int or int array
        As of the whole; of seeds for each sequence, those of the part.
    first_sequence, first_head : int
        Sequence and query head of the whole that b = 0 and h = 0 stand for.

    References
    ----------
    Ours: the counter of `Dropout`, counted from elsewhere.
    """

    first_sequence: int = 0
    first_head: int = 0

    @property
    def first(self) -> tuple[int, int]:  # type: ignore[override]
        return 0 if self.by_sequence else self.first_sequence, self.first_head

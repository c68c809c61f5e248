"""Which block of keys is where at which step of the ring: worked out on every rank from who sees whom, all the same."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from attn_numba.rules.data import AnyArray

__all__ = ["Hop", "Leg", "hops_of", "legs_of"]


class Leg(NamedTuple):
    """Blocks going round one way: each to its owner's neighbor, then to the next one, and so on."""

    direction: int  # 1: to the next higher rank; -1: to the next lower
    reach: tuple[int, ...]  # how many hops the block of each rank makes


class Hop(NamedTuple):
    """What one rank sends and receives on the way to a step's block. Ranks are None where nothing is sent."""

    block: int  # the rank whose block comes
    source: int | None  # who sends it
    sent: int  # the rank whose block goes
    target: int | None  # who gets it
    number: int  # of hops that the block has made when it has come; 1 if it comes from its owner
    reach: int  # hops that this block makes in this leg
    home: int | None  # the rank that this rank's own block has come to in its last hop of the leg, if this is that hop


def legs_of(needed: AnyArray) -> tuple[Leg, ...]:
    """Return how blocks go round, in as few hops as will do: one way, or some one way and then some the other.

    A block goes no further than it is needed. So windows end the ring early, on both sides.

    Parameters
    ----------
    needed : bool array (ranks, ranks)
        Whether a rank's queries see keys of another rank's block.

    Examples
    --------
    Of four ranks each sees the block before its own, then the one after it as well:

    >>> import numpy as np
    >>> before = np.eye(4, k=-1, dtype=bool)
    >>> legs_of(before)
    (Leg(direction=1, reach=(1, 1, 1, 0)),)
    >>> legs_of(before | before.T)
    (Leg(direction=1, reach=(1, 1, 1, 0)), Leg(direction=-1, reach=(0, 1, 1, 1)))
    """
    ranks = len(needed)
    blocks = np.arange(ranks)
    distances = [s for s in range(1, ranks) if needed[(blocks + s) % ranks, blocks].any()]
    splits = [(a + (ranks - b), a, ranks - b) for a, b in zip([0, *distances], [*distances, ranks], strict=True)]
    _, up, down = min(splits, key=lambda split: (split[0], split[2]))
    legs = []
    for direction, most in ((1, up), (-1, down)):
        reach = np.zeros(ranks, np.int64)
        for hop in range(1, most + 1):
            reach[needed[(blocks + direction * hop) % ranks, blocks]] = hop
        if reach.any():
            legs.append(Leg(direction, tuple(int(n) for n in reach)))
    return tuple(legs)


def hops_of(legs: tuple[Leg, ...], rank: int) -> Iterator[Hop]:
    """Yield what a rank does on the way to each step after the first one, whose block is its own."""
    for direction, reach in legs:
        ranks = len(reach)
        before, after = (rank - direction) % ranks, (rank + direction) % ranks
        for number in range(1, max(reach) + 1):
            block, sent = (rank - direction * number) % ranks, (rank - direction * (number - 1)) % ranks
            yield Hop(
                block, before if number <= reach[block] else None,
                sent, after if number <= reach[sent] else None,
                number, reach[block], (rank + direction * number) % ranks if number == reach[rank] else None,
            )  # fmt: skip

"""Gradients by keys and values, that follow a block round the ring and go home when it has come to its last rank."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from attn_numba.integrations.mpi.route import Hop
from attn_numba.integrations.mpi.transfers import Requests
from attn_numba.problem import Problem
from attn_numba.rules.data import AnyArray

__all__ = ["Followers"]

FOLLOWS, GOES_HOME = 2, 4  # first of two tags each; keys and values have those below


class Followers:
    """The sums of gradients that are here: those of this rank's own block, and those that come and go.

    What comes for a block is what the ranks before this one added up; this rank adds its own and sends it after the
    block, a step behind it, or home. So the order of the sums is fixed.

    Parameters
    ----------
    whole : Problem
        The call, with the arrays of this rank.
    counts : sequence of int
        Tokens of each rank.
    rank : int
        This rank.
    """

    def __init__(self, whole: Problem, counts: Sequence[int], rank: int) -> None:
        self._shapes = [(*x.shape[:2], x.shape[3]) for x in (whole.k, whole.v)]
        self._dtype, self._counts = whole.accumulator, counts
        self.home = self._zeros(rank)
        self._mine: list[AnyArray] | None = self.home  # sums of the block that is here
        self._coming: list[AnyArray] = []  # what ranks before added up for it
        self._returning: list[AnyArray] = []  # what others added up for this rank's own block
        self._leaving: list[AnyArray] = []  # sums of the block that was here before, on their way

    def _zeros(self, block: int) -> list[AnyArray]:
        count = self._counts[block]
        return [np.zeros((B, Hk, count, size), self._dtype) for B, Hk, size in self._shapes]

    def begin(self, requests: Requests, last: Hop | None, current: Hop | None) -> None:
        """Begin the messages of a step; `last` led to the step before, `current` to this one, None to the first."""
        if last is not None:
            self._leave(requests, last, current)
        self._coming, self._mine = [], self.home if last is None and current is None else None
        if current is not None and current.source is not None:
            self._mine = self._zeros(current.block)
            if current.number > 1:
                self._coming = self._received(requests, current.block, current.source, FOLLOWS)

    def _leave(self, requests: Requests, last: Hop, current: Hop | None) -> None:
        """Send the sums of the block of the step before on, and receive those of this rank's own block."""
        if last.source is not None:
            assert self._mine is not None
            self._leaving = self._mine
            target, tag = last.block, GOES_HOME
            if last.number < last.reach:
                assert current is not None
                assert current.target is not None
                target, tag = current.target, FOLLOWS
            for n, array in enumerate(self._leaving):
                requests.send(array, target, tag + n)
        if last.home is not None:
            self._returning = self._received(requests, None, last.home, GOES_HOME)

    def _received(self, requests: Requests, block: int | None, source: int, tag: int) -> list[AnyArray]:
        """Begin to receive the sums of a block, None for this rank's own."""
        places = [np.empty_like(array) for array in (self.home if block is None else self._zeros(block))]
        for n, array in enumerate(places):
            requests.receive(array, source, tag + n)
        return places

    def add(self, keys: slice, found: Sequence[AnyArray]) -> None:
        """Add gradients by some keys of the block that is here."""
        assert self._mine is not None
        for total, array in zip(self._mine, found, strict=True):
            total[:, :, keys] += array

    def arrived(self) -> None:
        """Add what has come in this step: all its messages have."""
        for total, array in zip(self._mine or [], self._coming, strict=False):
            total += array
        for total, array in zip(self.home, self._returning, strict=False):
            total += array
        self._coming, self._returning, self._leaving = [], [], []

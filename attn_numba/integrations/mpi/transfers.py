"""Blocks on their way round the ring, sent and received while the rank computes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from attn_numba.integrations.mpi.route import Hop
from attn_numba.rules.data import AnyArray

__all__ = ["Requests", "Transfers"]


class Requests:
    """Messages under way. They move only while MPI is looked at, so `test` is called between pieces of work.

    Parameters
    ----------
    space : mpi4py.MPI.Intracomm
        The communicator.
    """

    def __init__(self, space: Any) -> None:
        from mpi4py import MPI

        self._space, self._mpi = space, MPI
        self._requests: list[Any] = []

    def send(self, array: AnyArray, target: int, tag: int) -> None:
        """Begin to send an array, which must stay as it is until `wait` has returned."""
        if array.size:
            self._requests.append(self._space.Isend(self._bits(array), target, tag))

    def receive(self, array: AnyArray, source: int, tag: int) -> None:
        """Begin to receive an array of this shape into it."""
        if array.size:
            self._requests.append(self._space.Irecv(self._bits(array), source, tag))

    def _bits(self, array: AnyArray) -> list[Any]:
        return [array.reshape(-1, copy=False).view(np.uint8), self._mpi.BYTE]

    def test(self) -> None:
        """Let messages move on."""
        self._mpi.Request.Testall(self._requests)

    def wait(self) -> None:
        """Return when all messages have arrived."""
        self._mpi.Request.Waitall(self._requests)
        self._requests.clear()


class Transfers:
    """Keys and values on their way: this rank's own, and two places for those of others.

    Parameters
    ----------
    own : sequence of arrays (B, Hk, tokens, ...)
        This rank's arrays.
    counts : sequence of int
        Tokens of each rank.
    rank : int
        This rank.
    places : int
        How many blocks of others may be here at a time, at most 2.
    """

    def __init__(self, own: Sequence[AnyArray], counts: Sequence[int], rank: int, places: int) -> None:
        self._own = [np.ascontiguousarray(array) for array in own]
        self._counts, self._rank = counts, rank
        self._places = [
            [np.empty(prod(self._shape(array, max(counts))), array.dtype) for array in own] for _ in range(places)
        ]
        self._here, self._coming = self._own, self._own
        self._step = 0

    @staticmethod
    def _shape(array: AnyArray, tokens: int) -> tuple[int, ...]:
        return (*array.shape[:2], tokens, array.shape[3])

    @property
    def here(self) -> list[AnyArray]:
        """The arrays of the block that this step computes with."""
        return self._here

    def begin(self, requests: Requests, hop: Hop) -> None:
        """Begin to send what is here, or what is this rank's own, and to receive the next block."""
        if hop.target is not None:
            outgoing = self._own if hop.sent == self._rank else self._here
            for tag, array in enumerate(outgoing):
                requests.send(array, hop.target, tag)
        if hop.source is not None:
            tokens = self._counts[hop.block]
            place = self._places[self._step % len(self._places)]
            shapes = [self._shape(array, tokens) for array in self._own]
            self._coming = [flat[: prod(shape)].reshape(shape) for flat, shape in zip(place, shapes, strict=True)]
            for tag, array in enumerate(self._coming):
                requests.receive(array, hop.source, tag)

    def arrived(self) -> None:
        """Go on to the next step; what was begun has arrived."""
        self._here = self._coming
        self._step += 1

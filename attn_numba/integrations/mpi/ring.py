"""The ring: each rank's queries meet the blocks of keys and values of all ranks, one step after the other.

While a step computes, the next block comes and the last one goes on. Gradients by a block follow it round, one step
behind, each rank adding its own, and go home from the last rank that needed the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from attn_numba.integrations.mpi.followers import Followers
from attn_numba.integrations.mpi.layouts import Stretch, sight
from attn_numba.integrations.mpi.route import Hop, hops_of, legs_of
from attn_numba.integrations.mpi.shard import Shard
from attn_numba.integrations.mpi.transfers import Requests, Transfers
from attn_numba.partial import Rows, Sums, add_attention, add_gradients, add_sink, part_of, pieces
from attn_numba.problem import Problem
from attn_numba.rules.data import AnyArray

__all__ = ["Ring", "on_ring"]


class Piece(NamedTuple):
    """Some of the rank's queries, and a stretch of keys of the block that is here."""

    rows: Stretch  # of the whole sequence
    keys: Stretch
    own_rows: slice  # of the rank's arrays
    block_keys: slice  # of the block's arrays


class Ring:
    """One call on a ring, its memory taken and its way round known before anything is sent.

    Parameters
    ----------
    shard : Shard
        Who holds what.
    whole : Problem
        The call as `engine.prepared` returns it: with the arrays of this rank and the sizes of the whole.
    gradients : bool, default False
        Whether the call is for gradients, not outputs.
    """

    def __init__(self, shard: Shard, whole: Problem, gradients: bool = False) -> None:
        self.shard, self.whole = shard, whole
        self.rank, self.counts = shard.comm.rank, shard.counts()
        self._rows = self._own_pieces(gradients)
        self.sees, self._seen = self._sights()
        self.legs = legs_of(self.sees)
        self.hops = [*hops_of(self.legs, self.rank)]
        comes = sum(hop.source is not None for hop in self.hops)
        self.transfers = Transfers((whole.k, whole.v), self.counts, self.rank, min(2, comes))
        self.requests = Requests(shard.space)

    def _own_pieces(self, gradients: bool) -> list[tuple[Stretch, slice]]:
        """Return pieces of this rank's rows, each with the rows of the rank's arrays that it is."""
        longest = max(end - first for own in self.shard.stretches for first, end in own)
        return [
            ((first, end), slice(at.start + first - stretch[0], at.start + end - stretch[0]))
            for stretch, at in self.shard.own_rows()
            for first, end in pieces(stretch, longest, self.whole, gradients)
        ]

    def _sights(self) -> tuple[AnyArray, list[AnyArray]]:
        """Return whether ranks see keys of each other's blocks; and whether this one's pieces do, for each block."""
        counts = [len(own) for own in self.shard.stretches]
        stretches = [stretch for own in self.shard.stretches for stretch in own]
        owners = np.repeat(np.arange(len(counts)), counts)
        sees = np.zeros((len(counts),) * 2, bool)
        np.logical_or.at(sees, (owners[:, None], owners), sight(self.whole, stretches, stretches))
        of_pieces = sight(self.whole, [piece for piece, _ in self._rows], stretches)
        return sees, np.split(of_pieces, np.cumsum(counts)[:-1], axis=1)

    def attention(self, out: AnyArray) -> Rows:
        """Compute this rank's rows.

        Parameters
        ----------
        out : array (B, H, tokens, E)
            Where to, in the accumulator's dtype.
        """
        rows = Rows.empty(out)

        def work(piece: Piece, k: AnyArray, v: AnyArray) -> None:
            add_attention(self._part(piece, k, v), rows.at(piece.own_rows))

        for block in self._steps():
            self._compute(block, work)
        add_sink(self.whole, rows)
        return rows

    def _steps(self, followers: Followers | None = None) -> Iterator[int | None]:
        """Yield the block of each step while the next one is on its way; None where the rank gets none.

        With `followers`, gradients are on their way too. They take one step more.
        """
        last: Hop | None = None
        for n, current in enumerate((None, *self.hops)):
            coming = self.hops[n] if n < len(self.hops) else None
            if coming is not None:
                self.transfers.begin(self.requests, coming)
            if followers is not None:
                followers.begin(self.requests, last, current)
            yield self.rank if current is None else None if current.source is None else current.block
            self.requests.wait()
            if followers is not None:
                followers.arrived()
            if coming is not None:
                self.transfers.arrived()
            last = current
        if followers is not None:
            followers.begin(self.requests, last, None)
            self.requests.wait()
            followers.arrived()

    def _compute(self, block: int | None, work: Callable[[Piece, AnyArray, AnyArray], None]) -> None:
        """Do the work of a block piece by piece, messages moving on in between."""
        if block is None or not self.sees[self.rank, block]:
            return
        k, v = self.transfers.here
        for piece in self._pieces(block):
            work(piece, k[:, :, piece.block_keys], v[:, :, piece.block_keys])
            self.requests.test()

    def _pieces(self, block: int) -> Iterator[Piece]:
        seen, at = self._seen[block], 0
        for n, keys in enumerate(self.shard.stretches[block]):
            count = keys[1] - keys[0]
            for m, (rows, own_rows) in enumerate(self._rows):
                if seen[m, n]:
                    yield Piece(rows, keys, own_rows, slice(at, at + count))
            at += count

    def _part(self, piece: Piece, k: AnyArray, v: AnyArray) -> Problem:
        return part_of(self.whole, self.whole.q[:, :, piece.own_rows], k, v, piece.rows, piece.keys)

    def gradients(
        self, dout: AnyArray, lse: AnyArray, facts: AnyArray | None, delta: AnyArray, sums: Sums
    ) -> tuple[AnyArray, AnyArray, float]:
        """Add the gradients by this rank's rows to `sums` and return those by its own mapped keys and its values.

        Parameters
        ----------
        dout : array (B, H, tokens, E)
            Gradient by this rank's output.
        lse : float64 array (B, H, tokens)
            Of this rank's rows, the sink included.
        facts : float64 array (B, H, tokens, ROW_FACTS) or None
            As `add_gradients` takes them.
        delta : array (B, H, tokens)
            What `delta_of` returns.
        sums : Sums
            Zeros on entry.

        Returns
        -------
        tuple of array (B, Hk, tokens, D), array (B, Hk, tokens, E), float
            And the scale of the gradients among the row sums, 1 on a rank that sees nothing.
        """
        scale = 1.0
        followers = Followers(self.whole, self.counts, self.rank)

        def work(piece: Piece, k: AnyArray, v: AnyArray) -> None:
            nonlocal scale
            at = piece.own_rows
            part = self._part(piece, k, v)
            own = Sums(sums.q[:, :, at], sums.row_sums[:, :, at], sums.learned)
            of_rows = None if facts is None else facts[:, :, at]
            *found, scale = add_gradients(
                part, dout[:, :, at], lse[:, :, at], of_rows, delta[:, :, at], own, piece.rows, piece.keys
            )
            followers.add(piece.block_keys, found)

        for block in self._steps(followers):
            self._compute(block, work)
        dk, dv = followers.home
        return dk, dv, scale


def on_ring(ring: Ring, target: AnyArray) -> Rows:
    """Compute this rank's rows into `target` (B, H, tokens, E), and return what is known of them."""
    number = ring.whole.accumulator
    rows = ring.attention(target if target.dtype == number else np.empty(target.shape, number))
    if rows.out is not target:
        with np.errstate(over="ignore", invalid="ignore"):
            target[...] = rows.out
    return rows

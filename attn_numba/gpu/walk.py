"""Which tiles a block of a tensor-core kernel walks over: those of the other side of which its own rows see some."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attn_numba.gpu import ptx
from attn_numba.gpu.hooks import Hooks
from attn_numba.gpu.target import cuda, device, types

__all__ = ["ALL", "SOME", "walker"]

SOME, ALL = 1, 2  # what is said of a tile: some pairs count; all do, and their scores stay as they are

int32, uint32 = types.int32, types.uint32


def walker(hooks: Hooks, threads: int, rows: int, lines: int, by_keys: bool = False) -> Callable[..., Any]:
    """Return the function for the device that finds the next tile.

    ``next_tile(j, words, b, h, own, count, left, f, p)`` returns the first tile from `j` on that has pairs, or the
    number of tiles, and what is said of it. All threads call it, and `j` runs from 0 without a tile left out.

    Parameters
    ----------
    hooks : Hooks
        The rules.
    threads : int
        Of a block; so many tiles are looked at together, and noted in ``2 * threads // 32`` words from `words` on.
    rows : int
        Of the block itself; `own` is the first of them, `count` how many there are in all.
    lines : int
        Of a tile of the other side, which has `left` lines.
    by_keys : bool
        Whether the block's rows are keys and the lines queries, and not the other way round. A tile is then whole only
        if the block's rows are all there: a key that is not there would have weights, as large as they come.
    """
    load, store, join = ptx.load_shared, ptx.store_shared, ptx.or_shared
    kind, tiled, SCAN = hooks.kind, hooks.masks or hooks.partial, threads // 32
    ROWS, LINES, THREADS = rows, lines, threads

    @device
    def said_of(b, h, own, own_end, first, end, f, p):
        if by_keys:
            return kind(b, h, first, end, own, own_end, f, p)
        return kind(b, h, own, own_end, first, end, f, p)

    @device
    def scan(first, words, b, h, own, count, left, f, p):
        """Note which tiles from the `first` on have pairs that count, and which no others: a tile a thread."""
        t = int32(cuda.threadIdx.x)
        cuda.syncthreads()
        if t < 2 * SCAN:
            store(uint32(words + uint32(4 * t)), uint32(0))
        cuda.syncthreads()
        j0 = int32((first + t) * LINES)
        if j0 < left:
            j1 = int32(min(int32(j0 + LINES), left))
            said = said_of(b, h, own, int32(min(int32(own + ROWS), count)), j0, j1, f, p)
            at, bit = uint32(words + uint32(4 * (t >> 5))), uint32(uint32(1) << uint32(t & 31))
            if said != 0:
                join(at, bit)
            if said == ALL and int32(j1 - j0) == LINES and (not by_keys or int32(own + ROWS) <= count):
                join(uint32(at + uint32(4 * SCAN)), bit)
        cuda.syncthreads()

    @device
    def next_tile(j, words, b, h, own, count, left, f, p):
        tiles = int32((left + LINES - 1) // LINES)
        if not tiled:
            whole = int32((j + 1) * LINES) <= left and (not by_keys or int32(own + ROWS) <= count)
            return j, int32(ALL) if whole else int32(SOME)
        found = int32(SOME)
        while j < tiles:
            n = int32(j & (THREADS - 1))
            if n == 0:
                scan(j, words, b, h, own, count, left, f, p)
            at = uint32(words + uint32(4 * (n >> 5)))
            bits = uint32(load(at) >> uint32(n & 31))
            if bits != uint32(0):
                skipped = int32(cuda.ffs(bits)) - int32(1)
                j = int32(j + skipped)
                certain = uint32(load(uint32(at + uint32(4 * SCAN))) >> uint32(int32(n & 31) + skipped))
                if certain & uint32(1) != uint32(0):
                    found = int32(ALL)
                break
            j = int32(int32(j | 31) + 1)
        return int32(min(j, tiles)), found

    return next_tile

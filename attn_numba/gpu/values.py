"""Weights of a tile times its values, on cards of any kind.

A key that a row does not see has weight minus zero. Minus zero times a finite value adds nothing to a sum; where a tile
of values is not finite throughout, the product asks for the sign of each weight and leaves such keys out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from attn_numba.gpu.elements import reader
from attn_numba.gpu.target import device, opaque
from attn_numba.gpu.tiles import Tile, index, multiplier, wait


def adding(tile: Tile, name: str, real: Any) -> Callable[..., Any]:
    """Return the device function that multiplies the weights of a tile by its values.

    Parameters
    ----------
    tile : Tile
        Sizes of the block.
    name : str
        Of the numbers that v holds in memory.
    real : type
        What they become.

    Returns
    -------
    add_values : device function (sums, values, j0, e0, tx, ty, t, held, ws, vs, flags)
        Fills `sums` with the products of the thread's rows and columns. `values` (N, E) are those of a head, the tile's
        first one is at key j0 and column e0. Shared memory is of `tiles.shapes`: `ws` (keys, rows) with the weights,
        `vs` for steps of the product; ``flags[0]`` is zero, and will say whether a value is not finite. All threads
        call it; on return others may still read what is shared.
    """
    keys_tile, values_tile, depth, R, vector = tile.keys, tile.values, tile.depth, tile.row_part, tile.vector
    threads, groups, span = tile.threads, tile.value_part // vector, tile.block[0] * vector
    sums_size, loads, step = R * tile.value_part, values_tile * depth // threads, threads // values_tile
    read, multiply = reader(name), multiplier(tile, tile.value_part)

    @device
    def fetch_values(held, values, first, end, e0, E, t):
        line, e = opaque(first + t // values_tile), e0 + t % values_tile
        if first + depth <= end and e0 + values_tile <= E:
            for n in range(loads):
                held[n] = real(read(values[index(line + n * step), index(e)]))
        else:
            for n in range(loads):
                found = real(0)
                if line + n * step < end and e < E:
                    found = real(read(values[index(line + n * step), index(e)]))
                held[n] = found

    @device
    def put_values(vs, held, t, flags):
        for n in range(loads):
            found = held[n]
            vs[index(n * step + t // values_tile), index(t % values_tile)] = found
            if found - found != 0:  # infinite or NaN
                flags[0] = 1

    @device
    def multiply_seen(sums, ws, vs, first, tx, ty):
        """Multiply weights by values that are not all finite: those of keys that are not there stay out."""
        for j in range(depth):
            for r in range(R):
                weight = ws[index(first + j), index(ty * R + r)]
                if weight != 0 or math.copysign(real(1), weight) > 0:
                    for g in range(groups):
                        for c in range(vector):
                            sums[(r * groups + g) * vector + c] += (
                                weight * vs[index(j), index(tx * vector + g * span + c)]
                            )

    @device
    def add_values(sums, values, j0, e0, tx, ty, t, held, ws, vs, flags):
        """Multiply the tile's weights by its values, into `sums`."""
        N, E = values.shape[0], values.shape[1]
        for n in range(sums_size):
            sums[n] = real(0)
        fetch_values(held, values, j0, N, e0, E, t)
        for first in range(0, min(keys_tile, N - j0), depth):
            wait()
            put_values(vs, held, t, flags)
            wait()
            fetch_values(held, values, j0 + first + depth, N, e0, E, t)
            if flags[0] == 0:
                multiply(sums, ws, first, vs, tx, ty)
            else:
                multiply_seen(sums, ws, vs, first, tx, ty)

    return add_values

"""Scores of a layer of hidden units: ``w . tanh(q + k)`` for mapped queries and keys, vectors of keys at a time."""

from __future__ import annotations

from attn_numba.cpu.functions import Functions
from attn_numba.cpu.rows import clear, compiled
from attn_numba.cpu.tiles import DEPTH_CHAIN, Operands, define, load_int32, vector_length, word_bytes
from attn_numba.cpu.vectors import Loop

ROWS = 4  # rows of a tile: enough independent chains of operations to fill the time that each of them takes


def _additive_tile(rows: int):
    """tile(unit, a, a_row, b, b_row, c, c_row, w, units): C[r, :] += sum over u of w[u] * tanh(A[r, u] + B[u, :]).

    One vector of columns. Row lengths in words. What is added is one chain of sums, begun at zero. Each element of C
    has one writer, and its bits do not depend on the rows and columns beside it.
    """

    def emit(v: Functions, unit, a, a_row, b, b_row, c, c_row, w, units):
        builder = v.builder
        tile = Operands(v, unit, rows, 1, a, a_row, b, b_row, c, c_row)
        loop = Loop(builder, units, 1, tile.zeros())
        offset = builder.mul(loop.index, tile.size)
        weight = v.splat(v.load(w, offset, v.number))
        right = v.load(builder.add(b, builder.mul(loop.index, tile.b_step)))
        new = []
        for row, old in zip(tile.a_rows, loop.values, strict=True):
            left = v.splat(v.load(row, offset, v.number))
            new.append(v.fma(weight, v.tanh(builder.fadd(left, right)), old))
        sums = loop.close(new)
        tile.store([builder.fadd(old, x) for old, x in zip(tile.load(), sums, strict=True)])

    return define(8, emit)


_add_tile, _add_row = (_additive_tile(rows) for rows in (ROWS, 1))


@compiled
def additive_scores(call, keys, strip, queries, queries_row, weights, runs, count, rows, unit):
    """Fill a tile's stretches of the strip with scores of mapped queries, `queries_row` words apart, and packed keys.

    Many hidden units are summed in chains of `DEPTH_CHAIN`, so that they gather no rounding errors.
    """
    lanes, word = vector_length(unit), word_bytes(unit)
    units, keys_row, length = call.depth, call.keys_row, call.strip_row
    tiled = rows // ROWS * ROWS
    for run in range(count):
        first, end = load_int32(runs + 8 * run), load_int32(runs + 8 * run + 4)
        for r in range(rows):
            clear(strip + (r * length + first) * word, end - first, unit)
        for column in range(first, end, lanes):
            for u in range(0, units, DEPTH_CHAIN):
                chain = min(DEPTH_CHAIN, units - u)
                b, w = keys + (u * keys_row + column) * word, weights + u * word
                a, c = queries + u * word, strip + column * word
                for r in range(0, tiled, ROWS):
                    left, to = a + r * queries_row * word, c + r * length * word
                    _add_tile(unit, left, queries_row, b, keys_row, to, length, w, chain)
                for r in range(tiled, rows):
                    left, to = a + r * queries_row * word, c + r * length * word
                    _add_row(unit, left, queries_row, b, keys_row, to, length, w, chain)

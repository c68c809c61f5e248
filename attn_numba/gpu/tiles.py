"""Tiles of scores on cards of any kind: how a block of threads brings in queries and keys, multiplies them and edits.

A thread has `Tile.row_part` rows, side by side, and `Tile.key_part` keys, which lie in groups of `Tile.vector`: the
threads of a row take one group each and then go on to the next. So a thread reads several numbers at once, and
neighbors read from different banks. Scores are in registers. Rules are applied to them in shared memory, in a loop that
need not be unrolled, so that a rule is in the machine code once and takes no registers from the product.

Only what the simulator knows is used: shared memory, local arrays and barriers. The simulator gives threads to a
kernel's own module alone, so functions here take their place in the block as arguments.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu.elements import reader
from attn_numba.gpu.hooks import Hooks
from attn_numba.gpu.target import SIMULATED, cuda, device, language, opaque, types

__all__ = [
    "ALIGNMENT",
    "ALL",
    "NONE",
    "SOME",
    "Products",
    "Scoring",
    "Tile",
    "index",
    "loader",
    "multiplier",
    "producing",
    "scoring",
    "settling",
    "shapes",
    "wait",
]

CHAIN = 128  # products that are summed in one run, before rounding errors gather
ALIGNMENT = None if SIMULATED else 16  # bytes; of shared memory, so that four numbers are read at once
NONE, SOME, ALL = range(3)  # what is said of a tile


class Tile(NamedTuple):
    """Sizes that are compiled in: of a tile, of a thread's part of it, and of what is in shared memory at a time."""

    rows: int  # of queries
    keys: int
    values: int  # columns of v
    depth: int  # of the head size, and keys of v, in shared memory at a time
    row_part: int  # rows of one thread
    key_part: int  # keys of one thread
    vector: int  # keys of one thread side by side

    @property
    def block(self) -> tuple[int, int]:
        """The threads of a block: how many share a row, and how many share a key."""
        return self.keys // self.key_part, self.rows // self.row_part

    @property
    def threads(self) -> int:
        return math.prod(self.block)

    @property
    def value_part(self) -> int:
        """Columns of v of one thread."""
        return self.values // self.block[0]

    @property
    def held(self) -> int:
        """Numbers of the next step that a thread holds in registers while the block computes this one."""
        return self.depth * max(self.rows + self.keys, self.values) // self.threads

    def check(self) -> None:
        """Raise a ValueError if the sizes do not divide each other as the loops need them to."""
        across, down = self.block
        threads = across * down
        fits = (
            self.rows == down * self.row_part
            and self.keys == across * self.key_part
            and self.values == across * self.value_part
            and self.key_part % self.vector == self.value_part % self.vector == self.keys % self.depth == 0
            and not any(n * self.depth % threads for n in (self.rows, self.keys, self.values))
            and threads % self.depth == threads % self.values == 0
        )
        if not fits:
            raise ValueError(f"tile is {self}; needed sizes that divide each other")


class Scoring(NamedTuple):
    """Device functions for the scores of tiles.

    ``kind(b, h, i0, j0, M, N, f, p, t, flags)`` says whether the tile at row i0 and key j0 has pairs that count, and
    whether it has no others; all threads call it, `flags` are three int32 in shared memory.

    ``scores(s, b, h, i0, j0, whole, queries, keys, units, factor, f, p, tx, ty, t, held, qs, ks, ws)`` fills `s` with
    the thread's final scores of the tile, in natural units, minus infinity where a pair does not count. `queries`
    (M, D) and `keys` (N, D) are those of a head, `units` the address of w of an additive score, and shared memory is of
    `shapes`: `qs` and `ks` for steps of the product, `ws` (keys, rows), where each thread uses the places of its own
    pairs and nothing is left. All threads call it; on return others may still read `qs` and `ks`.
    """

    kind: Callable[..., Any]
    scores: Callable[..., Any]


def shapes(tile: Tile) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
    """Return the shapes of `qs`, `ks` (which also holds values) and `ws` in shared memory.

    Four words beyond a row: rows stay aligned, and columns lie in different banks.
    """
    return (
        (tile.depth, tile.rows + 4),
        (tile.depth, max(tile.keys, tile.values) + 4),
        (tile.keys, tile.rows + 4),
    )


index = int if SIMULATED else types.uint64  # of an array: Numba need not ask whether it counts from the end

if SIMULATED:

    def wait():
        """Wait until all threads of the block are here."""
        threading.current_thread().syncthreads()  # type: ignore[attr-defined]

else:

    @device
    def wait():
        """Wait until all threads of the block are here."""
        cuda.syncthreads()


def loader(tile: Tile, lines: int, name: str, real: Any, at: int = 0) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return device functions that bring columns of `lines` rows of q or k to registers, and from there to a stage.

    Parameters
    ----------
    tile : Tile
        Sizes of the block.
    lines : int
        Rows of a tile.
    name : str
        Of the numbers in memory.
    real : type
        What they become.
    at : int
        The first of the registers.

    Returns
    -------
    fetch : device function (held, rows, first, end, d0, D, t)
        Zeros beyond `end` and D.
    put : device function (stage, held, t)
        Columns become rows of the stage.
    """
    read, depth, step = reader(name), tile.depth, tile.threads // tile.depth
    loads = lines // step

    @device
    def fetch(held, rows, first, end, d0, D, t):
        line, d = opaque(first + t // depth), d0 + t % depth
        if first + lines <= end and d0 + depth <= D:
            for n in range(loads):
                held[at + n] = real(read(rows[index(line + n * step), index(d)]))
        else:
            for n in range(loads):
                found = real(0)
                if line + n * step < end and d < D:
                    found = real(read(rows[index(line + n * step), index(d)]))
                held[at + n] = found

    @device
    def put(stage, held, t):
        for n in range(loads):
            stage[index(t % depth), index(n * step + t // depth)] = held[at + n]

    return fetch, put


def multiplier(tile: Tile, part: int) -> Callable[..., Any]:
    """Return the device function that adds a step's products to a thread's sums.

    Parameters
    ----------
    tile : Tile
        Sizes of the block.
    part : int
        Columns of one thread: its keys, or its columns of v.

    Returns
    -------
    multiply : device function (sums, a, first, b, tx, ty)
        Adds to the sums of the thread's rows and columns what the rows of `a` from `first` on, `Tile.depth` of them,
        give with those of `b`.
    """
    R, vector = tile.row_part, tile.vector
    groups, span = part // vector, tile.block[0] * vector

    @device
    def add(sums, a, first, b, d, tx, ty):
        for r in range(R):
            for g in range(groups):
                for c in range(vector):
                    x = (r * groups + g) * vector + c
                    sums[x] += a[index(first + d), index(ty * R + r)] * b[index(d), index(tx * vector + g * span + c)]

    every = _repeated(add, tile.depth)

    @device
    def multiply(sums, a, first, b, tx, ty):
        every(sums, a, first, b, 0, tx, ty)

    return multiply


def _repeated(add: Callable[..., Any], count: int) -> Callable[..., Any]:
    """Return the device function that does so many steps: as a loop it would not be unrolled."""
    if count == 1:
        return add
    half = count // 2
    left, right = _repeated(add, half), _repeated(add, count - half)

    @device
    def both(sums, a, first, b, d, tx, ty):
        left(sums, a, first, b, d, tx, ty)
        right(sums, a, first, b, d + half, tx, ty)

    return both


def settling(hooks: Hooks, rows: int, keys: int, threads: int) -> Callable[..., Any]:
    """Return the function `Scoring.kind` of tiles of so many rows and keys, for blocks of so many threads."""
    int32, unknown = language(np.dtype(hooks.number))["int32"], hooks.unknown
    kind_of, look, answer = hooks.kind, hooks.look, hooks.answer

    @device
    def kind(b, h, i0, j0, M, N, f, p, t, flags):
        i1, j1 = int32(min(i0 + rows, M)), int32(min(j0 + keys, N))
        found = int32(kind_of(b, h, int32(i0), i1, int32(j0), j1, f, p))
        if unknown and found == SOME:
            wait()
            if t == 0:
                flags[1] = 0
                flags[2] = 0
            wait()
            bits = look(b, h, int32(i0), i1, int32(j0), j1, int32(t), int32(threads), f, p)
            if bits & 1:
                flags[1] = 1
            if bits & 2:
                flags[2] = 2
            wait()
            found = int32(answer(int32(flags[1] | flags[2])))
        return found

    return kind


class Products(NamedTuple):
    """Device functions for the products of two tiles of rows.

    ``products(s, h, i0, j0, queries, keys, units, tx, ty, t, held, qs, ks, ws)`` fills `s` with the products of the
    thread's pairs, before any rule, from row i0 of `queries` (M, D) and row j0 of `keys` (N, D) on. Shared memory is
    as `Scoring` has it.

    ``leave(s, ws, tx, ty)`` puts the thread's numbers in their places in `ws`, ``take(s, ws, tx, ty)`` takes them back.
    """

    products: Callable[..., Any]
    leave: Callable[..., Any]
    take: Callable[..., Any]


def producing(
    tile: Tile, number: np.dtype[Any], query_name: str, key_name: str, additive: bool = False, chain: int = CHAIN
) -> Products:
    """Return the functions for products of tiles, in numbers of a dtype; the rest is as `scoring` has it."""
    names = language(np.dtype(number))
    real, tanh = names["number"], names["tanh"]
    tile.check()
    rows_tile, keys_tile, _, depth, R, C, vector = tile
    groups, span = C // vector, tile.block[0] * vector
    count = R * C
    query_loads = rows_tile * depth // tile.threads
    multiply = multiplier(tile, C)
    fetch_queries, put_queries = loader(tile, rows_tile, query_name, real)
    fetch_keys, put_keys = loader(tile, keys_tile, key_name, real, query_loads)

    @device
    def add_units(s, qs, ks, tx, ty, units, first, end):
        for d in range(end):
            unit = units[first + d]
            for r in range(R):
                for g in range(groups):
                    for c in range(vector):
                        x = qs[d, ty * R + r] + ks[d, tx * vector + g * span + c]
                        s[(r * groups + g) * vector + c] += unit * tanh(x)

    @device
    def leave(s, ws, tx, ty):
        """Put the thread's scores in their places."""
        for g in range(groups):
            for c in range(vector):
                for r in range(R):
                    ws[index(tx * vector + g * span + c), index(ty * R + r)] = s[(r * groups + g) * vector + c]

    @device
    def add_left(s, ws, tx, ty):
        """Add what lies in the places of the thread's scores."""
        for g in range(groups):
            for c in range(vector):
                for r in range(R):
                    s[(r * groups + g) * vector + c] += ws[index(tx * vector + g * span + c), index(ty * R + r)]

    @device
    def take(s, ws, tx, ty):
        """Take the thread's scores back from their places."""
        for g in range(groups):
            for c in range(vector):
                for r in range(R):
                    s[(r * groups + g) * vector + c] = ws[index(tx * vector + g * span + c), index(ty * R + r)]

    @device
    def products(s, h, i0, j0, queries, keys, units, tx, ty, t, held, qs, ks, ws):
        M, N, D = queries.shape[0], keys.shape[0], queries.shape[1]
        for n in range(count):
            s[n] = real(0)
        fetch_queries(held, queries, i0, M, 0, D, t)
        fetch_keys(held, keys, j0, N, 0, D, t)
        for d0 in range(0, D, depth):
            wait()
            put_queries(qs, held, t)
            put_keys(ks, held, t)
            wait()
            fetch_queries(held, queries, i0, M, d0 + depth, D, t)
            fetch_keys(held, keys, j0, N, d0 + depth, D, t)
            if d0 > 0 and d0 % chain == 0:  # what `ws` held has been read by all
                if d0 > chain:
                    add_left(s, ws, tx, ty)
                leave(s, ws, tx, ty)
                for n in range(count):
                    s[n] = real(0)
            if additive:
                add_units(s, qs, ks, tx, ty, units, h * D + d0, min(depth, D - d0))
            else:
                multiply(s, qs, 0, ks, tx, ty)
        if chain < D:
            add_left(s, ws, tx, ty)

    return Products(products, leave, take)


def scoring(
    hooks: Hooks, tile: Tile, *, query_name: str, key_name: str, additive: bool = False, chain: int = CHAIN
) -> Scoring:
    """Return the functions for the scores of a call's tiles.

    Parameters
    ----------
    hooks : Hooks
        The rules of the call.
    tile : Tile
        Sizes of the block.
    query_name, key_name : str
        Of the numbers that q and k hold in memory.
    additive : bool
        Whether a score is ``w . tanh(q + k)``, and not ``q . k``.
    chain : int
        Products that are summed in one run, a multiple of the tile's depth.
    """
    names = language(np.dtype(hooks.number))
    real, int32, product = (names[name] for name in ("number", "int32", "product"))
    fixed_masks, scored, partial = hooks.masks, hooks.scores, hooks.partial
    scaled = scored and not partial
    allowed, plain, score = hooks.allowed, hooks.plain, hooks.score
    rows_tile, keys_tile, _, _, R, C, vector = tile
    span, count = tile.block[0] * vector, R * C
    kind = settling(hooks, rows_tile, keys_tile, tile.threads)
    products, leave, take = producing(tile, np.dtype(hooks.number), query_name, key_name, additive, chain)

    @device
    def edit(ws, b, h, i0, j0, M, N, whole, factor, f, p, tx, ty):
        """Apply the rules to the thread's scores in their places."""
        for n in range(count):
            row, c = ty * R + n % R, n // R
            column = tx * vector + c // vector * span + c % vector
            i, j = int32(i0 + row), int32(j0 + column)
            seen = i < M and j < N
            x = ws[column, row]
            if partial:
                if seen and not whole and not plain(b, h, i, j, f, p):
                    seen = allowed(b, h, i, j, f, p)
                    if seen:
                        x = real(score(x, b, h, i, j, f, p))
            else:
                if fixed_masks and seen and not whole:
                    seen = allowed(b, h, i, j, f, p)
                if scored and seen:
                    x = real(score(x, b, h, i, j, f, p))
            if not scaled:
                x = real(product(x, factor))
            ws[column, row] = x if seen else real(-math.inf)

    @device
    def scores(s, b, h, i0, j0, whole, queries, keys, units, factor, f, p, tx, ty, t, held, qs, ks, ws):
        M, N = queries.shape[0], keys.shape[0]
        products(s, h, i0, j0, queries, keys, units, tx, ty, t, held, qs, ks, ws)
        if scaled or not whole or j0 + keys_tile > N:
            leave(s, ws, tx, ty)
            edit(ws, b, h, i0, j0, M, N, whole, factor, f, p, tx, ty)
            take(s, ws, tx, ty)
        else:
            for n in range(count):
                s[n] = real(product(s[n], factor))

    return Scoring(kind, scores)

"""Gradients by the arrays of modifiers: of each pair what it gives the element that it reads, summed.

An array without a key axis (and the slopes of `ALiBi`) gets a sum for each query, one with a key axis and no query axis
a sum for each key and query head; both are (B, H, rows) in memory, and `backward_sums` adds up the rest. Of a bias with
both axes, which is as large as the scores are, a block owns a tile of elements and walks over the sequences and heads
that share it. Each number is written by one thread, each sum has one order.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu.backward_general import MOST_BLOCKS, flat
from attn_numba.gpu.backward_tiles import FACTS, normalizer_of, pairing
from attn_numba.gpu.elements import element_name, element_type
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import cuda, device, language, types
from attn_numba.gpu.tiles import ALIGNMENT, ALL, NONE, Tile, producing, settling, shapes
from attn_numba.problem import Problem

__all__ = ["BY_KEY", "BY_PAIR", "BY_QUERY", "arguments", "grid", "kind_of", "program", "refusal", "shape_of"]

BY_QUERY, BY_KEY, BY_PAIR = "query", "key", "pair"  # what there is one number for
TILES = {"float32": Tile(64, 64, 64, 8, 8, 4, 4), "float64": Tile(32, 32, 64, 8, 4, 4, 2)}


class Options(NamedTuple):
    """What the kernel depends on beside the rules."""

    tile: Tile
    kind: str
    learned: int  # which of the rules' derivatives
    normalizer: str
    additive: bool  # whether a score is w . tanh(q + k), and not q . k
    q: str  # names of the numbers in the arrays
    k: str
    v: str
    dout: str


def tile_of(problem: Problem) -> Tile:
    """Return the tile of a call: all is within 48 kB of shared memory."""
    return TILES[problem.accumulator.name]


def kind_of(shape: tuple[int, ...], axes: str) -> str:
    """Return what there is one number for, of an array of that shape which broadcasts to `axes`."""
    sizes = dict(zip(axes[::-1], shape[::-1], strict=False))
    if sizes.get("N", 1) == 1:
        return BY_QUERY
    return BY_KEY if sizes.get("M", 1) == 1 else BY_PAIR


def shape_of(problem: Problem, kind: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of what the kernel writes, four axes; that of an array by pair is its own."""
    s = problem.sizes
    if kind == BY_PAIR:
        return (1,) * (4 - len(shape)) + shape
    return s.B, s.H, s.M if kind == BY_QUERY else 1, 1 if kind == BY_QUERY else s.N


def refusal(problem: Problem, kind: str, shape: tuple[int, ...]) -> str:
    """Return why the kernel cannot serve a call; an empty text where it can."""
    count = grid(problem, kind, shape)[0]
    if count > MOST_BLOCKS[0]:
        return (
            f"the gradient by an array of shape {shape} would take {count} blocks, and a card starts {MOST_BLOCKS[0]}"
        )
    return ""


def program(problem: Problem, bound: Bound, kind: str, learned: int) -> Program:
    """Return the kernel of one array.

    Parameters
    ----------
    problem : Problem
        The call, with the maps of its score applied.
    bound : Bound
        Its rules, with derivatives.
    kind : {BY_QUERY, BY_KEY, BY_PAIR}
        What there is one number for.
    learned : int
        Which of the derivatives ``bound.hooks.learned``.
    """
    hooks, tile = bound.hooks, tile_of(problem)
    q, k, v = (element_name(x, problem) for x in (problem.q, problem.k, problem.v))
    normalizer = type(problem.normalizer).__name__
    options = Options(tile, kind, learned, normalizer, not problem.score.dots, q, k, v, problem.dtype)
    number = getattr(types, hooks.number)
    real = types.CPointer(number)
    arrays = (types.Array(element_type(name), 4, "A") for name in (q, k, v, problem.dtype))
    signature = (*arrays, real, types.int32, types.int32, types.int32, real, real, bound.signature(), number)
    make = functools.partial(make_kernel, hooks, options)
    return Program("gradient_rules", tuple(options), hooks, make, signature, tile.block, 2, 0, False)


def grid(problem: Problem, kind: str, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of blocks for an array of that shape; 0 where there is nothing to write."""
    tile = tile_of(problem)
    B, H, M, N = shape_of(problem, kind, shape)
    if kind == BY_PAIR:
        return B * H * -(-M // tile.rows) * -(-N // tile.keys), 1, 1
    return B * H * -(-(M if kind == BY_QUERY else N) // tile.rows), 1, 1


def arguments(
    problem: Problem, entries: tuple[Any, ...], dout: Any, facts: Any, units: Any, result: Any, add: bool
) -> tuple[Any, ...]:
    """Return the kernel's parameters.

    Parameters
    ----------
    problem : Problem
        The call, with the maps of its score applied.
    entries : tuple
        ``bound.entries`` with the arrays on the device.
    dout : view (B, H, M, E)
        With any strides, as q, k and v have; the views that follow are contiguous.
    facts : view (B, H, M, FACTS)
        What `backward_rows` writes.
    units : view (H, hidden) or None
        Weights of the hidden units of an additive score.
    result : view
        Of `shape_of`.
    add : bool
        Whether to add to what is there; of an array by pair.
    """
    scale = problem.accumulator.type(problem.scale)
    kept = [np.int32(n) for n in result.shape[:2]]
    arrays = problem.q, problem.k, problem.v, dout
    return *arrays, flat(result), *kept, np.int32(add), flat(facts), flat(units), entries, scale


def make_kernel(hooks: Hooks, options: Options) -> Callable[..., None]:
    """Return the kernel, a plain function.

    ``kernel(q, k, v, dout, result, sequences, heads, add, stats, units, p, scale)`` is for blocks of ``tile.block``
    threads in a grid of `grid`; `sequences` and `heads` are how many of them have elements of their own. `scale` is
    what products are multiplied by where the rules do not do it.
    """
    tile, number = options.tile, np.dtype(hooks.number)
    names = language(number)
    real, int32 = names["number"], names["int32"]
    by_key, by_pair = options.kind == BY_KEY, options.kind == BY_PAIR
    fixed, learned = hooks.fixed, hooks.learned[options.learned]
    rows_tile, keys_tile, _, _, R, C, vector = tile
    across, threads = tile.block[0], tile.threads
    span, scores_size, held_size = across * vector, R * C, tile.held
    stage_rows, stage_keys, stage_numbers = shapes(tile)
    lines = keys_tile if by_key else rows_tile  # of queries in a tile
    facts_shape, parts_shape = (FACTS, lines), (rows_tile, across + 1)
    final, _, gradient = pairing(hooks, normalizer_of(options.normalizer))
    tile_kind = settling(hooks, *((keys_tile, rows_tile) if by_key else (rows_tile, keys_tile)), threads)
    own, other = (options.k, options.q) if by_key else (options.q, options.k)
    scores, leave, _ = producing(tile, number, own, other, options.additive)
    own, other = (options.v, options.dout) if by_key else (options.dout, options.v)
    weight_products = producing(tile, number, own, other).products

    @device
    def bring_facts(facts, stats, first, count, t):
        """Bring the facts of queries to shared memory; `first` is the place of the first among those of all heads."""
        for n in range(t, FACTS * min(lines, count), threads):
            facts[n % FACTS, n // FACTS] = stats[first * FACTS + n]

    @device
    def give(ws, us, b, h, r0, w0, M, N, whole, facts, factor, f, p, tx, ty):
        """Put in the places of the thread's pairs what they give the elements that they read."""
        for n in range(scores_size):
            row, c = ty * R + n % R, n // R
            column = tx * vector + c // vector * span + c % vector
            i, j, line = int32(r0 + row), int32(w0 + column), row
            if by_key:
                i, j, line = int32(w0 + column), int32(r0 + row), column
            x = ws[column, row]
            y = final(x, b, h, i, j, i < M and j < N, whole, factor, f, p)
            found = real(0)
            if y != -math.inf:
                ds = real(gradient(y, us[column, row], b, h, i, j, facts, line, f, p))
                found = real(learned(x, ds, b, h, i, j, f, p))
            ws[column, row] = found

    @device
    def add_across(parts, ws, tx, ty):
        """Add the thread's pairs of a tile to its sums for rows."""
        for r in range(R):
            row, total = ty * R + r, real(0)
            for c in range(C):
                total += ws[tx * vector + c // vector * span + c % vector, row]
            parts[row, tx] += total

    @device
    def add_pairs(result, ws, first, r0, w0, M, N, tx, ty):
        """Add the thread's pairs to the elements of a bias; `first` is the place of its first one."""
        for n in range(scores_size):
            row, c = ty * R + n % R, n // R
            column = tx * vector + c // vector * span + c % vector
            if r0 + row < M and w0 + column < N:
                result[first + (r0 + row) * N + w0 + column] += ws[column, row]

    @device
    def clear(result, first, r0, w0, M, N, tx, ty):
        for n in range(scores_size):
            row, c = ty * R + n % R, n // R
            column = tx * vector + c // vector * span + c % vector
            if r0 + row < M and w0 + column < N:
                result[first + (r0 + row) * N + w0 + column] = real(0)

    def kernel(q, k, v, dout, result, sequences, heads, add, stats, units, p, scale):
        qs = cuda.shared.array(stage_rows, real, ALIGNMENT)
        ks = cuda.shared.array(stage_keys, real, ALIGNMENT)
        ws = cuda.shared.array(stage_numbers, real, ALIGNMENT)  # products of q and k, then what `give` makes
        us = cuda.shared.array(stage_numbers, real, ALIGNMENT)  # products of dout and v
        facts = cuda.shared.array(facts_shape, real)
        parts = cuda.shared.array(parts_shape, real)  # sums of each thread
        flags = cuda.shared.array(3, types.int32)
        s = cuda.local.array(scores_size, real)
        held = cuda.local.array(held_size, real)

        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        t = ty * across + tx
        B, H, M, N = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
        shared = H // k.shape[1]
        count, left = (N, M) if by_key else (M, N)
        blocks = (count + rows_tile - 1) // rows_tile
        place, first_w, end_w = cuda.blockIdx.x, 0, left
        if by_pair:
            across_blocks = (N + keys_tile - 1) // keys_tile
            first_w = place % across_blocks * keys_tile
            end_w = min(first_w + keys_tile, N)
            place = place // across_blocks
        head, r0 = place // blocks, place % blocks * rows_tile
        own_b, own_h = head // heads, head % heads
        first = head * M * N  # of a bias
        if by_pair and add == 0:
            clear(result, first, r0, first_w, M, N, tx, ty)
        for x in range(t, rows_tile * across, threads):
            parts[x // across, x % across] = real(0)
        cuda.syncthreads()

        sharing_b, sharing_h = B // sequences if by_pair else 1, H // heads if by_pair else 1
        for n in range(sharing_b * sharing_h):
            b = int32(own_b if sequences == B else n // sharing_h)
            h = int32(own_h if heads == H else n % sharing_h)
            queries, keys, values, douts = q[b, h], k[b, h // shared], v[b, h // shared], dout[b, h]
            f = fixed(b, h, p)
            for w0 in range(first_w, end_w, keys_tile):
                i0, j0 = (w0, r0) if by_key else (r0, w0)
                said = tile_kind(b, h, i0, j0, M, N, f, p, t, flags)
                if said != NONE:
                    bring_facts(facts, stats, (b * H + h) * M + i0, M - i0, t)
                    if by_key:
                        scores(s, h, r0, w0, keys, queries, units, tx, ty, t, held, qs, ks, ws)
                    else:
                        scores(s, h, r0, w0, queries, keys, units, tx, ty, t, held, qs, ks, ws)
                    leave(s, ws, tx, ty)
                    if by_key:
                        weight_products(s, h, r0, w0, values, douts, units, tx, ty, t, held, qs, ks, us)
                    else:
                        weight_products(s, h, r0, w0, douts, values, units, tx, ty, t, held, qs, ks, us)
                    leave(s, us, tx, ty)
                    give(ws, us, b, h, r0, w0, M, N, said == ALL, facts, scale, f, p, tx, ty)
                    if by_pair:
                        add_pairs(result, ws, first, r0, w0, M, N, tx, ty)
                    else:
                        add_across(parts, ws, tx, ty)
                    cuda.syncthreads()
        if not by_pair:
            cuda.syncthreads()
            for row in range(t, rows_tile, threads):
                if r0 + row < count:
                    total = real(0)
                    for x in range(across):
                        total += parts[row, x]
                    result[head * count + r0 + row] = total

    return kernel

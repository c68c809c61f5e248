"""Gradients by q, k and v for every card, dtype, score and normalizer; the simulator runs it too.

One kernel, compiled for each of the three: a block owns `Tile.rows` rows of queries (for dq) or of keys (for dk and
dv), and of the result `Tile.values` columns. It walks over the rows of the other side, for keys over those of all query
heads that share their head: makes a tile of numbers, gradients by products or weights, and multiplies it by rows of k,
of q, or of dout. Each element of a result is written by one thread, and each sum has one order, as in the forward pass.

A pair that does not count has the number minus zero, by a branch, and is left out of that product (`values`); one that
counts never has.

Of an additive score the gradient by a mapped row is no such product; there each thread adds up its elements in memory,
which no other thread writes. The gradient by w is made of the sums for each query, `UNITS`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu.backward_tiles import FACTS, normalizer_of, pairing, tile_of
from attn_numba.gpu.elements import element_name, element_type, reader, writer
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import SIMULATED, cuda, device, language, types
from attn_numba.gpu.tiles import ALIGNMENT, ALL, NONE, Tile, producing, settling, shapes
from attn_numba.gpu.values import adding
from attn_numba.problem import Problem

__all__ = ["KEYS", "QUERIES", "UNITS", "VALUES", "arguments", "grid", "program", "refusal"]

QUERIES, KEYS, VALUES, UNITS = "q", "k", "v", "units"  # what the gradient is by
MOST_BLOCKS = (2**31 - 1, 2**16 - 1)  # of a grid, in x and y


class Options(NamedTuple):
    """What the kernel depends on beside the rules."""

    tile: Tile
    of: str
    normalizer: str
    additive: bool  # whether a score is w . tanh(q + k), and not q . k
    q: str  # names of the numbers in the arrays
    k: str
    v: str
    dout: str
    result: str


def refusal(problem: Problem, capability: tuple[int, int]) -> str:
    """Return why the kernels cannot serve a call; an empty text where they can."""
    for of in (QUERIES, KEYS, VALUES):
        for count, most in zip(grid(problem, of), MOST_BLOCKS, strict=False):
            if count > most:
                return f"the gradient by {of} would take {count} blocks, and a card starts {most}"
    return ""


def columns_of(problem: Problem, of: str) -> int:
    """Return how many columns a result has."""
    return problem.sizes.E if of == VALUES else int(problem.q.shape[3])


def program(problem: Problem, bound: Bound, of: str, result: str) -> Program:
    """Return the kernel of one gradient.

    Parameters
    ----------
    problem : Problem
        The call, with the maps of its score applied.
    bound : Bound
        Its rules, with derivatives.
    of : {QUERIES, KEYS, VALUES, UNITS}
        What the gradient is by.
    result : str
        Name of the numbers that are written; the accumulator's of an additive score, but for v.
    """
    hooks, tile = bound.hooks, tile_of(problem, columns_of(problem, of))
    q, k, v = (element_name(x, problem) for x in (problem.q, problem.k, problem.v))
    options = Options(
        tile, of, type(problem.normalizer).__name__, not problem.score.dots, q, k, v, problem.dtype, result
    )
    real = types.CPointer(getattr(types, hooks.number))
    arrays = (types.Array(element_type(name), 4, "A") for name in (q, k, v, problem.dtype, result))
    signature = (*arrays, real, real, bound.signature(), getattr(types, hooks.number))
    make = functools.partial(make_kernel, hooks, options)
    return Program("gradient", tuple(options), hooks, make, signature, tile.block, 2, 0, False)


def grid(problem: Problem, of: str) -> tuple[int, int, int]:
    """Return the number of blocks: for rows, and for slices of the columns. One of 0 says that there are no rows."""
    s, columns = problem.sizes, columns_of(problem, of)
    tile = tile_of(problem, columns)
    heads, rows = (s.H, s.M) if of in (QUERIES, UNITS) else (s.Hk, s.N)
    return s.B * heads * -(-rows // tile.rows), -(-columns // tile.values), 1


def arguments(
    problem: Problem, entries: tuple[Any, ...], dout: Any, facts: Any, units: Any, result: Any
) -> tuple[Any, ...]:
    """Return the kernel's parameters.

    Parameters
    ----------
    problem : Problem
        The call, with the maps of its score applied.
    entries : tuple
        ``bound.entries`` with the arrays on the device.
    dout : view (B, H, M, E)
        With any strides, as q, k and v have.
    facts : view (B, H, M, FACTS)
        What `backward_rows` writes.
    units : view (H, hidden)
        What `forward_general.units_of` returns.
    result : view (B, H, M, D), (B, Hk, N, D), (B, Hk, N, E) or (B, H, M, hidden)
        With any strides.
    """
    scale = problem.accumulator.type(problem.scale)
    return problem.q, problem.k, problem.v, dout, result, flat(facts), flat(units), entries, scale


def flat(x: Any) -> Any:
    """Return an array as the simulator takes one that kernels know by its address."""
    return x.reshape(-1) if SIMULATED and x is not None else x


def make_kernel(hooks: Hooks, options: Options) -> Callable[..., None]:
    """Return the kernel, a plain function.

    ``kernel(q, k, v, dout, result, stats, units, p, scale)`` is for blocks of ``tile.block`` threads in a grid of
    `grid`. `scale` is what products are multiplied by where the rules do not do it.
    """
    tile, of, additive = options.tile, options.of, options.additive and options.of != VALUES
    number = np.dtype(hooks.number)
    names = language(number)
    real, int32, tanh, product = (names[name] for name in ("number", "int32", "tanh", "product"))
    by_keys, by_values, by_units = of in (KEYS, VALUES), of == VALUES, of == UNITS
    fixed, kept, drops, keep_factor = hooks.fixed, hooks.kept, hooks.drops, hooks.keep_factor
    slope, sloped = hooks.slope, hooks.slope is not None
    rows_tile, keys_tile, values_tile, _, R, C, vector = tile
    across, threads, V = tile.block[0], tile.threads, tile.value_part
    value_groups, span = V // vector, across * vector
    scores_size, sums_size, held_size = R * C, R * V, tile.held
    stage_rows, stage_keys, stage_numbers = shapes(tile)
    lines = keys_tile if by_keys else rows_tile  # of queries in a tile
    facts_shape = (FACTS, lines)
    pairs = pairing(hooks, normalizer_of(options.normalizer))
    final, weight, gradient = pairs
    tile_kind = settling(hooks, *((keys_tile, rows_tile) if by_keys else (rows_tile, keys_tile)), threads)
    own, other = (options.k, options.q) if by_keys else (options.q, options.k)
    scores, leave, _ = producing(tile, number, own, other, options.additive)
    own, other = (options.v, options.dout) if by_keys else (options.dout, options.v)
    weight_products = producing(tile, number, own, other).products
    factors = {QUERIES: options.k, KEYS: options.q, VALUES: options.dout}.get(of, options.k)
    add_products = adding(tile, factors, real)
    read_query, read_key, write = reader(options.q), reader(options.k), writer(options.result)

    @device
    def bring_facts(facts, stats, first, count, t):
        """Bring the facts of queries to shared memory; `first` is the place of the first among those of all heads."""
        for n in range(t, FACTS * min(lines, count), threads):
            facts[n % FACTS, n // FACTS] = stats[first * FACTS + n]

    @device
    def fill(ws, us, b, h, r0, w0, M, N, whole, facts, factor, f, p, tx, ty):
        """Put in the places of the thread's pairs what is multiplied by rows of the other side."""
        for n in range(scores_size):
            row, c = ty * R + n % R, n // R
            column = tx * vector + c // vector * span + c % vector
            i, j, line = int32(r0 + row), int32(w0 + column), row
            if by_keys:
                i, j, line = int32(w0 + column), int32(r0 + row), column
            x = ws[column, row]
            y = final(x, b, h, i, j, i < M and j < N, whole, factor, f, p)
            found = real(-0.0)
            if y != -math.inf:
                if by_values:
                    found = real(weight(y, facts, line))
                    if drops and not kept(b, h, i, j, f, p):
                        found = real(0)
                else:
                    found = real(gradient(y, us[column, row], b, h, i, j, facts, line, f, p))
                    found = real(slope(x, found, b, h, i, j, f, p)) if sloped else real(product(found, factor))
                    if found == 0:
                        found = real(0)
            ws[column, row] = found

    @device
    def add_units(rows, ws, queries, keys, units, first, r0, w0, e0, count, left, tx, ty):
        """Add to elements of the result what a tile of an additive score gives them."""
        D = rows.shape[1]
        for n in range(sums_size):
            row, c = ty * R + n % R, n // R
            e = e0 + tx * vector + c // vector * span + c % vector
            if r0 + row < count and e < D:
                total, unit = real(0), units[first + e]
                for column in range(min(keys_tile, left - w0)):
                    ds = ws[column, row]
                    if ds != 0 or math.copysign(real(1), ds) > 0:
                        i, j = (w0 + column, r0 + row) if by_keys else (r0 + row, w0 + column)
                        x = tanh(real(read_query(queries[i, e])) + real(read_key(keys[j, e])))
                        total += ds * x if by_units else ds * unit * (real(1) - x * x)
                rows[r0 + row, e] += total

    @device
    def write_rows(rows, acc, factor, r0, e0, tx, ty):
        count, columns = rows.shape[0], rows.shape[1]
        for r in range(R):
            i = r0 + ty * R + r
            if i < count:
                for g in range(value_groups):
                    for c in range(vector):
                        e = e0 + tx * vector + g * span + c
                        if e < columns:
                            rows[i, e] = write(real(acc[(r * value_groups + g) * vector + c] * factor))

    def kernel(q, k, v, dout, result, stats, units, p, scale):
        qs = cuda.shared.array(stage_rows, real, ALIGNMENT)
        ks = cuda.shared.array(stage_keys, real, ALIGNMENT)
        ws = cuda.shared.array(stage_numbers, real, ALIGNMENT)  # products of q and k, then what `fill` makes
        us = cuda.shared.array(stage_numbers, real, ALIGNMENT)  # products of dout and v
        facts = cuda.shared.array(facts_shape, real)
        flags = cuda.shared.array(3, types.int32)  # a factor is not finite; two notes of others
        s = cuda.local.array(scores_size, real)
        sums = cuda.local.array(sums_size, real)
        acc = cuda.local.array(sums_size, real)
        held = cuda.local.array(held_size, real)

        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        t = ty * across + tx
        H, M, Hk, N = q.shape[1], q.shape[2], k.shape[1], k.shape[2]
        count, left, heads = (N, M, Hk) if by_keys else (M, N, H)
        blocks = (count + rows_tile - 1) // rows_tile
        head, strip = cuda.blockIdx.x // blocks, cuda.blockIdx.x % blocks
        r0 = (strip if by_keys else blocks - 1 - strip) * rows_tile  # a causal mask's longest walks first
        e0 = cuda.blockIdx.y * values_tile
        b = int32(head // heads)
        rows, shared = result[b, head % heads], H // Hk
        for n in range(sums_size):
            acc[n] = real(0)
        if additive:
            for row in range(ty * R, ty * R + R):
                for c in range(V):
                    e = e0 + tx * vector + c // vector * span + c % vector
                    if r0 + row < count and e < rows.shape[1]:
                        rows[r0 + row, e] = real(0)

        for part in range(shared if by_keys else 1):
            h = int32(head % heads * shared + part if by_keys else head % heads)
            hk = h // shared
            queries, keys, values, douts = q[b, h], k[b, hk], v[b, hk], dout[b, h]
            f = fixed(b, h, p)
            if not by_keys:
                bring_facts(facts, stats, (b * H + h) * M + r0, M - r0, t)
            for w0 in range(0, left, keys_tile):
                i0, j0 = (w0, r0) if by_keys else (r0, w0)
                said = tile_kind(b, h, i0, j0, M, N, f, p, t, flags)
                if said != NONE:
                    if by_keys:
                        bring_facts(facts, stats, (b * H + h) * M + w0, M - w0, t)
                        scores(s, h, r0, w0, keys, queries, units, tx, ty, t, held, qs, ks, ws)
                    else:
                        scores(s, h, r0, w0, queries, keys, units, tx, ty, t, held, qs, ks, ws)
                    leave(s, ws, tx, ty)
                    if not by_values:
                        if by_keys:
                            weight_products(s, h, r0, w0, values, douts, units, tx, ty, t, held, qs, ks, us)
                        else:
                            weight_products(s, h, r0, w0, douts, values, units, tx, ty, t, held, qs, ks, us)
                        leave(s, us, tx, ty)
                    fill(ws, us, b, h, r0, w0, M, N, said == ALL, facts, scale, f, p, tx, ty)
                    if additive:
                        cuda.syncthreads()
                        add_units(rows, ws, queries, keys, units, h * rows.shape[1], r0, w0, e0, count, left, tx, ty)
                        cuda.syncthreads()
                    else:
                        if t == 0:
                            flags[0] = 0
                        if by_values:
                            add_products(sums, douts, w0, e0, tx, ty, t, held, ws, ks, flags)
                        elif by_keys:
                            add_products(sums, queries, w0, e0, tx, ty, t, held, ws, ks, flags)
                        else:
                            add_products(sums, keys, w0, e0, tx, ty, t, held, ws, ks, flags)
                        for n in range(sums_size):
                            acc[n] += sums[n]
        if not additive:
            factor = keep_factor(p) if drops and by_values else real(1)
            write_rows(rows, acc, factor, r0, e0, tx, ty)

    return kernel

"""What kernels of gradients need to know of each query: `FACTS` numbers, from which any of its weights is made again.

A block of threads looks at some queries of one (b, h) and walks over the keys, as the general forward kernel does: for
the largest score, unless the lse of the rows is given, which serves as well; of a double softmax for the sum of the
first step; of other normalizers for the threshold, step by step; then for the mean of the gradients by the weights
``dout_i . v_j``, under the slopes of the normalizer; and of a double softmax once more for that of the first step.

The mean comes from the weights and never from the rounded output, so 16 bits lose nothing here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu.backward_general import flat
from attn_numba.gpu.backward_tiles import FACTS, MEAN, OTHER, SCALE, SECOND, SHIFT, normalizer_of, pairing
from attn_numba.gpu.elements import element_name, element_type
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.program import Program
from attn_numba.gpu.search import FIRST, MOST_STEPS, SEARCHED, searching
from attn_numba.gpu.target import SIMULATED, cuda, device, language, types
from attn_numba.gpu.tiles import ALIGNMENT, ALL, NONE, Tile, producing, settling, shapes
from attn_numba.problem import Problem
from attn_numba.rules import DoubleSoftmax, Entmax15, Softmax, Sparsemax

__all__ = ["arguments", "grid", "program"]

TILES = {"float32": Tile(32, 64, 64, 8, 4, 4, 4), "float64": Tile(32, 32, 64, 8, 4, 4, 2)}
TOP, SUM, SEARCH, AVERAGE, LAST, DONE = range(6)  # what a walk over the keys is for
PARTS = 3  # sums of a walk


class Options(NamedTuple):
    """What the kernel depends on beside the rules."""

    tile: Tile
    normalizer: str
    additive: bool  # whether a score is w . tanh(q + k), and not q . k
    given: bool  # whether the lse of the rows is
    sink: bool
    q: str  # names of the numbers in the arrays
    k: str
    v: str
    dout: str


def tile_of(problem: Problem) -> Tile:
    """Return the tile of a call."""
    return TILES[problem.accumulator.name]


def program(problem: Problem, bound: Bound, given: bool) -> Program:
    """Return the kernel of a call, the maps of its score applied; `given`, where the lse of a softmax is."""
    hooks, tile = bound.hooks, tile_of(problem)
    q, k, v = (element_name(x, problem) for x in (problem.q, problem.k, problem.v))
    sink = getattr(problem.normalizer, "sink", None) is not None
    normalizer = type(problem.normalizer).__name__
    options = Options(tile, normalizer, not problem.score.dots, given, sink, q, k, v, problem.dtype)
    number = getattr(types, hooks.number)
    real = types.CPointer(number)
    arrays = (types.Array(element_type(name), 4, "A") for name in (q, k, v, problem.dtype))
    signature = (
        *arrays,
        real,
        types.Array(number, 3, "A"),
        types.CPointer(types.float64),
        real,
        bound.signature(),
        number,
    )
    make = functools.partial(make_kernel, hooks, options)
    return Program("gradient_rows", tuple(options), hooks, make, signature, tile.block, 2, 0, False)


def grid(problem: Problem) -> tuple[int, int, int]:
    """Return the number of blocks, 0 where there are no rows."""
    s = problem.sizes
    return s.B * s.H * -(-s.M // tile_of(problem).rows), 1, 1


def arguments(
    problem: Problem, entries: tuple[Any, ...], dout: Any, facts: Any, lse: Any, sink: Any, units: Any
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
        Where the facts go.
    lse : view (B, H, M) or None
        Logarithms of the rows' sums, where they are given; with any strides.
    sink : view (B, H) in float64, or None
        The scores of the sinks.
    units : view (H, hidden) or None
        Weights of the hidden units of an additive score.
    """
    scale = problem.accumulator.type(problem.scale)
    return problem.q, problem.k, problem.v, dout, flat(facts), lse, flat(sink), flat(units), entries, scale


def make_kernel(hooks: Hooks, options: Options) -> Callable[..., None]:
    """Return the kernel, a plain function.

    ``kernel(q, k, v, dout, stats, lse, sink, units, p, scale)`` is for blocks of ``tile.block`` threads in a grid of
    `grid`. Each number is written by one thread. `scale` is what products are multiplied by where the rules do not do
    it.
    """
    tile, has_sink, given = options.tile, options.sink, options.given
    number = np.dtype(hooks.number)
    names = language(number)
    real, int32, exp = (names[name] for name in ("number", "int32", "exp"))
    wide = (np if SIMULATED else types).float64
    normalizer = normalizer_of(options.normalizer)
    searches, softmax, doubles = normalizer in SEARCHED, normalizer is Softmax, normalizer is DoubleSoftmax
    square, linear = normalizer is Entmax15, normalizer is Sparsemax
    half = 0.5 if square else 1.0
    after_top = SEARCH if searches else SUM if doubles else AVERAGE
    fixed, drops, kept, keep_factor = hooks.fixed, hooks.drops, hooks.kept, hooks.keep_factor
    rows_tile, keys_tile, _, _, R, C, vector = tile
    across, threads = tile.block[0], tile.threads
    span, scores_size, held_size = across * vector, R * C, tile.held
    stage_rows, stage_keys, stage_numbers = shapes(tile)
    facts_shape, parts_shape = (FACTS, rows_tile), (PARTS, rows_tile, across + 1)
    tile_kind = settling(hooks, rows_tile, keys_tile, threads)
    final = pairing(hooks, normalizer).final
    scores, leave, _ = producing(tile, number, options.q, options.k, options.additive)
    weight_products = producing(tile, number, options.dout, options.v).products
    next_threshold = searching(normalizer, number) if searches else None

    @device
    def shifted(y, facts, row):
        top = facts[SHIFT, row]
        return y - (top if top > -math.inf else real(0))

    @device
    def look(walk, ws, us, b, h, i0, j0, M, N, whole, facts, parts, factor, f, p, tx, ty):
        """Add the thread's pairs of a tile to its sums of a walk."""
        for r in range(R):
            row = ty * R + r
            one, two, three, best = real(0), real(0), real(0), real(parts[0, row, tx])
            for c in range(C):
                column = tx * vector + c // vector * span + c % vector
                i, j = int32(i0 + row), int32(j0 + column)
                y = final(ws[column, row], b, h, i, j, i < M and j < N, whole, factor, f, p)
                if y != -math.inf:
                    if walk == TOP:
                        best = y if y > best else best
                    elif searches and walk == SEARCH:
                        x = shifted(y, facts, row) * real(half) - facts[SCALE, row]
                        if not x <= 0:  # above the threshold, or NaN
                            one += real(1)
                            two += x
                            three += x * x
                    elif doubles and walk == SUM:
                        one += exp(shifted(y, facts, row))
                    else:
                        dw = us[column, row]
                        if drops:
                            dw = real(dw * keep_factor(p)) if kept(b, h, i, j, f, p) else real(0)
                        if softmax:
                            x = exp(shifted(y, facts, row))
                        elif doubles:
                            a = exp(shifted(y, facts, row)) * facts[SCALE, row]
                            x = exp(a)
                            if walk == LAST:
                                x *= a * facts[SECOND, row]
                                dw -= facts[MEAN, row]
                        else:
                            x = shifted(y, facts, row) * real(half) - facts[SCALE, row]
                            x = real(0) if x < 0 else x
                            if linear and x > 0:
                                x = real(1)
                        one += x
                        two += x * dw
            if walk == TOP:
                parts[0, row, tx] = best
            else:
                parts[0, row, tx] += wide(one)
                parts[1, row, tx] += wide(two)
                parts[2, row, tx] += wide(three)

    @device
    def across_sum(part):
        total = wide(0)
        for x in range(across):
            total += part[x]
        return total

    @device
    def finish_softmax(facts, row, total, product, extra):
        """Leave the facts of a row of a softmax, in double precision: a sink may lie far above the scores."""
        top = wide(facts[SHIFT, row])
        new, of_sink = top, wide(0)
        if has_sink and extra > -math.inf:
            new = extra if extra > top else top
            shrink = math.exp(top - new)
            of_sink = math.exp(extra - new)
            total = total * shrink + of_sink
            product *= shrink
        inverse = 1 / total if total != 0 else wide(0)
        mean = product * inverse
        facts[SCALE, row] = real(math.exp(top - new) * inverse) if total != 0 and new > -math.inf else real(inverse)
        facts[MEAN, row] = real(mean)
        facts[SECOND, row] = real(0 - of_sink * inverse * mean)
        facts[OTHER, row] = real(total * math.exp(new - top)) if top > -math.inf else real(total)

    @device
    def finish(walk, facts, parts, thresholds, before, sink, head, t, flags):
        """Make facts of the sums of a walk, and forget these. Say whether a search goes on."""
        cuda.syncthreads()
        if t == 0:
            flags[1] = 0
        cuda.syncthreads()
        for row in range(t, rows_tile, threads):
            one, two = across_sum(parts[0, row]), across_sum(parts[1, row])
            if walk == TOP:
                best = real(-math.inf)
                for x in range(across):
                    best = real(parts[0, row, x]) if parts[0, row, x] > best else best
                facts[SHIFT, row] = best
            elif searches and walk == SEARCH:
                if before[row] >= 0:
                    squares = across_sum(parts[2, row])
                    found, ended = next_threshold(thresholds[row], one, two, squares, before[row])
                    thresholds[row] = found
                    facts[SCALE, row] = real(found)
                    before[row] = wide(-1) if ended else one
                    if not ended:
                        flags[1] = 1
            elif doubles and walk == SUM:
                facts[SCALE, row] = real(1 / one) if one != 0 else real(0)
            elif walk == LAST:
                facts[OTHER, row] = real(two)
            elif softmax:
                finish_softmax(facts, row, one, two, sink[head] if has_sink else wide(0))
            else:
                facts[MEAN, row] = real(two / one) if one != 0 else real(0)
                facts[SECOND, row] = real(1 / one) if one != 0 else real(0)
            for n in range(PARTS):
                for x in range(across):
                    parts[n, row, x] = wide(0)
        cuda.syncthreads()
        return flags[1] != 0

    def kernel(q, k, v, dout, stats, lse, sink, units, p, scale):
        qs = cuda.shared.array(stage_rows, real, ALIGNMENT)
        ks = cuda.shared.array(stage_keys, real, ALIGNMENT)
        ws = cuda.shared.array(stage_numbers, real, ALIGNMENT)  # products of q and k
        us = cuda.shared.array(stage_numbers, real, ALIGNMENT)  # products of dout and v
        facts = cuda.shared.array(facts_shape, real)
        parts = cuda.shared.array(parts_shape, wide)  # sums of each thread; of the first walk the largest score
        thresholds = cuda.shared.array(rows_tile, wide)
        before = cuda.shared.array(rows_tile, wide)  # keys above the last threshold; -1: the search has ended
        flags = cuda.shared.array(3, types.int32)
        s = cuda.local.array(scores_size, real)
        held = cuda.local.array(held_size, real)

        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        t = ty * across + tx
        H, M, N = q.shape[1], q.shape[2], k.shape[2]
        blocks = (M + rows_tile - 1) // rows_tile
        head = cuda.blockIdx.x // blocks
        i0 = (blocks - 1 - cuda.blockIdx.x % blocks) * rows_tile  # a causal mask's longest rows first
        b, h = int32(head // H), int32(head % H)
        hk = h // (H // k.shape[1])
        queries, keys, values, douts = q[b, h], k[b, hk], v[b, hk], dout[b, h]
        f = fixed(b, h, p)
        walk, steps = int32(AVERAGE if given else TOP), 0
        for row in range(t, rows_tile, threads):
            for n in range(FACTS):
                facts[n, row] = real(0)
            if given and i0 + row < M:
                facts[SHIFT, row] = lse[b, h, i0 + row]
            if searches:
                facts[SCALE, row] = real(FIRST)
            thresholds[row], before[row] = wide(FIRST), wide(0)
            for n in range(PARTS):
                for x in range(across):
                    parts[n, row, x] = wide(0) if given or n > 0 else wide(-math.inf)
        cuda.syncthreads()

        while walk != DONE:
            for j0 in range(0, N, keys_tile):
                said = tile_kind(b, h, i0, j0, M, N, f, p, t, flags)
                if said != NONE:
                    scores(s, h, i0, j0, queries, keys, units, tx, ty, t, held, qs, ks, ws)
                    leave(s, ws, tx, ty)
                    if walk >= AVERAGE:
                        weight_products(s, h, i0, j0, douts, values, units, tx, ty, t, held, qs, ks, us)
                        leave(s, us, tx, ty)
                    look(walk, ws, us, b, h, i0, j0, M, N, said == ALL, facts, parts, scale, f, p, tx, ty)
            goes_on = finish(walk, facts, parts, thresholds, before, sink, head, t, flags)
            if walk == TOP:
                walk = int32(after_top)
            elif searches and walk == SEARCH:
                steps += 1
                if not goes_on or steps == MOST_STEPS:
                    walk = int32(AVERAGE)
            elif doubles and walk == SUM:
                walk = int32(AVERAGE)
            elif doubles and walk == AVERAGE:
                walk = int32(LAST)
            else:
                walk = int32(DONE)

        for row in range(t, rows_tile, threads):
            if i0 + row < M:
                for n in range(FACTS):
                    stats[(head * M + i0 + row) * FACTS + n] = facts[n, row]

    return kernel

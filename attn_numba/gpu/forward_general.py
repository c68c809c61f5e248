"""Attention forward for every card, dtype, score and normalizer; the simulator runs it too.

A block of threads computes `Tile.rows` query rows of one (b, h), and of the values `Tile.values` columns. It walks over
the keys, `Tile.keys` at a time: scores into registers (`tiles`), weights into shared memory, their product with the
values into registers. Softmax needs one walk, with a running maximum. Other normalizers walk more often and compute the
scores anew each time, so no memory grows with M times N: first for the largest score, then for a sum or, step by step,
for a threshold, then for the output, and once more where the weights are asked for.

A key that a row does not see has score minus infinity and weight minus zero, by a branch and not by a product, and is
left out of the product with the values (`values`).

Tiles start at multiples of their size and each sum has one order: over the head size in runs, over the keys tile by
tile, in a thread from the left to the right and then from thread to thread. So the bits of a row depend on nothing that
lies beside it, neither in the batch nor in its own excluded keys.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu.elements import element_name, element_type, writer
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.program import Program
from attn_numba.gpu.search import FIRST, MOST_STEPS, SEARCHED, searching
from attn_numba.gpu.target import SIMULATED, cuda, device, language, types
from attn_numba.gpu.tiles import ALIGNMENT, ALL, NONE, Tile, index, scoring, shapes
from attn_numba.gpu.values import adding
from attn_numba.problem import Problem
from attn_numba.rules import DoubleSoftmax, Entmax15, Softmax

MOST_BLOCKS = (2**31 - 1, 2**16 - 1)  # of a grid, in x and y
TOP, SUM, SEARCH, OUTPUT, WEIGHTS, DONE = range(6)  # what a walk over the keys is for


class Options(NamedTuple):
    """What the kernel depends on beside the rules."""

    tile: Tile
    normalizer: str
    additive: bool  # whether a score is w . tanh(q + k), and not q . k
    q: str  # names of the numbers in the arrays
    k: str
    v: str
    out: str
    sink: bool
    lse: bool  # which results are written beside the output
    stats: bool
    weights: bool


def refusal(problem: Problem, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot serve a call; an empty text where it can."""
    for count, most in zip(grid(problem), MOST_BLOCKS, strict=False):
        if count > most:
            return f"it would take {count} blocks of rows or of values, and a card starts {most}"
    return ""


def tile_of(problem: Problem) -> Tile:
    """Return the tile of a call: its sums are to stay in registers, and the rest within 48 kB of shared memory."""
    if problem.accumulator == np.float64:
        return Tile(32, 64, 64, 8, 4, 4, 2)
    values = 64 if problem.sizes.E <= 64 else 128
    if not isinstance(problem.normalizer, Softmax):  # what is summed on other walks takes room too
        return Tile(32, 64, values, 8, 4, 4, 4)
    return Tile(64, 64, values, 8, 8, 4, 4)


def resident(problem: Problem) -> int:
    """Return how many blocks a multiprocessor should hold: as many as leave all sums in registers."""
    few = problem.dtype == "float32" and isinstance(problem.normalizer, Softmax) and problem.sizes.E <= 64
    return 3 if few else 2


def program(problem: Problem, bound: Bound, *, lse: bool, stats: bool, weights: bool = False) -> Program:
    """Return the kernel of a call.

    Parameters
    ----------
    problem : Problem
        The call, with the maps of its score applied.
    bound : Bound
        Its rules.
    lse : bool
        Whether the logarithms of the rows' sums are to be written; of a softmax.
    stats : bool
        Whether what makes weights of scores is to be written, the largest score and the inverse of the sum; of a
        softmax.
    weights : bool
        Whether the weights are to be written, of another normalizer: those of a softmax are made of its stats.
    """
    options = Options(
        tile_of(problem), type(problem.normalizer).__name__, not problem.score.dots,
        *(element_name(x, problem) for x in (problem.q, problem.k, problem.v)), problem.dtype,
        getattr(problem.normalizer, "sink", None) is not None, lse, stats, weights,
    )  # fmt: skip
    hooks, tile = bound.hooks, options.tile
    arrays = (types.Array(element_type(name), 4, "A") for name in (options.q, options.k, options.v, options.out))
    real = getattr(types, hooks.number)
    addresses = (types.CPointer(x) for x in (real, real, real, types.float64, real))
    signature = (*arrays, *addresses, bound.signature(), real)
    make = functools.partial(make_kernel, hooks, options)
    return Program("general", tuple(options), hooks, make, signature, tile.block, resident(problem), 0, False)


def grid(problem: Problem) -> tuple[int, int, int]:
    """Return the number of blocks: for rows, and for slices of the values. One of 0 says that there are no rows."""
    s, tile = problem.sizes, tile_of(problem)
    return s.B * s.H * -(-s.M // tile.rows), max(1, -(-s.E // tile.values)), 1


def units_of(problem: Problem) -> np.ndarray | None:
    """Return w of an additive score for each head, (H, hidden); None for other scores."""
    if problem.score.dots:
        return None
    w = np.asarray(problem.score.w, problem.accumulator)  # type: ignore[attr-defined]
    return np.ascontiguousarray(np.broadcast_to(w, (problem.sizes.H, w.shape[-1])))


def arguments(
    problem: Problem,
    entries: tuple[Any, ...],
    out: Any,
    lse: Any,
    stats: Any,
    sink: Any,
    weights: Any = None,
    units: Any = None,
) -> tuple[Any, ...]:
    """Return the kernel's parameters.

    Parameters
    ----------
    problem : Problem
        The call, with the maps of its score applied.
    entries : tuple
        ``bound.entries`` with the arrays on the device.
    out : view (B, H, M, E)
        With any strides, as q, k and v have; the views that follow are contiguous, or None.
    lse : view (B, H, M)
        For logarithms.
    stats : view (B, H, M, 2)
        For the largest scores and the inverses.
    sink : view (B, H) in float64
        The scores of the sinks.
    weights : view (B, H, M, N)
        For weights.
    units : view (H, hidden)
        What `units_of` returns.
    """
    addresses = (lse, stats, weights, sink, units)
    if SIMULATED:  # which has no addresses
        addresses = tuple(x if x is None else x.reshape(-1) for x in addresses)
    return problem.q, problem.k, problem.v, out, *addresses, entries, problem.accumulator.type(problem.scale)


def make_kernel(hooks: Hooks, options: Options) -> Callable[..., None]:
    """Return the kernel, a plain function.

    ``kernel(q, k, v, out, lse, stats, weights, sink, units, p, scale)`` is for blocks of ``tile.block`` threads in a
    grid of `grid`. Each element of the results is written by one thread. `scale` is what scores are multiplied by where
    the rules do not do it.
    """
    tile, has_sink = options.tile, options.sink
    names = language(np.dtype(hooks.number))
    real, int32, exp = (names[name] for name in ("number", "int32", "exp"))
    wide = (np if SIMULATED else types).float64
    normalizer = {x.__name__: x for x in (Softmax, DoubleSoftmax, *SEARCHED)}[options.normalizer]
    searches, streams = normalizer in SEARCHED, normalizer is Softmax
    writes_lse, writes_stats, writes_weights = options.lse, options.stats, options.weights
    square = normalizer is Entmax15
    half = 0.5 if square else 1.0
    number_wide = wide if searches else real
    first_walk = OUTPUT if streams else TOP
    fixed, kept, drops, keep_factor = hooks.fixed, hooks.kept, hooks.drops, hooks.keep_factor

    rows_tile, keys_tile, values_tile, _, R, C, vector = tile
    across, threads, V = tile.block[0], tile.threads, tile.value_part
    key_groups, value_groups, span = C // vector, V // vector, across * vector
    scores_size, sums_size, held_size = R * C, R * V, tile.held
    stage_rows, stage_keys, stage_weights = shapes(tile)
    fold_shape, above_shape = (rows_tile, across + 1), (rows_tile, 3, across if searches else 1)
    scored = scoring(hooks, tile, query_name=options.q, key_name=options.k, additive=options.additive)
    add_values = adding(tile, options.v, real)
    tile_kind, tile_scores = scored.kind, scored.scores
    write = writer(options.out)
    next_threshold = searching(normalizer, np.dtype(hooks.number)) if searches else None

    @device
    def lift(s, fold, tops, shrinks, tx, ty, t):
        """Bring the largest score of each row up to date, and what sums so far are to be multiplied by."""
        for r in range(R):
            best = real(-math.inf)
            for c in range(C):
                best = s[r * C + c] if s[r * C + c] > best else best
            fold[ty * R + r, tx] = best
        cuda.syncthreads()
        for row in range(t, rows_tile, threads):
            old = tops[row]
            best = old
            for x in range(across):
                best = real(fold[row, x]) if fold[row, x] > best else best
            tops[row] = best
            shrinks[row] = exp(old - best) if old > -math.inf else real(1)  # sums so far are zero, or NaN
        cuda.syncthreads()

    @device
    def weight_of(x, shift, threshold):
        """Return the weight of a score, which is still to be multiplied by a number of its row."""
        if streams:
            return exp(x - shift)
        if not searches:
            return exp(exp(x - shift) * threshold)  # here the inverse of a sum
        above = (x - shift) * real(half) - threshold
        above = real(0) if above < 0 else above
        return above * above if square else above

    @device
    def leave_weights(s, ws, tops, shrinks, thresholds, totals, tx, ty):
        """Put the weights of the thread's scores in their places and add them to the rows' totals."""
        for r in range(R):
            top, threshold = tops[ty * R + r], real(thresholds[ty * R + r])
            shift = top if top > -math.inf else real(0)
            part = real(0)
            for g in range(key_groups):
                for c in range(vector):
                    x, weight = s[(r * key_groups + g) * vector + c], real(-0.0)
                    if x != -math.inf:
                        weight = weight_of(x, shift, threshold)
                        part += weight
                    ws[index(tx * vector + g * span + c), index(ty * R + r)] = weight
            total = totals[ty * R + r, tx]
            totals[ty * R + r, tx] = (total * shrinks[ty * R + r] if streams else total) + part

    @device
    def drop(ws, b, h, i0, j0, f, p, tx, ty):
        """Make the weights zero that dropout does not keep."""
        for n in range(scores_size):
            row, c = ty * R + n % R, n // R
            column = tx * vector + c // vector * span + c % vector
            weight = ws[column, row]
            if weight != 0 and not kept(
                b, h, int32(i0 + row), int32(j0 + column), f, p
            ):  # else it is not there, or zero
                ws[column, row] = real(0)

    @device
    def add_above(s, tops, thresholds, above, tx, ty):
        """Add to the sums of a search what the thread's scores are above the thresholds."""
        for r in range(R):
            top, threshold = tops[ty * R + r], real(thresholds[ty * R + r])
            shift = top if top > -math.inf else real(0)
            count, first, second = real(0), real(0), real(0)
            for c in range(C):
                if s[r * C + c] != -math.inf:
                    x = (s[r * C + c] - shift) * real(half) - threshold
                    if not x <= 0:  # above the threshold, or NaN
                        count += real(1)
                        first += x
                        second += x * x
            above[ty * R + r, 0, tx] += wide(count)
            above[ty * R + r, 1, tx] += wide(first)
            above[ty * R + r, 2, tx] += wide(second)

    @device
    def across_sum(part):
        total = wide(0)
        for x in range(across):
            total += wide(part[x])
        return total

    @device
    def step_thresholds(thresholds, before, above, t, flags):
        """Take one step of each row's search; forget the sums. Say whether a search goes on."""
        cuda.syncthreads()
        if t == 0:
            flags[1] = 0
        cuda.syncthreads()
        for row in range(t, rows_tile, threads):
            if before[row] >= 0:
                count, total, squares = across_sum(above[row, 0]), across_sum(above[row, 1]), across_sum(above[row, 2])
                found, ended = next_threshold(thresholds[row], count, total, squares, before[row])
                thresholds[row] = found
                before[row] = wide(-1) if ended else count
                if not ended:
                    flags[1] = 1
            for n in range(3):
                for x in range(across):
                    above[row, n, x] = wide(0)
        cuda.syncthreads()
        return flags[1] != 0

    @device
    def add_exponentials(s, tops, totals, tx, ty):
        for r in range(R):
            top = tops[ty * R + r]
            shift = top if top > -math.inf else real(0)
            part = real(0)
            for c in range(C):
                if s[r * C + c] != -math.inf:
                    part += exp(s[r * C + c] - shift)
            totals[ty * R + r, tx] += part

    @device
    def finish_rows(totals, tops, shrinks, lse, stats, sink, head, i0, M, t):
        """Leave in `shrinks` what a row's weights are multiplied by; write what is told of rows."""
        for row in range(t, rows_tile, threads):
            total, shrink, top = across_sum(totals[row]), wide(1), wide(tops[row])
            if has_sink:  # in double precision: it may lie far above the scores
                extra = sink[head]
                if extra > -math.inf:
                    new = extra if extra > top else top
                    shrink = math.exp(top - new)
                    total = total * shrink + math.exp(extra - new)
                    top = new
            inverse = real(1)
            if not searches:
                inverse = real(shrink / total) if total != 0 else real(0)
            at = head * M + i0 + row
            if cuda.blockIdx.y == 0 and i0 + row < M:
                if writes_lse:
                    lse[at] = real(top + math.log(total)) if total != 0 else real(-math.inf)
                if writes_stats:
                    stats[2 * at] = tops[row]
                    stats[2 * at + 1] = inverse
            shrinks[row] = inverse
        cuda.syncthreads()

    @device
    def write_rows(rows, acc, shrinks, factor, i0, e0, tx, ty):
        M, E = rows.shape[0], rows.shape[1]
        for r in range(R):
            i = i0 + ty * R + r
            if i < M:
                inverse = shrinks[ty * R + r] * factor
                for g in range(value_groups):
                    for c in range(vector):
                        e = e0 + tx * vector + g * span + c
                        if e < E:
                            rows[i, e] = write(real(acc[(r * value_groups + g) * vector + c] * inverse))

    @device
    def write_weights(weights, s, tops, thresholds, shrinks, there, head, i0, j0, M, N, tx, ty):
        for r in range(R):
            i = i0 + ty * R + r
            top, threshold = tops[ty * R + r], real(thresholds[ty * R + r])
            shift = top if top > -math.inf else real(0)
            for g in range(key_groups):
                for c in range(vector):
                    j, x = j0 + tx * vector + g * span + c, s[(r * key_groups + g) * vector + c]
                    weight = real(0)
                    if there and x != -math.inf:
                        weight = weight_of(x, shift, threshold) * shrinks[ty * R + r]
                    if i < M and j < N:
                        weights[(head * M + i) * N + j] = weight

    def kernel(q, k, v, out, lse, stats, weights, sink, units, p, scale):
        qs = cuda.shared.array(stage_rows, real, ALIGNMENT)
        ks = cuda.shared.array(stage_keys, real, ALIGNMENT)  # and values
        ws = cuda.shared.array(stage_weights, real, ALIGNMENT)
        fold = cuda.shared.array(fold_shape, real)
        totals = cuda.shared.array(fold_shape, real)  # of each thread
        tops = cuda.shared.array(rows_tile, real)
        shrinks = cuda.shared.array(rows_tile, real)  # in the end what a row's weights are multiplied by
        thresholds = cuda.shared.array(rows_tile, number_wide)
        before = cuda.shared.array(rows_tile, number_wide)  # keys above the last threshold; -1: the search has ended
        above = cuda.shared.array(above_shape, number_wide)
        flags = cuda.shared.array(3, types.int32)  # a value is not finite; two notes of others
        s = cuda.local.array(scores_size, real)
        sums = cuda.local.array(sums_size, real)
        acc = cuda.local.array(sums_size, real)
        held = cuda.local.array(held_size, real)

        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        t = ty * across + tx
        H, M, N = q.shape[1], q.shape[2], k.shape[2]
        blocks = (M + rows_tile - 1) // rows_tile
        head, e0 = cuda.blockIdx.x // blocks, cuda.blockIdx.y * values_tile
        i0 = (blocks - 1 - cuda.blockIdx.x % blocks) * rows_tile  # a causal mask's longest rows first
        b, h = int32(head // H), int32(head % H)
        hk = h // (H // k.shape[1])
        queries, keys, values, rows = q[b, h], k[b, hk], v[b, hk], out[b, h]
        f = fixed(b, h, p)
        for row in range(t, rows_tile, threads):
            tops[row] = real(-math.inf)
            shrinks[row] = real(1)
            thresholds[row] = number_wide(FIRST)
            before[row] = number_wide(0)
            for x in range(across):
                totals[row, x] = real(0)
            if searches:
                for n in range(3):
                    for x in range(across):
                        above[row, n, x] = wide(0)
        for n in range(sums_size):
            acc[n] = real(0)
        cuda.syncthreads()

        walk, steps = int32(first_walk), 0
        while walk != DONE:
            for j0 in range(0, N, keys_tile):
                said = tile_kind(b, h, i0, j0, M, N, f, p, t, flags)
                if said != NONE:
                    tile_scores(
                        s, b, h, i0, j0, said == ALL, queries, keys, units, scale, f, p, tx, ty, t, held, qs, ks, ws
                    )
                    if walk == OUTPUT:
                        if t == 0:
                            flags[0] = 0
                        if streams:
                            lift(s, fold, tops, shrinks, tx, ty, t)
                        leave_weights(s, ws, tops, shrinks, thresholds, totals, tx, ty)
                        if drops:
                            drop(ws, b, h, i0, j0, f, p, tx, ty)
                        add_values(sums, values, j0, e0, tx, ty, t, held, ws, ks, flags)
                        for r in range(R):
                            shrink = shrinks[ty * R + r] if streams else real(1)
                            for e in range(V):
                                acc[r * V + e] = acc[r * V + e] * shrink + sums[r * V + e]
                    if not streams and walk == TOP:
                        lift(s, fold, tops, shrinks, tx, ty, t)
                    if not streams and not searches and walk == SUM:
                        add_exponentials(s, tops, totals, tx, ty)
                    if searches and walk == SEARCH:
                        add_above(s, tops, thresholds, above, tx, ty)
                if writes_weights and walk == WEIGHTS:
                    write_weights(weights, s, tops, thresholds, shrinks, said != NONE, head, i0, j0, M, N, tx, ty)

            if walk == OUTPUT:
                cuda.syncthreads()
                finish_rows(totals, tops, shrinks, lse, stats, sink, head, i0, M, t)
                factor = keep_factor(p) if drops else real(1)
                write_rows(rows, acc, shrinks, factor, i0, e0, tx, ty)
                walk = int32(WEIGHTS if writes_weights and cuda.blockIdx.y == 0 else DONE)
            elif searches and walk == SEARCH:
                steps += 1
                if not step_thresholds(thresholds, before, above, t, flags) or steps == MOST_STEPS:
                    walk = int32(OUTPUT)
            elif not streams and walk == TOP:
                walk = int32(SEARCH if searches else SUM)
            elif not streams and not searches and walk == SUM:
                cuda.syncthreads()
                for row in range(t, rows_tile, threads):
                    once = across_sum(totals[row])
                    thresholds[row] = real(1 / once) if once != 0 else real(0)
                    for x in range(across):
                        totals[row, x] = real(0)
                cuda.syncthreads()
                walk = int32(OUTPUT)
            else:
                walk = int32(DONE)

    return kernel

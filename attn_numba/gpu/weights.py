"""The weights of a softmax, (B, H, M, N): made of scores and of what a forward kernel tells of each row.

A block of threads computes one tile of one (b, h). The scores are those of the general kernel, computed anew; a weight
is ``exp(score - top) * inverse``, where `top` is the largest score of the row and `inverse` what its exponentials are
multiplied by. A key that a row does not see has weight zero, also where the row is spoiled by NaN; dropout is not in
the weights. Every element is written, by one thread.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu.elements import element_name, element_type
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import SIMULATED, cuda, language, types
from attn_numba.gpu.tiles import ALIGNMENT, ALL, NONE, Tile, scoring, shapes
from attn_numba.problem import Problem
from attn_numba.rules import Softmax

MOST_BLOCKS = 2**31 - 1  # of a grid, in x
TILES = {"float32": Tile(64, 64, 64, 8, 8, 4, 4), "float64": Tile(32, 64, 64, 8, 4, 4, 2)}


class Options(NamedTuple):
    """What the kernel depends on beside the rules."""

    tile: Tile
    additive: bool  # whether a score is w . tanh(q + k), and not q . k
    q: str  # names of the numbers in the arrays
    k: str


def refusal(problem: Problem, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot serve a call; an empty text where it can."""
    if not isinstance(problem.normalizer, Softmax):
        return f"it makes the weights of a softmax, and the normalizer is {type(problem.normalizer).__name__}"
    count = grid(problem)[0]
    if count > MOST_BLOCKS:
        return f"it would take {count} blocks, and a card starts {MOST_BLOCKS}"
    return ""


def program(problem: Problem, bound: Bound) -> Program:
    """Return the kernel of a call, the maps of its score applied."""
    names = (element_name(x, problem) for x in (problem.q, problem.k))
    options = Options(TILES[problem.accumulator.name], not problem.score.dots, *names)
    real = getattr(types, bound.hooks.number)
    arrays = (types.Array(element_type(name), 4, "A") for name in (options.q, options.k))
    numbers = types.Array(real, 4, "A")
    signature = (*arrays, numbers, numbers, types.CPointer(real), bound.signature(), real)
    make = functools.partial(make_kernel, bound.hooks, options)
    return Program("weights", tuple(options), bound.hooks, make, signature, options.tile.block, 1, 0, False)


def grid(problem: Problem) -> tuple[int, int, int]:
    """Return the number of blocks: those of the same rows of q side by side. One of 0 says that there is no weight."""
    s, tile = problem.sizes, TILES[problem.accumulator.name]
    return s.B * s.H * -(-s.M // tile.rows) * -(-s.N // tile.keys), 1, 1


def arguments(
    problem: Problem, entries: tuple[Any, ...], weights: Any, stats: Any, units: Any = None
) -> tuple[Any, ...]:
    """Return the kernel's parameters.

    Parameters
    ----------
    problem : Problem
        The call, with the maps of its score applied.
    entries : tuple
        ``bound.entries`` with the arrays on the device.
    weights : view (B, H, M, N)
        Where the weights go.
    stats : view (B, H, M, 2)
        Of each row the largest score and the inverse, as a forward kernel writes them.
    units : view (H, hidden), optional
        Weights of the hidden units of an additive score, contiguous.
    """
    if SIMULATED and units is not None:  # the simulator has no addresses
        units = units.reshape(-1)
    return problem.q, problem.k, stats, weights, units, entries, problem.accumulator.type(problem.scale)


def make_kernel(hooks: Hooks, options: Options) -> Callable[..., None]:
    """Return the kernel, a plain function.

    ``kernel(q, k, stats, weights, units, p, scale)`` is for blocks of ``tile.block`` threads in a grid of `grid`.
    `scale` is what scores are multiplied by where the rules do not do it.
    """
    tile, names = options.tile, language(np.dtype(hooks.number))
    real, int32, exp, fixed = names["number"], names["int32"], names["exp"], hooks.fixed
    scored = scoring(hooks, tile, query_name=options.q, key_name=options.k, additive=options.additive)
    tile_kind, tile_scores = scored.kind, scored.scores
    rows_tile, keys_tile, _, _, R, C, vector = tile
    across, groups = tile.block[0], C // vector
    span, scores_size, held_size = across * vector, R * C, tile.held
    threads, tile_size = tile.threads, rows_tile * keys_tile
    stage_rows, stage_keys, stage_scores = shapes(tile)

    def kernel(q, k, stats, weights, units, p, scale):
        qs = cuda.shared.array(stage_rows, real, ALIGNMENT)
        ks = cuda.shared.array(stage_keys, real, ALIGNMENT)
        ws = cuda.shared.array(stage_scores, real, ALIGNMENT)
        flags = cuda.shared.array(3, types.int32)
        s = cuda.local.array(scores_size, real)
        held = cuda.local.array(held_size, real)

        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        t = ty * across + tx
        H, M, N = q.shape[1], q.shape[2], k.shape[2]
        row_tiles, key_tiles = (M + rows_tile - 1) // rows_tile, (N + keys_tile - 1) // keys_tile
        strip, j0 = cuda.blockIdx.x // key_tiles, cuda.blockIdx.x % key_tiles * keys_tile
        head, i0 = strip // row_tiles, strip % row_tiles * rows_tile
        b, h = int32(head // H), int32(head % H)
        queries, keys = q[b, h], k[b, h // (H // k.shape[1])]
        f = fixed(b, h, p)
        said = tile_kind(b, h, i0, j0, M, N, f, p, t, flags)
        if said != NONE:
            tile_scores(s, b, h, i0, j0, said == ALL, queries, keys, units, scale, f, p, tx, ty, t, held, qs, ks, ws)
            for r in range(R):
                for g in range(groups):
                    for c in range(vector):
                        ws[tx * vector + g * span + c, ty * R + r] = s[(r * groups + g) * vector + c]
            cuda.syncthreads()
        for n in range(t, tile_size, threads):  # neighbors write side by side
            row, column = n // keys_tile, n % keys_tile
            i, j = i0 + row, j0 + column
            if i < M and j < N:
                weight = real(0)
                if said != NONE:
                    x, top = ws[column, row], stats[b, h, i, 0]
                    if x != -math.inf:
                        shift = top if top > -math.inf else real(0)  # else there is NaN alone
                        weight = exp(x - shift) * stats[b, h, i, 1]
                weights[b, h, i, j] = weight

    return kernel

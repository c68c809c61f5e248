"""What kernels of gradients share: the sizes of their tiles, and what becomes of one pair of a query and a key.

A block owns some rows, of queries or of keys, and walks over those of the other side: a tile's `rows` are those that
it owns, `keys` those that it walks over. For each tile it computes the products of q and k, and where the gradient by
the weights is needed those of dout and v, in registers as the forward pass does; puts both in shared memory; and looks
at the pairs one after another, in a loop that need not be unrolled.

The weight of a pair is made of its score and of `FACTS` numbers of its query, which `backward_rows` finds once for all
kernels. So nothing of the size M times N is ever in memory, and all kernels see the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu.hooks import Hooks
from attn_numba.gpu.search import SEARCHED
from attn_numba.gpu.target import device, language
from attn_numba.gpu.tiles import Tile
from attn_numba.problem import Problem
from attn_numba.rules import DoubleSoftmax, Entmax15, Softmax

__all__ = ["FACTS", "MEAN", "OTHER", "SCALE", "SECOND", "SHIFT", "Pairs", "normalizer_of", "pairing", "tile_of"]

FACTS = 5  # numbers of a query
# What scores are diminished by; the factor of their exponentials, or the threshold; of a double softmax the factor of
# the second step, and of a softmax the gradient by the sink; the mean of the weights' gradients; of a double softmax
# that of the first step, and of a softmax the sum of the exponentials, which is 1 where the lse of the row is given.
SHIFT, SCALE, SECOND, MEAN, OTHER = range(FACTS)


class Pairs(NamedTuple):
    """Device functions of one pair. `facts` (FACTS, lines) is in shared memory, and `line` is that of the query.

    ``final(x, b, h, i, j, seen, whole, factor, f, p)`` is the final score of a product, minus infinity where the pair
    does not count; `seen` says whether both rows are there, `whole` whether all pairs of the tile are plain.

    Of pairs that count, ``weight(y, facts, line)`` is the weight of a final score, before dropout, and ``gradient(y,
    dw, b, h, i, j, facts, line, f, p)`` the gradient by it, where `dw` is ``dout_i . v_j``.
    """

    final: Callable[..., Any]
    weight: Callable[..., Any]
    gradient: Callable[..., Any]


def tile_of(problem: Problem, columns: int) -> Tile:
    """Return the tile of a kernel whose results have so many columns: its sums stay in registers, all within 48 kB."""
    if problem.accumulator == np.float64:
        return Tile(32, 64, 64, 8, 4, 4, 2)
    return Tile(64, 64, 64 if columns <= 64 else 128, 8, 8, 4, 4)


def normalizer_of(name: str) -> type:
    """Return the normalizer of a name."""
    return {x.__name__: x for x in (Softmax, DoubleSoftmax, *SEARCHED)}[name]


def pairing(hooks: Hooks, normalizer: type) -> Pairs:
    """Return the functions of pairs for some rules and a normalizer."""
    names = language(np.dtype(hooks.number))
    real, exp, product = names["number"], names["exp"], names["product"]
    masks, scored, partial = hooks.masks, hooks.scores, hooks.partial
    scaled = scored and not partial
    allowed, plain, score = hooks.allowed, hooks.plain, hooks.score
    drops, kept, keep_factor = hooks.drops, hooks.kept, hooks.keep_factor
    searches, doubles, square = normalizer in SEARCHED, normalizer is DoubleSoftmax, normalizer is Entmax15
    half = 0.5 if square else 1.0

    @device
    def final(x, b, h, i, j, seen, whole, factor, f, p):
        if partial:
            if seen and not whole and not plain(b, h, i, j, f, p):
                seen = allowed(b, h, i, j, f, p)
                if seen:
                    x = real(score(x, b, h, i, j, f, p))
        else:
            if masks and seen and not whole:
                seen = allowed(b, h, i, j, f, p)
            if scored and seen:
                x = real(score(x, b, h, i, j, f, p))
        if not scaled:
            x = real(product(x, factor))
        return x if seen else real(-math.inf)

    @device
    def above(y, facts, line):
        """Return how far a score is above the threshold of its row, NaN where either is."""
        x = (y - facts[SHIFT, line]) * real(half) - facts[SCALE, line]
        return real(0) if x < 0 else x

    @device
    def weight(y, facts, line):
        if searches:
            x = above(y, facts, line)
            return x * x if square else x
        first = exp(y - facts[SHIFT, line]) * facts[SCALE, line]
        return exp(first) * facts[SECOND, line] if doubles else first

    @device
    def gradient(y, dw, b, h, i, j, facts, line, f, p):
        if drops:
            dw = real(dw * keep_factor(p)) if kept(b, h, i, j, f, p) else real(0)
        rest = dw - facts[MEAN, line]
        if searches:
            x = above(y, facts, line)
            if square:
                return x * rest
            return real(0) * rest if x == 0 else rest  # NaN stays NaN
        first = exp(y - facts[SHIFT, line]) * facts[SCALE, line]
        if doubles:
            return first * (exp(first) * facts[SECOND, line] * rest - facts[OTHER, line])
        return first * rest

    return Pairs(final, weight, gradient)

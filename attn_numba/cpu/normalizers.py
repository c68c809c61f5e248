"""Normalizers over whole rows of scores in the workspace: scores become weights where they lie.

A key that a row does not see has score minus infinity, and weight minus zero: it adds nothing, and in a row of NaN it
can still be told from a weight of zero.

Sums over keys are in fixed lanes (key number modulo three vectors), folded once per key tile and added up in double
precision, so that a key left out would have added an exact zero.
"""

from __future__ import annotations

import math

import llvmlite.ir as ir
import numpy as np

from attn_numba.cpu.rows import compiled
from attn_numba.cpu.softmax import divided
from attn_numba.cpu.tiles import (
    VECTORS,
    accumulator,
    define,
    load_number,
    result_number,
    store_number,
    word_bytes,
)
from attn_numba.cpu.vectors import DOUBLE, I64, Loop, Vectors

SOFTMAX, SPARSEMAX, ENTMAX15, DOUBLE_SOFTMAX = range(4)
LOG2_E = 1 / math.log(2.0)
MOST_STEPS = 100  # of a search for a threshold, which ends after three to ten


# --- one row, whole triples of vectors ---


def each_vector(v: Vectors, row: ir.Value, columns: ir.Value, sums: int, body) -> list[ir.Value]:
    """Emit `body` for each vector of a row and return `sums` numbers, added up lane by lane.

    `body(at, vector)` gets the address of a vector of the row and what is there, and returns what to add to the sums.
    """
    builder = v.builder
    loop = Loop(builder, columns, VECTORS * v.lanes, [v.constant(0.0)] * (sums * VECTORS))
    new = []
    for n in range(VECTORS):
        step = builder.add(loop.index, ir.Constant(I64, n * v.lanes))
        at = builder.add(row, builder.mul(step, ir.Constant(I64, v.bytes)))
        olds = loop.values[n * sums : (n + 1) * sums]
        new += [builder.fadd(old, x) for old, x in zip(olds, body(at, v.load(at)), strict=True)]
    lanes = loop.close(new)
    totals = []
    for n in range(sums):
        first, *others = lanes[n::sums]
        for other in others:
            first = builder.fadd(first, other)
        totals.append(v.fold(first, builder.fadd))
    return totals


def _marked(v: Vectors, score: ir.Value, weight: ir.Value) -> ir.Value:
    """Minus zero where the score is minus infinity; as bits, for arithmetic may lose the sign."""
    sign = v.integer_constant(-(2 ** (8 * v.bytes - 1)))
    excluded = v.builder.fcmp_ordered("==", score, v.constant(-math.inf))
    return v.builder.select(excluded, sign, v.builder.bitcast(weight, v.integers))


def _softmax_row(v: Vectors, unit, row, columns, factor, shift):
    factors, shifts = v.splat(factor), v.splat(shift)

    def body(at, score):
        weight = v.exp2_product(v.builder.fsub(score, shifts), factors)
        v.store(_marked(v, score, weight), at)
        return [weight]

    return each_vector(v, row, columns, 1, body)[0]


def _total_row(v: Vectors, unit, row, columns, factor, shift):
    factors, shifts = v.splat(factor), v.splat(shift)
    return each_vector(v, row, columns, 1, lambda at, s: [v.exp2_product(v.builder.fsub(s, shifts), factors)])[0]


def _double_row(v: Vectors, unit, row, columns, factor, shift, inverse):
    factors, shifts, inverses = v.splat(factor), v.splat(shift), v.splat(inverse)

    def body(at, score):
        once = v.builder.fmul(v.exp2_product(v.builder.fsub(score, shifts), factors), inverses)
        bits = _marked(v, score, v.exp2_product(once, v.constant(LOG2_E)))
        v.store(bits, at)
        return [v.builder.bitcast(bits, v.vector)]

    return each_vector(v, row, columns, 1, body)[0]


def _above(v: Vectors, score, scale, shift, threshold):
    """How far scores are above a threshold, 0 below it; NaN stays NaN."""
    return v.at_least(v.fma(v.builder.fsub(score, shift), scale, v.builder.fneg(threshold)), 0.0)


def _above_row(v: Vectors, unit, row, columns, to, scale, shift, threshold):
    builder = v.builder
    rows = v.splat(scale), v.splat(shift), v.splat(threshold)

    def body(at, score):
        above = _above(v, score, *rows)
        one = builder.select(builder.fcmp_unordered(">", above, v.constant(0.0)), v.constant(1.0), v.constant(0.0))
        return [one, above, builder.fmul(above, above)]

    wide = (lambda x: x) if v.number == DOUBLE else (lambda x: builder.fpext(x, DOUBLE))
    for n, total in enumerate(each_vector(v, row, columns, 3, body)):
        old = v.load(to, 8 * n, DOUBLE)
        v.store(builder.fadd(old, wide(total)), to, 8 * n)


def _power_row(power: int):
    def emit(v: Vectors, unit, row, columns, scale, shift, threshold):
        rows = v.splat(scale), v.splat(shift), v.splat(threshold)

        def body(at, score):
            weight = _above(v, score, *rows)
            v.store(_marked(v, score, v.builder.fmul(weight, weight) if power == 2 else weight), at)
            return []

        each_vector(v, row, columns, 0, body)

    return emit


def _normalized_row(v: Vectors, unit, row, to, count, inverse):
    builder, inverses = v.builder, v.splat(inverse)
    sign, lanes = v.integer_constant(-(2 ** (8 * v.bytes - 1))), ir.Constant(I64, v.lanes)
    loop = Loop(builder, count, v.lanes, [])
    offset = builder.mul(loop.index, ir.Constant(I64, v.bytes))
    weight = v.load(row, offset)
    unseen = builder.icmp_signed("==", builder.bitcast(weight, v.integers), sign)
    left = builder.sub(count, loop.index)
    left = builder.select(builder.icmp_signed("<", left, lanes), left, lanes)
    weight = builder.select(unseen, v.constant(0.0), builder.fmul(weight, inverses))
    v.store_first(weight, builder.add(to, offset), left)
    loop.close([])


# row[j] = 2**((row[j] - shift) * factor); returns the sum
_to_softmax = define(2, _softmax_row, result_number, tail=(0, 0))
# the same sum, and the row stays as it is
_total = define(2, _total_row, result_number, tail=(0, 0))
# row[j] = exp(2**((row[j] - shift) * factor) * inverse); returns the sum
_to_double_softmax = define(2, _double_row, result_number, tail=(0, 0, 0))
# to three float64 at `to`: of x = max((row[j] - shift) * scale - threshold, 0), how many are not 0, sum, sum of squares
_add_above = define(3, _above_row, tail=(0, 0, 0))
# row[j] = x, or its square
_to_above, _to_above_squared = (define(2, _power_row(n), tail=(0, 0, 0)) for n in (1, 2))
# to[j] = row[j] * inverse for j below `count`, 0 where the row sees no key
_normalize = define(3, _normalized_row, tail=(0,))


# --- normalizers: columns `first` to `end` of one row, whole triples of vectors ---


@compiled
def _softmax_weights(call, row, first, end, shift, unit):
    """Turn scores into weights; return their sum."""
    number, word = accumulator(unit), word_bytes(unit)
    total = 0.0
    for j0 in range(first // call.key_tile * call.key_tile, end, call.key_tile):
        j, j1 = max(j0, first), min(j0 + call.key_tile, end)
        total += np.float64(_to_softmax(number, row + j * word, j1 - j, type(number)(call.factor), shift))
    return total


@compiled
def _double_softmax_weights(call, row, first, end, shift, unit):
    """Turn scores into weights, the exponentials of their softmax; return the sums of the scores' and of theirs."""
    number, word = accumulator(unit), word_bytes(unit)
    factor = type(number)(call.factor)
    once = twice = 0.0
    for j0 in range(first // call.key_tile * call.key_tile, end, call.key_tile):
        j, j1 = max(j0, first), min(j0 + call.key_tile, end)
        once += np.float64(_total(number, row + j * word, j1 - j, factor, shift))
    inverse = type(number)(1.0 / once if once != 0.0 else 0.0)
    for j0 in range(first // call.key_tile * call.key_tile, end, call.key_tile):
        j, j1 = max(j0, first), min(j0 + call.key_tile, end)
        twice += np.float64(_to_double_softmax(number, row + j * word, j1 - j, factor, shift, inverse))
    return once, twice


@compiled
def _sums_above(call, space, row, first, end, scale, shift, threshold, unit):
    """Return of the distances above a threshold how many there are, their sum and the sum of their squares."""
    number, word, wide = accumulator(unit), word_bytes(unit), np.float64(0.0)
    sums = space + call.sums_at
    for n in range(3):
        store_number(wide, sums + 8 * n, 0.0)
    for j0 in range(first // call.key_tile * call.key_tile, end, call.key_tile):
        j, j1 = max(j0, first), min(j0 + call.key_tile, end)
        _add_above(number, row + j * word, j1 - j, sums, scale, shift, threshold)
    return load_number(wide, sums), load_number(wide, sums + 8), load_number(wide, sums + 16)


@compiled
def _sparsemax_weights(call, space, row, first, end, shift, unit):
    """Turn scores into weights, what is above the threshold that makes them sum to 1; return it.

    Newton's steps from below, where they never pass it: each finds the threshold of the keys that are above the last
    one (Michelot 1986). When these are the same once more, the sums are near 1 and have lost little.
    """
    number, word = accumulator(unit), word_bytes(unit)
    scale = type(number)(call.factor * (1.0 / LOG2_E))
    threshold, keys = -1.0, 0.0
    for _ in range(MOST_STEPS):
        count, total, _ = _sums_above(call, space, row, first, end, scale, shift, type(number)(threshold), unit)
        if not total > 0.0:  # no key, or NaN, which reaches the whole row
            threshold += total
            break
        step = (total - 1.0) / count
        threshold += step
        if count == keys or step <= 0.0:
            break
        keys = count
    _to_above(number, row + first * word, end - first, scale, shift, type(number)(threshold))
    return threshold


@compiled
def _entmax15_weights(call, space, row, first, end, shift, unit):
    """Turn scores into weights, squares of what halves of scores are above that which makes them sum to 1; return it.

    Newton's steps from below for the root of that sum, which is nearly straight in the threshold.
    """
    number, word = accumulator(unit), word_bytes(unit)
    scale = type(number)(call.factor * (0.5 / LOG2_E))
    least = 2.0**-50 if word == 8 else 2.0**-22
    threshold = -1.0
    for _ in range(MOST_STEPS):
        _, total, squares = _sums_above(call, space, row, first, end, scale, shift, type(number)(threshold), unit)
        if not total > 0.0:  # no key, or NaN, which reaches the whole row
            threshold += total
            break
        root = math.sqrt(squares)
        step = (root - 1.0) * root / total
        threshold += step
        if step < least:
            break
    _to_above_squared(number, row + first * word, end - first, scale, shift, type(number)(threshold))
    return threshold


@compiled
def weigh_row(call, space, row, first, end, top, b, h, unit):
    """Turn a row of scores, the largest of which is `top`, into weights.

    Return what they must be multiplied with to sum to one; the same, or the threshold, when scores are counted from the
    largest; the first of these of the second of two softmax; and the lse of a softmax.
    """
    number = accumulator(unit)
    shift = top if top > -np.inf else number
    inverse, second, lse = 1.0, 0.0, 0.0
    if call.normalizer == SOFTMAX:
        total = _softmax_weights(call, row, first, end, shift, unit)
        inverse, lse = divided(call, b, h, np.float64(top) * call.factor, total)
        rest = inverse
    elif call.normalizer == DOUBLE_SOFTMAX:
        once, total = _double_softmax_weights(call, row, first, end, shift, unit)
        rest = 1.0 / once if once != 0.0 else 0.0
        inverse = second = 1.0 / total if total != 0.0 else 0.0
    elif call.normalizer == SPARSEMAX:
        rest = _sparsemax_weights(call, space, row, first, end, shift, unit)
    else:
        rest = _entmax15_weights(call, space, row, first, end, shift, unit)
    return inverse, rest, second, lse


@compiled
def normalize_row(row, to, first, end, inverse, unit):
    """Multiply the weights that `weigh_row` left by the number that it returned; keys that are not seen get 0."""
    number, word = accumulator(unit), word_bytes(unit)
    _normalize(number, row + first * word, to + first * word, end - first, type(number)(inverse))

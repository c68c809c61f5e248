"""Register tiles and row operations of gradients: products with a transposed left side, scores to their gradients.

A gradient by a score that a row does not see is minus zero, which no other gradient is: by it, what is added one by one
tells whether a row sees a key.
"""

from __future__ import annotations

import math

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from attn_numba.cpu.functions import Functions
from attn_numba.cpu.tiles import TILE_ROWS, Operands, define, result_number
from attn_numba.cpu.vectors import I64, Loop, Vectors

LOG2_E = 1 / math.log(2.0)
TERMS = 2  # sums of a row: of slopes (softmax: of weights) and of slopes times gradients by weights


def _turned_tile(rows: int, vectors: int):
    """tile(unit, a, a_row, b, b_row, c, c_row, depth): C[rows, vectors] += A[depth, rows]^T @ B[depth, vectors].

    Row lengths in words. Each element of C has one writer; what is added to it is one chain of multiply-adds.
    """

    def emit(v: Vectors, unit, a, a_row, b, b_row, c, c_row, depth):
        builder = v.builder
        tile = Operands(v, unit, rows, vectors, a, ir.Constant(I64, 1), b, b_row, c, c_row)
        loop = Loop(builder, depth, 1, tile.zeros())
        new = tile.multiply_add(builder.mul(loop.index, a_row), loop.index, loop.values)
        sums = loop.close(new)
        tile.store([builder.fadd(old, x) for old, x in zip(tile.load(), sums, strict=True)])

    return define(7, emit)


turned_tile_3, turned_tile_2, turned_tile_1 = (_turned_tile(TILE_ROWS, n) for n in (3, 2, 1))


# --- scores to weights, gradients by weights to gradients by scores: a stretch of one row, whole vectors ---


def _each_vector(v: Vectors, scores, gradients, columns, sums, body) -> None:
    """Emit `body(score, dw) -> (weight, ds, two terms)` for each vector; scores become weights, dw becomes ds.

    The terms are added lane by lane to two vectors at `sums`.
    """
    builder = v.builder
    step = v.lanes * v.bytes
    loop = Loop(builder, columns, v.lanes, [v.load(sums, n * step) for n in range(TERMS)])
    offset = builder.mul(loop.index, ir.Constant(I64, v.bytes))
    score = v.load(scores, offset)
    weight, ds, terms = body(score, v.load(gradients, offset))
    excluded = builder.fcmp_ordered("==", score, v.constant(-math.inf))
    zero = v.constant(0.0)
    v.store(builder.select(excluded, zero, weight), scores, offset)
    v.store(builder.select(excluded, v.constant(-0.0), ds), gradients, offset)
    new = [builder.fadd(old, builder.select(excluded, zero, x)) for old, x in zip(loop.values, terms, strict=True)]
    for n, total in enumerate(loop.close(new)):
        v.store(total, sums, n * step)


def _gradient(v: Vectors, slope, dw, scale, mean):
    """Slope * (dw * scale - mean), never minus zero."""
    return v.fma(slope, v.fma(dw, scale, v.builder.fneg(mean)), v.constant(0.0))


def _softmax_row(v: Vectors, unit, scores, gradients, columns, sums, factor, scale, shift, rest, mean):
    factors, scales, shifts, rests, means = (v.splat(x) for x in (factor, scale, shift, rest, mean))

    def body(score, dw):
        weight = v.builder.fmul(v.exp2_product(v.builder.fsub(score, shifts), factors), rests)
        ds = _gradient(v, weight, dw, scales, means)
        return weight, ds, (weight, ds)

    _each_vector(v, scores, gradients, columns, sums, body)


def _double_softmax_row(
    v: Vectors, unit, scores, gradients, columns, sums, factor, scale, shift, rest, mean, inverse, inner
):
    numbers = (factor, scale, shift, rest, mean, inverse, inner)
    factors, scales, shifts, rests, means, inverses, inners = (v.splat(x) for x in numbers)

    def body(score, dw):
        once = v.builder.fmul(v.exp2_product(v.builder.fsub(score, shifts), factors), rests)
        twice = v.builder.fmul(v.exp2_product(once, v.constant(LOG2_E)), inverses)
        between = v.builder.fmul(twice, v.builder.fsub(dw, inners))
        return twice, _gradient(v, once, between, scales, means), (once, v.builder.fmul(once, between))

    _each_vector(v, scores, gradients, columns, sums, body)


def _above_row(power: int):
    """Emit rows whose weights are what is above a threshold (power 1) or its square (power 2)."""

    def emit(v: Vectors, unit, scores, gradients, columns, sums, factor, scale, shift, rest, mean):
        builder = v.builder
        factors, scales, shifts, rests, means = (v.splat(x) for x in (factor, scale, shift, rest, mean))

        def body(score, dw):
            zero = v.constant(0.0)
            above = v.at_least(v.fma(builder.fsub(score, shifts), factors, builder.fneg(rests)), 0.0)
            weight, slope = builder.fmul(above, above), above
            if power == 1:
                some = builder.select(builder.fcmp_ordered(">", above, zero), v.constant(1.0), zero)
                weight, slope = above, v.fma(above, zero, some)  # NaN where that is
            return weight, _gradient(v, slope, dw, scales, means), (slope, builder.fmul(slope, dw))

        _each_vector(v, scores, gradients, columns, sums, body)

    return emit


# scores become weights, gradients by weights those by scores, for softmax weights 2**((s - shift) * factor) * rest and
# weight * (dw * scale - mean); the two terms of each key are added to two vectors at `sums`
softmax_gradients = define(4, _softmax_row, tail=(0,) * 5)
double_softmax_gradients = define(4, _double_softmax_row, tail=(0,) * 7)
sparsemax_gradients, entmax15_gradients = (define(4, _above_row(n), tail=(0,) * 5) for n in (1, 2))


# --- sums ---


def _fold(v: Vectors, unit, at):
    return v.fold(v.load(at), v.builder.fadd)


def _add_row(v: Vectors, unit, to, source, columns):
    builder = v.builder
    loop = Loop(builder, columns, v.lanes, [])
    offset = builder.mul(loop.index, ir.Constant(I64, v.bytes))
    v.store(builder.fadd(v.load(to, offset), v.load(source, offset)), to, offset)
    loop.close([])


def _add_lanes(v: Vectors, unit, to, row, columns):
    builder = v.builder
    loop = Loop(builder, columns, v.lanes, [v.load(to)])
    new = builder.fadd(loop.values[0], v.load(row, builder.mul(loop.index, ir.Constant(I64, v.bytes))))
    v.store(loop.close([new])[0], to)


# the sum of the lanes of one vector
fold = define(1, _fold, result_number)
# to[j] += source[j], whole vectors
add_row = define(3, _add_row)
# the vector at `to` += those of a row
add_lanes = define(3, _add_lanes)


# --- hidden units of an additive score ---


def _additive_gradients(v: Functions, unit, gradients, keys, dk, sums, columns, query, weight):
    """For one row and one hidden unit: dk += x, and to two vectors at `sums` x and ds * t, with x = ds w (1 - t**2)."""
    builder, step = v.builder, v.lanes * v.bytes
    queries, weights, zero = v.splat(query), v.splat(weight), v.constant(0.0)
    loop = Loop(builder, columns, v.lanes, [v.load(sums, n * step) for n in range(TERMS)])
    offset = builder.mul(loop.index, ir.Constant(I64, v.bytes))
    ds = v.load(gradients, offset)
    t = v.tanh(builder.fadd(queries, v.load(keys, offset)))
    slope = v.fma(builder.fneg(t), t, v.constant(1.0))
    by_weight = builder.fmul(ds, t)
    by_input = builder.fmul(builder.fmul(ds, weights), slope)
    nothing = builder.fcmp_ordered("==", ds, zero)  # where a key is not seen, t may be anything
    by_input, by_weight = (builder.select(nothing, zero, x) for x in (by_input, by_weight))
    v.store(builder.fadd(v.load(dk, offset), by_input), dk, offset)
    new = [builder.fadd(old, x) for old, x in zip(loop.values, (by_input, by_weight), strict=True)]
    for n, total in enumerate(loop.close(new)):
        v.store(total, sums, n * step)


additive_gradients = define(5, _additive_gradients, tail=(0, 0))


# --- words that one worker writes and others wait for ---


@intrinsic
def load_progress(typingctx, address):
    """Return a word; what was written before it was stored is there."""

    def codegen(context, builder, signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], I64.as_pointer()), "acquire", 8)

    return types.intp(types.intp), codegen


@intrinsic
def store_progress(typingctx, address, value):
    """Write a word after all that was written before."""

    def codegen(context, builder, signature, args):
        builder.store_atomic(args[1], builder.inttoptr(args[0], I64.as_pointer()), "release", 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen

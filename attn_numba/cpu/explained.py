"""What explains a row of normalized weights: its entropy, its largest weights, and what it adds to columns' sums.

Rows lie in the workspace; columns `first` to `end` are whole triples of vectors, weights beyond them are 0.
"""

from __future__ import annotations

import llvmlite.ir as ir
import numpy as np
from numba import types

from attn_numba.cpu.functions import Functions
from attn_numba.cpu.normalizers import each_vector
from attn_numba.cpu.rows import compiled
from attn_numba.cpu.tiles import (
    accumulator,
    define,
    load_number,
    load_word,
    result_number,
    store_number,
    store_word,
    vector_length,
    word_bytes,
)
from attn_numba.cpu.vectors import I64, Loop, Vectors


def _entropy_row(v: Functions, unit, row, columns):
    def body(at, weight):
        term = v.builder.fmul(weight, v.log(weight))
        return [v.builder.select(v.builder.fcmp_ordered("==", weight, v.constant(0.0)), v.constant(0.0), term)]

    return each_vector(v, row, columns, 1, body)[0]


def _add_rows(v: Vectors, unit, strip, row, rows, to, columns):
    builder = v.builder
    outer = Loop(builder, columns, v.lanes, [])
    offset = builder.mul(outer.index, ir.Constant(I64, v.bytes))
    inner = Loop(builder, rows, 1, [v.load(to, offset)])
    at = builder.add(builder.add(strip, offset), builder.mul(inner.index, row))
    (total,) = inner.close([builder.fadd(inner.values[0], v.load(at))])
    v.store(total, to, offset)
    outer.close([])


def _next_above(v: Vectors, unit, row, columns, bound):
    """Emit a loop that a found vector ends: the index only moves on while no lane is above the bound or NaN."""
    builder = v.builder
    lanes, bounds = ir.Constant(I64, v.lanes), v.splat(bound)
    before = builder.block
    head, body, done = (builder.append_basic_block(f"above.{name}") for name in ("head", "body", "done"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(ir.Constant(I64, 0), before)
    builder.cbranch(builder.icmp_signed("<", index, columns), body, done)
    builder.position_at_end(body)
    vector = v.load(row, builder.mul(index, ir.Constant(I64, v.bytes)))
    found = builder.fcmp_unordered(">", vector, bounds)
    bits = builder.bitcast(found, ir.IntType(v.lanes))
    index.add_incoming(builder.add(index, lanes), builder.block)
    builder.cbranch(builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0)), done, head)
    builder.position_at_end(done)
    return index


# sum of w log w over a row, 0 log 0 = 0
_entropy = define(2, _entropy_row, result_number)
# to[j] += strip[r, j] over rows r, one after the other; rows lie `row` bytes apart
_add_to_columns = define(5, _add_rows)
# number of the first vector's first column that has a lane above the bound or NaN, `columns` or more if there is none
_next_above_bound = define(2, _next_above, lambda unit: types.intp, tail=(0,))


@compiled
def entropy_of_row(call, row, first, end, unit):
    """Return the entropy of a row of weights, in nats; summed in double precision from key tile to key tile."""
    number, word = accumulator(unit), word_bytes(unit)
    total = 0.0
    for j0 in range(first // call.key_tile * call.key_tile, end, call.key_tile):
        j, j1 = max(j0, first), min(j0 + call.key_tile, end)
        total -= np.float64(_entropy(number, row + j * word, j1 - j))
    return total


@compiled
def add_to_columns(strip, row, rows, to, first, end, unit):
    """Add rows of weights, `row` bytes apart, to the sums of their columns."""
    number, word = accumulator(unit), word_bytes(unit)
    _add_to_columns(number, strip + first * word, row, rows, to + first * word, end - first)


# --- the largest weights of a row: a heap whose first entry is the one to go next ---


@compiled
def _is_worse(number, weights, keys, a, b):
    """Whether entry a goes before entry b: the smaller weight, of equal ones the later key."""
    word = word_bytes(number)
    x, y = load_number(number, weights + a * word), load_number(number, weights + b * word)
    return x < y or (x == y and load_word(keys + 8 * a) > load_word(keys + 8 * b))


@compiled
def _swap(number, weights, keys, a, b):
    word = word_bytes(number)
    weight, key = load_number(number, weights + a * word), load_word(keys + 8 * a)
    store_number(number, weights + a * word, load_number(number, weights + b * word))
    store_word(keys + 8 * a, load_word(keys + 8 * b))
    store_number(number, weights + b * word, weight)
    store_word(keys + 8 * b, key)


@compiled
def _rise(number, weights, keys, n):
    """Move entry n up to its place."""
    while n > 0 and _is_worse(number, weights, keys, n, (n - 1) // 2):
        _swap(number, weights, keys, n, (n - 1) // 2)
        n = (n - 1) // 2


@compiled
def _sink(number, weights, keys, size):
    """Move the first entry down to its place."""
    n = 0
    while 2 * n + 1 < size:
        child = 2 * n + 1
        if child + 1 < size and _is_worse(number, weights, keys, child + 1, child):
            child += 1
        if not _is_worse(number, weights, keys, child, n):
            return
        _swap(number, weights, keys, child, n)
        n = child


@compiled
def _offer(number, weights, keys, size, most, weight, key):
    """Give a heap of at most so many entries one more weight, of a later key than all before; return its size."""
    at = size if size < most else 0
    if size == most and not weight > load_number(number, weights):
        return size
    store_number(number, weights + at * word_bytes(number), weight)
    store_word(keys + 8 * at, key)
    if size == most:
        _sink(number, weights, keys, size)
        return size
    _rise(number, weights, keys, at)
    return size + 1


@compiled
def top_of_row(call, row, first, end, keys, weights, unit):
    """Write the largest weights of a row and their keys, in descending order; of equal ones the first key first.

    `weights` and `keys` have places for `top_count` entries, at most N. NaN counts as larger than all else.
    """
    number, word, lanes = accumulator(unit), word_bytes(unit), vector_length(unit)
    most, size, j = call.top_count, 0, first
    while j < end:
        bound = load_number(number, weights) if size == most else number
        j += _next_above_bound(number, row + j * word, end - j, bound)
        for n in range(min(lanes, end - j)):
            weight = load_number(number, row + (j + n) * word)
            if not weight <= 0.0:
                offered = weight if weight == weight else type(number)(np.inf)
                size = _offer(number, weights, keys, size, most, offered, j + n)
        j += lanes
    for left in range(size - 1, 0, -1):
        _swap(number, weights, keys, 0, left)
        _sink(number, weights, keys, left)
    for n in range(size):
        if load_number(number, weights + n * word) == np.inf:
            store_number(number, weights + n * word, type(number)(np.nan))
    j = 0
    while size < most:  # keys without weight
        if j < first or j >= end or load_number(number, row + j * word) == 0.0:
            store_number(number, weights + size * word, number)
            store_word(keys + 8 * size, j)
            size += 1
        j += 1

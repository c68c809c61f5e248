"""What strips of four rows need beyond `tiles`: intrinsics over lists of slots.

A *slot* is a stretch of at most a vector of keys, wherever it begins: three int32 `(column, width, run)`, the column
counted from the tile's first key, and the run of the rows' lists to which it belongs. The scores of a row lie slot by
slot, each in a vector of its own. Of the four rows of a strip those from `low` up to `high` count. The runs of a row
are int32 too: the first keys of all runs and, `apart` bytes further on, their ends.
"""

from __future__ import annotations

import math

import llvmlite.ir as ir
from numba import types

from attn_numba.cpu.tiles import VECTORS, Operands, define
from attn_numba.cpu.vectors import I32, I64, BFloat, Loop, Vectors

STRIP_ROWS = 4
SLOT_BYTES = 12


def _slot(v: Vectors, slots: ir.Value, n: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Return column, width and run of slot `n`, as int64."""
    at = v.builder.add(slots, v.builder.mul(n, ir.Constant(I64, SLOT_BYTES)))
    return tuple(v.builder.sext(v.load(at, offset, I32), I64) for offset in (0, 4, 8))


def _strip_scores(vectors: int):
    """tile(unit, a, a_row, b, b_row, c, c_row, depth, apart): scores of one slot, or of two side by side in C.

    The second slot's keys lie `apart` bytes behind the first one's.
    """

    def emit(v: Vectors, unit, a, a_row, b, b_row, c, c_row, depth, apart):
        tile = Operands(v, unit, STRIP_ROWS, vectors, a, a_row, b, b_row, c, c_row)
        rights = [ir.Constant(I64, 0), apart][:vectors]
        loop = Loop(v.builder, depth, 1, tile.zeros())
        tile.store(loop.close(tile.multiply_add(loop.index, loop.index, loop.values, rights)))

    return define(8, emit)


def _strip_values(vectors: int):
    """tile(unit, a, a_row, b, b_row, c, c_row, slots, from, to): add the weighted values of some slots to C.

    `a` is where the first slot's weights are. What is added to an element is one chain of multiply-adds, begun at zero.
    A slot of all lanes has no loop of its own, whose end the processor would have to guess.
    """

    def emit(v: Vectors, unit, a, a_row, b, b_row, c, c_row, slots, first, end):
        builder = v.builder
        tile = Operands(v, unit, STRIP_ROWS, vectors, a, a_row, b, b_row, c, c_row)
        shift = ir.Constant(I64, int(tile.pairs))  # pairs: two keys in a word
        lanes = ir.Constant(I64, v.lanes // 2 if tile.pairs else v.lanes)
        slot = Loop(builder, builder.sub(end, first), 1, tile.zeros())
        number = builder.add(slot.index, first)
        column, width, _ = _slot(v, slots, number)
        column = builder.ashr(column, shift)
        words = builder.ashr(builder.add(width, shift), shift)
        weights = builder.mul(number, lanes)

        def add(n, sums):
            return tile.multiply_add(builder.add(weights, n), builder.add(column, n), sums)

        with builder.if_else(builder.icmp_signed("==", words, lanes)) as (whole, part):
            with whole:
                all_of = slot.values
                for n in range(lanes.constant):
                    all_of = add(ir.Constant(I64, n), all_of)
                whole_end = builder.block
            with part:
                loop = Loop(builder, words, 1, slot.values)
                some_of = loop.close(add(loop.index, loop.values))
                part_end = builder.block
        sums = []
        for x, y in zip(all_of, some_of, strict=True):
            phi = builder.phi(v.vector)
            phi.add_incoming(x, whole_end)
            phi.add_incoming(y, part_end)
            sums.append(phi)
        sums = slot.close(sums)
        tile.store([builder.fadd(old, x) for old, x in zip(tile.load(), sums, strict=True)])

    return define(9, emit)


def _each_row(v: Vectors, base: ir.Value, step: ir.Value) -> list[ir.Value]:
    found = [base]
    for _ in range(STRIP_ROWS - 1):
        found.append(v.builder.add(found[-1], step))
    return found


def _store_rows(v: Vectors, numbers: list[ir.Value], at: ir.Value, low: ir.Value, high: ir.Value) -> None:
    """Store the numbers of the rows that count."""
    builder = v.builder
    for r, number in enumerate(numbers):
        row = ir.Constant(I64, r)
        counts = builder.and_(builder.icmp_signed(">=", row, low), builder.icmp_signed("<", row, high))
        with builder.if_then(counts):
            v.store(number, at, r * v.bytes)


def _strip_exclude(v: Vectors, unit, scores, row_bytes, slots, count, runs, apart, j0, low, high, tops):
    """Set scores of keys that their row does not see to minus infinity; store each row's largest score in `tops`."""
    builder = v.builder
    rows, lists = _each_row(v, scores, row_bytes), _each_row(v, runs, builder.mul(apart, ir.Constant(I64, 2)))
    lanes = ir.Constant(ir.VectorType(I32, v.lanes), list(range(v.lanes)))
    excluded = v.constant(-math.inf)
    loop = Loop(builder, count, 1, [excluded] * STRIP_ROWS)
    column, width, run = _slot(v, slots, loop.index)
    at, place = builder.mul(loop.index, ir.Constant(I64, v.lanes * v.bytes)), builder.mul(run, ir.Constant(I64, 4))
    key = builder.add(lanes, v.splat(builder.trunc(builder.add(j0, column), I32)))
    whole = v.first_lanes(width)
    new = []
    for r in range(STRIP_ROWS):
        first, end = (v.load(builder.add(lists[r], place), offset, I32) for offset in (0, apart))
        row = ir.Constant(I64, r)
        counts = builder.and_(builder.icmp_signed(">=", row, low), builder.icmp_signed("<", row, high))
        end = builder.select(counts, end, ir.Constant(I32, 0))
        seen = builder.and_(builder.icmp_signed(">=", key, v.splat(first)), builder.icmp_signed("<", key, v.splat(end)))
        score = builder.select(builder.and_(seen, whole), v.load(rows[r], at), excluded)
        v.store(score, rows[r], at)
        new.append(v.larger(score, loop.values[r]))
    _store_rows(v, [v.fold(x, v.larger) for x in loop.close(new)], tops, low, high)


def _strip_weigh(v: Vectors, unit, scores, row_bytes, slots, count, shifts, low, high, added, factor):
    """Turn the scores of a strip into weights where they lie; store each row's sum of them in `added`.

    A weight is added in the lane, and to the one of three vectors, that the key's place in the tile gives it: as in
    `tiles.triples_to_weights`, so that the sums have the same bits.
    """
    builder = v.builder
    rows = _each_row(v, scores, row_bytes)
    factors = v.splat(factor)
    number = ir.VectorType(I32, v.lanes)
    lanes = ir.Constant(number, list(range(v.lanes)))
    loop = Loop(builder, count, 1, [v.constant(0.0)] * (STRIP_ROWS * VECTORS))
    column, _, _ = _slot(v, slots, loop.index)
    at = builder.mul(loop.index, ir.Constant(I64, v.lanes * v.bytes))
    to = builder.mul(loop.index, ir.Constant(I64, v.lanes * 2)) if unit == types.int32 else at
    turn = builder.and_(column, ir.Constant(I64, v.lanes - 1))
    vector = builder.sdiv(column, ir.Constant(I64, v.lanes))
    here, beyond = (
        v.splat(builder.trunc(builder.srem(builder.add(vector, ir.Constant(I64, n)), ir.Constant(I64, VECTORS)), I32))
        for n in (0, 1)
    )
    place = builder.select(builder.icmp_signed("<", lanes, v.splat(builder.trunc(turn, I32))), beyond, here)
    places = [builder.icmp_signed("==", place, ir.Constant(number, [n] * v.lanes)) for n in range(VECTORS)]
    new = []
    for r in range(STRIP_ROWS):
        shift = v.splat(v.load(shifts, r * v.bytes, v.number))
        weight = v.exp2_product(builder.fsub(v.load(rows[r], at), shift), factors)
        kept = builder.fptrunc(weight, ir.VectorType(BFloat(), v.lanes)) if unit == types.int32 else weight
        v.store(kept, builder.add(rows[r], to))
        turned = v.rotate(weight, turn)
        for n in range(VECTORS):
            old = loop.values[r * VECTORS + n]
            new.append(builder.select(places[n], builder.fadd(old, turned), old))
    sums = loop.close(new)
    totals = []
    for r in range(STRIP_ROWS):
        total = sums[r * VECTORS]
        for x in sums[r * VECTORS + 1 : (r + 1) * VECTORS]:
            total = builder.fadd(total, x)
        totals.append(v.fold(total, builder.fadd))
    _store_rows(v, totals, added, low, high)


def _runs_together(v: Vectors, unit, runs, apart, rows, count, to):
    """List, for each run of some rows, the first key and the end of what any of them sees."""
    builder = v.builder
    number = ir.VectorType(I32, v.lanes)
    run = Loop(builder, count, v.lanes, [])
    at = builder.add(runs, builder.mul(run.index, ir.Constant(I64, 4)))
    row = Loop(builder, rows, 1, [ir.Constant(number, [2**31 - 1] * v.lanes), ir.Constant(number, [0] * v.lanes)])
    one = builder.add(at, builder.mul(row.index, builder.mul(apart, ir.Constant(I64, 2))))
    first, end = v.load(one, 0, number), v.load(one, apart, number)
    new = []
    for sign, found, old in (("<", first, row.values[0]), (">", end, row.values[1])):
        new.append(builder.select(builder.icmp_signed(sign, found, old), found, old))
    first, end = row.close(new)
    place = builder.mul(run.index, ir.Constant(I64, 4))
    v.store(first, to, place)
    v.store(end, builder.add(to, apart), place)
    run.close([])


def _runs_apart(v: Vectors, unit, runs, apart, count):
    """Return the most keys by which a run of this row begins or ends elsewhere than that of the row before."""
    builder = v.builder
    number = ir.VectorType(I32, v.lanes)
    zeros = ir.Constant(number, [0] * v.lanes)
    before = builder.sub(runs, builder.mul(apart, ir.Constant(I64, 2)))
    loop = Loop(builder, count, v.lanes, [zeros])
    place = builder.mul(loop.index, ir.Constant(I64, 4))
    most = loop.values[0]
    listed = v.first_lanes(builder.sub(count, loop.index))
    for offset in (place, builder.add(place, apart)):
        x = builder.sub(v.load(runs, offset, number), v.load(before, offset, number))
        x = builder.select(builder.icmp_signed("<", x, zeros), builder.neg(x), x)
        larger = builder.and_(builder.icmp_signed(">", x, most), listed)
        most = builder.select(larger, x, most)
    (most,) = loop.close([most])
    most = v.fold(most, lambda x, y: builder.select(builder.icmp_signed(">", x, y), x, y))
    return builder.sext(most, I64)


def _put_between(v: Vectors, unit, to, source, low, high):
    builder = v.builder
    seen = builder.and_(v.first_lanes(high), builder.not_(v.first_lanes(low)))
    v.store_where(seen, v.load(source), v.pointer(to))


strip_scores_2, strip_scores_1 = (_strip_scores(n) for n in (2, 1))
strip_values_4, strip_values_2, strip_values_1 = (_strip_values(n) for n in (4, 2, 1))
strip_exclude = define(10, _strip_exclude)
strip_weigh = define(8, _strip_weigh, tail=(0,))
# numbers `low` up to `high` of a vector; memory around them is left alone
put_between = define(4, _put_between)
# (runs, bytes from first keys to ends, rows, number of runs, where to write a list like a row's)
runs_together = define(5, _runs_together)
# (runs of a row, bytes from first keys to ends, number of runs)
runs_apart = define(3, _runs_apart, lambda unit: types.intp)

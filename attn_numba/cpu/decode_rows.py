"""What happens to whole rows before and after decode's tiles: queries made ready for codes, sums made numbers.

Integer codes are of rotated rows (see `rules.storage.Code`), so a query is rotated before it meets keys, and a sum of
values is rotated back. On processors that multiply bytes, a rotated query is also written as whole numbers of 22 bits
times a unit of its own, in three digits of 8 bits: its products with codes are exact, and what it was rounded by is of
the size of float32's own rounding.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import llvmlite.ir as ir

from attn_numba.cpu.decode_codes import BYTES, DIGITS, Shape, Tile, folded
from attn_numba.cpu.functions import Functions
from attn_numba.cpu.hooks import compile_hooks
from attn_numba.cpu.tiles import function_pointer
from attn_numba.cpu.vectors import I8, I64
from attn_numba.rules.storage import GROUP, rotation

LEVELS = 2.0**21  # of a query's largest number: 4 products of a byte and such a number fit into 32 bits
LEAST = 2.0**-100  # a row without a number of this size counts as zeros


def rotated_vectors(v: Functions, numbers: list[ir.Value], size: int) -> list[ir.Value]:
    """Return a row in vectors as `rules.storage.rotated` does, with the same bits."""
    block, step, lanes = rotation(size), 1, range(v.lanes)
    while step < block:
        if step < v.lanes:
            signs = ir.Constant(v.vector, [-1.0 if lane & step else 1.0 for lane in lanes])
            others = [lane ^ step for lane in lanes]
            numbers = [v.fma(x, signs, v.shuffle(x, x, others)) for x in numbers]
        else:
            new, far = list(numbers), step // v.lanes
            for n in (n for n in range(len(numbers)) if not n & far):
                new[n] = v.builder.fadd(numbers[n], numbers[n + far])
                new[n + far] = v.builder.fsub(numbers[n], numbers[n + far])
            numbers = new
        step *= 2
    factor = v.constant(block**-0.5)
    return [v.builder.fmul(x, factor) for x in numbers]


def _group_sums(v: Functions, shape: Shape, numbers: list[ir.Value]) -> list[ir.Value]:
    """Return the sum of each group of a row, as vectors of groups."""
    each = GROUP // v.lanes
    groups = [functools.reduce(v.builder.fadd, numbers[n : n + each]) for n in range(0, len(numbers), each)]
    groups += [v.constant(0.0)] * (-len(groups) % v.lanes)
    return [folded(v, groups[n : n + v.lanes]) for n in range(0, len(groups), v.lanes)]


def _emit_ready(function: ir.Function, shape: Shape) -> None:
    """Emit ready(source, to): a query's numbers, zeros beyond them in whole vectors, become a row for tiles."""
    tile = Tile(function, shape)
    v, (source, to) = tile.v, function.args
    numbers = rotated_vectors(v, [v.load(source, n * v.lanes * v.bytes) for n in range(shape.vectors)], shape.size)
    if shape.digits:
        numbers, unit = _write_digits(tile, numbers, to)
        v.store(v.splat(unit), to, shape.unit_at)
    else:
        for n, x in enumerate(numbers):
            v.store(x, to, n * v.lanes * v.bytes)
    for n, x in enumerate(_group_sums(v, shape, numbers)):
        v.store(x, to, shape.sums_at + n * v.lanes * v.bytes)
    tile.builder.ret_void()


def _write_digits(tile: Tile, numbers: list[ir.Value], to: ir.Value) -> tuple[list[ir.Value], ir.Value]:
    """Write a row's digits; return its whole numbers and their unit, which is NaN if a number is not finite."""
    v, builder, shape = tile.v, tile.builder, tile.shape
    sizes = [v.intrinsic("llvm.fabs", x) for x in numbers]
    largest = v.fold(functools.reduce(v.larger, sizes), v.larger)
    nothing = v.fold(functools.reduce(builder.fadd, [builder.fmul(x, v.constant(0.0)) for x in numbers]), builder.fadd)
    some = builder.and_(
        builder.fcmp_ordered("==", nothing, v.like(nothing, 0.0)),
        builder.fcmp_ordered(">=", largest, v.like(largest, LEAST)),
    )
    inverse = v.splat(builder.fdiv(v.like(largest, LEVELS), largest))
    whole = []
    for n in range(shape.byte_vectors * len(DIGITS)):
        v.store(ir.Constant(ir.VectorType(I8, BYTES), None), to, n * BYTES)
    for n, x in enumerate(numbers):
        level = v.intrinsic("llvm.rint", builder.fmul(x, inverse))
        level = builder.select(v.splat(some), level, v.constant(0.0))
        whole.append(level)
        left = builder.fptosi(level, v.integers)
        for digit in reversed(DIGITS):  # the last one first
            low = builder.ashr(builder.shl(left, v.integer_constant(24)), v.integer_constant(24))
            left = builder.ashr(builder.sub(left, low), v.integer_constant(8))
            codes = builder.trunc(low, ir.VectorType(I8, v.lanes))
            vector, lane = divmod(n * v.lanes, BYTES)
            v.store(codes, to, (vector * len(DIGITS) + digit) * BYTES + lane)
    unit = builder.fmul(largest, v.like(largest, 1 / LEVELS))
    return whole, builder.fadd(unit, nothing)


def _emit_finish(function: ir.Function, shape: Shape) -> None:
    """Emit finish(row): sums of codes and, behind them, of centers become the numbers of a row, side by side."""
    tile = Tile(function, shape)
    v, (row,) = tile.v, function.args
    joined, centers = tile.scratch(shape.parts * shape.vectors + 1), shape.parts * shape.padded
    for p in range(shape.parts):  # the second part overwrites what fills up the first
        for n in range(shape.vectors):
            center = v.load(row, (centers + p * shape.groups + n * v.lanes // GROUP) * v.bytes, v.number)
            x = v.builder.fadd(v.load(row, (p * shape.padded + n * v.lanes) * v.bytes), v.splat(center))
            v.store(x, joined, (p * shape.codes + n * v.lanes) * v.bytes)
    places = [n * v.lanes * v.bytes for n in range(math.ceil(shape.size / v.lanes))]
    for place, x in zip(places, rotated_vectors(v, [v.load(joined, n) for n in places], shape.size), strict=True):
        v.store(x, row, place)
    tile.builder.ret_void()


class Rows(NamedTuple):
    """Addresses of what makes rows ready and what finishes them; 0 where there is nothing to do."""

    ready: int
    finish: int


@functools.cache
def decode_rows(keys: Shape, values: Shape) -> Rows:
    """Compile what rows of queries for such keys need, and rows of sums of such values; return the addresses."""
    module = ir.Module()
    if keys.groups:
        _emit_ready(ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 2), "ready"), keys)
    if values.groups:
        _emit_finish(ir.Function(module, ir.FunctionType(ir.VoidType(), [I64]), "finish"), values)
    found = compile_hooks(module)
    return Rows(*(found.get(name, 0) for name in Rows._fields))


call_ready, call_finish = (function_pointer(count, False) for count in (2, 1))

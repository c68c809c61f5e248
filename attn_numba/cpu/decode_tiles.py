"""Products of a few query rows with stored keys, and weighted sums of stored values, as LLVM vector code.

Keys and values are read straight from their page, in the code that they are stored in, and become numbers in registers.
A tile is compiled for its code, row sizes and number of query rows when it is first needed, in some tens of
milliseconds, and called by address, so that no worker is compiled anew for another storage.

Same bits: a product is one chain of multiply-adds for each lane, folded in a fixed order; a weighted sum is one chain
over the keys. Neither depends on how many rows or keys go together.

Integer codes (see `rules.storage.Code`) come in groups with a scale and a center. Centers are counted apart from the
codes, a whole vector of groups at once: times the sum of the query's numbers that they meet, or into sums of their own
behind those of the codes, which belong to every number of their group (`add_centers` in `decode.py`).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from attn_numba.cpu.decode_codes import BYTES, DIGITS, LINE, Shape, Tile, folded
from attn_numba.cpu.functions import Functions
from attn_numba.cpu.hooks import compile_hooks
from attn_numba.cpu.tiles import define, function_pointer, result_number
from attn_numba.cpu.vectors import I1, I32, I64, Loop
from attn_numba.rules.storage import GROUP

TILE_ROWS = (1, 2, 4)  # query rows that go together


# --- products ---


def _emit_scores(function: ir.Function, shape: Shape, rows: int) -> None:
    """Emit scores(q, keys, count, to, row, ahead).

    `to[r, j] = sum_d q[r, d] keys[j, d]` for the rows of the tile and `count` keys; `row` is the length of a row of
    `to` in bytes. Meanwhile as much as is read is asked for at `ahead`.

    Memory is read from its beginning to its end. The lanes of each sum wait in `lanes_of` until there are enough keys
    to fold them together.
    """
    tile = Tile(function, shape)
    q, keys, count, to, row, ahead = function.args
    v, builder = tile.v, tile.builder
    sums_of = _digit_sums if shape.digits else _grouped_sums if shape.groups else _row_sums
    lanes_of, queries = tile.scratch(shape.lanes), Queries(tile, q, rows)
    together = shape.lanes // rows  # keys whose sums, for all rows, are folded at a time
    group = Loop(builder, count, together, [])
    left = builder.sub(count, group.index)
    limit = tile.constant(together)
    some = builder.select(builder.icmp_signed("<", left, limit), left, limit)
    near = 1 if queries.resident or rows == 1 else min(2, together)  # keys that meet a vector of q that is read once
    whole = builder.and_(some, tile.constant(-near))
    for keys_near, start, end in ((near, tile.constant(0), whole), (1, whole, some))[: 2 if near > 1 else 1]:
        key = Loop(builder, builder.sub(end, start), keys_near, [])
        n = builder.add(start, key.index)
        at = tile.times(builder.add(group.index, n), shape.row_bytes)
        sums = sums_of(tile, rows, keys_near, queries, builder.add(keys, at), builder.add(ahead, at))
        place = builder.add(lanes_of, tile.times(n, shape.lanes * v.bytes))
        for i, total in enumerate(sums):
            v.store(total, place, (i // keys_near * together + i % keys_near) * shape.lanes * v.bytes)
        key.close([])
    scores = folded(v, [v.load(lanes_of, n * shape.lanes * v.bytes) for n in range(shape.lanes)])
    if shape.digits:
        scores = builder.fmul(scores, queries.units())
    first = builder.add(to, tile.times(group.index, v.bytes))
    for r in range(rows):  # a row's scores lie in lanes of their own
        lanes = ir.Constant(ir.VectorType(I32, v.lanes), [(n - r * together) % 2**32 for n in range(v.lanes)])
        own = builder.icmp_unsigned("<", lanes, v.splat(builder.trunc(some, I32)))
        v.store_where(own, scores, v.pointer(first, -r * together * v.bytes))
        first = builder.add(first, row)
    group.close([])
    builder.ret_void()


class Queries:
    """The query rows of a tile: their vectors, which stay in registers if they fit, and the sums of their groups."""

    def __init__(self, tile: Tile, q: ir.Value, rows: int) -> None:
        shape = tile.shape
        self.tile, self.q, self.rows = tile, q, rows
        self.kind = ir.VectorType(I32, BYTES // 4) if shape.digits else None
        self.vectors = shape.byte_vectors * len(DIGITS) if shape.digits else shape.vectors
        self.resident: list[list[ir.Value]] = []
        if rows * self.vectors <= tile.registers:
            self.resident = [[self._load(r, n) for n in range(self.vectors)] for r in range(rows)]
        words = range(-(-shape.groups // shape.lanes))
        step = shape.lanes * tile.v.bytes
        self.sums = [
            [tile.v.load(q, r * shape.query_bytes + shape.sums_at + w * step) for w in words] for r in range(rows)
        ]

    def units(self) -> ir.Value:
        """Return the units of the rows' digits, those of a row in as many lanes as any other's."""
        v, shape, count = self.tile.v, self.tile.shape, self.rows
        each = [v.load(self.q, r * shape.query_bytes + shape.unit_at) for r in range(count)]
        found = each[0]
        for r, units in enumerate(each[1:], 1):
            found = v.shuffle(found, units, [n + v.lanes * (n * count // v.lanes == r) for n in range(v.lanes)])
        return found

    def _load(self, r: int, n: int, at: ir.Value | None = None) -> ir.Value:
        v, shape = self.tile.v, self.tile.shape
        row = self.q if at is None else self.tile.builder.add(self.q, self.tile.times(at, v.bytes))
        return v.load(row, r * shape.query_bytes + n * (BYTES if shape.digits else shape.lanes * v.bytes), self.kind)

    def vector(self, r: int, n: int, at: ir.Value | None = None) -> ir.Value:
        """Return vector n of a row, counted from number `at` on; with resident rows that is a constant or none."""
        if not self.resident:
            return self._load(r, n, at)
        return self.resident[r][n + (at.constant // self.tile.shape.lanes if at is not None else 0)]


def _row_sums(tile: Tile, rows: int, together: int, queries: Queries, keys, ahead) -> list[ir.Value]:
    """Return for each row of q, and for each of some keys at an address, the lanes of their product."""
    v, builder, shape = tile.v, tile.builder, tile.shape

    def block(at: ir.Value, vectors: int, whole: bool, old: list[ir.Value]) -> list[ir.Value]:
        """Go on by some vectors of codes, `at` codes after the first one."""
        new = list(old)
        asked = builder.add(ahead, tile.times(at, tile.code_bytes * together))
        asks = shape.row_bytes if vectors == shape.vectors else vectors * tile.vector_bytes
        for line in range(0, together * asks, LINE):
            tile.prefetch(asked, line)
        for n in range(vectors):
            found = [tile.read(keys, key * shape.row_bytes, at, n, whole)[0] for key in range(together)]
            for r in range(rows):
                query = queries.vector(r, n, at)
                for key in range(together):
                    new[r * together + key] = v.fma(query, found[key], new[r * together + key])
        return new

    sums = [v.constant(0.0)] * (rows * together)
    whole = shape.whole
    if queries.resident:
        sums = block(tile.constant(0), whole, True, sums)
    else:
        depth = Loop(builder, tile.constant(whole * shape.lanes), shape.lanes, sums)
        sums = depth.close(block(depth.index, 1, True, depth.values))
    if whole < shape.vectors:
        sums = block(tile.constant(whole * shape.lanes), 1, False, sums)
    return sums


def _grouped_sums(tile: Tile, rows: int, together: int, queries: Queries, keys, ahead) -> list[ir.Value]:
    """Return what `_row_sums` does, for codes in groups: the centers first, then the codes."""
    v, builder, shape = tile.v, tile.builder, tile.shape
    for line in range(0, together * shape.row_bytes, LINE):
        tile.prefetch(ahead, line)
    words = len(queries.sums[0])
    scales_of = tile.scratch(together * words)
    sums = [v.constant(0.0)] * (rows * together)
    for key in range(together):
        for w in range(words):
            scales, centers = tile.words(keys, key * shape.row_bytes, 0, w)
            v.store(scales, scales_of, (key * words + w) * v.bytes * shape.lanes)
            for r in range(rows):
                sums[r * together + key] = v.fma(queries.sums[r][w], centers, sums[r * together + key])
    for n in range(shape.vectors):
        numbers = []
        for key in range(together):
            [codes] = tile.read(keys, key * shape.row_bytes, tile.constant(0), n, True)
            at = (key * words * shape.lanes + n * shape.lanes // GROUP) * v.bytes
            numbers.append(builder.fmul(codes, v.splat(v.load(scales_of, at, v.number))))
        for r in range(rows):
            query = queries.vector(r, n)
            for key in range(together):
                sums[r * together + key] = v.fma(query, numbers[key], sums[r * together + key])
    return sums


def _digit_sums(tile: Tile, rows: int, together: int, queries: Queries, keys, ahead) -> list[ir.Value]:
    """Return what `_grouped_sums` does, in units of the queries' digits.

    The processor multiplies bytes without a sign by digits with one, and adds four neighbors, which are of one group:
    codes are read 128 too large, and 128 scales are taken from the center. Each digit is added to 256 times what those
    before it came to, in whole numbers, and only the sum is scaled.
    """
    v, builder, shape = tile.v, tile.builder, tile.shape
    for line in range(0, together * shape.row_bytes, LINE):
        tile.prefetch(ahead, line)
    sums, a_vector = [v.constant(0.0)] * (rows * together), BYTES // GROUP
    for key in range(together):
        words = [tile.words(keys, key * shape.row_bytes, 0, w) for w in range(len(queries.sums[0]))]
        for w, (scales, centers) in enumerate(words):
            lowest = v.fma(scales, v.constant(-128.0), centers)
            for r in range(rows):
                sums[r * together + key] = v.fma(queries.sums[r][w], lowest, sums[r * together + key])
        for n in range(shape.byte_vectors):
            w, first = divmod(n * a_vector, shape.lanes)
            scales = v.shuffle(
                words[w][0], words[w][0], [first + lane * a_vector // shape.lanes for lane in range(v.lanes)]
            )
            codes = tile.read_bytes(keys, key * shape.row_bytes, n)
            for r in range(rows):
                found = v.integer_constant(0)
                for digit in DIGITS:
                    if digit:
                        found = builder.shl(found, v.integer_constant(8))
                    query = queries.vector(r, n * len(DIGITS) + digit)
                    found = v.call("llvm.x86.avx512.vpdpbusd.512", v.integers, found, codes, query)
                at = r * together + key
                sums[at] = v.fma(builder.sitofp(found, v.vector), scales, sums[at])
    return sums


# --- weighted sums ---


def _emit_values(function: ir.Function, shape: Shape, rows: int, careful: bool) -> None:
    """Emit values(weights, row, values, count, to, ahead).

    `to[r, e] += sum_j weights[r, j] values[j, e]`, one chain over the keys; `row` is the length of a row of weights in
    bytes. A `careful` tile leaves out keys of negative weight: those that a row does not see, whose values may be
    anything.
    """
    tile = Tile(function, shape)
    builder = tile.builder
    weights, row, values, count, to, ahead = function.args
    most = max(1, tile.registers // (rows * shape.parts))  # vectors of codes together
    if shape.groups:  # in whole groups
        a_group = -(-GROUP // shape.lanes)
        most = max(a_group, most // a_group * a_group)
    whole = shape.whole
    passes = whole // most
    if passes:
        loop = Loop(builder, tile.constant(passes), 1, [])
        at = tile.times(loop.index, most * shape.lanes)
        _value_columns(tile, rows, most, True, at, weights, row, values, count, to, careful, ahead)
        loop.close([])
    done = passes * most
    if done < whole:
        at = tile.constant(done * shape.lanes)
        _value_columns(tile, rows, whole - done, True, at, weights, row, values, count, to, careful, ahead)
    if whole < shape.vectors:
        at = tile.constant(whole * shape.lanes)
        _value_columns(tile, rows, 1, False, at, weights, row, values, count, to, careful, ahead)
    tile.builder.ret_void()


def _value_columns(tile: Tile, rows, vectors, whole, at, weights, row, values, count, to, careful, ahead) -> None:
    """Go through all keys with some vectors of codes, from code `at` on."""
    v, builder, shape = tile.v, tile.builder, tile.shape
    if shape.groups:
        _grouped_columns(tile, rows, vectors, at, weights, row, values, count, to, careful, ahead)
        return
    to = builder.add(to, tile.times(at, v.bytes))
    places = [
        (r * shape.width + p * shape.padded + n * shape.lanes) * v.bytes
        for r in range(rows)
        for n in range(vectors)
        for p in range(shape.parts)
    ]
    loop = Loop(builder, count, 1, [v.load(to, place) for place in places])
    source = builder.add(values, tile.times(loop.index, shape.row_bytes))
    _ask(tile, vectors, at, count, loop.index, ahead)
    numbers = [x for n in range(vectors) for x in tile.read(source, 0, at, n, whole)]
    new, left = [], builder.add(weights, tile.times(loop.index, v.bytes))
    for r in range(rows):
        weight = v.splat(v.load(left, kind=v.number))
        hidden = builder.fcmp_ordered("<", weight, v.constant(0.0)) if careful else None
        for n, number in enumerate(numbers):
            old = loop.values[r * len(numbers) + n]
            more = v.fma(weight, number, old)
            new.append(more if hidden is None else builder.select(hidden, old, more))
        left = builder.add(left, row)
    for value, place in zip(loop.close(new), places, strict=True):
        v.store(value, to, place)


def _ask(tile: Tile, vectors: int, at: ir.Value, count: ir.Value, key: ir.Value, ahead: ir.Value) -> None:
    """Ask for memory: all passes together ask for as much as they read, from its beginning on."""
    builder, shape = tile.builder, tile.shape
    columns = shape.row_bytes if vectors == shape.vectors else vectors * tile.vector_bytes
    asked = builder.add(builder.mul(count, tile.times(at, tile.code_bytes)), tile.times(key, columns))
    for line in range(0, columns, LINE):
        tile.prefetch(builder.add(ahead, asked), line)


def _grouped_columns(tile: Tile, rows, vectors, at, weights, row, values, count, to, careful, ahead) -> None:
    """Go through all keys as `_value_columns` does, for codes in groups.

    A code is added times the product of weight and scale, which is made for a vector of groups at once.
    """
    v, builder, shape = tile.v, tile.builder, tile.shape
    groups = -(-vectors * shape.lanes // GROUP)
    first = builder.udiv(at, tile.constant(GROUP))
    codes_at = builder.add(to, tile.times(at, v.bytes))
    centers_at = builder.add(to, tile.times(tile.plus(first, shape.parts * shape.padded), v.bytes))
    each = [(r, p) for r in range(rows) for p in range(shape.parts)]
    places = [(r * shape.width + p * shape.padded + n * shape.lanes) * v.bytes for r, p in each for n in range(vectors)]
    center_places = [(r * shape.width + p * shape.groups) * v.bytes for r, p in each]
    old_centers = [v.load(centers_at, place) for place in center_places]
    products_of = tile.scratch(len(each))
    loop = Loop(builder, count, 1, [*(v.load(codes_at, place) for place in places), *old_centers])
    _ask(tile, vectors, at, count, loop.index, ahead)
    source = builder.add(values, tile.times(loop.index, shape.row_bytes))
    words = [
        tile.words_from(source, tile.times(tile.plus(first, p * shape.groups), 4), groups) for p in range(shape.parts)
    ]
    centers, left = [], builder.add(weights, tile.times(loop.index, v.bytes))
    for i, (r, p) in enumerate(each):
        if not p:
            weight = v.splat(v.load(builder.add(left, tile.times(row, r)), kind=v.number))
        scales, centered = (builder.fmul(weight, x) for x in words[p])
        if careful:
            hidden = builder.fcmp_ordered("<", weight, v.constant(0.0))
            scales, centered = (builder.select(hidden, v.constant(0.0), x) for x in (scales, centered))
        v.store(scales, products_of, i * v.bytes * shape.lanes)
        centers.append(builder.fadd(loop.values[len(places) + i], centered))
    new = list(loop.values[: len(places)])
    for n in range(vectors):
        codes = tile.read(source, 0, at, n, True)
        for i, (_, p) in enumerate(each):
            product = v.load(products_of, (i * shape.lanes + n * shape.lanes // GROUP) * v.bytes, v.number)
            new[i * vectors + n] = v.fma(codes[p], v.splat(product), new[i * vectors + n])
    found = loop.close([*new, *centers])
    for value, place in zip(found[: len(places)], places, strict=True):
        v.store(value, codes_at, place)
    for value, place in zip(found[len(places) :], center_places, strict=True):
        v.store_first(value, builder.add(centers_at, tile.constant(place)), tile.constant(groups))


# --- compilation ---


class Tiles(NamedTuple):
    """Addresses of the tiles of so many rows."""

    scores: int
    values: int
    careful: int  # values, of which a row may not see all


@functools.cache
def decode_tiles(keys: Shape, values: Shape, rows: int) -> Tiles:
    """Compile the tiles of rows of keys and of values for so many query rows, and return their addresses."""
    module = ir.Module()

    def function(name: str, arguments: int) -> ir.Function:
        return ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * arguments), name)

    _emit_scores(function("scores", 6), keys, rows)
    _emit_values(function("values", 6), values, rows, False)
    _emit_values(function("careful", 6), values, rows, True)
    found = compile_hooks(module)
    return Tiles(*(found[name] for name in Tiles._fields))


# --- rows of scores and weights ---


def _weigh(v: Functions, unit, row, count, found, factor, shift):
    """Turn scores into weights and return their sum; note at `found` whether one of them is minus infinity."""
    builder = v.builder
    factors, shifts, none = v.splat(factor), v.splat(shift), v.constant(-math.inf)
    bits = ir.VectorType(I1, v.lanes)
    loop = Loop(builder, count, v.lanes, [v.constant(0.0), ir.Constant(bits, [0] * v.lanes)])
    at = builder.mul(loop.index, ir.Constant(I64, v.bytes))
    score = v.load(row, at)
    hidden = builder.fcmp_ordered("==", score, none)
    weight = v.exp2_product(builder.fsub(score, shifts), factors)
    v.store(builder.select(hidden, v.constant(-1.0), weight), row, at)
    hidden = builder.and_(hidden, v.first_lanes(builder.sub(count, loop.index)))
    sums, seen = loop.close([builder.fadd(loop.values[0], weight), builder.or_(loop.values[1], hidden)])
    whole = ir.IntType(v.lanes)
    some = builder.icmp_unsigned("!=", builder.bitcast(seen, whole), ir.Constant(whole, 0))
    v.store(builder.zext(some, I64), found)
    return v.fold(sums, builder.fadd)


def _add_scaled(v: Functions, unit, to, source, columns, factor):
    builder = v.builder
    factors = v.splat(factor)
    loop = Loop(builder, columns, v.lanes, [])
    at = builder.mul(loop.index, ir.Constant(I64, v.bytes))
    v.store(v.fma(v.load(source, at), factors, v.load(to, at)), to, at)
    loop.close([])


def _copy_row(v: Functions, unit, to, source, count):
    builder = v.builder
    loop = Loop(builder, count, v.lanes, [])
    at = builder.mul(loop.index, ir.Constant(I64, v.bytes))
    v.store_first(v.load(source, at), builder.add(to, at), builder.sub(count, loop.index))
    loop.close([])


# weigh(unit, row, count, found, factor, shift): the first `count` scores (read in whole vectors) become
# 2**((s - shift) * factor), or -1 where a score is minus infinity; returns their sum without those; `found` is the
# address of an int64: whether there were any
weigh = define(3, _weigh, result_number, tail=(0, 0))
add_scaled = define(3, _add_scaled, tail=(0,))  # to += source * factor, whole vectors
copy_row = define(3, _copy_row)  # the first `count` numbers


@intrinsic
def arrive(typingctx, address):
    """Add 1 to the int64 at `address` and return what it was; what was written before is seen by who comes later."""

    def codegen(context, builder, signature, args):
        counter = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(I64, 1), "acq_rel")

    return types.intp(types.intp), codegen


call_scores, call_values = (function_pointer(count, False) for count in (6, 6))

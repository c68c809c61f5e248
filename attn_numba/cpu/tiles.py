"""Register tiles, row operations and conversions as Numba intrinsics that emit LLVM vector code.

Every intrinsic takes byte addresses (int64) and, first, a *unit*: a number whose type alone says what is multiplied.

| unit | operands | accumulators |
| --- | --- | --- |
| `float32(0)` | float32 | float32 |
| `float64(0)` | float64 | float64 |
| `int32(0)` | pairs of bfloat16 in one 32-bit word | float32 |

A *word* below is one operand: 4 or 8 bytes. Rows that are read as vectors are padded to whole vectors by the caller.
"""

from __future__ import annotations

import math

import llvmlite.ir as ir
from numba import types
from numba.extending import intrinsic

from attn_numba.cpu.functions import Functions
from attn_numba.cpu.target import target
from attn_numba.cpu.vectors import DOUBLE, FLOAT, HALF, I16, I32, I64, BFloat, Loop, Vectors

CHAIN_VECTORS = (
    12  # keys (in vectors) whose weighted values are one chain of sums; longer chains would gather rounding errors
)
DEPTH_CHAIN = 256  # words of a head in one chain of sums, for the same reason
VECTORS = 3  # vectors in a register tile's row; rows x 3 accumulators, 3 operands and a broadcast fit the register file
TILE_ROWS = target().tile_rows
BF16_DOT = {64: "llvm.x86.avx512bf16.dpbf16ps.512"}
EXPONENT = {FLOAT: 0x7F800000, DOUBLE: 0x7FF0000000000000}  # all ones: not finite

# How numbers are stored in the arrays of a call.
SAME, HALF_FLOAT, BRAIN_FLOAT = 0, 1, 2


def emitter(builder: ir.IRBuilder, unit: types.Type) -> Functions:
    """Return what emits the operations of a unit's accumulators."""
    number = DOUBLE if unit == types.float64 else FLOAT
    return Functions(builder, number, target().vector_bytes // (8 if number == DOUBLE else 4))


def result_number(unit: types.Type) -> types.Type:
    """Type of a unit's accumulators."""
    return types.float64 if unit == types.float64 else types.float32


def _addresses(count: int) -> tuple[types.Type, ...]:
    return (types.intp,) * count


def define(count: int, emit, result=None, tail=()):
    """Return an intrinsic of (unit, `count` int64 arguments, numbers) that `emit(vectors, unit, *values)` emits.

    `result` is a function from the unit's type to the result's type, None for none; `tail` counts trailing
    accumulator arguments.
    """
    floats = len(tail)

    def typer(unit):
        returns = result(unit) if result else types.void
        return returns(unit, *_addresses(count), *([result_number(unit)] * floats))

    def codegen(context, builder, signature, args):
        unit = signature.args[0]
        value = emit(emitter(builder, unit), unit, *args[1:])
        return context.get_dummy_value() if result is None else value

    names = [f"a{i}" for i in range(count + floats)]
    namespace = {"typer": typer, "codegen": codegen}
    exec(f"def function(typingctx, unit, {', '.join(names)}):\n    return typer(unit), codegen", namespace)
    return intrinsic(namespace["function"])


class Operands:
    """The rows of a register tile: of A and of C, row i begins i row lengths (in words) after the first."""

    def __init__(self, v: Vectors, unit: types.Type, rows: int, vectors: int, a, a_row, b, b_row, c, c_row):
        self.v, self.rows, self.vectors = v, rows, vectors
        self.pairs = unit == types.int32
        self.word = I32 if self.pairs else v.number
        self.size = ir.Constant(I64, v.bytes)
        self.a_rows, self.c_rows = self._addresses(a, a_row), self._addresses(c, c_row)
        self.b, self.b_step = b, v.builder.mul(b_row, self.size)
        self.columns = [ir.Constant(I64, n * v.lanes * v.bytes) for n in range(vectors)]  # in bytes, of B and of C

    def _addresses(self, base: ir.Value, row: ir.Value) -> list[ir.Value]:
        step = self.v.builder.mul(row, self.size)
        found = [base]
        for _ in range(self.rows - 1):
            found.append(self.v.builder.add(found[-1], step))
        return found

    def zeros(self) -> list[ir.Value]:
        return [self.v.constant(0.0)] * (self.rows * self.vectors)

    def load(self) -> list[ir.Value]:
        return [self.v.load(row, column) for row in self.c_rows for column in self.columns]

    def store(self, accumulators: list[ir.Value]) -> None:
        v = self.v
        for i, row in enumerate(self.c_rows):
            for n in range(self.vectors):
                v.store(accumulators[i * self.vectors + n], row, self.columns[n])

    def multiply_add(
        self, left: ir.Value, right: ir.Value, accumulators: list[ir.Value], columns: list[ir.Value] | None = None
    ) -> list[ir.Value]:
        """Add column `left` of A times row `right` of B: one chain of fused multiply-adds for each element of C.

        `columns` says where B's vectors lie in its rows, in bytes, if not side by side.
        """
        v, builder, new = self.v, self.v.builder, []
        at = builder.add(self.b, builder.mul(right, self.b_step))
        rights = [v.load(at, column) for column in columns or self.columns]
        offset = builder.mul(left, self.size)
        for i, row in enumerate(self.a_rows):
            number = v.splat(v.load(row, offset, self.word), self.word)
            for n, vector in enumerate(rights):
                old = accumulators[i * self.vectors + n]
                new.append(self._dot(number, vector, old) if self.pairs else v.fma(number, vector, old))
        return new

    def _dot(self, left: ir.Value, right: ir.Value, old: ir.Value) -> ir.Value:
        v, operand = self.v, ir.VectorType(BFloat(), 2 * self.v.lanes)
        args = old, v.builder.bitcast(left, operand), v.builder.bitcast(right, operand)
        return v.call(BF16_DOT[target().vector_bytes], v.vector, *args)


def score_tile(rows: int, vectors: int):
    """Return what emits tile(unit, a, a_row, b, b_row, c, c_row, depth).

    C[rows, vectors] = A[rows, depth] @ B[depth, vectors]. Row lengths in words. An element's bits do not depend on the
    rows and columns beside it, nor on their number. Each element of C has one writer.
    """

    def emit(v: Vectors, unit, a, a_row, b, b_row, c, c_row, depth):
        tile = Operands(v, unit, rows, vectors, a, a_row, b, b_row, c, c_row)
        loop = Loop(v.builder, depth, 1, tile.zeros())
        tile.store(loop.close(tile.multiply_add(loop.index, loop.index, loop.values)))

    return emit


def value_tile(rows: int, vectors: int):
    """Return what emits tile(unit, a, a_row, b, b_row, c, c_row, runs, count).

    C[rows, vectors] += A[rows, runs] @ B[runs, vectors]. `runs` is the address of `count` pairs of int32, first and end
    of the stretches of the depth to go through (keys: for pairs, both are halved). Row lengths in words. Each element
    of C has one writer; what is added to it is one chain of multiply-adds over the stretches, begun at zero.
    """

    def emit(v: Vectors, unit, a, a_row, b, b_row, c, c_row, runs, count):
        builder = v.builder
        tile = Operands(v, unit, rows, vectors, a, a_row, b, b_row, c, c_row)
        run = Loop(builder, count, 1, tile.zeros())
        at = builder.add(runs, builder.mul(run.index, ir.Constant(I64, 8)))
        first, end = (builder.sext(v.load(at, offset, I32), I64) for offset in (0, 4))
        if tile.pairs:
            one = ir.Constant(I64, 1)
            first, end = builder.ashr(first, one), builder.ashr(builder.add(end, one), one)
        loop = Loop(builder, builder.sub(end, first), 1, run.values)
        at = builder.add(loop.index, first)
        new = loop.close(tile.multiply_add(at, at, loop.values))
        sums = run.close(new)
        tile.store([builder.fadd(old, x) for old, x in zip(tile.load(), sums, strict=True)])

    return emit


score_tile_3, score_tile_2, score_tile_1 = (define(7, score_tile(TILE_ROWS, n)) for n in (3, 2, 1))
score_row_3, score_row_1 = (define(7, score_tile(1, n)) for n in (3, 1))
value_tile_3, value_tile_2, value_tile_1 = (define(8, value_tile(TILE_ROWS, n)) for n in (3, 2, 1))
value_row_3, value_row_2, value_row_1 = (define(8, value_tile(1, n)) for n in (3, 2, 1))


def _row_largest(v: Vectors, unit, row, columns, start):
    builder = v.builder
    step, size = VECTORS * v.lanes, ir.Constant(I64, v.bytes)
    triples = builder.mul(builder.sdiv(columns, ir.Constant(I64, step)), ir.Constant(I64, step))
    loop = Loop(builder, triples, step, [v.splat(start)] * VECTORS)
    at = builder.add(row, builder.mul(loop.index, size))
    new = [v.larger(v.load(at, n * v.lanes * v.bytes), loop.values[n]) for n in range(VECTORS)]
    first, *others = loop.close(new)
    for other in others:
        first = v.larger(first, other)
    rest = Loop(builder, builder.sub(columns, triples), v.lanes, [first])
    at = builder.add(row, builder.mul(builder.add(rest.index, triples), size))
    (first,) = rest.close([v.larger(v.load(at), rest.values[0])])
    return v.fold(first, v.larger)


def _weights(count: int):
    """Weights of `count` vectors of scores at a time, each with its own vector of partial sums."""

    def emit(v: Vectors, unit, row, weights, sums, columns, factor, shift):
        builder = v.builder
        factors, shifts = v.splat(factor), v.splat(shift)
        step = v.lanes * v.bytes
        loop = Loop(builder, columns, count * v.lanes, [v.load(sums, n * step) for n in range(count)])
        at = builder.add(row, builder.mul(loop.index, ir.Constant(I64, v.bytes)))
        to = builder.add(weights, builder.mul(loop.index, ir.Constant(I64, 2 if unit == types.int32 else v.bytes)))
        new = []
        for n in range(count):
            weight = v.exp2_product(builder.fsub(v.load(at, n * step), shifts), factors)
            new.append(builder.fadd(loop.values[n], weight))
            if unit == types.int32:
                brain = builder.fptrunc(weight, ir.VectorType(BFloat(), v.lanes))
                v.store(brain, to, n * v.lanes * 2)
            else:
                v.store(weight, to, n * step)
        for n, total in enumerate(loop.close(new)):
            v.store(total, sums, n * step)

    return emit


def _normalized(v: Vectors, unit, row, to, count, factor, shift, inverse):
    builder = v.builder
    score = v.load(row)
    weight = v.exp2_product(builder.fsub(score, v.splat(shift)), v.splat(factor))
    weight = builder.fmul(weight, v.splat(inverse))
    excluded = builder.fcmp_ordered("==", score, v.constant(-math.inf))
    v.store_first(builder.select(excluded, v.constant(0.0), weight), to, count)


def _row_total(v: Vectors, unit, sums):
    builder = v.builder
    first = v.load(sums)
    for n in range(1, VECTORS):
        first = builder.fadd(first, v.load(sums, n * v.lanes * v.bytes))
    return v.fold(first, builder.fadd)


def _row_scale(v: Vectors, unit, row, columns, factor):
    builder = v.builder
    factors = v.splat(factor)
    loop = Loop(builder, columns, v.lanes, [])
    offset = builder.mul(loop.index, ir.Constant(I64, v.bytes))
    v.store(builder.fmul(v.load(row, offset), factors), row, offset)
    loop.close([])


def _row_fill(v: Vectors, unit, row, columns, number):
    builder = v.builder
    numbers = v.splat(number)
    loop = Loop(builder, columns, v.lanes, [])
    v.store(numbers, row, builder.mul(loop.index, ir.Constant(I64, v.bytes)))
    loop.close([])


def _advance_rows(v: Vectors, unit, tops, largest, shifts, shrinks, rows, factor):
    builder = v.builder
    loop = Loop(builder, rows, v.lanes, [])
    offset = builder.mul(loop.index, ir.Constant(I64, v.bytes))
    old = v.load(largest, offset)
    new = v.larger(v.load(tops, offset), old)
    shift = builder.select(builder.fcmp_ordered(">", new, v.constant(-math.inf)), new, v.constant(0.0))
    v.store(new, largest, offset)
    v.store(shift, shifts, offset)
    v.store(v.exp2_product(builder.fsub(old, shift), v.splat(factor)), shrinks, offset)
    loop.close([])


def _gather_totals(v: Vectors, unit, totals, shrinks, added, rows):
    builder = v.builder
    loop = Loop(builder, rows, v.lanes, [])
    offset = builder.mul(loop.index, ir.Constant(I64, v.bytes))
    v.store(v.fma(v.load(totals, offset), v.load(shrinks, offset), v.load(added, offset)), totals, offset)
    loop.close([])


# largest number of a row of scores (whole vectors) and `start`; NaN is passed over
row_largest = define(2, _row_largest, result_number, tail=(0,))
# weights[j] = 2**((row[j] - shift) * factor), added lane by lane to the vectors of partial sums at `sums`; pairs:
# stored as bfloat16.
# The first takes whole triples of vectors, the second one vector.
triples_to_weights, vector_to_weights = (define(4, _weights(n), tail=(0, 0)) for n in (VECTORS, 1))
# the first `count` weights of a vector of scores, normalized; exactly 0 where the score is minus infinity
normalized = define(3, _normalized, tail=(0, 0, 0))
# the sum of those three vectors
row_total = define(1, _row_total, result_number)
row_scale = define(2, _row_scale, tail=(0,))
row_fill = define(2, _row_fill, tail=(0,))
# for a vector of rows at a time: the new maximum in place, what to subtract, and by how much earlier sums shrink
advance_rows = define(5, _advance_rows, tail=(0,))
# total[r] = total[r] * shrink[r] + added[r]
gather_totals = define(4, _gather_totals)


def _widened(v: Vectors, bits: ir.Value, kind: int) -> ir.Value:
    """float16 or bfloat16 bits (vector or one number) as float32."""
    builder = v.builder
    wide = isinstance(bits.type, ir.VectorType)
    floats, words = (v.vector, v.integers) if wide else (FLOAT, I32)
    if kind == HALF_FLOAT and target().half:  # elsewhere it is never called, and would need a library
        return builder.fpext(builder.bitcast(bits, ir.VectorType(HALF, v.lanes) if wide else HALF), floats)
    return builder.bitcast(builder.shl(builder.zext(bits, words), v.like_integer(bits, 16)), floats)


def _narrowed(v: Vectors, x: ir.Value, kind: int) -> ir.Value:
    """float32 as float16 or bfloat16 bits, rounded to nearest even, NaN stays NaN."""
    builder = v.builder
    wide = isinstance(x.type, ir.VectorType)
    shorts, words = (ir.VectorType(I16, v.lanes), v.integers) if wide else (I16, I32)
    if kind == HALF_FLOAT and target().half:
        return builder.bitcast(builder.fptrunc(x, ir.VectorType(HALF, v.lanes) if wide else HALF), shorts)
    bits = builder.bitcast(x, words)
    odd = builder.and_(builder.lshr(bits, v.like_integer(x, 16)), v.like_integer(x, 1))
    rounded = builder.add(builder.add(bits, v.like_integer(x, 0x7FFF)), odd)
    quiet = builder.or_(bits, v.like_integer(x, 0x400000))
    kept = builder.select(builder.fcmp_unordered("uno", x, x), quiet, rounded)
    return builder.trunc(builder.lshr(kept, v.like_integer(x, 16)), shorts)


def _reader(kind: int, wide: bool):
    """Copy one vector (or one number) of stored kind `kind` at `source` to accumulators at `to`."""

    def emit(v: Vectors, unit, to, source):
        if unit == types.int32 and kind != SAME:
            return
        if kind == SAME:
            single = I16 if unit == types.int32 else v.number
            number = v.load(source, kind=v.vector if wide else single)
        else:
            if v.number == DOUBLE:  # float64 calls hold float64 only: this branch is never taken there
                return
            bits = v.load(source, kind=ir.VectorType(I16, v.lanes) if wide else I16)
            number = _widened(v, bits, kind)
        v.store(number, to)

    return define(2, emit)


read_vector, read_half_vector, read_brain_vector = (_reader(kind, True) for kind in (SAME, HALF_FLOAT, BRAIN_FLOAT))
read_number, read_half_number, read_brain_number = (_reader(kind, False) for kind in (SAME, HALF_FLOAT, BRAIN_FLOAT))


def _writer(kind: int, wide: bool):
    """Write accumulators at `source` times `factor` as one vector (or number) of stored kind `kind` at `to`."""

    def emit(v: Vectors, unit, to, source, factor):
        builder = v.builder
        if v.number == DOUBLE and kind != SAME:
            return
        number = v.load(source, kind=v.vector if wide else v.number)
        number = builder.fmul(number, v.splat(factor) if wide else factor)
        v.store(number if kind == SAME else _narrowed(v, number, kind), to)

    return define(2, emit, tail=(0,))


write_vector, write_half_vector, write_brain_vector = (_writer(kind, True) for kind in (SAME, HALF_FLOAT, BRAIN_FLOAT))
write_number, write_half_number, write_brain_number = (_writer(kind, False) for kind in (SAME, HALF_FLOAT, BRAIN_FLOAT))


def _transpose(v: Vectors, unit, source, source_row, to, to_row):
    """One square block of `lanes` x `lanes` words.

    Each stage exchanges lanes of pairs of rows: first within quarters of 128 bits, which is cheapest, then quarters
    as wholes.
    """
    builder, n = v.builder, v.lanes
    rows, at = [], source
    for _ in range(n):
        rows.append(v.load(at))
        at = builder.add(at, source_row)
    distance = 1
    while distance < n:
        for i in range(n):
            if not i & distance:
                a, b = rows[i], rows[i + distance]
                rows[i], rows[i + distance] = (v.shuffle(a, b, p) for p in _exchange(n, distance))
        distance *= 2
    at = to
    for row in rows:
        v.store(row, at)
        at = builder.add(at, to_row)


def _exchange(n: int, distance: int) -> tuple[list[int], list[int]]:
    """Which lanes of two rows (the second row's from n on) make the two rows after an exchange at a distance."""
    low = [lane if not lane & distance else n + lane - distance for lane in range(n)]
    high = [lane + distance if not lane & distance else n + lane for lane in range(n)]
    return low, high


# rows `source_row` bytes apart become columns of rows `to_row` bytes apart
transpose = define(4, _transpose)


def _row_is_finite(v: Vectors, unit, row, columns):
    """Whether all words of a row (whole vectors) are finite; pairs: both halves of each word."""
    builder = v.builder
    if unit == types.int32:
        shorts, masks = ir.VectorType(I16, 2 * v.lanes), 0x7F80
        ones = ir.Constant(shorts, [masks] * (2 * v.lanes))
    else:
        shorts, ones = v.integers, v.integer_constant(EXPONENT[v.number])
    seen = ir.Constant(ir.VectorType(ir.IntType(1), shorts.count), [0] * shorts.count)
    loop = Loop(builder, columns, v.lanes, [seen])
    bits = v.load(row, builder.mul(loop.index, ir.Constant(I64, v.bytes)), shorts)
    found = builder.icmp_unsigned("==", builder.and_(bits, ones), ones)
    (seen,) = loop.close([builder.or_(loop.values[0], found)])
    whole = builder.bitcast(seen, ir.IntType(shorts.count))
    return builder.zext(builder.icmp_unsigned("==", whole, ir.Constant(whole.type, 0)), I64)


row_is_finite = define(2, _row_is_finite, lambda unit: types.intp)


def _interleave(v: Vectors, unit, to, first, second, columns):
    """Pairs only: word e of `to` holds bfloat16 number e of row `first` (low half) and of row `second` (high half)."""
    builder = v.builder
    shorts = ir.VectorType(I16, v.lanes)
    loop = Loop(builder, columns, v.lanes, [])
    offset = builder.mul(loop.index, ir.Constant(I64, 2))
    low = builder.zext(v.load(first, offset, shorts), v.integers)
    high = builder.shl(builder.zext(v.load(second, offset, shorts), v.integers), v.integer_constant(16))
    words = builder.or_(low, high)
    v.store(words, to, builder.mul(loop.index, ir.Constant(I64, 4)))
    loop.close([])


interleave = define(4, lambda v, unit, *a: _interleave(v, unit, *a) if unit == types.int32 else None)

load_number = define(1, lambda v, unit, at: v.load(at, kind=v.number), result_number)
store_number = define(1, lambda v, unit, at, x: v.store(x, at), tail=(0,))
vector_length = define(0, lambda v, unit: ir.Constant(I64, v.lanes), lambda unit: types.intp)
word_bytes = define(0, lambda v, unit: ir.Constant(I64, v.bytes), lambda unit: types.intp)
is_pairs = define(0, lambda v, unit: ir.Constant(I64, int(unit == types.int32)), lambda unit: types.intp)
accumulator = define(0, lambda v, unit: ir.Constant(v.number, 0.0), result_number)  # the unit of a unit's accumulators


def _bytes_access(kind: ir.Type):
    @intrinsic
    def load(typingctx, address):
        def codegen(context, builder, signature, args):
            value = builder.load(builder.inttoptr(args[0], kind.as_pointer()))
            value.align = 1
            return value if kind == I64 else builder.sext(value, I64)

        return types.intp(types.intp), codegen

    @intrinsic
    def store(typingctx, address, value):
        def codegen(context, builder, signature, args):
            value = args[1] if kind == I64 else builder.trunc(args[1], kind)
            builder.store(value, builder.inttoptr(args[0], kind.as_pointer())).align = 1
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), codegen

    return load, store


load_byte, store_byte = _bytes_access(ir.IntType(8))
load_int32, store_int32 = _bytes_access(I32)
load_word, store_word = _bytes_access(I64)


@intrinsic
def claim(typingctx, address):
    """Return the next number of the int64 counter at `address`; each number is given out once."""

    def codegen(context, builder, signature, args):
        counter = builder.inttoptr(args[0], I64.as_pointer())
        return builder.atomic_rmw("add", counter, ir.Constant(I64, 1), "monotonic")

    return types.intp(types.intp), codegen


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line of an address; any address will do."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        name = "llvm.prefetch.p0"
        function = builder.module.globals.get(name)
        if function is None:
            function = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32]), name)
        # to read, into the second-level cache, data
        builder.call(function, [pointer, ir.Constant(I32, 0), ir.Constant(I32, 2), ir.Constant(I32, 1)])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


def function_pointer(count: int, returns: bool):
    """Return an intrinsic that calls the function of `count` int64 arguments at an address."""

    def codegen(context, builder, signature, args):
        result = I64 if returns else ir.VoidType()
        function = builder.inttoptr(args[0], ir.FunctionType(result, [I64] * count).as_pointer())
        value = builder.call(function, args[1:])
        return value if returns else context.get_dummy_value()

    def typer():
        return (types.intp if returns else types.void)(types.intp, *_addresses(count))

    names = ", ".join(f"a{i}" for i in range(count))
    namespace = {"typer": typer, "codegen": codegen}
    exec(f"def function(typingctx, address, {names}):\n    return typer(), codegen", namespace)
    return intrinsic(namespace["function"])


call_edit = function_pointer(9, False)  # (scores, row length, b, h, i0, rows, j0, columns, parameters)
# (products, gradients, where to write, row length, b, h, i0, rows, j0, columns, parameters)
call_gradient = function_pointer(11, False)
# (b, h, row of q, number of runs, address to write to, bytes from first keys to ends, parameters)
call_runs = function_pointer(7, False)
call_kind = function_pointer(7, True)  # (b, h, i0, i1, j0, j1, parameters) -> NONE 0, SOME 1, ALL 2
# (address, A, its row, B, its row, C, its row, depth) and (..., runs, their number): see `score_tile`, `value_tile`
call_score_tile, call_value_tile = (function_pointer(count, False) for count in (7, 8))

"""Rows of keys and values as a cache stores them, read as vectors of numbers: emitted as LLVM vector code.

What a row of each code looks like in memory is said by `rules.storage.Code`. The numbers of a row come in *parts*: two
for int4 (the low halves and the high ones), else one; keys are never int4. Rows of sums, which the worker keeps, hold
their parts one after the other, each in whole vectors.
"""

from __future__ import annotations

from typing import NamedTuple

import llvmlite.ir as ir

from attn_numba.cpu.functions import Functions
from attn_numba.cpu.target import target
from attn_numba.cpu.vectors import DOUBLE, FLOAT, HALF, I1, I8, I16, I32, I64
from attn_numba.rules.storage import GROUP

LINE = 64  # bytes of a cache line
BYTES = 64  # of codes that a processor with products of bytes multiplies at a time
DIGITS = range(3)  # of a query that meets such codes, the most significant first

STORED = {"float64": DOUBLE, "float32": FLOAT, "float16": I16, "bfloat16": I16, "int8": I8, "int4": I8}
NIBBLES = tuple(float(n if n < 8 else n - 16) for n in range(16))  # what the four bits of an int4 code say


class Shape(NamedTuple):
    """How rows of `size` numbers of a code are cut into vectors."""

    code: str
    size: int

    @property
    def number(self) -> ir.Type:
        """Type of sums."""
        return DOUBLE if self.code == "float64" else FLOAT

    @property
    def number_bytes(self) -> int:
        return 8 if self.code == "float64" else 4

    @property
    def lanes(self) -> int:
        return target().vector_bytes // self.number_bytes

    @property
    def parts(self) -> int:
        return 2 if self.code == "int4" else 1

    @property
    def is_number(self) -> bool:
        """Whether what is stored is what is computed with."""
        return STORED[self.code] == self.number

    @property
    def codes(self) -> int:
        """Codes of a row, which is as many bytes as they are."""
        return -(-self.size // self.parts)

    @property
    def groups(self) -> int:
        """Groups of a part that have a scale; 0 of floats."""
        return -(-self.codes // GROUP) if self.code in ("int8", "int4") else 0

    @property
    def vectors(self) -> int:
        """Vectors of a part, the last of which may not be whole."""
        return -(-self.codes // self.lanes)

    @property
    def whole(self) -> int:
        """Vectors that lie within the row; those of integers, which are filled up, all do."""
        return self.vectors if self.groups else self.codes // self.lanes

    @property
    def padded(self) -> int:
        """Numbers of a part in whole vectors."""
        return self.vectors * self.lanes

    @property
    def width(self) -> int:
        """Numbers of a row as the worker keeps it: the parts, then one number for each group."""
        return self.parts * self.padded + -(-self.parts * self.groups // self.lanes) * self.lanes

    @property
    def digits(self) -> bool:
        """Whether queries meet codes as digits of whole numbers: see `decode_rows.py`."""
        return self.code == "int8" and target().byte_dot

    @property
    def byte_vectors(self) -> int:
        """Vectors of codes as bytes, the last of which may not be whole."""
        return -(-GROUP * self.groups // BYTES)

    @property
    def sums_at(self) -> int:
        """Bytes from the beginning of a query's row, as the worker keeps it, to the sums of its groups."""
        return BYTES * len(DIGITS) * self.byte_vectors if self.digits else self.padded * self.number_bytes

    @property
    def unit_at(self) -> int:
        """Bytes from the beginning of a query's row to the unit of its digits, in every lane of a vector."""
        return self.sums_at + self.number_bytes * -(-self.groups // self.lanes) * self.lanes

    @property
    def query_bytes(self) -> int:
        """Bytes from one query's row to the next."""
        return self.unit_at + (BYTES if self.digits else 0)

    @property
    def words_at(self) -> int:
        """Bytes from the beginning of a stored row to the scales and centers of its groups."""
        return GROUP * self.groups

    @property
    def row_bytes(self) -> int:
        """Bytes from a stored row to the next."""
        if self.groups:
            return self.words_at + 4 * self.parts * self.groups
        return self.codes * {DOUBLE: 8, FLOAT: 4, I16: 2}[STORED[self.code]]


class Tile:
    """Emits the tiles of one shape."""

    def __init__(self, function: ir.Function, shape: Shape) -> None:
        self.shape = shape
        self.builder = ir.IRBuilder(function.append_basic_block())
        self.v = Functions(self.builder, shape.number, shape.lanes)
        self.stored = STORED[shape.code]
        self.code_bytes = 1 if shape.groups else shape.row_bytes // shape.codes
        self.registers = 16 if target().vector_bytes == 64 else 8  # for operands that stay, or for sums
        self.vector_bytes = shape.lanes * self.code_bytes  # of a vector of codes

    def constant(self, n: int) -> ir.Constant:
        return ir.Constant(I64, n)

    def times(self, x: ir.Value, n: int) -> ir.Value:
        return self.builder.mul(x, self.constant(n))

    def plus(self, x: ir.Value, y: ir.Value | int) -> ir.Value:
        return self.builder.add(x, self.constant(y) if isinstance(y, int) else y)

    def read(self, row: ir.Value, skipped: int, at: ir.Value, n: int, whole: bool) -> list[ir.Value]:
        """Return one vector of each part, the one that begins n vectors after code `at`: numbers, or codes as numbers.

        `skipped` is the distance of the row from an address. Unless the vector is `whole`, it holds zeros beyond the
        row's end.
        """
        v, builder, kind = self.v, self.builder, ir.VectorType(self.stored, self.shape.lanes)
        first = builder.add(row, self.times(at, self.code_bytes))
        offset = skipped + n * self.vector_bytes
        if whole:
            codes = v.load(first, offset, kind)
        else:
            left = self.shape.codes % self.shape.lanes
            mask = ir.Constant(ir.VectorType(I1, kind.count), [n < left for n in range(kind.count)])
            name = {DOUBLE: "f64", FLOAT: "f32", I16: "i16"}[self.stored]
            codes = v.call(
                f"llvm.masked.load.v{kind.count}{name}.p0", kind,
                v.pointer(first, offset, kind), ir.Constant(I32, 1), mask, ir.Constant(kind, None),
            )  # fmt: skip
        return getattr(self, "_" + self.shape.code)(codes)

    def _float64(self, codes: ir.Value) -> list[ir.Value]:
        return [codes]

    _float32 = _float64

    def _bfloat16(self, codes: ir.Value) -> list[ir.Value]:
        v = self.v
        bits = self.builder.shl(self.builder.zext(codes, v.integers), v.integer_constant(16))
        return [self.builder.bitcast(bits, v.vector)]

    def _float16(self, codes: ir.Value) -> list[ir.Value]:
        v, builder = self.v, self.builder
        if target().half:
            return [builder.fpext(builder.bitcast(codes, ir.VectorType(HALF, v.lanes)), v.vector)]
        bits = builder.zext(codes, v.integers)
        sign = builder.shl(builder.and_(bits, v.integer_constant(0x8000)), v.integer_constant(16))
        magnitude = builder.shl(builder.and_(bits, v.integer_constant(0x7FFF)), v.integer_constant(13))
        finite = builder.fmul(builder.bitcast(magnitude, v.vector), v.constant(2.0**112))
        special = builder.icmp_unsigned(">=", magnitude, v.integer_constant(0x7C00 << 13))
        other = builder.or_(magnitude, v.integer_constant(0x7F800000))
        found = builder.select(special, other, builder.bitcast(finite, v.integers))
        return [builder.bitcast(builder.or_(found, sign), v.vector)]

    def _int8(self, codes: ir.Value) -> list[ir.Value]:
        return [self.builder.sitofp(self.builder.sext(codes, self.v.integers), self.v.vector)]

    def _int4(self, codes: ir.Value) -> list[ir.Value]:
        v, builder = self.v, self.builder
        words = builder.zext(codes, v.integers)
        if v.lanes == 16:  # a permutation looks at the low four bits of each lane
            table = ir.Constant(v.vector, list(NIBBLES))
            high = builder.lshr(words, v.integer_constant(4))
            return [v.call("llvm.x86.avx512.permvar.sf.512", v.vector, table, x) for x in (words, high)]
        found = []
        for up in (28, 24):
            raised = builder.shl(words, v.integer_constant(up))
            found.append(builder.sitofp(builder.ashr(raised, v.integer_constant(28)), v.vector))
        return found

    def words(self, row: ir.Value, skipped: int, part: int, n: int) -> tuple[ir.Value, ir.Value]:
        """Return scales and centers of the groups of a part that vector n of its groups holds; zeros beyond."""
        shape = self.shape
        first = n * shape.lanes
        offset = skipped + 4 * (part * shape.groups + first)
        return self.words_from(row, offset, min(shape.groups - first, shape.lanes))

    def words_from(self, row: ir.Value, offset: ir.Value | int, count: int) -> tuple[ir.Value, ir.Value]:
        """Return scales and centers of some groups of a row, whose words begin at an offset; zeros beyond."""
        v, builder = self.v, self.builder
        found = self._load_some(builder.add(row, self.constant(self.shape.words_at)), offset, v.lanes, count)
        scales = builder.shl(found, v.integer_constant(16))
        centers = builder.and_(found, v.integer_constant(-65536))
        return builder.bitcast(scales, v.vector), builder.bitcast(centers, v.vector)

    def read_bytes(self, row: ir.Value, skipped: int, n: int) -> ir.Value:
        """Return vector n of a row's codes as bytes without a sign, four to a lane: each is 128 more than it says."""
        lanes = BYTES // 4
        count = min(GROUP * self.shape.groups // 4 - n * lanes, lanes)
        codes = self._load_some(row, self.constant(skipped + n * BYTES), lanes, count)
        return self.builder.xor(codes, ir.Constant(codes.type, [-0x7F7F7F80] * lanes))

    def _load_some(self, address: ir.Value, offset: ir.Value | int, lanes: int, count: int) -> ir.Value:
        """Return the first `count` of a vector of words of 32 bits; zeros beyond."""
        v, kind = self.v, ir.VectorType(I32, lanes)
        if count == lanes:
            return v.load(address, offset, kind)
        mask = ir.Constant(ir.VectorType(I1, lanes), [n < count for n in range(lanes)])
        pointer = v.pointer(address, offset, kind)
        return v.call(
            f"llvm.masked.load.v{lanes}i32.p0", kind, pointer, ir.Constant(I32, 1), mask, ir.Constant(kind, None)
        )

    def scratch(self, vectors: int) -> ir.Value:
        """Return the address of room on the stack."""
        with self.builder.goto_entry_block():
            room = self.builder.alloca(ir.ArrayType(self.v.vector, vectors))
            room.align = LINE
        return self.builder.ptrtoint(room, I64)

    def prefetch(self, address: ir.Value, offset: int) -> None:
        pointer = self.v.pointer(address, offset, I8)
        kinds = (ir.Constant(I32, n) for n in (0, 2, 1))  # to read, into the second-level cache, data
        self.v.call("llvm.prefetch.p0", ir.VoidType(), pointer, *kinds)


def folded(v: Functions, sums: list[ir.Value]) -> ir.Value:
    """Return the vector whose lane n is the sum over the lanes of vector n.

    Neighbors are added first, then pairs, and so on.
    """
    distance = 1
    while len(sums) > 1:
        n = v.lanes
        low = [lane if not lane & distance else n + lane - distance for lane in range(n)]
        high = [lane + distance if not lane & distance else n + lane for lane in range(n)]
        sums = [
            v.builder.fadd(v.shuffle(a, b, low), v.shuffle(a, b, high))
            for a, b in zip(sums[::2], sums[1::2], strict=True)
        ]
        distance *= 2
    return sums[0]

"""LLVM vector code, one emitter for every vector length: for register tiles, row operations and compiled rules.

Nothing here knows attention. Sums are written out lane by lane and never left to LLVM's loop vectorizer, whose body and
remainder add in different orders at different lengths; comparisons and selections let NaN pass.
"""

from __future__ import annotations

import llvmlite.ir as ir
import numpy as np

I1, I8, I16, I32, I64 = (ir.IntType(n) for n in (1, 8, 16, 32, 64))
FLOAT, DOUBLE, HALF = ir.FloatType(), ir.DoubleType(), ir.HalfType()
CONTRACT = ("contract",)

# Minimax polynomials of 2**f on [-1/2, 1/2] with constant term 1, highest power first; relative error 2.6e-9 and
# 1.8e-17 before rounding (found by Remez exchange in 60 digits).
EXP2_COEFFICIENTS = {
    FLOAT: (
        1.5594700366010472e-4, 1.3406643631522470e-3, 9.6176928929041036e-3, 5.5503105523600075e-2,
        2.4022652783373493e-1, 6.9314721496732245e-1, 1.0,
    ),
    DOUBLE: (
        4.0780478690469057e-10, 7.0725703910727200e-9, 1.0180647800153076e-7, 1.3215442675384053e-6,
        1.5252727384899030e-5, 1.5403530441572209e-4, 1.3333558153244248e-3, 9.6181291076070022e-3,
        5.5504108664790393e-2, 2.4022650695910098e-1, 6.9314718055994570e-1, 1.0,
    ),
}  # fmt: skip
# 2**f - 1 = c1 f + c2 f**2 on [-1/64, 1/64]: Taylor terms, c1 with three quarters of the cubic one at the ends; error
# 5e-8.
EXP2_NEAR_ZERO = (0.69314718055994531 + 0.75 * 0.05550410866482158 / 64**2, 0.24022650695910072)
_STEPS = np.arange(32, dtype=np.int32)
# 2**(k / 32), less what k itself adds when it is shifted to the exponent's place with the rest
EXP2_TABLE = tuple((np.exp2(_STEPS / 32).astype(np.float32).view(np.int32) - (_STEPS << 18)).view(np.float32).tolist())


class BFloat(ir.Type):
    """The bfloat type, which llvmlite lacks."""

    def __str__(self) -> str:
        return "bfloat"

    _to_string = __str__

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash("bfloat")


class Vectors:
    """Emits operations on vectors of `lanes` numbers of one accumulator type (`FLOAT` or `DOUBLE`)."""

    def __init__(self, builder: ir.IRBuilder, number: ir.Type, lanes: int) -> None:
        self.builder, self.number, self.lanes = builder, number, lanes
        self.bytes = 8 if number == DOUBLE else 4
        self.suffix = "f64" if number == DOUBLE else "f32"
        self.integer = I64 if number == DOUBLE else I32
        self.vector = ir.VectorType(number, lanes)
        self.integers = ir.VectorType(self.integer, lanes)

    def constant(self, x: float) -> ir.Constant:
        return ir.Constant(self.vector, [x] * self.lanes)

    def integer_constant(self, x: int) -> ir.Constant:
        return ir.Constant(self.integers, [x] * self.lanes)

    def splat(self, x: ir.Value, kind: ir.Type | None = None) -> ir.Value:
        """Repeat the scalar `x` in every lane."""
        vector = ir.VectorType(kind or x.type, self.lanes)
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, x, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def shuffle(self, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        return self.builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), lanes))

    def pointer(self, address: ir.Value, offset: ir.Value | int = 0, kind: ir.Type | None = None) -> ir.Value:
        """Return a pointer to `kind` (default: a vector) at a byte address plus an offset in bytes."""
        if isinstance(offset, ir.Value) or offset:
            step = offset if isinstance(offset, ir.Value) else ir.Constant(I64, offset)
            address = self.builder.add(address, step)
        return self.builder.inttoptr(address, (kind or self.vector).as_pointer())

    def load(self, address: ir.Value, offset: ir.Value | int = 0, kind: ir.Type | None = None) -> ir.Value:
        value = self.builder.load(self.pointer(address, offset, kind))
        value.align = 1
        return value

    def store(self, value: ir.Value, address: ir.Value, offset: ir.Value | int = 0) -> None:
        self.builder.store(value, self.pointer(address, offset, value.type)).align = 1

    def first_lanes(self, count: ir.Value) -> ir.Value:
        """Return a mask of the first `count` (int64) lanes."""
        lanes = ir.Constant(ir.VectorType(I32, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", lanes, self.splat(self.builder.trunc(count, I32)))

    def store_where(self, mask: ir.Value, value: ir.Value, pointer: ir.Value) -> None:
        """Store the lanes that the mask has; memory under the others is not touched."""
        self.call(
            f"llvm.masked.store.v{self.lanes}{self.suffix}.p0", ir.VoidType(), value, pointer, ir.Constant(I32, 1), mask
        )

    def store_first(self, value: ir.Value, address: ir.Value, count: ir.Value) -> None:
        self.store_where(self.first_lanes(count), value, self.pointer(address))

    def intrinsic(self, name: str, *args: ir.Value) -> ir.Value:
        """Call an LLVM intrinsic that is overloaded on the one type of its arguments."""
        kind = args[0].type
        suffix = f".v{self.lanes}{self.suffix}" if isinstance(kind, ir.VectorType) else f".{self.suffix}"
        return self.call(name + suffix, kind, *args)

    def call(self, name: str, result: ir.Type, *args: ir.Value) -> ir.Value:
        module = self.builder.module
        function = module.globals.get(name)
        if function is None:
            function = ir.Function(module, ir.FunctionType(result, [a.type for a in args]), name)
        return self.builder.call(function, args)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        return self.intrinsic("llvm.fma", a, b, c)

    def like(self, x: ir.Value, number: float) -> ir.Constant:
        """Return the constant `number` in the shape of `x`: a vector or one number."""
        return self.constant(number) if isinstance(x.type, ir.VectorType) else ir.Constant(self.number, number)

    def like_integer(self, x: ir.Value, number: int) -> ir.Constant:
        return self.integer_constant(number) if isinstance(x.type, ir.VectorType) else ir.Constant(self.integer, number)

    def at_least(self, x: ir.Value, low: float) -> ir.Value:
        """Return max(x, low), NaN where x is NaN."""
        return self._at_least(x, self.like(x, low))

    def _at_least(self, x: ir.Value, low: ir.Value) -> ir.Value:
        return self.builder.select(self.builder.fcmp_ordered("<", x, low), low, x)

    def at_most(self, x: ir.Value, high: float) -> ir.Value:
        """Return min(x, high), NaN where x is NaN."""
        bound = self.like(x, high)
        return self.builder.select(self.builder.fcmp_ordered(">", x, bound), bound, x)

    def larger(self, x: ir.Value, y: ir.Value) -> ir.Value:
        """Return the larger, y where either is NaN: a NaN score is met again, and kept, by the exponential."""
        return self.builder.select(self.builder.fcmp_ordered(">", x, y), x, y)

    def polynomial(self, x: ir.Value, coefficients: tuple[float, ...]) -> ir.Value:
        result = self.like(x, coefficients[0])
        for c in coefficients[1:]:
            result = self.fma(result, x, self.like(x, c))
        return result

    def exp2_product(self, x: ir.Value, factor: ir.Value) -> ir.Value:
        """Return 2**(x * factor) for products up to about 100 and a factor above 0.

        It is exactly 0 from -127 (double: -1023) down; NaN stays NaN.

        Adding 1.5 * 2**23 (2**52) rounds the product to an integer, whose low bits, with the exponent's bias added, are
        then in place to be shifted into an exponent; what is left of the product comes from a second fused
        multiply-add, so that it is never rounded by itself. NaN passes through the polynomial, whose product keeps it.
        """
        by_table = self.number == FLOAT and self.lanes == 16 and isinstance(x.type, ir.VectorType)
        mantissa, bias = (52, 1023) if self.number == DOUBLE else (23, 127)
        x = self._at_least(x, self.builder.fdiv(self.like(x, float(-bias)), factor))
        # by table the last bit is worth 1 / 32
        magic = self.like(x, 1.5 * 2.0**18 if by_table else 1.5 * 2.0**mantissa + bias)
        shifted = self.fma(x, factor, magic)
        fraction = self.fma(x, factor, self.builder.fsub(magic, shifted))
        kind = self.integers if isinstance(x.type, ir.VectorType) else self.integer
        bits = self.builder.bitcast(shifted, kind)
        if by_table:
            return self._exp2_by_table(bits, fraction)
        exponent = self.builder.bitcast(self.builder.shl(bits, self.like_integer(x, mantissa)), x.type)
        return self.builder.fmul(self.polynomial(fraction, EXP2_COEFFICIENTS[self.number]), exponent)

    def _exp2_by_table(self, bits: ir.Value, fraction: ir.Value) -> ir.Value:
        """Return 2**(n + k / 32 + fraction), n and k in the low bits of `bits`.

        A permutation of two registers looks up 2**(k / 32); the fraction needs degree 2 only. The exponent n goes into
        the table's number by integer addition, which NaN never meets: it arrives with the fraction. That addition
        brings the bits of k with it, which the table therefore lacks.
        """
        builder = self.builder
        low, high = (ir.Constant(self.vector, list(EXP2_TABLE[n : n + 16])) for n in (0, 16))
        entry = self.call("llvm.x86.avx512.vpermi2var.ps.512", self.vector, low, bits, high)
        exponent = builder.shl(bits, self.integer_constant(18))
        scaled = builder.bitcast(builder.add(builder.bitcast(entry, self.integers), exponent), self.vector)
        linear, square = EXP2_NEAR_ZERO
        above = builder.fmul(self.fma(self.constant(square), fraction, self.constant(linear)), fraction)
        return self.fma(scaled, above, scaled)

    def rotate(self, x: ir.Value, by: ir.Value) -> ir.Value:
        """Move each lane up by `by` (int64, less than the lanes), the last ones to the front."""
        builder = self.builder
        name = {(FLOAT, 16): "llvm.x86.avx512.permvar.sf.512", (DOUBLE, 8): "llvm.x86.avx512.permvar.df.512"}
        if (self.number, self.lanes) in name:
            lanes = ir.Constant(self.integers, list(range(self.lanes)))
            by = by if self.integer == I64 else builder.trunc(by, I32)
            return self.call(name[self.number, self.lanes], self.vector, x, builder.sub(lanes, self.splat(by)))
        with builder.goto_entry_block():
            twice = builder.alloca(ir.ArrayType(self.vector, 2))
        start = builder.ptrtoint(twice, I64)
        size = self.lanes * self.bytes
        self.store(x, start)
        self.store(x, start, size)
        back = builder.mul(by, ir.Constant(I64, self.bytes))
        return self.load(builder.sub(builder.add(start, ir.Constant(I64, size)), back))

    def fold(self, x: ir.Value, combine) -> ir.Value:
        """Combine all lanes of `x` in a fixed order into one number."""
        width = self.lanes
        while width > 1:
            width //= 2
            x = combine(x, self.shuffle(x, x, [(i + width) % self.lanes for i in range(self.lanes)]))
        return self.builder.extract_element(x, ir.Constant(I32, 0))


class Loop:
    """A counted loop over int64 from 0, with loop-carried values, for code that is emitted straight on.

    `loop = Loop(builder, stop, step, [a, b])` opens it, its body uses `loop.index` and `loop.values`, and
    `loop.close([a2, b2])` returns the values after the loop. A loop whose stop is not above 0 runs no turn.
    """

    def __init__(self, builder: ir.IRBuilder, stop: ir.Value, step: int, values: list[ir.Value]) -> None:
        self.builder, self.stop, self.step = builder, stop, step
        before = builder.block
        self.head = builder.append_basic_block("loop.head")
        body = builder.append_basic_block("loop.body")
        self.done = builder.append_basic_block("loop.done")
        builder.branch(self.head)
        builder.position_at_end(self.head)
        self.index = builder.phi(I64)
        self.index.add_incoming(ir.Constant(I64, 0), before)
        self.values = [builder.phi(v.type) for v in values]
        for phi, v in zip(self.values, values, strict=True):
            phi.add_incoming(v, before)
        builder.cbranch(builder.icmp_signed("<", self.index, stop), body, self.done)
        builder.position_at_end(body)

    def close(self, values: list[ir.Value]) -> list[ir.Value]:
        builder = self.builder
        self.index.add_incoming(builder.add(self.index, ir.Constant(I64, self.step)), builder.block)
        for phi, v in zip(self.values, values, strict=True):
            phi.add_incoming(v, builder.block)
        builder.branch(self.head)
        builder.position_at_end(self.done)
        return list(self.values)

"""Exponential, logarithm and hyperbolic tangent of vectors, and of single numbers by the same steps."""

from __future__ import annotations

import math

import llvmlite.ir as ir

from attn_numba.cpu.vectors import DOUBLE, FLOAT, Vectors

# ln 2 in two parts, the first with zeros at the end so that a small integer times it is exact (Cody and Waite 1980).
LN2_PARTS = {FLOAT: (0.693359375, -2.12194440054690583e-4), DOUBLE: (0.6931471803691238, 1.9082149292705877e-10)}
EXP_TERMS = {FLOAT: 7, DOUBLE: 13}  # Taylor terms of exp(r) - 1 on |r| <= ln 2 / 2: remainder 1e-8 (6e-18)
EXP_RANGE = {FLOAT: (-110.0, 100.0), DOUBLE: (-760.0, 720.0)}
TANH_LIMIT = {FLOAT: 10.0, DOUBLE: 22.0}  # tanh is 1 from here on
LOG_TERMS = {
    FLOAT: 9,
    DOUBLE: 21,
}  # last power of the series of log((1 + t) / (1 - t)), |t| <= 0.172: rest 2e-9 (6e-19)
HALF_ROOT_BITS = {FLOAT: 0x3F3504F3, DOUBLE: 0x3FE6A09E667F3BCD}  # of sqrt(1/2): 2**k m has an m from there up


class Functions(Vectors):
    """Emits functions of a vector, or of one number."""

    def is_wide(self, value: ir.Value) -> bool:
        return isinstance(value.type, ir.VectorType)

    def _reduced(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """X = n ln 2 + r: the integer n as a float, and exp(r) - 1 to full relative precision."""
        n = self.intrinsic("llvm.rint", self.builder.fmul(x, self.like(x, 1 / math.log(2))))
        high, low = LN2_PARTS[self.number]
        r = self.fma(n, self.like(x, -low), self.fma(n, self.like(x, -high), x))
        terms = tuple(1 / math.factorial(k) for k in range(EXP_TERMS[self.number], 0, -1))
        return n, self.builder.fmul(self.polynomial(r, terms), r)

    def _power_of_two(self, n: ir.Value) -> ir.Value:
        """2**n for an integral float n within the range of normal numbers; a NaN gives any number."""
        builder = self.builder
        mantissa, bias = (52, 1023) if self.number == DOUBLE else (23, 127)
        shifted = builder.fadd(n, self.like(n, 1.5 * 2.0**mantissa + bias))
        kind = self.integers if self.is_wide(n) else self.integer
        return builder.bitcast(builder.shl(builder.bitcast(shifted, kind), self.like_integer(n, mantissa)), n.type)

    def exp(self, x: ir.Value) -> ir.Value:
        low, high = EXP_RANGE[self.number]
        n, small = self._reduced(self.at_most(self.at_least(x, low), high))
        # 2**n may overflow where the whole does not: it is multiplied in two factors.
        half = self.intrinsic("llvm.floor", self.builder.fmul(n, self.like(n, 0.5)))
        value = self.builder.fmul(self.builder.fadd(small, self.like(x, 1.0)), self._power_of_two(half))
        return self.builder.fmul(value, self._power_of_two(self.builder.fsub(n, half)))

    def tanh(self, x: ir.Value) -> ir.Value:
        """Tanh |x| = e / (e + 2) with e = exp(2 |x|) - 1, which keeps the digits of a small x; then the sign of x."""
        builder, limit = self.builder, TANH_LIMIT[self.number]
        size = self.at_most(self.intrinsic("llvm.fabs", x), limit)
        n, small = self._reduced(builder.fadd(size, size))
        power = self._power_of_two(n)
        e = self.fma(power, small, builder.fsub(power, self.like(x, 1.0)))
        value = builder.fdiv(e, builder.fadd(e, self.like(x, 2.0)))
        kind = self.integers if self.is_wide(x) else self.integer
        sign = builder.and_(builder.bitcast(x, kind), self.like_integer(x, -(2 ** (8 * self.bytes - 1))))
        return builder.bitcast(builder.or_(builder.bitcast(value, kind), sign), x.type)

    def log(self, x: ir.Value) -> ir.Value:
        """Return k ln 2 + log m, where x = 2**k m and m is within a factor of sqrt(2) of 1.

        With f = m - 1 and t = f / (2 + f), log m is the series 2 t + 2 t**3 / 3 + ..., written as f - t (f - r) so that
        the digits of f, which are exact, are kept.
        """
        builder = self.builder
        mantissa, least = (52, 2.0**-1022) if self.number == DOUBLE else (23, 2.0**-126)
        kind, by = self.integers if self.is_wide(x) else self.integer, self.like_integer(x, mantissa)
        small = builder.fcmp_ordered("<", x, self.like(x, least))  # few digits, and no exponent: lifted first
        lifted = builder.select(small, builder.fmul(x, self.like(x, 2.0**mantissa)), x)
        bits = builder.bitcast(lifted, kind)
        k = builder.ashr(builder.sub(bits, self.like_integer(x, HALF_ROOT_BITS[self.number])), by)
        m = builder.bitcast(builder.sub(bits, builder.shl(k, by)), x.type)
        exponent = builder.sitofp(k, x.type)
        exponent = builder.fsub(exponent, builder.select(small, self.like(x, float(mantissa)), self.like(x, 0.0)))
        f = builder.fsub(m, self.like(x, 1.0))
        t = builder.fdiv(f, builder.fadd(f, self.like(x, 2.0)))
        square = builder.fmul(t, t)
        r = builder.fmul(self.polynomial(square, tuple(2 / n for n in range(LOG_TERMS[self.number], 1, -2))), square)
        high, low = LN2_PARTS[self.number]
        rest = self.fma(exponent, self.like(x, low), builder.fmul(builder.fneg(t), builder.fsub(f, r)))
        value = self.fma(exponent, self.like(x, high), builder.fadd(f, rest))
        value = builder.select(builder.fcmp_ordered(">", x, self.like(x, 0.0)), value, self.like(x, math.nan))
        value = builder.select(builder.fcmp_ordered("==", x, self.like(x, 0.0)), self.like(x, -math.inf), value)
        return builder.select(builder.fcmp_ordered("==", x, self.like(x, math.inf)), x, value)

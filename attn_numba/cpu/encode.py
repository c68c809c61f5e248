"""Integer codes of rows, made by compiled code: the bytes that `rules.storage.Code.encode` makes, in less time.

After each step of decoding a few rows are encoded for every layer. NumPy takes some dozens of calls for them, more than
it takes to attend to a short cache. A function is compiled for each code and size of rows when it is first needed.
"""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import llvmlite.ir as ir
import numpy as np

from attn_numba.cpu.decode_rows import rotated_vectors
from attn_numba.cpu.functions import Functions
from attn_numba.cpu.hooks import compile_hooks
from attn_numba.cpu.vectors import FLOAT, I1, I8, I32, I64, Loop
from attn_numba.rules.data import AnyArray
from attn_numba.rules.storage import GROUP, SHRUNK, Code

NAN_WORD = 0x7FC07FC0  # scale and center of a group in a row that is not finite
BYTES = ir.VectorType(I8, GROUP)


def encoded(code: Code, x: AnyArray) -> AnyArray:
    """Return rows of numbers as a code stores them.

    Parameters
    ----------
    code : Code
        The code.
    x : array (..., size)
        Numbers of any float dtype; bfloat16 too.

    Returns
    -------
    array (..., width)
        The bytes that `Code.encode` returns; of integer codes' rows with a NaN or an infinity, other bytes that are
        read back as NaN too.

    Examples
    --------
    >>> from attn_numba.rules.storage import CODES
    >>> x = np.linspace(-2, 3, 40).reshape(2, 20)
    >>> bool((encoded(CODES["int8"].keys, x) == CODES["int8"].keys.encode(x)).all())
    True
    """
    if not code.bits or not x.size:
        return code.encode(x)
    size = x.shape[-1]
    with np.errstate(over="ignore"):
        numbers = np.ascontiguousarray(x, np.float32)
    found = np.empty((*x.shape[:-1], code.width(size)), np.uint8)
    _encoder(code.bits, size)(numbers.ctypes.data, found.ctypes.data, x.size // size)
    return found


@functools.cache
def _encoder(bits: int, size: int) -> Any:
    """Compile encode(x, to, rows) for rows of so many numbers."""
    module = ir.Module()
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * 3), "encode")
    _Encoder(function, bits, size).emit()
    address = compile_hooks(module)["encode"]
    return ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64)(address)


class _Encoder:
    """Emits the steps of `Code._integers`: one vector is a group, whatever the processor's vectors are."""

    def __init__(self, function: ir.Function, bits: int, size: int) -> None:
        self.builder = ir.IRBuilder(function.append_basic_block())
        self.v = Functions(self.builder, FLOAT, GROUP)
        self.arguments, self.bits, self.size = function.args, bits, size
        self.parts = 8 // bits
        self.part = math.ceil(size / self.parts)  # numbers of a part, the last of which may have fewer
        self.groups = math.ceil(size / (self.parts * GROUP))
        self.vectors = math.ceil(size / GROUP)
        self.room = self.builder.alloca(ir.ArrayType(self.v.vector, self.vectors + 1))
        self.room.align = 64

    def emit(self) -> None:
        x, to, rows = self.arguments
        v, builder = self.v, self.builder
        row = Loop(builder, rows, 1, [x, to])
        source, stored = row.values
        numbers = rotated_vectors(v, [self._read(source, n) for n in range(self.vectors)], self.size)
        zeros = functools.reduce(builder.fadd, (builder.fmul(y, v.constant(0.0)) for y in numbers))
        nothing = v.fold(zeros, builder.fadd)
        finite = builder.fcmp_ordered("==", nothing, v.like(nothing, 0.0))
        room = builder.ptrtoint(self.room, I64)
        for n, y in enumerate(numbers):
            v.store(builder.select(v.splat(finite), y, v.constant(0.0)), room, 4 * GROUP * n)
        for g in range(self.groups):
            codes, words = zip(*(self._nearest(self._group(room, p, g)) for p in range(self.parts)), strict=True)
            codes = tuple(self._within(p, g, found) for p, found in enumerate(codes))
            byte = codes[0]
            if self.parts == 2:
                high = builder.shl(codes[1], v.integer_constant(4))
                byte = builder.or_(builder.and_(codes[0], v.integer_constant(15)), high)
            v.store(builder.trunc(byte, BYTES), stored, GROUP * g)
            for p, word in enumerate(words):
                word = builder.select(finite, word, ir.Constant(I32, NAN_WORD))
                v.store(word, stored, GROUP * self.groups + 4 * (p * self.groups + g))
        width = GROUP * self.groups + 4 * self.parts * self.groups
        row.close([builder.add(source, ir.Constant(I64, 4 * self.size)), builder.add(stored, ir.Constant(I64, width))])
        builder.ret_void()

    def _read(self, row: ir.Value, n: int) -> ir.Value:
        """Return vector n of a row, zeros beyond its end."""
        v, left = self.v, self.size - n * GROUP
        if left >= GROUP:
            return v.load(row, 4 * GROUP * n)
        pointer, mask = v.pointer(row, 4 * GROUP * n), _first(left)
        name = f"llvm.masked.load.v{GROUP}f32.p0"
        return v.call(name, v.vector, pointer, ir.Constant(I32, 1), mask, v.constant(0.0))

    def _count(self, p: int, g: int) -> int:
        """Return how many numbers of a part's group there are."""
        return min(self.part, self.size - p * self.part) - g * GROUP

    def _group(self, room: ir.Value, p: int, g: int) -> ir.Value:
        """Return the numbers of a group, filled up by the last of its part, or of the row, which widens no group."""
        v, count, begin = self.v, self._count(p, g), p * self.part
        last = self.size - 1 if p == self.parts - 1 else begin + self.part - 1
        fill = v.splat(v.load(room, 4 * last, FLOAT))
        if count <= 0:
            return fill
        numbers = v.load(room, 4 * (begin + g * GROUP))
        return numbers if count >= GROUP else self.builder.select(_first(count), numbers, fill)

    def _within(self, p: int, g: int, codes: ir.Value) -> ir.Value:
        """Return the codes of a group, zeros where there are no numbers."""
        count = self._count(p, g)
        return codes if count >= GROUP else self.builder.select(_first(count), codes, self.v.integer_constant(0))

    def _nearest(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Return codes and word of a group, as `Code._nearest` does."""
        v, builder = self.v, self.builder
        low = v.fold(x, lambda a, b: builder.select(builder.fcmp_ordered("<", a, b), a, b))
        high = v.fold(x, v.larger)
        spreads = SHRUNK if self.bits == 4 else SHRUNK[:1]
        best = self._with_spread(x, low, high, spreads[0])
        for spread in spreads[1:]:
            new = self._with_spread(x, low, high, spread)
            less = builder.fcmp_ordered("<", new[2], best[2])
            best = tuple(
                builder.select(c, a, b) for c, a, b in zip((v.splat(less), less, less), new, best, strict=True)
            )
        return best[0], best[1]

    def _with_spread(self, x: ir.Value, low: ir.Value, high: ir.Value, spread: float) -> tuple[ir.Value, ...]:
        """Return codes, word and sum of squared errors with one choice of the spread of the group's numbers."""
        v, builder, half = self.v, self.builder, 2 ** (self.bits - 1)

        def number(value: float) -> ir.Constant:
            return ir.Constant(FLOAT, float(np.float32(value)))

        def times(a: ir.Value, value: float) -> ir.Value:
            return builder.fmul(a, number(value))

        middle = builder.fdiv(builder.fadd(low, high), number(2))
        reach = times(builder.fdiv(builder.fsub(high, low), number(2)), spread)
        center = self._bfloat16(builder.fadd(middle, builder.fdiv(reach, number(2 * half - 1))))
        value = self._number(center)
        above = builder.fdiv(builder.fsub(builder.fadd(middle, reach), value), number(half - 1))
        below = builder.fdiv(builder.fadd(builder.fsub(value, middle), reach), number(half))
        widest = v.larger(v.larger(above, below), number(0))
        scale = builder.lshr(builder.add(builder.bitcast(widest, I32), ir.Constant(I32, 0xFFFF)), ir.Constant(I32, 16))
        step = self._number(scale)
        divisor = builder.select(builder.fcmp_ordered("==", step, number(0)), number(1), step)
        levels = builder.fdiv(builder.fsub(x, v.splat(value)), v.splat(divisor))
        levels = v.at_most(v.at_least(v.intrinsic("llvm.rint", levels), -half), half - 1)
        back = builder.fadd(builder.fmul(levels, v.splat(step)), v.splat(value))
        error = builder.fsub(back, x)
        word = builder.or_(scale, builder.shl(center, ir.Constant(I32, 16)))
        return builder.fptosi(levels, v.integers), word, v.fold(builder.fmul(error, error), builder.fadd)

    def _bfloat16(self, x: ir.Value) -> ir.Value:
        """Return the upper half of a number, rounded to the nearest, ties to even."""
        builder = self.builder
        bits = builder.bitcast(x, I32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(I32, 16)), ir.Constant(I32, 1))
        up = builder.add(odd, ir.Constant(I32, 0x7FFF))
        return builder.lshr(builder.add(bits, up), ir.Constant(I32, 16))

    def _number(self, bits: ir.Value) -> ir.Value:
        return self.builder.bitcast(self.builder.shl(bits, ir.Constant(I32, 16)), FLOAT)


def _first(count: int) -> ir.Constant:
    """Return a mask of the first lanes of a group."""
    return ir.Constant(ir.VectorType(I1, GROUP), [n < count for n in range(GROUP)])

"""A rule's formula (`rules/formula.py`) as vector code, and its parameters as that code reads them.

Parameters are one block of 8-byte words: numbers as they are; for arrays the address and the strides in elements, 0 on
broadcast axes. So new parameters compile nothing, and an array of any shape is read where it lies.

Formulas hold positions in 32 bits and floats in the accumulator's type. Those of masks are computed exactly as written;
in those of modifiers a division by a number that is the same for all keys becomes a product with its reciprocal.
"""

from __future__ import annotations

import math

import llvmlite.ir as ir
import numpy as np

from attn_numba.cpu.functions import Functions
from attn_numba.cpu.vectors import CONTRACT, DOUBLE, FLOAT, I1, I8, I32, I64
from attn_numba.rules.formula import Array, Node

ELEMENTS = {"b1": I8, "i4": I32, "f4": FLOAT, "f8": DOUBLE}
SUFFIX = {I8: "i8", I32: "i32", FLOAT: "f32", DOUBLE: "f64"}
OPERATIONS = {"+": ("add", "fadd"), "-": ("sub", "fsub"), "*": ("mul", "fmul")}


# --- parameters ---


def layout(params: list) -> list[int]:
    """Return the first word of each parameter in the block."""
    at, words = 0, []
    for param in params:
        words.append(at)
        at += 1 + param.ndim if isinstance(param, np.ndarray) else 1
    return words


def settled(params: list, number: np.dtype) -> list:
    """Return parameters as hooks read them: plain element types, keys side by side in memory or one for all."""
    return [_settled(p, number) if isinstance(p, np.ndarray) else p for p in params]


def _settled(array: np.ndarray, number: np.dtype) -> np.ndarray:
    kind = array.dtype.kind
    if kind == "b":
        wanted = np.dtype(bool)
    elif kind in "iu":
        wanted = np.dtype(np.int32)
    else:
        wanted = array.dtype if array.dtype.str[1:] in ELEMENTS else np.dtype(number)
    step = array.strides[-1] if array.ndim and array.shape[-1] > 1 else 0
    regular = all(s % array.itemsize == 0 for s in array.strides) and step in (0, array.itemsize)
    if wanted == array.dtype and regular and array.dtype.isnative:
        return array
    core = array[tuple(slice(0, 1) if s == 0 else slice(None) for s in array.strides)]  # broadcast axes stay so
    return np.broadcast_to(np.ascontiguousarray(core, wanted), array.shape)


def words(params: list) -> np.ndarray:
    """Return the parameter block of settled parameters."""
    block: list[int] = []
    for param in params:
        if isinstance(param, np.ndarray):
            block.append(param.__array_interface__["data"][0])
            block += [0 if n == 1 else s // param.itemsize for s, n in zip(param.strides, param.shape, strict=True)]
        elif isinstance(param, float):
            block.append(int(np.float64(param).view(np.int64)))
        else:
            block.append(int(param))
    return np.array(block or [0], np.int64)


def structure(params: list) -> tuple:
    """Return what of the parameters is compiled in.

    Of numbers that is int or float; of arrays type, rank and whether all keys share one element.
    """
    return tuple(
        (p.dtype.str, p.ndim, p.ndim > 0 and (p.strides[-1] == 0 or p.shape[-1] == 1))
        if isinstance(p, np.ndarray)
        else type(p).__name__
        for p in params
    )


# --- formulas as code ---


class Emitter(Functions):
    """Emits nodes for one vector of keys, or for one number where a node is the same for all keys.

    `symbols` maps names to values: `j`, `row_j` and `s` are vectors, the others numbers.
    """

    def __init__(self, builder, number, lanes, block, params, places, symbols, masked=None, exact=True) -> None:
        super().__init__(builder, number, lanes)
        self.block, self.params, self.places, self.symbols = block, params, places, symbols
        self.masked, self.exact = masked, exact
        self.done: dict[int, ir.Value] = {}
        self.keep: list[Node] = []  # nodes whose ids are in `done` must stay alive

    def type_of(self, kind: str) -> ir.Type:
        return {"int": I32, "bool": I1, "float": self.number}[kind]

    def vector_of(self, node: Node) -> ir.Value:
        value = self.value(node)
        return value if self.is_wide(value) else self.splat(value)

    def value(self, node: Node) -> ir.Value:
        if id(node) not in self.done:
            self.done[id(node)] = self._emit(node)
            self.keep.append(node)
        return self.done[id(node)]

    def word(self, n: int) -> ir.Value:
        value = self.builder.load(self.builder.gep(self.block, [ir.Constant(I64, n)]))
        value.set_metadata("invariant.load", self.builder.module.add_metadata([]))
        return value

    def _emit(self, node: Node) -> ir.Value:
        builder = self.builder
        if node.op == "symbol":
            return self.symbols[node.data]
        if node.op == "const":
            return ir.Constant(self.type_of(node.kind), node.data)
        if node.op == "number":
            word = self.word(self.places[node.data])
            if node.kind == "int":
                return builder.trunc(word, I32)
            value = builder.bitcast(word, DOUBLE)
            return value if self.number == DOUBLE else builder.fptrunc(value, FLOAT)
        if node.op == "load":
            return self._load(node)
        args = [self.value(a) for a in node.args]
        wide = any(self.is_wide(a) for a in args)
        if wide:
            args = [a if self.is_wide(a) else self.splat(a) for a in args]
        return self._operation(node, args, wide)

    def _operation(self, node: Node, args: list[ir.Value], wide: bool) -> ir.Value:
        builder, op, kind = self.builder, node.op, node.args[0].kind
        result = self.type_of(node.kind)
        result = ir.VectorType(result, self.lanes) if wide else result
        if op == "cast":
            return self._cast(args[0], kind, node.kind, result)
        if op == "select":
            return builder.select(*args)
        if op in ("&", "|"):
            return (builder.and_ if op == "&" else builder.or_)(*args)
        if op == "~":
            return builder.not_(args[0])
        if op in ("<", "<=", ">", ">=", "==", "!="):
            if kind == "float":
                return (builder.fcmp_unordered if op == "!=" else builder.fcmp_ordered)(op, *args)
            if kind == "bool":
                return builder.icmp_unsigned(op, *args)
            return builder.icmp_signed(op, *args)
        return self._integer(node, args, wide) if kind == "int" else self._float(node, args, wide)

    def _cast(self, x: ir.Value, kind: str, to: str, result: ir.Type) -> ir.Value:
        builder = self.builder
        if kind == "bool":
            return builder.uitofp(x, result) if to == "float" else builder.zext(x, result)
        if kind == "int" and to == "float":
            return builder.sitofp(x, result)
        raise NotImplementedError(f"no cast from {kind} to {to} in a rule")

    def _integer(self, node: Node, args: list[ir.Value], wide: bool) -> ir.Value:
        builder, op = self.builder, node.op
        if op in OPERATIONS:
            return getattr(builder, OPERATIONS[op][0])(*args)
        if op == "neg":
            return builder.neg(args[0])
        if op == "abs":
            zero = ir.Constant(args[0].type, [0] * self.lanes if wide else 0)
            return builder.select(builder.icmp_signed("<", args[0], zero), builder.neg(args[0]), args[0])
        if op in ("min", "max"):
            return builder.select(builder.icmp_signed("<" if op == "min" else ">", *args), *args)
        if op == "ilog2":
            zeros = self.call("llvm.ctlz.i32", I32, args[0], ir.Constant(I1, 1))
            return builder.sub(ir.Constant(I32, 31), zeros)
        if op in ("//", "%"):
            return self._divided(node, args, wide)
        raise NotImplementedError(f"no integer {op} in a rule")

    def _divided(self, node: Node, args: list[ir.Value], wide: bool) -> ir.Value:
        """Floor division and its remainder. No CPU divides integer vectors; float64 is exact for 32 bits."""
        builder = self.builder
        divisor = node.args[1]
        if divisor.op == "const" and divisor.data > 0 and divisor.data & (divisor.data - 1) == 0:
            kind = args[0].type
            shift, mask = int(divisor.data).bit_length() - 1, divisor.data - 1
            if node.op == "//":
                return builder.ashr(args[0], ir.Constant(kind, [shift] * self.lanes if wide else shift))
            return builder.and_(args[0], ir.Constant(kind, [mask] * self.lanes if wide else mask))
        double = ir.VectorType(DOUBLE, self.lanes) if wide else DOUBLE
        ratio = builder.fdiv(builder.sitofp(args[0], double), builder.sitofp(args[1], double))
        name = f"llvm.floor.v{self.lanes}f64" if wide else "llvm.floor.f64"
        quotient = builder.fptosi(self.call(name, double, ratio), args[0].type)
        return quotient if node.op == "//" else builder.sub(args[0], builder.mul(quotient, args[1]))

    def _float(self, node: Node, args: list[ir.Value], wide: bool) -> ir.Value:
        builder, op = self.builder, node.op
        if op in OPERATIONS:
            return getattr(builder, OPERATIONS[op][1])(*args, flags=() if self.exact else CONTRACT)
        if op == "/":
            if not self.exact and wide and not self.is_wide(self.value(node.args[1])):
                one = ir.Constant(self.number, 1.0)
                return builder.fmul(args[0], self.splat(builder.fdiv(one, self.value(node.args[1]))))
            return builder.fdiv(*args)
        if op in ("//", "%"):
            floor = self.intrinsic("llvm.floor", builder.fdiv(*args))
            return floor if op == "//" else builder.fsub(args[0], builder.fmul(floor, args[1]))
        if op == "neg":
            return builder.fneg(args[0])
        if op in ("abs", "sqrt"):
            return self.intrinsic("llvm.fabs" if op == "abs" else "llvm.sqrt", args[0])
        if op in ("min", "max"):  # NaN in either is NaN, as NumPy has it
            if node.args[1].op == "const" and not math.isnan(node.args[1].data):
                return (self.at_most if op == "min" else self.at_least)(args[0], node.args[1].data)
            ordered = builder.select(builder.fcmp_ordered("<" if op == "min" else ">", *args), *args)
            return builder.select(builder.fcmp_unordered("uno", args[0], args[0]), args[0], ordered)
        if op in ("exp", "log", "tanh"):
            return getattr(self, op)(args[0])
        raise NotImplementedError(f"no {op} of floats in a rule")

    # --- reading arrays ---

    def _load(self, node: Node) -> ir.Value:
        array: Array = node.data
        element = ELEMENTS[array.dtype.str[1:]]
        indices = [self.value(a) for a in node.args]
        if not any(self.is_wide(x) for x in indices):
            return self._converted(self._load_number(node, indices, element), node.kind, element)
        shared = structure([self.params[array.n]])[0][2]  # the last axis is one element for all
        in_row = not any(self.is_wide(x) for x in indices[:-1]) and (shared or node.args[-1].op == "symbol")
        if in_row and shared:
            return self._converted(self._load_number(node, indices[:-1], element), node.kind, element)
        loaded = self._load_row(node, indices, element) if in_row else self._gather(node, indices, element)
        return self._converted(loaded, node.kind, element)

    def _offset(self, node: Node, indices: list[ir.Value]) -> ir.Value:
        builder, at = self.builder, self.places[node.data.n]
        offset = ir.Constant(I64, 0)
        for axis, index in enumerate(indices):
            offset = builder.add(offset, builder.mul(builder.sext(index, I64), self.word(at + 1 + axis)))
        return offset

    def _base(self, node: Node, element: ir.Type) -> ir.Value:
        return self.builder.inttoptr(self.word(self.places[node.data.n]), element.as_pointer())

    def _load_number(self, node: Node, indices: list[ir.Value], element: ir.Type) -> ir.Value:
        value = self.builder.load(self.builder.gep(self._base(node, element), [self._offset(node, indices)]))
        value.align = 1
        value.set_metadata("invariant.load", self.builder.module.add_metadata([]))
        return value

    def _load_row(self, node: Node, indices: list[ir.Value], element: ir.Type) -> ir.Value:
        """Consecutive elements: the last index is a key's row or position, and the last axis is contiguous."""
        builder = self.builder
        first = self.builder.extract_element(indices[-1], ir.Constant(I32, 0))
        offset = builder.add(self._offset(node, indices[:-1]), builder.sext(first, I64))
        vector = ir.VectorType(element, self.lanes)
        pointer = builder.bitcast(builder.gep(self._base(node, element), [offset]), vector.as_pointer())
        if self.masked is None:
            value = builder.load(pointer)
            value.align = 1
            value.set_metadata("invariant.load", builder.module.add_metadata([]))
            return value
        name = f"llvm.masked.load.v{self.lanes}{SUFFIX[element]}.p0"
        zero = ir.Constant(vector, [0] * self.lanes)
        return self.call(name, vector, pointer, ir.Constant(I32, 1), self.masked, zero)

    def _gather(self, node: Node, indices: list[ir.Value], element: ir.Type) -> ir.Value:
        builder, lanes = self.builder, self.lanes
        wide = ir.VectorType(I64, lanes)
        offset = ir.Constant(wide, [0] * lanes)
        for axis, index in enumerate(indices):
            index = index if self.is_wide(index) else self.splat(index)
            step = self.splat(self.word(self.places[node.data.n] + 1 + axis))
            offset = builder.add(offset, builder.mul(builder.sext(index, wide), step))
        size = ir.Constant(wide, [node.data.dtype.itemsize] * lanes)
        address = builder.add(self.splat(self.word(self.places[node.data.n])), builder.mul(offset, size))
        pointers = builder.inttoptr(address, ir.VectorType(element.as_pointer(), lanes))
        masked = self.masked or ir.Constant(ir.VectorType(I1, lanes), [1] * lanes)
        vector = ir.VectorType(element, lanes)
        name = f"llvm.masked.gather.v{lanes}{SUFFIX[element]}.v{lanes}p0"
        return self.call(name, vector, pointers, ir.Constant(I32, 1), masked, ir.Constant(vector, [0] * lanes))

    def _converted(self, value: ir.Value, kind: str, element: ir.Type) -> ir.Value:
        builder, wide = self.builder, self.is_wide(value)
        if kind == "bool":
            return builder.icmp_unsigned("!=", value, ir.Constant(value.type, [0] * self.lanes if wide else 0))
        if kind == "int" or element == self.number:
            return value
        to = self.vector if wide else self.number
        return builder.fpext(value, to) if self.number == DOUBLE else builder.fptrunc(value, to)

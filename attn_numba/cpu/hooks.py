"""Rules as compiled vector code, for the addresses that kernels call.

A hook's formulas are emitted as LLVM IR (`emitter.py`), one vector of keys at a time, and compiled by llvmlite alone:
tens of milliseconds a rule, kept in memory under the text. Kernels are never compiled again for a rule.
"""

from __future__ import annotations

import math

import llvmlite.binding as llvm
import llvmlite.ir as ir
import numpy as np
from numba.core.compiler_lock import global_compiler_lock

from attn_numba.cpu.emitter import Emitter, layout
from attn_numba.cpu.target import target, target_machine
from attn_numba.cpu.vectors import DOUBLE, I1, I32, I64, Loop, Vectors
from attn_numba.rules.formula import Array, Node


class Hook:
    """One function under construction, `(int64, ...) -> void or int64`; its last argument is the parameter block."""

    def __init__(
        self, module: ir.Module, name: str, arguments: int, returns: bool, number: ir.Type, params: list
    ) -> None:
        result = I64 if returns else ir.VoidType()
        self.function = ir.Function(module, ir.FunctionType(result, [I64] * arguments), name)
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.block = self.builder.inttoptr(self.function.args[-1], I64.as_pointer())
        self.number, self.lanes = number, target().vector_bytes // (8 if number == DOUBLE else 4)
        self.params, self.places = params, layout(params)

    def emitter(self, symbols: dict, masked: ir.Value | None = None, exact: bool = True) -> Emitter:
        return Emitter(
            self.builder, self.number, self.lanes, self.block, self.params, self.places, symbols, masked, exact
        )

    def offsets(self, b: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Position of query row 0 and key row 0 of sequence b: parameters 0 and 1 of every block."""
        reader = self.emitter({"b": b})
        arrays = [Array(n, np.dtype(np.int32), 1) for n in (0, 1)]
        q, k = (reader.value(Node("load", (Node("symbol", kind="int", data="b"),), "int", a)) for a in arrays)
        return q, k

    def small(self, x: ir.Value) -> ir.Value:
        return self.builder.trunc(x, I32)

    def each_vector(self, j0: ir.Value, columns: ir.Value, body, values: list[ir.Value]) -> list[ir.Value]:
        """Call `body(first, row_j, mask or None, values) -> values` for each vector of keys, the last one masked."""
        builder, lanes = self.builder, self.lanes
        steps = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        vectors = Vectors(builder, self.number, lanes)

        def keys(first: ir.Value) -> ir.Value:
            return builder.add(vectors.splat(self.small(builder.add(j0, first))), steps)

        whole = builder.and_(columns, ir.Constant(I64, -lanes))
        loop = Loop(builder, whole, lanes, values)
        values = loop.close(body(loop.index, keys(loop.index), None, loop.values))
        rest = builder.icmp_signed("<", whole, columns)
        before = builder.block
        tail, end = builder.append_basic_block("tail"), builder.append_basic_block("end")
        builder.cbranch(rest, tail, end)
        builder.position_at_end(tail)
        left = vectors.splat(self.small(builder.sub(columns, whole)))
        new = body(whole, keys(whole), builder.icmp_signed("<", steps, left), values)
        tail_end = builder.block
        builder.branch(end)
        builder.position_at_end(end)
        merged = []
        for old, value in zip(values, new, strict=True):
            phi = builder.phi(old.type)
            phi.add_incoming(old, before)
            phi.add_incoming(value, tail_end)
            merged.append(phi)
        return merged


def _row_symbols(hook: Hook, b, h, row_i, offsets) -> dict:
    return {"b": b, "h": h, "row_i": row_i, "i": hook.builder.add(offsets[0], row_i)}


def _key_symbols(hook: Hook, row_j, offset) -> dict:
    vectors = Vectors(hook.builder, hook.number, hook.lanes)
    return {"row_j": row_j, "j": hook.builder.add(row_j, vectors.splat(offset))}


def emit_edit(
    module, name, number, params, score: Node | None, allowed: Node | None, edited: Node | None = None
) -> None:
    """Emit a hook that replaces scores in place by `score` where `allowed`, by minus infinity elsewhere.

    name(scores address, row length, b, h, i0, rows, j0, columns, parameter block). Rows are padded to whole vectors.
    A `score` of None leaves scores as they are; an `allowed` of None allows all. Where `edited` says that `score` is
    the score as it is, or not allowed, for a whole vector, it is not computed: neighboring rows mostly go the same way.
    """
    hook = Hook(module, name, 9, False, number, params)
    builder = hook.builder
    scores, length, b, h, i0, rows, j0, columns, _ = hook.function.args
    b, h = hook.small(b), hook.small(h)
    offsets = hook.offsets(b)
    size = ir.Constant(I64, 8 if number == DOUBLE else 4)
    row = Loop(builder, rows, 1, [])
    row_i = hook.small(builder.add(i0, row.index))
    start = builder.add(scores, builder.mul(builder.mul(row.index, length), size))
    fixed = _row_symbols(hook, b, h, row_i, offsets)

    def body(first, row_j, masked, values):
        symbols = {**fixed, **_key_symbols(hook, row_j, offsets[1])}
        emit = hook.emitter(symbols, masked, exact=False)
        at = builder.add(start, builder.mul(first, size))
        value = symbols["s"] = emit.load(at)
        if score is not None and edited is not None:
            value = _where_any(hook, hook.emitter(symbols, masked).vector_of(edited), value, emit, score)
        elif score is not None:
            value = emit.vector_of(score)
        if allowed is not None:
            keep = hook.emitter(symbols, masked).vector_of(allowed)
            value = builder.select(keep, value, emit.constant(-math.inf))
        emit.store(value, at)
        return values

    hook.each_vector(j0, columns, body, [])
    row.close([])
    builder.ret_void()


def emit_gradient(module, name, number, params, gradient: Node) -> None:
    """Emit a hook that writes gradients by something else than a call's final scores, from those by them.

    name(products address, gradients address, address to write to, row length, b, h, i0, rows, j0, columns, parameter
    block). In the formula `s` is a product and `ds` the gradient by the final score; where that is zero, nothing
    depends on the score, which may be anything, and the zero is written as it is. Rows are padded to whole vectors.
    """
    hook = Hook(module, name, 11, False, number, params)
    builder = hook.builder
    products, gradients, to, length, b, h, i0, rows, j0, columns, _ = hook.function.args
    b, h = hook.small(b), hook.small(h)
    offsets = hook.offsets(b)
    size = ir.Constant(I64, 8 if number == DOUBLE else 4)
    row = Loop(builder, rows, 1, [])
    row_i = hook.small(builder.add(i0, row.index))
    start = builder.mul(builder.mul(row.index, length), size)
    fixed = _row_symbols(hook, b, h, row_i, offsets)

    def body(first, row_j, masked, values):
        symbols = {**fixed, **_key_symbols(hook, row_j, offsets[1])}
        emit = hook.emitter(symbols, masked, exact=False)
        at = builder.add(start, builder.mul(first, size))
        symbols["s"], symbols["ds"] = emit.load(products, at), emit.load(gradients, at)
        nothing = builder.fcmp_ordered("==", symbols["ds"], emit.constant(0.0))
        emit.store(builder.select(nothing, symbols["ds"], emit.vector_of(gradient)), to, at)
        return values

    hook.each_vector(j0, columns, body, [])
    row.close([])
    builder.ret_void()


def _where_any(hook: Hook, edited, value, emit: Emitter, score: Node):
    """Return the vector `score` if a lane is edited, else `value`."""
    builder = hook.builder
    some = builder.icmp_unsigned(
        "!=", builder.bitcast(edited, ir.IntType(hook.lanes)), ir.Constant(ir.IntType(hook.lanes), 0)
    )
    before = builder.block
    with builder.if_then(some):
        new = emit.vector_of(score)
        inside = builder.block
    result = builder.phi(value.type)
    result.add_incoming(value, before)
    result.add_incoming(new, inside)
    return result


def emit_tile(module, name, number, params, allowed: Node, plain: Node, certain: Node, possible: Node) -> None:
    """Emit a hook that answers NONE 0, SOME 1 or ALL 2 for a tile.

    name(b, h, i0, i1, j0, j1, parameter block). Of a pair, `allowed` says whether it counts at all and `plain` whether
    it counts without an edit of its score; of a tile, `certain` that all pairs are plain and `possible` that some are
    allowed. Where these two can say nothing (an array with an element for each pair), the pairs themselves are looked
    at: that costs far less than computing their scores.
    """
    hook = Hook(module, name, 7, True, number, params)
    builder = hook.builder
    b, h, i0, i1, j0, j1, _ = hook.function.args
    b, h = hook.small(b), hook.small(h)
    offsets = hook.offsets(b)
    symbols = {"b": b, "h": h}
    for end, value in (("i0", i0), ("i1", i1), ("j0", j0), ("j1", j1)):
        row = hook.small(value)
        symbols["row_" + end] = row
        symbols[end] = builder.add(row, offsets[0 if end[0] == "i" else 1])
    emit = hook.emitter(symbols)
    all_of, some = emit.value(certain), emit.value(possible)
    answer = builder.add(builder.zext(all_of, I64), builder.zext(builder.or_(some, all_of), I64))
    unknown = (certain.op == "const" and not certain.data) or (possible.op == "const" and possible.data)
    if not unknown:
        builder.ret(answer)
        return
    with builder.if_then(builder.icmp_signed("!=", answer, ir.Constant(I64, 1))):
        builder.ret(answer)
    _emit_look(hook, b, h, i0, i1, j0, j1, offsets, allowed, plain)


def _emit_look(hook: Hook, b, h, i0, i1, j0, j1, offsets, allowed: Node, plain: Node) -> None:
    """Emit the answer NONE, SOME or ALL from a look at each pair, given at the first row that decides for SOME."""
    builder, lanes = hook.builder, hook.lanes
    bits = ir.VectorType(I1, lanes)
    no, yes = ir.Constant(bits, [0] * lanes), ir.Constant(bits, [1] * lanes)
    row = Loop(builder, builder.sub(i1, i0), 1, [no, yes])
    row_i = hook.small(builder.add(i0, row.index))
    fixed = _row_symbols(hook, b, h, row_i, offsets)

    def body(first, row_j, masked, values):
        any_of, all_of = values
        emit = hook.emitter({**fixed, **_key_symbols(hook, row_j, offsets[1])}, masked)
        counts, as_it_is = emit.vector_of(allowed), emit.vector_of(plain)
        present = yes if masked is None else masked
        return [
            builder.or_(any_of, builder.and_(counts, present)),
            builder.and_(all_of, builder.or_(as_it_is, builder.not_(present))),
        ]

    any_of, all_of = hook.each_vector(j0, builder.sub(j1, j0), body, row.values)
    whole = ir.IntType(lanes)

    def answer(any_bits, all_bits):
        found = builder.icmp_unsigned("!=", builder.bitcast(any_bits, whole), ir.Constant(whole, 0))
        full = builder.icmp_unsigned("==", builder.bitcast(all_bits, whole), ir.Constant(whole, -1))
        return found, full

    found, full = answer(any_of, all_of)
    with builder.if_then(builder.and_(found, builder.not_(full))):
        builder.ret(ir.Constant(I64, 1))
    any_of, all_of = row.close([any_of, all_of])
    found, full = answer(any_of, all_of)
    builder.ret(builder.add(builder.zext(found, I64), builder.zext(builder.and_(found, full), I64)))


def emit_runs(module, name, number, params, first: Node, end: Node) -> None:
    """Emit a hook that lists the stretches of keys (rows of k) that a query sees, as int32: first ones, then ends.

    name(b, h, row of q, number of stretches, address to write to, bytes from first ones to ends, parameter block).
    Whole vectors are written.
    """
    hook = Hook(module, name, 7, False, number, params)
    builder = hook.builder
    b, h, i, count, to, apart, _ = hook.function.args
    b, h = hook.small(b), hook.small(h)
    offsets = hook.offsets(b)
    symbols = _row_symbols(hook, b, h, hook.small(i), offsets)
    ends = builder.add(to, apart)

    def body(at, n, masked, values):
        emit = hook.emitter({**symbols, "n": n}, masked)
        offset = emit.splat(offsets[1])
        place = builder.mul(at, ir.Constant(I64, 4))
        for start, node in ((to, first), (ends, end)):
            emit.store(builder.sub(emit.vector_of(node), offset), start, place)
        return values

    hook.each_vector(ir.Constant(I64, 0), count, body, [])
    builder.ret_void()


# --- compilation ---

_engines: dict[str, tuple[object, dict[str, int]]] = {}  # an engine must live as long as its addresses


@global_compiler_lock
def compile_hooks(module: ir.Module | str) -> dict[str, int]:
    """Compile a module, or find it compiled; return the address of each function."""
    text = str(module)
    if text not in _engines:
        parsed = llvm.parse_assembly(text)
        parsed.verify()
        machine = target_machine()
        passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=2))
        passes.getModulePassManager().run(parsed, passes)
        names = [f.name for f in parsed.functions if not f.is_declaration]
        engine = llvm.create_mcjit_compiler(parsed, machine)
        engine.finalize_object()
        _engines[text] = engine, {name: engine.get_function_address(name) for name in names}
    return _engines[text][1]

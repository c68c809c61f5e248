"""Dropout as a hook: Philox4x32-10 for one vector of counters at a time, four keys to a counter."""

from __future__ import annotations

import llvmlite.ir as ir
import numpy as np

from attn_numba.cpu.hooks import Hook
from attn_numba.cpu.vectors import DOUBLE, I32, I64, Loop, Vectors
from attn_numba.rules.formula import Array, Node
from attn_numba.rules.philox import KEY_STEPS, MULTIPLIERS, ROUNDS


def dropout_parameters(dropout, sizes) -> list:
    """Return the hook's six parameters.

    They are the key words (B, 2), whether b counts, the last word that is dropped, ``1 / (1 - rate)``, and what is
    counted from: a sequence and a head.
    """
    keys = dropout.keys(sizes).view(np.int32)
    last = np.uint32(dropout.threshold - 1).view(np.int32)
    return [keys, 0 if dropout.by_sequence else 1, int(last), 1.0 / (1.0 - dropout.rate), *dropout.first]


def _integers(lanes: int, kind: ir.Type = I32) -> ir.Type:
    return ir.VectorType(kind, lanes)


def _philox(v: Vectors, counter: list[ir.Value], key: list[ir.Value]) -> list[ir.Value]:
    """Return the four words of a vector of counters; `key` are two numbers."""
    builder, lanes = v.builder, v.lanes
    narrow, wide = _integers(lanes), _integers(lanes, I64)
    c0, c1, c2, c3 = counter
    k0, k1 = key

    def product(x: ir.Value, multiplier: int) -> tuple[ir.Value, ir.Value]:
        whole = builder.mul(builder.zext(x, wide), ir.Constant(wide, [multiplier] * lanes))
        high = builder.lshr(whole, ir.Constant(wide, [32] * lanes))
        return builder.trunc(high, narrow), builder.trunc(whole, narrow)

    for _ in range(ROUNDS):
        high0, low0 = product(c0, int(MULTIPLIERS[0]))
        high1, low1 = product(c2, int(MULTIPLIERS[1]))
        c0 = builder.xor(builder.xor(high1, c1), v.splat(k0))
        c2 = builder.xor(builder.xor(high0, c3), v.splat(k1))
        c1, c3 = low1, low0
        k0, k1 = (builder.add(k, ir.Constant(I32, int(step))) for k, step in zip((k0, k1), KEY_STEPS, strict=True))
    return [c0, c1, c2, c3]


def _in_key_order(v: Vectors, words: list[ir.Value]) -> list[ir.Value]:
    """Return vectors in which word w of counter c stands at place 4 c + w."""
    n = v.lanes
    low = [lane // 2 + (n if lane % 2 else 0) for lane in range(n)]
    high = [lane + n // 2 for lane in low]
    result = []
    for pick in (low, high):
        even, odd = v.shuffle(words[0], words[2], pick), v.shuffle(words[1], words[3], pick)
        result += [v.shuffle(even, odd, low), v.shuffle(even, odd, high)]
    return result


def emit_dropout(module: ir.Module, name: str, number: ir.Type, params: list, first_param: int) -> None:
    """Emit a hook that zeroes dropped weights in place and multiplies the others.

    Its arguments are those of a hook that edits scores. Positions are aligned to whole counters, so the first and the
    last vectors of a row may lie half outside and are masked.
    """
    hook = Hook(module, name, 9, False, number, params)
    builder, lanes = hook.builder, hook.lanes
    weights, length, b, h, i0, rows, j0, columns, _ = hook.function.args
    b, h = hook.small(b), hook.small(h)
    q_offset, k_offset = hook.offsets(b)
    v = hook.emitter({"b": b})
    keys = Array(first_param, np.dtype(np.int32), 2)
    key = [
        v.value(Node("load", (Node("symbol", kind="int", data="b"), Node("const", kind="int", data=n)), "int", keys))
        for n in (0, 1)
    ]
    kinds = ("int", "int", "float", "int", "int")
    counts_b, last, scale, first_b, first_h = (
        v.value(Node("number", kind=kind, data=first_param + n)) for n, kind in enumerate(kinds, start=1)
    )
    size = 8 if number == DOUBLE else 4
    position = builder.add(hook.small(j0), k_offset)
    shift = builder.sext(builder.and_(position, ir.Constant(I32, 3)), I64)
    counter = builder.ashr(position, ir.Constant(I32, 2))
    lane = ir.Constant(_integers(lanes), list(range(lanes)))

    row = Loop(builder, rows, 1, [])
    i = builder.add(hook.small(builder.add(i0, row.index)), q_offset)
    start = builder.add(weights, builder.mul(builder.mul(row.index, length), ir.Constant(I64, size)))
    sequence, head = builder.add(builder.mul(b, counts_b), first_b), builder.add(h, first_h)
    fixed = [v.splat(x) for x in (sequence, head, i)]
    block = Loop(builder, builder.add(columns, shift), 4 * lanes, [])
    first = builder.add(counter, hook.small(builder.lshr(block.index, ir.Constant(I64, 2))))
    words = _in_key_order(v, _philox(v, [*fixed, builder.add(v.splat(first), lane)], key))
    for n, word in enumerate(words):
        column = builder.add(builder.sub(block.index, shift), ir.Constant(I64, n * lanes))
        place = builder.add(v.splat(hook.small(column)), lane)
        inside = builder.icmp_unsigned("<", place, v.splat(hook.small(columns)))  # a negative place counts as huge
        at = v.pointer(builder.add(start, builder.mul(column, ir.Constant(I64, size))))
        suffix = f"v{lanes}{v.suffix}.p0"
        old = v.call(f"llvm.masked.load.{suffix}", v.vector, at, ir.Constant(I32, 1), inside, v.constant(0.0))
        keep = builder.icmp_unsigned(">", word, v.splat(last))
        new = builder.select(keep, builder.fmul(old, v.splat(scale)), v.constant(0.0))
        v.store_where(inside, new, at)
    block.close([])
    row.close([])
    builder.ret_void()

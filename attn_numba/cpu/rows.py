"""Rows of numbers in compiled code: from what arrays hold to operands, from accumulators to what arrays hold.

The functions of this folder that `compiled` marks run in workers and check nothing. `unit` says what is multiplied,
see `tiles.py`; `call` is the record of the call, see `state.py`.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from attn_numba.cpu.tiles import (
    HALF_FLOAT,
    SAME,
    accumulator,
    is_pairs,
    read_brain_number,
    read_brain_vector,
    read_half_number,
    read_half_vector,
    read_number,
    read_vector,
    row_fill,
    store_number,
    vector_length,
    word_bytes,
    write_brain_number,
    write_brain_vector,
    write_half_number,
    write_half_vector,
    write_number,
    write_vector,
)

# Numbers may be contracted into multiply-adds and zeros lose their sign; sums are never reordered, NaN and infinity
# never assumed away.
options = {
    "nogil": True,
    "fastmath": {"nsz", "contract"},
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}
compiled = njit(**options)
inlined = njit(
    **options, inline="always"
)  # into their one caller: LLVM then works through the code below them once less


@compiled
def rounded_up(x, multiple):
    """Return the least multiple that is not below x."""
    return (x + multiple - 1) // multiple * multiple


@compiled
def clear(at, count, unit):
    """Zero `count` words (whole vectors)."""
    number = accumulator(unit)
    row_fill(number, at, count, number)


@compiled
def read_row(to, source, step, count, call, unit):
    """Copy `count` numbers, `step` bytes apart, to a contiguous row of operands."""
    raw = call.kind == SAME or is_pairs(unit)
    width = 2 if is_pairs(unit) else word_bytes(unit)
    at_once = vector_length(unit) * word_bytes(unit) // width
    done = 0
    if step == call.itemsize:
        while done + at_once <= count:
            if raw:
                read_vector(unit, to + done * width, source + done * step)
            elif call.kind == HALF_FLOAT:
                read_half_vector(unit, to + done * width, source + done * step)
            else:
                read_brain_vector(unit, to + done * width, source + done * step)
            done += at_once
    while done < count:
        if raw:
            read_number(unit, to + done * width, source + done * step)
        elif call.kind == HALF_FLOAT:
            read_half_number(unit, to + done * width, source + done * step)
        else:
            read_brain_number(unit, to + done * width, source + done * step)
        done += 1


@compiled
def write_row(to, step, source, count, factor, call, number):
    """Write `count` accumulators times `factor` as stored numbers, `step` bytes apart."""
    lanes, width = vector_length(number), word_bytes(number)
    done = 0
    if step == call.itemsize:
        while done + lanes <= count:
            if call.kind == SAME:
                write_vector(number, to + done * step, source + done * width, factor)
            elif call.kind == HALF_FLOAT:
                write_half_vector(number, to + done * step, source + done * width, factor)
            else:
                write_brain_vector(number, to + done * step, source + done * width, factor)
            done += lanes
    while done < count:
        if call.kind == SAME:
            write_number(number, to + done * step, source + done * width, factor)
        elif call.kind == HALF_FLOAT:
            write_half_number(number, to + done * step, source + done * width, factor)
        else:
            write_brain_number(number, to + done * step, source + done * width, factor)
        done += 1


ROW_FACTS = 4  # float64 numbers, see `write_facts`


@compiled
def write_facts(to, largest, rest, second, lse):
    """Write what made a row's weights sum to 1, for gradients.

    Its largest score, in the units of the strip; what weights were multiplied with or the threshold taken off them,
    both when scores are counted from there; the same of the second of two softmax; and the lse of a softmax.
    """
    wide = np.float64(0.0)
    store_number(wide, to, largest)
    store_number(wide, to + 8, rest)
    store_number(wide, to + 16, second)
    store_number(wide, to + 24, lse)

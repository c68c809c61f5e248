"""Rows of K, Q and dout that are not finite: zeros in register tiles, then added one by one to what sees them.

Whether a row sees a key is told by the gradient by the score: minus zero where it does not.
"""

from __future__ import annotations

from attn_numba.cpu.rows import clear, compiled, read_row
from attn_numba.cpu.tiles import (
    load_byte,
    load_int32,
    load_number,
    load_word,
    row_is_finite,
    store_byte,
    store_int32,
    store_number,
    vector_length,
    word_bytes,
)

# Which of a query's rows is not finite.
QUERY, DOUT = 1, 2


@compiled
def copy_keys(call, space, keys, j0, j1, unit):
    """Copy rows of K, those that are not finite as zeros; list these and return how many there are."""
    row = call.depth_padded * word_bytes(unit)
    special = 0
    for j in range(j0, j1):
        to = space + call.key_rows_at + (j - j0) * row
        clear(to, call.depth_padded, unit)
        read_row(to, keys + j * call.k_j, call.k_d, call.D, call, unit)
        if not row_is_finite(unit, to, call.depth_padded):
            clear(to, call.depth_padded, unit)
            store_int32(space + call.special_at + 4 * special, j - j0)
            special += 1
    return special


@compiled
def load_rows(call, to, padded, source, step, beside, size, rows, flags, flag, unit):
    """Copy rows to the workspace; flag those that are not finite, and return the flag if there are any."""
    word = word_bytes(unit)
    some = 0
    for r in range(rows):
        at = to + r * padded * word
        if size != padded:
            clear(at, padded, unit)
        read_row(at, source + r * step, beside, size, call, unit)
        if not row_is_finite(unit, at, padded):
            store_byte(flags + r, load_byte(flags + r) | flag)
            some = flag
    return some


@compiled
def clear_special_rows(call, space, rows, unit):
    """Zero the copies of what is flagged."""
    word = word_bytes(unit)
    for r in range(rows):
        flag = load_byte(space + call.flags_at + r)
        if flag & QUERY:
            clear(space + call.q_at + r * call.depth_padded * word, call.depth_padded, unit)
        if flag & DOUT:
            clear(space + call.douts_at + r * call.value_width * word, call.value_width, unit)


@compiled
def _sees(call, space, r, column, unit):
    word = word_bytes(unit)
    at = space + call.gradients_at + (r * call.strip_row + column) * word
    return load_int32(at) != -(2**31) if word == 4 else load_word(at) != -(2**63)


@compiled
def _add_product(to, factor, source, step, size, unit):
    word = word_bytes(unit)
    for n in range(size):
        x = load_number(unit, source + n * step)
        store_number(unit, to + n * word, load_number(unit, to + n * word) + factor * x)


@compiled
def add_special_rows(call, space, q, dout, runs, count, rows, products, unit):
    """Add flagged rows of Q to dk (if scores are products) and of dout to dv, at the keys that these rows see."""
    word = word_bytes(unit)
    for r in range(rows):
        flag = load_byte(space + call.flags_at + r)
        if flag == 0:
            continue
        for run in range(count):
            for j in range(load_int32(runs + 8 * run), load_int32(runs + 8 * run + 4)):
                if not _sees(call, space, r, j, unit):
                    continue
                at = (r * call.strip_row + j) * word
                if products and flag & QUERY:
                    to = space + call.dk_at + j * call.depth_padded * word
                    ds = load_number(unit, space + call.pulled_at + at)
                    _add_product(to, ds, q + r * call.q_i, call.q_d, call.D, unit)
                if flag & DOUT:
                    to = space + call.dv_at + j * call.value_width * word
                    weight = load_number(unit, space + call.scores_at + at)
                    _add_product(to, weight, dout + r * call.dout_i, call.dout_e, call.E, unit)


@compiled
def add_special_keys(call, space, dq, keys, kinds, special, rows, unit):
    """Add rows of K (`keys` is the address of the tile's first) that are not finite to the rows of dq that see them."""
    lanes, word = vector_length(unit), word_bytes(unit)
    for n in range(special):
        column = load_int32(space + call.special_at + 4 * n)
        if not load_byte(kinds + column // lanes):
            continue
        for r in range(rows):
            if _sees(call, space, r, column, unit):
                ds = load_number(unit, space + call.pulled_at + (r * call.strip_row + column) * word)
                to = dq + r * call.depth_padded * word
                _add_product(to, ds, keys + column * call.k_j, call.k_d, call.D, unit)

"""Gradients through a layer of hidden units: ``s = w . tanh(q + k)`` for mapped queries and keys.

With ``t = tanh(q + k)``, what a unit's input gets is ``x = ds w (1 - t**2)``: dq is its sum over keys, dk over rows,
and the unit's weight gets the sum of ``ds t``.
"""

from __future__ import annotations

from attn_numba.cpu.gradient_tiles import TERMS, additive_gradients, fold
from attn_numba.cpu.rows import clear, compiled
from attn_numba.cpu.tiles import load_int32, load_number, store_number, vector_length, word_bytes


@compiled
def clear_hidden(call, space, unit):
    """Zero the item's dk, here transposed: a row for each unit."""
    clear(space + call.dk_at, call.depth_padded * call.keys_row, unit)


@compiled
def _hidden_sums(call, b, h, item, unit):
    """Return the address of the item's sums of a head for weights of hidden units: (B, H, blocks of keys, units)."""
    blocks = call.items // (call.B * call.Hk)
    block = item // (call.B * call.Hk)
    return call.hidden_sums + (((b * call.H + h) * blocks + block) * call.depth) * word_bytes(unit)


@compiled
def add_to_hidden(call, space, runs, count, b, h, rows, item, unit):
    """Add a tile to the item's dk and to its sums for the units' weights; leave what its rows of dq get."""
    lanes, word = vector_length(unit), word_bytes(unit)
    lane_sums, weights = space + call.sums_at, call.hidden + h * call.hidden_h
    sums = _hidden_sums(call, b, h, item, unit)
    for r in range(rows):
        row = r * call.strip_row
        for u in range(call.depth):
            clear(lane_sums, TERMS * lanes, unit)
            query = load_number(unit, space + call.q_at + (r * call.depth_padded + u) * word)
            weight = load_number(unit, weights + u * word)
            for run in range(count):
                first, end = load_int32(runs + 8 * run), load_int32(runs + 8 * run + 4)
                column = (u * call.keys_row + first) * word
                additive_gradients(
                    unit, space + call.pulled_at + (row + first) * word, space + call.keys_at + column,
                    space + call.dk_at + column, lane_sums, end - first, query, weight,
                )  # fmt: skip
            added = fold(unit, lane_sums)
            store_number(unit, space + call.added_at + (r * call.depth_padded + u) * word, added)
            to = sums + u * word
            store_number(unit, to, load_number(unit, to) + fold(unit, lane_sums + lanes * word))


@compiled
def add_hidden_to_queries(call, space, dq, rows, unit):
    """Add what `add_to_hidden` left to rows of dq."""
    word = word_bytes(unit)
    for n in range(rows * call.depth_padded):
        if n % call.depth_padded < call.depth:
            added = load_number(unit, space + call.added_at + n * word)
            store_number(unit, dq + n * word, load_number(unit, dq + n * word) + added)


@compiled
def write_hidden_keys(call, space, first, keys, unit):
    """Write the item's dk, whose first row is row `first` of all."""
    word = word_bytes(unit)
    for j in range(keys):
        for u in range(call.depth):
            x = load_number(unit, space + call.dk_at + (u * call.keys_row + j) * word)
            store_number(unit, call.dk + ((first + j) * call.depth + u) * word, x)

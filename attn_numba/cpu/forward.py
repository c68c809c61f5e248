"""Attention forward: tiles of queries and keys, a running softmax, O(N) memory, no formula of any mask or modifier.

One item is one block of query rows of one head (or of several heads that share a key head, where a head has few
rows). For each tile of keys an item asks the tile hook which panels of keys its groups of rows see, packs those keys
transposed, and then, group by group: scores (register tiles), hooks on the scores, weights against the running row
maximum, weighted values (register tiles).

Same bits whatever is skipped: key tiles begin at fixed multiples of `key_tile`, a score is one chain of multiply-adds
over the head size, a row's weights are added in fixed lanes (key number modulo three vectors) and folded once per key
tile, weighted values are chains over fixed blocks of keys (12 vectors), added up block by block. A key left out would
have added an exact zero.

A key that is not allowed has weight 0, but 0 times NaN is NaN: rows of V that are not finite are set to zero for the
register tiles and then added to the rows that see them, one by one.

The functions below run in compiled workers and check nothing. `unit` says what is multiplied, see `tiles.py`.
"""

from __future__ import annotations

import numpy as np

from attn_numba.cpu.keys import clear_marks, mark_rows, pack_tile, plan_ahead
from attn_numba.cpu.rows import ROW_FACTS, clear, compiled, inlined, read_row, write_facts, write_row
from attn_numba.cpu.softmax import attend_rows, divided, score_rows
from attn_numba.cpu.state import call_of
from attn_numba.cpu.strips import attend_strips, begin_strips, mark_strips, score_strips
from attn_numba.cpu.tiles import (
    accumulator,
    claim,
    load_byte,
    load_number,
    load_word,
    normalized,
    row_fill,
    store_number,
    vector_length,
    word_bytes,
)


@compiled
def load_queries(call, space, b, h0, groups, head_groups, i_first, i_end, unit):
    """Copy the item's query rows, group by group; rows to spare and odd halves are zero."""
    number = accumulator(unit)
    word = word_bytes(unit)
    for g in range(groups):
        i0 = i_first + g % head_groups * call.group_rows
        source = call.q + b * call.q_b + (h0 + g // head_groups) * call.q_h
        for r in range(call.group_rows):
            to = space + call.q_at + (g * call.group_rows + r) * call.depth * word
            store_number(number, to + (call.depth - 1) * word, number)
            if i0 + r < i_end:
                read_row(to, source + (i0 + r) * call.q_i, call.q_d, call.D, call, unit)


@compiled
def _reset(call, space, groups, unit):
    number = accumulator(unit)
    row_fill(number, space + call.largest_at, groups * call.state_rows, -np.inf)
    clear(space + call.total_at, groups * call.state_rows, unit)
    clear(space + call.out_at, groups * call.group_rows * call.value_width, unit)


@compiled
def _finish(call, space, b, h, i0, g, rows, unit):
    """Add the sink, divide by the total, write the result rows and their lse; leave 1 / total for the weights."""
    number = accumulator(unit)
    word = word_bytes(unit)
    for r in range(rows):
        state = (g * call.state_rows + r) * word
        largest = np.float64(load_number(number, space + call.largest_at + state)) * call.factor
        total = np.float64(load_number(number, space + call.total_at + state))
        inverse, lse = divided(call, b, h, largest, total)
        out = call.out + b * call.out_b + h * call.out_h + (i0 + r) * call.out_i
        source = space + call.out_at + (g * call.group_rows + r) * call.value_width * word
        write_row(out, call.out_e, source, call.E, inverse, call, number)
        if call.lse:
            store_number(number, call.lse + ((b * call.H + h) * call.M + i0 + r) * word, lse)
        if call.row_facts:
            to = call.row_facts + ((b * call.H + h) * call.M + i0 + r) * 8 * ROW_FACTS
            write_facts(to, load_number(number, space + call.largest_at + state), inverse, 0.0, lse)
        store_number(number, space + call.total_at + state, inverse)


@compiled
def _write_weights(call, space, kinds, b, h, i0, g, rows, j0, j1, unit):
    """Write the tile's normalized weights from its scores; places that no row sees are zero already."""
    number = accumulator(unit)
    word, lanes = word_bytes(unit), vector_length(unit)
    factor = type(number)(call.factor)
    for r in range(rows):
        state = (g * call.state_rows + r) * word
        largest = load_number(number, space + call.largest_at + state)
        inverse = load_number(number, space + call.total_at + state)
        if inverse == 0.0:
            continue
        to = call.weights + (((b * call.H + h) * call.M + i0 + r) * call.N + j0) * word
        row = space + call.scores_at + r * call.strip_row * word
        for n in range((j1 - j0 + lanes - 1) // lanes):
            if load_byte(kinds + n):
                at, left = n * lanes, min(lanes, j1 - j0 - n * lanes)
                normalized(number, row + at * word, to + at * word, left, factor, largest, inverse)


@compiled
def place(call, item):
    """Return block of rows, sequence, key head and set of query heads of an item; the last block comes first.

    Items of one block of all heads come one after the other, or those of all blocks of one head.
    """
    sets = call.B * call.Hk * call.head_sets
    block, rest = item // sets, item % sets
    if call.by_heads:
        block, rest = item % call.blocks, item // call.blocks
    block = call.blocks - 1 - block
    b, rest = rest // (call.Hk * call.head_sets), rest % (call.Hk * call.head_sets)
    return block, call.first_b + b, rest // call.head_sets, rest % call.head_sets


@compiled
def _seen_tile(strips, call, space, marks, b, h0, groups, head_groups, i_first, i_end, j0, unit):
    """Mark what the item sees of the tile at `j0`, or else of the next of which it sees something.

    Return that tile's first key, N if there is none.
    """
    lanes = vector_length(unit)
    while j0 < call.N:
        j1 = min(j0 + call.key_tile, call.N)
        clear_marks(marks + groups * (call.key_tile // lanes), j1 - j0, lanes)
        if strips is None:
            seen = mark_rows(call, space, marks, b, h0, groups, head_groups, i_first, i_end, j0, j1, unit)
        else:
            seen = mark_strips(call, space, marks, b, h0, groups, head_groups, i_first, i_end, j0, j1, unit)
        if seen:
            return j0
        j0 = j1
    return call.N


@inlined
def _attend(call, space, state, item, unit, strips, weights):
    block, b, hk, part = place(call, item)
    served = call.H // call.Hk
    h0 = hk * served + part * call.set_heads
    heads = min(call.set_heads, served - part * call.set_heads)
    i_first = block * call.block_rows
    i_end = min(i_first + call.block_rows, call.M)
    head_groups = (i_end - i_first + call.group_rows - 1) // call.group_rows
    groups = heads * head_groups

    most = call.key_tile // vector_length(unit)
    values = call.v + b * call.v_b + hk * call.v_h
    load_queries(call, space, b, h0, groups, head_groups, i_first, i_end, unit)
    _reset(call, space, groups, unit)
    if strips is not None:
        begin_strips(call, space, b, h0, groups, head_groups, i_first, i_end, unit)
    marks, spare = space + call.marks_at, space + call.marks_at + call.marks_bytes
    j0 = first = _seen_tile(strips, call, space, marks, b, h0, groups, head_groups, i_first, i_end, 0, unit)
    while j0 < call.N:
        j1 = min(j0 + call.key_tile, call.N)
        special = pack_tile(call, space, marks + groups * most, b, hk, j0, j1, unit)
        following = _seen_tile(strips, call, space, spare, b, h0, groups, head_groups, i_first, i_end, j1, unit)
        if following < call.N:
            plan_ahead(call, space, spare + groups * most, b, hk, following, unit)
        else:  # of the next item that nobody has claimed, if it is of the same rows of another head
            _, next_b, next_hk, _ = place(call, min(load_word(state), call.items - 1))
            plan_ahead(call, space, marks + groups * most, next_b, next_hk, first, unit)
        for g in range(groups):
            h, i0 = h0 + g // head_groups, i_first + g % head_groups * call.group_rows
            rows = min(call.group_rows, i_end - i0)
            kinds = marks + g * most
            queries = space + call.q_at + g * call.group_rows * call.depth * word_bytes(unit)
            if strips is None:
                attend_rows(call, space, values, kinds, queries, b, h, i0, g, rows, j0, j1, special, unit)
            else:
                attend_strips(call, space, values, kinds, queries, b, h, i0, g, rows, j0, j1, special, unit)
        marks, spare, j0 = spare, marks, following
    for g in range(groups):
        i0 = i_first + g % head_groups * call.group_rows
        rows = min(call.group_rows, i_end - i0)
        _finish(call, space, b, h0 + g // head_groups, i0, g, rows, unit)
    if weights is not None:
        _weights(strips, call, space, b, hk, h0, groups, head_groups, i_first, i_end, unit)


@compiled
def _weights(strips, call, space, b, hk, h0, groups, head_groups, i_first, i_end, unit):
    """Compute the scores a second time, now that each row's maximum and total are known, and write the weights."""
    most = call.key_tile // vector_length(unit)
    marks = space + call.marks_at
    j0 = _seen_tile(strips, call, space, marks, b, h0, groups, head_groups, i_first, i_end, 0, unit)
    while j0 < call.N:
        j1 = min(j0 + call.key_tile, call.N)
        pack_tile(call, space, marks + groups * most, b, hk, j0, j1, unit)
        for g in range(groups):
            h, i0 = h0 + g // head_groups, i_first + g % head_groups * call.group_rows
            rows = min(call.group_rows, i_end - i0)
            queries = space + call.q_at + g * call.group_rows * call.depth * word_bytes(unit)
            if strips is None:
                count = score_rows(call, space, marks + g * most, queries, b, h, i0, g, rows, j0, j1, unit)
            else:
                count = score_strips(call, space, marks + g * most, queries, b, h, i0, g, rows, j0, j1, unit)
            if count:
                _write_weights(call, space, marks + g * most, b, h, i0, g, rows, j0, j1, unit)
        j0 = _seen_tile(strips, call, space, marks, b, h0, groups, head_groups, i_first, i_end, j1, unit)


# A process compiles what it uses and no more: where `strips` or `weights` is None, what only the others need is pruned
# before types are inferred.
YES = 1


@inlined
def _work(state, number, unit, strips, weights):
    call = call_of(state)
    space = call.workspace + number * call.workspace_bytes
    while True:
        item = claim(state)
        if item >= call.items:
            return
        _attend(call, space, state, item, unit, strips, weights)


# One worker for each unit, for rows or strips, without and with weights; Numba's disk cache keeps them under their
# names. `float32` also computes float16 and, without a dot product of their own, bfloat16 calls.


def _rows_float32(state, number):
    _work(state, number, np.float32(0), None, None)


def _rows_weights_float32(state, number):
    _work(state, number, np.float32(0), None, YES)


def _strips_float32(state, number):
    _work(state, number, np.float32(0), YES, None)


def _strips_weights_float32(state, number):
    _work(state, number, np.float32(0), YES, YES)


def _rows_float64(state, number):
    _work(state, number, np.float64(0), None, None)


def _rows_weights_float64(state, number):
    _work(state, number, np.float64(0), None, YES)


def _strips_float64(state, number):
    _work(state, number, np.float64(0), YES, None)


def _strips_weights_float64(state, number):
    _work(state, number, np.float64(0), YES, YES)


def _rows_bfloat16(state, number):
    _work(state, number, np.int32(0), None, None)


def _rows_weights_bfloat16(state, number):
    _work(state, number, np.int32(0), None, YES)


def _strips_bfloat16(state, number):
    _work(state, number, np.int32(0), YES, None)


def _strips_weights_bfloat16(state, number):
    _work(state, number, np.int32(0), YES, YES)


# (unit, strips, weights) -> worker
WORKERS = {
    ("float32", False, False): _rows_float32,
    ("float32", False, True): _rows_weights_float32,
    ("float32", True, False): _strips_float32,
    ("float32", True, True): _strips_weights_float32,
    ("float64", False, False): _rows_float64,
    ("float64", False, True): _rows_weights_float64,
    ("float64", True, False): _strips_float64,
    ("float64", True, True): _strips_weights_float64,
    ("bfloat16", False, False): _rows_bfloat16,
    ("bfloat16", False, True): _rows_weights_bfloat16,
    ("bfloat16", True, False): _strips_bfloat16,
    ("bfloat16", True, True): _strips_weights_bfloat16,
}

"""Attention whose rows of scores are looked at as wholes: other normalizers, other scores, and what explains them.

One item is one block of query rows of one head (or of several heads that share a key head, where a head has few
rows). It packs all keys that its rows see, tile by tile; then, group by group, a strip holds the group's scores of all
keys: products or another score, hooks, the normalizer in place, weighted values (or what explains the weights). So
each score is computed once, in memory that grows with N and not with M times N.

Sums are in the order that `forward.py` tells of, so that here too a key left out changes no bit.

The functions below run in compiled workers and check nothing. `unit` says what is multiplied, see `tiles.py`; pairs
do not occur. Who asks for what: `out`, `lse`, `weights`, `entropy`, `top_keys`, `sums` are addresses, 0 where not;
without `out`, no value is looked at.
"""

from __future__ import annotations

import numpy as np

from attn_numba.cpu.additive import additive_scores
from attn_numba.cpu.explained import add_to_columns, entropy_of_row, top_of_row
from attn_numba.cpu.forward import load_queries, place
from attn_numba.cpu.keys import clear_marks, copy_values, find_special, list_runs, mark_rows, pack_keys
from attn_numba.cpu.normalizers import normalize_row, weigh_row
from attn_numba.cpu.rows import ROW_FACTS, clear, compiled, inlined, write_facts, write_row
from attn_numba.cpu.softmax import add_special, edit_scores, products, weighted_values
from attn_numba.cpu.state import call_of
from attn_numba.cpu.tiles import (
    VECTORS,
    accumulator,
    call_edit,
    claim,
    load_byte,
    load_int32,
    load_number,
    row_fill,
    row_largest,
    store_byte,
    store_int32,
    store_number,
    store_word,
    vector_length,
    word_bytes,
)


@inlined
def _pack(call, space, b, hk, h0, groups, head_groups, i_first, i_end, unit):
    """Mark what each group sees of all keys, and pack these; return the number of keys with values not finite."""
    lanes, word = vector_length(unit), word_bytes(unit)
    most = call.key_tile // lanes
    keys, values = call.k + b * call.k_b + hk * call.k_h, call.v + b * call.v_b + hk * call.v_h
    special = 0
    for j0 in range(0, call.N, call.key_tile):
        j1, tile = min(j0 + call.key_tile, call.N), j0 // call.key_tile
        marks = space + call.marks_at + tile * (groups + 1) * most
        union = marks + groups * most
        clear_marks(union, j1 - j0, lanes)
        if not mark_rows(call, space, marks, b, h0, groups, head_groups, i_first, i_end, j0, j1, unit):
            continue
        for n in range((j1 - j0 + lanes - 1) // lanes):
            if load_byte(union + n):
                first = j0 + n * lanes
                packed = space + call.keys_at + tile * call.keys_bytes + n * lanes * word
                pack_keys(call, space, packed, keys, first, unit)
                if call.out:
                    special = find_special(call, space, values, first, min(first + lanes, j1), first, special, unit)
    if call.out and (special or not call.values_in_place):
        for j0 in range(0, call.N, lanes):
            tile = j0 // call.key_tile
            union = space + call.marks_at + (tile * (groups + 1) + groups) * most
            if load_byte(union + (j0 - tile * call.key_tile) // lanes):
                copy_values(call, space, values, j0, min(j0 + lanes, call.N), j0, unit)
    return special


@inlined
def _fill(call, space, b, h, g, groups, i0, rows, unit):
    """Fill the strip with a group's final scores; return the number of stretches of keys that it sees, listed."""
    lanes, word = vector_length(unit), word_bytes(unit)
    most = call.key_tile // lanes
    queries = space + call.q_at
    runs, tile_runs = space + call.runs_at, space + call.row_runs_at
    listed = 0
    for j0 in range(0, call.N, call.key_tile):
        j1, tile = min(j0 + call.key_tile, call.N), j0 // call.key_tile
        kinds = space + call.marks_at + (tile * (groups + 1) + g) * most
        count = list_runs(tile_runs, kinds, j1 - j0, lanes)
        if count == 0:
            continue
        keys, strip = space + call.keys_at + tile * call.keys_bytes, space + call.scores_at + j0 * word
        if call.hidden:
            hidden = call.hidden + h * call.hidden_h
            additive_scores(call, keys, strip, queries, call.depth, hidden, tile_runs, count, rows, unit)
        else:
            products(call, space, keys, strip, queries, call.depth, call.depth, tile_runs, count, rows, unit)
        edit_scores(call, strip, kinds, b, h, i0, rows, j0, j1, unit)
        for run in range(count):
            store_int32(runs + 8 * listed, j0 + load_int32(tile_runs + 8 * run))
            store_int32(runs + 8 * listed + 4, j0 + load_int32(tile_runs + 8 * run + 4))
            listed += 1
    return listed


@compiled
def _bounds(call, space, runs, listed, rows, unit):
    """Return first and end of the columns that hold all a group sees; others among them get minus infinity.

    Both are multiples of three vectors, so that lanes are the same for every group.
    """
    number, lanes, word = accumulator(unit), vector_length(unit), word_bytes(unit)
    if listed == 0:
        return 0, 0
    step = VECTORS * lanes
    first = load_int32(runs) // step * step
    end = (load_int32(runs + 8 * listed - 4) + step - 1) // step * step
    at = first
    for run in range(listed + 1):
        until = load_int32(runs + 8 * run) if run < listed else end
        if until > at:
            for r in range(rows):
                row_fill(number, space + call.scores_at + (r * call.strip_row + at) * word, until - at, -np.inf)
        if run < listed:
            at = (load_int32(runs + 8 * run + 4) + lanes - 1) // lanes * lanes
    return first, end


@compiled
def _note_seen(call, space, first, end, rows, special, unit):
    """For each key with values not finite, note which rows see it: those whose final score is not minus infinity."""
    number, word = accumulator(unit), word_bytes(unit)
    for n in range(special):
        column = load_int32(space + call.special_at + 4 * n)
        for r in range(rows):
            seen = 0
            if first <= column < end:
                score = load_number(number, space + call.scores_at + (r * call.strip_row + column) * word)
                seen = 0 if score == -np.inf else 1
            store_byte(space + call.seen_at + n * call.group_rows + r, seen)


@inlined
def _write_out(call, space, values, runs, listed, b, h, i0, rows, first, end, special, unit):
    """Weigh the values with a group's weights and write the rows."""
    word = word_bytes(unit)
    strip, row = space + call.scores_at, call.strip_row
    if call.dropout_hook and end > first:
        call_edit(
            call.dropout_hook, strip + first * word, row, b, h, i0, rows, first, min(end, call.N) - first,
            call.parameters,
        )  # fmt: skip
    clear(space + call.out_at, rows * call.value_width, unit)
    if listed:
        weighted_values(call, space, values, runs, listed, 0, rows, 0, special, unit)
    if special:
        add_special(call, space, values, 0, rows, 0, special, unit)
    for r in range(rows):
        out = call.out + b * call.out_b + h * call.out_h + (i0 + r) * call.out_i
        inverse = load_number(np.float64(0.0), space + call.rows_at + 8 * r)
        write_row(out, call.out_e, space + call.out_at + r * call.value_width * word, call.E, inverse, call, unit)


@inlined
def _attend_group(call, space, values, runs, listed, b, h, i0, rows, special, unit):
    """Turn a group's scores into weights, write those and their lse if asked for, and the output."""
    number, word = accumulator(unit), word_bytes(unit)
    first, end = _bounds(call, space, runs, listed, rows, unit)
    if special:
        _note_seen(call, space, first, end, rows, special, unit)
    for r in range(rows):
        row = space + call.scores_at + r * call.strip_row * word
        top = row_largest(number, row + first * word, end - first, type(number)(-np.inf))
        inverse, rest, second, lse = weigh_row(call, space, row, first, end, top, b, h, unit)
        at = (b * call.H + h) * call.M + i0 + r
        if call.lse:
            store_number(number, call.lse + at * word, type(number)(lse))
        if call.row_facts:
            write_facts(call.row_facts + at * 8 * ROW_FACTS, top, rest, second, lse)
        if call.weights:
            normalize_row(row, call.weights + at * call.N * word, first, min(end, call.N), inverse, unit)
        store_number(np.float64(0.0), space + call.rows_at + 8 * r, inverse)
    _write_out(call, space, values, runs, listed, b, h, i0, rows, first, end, special, unit)


@inlined
def _explain_group(call, space, runs, listed, block, b, h, i0, rows, unit):
    """Turn a group's scores into weights and write what is asked for of them."""
    number, word = accumulator(unit), word_bytes(unit)
    first, end = _bounds(call, space, runs, listed, rows, unit)
    strip, step = space + call.scores_at, call.strip_row * word
    for r in range(rows):
        row = strip + r * step
        top = row_largest(number, row + first * word, end - first, type(number)(-np.inf))
        inverse, _, _, _ = weigh_row(call, space, row, first, end, top, b, h, unit)
        normalize_row(row, row, first, end, inverse, unit)
        at = (b * call.H + h) * (call.row_end - call.row_first) + i0 + r - call.row_first
        if call.weights:
            normalize_row(row, call.weights + at * call.N * word, first, min(end, call.N), 1.0, unit)
        if call.entropy:
            store_number(number, call.entropy + at * word, type(number)(entropy_of_row(call, row, first, end, unit)))
        if call.top_keys:
            keys, weights = call.top_keys + at * call.top_count * 8, call.top_weights + at * call.top_count * word
            top_of_row(call, row, first, end, keys, weights, unit)
    if call.sums:
        to = call.sums + ((b * call.H + h) * call.blocks + block) * call.sums_row * word
        add_to_columns(strip, step, rows, to, first, end, unit)


@inlined
def _attend(call, space, item, unit):
    block, b, hk, part = place(call, item)
    served = call.H // call.Hk
    h0 = hk * served + part * call.set_heads
    heads = min(call.set_heads, served - part * call.set_heads)
    i_first = call.row_first + block * call.block_rows
    i_end = min(i_first + call.block_rows, call.row_end)
    head_groups = (i_end - i_first + call.group_rows - 1) // call.group_rows
    groups = heads * head_groups
    values = call.v + b * call.v_b + hk * call.v_h
    for n in range(0, 64, 8):  # nothing to read ahead
        store_word(space + call.ahead_at + n, 0)
    special = _pack(call, space, b, hk, h0, groups, head_groups, i_first, i_end, unit)
    for g in range(groups):
        h, i0 = h0 + g // head_groups, i_first + g % head_groups * call.group_rows
        rows = min(call.group_rows, i_end - i0)
        load_queries(call, space, b, h, 1, 1, i0, i0 + rows, unit)
        listed = _fill(call, space, b, h, g, groups, i0, rows, unit)
        runs = space + call.runs_at
        if call.out:
            _attend_group(call, space, values, runs, listed, b, h, i0, rows, special, unit)
        else:
            _explain_group(call, space, runs, listed, block, b, h, i0, rows, unit)


@inlined
def _work(state, number, unit):
    call = call_of(state)
    space = call.workspace + number * call.workspace_bytes
    while True:
        item = claim(state)
        if item >= call.items:
            return
        _attend(call, space, item, unit)


def _whole_rows_float32(state, number):
    _work(state, number, np.float32(0))


def _whole_rows_float64(state, number):
    _work(state, number, np.float64(0))


# of each unit
WORKERS = {"float32": _whole_rows_float32, "float64": _whole_rows_float64}

"""Gradients of attention: one pass over tiles, five products a tile, O(N) memory, no formula of any rule.

One item is one block of keys of one key head. For each block of query rows of each query head that reads it: scores
(register tiles), hooks, weights from each row's own number (such as its lse), gradients by weights (register tiles),
gradients by scores; then what they add to dv and dk, which the item owns, and to dq.

Each element of a result has one writer at a time, and a fixed order of writers: dk and dv are sums of their item over
blocks of rows, from the last to the first; a row of dq gets what the blocks of keys add to it in the order of the
keys, for an item waits until those before it have passed these rows (`turns.py`). Items go to workers in that order,
all heads' first blocks of keys first, so that there is mostly one that need not wait; or head by head, if so chosen.
Inside a tile sums are in the order that `forward.py` tells of. So a key or a query left out would have added exact
zeros.

The functions below run in compiled workers and check nothing. `unit` is float32 or float64.
"""

from __future__ import annotations

import numpy as np

from attn_numba.cpu.additive import additive_scores
from attn_numba.cpu.gradient_rows import ROW_NUMBERS, add_row_sums, weigh_rows
from attn_numba.cpu.gradient_special import (
    DOUT,
    QUERY,
    add_special_keys,
    add_special_rows,
    clear_special_rows,
    copy_keys,
    load_rows,
)
from attn_numba.cpu.gradient_tiles import turned_tile_1, turned_tile_2, turned_tile_3
from attn_numba.cpu.hidden import add_hidden_to_queries, add_to_hidden, clear_hidden, write_hidden_keys
from attn_numba.cpu.keys import classify, list_runs, pack_rows
from attn_numba.cpu.learned import add_learned
from attn_numba.cpu.rows import clear, compiled, inlined, read_row, write_row
from attn_numba.cpu.softmax import add_products, cut_runs, edit_scores, products
from attn_numba.cpu.state import call_of
from attn_numba.cpu.tiles import (
    CHAIN_VECTORS,
    TILE_ROWS,
    call_edit,
    call_gradient,
    claim,
    load_int32,
    store_byte,
    store_word,
    vector_length,
    word_bytes,
)
from attn_numba.cpu.turns import pass_on, wait_for_heads, wait_for_keys


@compiled
def _pack(call, space, to, rows, step, beside, size, padded, j0, j1, unit):
    lanes, word = vector_length(unit), word_bytes(unit)
    for j in range(j0, j1, lanes):
        pack_rows(call, space, to + (j - j0) * word, rows, step, beside, size, padded, j, unit)


@compiled
def _copy_strip(call, to, source, runs, count, rows, unit):
    word = word_bytes(unit)
    for run in range(count):
        first, end = load_int32(runs + 8 * run), load_int32(runs + 8 * run + 4)
        for r in range(rows):
            at = (r * call.strip_row + first) * word
            read_row(to + at, source + at, word, end - first, call, unit)


@inlined
def _fill(call, space, kinds, runs, count, b, h, i0, rows, j0, j1, unit, others):
    """Fill the strips of scores (edited; as products too where hooks need them) and of gradients by weights."""
    scores, gradients = space + call.scores_at, space + call.gradients_at
    queries, keys = space + call.q_at, space + call.keys_at
    if others is not None and call.hidden:
        hidden = call.hidden + h * call.hidden_h
        additive_scores(call, keys, scores, queries, call.depth_padded, hidden, runs, count, rows, unit)
    else:
        products(call, space, keys, scores, queries, call.depth, call.depth_padded, runs, count, rows, unit)
    if call.pull_hook:
        _copy_strip(call, space + call.raw_at, scores, runs, count, rows, unit)
    edit_scores(call, scores, kinds, b, h, i0, rows, j0, j1, unit)
    packed, width = space + call.values_packed_at, call.value_width
    products(call, space, packed, gradients, space + call.douts_at, call.E, width, runs, count, rows, unit)
    if call.dropout_hook:
        _drop(call, gradients, b, h, i0, rows, j0, j1)


@compiled
def _drop(call, strip, b, h, i0, rows, j0, j1):
    call_edit(call.dropout_hook, strip, call.strip_row, b, h, i0, rows, j0, j1 - j0, call.parameters)


@compiled
def _pull(call, space, runs, count, b, h, i0, rows, j0, j1, unit):
    """Turn gradients by final scores into those by products."""
    word = word_bytes(unit)
    for run in range(count):
        first, end = load_int32(runs + 8 * run), min(load_int32(runs + 8 * run + 4), j1 - j0)
        at = first * word
        call_gradient(
            call.pull_hook, space + call.raw_at + at, space + call.gradients_at + at, space + call.pulled_at + at,
            call.strip_row, b, h, i0, rows, j0 + first, end - first, call.parameters,
        )  # fmt: skip


@compiled
def _turned_products(call, strip, b, width, c, runs, count, rows, unit):
    """C[keys, width] += strip[rows, keys]^T @ B[rows, width] for a tile's stretches of keys."""
    lanes, word = vector_length(unit), word_bytes(unit)
    length = call.strip_row
    e = 0
    while e < width:
        left = (width - e) // lanes
        vectors = 3 if left == 3 or left > 4 else 2 if left > 1 else 1
        right = b + e * word
        for run in range(count):
            end = load_int32(runs + 8 * run + 4)
            for j in range(load_int32(runs + 8 * run), end, TILE_ROWS):
                a, to = strip + j * word, c + (j * width + e) * word
                if vectors == 3:
                    turned_tile_3(unit, a, length, right, width, to, width, rows)
                elif vectors == 2:
                    turned_tile_2(unit, a, length, right, width, to, width, rows)
                else:
                    turned_tile_1(unit, a, length, right, width, to, width, rows)
        e += vectors * lanes


@compiled
def _add_to_queries(call, space, to, runs, count, rows, unit):
    """Add a tile's gradients by scores times rows of K to rows of dq, chain by chain of keys."""
    lanes, word = vector_length(unit), word_bytes(unit)
    width, chain = call.depth_padded, CHAIN_VECTORS * lanes
    stretches = space + call.sums_at
    e = 0
    while e < width:
        left = (width - e) // lanes
        vectors = 3 if left == 3 or left > 4 else 2 if left > 1 else 1
        a, b, c = space + call.pulled_at, space + call.key_rows_at + e * word, to + e * word
        for column in range(load_int32(runs) // chain * chain, load_int32(runs + 8 * count - 4), chain):
            cut = cut_runs(stretches, runs, count, column, column + chain)
            if cut:
                add_products(a, call.strip_row, b, width, c, width, rows, vectors, stretches, cut, unit)
        e += vectors * lanes


@inlined
def _tile(call, space, item, kinds, b, hk, h, i0, rows, j0, j1, special, position, unit, others):
    """Add what one block of rows has to add to the item's dk and dv and, in turn, to its rows of dq."""
    word, runs = word_bytes(unit), space + call.runs_at
    count = list_runs(runs, kinds, j1 - j0, vector_length(unit))
    flags, odd = space + call.flags_at, 0
    for r in range(rows):
        store_byte(flags + r, 0)
    q = call.q + b * call.q_b + h * call.q_h + i0 * call.q_i
    dout = call.dout + b * call.dout_b + h * call.dout_h + i0 * call.dout_i
    queries, douts = space + call.q_at, space + call.douts_at
    odd |= load_rows(call, queries, call.depth_padded, q, call.q_i, call.q_d, call.D, rows, flags, QUERY, unit)
    odd |= load_rows(call, douts, call.value_width, dout, call.dout_i, call.dout_e, call.E, rows, flags, DOUT, unit)
    _fill(call, space, kinds, runs, count, b, h, i0, rows, j0, j1, unit, others)

    first_row = (b * call.H + h) * call.M + i0
    numbers = call.row_numbers + first_row * ROW_NUMBERS * word
    weigh_rows(call, space, runs, count, numbers, rows, unit, others)
    if call.sums_only:
        wait_for_keys(call, item, position)
        add_row_sums(call, space, first_row, rows, unit)
        return
    if call.learned_count:
        add_learned(call, space, runs, count, b, h, i0, rows, j0, j1, True, unit)
    if call.pull_hook:
        _pull(call, space, runs, count, b, h, i0, rows, j0, j1, unit)
    if call.dropout_hook:
        _drop(call, space + call.scores_at, b, h, i0, rows, j0, j1)
    hidden = others is not None and call.hidden
    if hidden:
        add_to_hidden(call, space, runs, count, b, h, rows, item, unit)
    if odd:
        clear_special_rows(call, space, rows, unit)
    dk, dv = space + call.dk_at, space + call.dv_at
    _turned_products(call, space + call.scores_at, douts, call.value_width, dv, runs, count, rows, unit)
    if not hidden:
        _turned_products(call, space + call.pulled_at, queries, call.depth_padded, dk, runs, count, rows, unit)
    if odd:
        add_special_rows(call, space, q, dout, runs, count, rows, not hidden, unit)

    wait_for_keys(call, item, position)
    add_row_sums(call, space, first_row, rows, unit)
    dq = call.dq + ((b * call.H + h) * call.query_rows + i0) * call.depth_padded * word
    if hidden:
        add_hidden_to_queries(call, space, dq, rows, unit)
    else:
        _add_to_queries(call, space, dq, runs, count, rows, unit)
        if special:
            keys = call.k + b * call.k_b + hk * call.k_h + j0 * call.k_j
            add_special_keys(call, space, dq, keys, kinds, special, rows, unit)
    if call.learned_count:
        wait_for_heads(call, item, position)
        add_learned(call, space, runs, count, b, h, i0, rows, j0, j1, False, unit)


@inlined
def _begin(call, space, b, hk, j0, j1, unit, others):
    """Pack the item's keys and values; return the number of keys that are not finite."""
    lanes = vector_length(unit)
    keys, values = call.k + b * call.k_b + hk * call.k_h, call.v + b * call.v_b + hk * call.v_h
    columns = (j1 - j0 + lanes - 1) // lanes * lanes
    _pack(call, space, space + call.keys_at, keys, call.k_j, call.k_d, call.D, call.depth_padded, j0, j1, unit)
    packed = space + call.values_packed_at
    _pack(call, space, packed, values, call.v_j, call.v_e, call.E, call.value_width, j0, j1, unit)
    clear(space + call.dv_at, columns * call.value_width, unit)
    if others is not None and call.hidden:
        clear_hidden(call, space, unit)
        return 0
    clear(space + call.dk_at, columns * call.depth_padded, unit)
    return copy_keys(call, space, keys, j0, j1, unit)


@inlined
def _finish(call, space, b, hk, j0, j1, unit, others):
    """Write the item's rows of dk and dv."""
    word, one = word_bytes(unit), type(unit)(1.0)
    first = (b * call.Hk + hk) * call.N + j0
    for j in range(j1 - j0):
        dv = call.dv + (first + j) * call.E * word
        write_row(dv, word, space + call.dv_at + j * call.value_width * word, call.E, one, call, unit)
    if others is not None and call.hidden:
        write_hidden_keys(call, space, first, j1 - j0, unit)
        return
    for j in range(j1 - j0):
        dk = call.dk + (first + j) * call.D * word
        write_row(dk, word, space + call.dk_at + j * call.depth_padded * word, call.D, one, call, unit)


@inlined
def _attend(call, space, item, unit, others):
    heads = call.B * call.Hk
    block, rest = item // heads, item % heads
    b, hk = rest // call.Hk, rest % call.Hk
    j0 = block * call.key_tile
    j1 = min(j0 + call.key_tile, call.N)
    special = _begin(call, space, b, hk, j0, j1, unit, others)
    kinds, served, position = space + call.marks_at, call.H // call.Hk, 0
    for h in range(hk * served, (hk + 1) * served):
        for n in range(call.row_blocks - 1, -1, -1):
            i0 = n * call.group_rows
            i1 = min(i0 + call.group_rows, call.M)
            if classify(call, kinds, b, h, i0, i1, j0, j1, unit):
                _tile(call, space, item, kinds, b, hk, h, i0, i1 - i0, j0, j1, special, position, unit, others)
            position += 1
            pass_on(call, item, position)
    if not call.sums_only:
        _finish(call, space, b, hk, j0, j1, unit, others)


# As in `forward.py`: what only other normalizers and scores need is pruned where `others` is None.
YES = 1


@inlined
def _work(state, number, unit, others):
    call = call_of(state)
    space = call.workspace + number * call.workspace_bytes
    for n in range(0, 64, 8):  # nothing to read ahead
        store_word(space + call.ahead_at + n, 0)
    while True:
        claimed = claim(state)
        if claimed >= call.items:
            return
        item = claimed
        if call.by_heads:  # an item still comes after those that it waits for
            heads = call.B * call.Hk
            blocks = call.items // heads
            item = claimed % blocks * heads + claimed // blocks
        _attend(call, space, item, unit, others)


def _backward_float32(state, number):
    _work(state, number, np.float32(0), None)


def _backward_others_float32(state, number):
    _work(state, number, np.float32(0), YES)


def _backward_float64(state, number):
    _work(state, number, np.float64(0), None)


def _backward_others_float64(state, number):
    _work(state, number, np.float64(0), YES)


# (unit, others) -> worker
WORKERS = {
    ("float32", False): _backward_float32,
    ("float32", True): _backward_others_float32,
    ("float64", False): _backward_float64,
    ("float64", True): _backward_others_float64,
}

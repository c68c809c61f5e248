"""Strips of four rows, for masks whose rows see short stretches of keys each (neighborhoods on a grid).

Tiles of many rows would compute many times what is allowed. Here four rows that lie side by side go together, against
just the stretches that any of them sees, wherever these begin; each row then keeps its own. The sums have the order
they have elsewhere.
"""

from __future__ import annotations

import numpy as np

from attn_numba.cpu.keys import NONE, SOME, run_end
from attn_numba.cpu.rows import clear, compiled, rounded_up
from attn_numba.cpu.softmax import add_special, list_runs, note_seen, operands_of, softmax
from attn_numba.cpu.tiles import (
    CHAIN_VECTORS,
    STRIP_ROWS,
    VECTORS,
    accumulator,
    advance_rows,
    call_edit,
    call_runs,
    gather_totals,
    is_pairs,
    keep_first,
    load_byte,
    load_int32,
    load_number,
    put_first,
    row_fill,
    row_largest,
    row_scale,
    row_sums,
    row_total,
    store_byte,
    store_int32,
    store_number,
    strip_scores_1,
    strip_scores_2,
    strip_values_1,
    strip_values_2,
    vector_length,
    vector_to_weights,
    word_bytes,
)


@compiled
def begin_strips(call, space, b, h0, groups, head_groups, i_first, i_end):
    """Ask the runs hook what each row of the item sees.

    Rows to spare see nothing. Note each group's first key and last.
    """
    for g in range(groups):
        first, end = call.N, 0
        for r in range(call.group_rows):
            i = i_first + g % head_groups * call.group_rows + r
            at = space + call.row_runs_at + (g * call.group_rows + r) * call.run_count * 8
            if i < i_end:
                call_runs(call.runs_hook, b, h0 + g // head_groups, i, call.run_count, at, call.parameters)
            else:
                for n in range(call.run_count):
                    store_int32(at + 8 * n, call.N)
                    store_int32(at + 8 * n + 4, 0)
            first, end = min(first, load_int32(at)), max(end, load_int32(at + 8 * call.run_count - 4))
        store_int32(space + call.hulls_at + 8 * g, first)
        store_int32(space + call.hulls_at + 8 * g + 4, end)


@compiled
def mark_strips(call, space, union, b, h0, groups, head_groups, i_first, i_end, j0, j1, unit):
    """Mark all vectors of the tile between the first and the last key that any row of the item sees.

    Return 0 if there are none.
    """
    lanes = vector_length(unit)
    first, end = j1, j0
    for g in range(groups):
        first = min(first, max(load_int32(space + call.hulls_at + 8 * g), j0))
        end = max(end, min(load_int32(space + call.hulls_at + 8 * g + 4), j1))
    for n in range((first - j0) // lanes, (end - j0 + lanes - 1) // lanes):
        store_byte(union + n, SOME)
    return 1 if end > first else 0


@compiled
def _list_spans(call, space, kinds, g, rows, j0, j1, lanes, at_once):
    """List the stretches of the tile that the rows of each strip see together; return the most that a strip has.

    They are ascending and apart, in multiples of `at_once` keys. The vectors they touch are marked. For each row its
    own pieces of at most a vector are listed too, as pairs (column, width).
    """
    hull = space + call.hulls_at + 8 * g
    if load_int32(hull) >= j1 or load_int32(hull + 4) <= j0:
        return 0
    for n in range((j1 - j0 + lanes - 1) // lanes):
        store_byte(kinds + n, NONE)
    most = 0
    for s in range((rows + STRIP_ROWS - 1) // STRIP_ROWS):
        most = max(
            most, _list_strip(call, space, kinds, g, s, min(STRIP_ROWS, rows - s * STRIP_ROWS), j0, j1, lanes, at_once)
        )
    return most


@compiled
def _list_strip(call, space, kinds, g, s, rows, j0, j1, lanes, at_once):
    """Make the lists of strip `s`.

    The list of its stretches begins with their number, which is returned, and a zero. Stretches cross no chain of
    sums.
    """
    chain = CHAIN_VECTORS * lanes
    spans = space + call.spans_at + s * call.spans_row
    pieces = space + call.pieces_at + s * STRIP_ROWS * call.pieces_row
    row_runs = space + call.row_runs_at + (g * call.group_rows + s * STRIP_ROWS) * call.run_count * 8
    low, high = call.run_count, 0
    for r in range(rows):
        at = row_runs + r * call.run_count * 8
        n = 0
        while n < call.run_count and load_int32(at + 8 * n + 4) <= j0:
            n += 1
        low = min(low, n)
        n = call.run_count
        while n > low and load_int32(at + 8 * n - 8) >= j1:
            n -= 1
        high = max(high, n)
        store_int32(pieces + r * call.pieces_row, 0)
    count = before = 0
    for n in range(low, high):
        first, end = j1, j0
        for r in range(rows):
            at = row_runs + (r * call.run_count + n) * 8
            one, stop = max(load_int32(at), j0), min(load_int32(at + 4), j1)
            if stop > one:
                first, end = min(first, one), max(end, stop)
                _add_pieces(pieces + r * call.pieces_row, one - j0, stop - j0, lanes)
        first, end = max((first - j0) // at_once * at_once, before), rounded_up(end - j0, at_once)
        while first < end:
            stop = min(end, (first // chain + 1) * chain)
            count += 1
            store_int32(spans + 8 * count, first)
            store_int32(spans + 8 * count + 4, stop)
            for vector in range(first // lanes, (stop + lanes - 1) // lanes):
                store_byte(kinds + vector, SOME)
            first = before = stop
    store_int32(spans, count)
    store_int32(spans + 4, 0)
    return count


@compiled
def _add_pieces(pieces, column, end, lanes):
    """Append columns up to `end` to a row's list, which begins with its length."""
    count = load_int32(pieces)
    while column < end:
        count += 1
        store_int32(pieces + 8 * count, column)
        store_int32(pieces + 8 * count + 4, min(end - column, lanes))
        column += lanes
    store_int32(pieces, count)


@compiled
def _strip_products(call, space, queries, kinds, b, h, i0, rows, j0, j1, unit):
    """Fill the group's scores with modified products wherever a row sees a key; around these, with anything.

    Stretch by stretch through all strips, which lie side by side: the keys they share stay in the first-level cache.
    """
    lanes, word = vector_length(unit), word_bytes(unit)
    vectors = (j1 - j0 + lanes - 1) // lanes
    scores, length = space + call.scores_at, call.strip_row
    most = 0
    for s in range((rows + STRIP_ROWS - 1) // STRIP_ROWS):
        most = max(most, load_int32(space + call.spans_at + s * call.spans_row))
    for n in range(0, most, 2):
        for s in range((rows + STRIP_ROWS - 1) // STRIP_ROWS):
            spans = space + call.spans_at + s * call.spans_row
            count = load_int32(spans)
            if n >= count:
                continue
            a, to = queries + s * STRIP_ROWS * call.depth * word, scores + s * STRIP_ROWS * length * word
            spans += 8 * n + 8
            first, end = load_int32(spans), load_int32(spans + 4)
            other, stop = (load_int32(spans + 8), load_int32(spans + 12)) if n + 1 < count else (0, 0)
            packed = space + call.keys_at
            if 0 < stop - other <= lanes and end - first <= lanes:
                apart = (other - first) * word
                b, c = packed + first * word, to + first * word
                strip_scores_2(unit, a, call.depth, b, call.keys_row, c, length, call.depth, apart)
                continue
            for column in range(first, end, lanes):
                b, c = packed + column * word, to + column * word
                strip_scores_1(unit, a, call.depth, b, call.keys_row, c, length, call.depth)
            for column in range(other, stop, lanes):
                b, c = packed + column * word, to + column * word
                strip_scores_1(unit, a, call.depth, b, call.keys_row, c, length, call.depth)
    if not call.modify_hook:
        return
    n = 0
    while n < vectors:
        end = run_end(kinds, n, vectors)
        if load_byte(kinds + n):
            first, last = j0 + n * lanes, min(j0 + end * lanes, j1)
            at = scores + n * lanes * word
            call_edit(call.modify_hook, at, length, b, h, i0, rows, first, last - first, call.parameters)
        n = end


@compiled
def _strip_values(call, space, values, local, rows, j0, columns, special, unit):
    """Add the weighted values of all strips, chain by chain, two vectors of columns at a time."""
    lanes, word = vector_length(unit), word_bytes(unit)
    width, chain = call.value_width, CHAIN_VECTORS * lanes
    weights, weights_row, base, values_row = operands_of(call, space, values, j0, special, unit)
    for e in range(0, width, 2 * lanes):
        b = base + e * word
        for last in range(chain, columns + chain, chain):
            for s in range((rows + STRIP_ROWS - 1) // STRIP_ROWS):
                spans = space + call.spans_at + s * call.spans_row
                n = load_int32(spans + 4)
                count = load_int32(spans)
                end = n
                while end < count and load_int32(spans + 8 * end + 8) < last:
                    end += 1
                store_int32(spans + 4, end)
                if end == n:
                    continue
                at = spans + 8 * n + 8
                a = weights + s * STRIP_ROWS * weights_row * word
                c = space + call.out_at + ((local + s * STRIP_ROWS) * width + e) * word
                if e + lanes < width:
                    strip_values_2(unit, a, weights_row, b, values_row, c, width, at, end - n)
                else:
                    strip_values_1(unit, a, weights_row, b, values_row, c, width, at, end - n)
        for s in range((rows + STRIP_ROWS - 1) // STRIP_ROWS):
            store_int32(space + call.spans_at + s * call.spans_row + 4, 0)


@compiled
def _put_aside(row, pieces, to, number):
    """Copy the pieces of a row side by side to `to`, each a vector filled up with minus infinity.

    Return their number.
    """
    lanes, word = vector_length(number), word_bytes(number)
    count = load_int32(pieces)
    for n in range(count):
        pieces += 8
        keep_first(number, to + n * lanes * word, row + load_int32(pieces) * word, load_int32(pieces + 4), -np.inf)
    return count


@compiled
def _put_back(row, pieces, source, number):
    """Undo `_put_aside`; what lies around the pieces is left alone."""
    lanes, word = vector_length(number), word_bytes(number)
    for n in range(load_int32(pieces)):
        pieces += 8
        put_first(number, row + load_int32(pieces) * word, source + n * lanes * word, load_int32(pieces + 4))


@compiled
def _exclude_around(call, space, kinds, rows, vectors, unit):
    """Set to minus infinity all scores of a strip's tile that no row sees."""
    number = accumulator(unit)
    lanes, word = vector_length(unit), word_bytes(unit)
    for r in range(rows):
        row, pieces = space + call.scores_at + r * call.strip_row * word, space + call.pieces_at + r * call.pieces_row
        _put_aside(row, pieces, space + call.kept_at, number)
        for n in range(vectors):
            if load_byte(kinds + n):
                row_fill(number, row + n * lanes * word, lanes, -np.inf)
        _put_back(row, pieces, space + call.kept_at, number)


@compiled
def _strip_softmax(call, space, kinds, vectors, g, rows, unit):
    """As `softmax`, for strips: exponentials of the scores put aside, zeros around them, and the same order of sums."""
    number = accumulator(unit)
    lanes, word = vector_length(unit), word_bytes(unit)
    panel = VECTORS * lanes
    strip, length = space + call.scores_at, call.strip_row * word
    state = g * call.state_rows * word
    tops = space + call.rows_at
    shifts, shrinks = tops + call.state_rows * word, tops + 2 * call.state_rows * word
    added = tops + 3 * call.state_rows * word
    pieces, kept, kept_row = space + call.pieces_at, space + call.kept_at, call.pieces_row // 8 * lanes * word
    for r in range(rows):
        count = _put_aside(strip + r * length, pieces + r * call.pieces_row, kept + r * kept_row, number)
        store_number(number, tops + r * word, row_largest(number, kept + r * kept_row, count * lanes, -np.inf))
    factor = type(number)(call.factor)
    advance_rows(number, tops, space + call.largest_at + state, shifts, shrinks, rows, factor)
    sums = space + call.sums_at
    low, high = 0, vectors
    while not load_byte(kinds + low):
        low += 1
    while not load_byte(kinds + high - 1):
        high -= 1
    first = low // VECTORS * panel
    columns = rounded_up(high * lanes - first, panel)
    for r in range(rows):
        clear(strip + r * length + first * word, columns, number)
        count = load_int32(pieces + r * call.pieces_row)
        shift = load_number(number, shifts + r * word)
        vector_to_weights(number, kept + r * kept_row, kept + r * kept_row, sums, count * lanes, factor, shift)
        _put_back(strip + r * length, pieces + r * call.pieces_row, kept + r * kept_row, number)
    for r in range(rows):
        clear(sums, panel, unit)
        row_sums(number, strip + r * length + first * word, sums, columns)
        store_number(number, added + r * word, row_total(number, sums))
        shrink = load_number(number, shrinks + r * word)
        if shrink != 1.0:
            out = space + call.out_at + (g * call.group_rows + r) * call.value_width * word
            row_scale(number, out, call.value_width, shrink)
    gather_totals(number, space + call.total_at + state, shrinks, added, rows)


@compiled
def attend_strips(call, space, values, kinds, queries, b, h, i0, g, rows, j0, j1, special, unit):
    """Attend one group of rows to one tile of keys, strip by strip."""
    if not _list_spans(call, space, kinds, g, rows, j0, j1, vector_length(unit), 1 + is_pairs(unit)):
        return
    vectors = (j1 - j0 + vector_length(unit) - 1) // vector_length(unit)
    _strip_products(call, space, queries, kinds, b, h, i0, rows, j0, j1, unit)
    if special or is_pairs(unit):
        runs = space + call.runs_at
        _exclude_around(call, space, kinds, rows, vectors, unit)
        if special:
            note_seen(call, space, kinds, rows, special, unit)
        softmax(call, space, runs, list_runs(runs, kinds, j1 - j0, vector_length(unit)), g, rows, unit)
    else:
        _strip_softmax(call, space, kinds, vectors, g, rows, unit)
    if call.dropout_hook:
        at = space + call.scores_at
        call_edit(call.dropout_hook, at, call.strip_row, b, h, i0, rows, j0, j1 - j0, call.parameters)
    _strip_values(call, space, values, g * call.group_rows, rows, j0, j1 - j0, special, unit)
    if special:
        add_special(call, space, values, g * call.group_rows, rows, j0, special, unit)


@compiled
def score_strips(call, space, kinds, queries, b, h, i0, g, rows, j0, j1, unit):
    """Fill the group's scores of a tile, minus infinity where no row sees a key; return 0 if it sees nothing of it."""
    count = _list_spans(call, space, kinds, g, rows, j0, j1, vector_length(unit), 1 + is_pairs(unit))
    if count:
        _strip_products(call, space, queries, kinds, b, h, i0, rows, j0, j1, unit)
        vectors = (j1 - j0 + vector_length(unit) - 1) // vector_length(unit)
        _exclude_around(call, space, kinds, rows, vectors, unit)
    return count

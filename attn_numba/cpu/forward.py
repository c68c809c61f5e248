"""Attention forward: tiles of queries and keys, a running softmax, O(N) memory, no formula of any mask or modifier.

One item is one block of query rows of one head (or of several heads that share a key head, where a head has few rows). For each
tile of keys an item asks the tile hook which panels of keys its groups of rows see, packs those keys transposed, and then, group by
group: scores (register tiles), hooks on the scores, weights against the running row maximum, weighted values (register tiles).

Same bits whatever is skipped: key tiles begin at fixed multiples of `key_tile`, a score is one chain of multiply-adds over the head
size, a row's weights are added in fixed lanes (key number modulo three vectors) and folded once per key tile, weighted values are
chains over fixed blocks of keys (12 vectors), added up block by block. A key left out would have added an exact zero.

A key that is not allowed has weight 0, but 0 times NaN is NaN: rows of V that are not finite are set to zero for the register tiles
and then added to the rows that see them, one by one.

The functions below run in compiled workers and check nothing. `unit` says what is multiplied, see `tiles.py`.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, types

from attn_numba.cpu import tiles as t
from attn_numba.cpu.state import call_of

NONE, SOME, ALL = 0, 1, 2
ROWS, VECTORS, STRIP_ROWS, CHAIN_VECTORS = t.TILE_ROWS, t.VECTORS, t.STRIP_ROWS, t.CHAIN_VECTORS
SAME, HALF_FLOAT = t.SAME, t.HALF_FLOAT
LN2 = math.log(2.0)

call_edit, call_kind, call_runs, claim = t.call_edit, t.call_kind, t.call_runs, t.claim
exp2, load_number, store_number = t.exp2_number, t.load_number, t.store_number
vector_length, word_bytes, is_pairs, accumulator = t.vector_length, t.word_bytes, t.is_pairs, t.accumulator
load_byte, store_byte, load_int32, store_int32 = t.load_byte, t.store_byte, t.load_int32, t.store_int32
row_largest, row_total, row_scale, row_fill = t.row_largest, t.row_total, t.row_scale, t.row_fill
triples_to_weights, vector_to_weights = t.triples_to_weights, t.vector_to_weights
advance_rows, gather_totals = t.advance_rows, t.gather_totals
row_is_finite, interleave, transpose = t.row_is_finite, t.interleave, t.transpose
score_tile_3, score_tile_2, score_tile_1 = t.score_tile_3, t.score_tile_2, t.score_tile_1
score_row_3, score_row_1 = t.score_row_3, t.score_row_1
strip_scores, strip_values_2, strip_values_1 = t.strip_scores, t.strip_values_2, t.strip_values_1
keep_first, put_first, row_sums, normalized = t.keep_first, t.put_first, t.row_sums, t.normalized
value_tile_3, value_tile_2, value_tile_1 = t.value_tile_3, t.value_tile_2, t.value_tile_1
value_row_3, value_row_2, value_row_1 = t.value_row_3, t.value_row_2, t.value_row_1
read_vector, read_half_vector, read_brain_vector = t.read_vector, t.read_half_vector, t.read_brain_vector
read_number, read_half_number, read_brain_number = t.read_number, t.read_half_number, t.read_brain_number
write_vector, write_half_vector, write_brain_vector = t.write_vector, t.write_half_vector, t.write_brain_vector
write_number, write_half_number, write_brain_number = t.write_number, t.write_half_number, t.write_brain_number

# Numbers may be contracted into multiply-adds and zeros lose their sign; sums are never reordered, NaN and infinity never assumed away.
options = {"nogil": True, "fastmath": {"nsz", "contract"}, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
compiled = njit(**options)
inlined = njit(**options, inline="always")  # into their one caller: LLVM then works through the code below them once less


@compiled
def _rounded_up(x, multiple):
    return (x + multiple - 1) // multiple * multiple


# -- Reading and writing rows --------------------------------------------------------------------------------------------------


@compiled
def _read_row(to, source, step, count, call, unit):
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
def _write_row(to, step, source, count, factor, call, number):
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


@compiled
def _clear(at, count, unit):
    """Zero `count` words (whole vectors)."""
    number = accumulator(unit)
    row_fill(number, at, count, number)


# -- What a tile of keys means to an item --------------------------------------------------------------------------------------


@compiled
def _classify(call, kinds, b, h, i0, i1, j0, j1, unit):
    """Write NONE, SOME or ALL for each vector of keys of the tile as rows i0 to i1 see it; return 0 if none is seen.

    The question is put for the whole tile, then for panels, then for single vectors, as long as the answer is SOME.
    """
    lanes = vector_length(unit)
    vectors = (j1 - j0 + lanes - 1) // lanes
    kind = ALL
    if call.tile_hook:
        kind = call_kind(call.tile_hook, b, h, i0, i1, j0, j1, call.parameters)
    seen = 0
    for p in range(0, vectors, VECTORS):
        first, last = p, min(p + VECTORS, vectors)
        one = kind
        if kind == SOME:
            one = call_kind(call.tile_hook, b, h, i0, i1, j0 + first * lanes, min(j0 + last * lanes, j1), call.parameters)
        for n in range(first, last):
            each = one
            if one == SOME:
                at = j0 + n * lanes
                each = call_kind(call.tile_hook, b, h, i0, i1, at, min(at + lanes, j1), call.parameters)
            store_byte(kinds + n, each)
            seen |= each
    return seen


@compiled
def _pack_keys(call, space, keys, number, j0, unit):
    """Transpose one vector of keys, vector `number` of the tile: word d of key n goes to (d, n). Keys beyond the last are zero."""
    lanes, word = vector_length(unit), word_bytes(unit)
    to = space + call.keys_at + number * lanes * word
    scratch = space + call.scratch_at
    row = call.depth_padded * word
    whole = (call.kind == SAME or is_pairs(unit)) and call.k_d == call.itemsize and call.D * call.itemsize == row
    source, source_row = keys + j0 * call.k_j, call.k_j
    if not whole or j0 + lanes > call.N:
        for n in range(lanes):
            _clear(scratch + n * row, call.depth_padded, unit)
            if j0 + n < call.N:
                _read_row(scratch + n * row, keys + (j0 + n) * call.k_j, call.k_d, call.D, call, unit)
        source, source_row = scratch, row
    for d in range(0, call.depth_padded, lanes):
        transpose(unit, source + d * word, source_row, to + d * call.keys_row * word, call.keys_row * word)


@compiled
def _mark_runs(call, space, union, rows, j0, j1, lanes):
    """Mark all vectors of the tile between the first and the last key that any row of the item sees; return 0 if there are none."""
    first, end = j1, j0
    for r in range(rows):
        at = space + call.row_runs_at + r * call.run_count * 8
        first = min(first, max(load_int32(at), j0))
        end = max(end, min(load_int32(at + 8 * call.run_count - 4), j1))
    for n in range((first - j0) // lanes, (end - j0 + lanes - 1) // lanes):
        store_byte(union + n, SOME)
    return 1 if end > first else 0


@compiled
def _copy_values(call, space, values, j0, j1, column, unit):
    """Copy values j0 to j1 to the workspace, from column `column` of the tile on, rows that are not finite as zeros."""
    word = word_bytes(unit)
    row = call.value_width * word
    if is_pairs(unit):
        scratch, half = space + call.scratch_at, _rounded_up(call.value_width * 2, vector_length(unit) * word)
        for j in range(j0, j1, 2):
            _clear(scratch, 2 * half // word, unit)
            for n in range(min(2, j1 - j)):
                _read_row(scratch + n * half, values + (j + n) * call.v_j, call.v_e, call.E, call, unit)
                if not row_is_finite(unit, scratch + n * half, half // word):
                    _clear(scratch + n * half, half // word, unit)
            to = space + call.values_at + (column + j - j0) // 2 * row
            interleave(unit, to, scratch, scratch + half, call.value_width)
        return
    for j in range(j0, j1):
        to = space + call.values_at + (column + j - j0) * row
        _clear(to, call.value_width, unit)
        _read_row(to, values + j * call.v_j, call.v_e, call.E, call, unit)
        if not row_is_finite(unit, to, call.value_width):
            _clear(to, call.value_width, unit)


@compiled
def _find_special(call, space, values, j0, j1, column, count, unit):
    """Append to the list of special keys those of j0 to j1 whose values are not all finite; return its new length."""
    word = word_bytes(unit)
    scratch = space + call.scratch_at
    row = _rounded_up(call.E * (2 if is_pairs(unit) else word), vector_length(unit) * word) // word
    for j in range(j0, j1):
        at = values + j * call.v_j
        if not call.values_in_place:
            _clear(scratch, row, unit)
            _read_row(scratch, at, call.v_e, call.E, call, unit)
            at = scratch
        if not row_is_finite(unit, at, row):
            store_int32(space + call.special_at + 4 * count, column + j - j0)
            count += 1
    return count


@compiled
def _prepare_tile(call, space, b, hk, h0, groups, head_groups, i_first, i_end, j0, j1, unit):
    """Classify the tile for all groups and pack the keys that any of them sees; return -1 if none does, else the number of special
    keys."""
    lanes = vector_length(unit)
    vectors = (j1 - j0 + lanes - 1) // lanes
    kinds = space + call.kinds_at
    most = call.key_tile // lanes
    union = kinds + groups * most
    for n in range(vectors):
        store_byte(union + n, NONE)
    seen = 0
    if call.runs_hook:
        seen = _mark_runs(call, space, union, groups * call.group_rows, j0, j1, lanes)
    for g in range(0 if call.runs_hook else groups):
        i0 = i_first + g % head_groups * call.group_rows
        i1 = min(i0 + call.group_rows, i_end)
        seen |= _classify(call, kinds + g * most, b, h0 + g // head_groups, i0, i1, j0, j1, unit)
        for n in range(vectors):
            store_byte(union + n, load_byte(union + n) | load_byte(kinds + g * most + n))
    if not seen:
        return -1
    keys = call.k + b * call.k_b + hk * call.k_h
    values = call.v + b * call.v_b + hk * call.v_h
    special = 0
    for n in range(vectors):
        if load_byte(union + n):
            first = j0 + n * lanes
            _pack_keys(call, space, keys, n, first, unit)
            special = _find_special(call, space, values, first, min(first + lanes, j1), n * lanes, special, unit)
    if special or not call.values_in_place:
        for n in range(vectors):
            if load_byte(union + n):
                first = j0 + n * lanes
                _copy_values(call, space, values, first, min(first + lanes, j1), n * lanes, unit)
    return special


# -- One group of rows against one tile of keys --------------------------------------------------------------------------------


@compiled
def _tiled_rows(rows):
    """How many rows to give to register tiles: one or two rows left over go one by one, more fill a tile (with rows to spare)."""
    over = rows % ROWS
    return rows - over + (ROWS if over > 2 else 0)


@compiled
def _run_end(kinds, n, vectors):
    """The end of the run of vectors from n on that have the same kind."""
    kind = load_byte(kinds + n)
    n += 1
    while n < vectors and load_byte(kinds + n) == kind:
        n += 1
    return n


@compiled
def _list_runs(runs, kinds, columns, lanes):
    """List the stretches of keys that are seen, as pairs (first, end) that begin at whole vectors and cross no chain of sums; return
    their number."""
    vectors = (columns + lanes - 1) // lanes
    count = n = 0
    while n < vectors:
        if load_byte(kinds + n):
            store_int32(runs + 8 * count, n * lanes)
            chain = (n // CHAIN_VECTORS + 1) * CHAIN_VECTORS
            while n < min(vectors, chain) and load_byte(kinds + n):
                n += 1
            store_int32(runs + 8 * count + 4, min(n * lanes, columns))
            count += 1
        else:
            n += 1
    return count


@compiled
def _chain_end(runs, n, count, chain):
    """The end of the stretches from n on that belong to the same chain of sums."""
    last = (load_int32(runs + 8 * n) // chain + 1) * chain
    while n < count and load_int32(runs + 8 * n) < last:
        n += 1
    return n


@compiled
def _products(call, space, queries, first, end, rows, unit):
    """Fill columns `first` to `end` (whole vectors) of the strip with q . k, three vectors at a time, two or one at the end."""
    lanes, word = vector_length(unit), word_bytes(unit)
    length, depth, keys_row = call.strip_row, call.depth, call.keys_row
    tiled = _tiled_rows(rows)
    for column in range(first, end, VECTORS * lanes):
        packed = space + call.keys_at + column * word
        strip = space + call.scores_at + column * word
        left = min((end - column + lanes - 1) // lanes, VECTORS)
        for r in range(0, tiled, ROWS):
            a, to = queries + r * depth * word, strip + r * length * word
            if left == 3:
                score_tile_3(unit, a, depth, packed, keys_row, to, length, depth)
            elif left == 2:
                score_tile_2(unit, a, depth, packed, keys_row, to, length, depth)
            else:
                score_tile_1(unit, a, depth, packed, keys_row, to, length, depth)
        for r in range(tiled, rows):
            a, to = queries + r * depth * word, strip + r * length * word
            if left == 3:
                score_row_3(unit, a, depth, packed, keys_row, to, length, depth)
            else:
                for n in range(left):
                    score_row_1(unit, a, depth, packed + n * lanes * word, keys_row, to + n * lanes * word, length, depth)


@compiled
def _scores(call, space, queries, kinds, runs, count, b, h, i0, rows, j0, j1, unit):
    """Fill the strip of scores: products, then the hooks, then minus infinity beyond the last key."""
    number = accumulator(unit)
    lanes, word = vector_length(unit), word_bytes(unit)
    vectors = (j1 - j0 + lanes - 1) // lanes
    strip, length = space + call.scores_at, call.strip_row
    for run in range(count):
        _products(call, space, queries, load_int32(runs + 8 * run), load_int32(runs + 8 * run + 4), rows, unit)
    n = 0
    while n < vectors:
        end = _run_end(kinds, n, vectors)
        kind = load_byte(kinds + n)
        hook = call.edit_hook if kind == SOME else call.modify_hook
        if kind != NONE and hook:
            first, last = j0 + n * lanes, min(j0 + end * lanes, j1)
            call_edit(hook, strip + n * lanes * word, length, b, h, i0, rows, first, last - first, call.parameters)
        n = end
    for r in range(rows):
        for j in range(j1 - j0, vectors * lanes):
            store_number(number, strip + (r * length + j) * word, -np.inf)


# -- Strips: a few rows that see short stretches of keys each ------------------------------------------------------------------


@compiled
def _load_runs(call, space, b, h0, groups, head_groups, i_first, i_end):
    """Ask the runs hook what each row of the item sees; rows to spare see nothing."""
    for g in range(groups):
        for r in range(call.group_rows):
            i = i_first + g % head_groups * call.group_rows + r
            at = space + call.row_runs_at + (g * call.group_rows + r) * call.run_count * 8
            if i < i_end:
                call_runs(call.runs_hook, b, h0 + g // head_groups, i, call.run_count, at, call.parameters)
            else:
                for n in range(call.run_count):
                    store_int32(at + 8 * n, call.N)
                    store_int32(at + 8 * n + 4, 0)


@compiled
def _list_spans(call, space, kinds, g, rows, j0, j1, lanes):
    """For each strip of the group, list the stretches of the tile that its rows see together, ascending and apart; for each row, its
    own pieces of at most a vector, as pairs (column, width). Mark the vectors they touch; return the most stretches of a strip."""
    for n in range((j1 - j0 + lanes - 1) // lanes):
        store_byte(kinds + n, NONE)
    most = 0
    for s in range((rows + STRIP_ROWS - 1) // STRIP_ROWS):
        most = max(most, _list_strip(call, space, kinds, g, s, min(STRIP_ROWS, rows - s * STRIP_ROWS), j0, j1, lanes))
    return most


@compiled
def _list_strip(call, space, kinds, g, s, rows, j0, j1, lanes):
    """Make the lists of strip `s`; the list of its stretches begins with their number, which is returned, and a zero. Stretches cross
    no chain of sums."""
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
        first, end = max(first - j0, before), end - j0
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
def _strip_products(call, space, queries, kinds, most, b, h, i0, rows, j0, j1, unit):
    """Fill the group's scores with modified products wherever a row sees a key; around these, with anything.

    Stretch by stretch through all strips, which lie side by side: the keys they share stay in the first-level cache.
    """
    lanes, word = vector_length(unit), word_bytes(unit)
    vectors = (j1 - j0 + lanes - 1) // lanes
    scores, length = space + call.scores_at, call.strip_row
    for n in range(most):
        for s in range((rows + STRIP_ROWS - 1) // STRIP_ROWS):
            spans = space + call.spans_at + s * call.spans_row
            if n < load_int32(spans):
                a, to = queries + s * STRIP_ROWS * call.depth * word, scores + s * STRIP_ROWS * length * word
                for column in range(load_int32(spans + 8 * n + 8), load_int32(spans + 8 * n + 12), lanes):
                    packed = space + call.keys_at + column * word
                    strip_scores(unit, a, call.depth, packed, call.keys_row, to + column * word, length, call.depth)
    if not call.modify_hook:
        return
    n = 0
    while n < vectors:
        end = _run_end(kinds, n, vectors)
        if load_byte(kinds + n):
            first, last = j0 + n * lanes, min(j0 + end * lanes, j1)
            at = scores + n * lanes * word
            call_edit(call.modify_hook, at, length, b, h, i0, rows, first, last - first, call.parameters)
        n = end


@compiled
def _strip_values(call, space, weights, weights_row, values, values_row, local, rows, columns, unit):
    """Add the weighted values of all strips, chain by chain, two vectors of columns at a time."""
    lanes, word = vector_length(unit), word_bytes(unit)
    width, chain = call.value_width, CHAIN_VECTORS * lanes
    for e in range(0, width, 2 * lanes):
        b = values + e * word
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
    """Copy the pieces of a row side by side to `to`, each a vector filled up with minus infinity; return their number."""
    lanes, word = vector_length(number), word_bytes(number)
    count = load_int32(pieces)
    for n in range(count):
        pieces += 8
        keep_first(number, to + n * lanes * word, row + load_int32(pieces) * word, load_int32(pieces + 4), -np.inf)
    return count


@compiled
def _put_back(row, pieces, source, number):
    """The reverse of `_put_aside`; what lies around the pieces is left alone."""
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
    """As `_softmax`, for strips: exponentials of the scores put aside, zeros around them, and the same order of sums."""
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
    columns = _rounded_up(high * lanes - first, panel)
    for r in range(rows):
        _clear(strip + r * length + first * word, columns, number)
        count = load_int32(pieces + r * call.pieces_row)
        shift = load_number(number, shifts + r * word)
        vector_to_weights(number, kept + r * kept_row, kept + r * kept_row, sums, count * lanes, factor, shift)
        _put_back(strip + r * length, pieces + r * call.pieces_row, kept + r * kept_row, number)
    for r in range(rows):
        _clear(sums, panel, unit)
        row_sums(number, strip + r * length + first * word, sums, columns)
        store_number(number, added + r * word, row_total(number, sums))
        shrink = load_number(number, shrinks + r * word)
        if shrink != 1.0:
            out = space + call.out_at + (g * call.group_rows + r) * call.value_width * word
            row_scale(number, out, call.value_width, shrink)
    gather_totals(number, space + call.total_at + state, shrinks, added, rows)


# -- Weights and values --------------------------------------------------------------------------------------------------------


@compiled
def _note_seen(call, space, kinds, rows, special, unit):
    """For each special key, note which rows see it: those whose final score is not minus infinity."""
    number = accumulator(unit)
    word, lanes = word_bytes(unit), vector_length(unit)
    for n in range(special):
        column = load_int32(space + call.special_at + 4 * n)
        for r in range(rows):
            seen = 0
            if load_byte(kinds + column // lanes):
                score = load_number(number, space + call.scores_at + (r * call.strip_row + column) * word)
                seen = 0 if score == -np.inf else 1
            store_byte(space + call.seen_at + n * call.group_rows + r, seen)


@compiled
def _row_to_weights(row, weights, sums, runs, count, factor, shift, unit):
    """Turn a row of scores into weights where keys are seen; vector n adds to the partial sums n modulo 3."""
    lanes, word = vector_length(unit), word_bytes(unit)
    width = 2 if is_pairs(unit) else word
    for run in range(count):
        n = load_int32(runs + 8 * run) // lanes
        end = (load_int32(runs + 8 * run + 4) + lanes - 1) // lanes
        while n < end:
            a, to, total = row + n * lanes * word, weights + n * lanes * width, sums + n % VECTORS * lanes * word
            if n % VECTORS == 0 and n + VECTORS <= end:
                whole = (end - n) // VECTORS * VECTORS
                triples_to_weights(unit, a, to, total, whole * lanes, factor, shift)
                n += whole
            else:
                vector_to_weights(unit, a, to, total, lanes, factor, shift)
                n += 1


@compiled
def _softmax(call, space, runs, count, g, rows, unit):
    """Turn scores into weights against the running maximum; rescale what the rows have summed so far."""
    number = accumulator(unit)
    lanes, word = vector_length(unit), word_bytes(unit)
    strip, length = space + call.scores_at, call.strip_row
    state = g * call.state_rows * word
    tops = space + call.rows_at
    shifts, shrinks = tops + call.state_rows * word, tops + 2 * call.state_rows * word
    added = tops + 3 * call.state_rows * word
    for r in range(rows):
        top = type(number)(-np.inf)
        for run in range(count):
            first, end = load_int32(runs + 8 * run), load_int32(runs + 8 * run + 4)
            columns = (end - first + lanes - 1) // lanes * lanes
            top = row_largest(number, strip + (r * length + first) * word, columns, top)
        store_number(number, tops + r * word, top)
    factor = type(number)(call.factor)
    advance_rows(number, tops, space + call.largest_at + state, shifts, shrinks, rows, factor)
    sums = space + call.sums_at
    for r in range(rows):
        row = strip + r * length * word
        weights = space + call.pairs_at + r * length * 2 if is_pairs(unit) else row
        _clear(sums, VECTORS * lanes, unit)
        _row_to_weights(row, weights, sums, runs, count, factor, load_number(number, shifts + r * word), unit)
        store_number(number, added + r * word, row_total(number, sums))
        shrink = load_number(number, shrinks + r * word)
        if shrink != 1.0:
            out = space + call.out_at + (g * call.group_rows + r) * call.value_width * word
            row_scale(number, out, call.value_width, shrink)
    gather_totals(number, space + call.total_at + state, shrinks, added, rows)


@compiled
def _weighted_values(call, space, values, runs, count, local, rows, j0, special, unit):
    """Add the tile's weighted values to the rows' sums: three vectors of columns at a time, two or one at the end."""
    lanes, word = vector_length(unit), word_bytes(unit)
    base, values_row = space + call.values_at, call.value_width
    if call.values_in_place and not special:
        base, values_row = values + j0 * call.v_j, call.v_j // word
    weights, weights_row = space + call.scores_at, call.strip_row
    if is_pairs(unit):
        weights, weights_row = space + call.pairs_at, call.strip_row // 2
    if call.runs_hook:
        _strip_values(call, space, weights, weights_row, base, values_row, local, rows, min(call.key_tile, call.N - j0), unit)
        return
    width = call.value_width
    tiled = _tiled_rows(rows)
    e = 0
    while e < width:
        left = (width - e) // lanes
        vectors = 3 if left == 3 or left > 4 else 2 if left > 1 else 1
        b = base + e * word
        c = space + call.out_at + (local * width + e) * word
        n = 0
        while n < count:
            end = _chain_end(runs, n, count, CHAIN_VECTORS * lanes)
            at = runs + 8 * n
            for r in range(0, tiled, ROWS):
                a, to = weights + r * weights_row * word, c + r * width * word
                if vectors == 3:
                    value_tile_3(unit, a, weights_row, b, values_row, to, width, at, end - n)
                elif vectors == 2:
                    value_tile_2(unit, a, weights_row, b, values_row, to, width, at, end - n)
                else:
                    value_tile_1(unit, a, weights_row, b, values_row, to, width, at, end - n)
            for r in range(tiled, rows):
                a, to = weights + r * weights_row * word, c + r * width * word
                if vectors == 3:
                    value_row_3(unit, a, weights_row, b, values_row, to, width, at, end - n)
                elif vectors == 2:
                    value_row_2(unit, a, weights_row, b, values_row, to, width, at, end - n)
                else:
                    value_row_1(unit, a, weights_row, b, values_row, to, width, at, end - n)
            n = end
        e += vectors * lanes


@compiled
def _add_special(call, space, values, local, rows, j0, special, unit):
    """Add the values that are not finite to the rows that see them: NaN and infinity reach those rows and no other."""
    number = accumulator(unit)
    word = word_bytes(unit)
    scratch = space + call.scratch_at
    for n in range(special):
        column = load_int32(space + call.special_at + 4 * n)
        for r in range(rows):
            if not load_byte(space + call.seen_at + n * call.group_rows + r):
                continue
            if is_pairs(unit):
                read_brain_number(number, scratch, space + call.pairs_at + (r * call.strip_row + column) * 2)
                weight = load_number(number, scratch)
            else:
                weight = load_number(number, space + call.scores_at + (r * call.strip_row + column) * word)
            at = space + call.out_at + (local + r) * call.value_width * word
            for e in range(call.E):
                _read_row(scratch, values + (j0 + column) * call.v_j + e * call.v_e, call.v_e, 1, call, number)
                store_number(number, at + e * word, load_number(number, at + e * word) + weight * load_number(number, scratch))


# -- One item ------------------------------------------------------------------------------------------------------------------


@compiled
def _load_queries(call, space, b, h0, groups, head_groups, i_first, i_end, unit):
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
                _read_row(to, source + (i0 + r) * call.q_i, call.q_d, call.D, call, unit)


@compiled
def _reset(call, space, groups, unit):
    number = accumulator(unit)
    row_fill(number, space + call.largest_at, groups * call.state_rows, -np.inf)
    _clear(space + call.total_at, groups * call.state_rows, unit)
    _clear(space + call.out_at, groups * call.group_rows * call.value_width, unit)


@compiled
def _finish(call, space, b, h, i0, g, rows, unit):
    """Add the sink, divide by the total, write the result rows and their lse; leave 1 / total for the weights."""
    number = accumulator(unit)
    word = word_bytes(unit)
    for r in range(rows):
        state = (g * call.state_rows + r) * word
        largest = load_number(number, space + call.largest_at + state)
        total = load_number(number, space + call.total_at + state)
        shrink = type(number)(1.0)
        if call.sink:
            sink = load_number(number, call.sink + (b * call.H + h) * word)
            if sink > -np.inf:
                new = max(largest, sink)
                shrink = exp2(number, largest - new)
                total = total * shrink + exp2(number, sink - new)
                largest = new
        inverse = type(number)(0.0)
        if total != 0.0:
            inverse = shrink / total
        out = call.out + b * call.out_b + h * call.out_h + (i0 + r) * call.out_i
        source = space + call.out_at + (g * call.group_rows + r) * call.value_width * word
        _write_row(out, call.out_e, source, call.E, inverse, call, number)
        if call.lse:
            value = type(number)(-np.inf)
            if total != 0.0:
                value = (largest + np.log2(total)) * type(number)(LN2)
            store_number(number, call.lse + ((b * call.H + h) * call.M + i0 + r) * word, value)
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
        if largest == -np.inf:
            continue
        to = call.weights + (((b * call.H + h) * call.M + i0 + r) * call.N + j0) * word
        row = space + call.scores_at + r * call.strip_row * word
        for n in range((j1 - j0 + lanes - 1) // lanes):
            if load_byte(kinds + n):
                at, left = n * lanes, min(lanes, j1 - j0 - n * lanes)
                normalized(number, row + at * word, to + at * word, left, factor, largest, inverse)


@inlined
def _attend(call, space, item, unit):
    sets = call.B * call.Hk * call.head_sets
    block, rest = call.blocks - 1 - item // sets, item % sets
    b, rest = rest // (call.Hk * call.head_sets), rest % (call.Hk * call.head_sets)
    hk, part = rest // call.head_sets, rest % call.head_sets
    served = call.H // call.Hk
    h0 = hk * served + part * call.set_heads
    heads = min(call.set_heads, served - part * call.set_heads)
    i_first = block * call.block_rows
    i_end = min(i_first + call.block_rows, call.M)
    head_groups = (i_end - i_first + call.group_rows - 1) // call.group_rows
    groups = heads * head_groups

    lanes = vector_length(unit)
    most = call.key_tile // lanes
    values = call.v + b * call.v_b + hk * call.v_h
    _load_queries(call, space, b, h0, groups, head_groups, i_first, i_end, unit)
    _reset(call, space, groups, unit)
    if call.runs_hook:
        _load_runs(call, space, b, h0, groups, head_groups, i_first, i_end)
    for j0 in range(0, call.N, call.key_tile):
        j1 = min(j0 + call.key_tile, call.N)
        special = _prepare_tile(call, space, b, hk, h0, groups, head_groups, i_first, i_end, j0, j1, unit)
        if special < 0:
            continue
        for g in range(groups):
            h, i0 = h0 + g // head_groups, i_first + g % head_groups * call.group_rows
            local, rows = g * call.group_rows, min(call.group_rows, i_end - i0)
            kinds, runs = space + call.kinds_at + g * most, space + call.runs_at
            queries = space + call.q_at + local * call.depth * word_bytes(unit)
            vectors = (j1 - j0 + lanes - 1) // lanes
            if call.runs_hook:
                stretches = _list_spans(call, space, kinds, g, rows, j0, j1, lanes)
                if not stretches:
                    continue
                _strip_products(call, space, queries, kinds, stretches, b, h, i0, rows, j0, j1, unit)
                if special or is_pairs(unit):
                    _exclude_around(call, space, kinds, rows, vectors, unit)
                    count = _list_runs(runs, kinds, j1 - j0, lanes)
            else:
                count = stretches = _list_runs(runs, kinds, j1 - j0, lanes)
                if not count:
                    continue
                _scores(call, space, queries, kinds, runs, count, b, h, i0, rows, j0, j1, unit)
            if special:
                _note_seen(call, space, kinds, rows, special, unit)
            if call.runs_hook and not special and not is_pairs(unit):
                _strip_softmax(call, space, kinds, vectors, g, rows, unit)
            else:
                _softmax(call, space, runs, count, g, rows, unit)
            if call.dropout_hook:
                at = space + call.scores_at
                call_edit(call.dropout_hook, at, call.strip_row, b, h, i0, rows, j0, j1 - j0, call.parameters)
            _weighted_values(call, space, values, runs, stretches, local, rows, j0, special, unit)
            if special:
                _add_special(call, space, values, local, rows, j0, special, unit)
    for g in range(groups):
        i0 = i_first + g % head_groups * call.group_rows
        rows = min(call.group_rows, i_end - i0)
        _finish(call, space, b, h0 + g // head_groups, i0, g, rows, unit)
    if call.weights:
        _attend_weights(call, space, b, hk, h0, groups, head_groups, i_first, i_end, unit)


@compiled
def _attend_weights(call, space, b, hk, h0, groups, head_groups, i_first, i_end, unit):
    """Compute the scores a second time, now that each row's maximum and total are known, and write the weights."""
    most = call.key_tile // vector_length(unit)
    for j0 in range(0, call.N, call.key_tile):
        j1 = min(j0 + call.key_tile, call.N)
        if _prepare_tile(call, space, b, hk, h0, groups, head_groups, i_first, i_end, j0, j1, unit) < 0:
            continue
        for g in range(groups):
            h, i0 = h0 + g // head_groups, i_first + g % head_groups * call.group_rows
            local, rows = g * call.group_rows, min(call.group_rows, i_end - i0)
            kinds, runs = space + call.kinds_at + g * most, space + call.runs_at
            queries = space + call.q_at + local * call.depth * word_bytes(unit)
            if call.runs_hook:
                count = _list_spans(call, space, kinds, g, rows, j0, j1, vector_length(unit))
                if not count:
                    continue
                _strip_products(call, space, queries, kinds, count, b, h, i0, rows, j0, j1, unit)
                _exclude_around(call, space, kinds, rows, (j1 - j0 + vector_length(unit) - 1) // vector_length(unit), unit)
            else:
                count = _list_runs(runs, kinds, j1 - j0, vector_length(unit))
                _scores(call, space, queries, kinds, runs, count, b, h, i0, rows, j0, j1, unit)
            _write_weights(call, space, kinds, b, h, i0, g, rows, j0, j1, unit)


@inlined
def _work(state, number, unit):
    call = call_of(state)
    space = call.workspace + number * call.workspace_bytes
    while True:
        item = claim(state)
        if item >= call.items:
            return
        _attend(call, space, item, unit)


# One worker for each unit; Numba's disk cache keeps them under their names.


def forward_float32(state, number):
    _work(state, number, np.float32(0))


def forward_float64(state, number):
    _work(state, number, np.float64(0))


def forward_bfloat16(state, number):
    _work(state, number, np.int32(0))

"""One group of rows against one tile of keys: scores, hooks, running softmax, weighted values."""

from __future__ import annotations

import math

import numpy as np

from attn_numba.cpu.keys import NONE, SOME, list_runs, look_ahead, run_end
from attn_numba.cpu.rows import clear, compiled, inlined, read_row
from attn_numba.cpu.tiles import (
    CHAIN_VECTORS,
    DEPTH_CHAIN,
    TILE_ROWS,
    VECTORS,
    accumulator,
    advance_rows,
    call_edit,
    call_score_tile,
    call_value_tile,
    gather_totals,
    is_pairs,
    load_byte,
    load_int32,
    load_number,
    read_brain_number,
    row_largest,
    row_scale,
    row_total,
    score_row_1,
    score_row_3,
    score_tile_1,
    score_tile_2,
    score_tile_3,
    store_byte,
    store_int32,
    store_number,
    triples_to_weights,
    value_row_1,
    value_row_2,
    value_row_3,
    value_tile_1,
    value_tile_2,
    value_tile_3,
    vector_length,
    vector_to_weights,
    word_bytes,
)

LN2 = math.log(2.0)


@compiled
def divided(call, b, h, largest, total):
    """Return 1 / total and the logarithm of the sum for a row whose weights are in units of 2**largest.

    The sink is added in double precision: it may lie far above the scores, where float32 has few digits left.
    """
    sink = -np.inf
    if call.sink:
        sink = load_number(np.float64(0.0), call.sink + (b * call.H + h) * 8)
    shrink = 1.0
    if sink > -np.inf:
        new = max(largest, sink)
        shrink = np.exp2(largest - new)
        total = total * shrink + np.exp2(sink - new)
        largest = new
    inverse = shrink / total if total != 0.0 else 0.0
    lse = (largest + np.log2(total)) * LN2 if total != 0.0 else -np.inf
    return inverse, lse


@compiled
def _tiled_rows(rows):
    """How many rows to give to register tiles.

    One or two rows left over go one by one, more fill a tile (with rows to spare).
    """
    over = rows % TILE_ROWS
    return rows - over + (TILE_ROWS if over > 2 else 0)


@compiled
def cut_runs(to, runs, count, first, last):
    """List what lies between two columns; return the number of stretches."""
    cut = 0
    for n in range(count):
        start, end = max(load_int32(runs + 8 * n), first), min(load_int32(runs + 8 * n + 4), last)
        if start < end:
            store_int32(to + 8 * cut, start)
            store_int32(to + 8 * cut + 4, end)
            cut += 1
    return cut


@compiled
def add_products(a, a_row, b, b_row, c, c_row, rows, vectors, runs, count, unit):
    """C += A @ B over a list of stretches of the depth, for all rows and one to three vectors of columns.

    Row lengths in words.
    """
    word = word_bytes(unit)
    tiled = _tiled_rows(rows)
    for r in range(0, tiled, TILE_ROWS):
        left, to = a + r * a_row * word, c + r * c_row * word
        if vectors == 3:
            value_tile_3(unit, left, a_row, b, b_row, to, c_row, runs, count)
        elif vectors == 2:
            value_tile_2(unit, left, a_row, b, b_row, to, c_row, runs, count)
        else:
            value_tile_1(unit, left, a_row, b, b_row, to, c_row, runs, count)
    for r in range(tiled, rows):
        left, to = a + r * a_row * word, c + r * c_row * word
        if vectors == 3:
            value_row_3(unit, left, a_row, b, b_row, to, c_row, runs, count)
        elif vectors == 2:
            value_row_2(unit, left, a_row, b, b_row, to, c_row, runs, count)
        else:
            value_row_1(unit, left, a_row, b, b_row, to, c_row, runs, count)


@compiled
def _products(call, space, keys, strip, queries, depth, queries_row, first, end, rows, unit):
    """Fill columns `first` to `end` (whole vectors) of the strip with products of q and the packed keys.

    Three vectors go at a time, two or one at the end. A long head is summed in chains of `DEPTH_CHAIN` words, so that
    it gathers no rounding errors.
    """
    lanes, word = vector_length(unit), word_bytes(unit)
    length, keys_row = call.strip_row, call.keys_row
    chain = min(depth, DEPTH_CHAIN)
    tiled = _tiled_rows(rows)
    for column in range(first, end, VECTORS * lanes):
        packed, scores = keys + column * word, strip + column * word
        vectors = min((end - column + lanes - 1) // lanes, VECTORS)
        for r in range(0, tiled, TILE_ROWS):
            a, to = queries + r * queries_row * word, scores + r * length * word
            look_ahead(call, space)
            if vectors == 3:
                score_tile_3(unit, a, queries_row, packed, keys_row, to, length, chain)
            elif vectors == 2:
                score_tile_2(unit, a, queries_row, packed, keys_row, to, length, chain)
            else:
                score_tile_1(unit, a, queries_row, packed, keys_row, to, length, chain)
        for r in range(tiled, rows):
            a, to = queries + r * queries_row * word, scores + r * length * word
            if vectors == 3:
                score_row_3(unit, a, queries_row, packed, keys_row, to, length, chain)
            else:
                for n in range(vectors):
                    at = n * lanes * word
                    score_row_1(unit, a, queries_row, packed + at, keys_row, to + at, length, chain)
        for d in range(chain, depth, chain):
            stretch = space + call.sums_at
            store_int32(stretch, 0)
            store_int32(stretch + 4, min(chain, depth - d) * (2 if is_pairs(unit) else 1))
            b = packed + d * keys_row * word
            add_products(queries + d * word, queries_row, b, keys_row, scores, length, rows, vectors, stretch, 1, unit)


@compiled
def _chosen_products(call, space, keys, strip, queries, queries_row, first, end, rows, unit):
    """Fill columns as far as the chosen register tiles fit into them; return the first column that is left."""
    lanes, word = vector_length(unit), word_bytes(unit)
    step = call.tile_vectors * lanes
    while first < end - (call.tile_vectors - 1) * lanes:  # the last vector may be a part of one
        for r in range(0, rows, call.tile_rows):
            look_ahead(call, space)
            a, to = queries + r * queries_row * word, strip + (r * call.strip_row + first) * word
            packed = keys + first * word
            call_score_tile(call.score_tile, a, queries_row, packed, call.keys_row, to, call.strip_row, call.depth)
        first += step
    return first


@inlined
def products(call, space, keys, strip, queries, depth, queries_row, runs, count, rows, unit):
    """Fill a tile's stretches of the strip with products of rows of q, `queries_row` words apart, and packed keys."""
    for run in range(count):
        first, end = load_int32(runs + 8 * run), load_int32(runs + 8 * run + 4)
        if call.score_tile:
            first = _chosen_products(call, space, keys, strip, queries, queries_row, first, end, rows, unit)
        _products(call, space, keys, strip, queries, depth, queries_row, first, end, rows, unit)


@inlined
def edit_scores(call, strip, kinds, b, h, i0, rows, j0, j1, unit):
    """Apply the hooks to a tile's products, and put minus infinity beyond the last key."""
    number = accumulator(unit)
    lanes, word = vector_length(unit), word_bytes(unit)
    vectors, length = (j1 - j0 + lanes - 1) // lanes, call.strip_row
    n = 0
    while n < vectors:
        end = run_end(kinds, n, vectors)
        kind = load_byte(kinds + n)
        hook = call.edit_hook if kind == SOME else call.modify_hook
        if kind != NONE and hook:
            first, last = j0 + n * lanes, min(j0 + end * lanes, j1)
            call_edit(hook, strip + n * lanes * word, length, b, h, i0, rows, first, last - first, call.parameters)
        n = end
    for r in range(rows):
        for j in range(j1 - j0, vectors * lanes):
            store_number(number, strip + (r * length + j) * word, -np.inf)


@compiled
def note_seen(call, space, kinds, rows, special, unit):
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
def advance(call, space, g, rows, unit):
    """Move the rows' running maximum on to the largest scores of a tile."""
    number, word = accumulator(unit), word_bytes(unit)
    tops = space + call.rows_at
    shifts, shrinks = tops + call.state_rows * word, tops + 2 * call.state_rows * word
    largest = space + call.largest_at + g * call.state_rows * word
    advance_rows(number, tops, largest, shifts, shrinks, rows, type(number)(call.factor))


@compiled
def rescale(call, space, g, rows, unit):
    """Shrink what the rows have summed so far to their new maximum; add the tile's sums of weights."""
    number, word = accumulator(unit), word_bytes(unit)
    shrinks = space + call.rows_at + 2 * call.state_rows * word
    added, totals = shrinks + call.state_rows * word, space + call.total_at + g * call.state_rows * word
    for r in range(rows):
        shrink = load_number(number, shrinks + r * word)
        if shrink != 1.0 and load_number(number, totals + r * word) != 0.0:
            out = space + call.out_at + (g * call.group_rows + r) * call.value_width * word
            row_scale(number, out, call.value_width, shrink)
    gather_totals(number, totals, shrinks, added, rows)


@inlined
def softmax(call, space, runs, count, g, rows, unit):
    """Turn scores into weights against the running maximum; rescale what the rows have summed so far."""
    number = accumulator(unit)
    lanes, word = vector_length(unit), word_bytes(unit)
    strip, length = space + call.scores_at, call.strip_row
    tops = space + call.rows_at
    shifts, added = tops + call.state_rows * word, tops + 3 * call.state_rows * word
    for r in range(rows):
        top = type(number)(-np.inf)
        for run in range(count):
            first, end = load_int32(runs + 8 * run), load_int32(runs + 8 * run + 4)
            columns = (end - first + lanes - 1) // lanes * lanes
            top = row_largest(number, strip + (r * length + first) * word, columns, top)
        store_number(number, tops + r * word, top)
    advance(call, space, g, rows, unit)
    factor, sums = type(number)(call.factor), space + call.sums_at
    for r in range(rows):
        row = strip + r * length * word
        weights = space + call.pairs_at + r * length * 2 if is_pairs(unit) else row
        clear(sums, VECTORS * lanes, unit)
        _row_to_weights(row, weights, sums, runs, count, factor, load_number(number, shifts + r * word), unit)
        store_number(number, added + r * word, row_total(number, sums))
    rescale(call, space, g, rows, unit)


@compiled
def operands_of(call, space, values, j0, special, unit):
    """Return where a tile's weights and values are, and the lengths of their rows in words."""
    word = word_bytes(unit)
    weights, weights_row = space + call.scores_at, call.strip_row
    if is_pairs(unit):
        weights, weights_row = space + call.pairs_at, call.strip_row // 2
    if call.values_in_place and not special:
        return weights, weights_row, values + j0 * call.v_j, call.v_j // word
    return weights, weights_row, space + call.values_at, call.value_width


@compiled
def _chosen_values(call, space, weights, weights_row, base, values_row, runs, count, local, rows, unit):
    """As `weighted_values`, as far as the chosen register tiles fit into the columns; return the first that is left."""
    lanes, word = vector_length(unit), word_bytes(unit)
    width, chain, step = call.value_width, CHAIN_VECTORS * lanes, call.tile_vectors * lanes
    e = 0
    while e + step <= width:
        b = base + e * word
        for column in range(load_int32(runs) // chain * chain, load_int32(runs + 8 * count - 4), chain):
            stretches = space + call.sums_at
            cut = cut_runs(stretches, runs, count, column, column + chain)
            if cut:
                for r in range(0, rows, call.tile_rows):
                    a, c = weights + r * weights_row * word, space + call.out_at + ((local + r) * width + e) * word
                    call_value_tile(call.value_tile, a, weights_row, b, values_row, c, width, stretches, cut)
        e += step
    return e


@inlined
def weighted_values(call, space, values, runs, count, local, rows, j0, special, unit):
    """Add the tile's weighted values to the rows' sums: three vectors of columns at a time, two or one at the end."""
    lanes, word = vector_length(unit), word_bytes(unit)
    weights, weights_row, base, values_row = operands_of(call, space, values, j0, special, unit)
    width, chain = call.value_width, CHAIN_VECTORS * lanes
    e = 0
    if call.value_tile:
        e = _chosen_values(call, space, weights, weights_row, base, values_row, runs, count, local, rows, unit)
    while e < width:
        left = (width - e) // lanes
        vectors = 3 if left == 3 or left > 4 else 2 if left > 1 else 1
        b = base + e * word
        c = space + call.out_at + (local * width + e) * word
        for column in range(load_int32(runs) // chain * chain, load_int32(runs + 8 * count - 4), chain):
            cut = cut_runs(space + call.sums_at, runs, count, column, column + chain)
            if cut:
                stretches = space + call.sums_at
                add_products(weights, weights_row, b, values_row, c, width, rows, vectors, stretches, cut, unit)
        e += vectors * lanes


@compiled
def add_special(call, space, values, local, rows, j0, special, unit):
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
                read_row(scratch, values + (j0 + column) * call.v_j + e * call.v_e, call.v_e, 1, call, number)
                store_number(
                    number, at + e * word, load_number(number, at + e * word) + weight * load_number(number, scratch)
                )


@inlined
def weigh(call, space, values, kinds, runs, count, b, h, i0, g, rows, j0, j1, special, unit):
    """Turn a group's scores of a tile into weights, and add the weighted values."""
    if special:
        note_seen(call, space, kinds, rows, special, unit)
    softmax(call, space, runs, count, g, rows, unit)
    if call.dropout_hook:
        at = space + call.scores_at
        call_edit(call.dropout_hook, at, call.strip_row, b, h, i0, rows, j0, j1 - j0, call.parameters)
    weighted_values(call, space, values, runs, count, g * call.group_rows, rows, j0, special, unit)
    if special:
        add_special(call, space, values, g * call.group_rows, rows, j0, special, unit)


@inlined
def _score_group(call, space, kinds, queries, b, h, i0, g, rows, j0, j1, unit):
    """Fill the group's scores of a tile; return the number of stretches of keys that it sees."""
    runs = space + call.runs_at
    count = list_runs(runs, kinds, j1 - j0, vector_length(unit))
    if count:
        strip = space + call.scores_at
        products(call, space, space + call.keys_at, strip, queries, call.depth, call.depth, runs, count, rows, unit)
        edit_scores(call, strip, kinds, b, h, i0, rows, j0, j1, unit)
    return count


@compiled
def attend_rows(call, space, values, kinds, queries, b, h, i0, g, rows, j0, j1, special, unit):
    """Attend one group of rows to one tile of keys."""
    count = _score_group(call, space, kinds, queries, b, h, i0, g, rows, j0, j1, unit)
    if count:
        weigh(call, space, values, kinds, space + call.runs_at, count, b, h, i0, g, rows, j0, j1, special, unit)


@compiled
def score_rows(call, space, kinds, queries, b, h, i0, g, rows, j0, j1, unit):
    """Only fill the group's scores of a tile; return the number of stretches of keys that it sees."""
    return _score_group(call, space, kinds, queries, b, h, i0, g, rows, j0, j1, unit)

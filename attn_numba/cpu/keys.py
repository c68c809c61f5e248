"""A tile of keys as one item needs it: which keys its rows see, these transposed, and values without NaN.

A key that is not allowed has weight 0, but 0 times NaN is NaN: rows of V that are not finite are set to zero for the
register tiles and listed, to be added to the rows that see them one by one.
"""

from __future__ import annotations

from attn_numba.cpu.rows import clear, compiled, inlined, read_row, rounded_up
from attn_numba.cpu.tiles import (
    SAME,
    VECTORS,
    call_kind,
    interleave,
    is_pairs,
    load_byte,
    load_int32,
    load_word,
    prefetch,
    row_is_finite,
    store_byte,
    store_int32,
    store_word,
    transpose,
    vector_length,
    word_bytes,
)

NONE, SOME, ALL = 0, 1, 2  # what the tile hook answers
AHEAD_BYTES = 1024  # of keys, and of values, to ask for between two register tiles
# Before the runs to ask for stand: addresses of the next key and value, keys left in their run, number of the run that
# follows, number of runs, addresses of the tile's first key and value, keys to ask for at a time.
AHEAD_HEAD = 64


@compiled
def classify(call, kinds, b, h, i0, i1, j0, j1, unit):
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
            one = call_kind(
                call.tile_hook, b, h, i0, i1, j0 + first * lanes, min(j0 + last * lanes, j1), call.parameters
            )
        for n in range(first, last):
            each = one
            if one == SOME:
                at = j0 + n * lanes
                each = call_kind(call.tile_hook, b, h, i0, i1, at, min(at + lanes, j1), call.parameters)
            store_byte(kinds + n, each)
            seen |= each
    return seen


@inlined
def pack_keys(call, space, to, keys, j0, unit):
    """Transpose one vector of keys: word d of key n goes to (d, n). Keys beyond the last are zero."""
    pack_rows(call, space, to, keys, call.k_j, call.k_d, call.D, call.depth_padded, j0, unit)


@inlined
def pack_rows(call, space, to, rows, step, beside, size, padded, j0, unit):
    """Transpose one vector of rows of so many numbers, `padded` words: word d of row n goes to (d, n)."""
    lanes, word = vector_length(unit), word_bytes(unit)
    scratch = space + call.scratch_at
    row = padded * word
    whole = (call.kind == SAME or is_pairs(unit)) and beside == call.itemsize and size * call.itemsize == row
    source, source_row = rows + j0 * step, step
    for n in range(lanes):  # the next vector of rows, which lie too far apart for the processor to foresee
        ahead = source + (n + lanes) * source_row
        for line in range(0, size * call.itemsize, 64):
            prefetch(ahead + line)
    if not whole or j0 + lanes > call.N:
        for n in range(lanes):
            clear(scratch + n * row, padded, unit)
            if j0 + n < call.N:
                read_row(scratch + n * row, rows + (j0 + n) * step, beside, size, call, unit)
        source, source_row = scratch, row
    for d in range(0, padded, lanes):
        transpose(unit, source + d * word, source_row, to + d * call.keys_row * word, call.keys_row * word)


@inlined
def copy_values(call, space, values, j0, j1, column, unit):
    """Copy values j0 to j1 to the workspace, from column `column` of the tile on, rows that are not finite as zeros."""
    word = word_bytes(unit)
    row = call.value_width * word
    if is_pairs(unit):
        scratch, half = space + call.scratch_at, rounded_up(call.value_width * 2, vector_length(unit) * word)
        for j in range(j0, j1, 2):
            clear(scratch, 2 * half // word, unit)
            for n in range(min(2, j1 - j)):
                read_row(scratch + n * half, values + (j + n) * call.v_j, call.v_e, call.E, call, unit)
                if not row_is_finite(unit, scratch + n * half, half // word):
                    clear(scratch + n * half, half // word, unit)
            to = space + call.values_at + (column + j - j0) // 2 * row
            interleave(unit, to, scratch, scratch + half, call.value_width)
        return
    for j in range(j0, j1):
        to = space + call.values_at + (column + j - j0) * row
        clear(to, call.value_width, unit)
        read_row(to, values + j * call.v_j, call.v_e, call.E, call, unit)
        if not row_is_finite(unit, to, call.value_width):
            clear(to, call.value_width, unit)


@inlined
def find_special(call, space, values, j0, j1, column, count, unit):
    """Append to the list of special keys those of j0 to j1 whose values are not all finite; return its new length."""
    word = word_bytes(unit)
    scratch = space + call.scratch_at
    row = rounded_up(call.E * (2 if is_pairs(unit) else word), vector_length(unit) * word) // word
    for j in range(j0, j1):
        at = values + j * call.v_j
        if not call.values_in_place:
            clear(scratch, row, unit)
            read_row(scratch, at, call.v_e, call.E, call, unit)
            at = scratch
        if not row_is_finite(unit, at, row):
            store_int32(space + call.special_at + 4 * count, column + j - j0)
            count += 1
    return count


@compiled
def mark_rows(call, space, marks, b, h0, groups, head_groups, i_first, i_end, j0, j1, unit):
    """Classify the tile for all groups; mark the vectors of keys that any of them sees; return 0 if none does.

    `marks` is the address of a byte for each group and vector, and of one more row of bytes for what any group sees.
    """
    lanes = vector_length(unit)
    most = call.key_tile // lanes
    union = marks + groups * most
    seen = 0
    for g in range(groups):
        i0 = i_first + g % head_groups * call.group_rows
        i1 = min(i0 + call.group_rows, i_end)
        seen |= classify(call, marks + g * most, b, h0 + g // head_groups, i0, i1, j0, j1, unit)
        for n in range((j1 - j0 + lanes - 1) // lanes):
            store_byte(union + n, load_byte(union + n) | load_byte(marks + g * most + n))
    return seen


@compiled
def clear_marks(union, columns, lanes):
    """Mark no vector of a tile as seen by any group."""
    for n in range((columns + lanes - 1) // lanes):
        store_byte(union + n, NONE)


@compiled
def list_runs(runs, kinds, columns, lanes):
    """List the stretches of keys that are seen, as pairs (first, end) from whole vectors on; return their number."""
    vectors = (columns + lanes - 1) // lanes
    count = n = 0
    while n < vectors:
        if load_byte(kinds + n):
            store_int32(runs + 8 * count, n * lanes)
            while n < vectors and load_byte(kinds + n):
                n += 1
            store_int32(runs + 8 * count + 4, min(n * lanes, columns))
            count += 1
        else:
            n += 1
    return count


@compiled
def pack_tile(call, space, union, b, hk, j0, j1, unit):
    """Pack the keys that are marked as seen; return the number of special keys."""
    lanes, word = vector_length(unit), word_bytes(unit)
    vectors = (j1 - j0 + lanes - 1) // lanes
    keys = call.k + b * call.k_b + hk * call.k_h
    values = call.v + b * call.v_b + hk * call.v_h
    special = 0
    for n in range(vectors):
        if load_byte(union + n):
            first = j0 + n * lanes
            pack_keys(call, space, space + call.keys_at + n * lanes * word, keys, first, unit)
            special = find_special(call, space, values, first, min(first + lanes, j1), n * lanes, special, unit)
    if special or not call.values_in_place:
        for n in range(vectors):
            if load_byte(union + n):
                first = j0 + n * lanes
                copy_values(call, space, values, first, min(first + lanes, j1), n * lanes, unit)
    return special


@compiled
def plan_ahead(call, space, union, b, hk, j0, unit):
    """Note the marked keys of the tile from `j0` on as what this worker will pack next."""
    at = space + call.ahead_at
    together = max(AHEAD_BYTES // max(abs(call.k_j), abs(call.v_j), 1), 1)  # keys, in rows that lie side by side
    store_word(at + 16, 0)
    store_word(at + 24, 0)
    store_word(at + 32, list_runs(at + AHEAD_HEAD, union, min(call.key_tile, call.N - j0), vector_length(unit)))
    store_word(at + 40, call.k + b * call.k_b + hk * call.k_h + j0 * call.k_j)
    store_word(at + 48, call.v + b * call.v_b + hk * call.v_h + j0 * call.v_j)
    store_word(at + 56, together)


@compiled
def look_ahead(call, space):
    """Ask for some more keys and values of the tile that comes next.

    Done between register tiles, this hides the way from memory, which takes 2 to 4 % of a call if it is waited for, and
    15 % under sparse masks. As much each time, for a branch that is guessed wrong would cost more.
    """
    at = space + call.ahead_at
    left = load_word(at + 16)
    if left > 0:
        key, value, together = load_word(at), load_word(at + 8), load_word(at + 56)
        for line in range(0, AHEAD_BYTES, 64):
            prefetch(key + line)
            prefetch(value + line)
        store_word(at, key + together * call.k_j)
        store_word(at + 8, value + together * call.v_j)
        store_word(at + 16, left - together)
        return
    run = load_word(at + 24)
    if run < load_word(at + 32):
        first, end = load_int32(at + AHEAD_HEAD + 8 * run), load_int32(at + AHEAD_HEAD + 8 * run + 4)
        store_word(at, load_word(at + 40) + first * call.k_j)
        store_word(at + 8, load_word(at + 48) + first * call.v_j)
        store_word(at + 16, end - first)
        store_word(at + 24, run + 1)


@compiled
def run_end(kinds, n, vectors):
    """Return the end of the run of vectors from n on that have the same kind."""
    kind = load_byte(kinds + n)
    n += 1
    while n < vectors and load_byte(kinds + n) == kind:
        n += 1
    return n

"""Strips of four rows, for masks whose rows see short stretches of keys each (neighborhoods on a grid).

Tiles of many rows would compute many times what is allowed. Here rows that lie side by side and see much the same go
together, four at most, against just the stretches that any of them sees, wherever these begin; each row then keeps its
own. The sums have the order they have elsewhere.
"""

from __future__ import annotations

import numpy as np

from attn_numba.cpu.keys import NONE, SOME, list_runs, look_ahead
from attn_numba.cpu.rows import clear, compiled
from attn_numba.cpu.softmax import advance, operands_of, rescale, weigh
from attn_numba.cpu.strip_tiles import (
    SLOT_BYTES,
    STRIP_ROWS,
    put_between,
    runs_apart,
    runs_together,
    strip_exclude,
    strip_scores_1,
    strip_scores_2,
    strip_values_1,
    strip_values_2,
    strip_values_4,
    strip_weigh,
)
from attn_numba.cpu.tiles import (
    CHAIN_VECTORS,
    TILE_ROWS,
    accumulator,
    call_edit,
    call_runs,
    is_pairs,
    load_int32,
    row_fill,
    store_byte,
    store_int32,
    vector_length,
    word_bytes,
)

STRIP_BYTES = 16  # of the record of a strip: its first row in the group, the rows that count, where its runs go on


@compiled
def begin_strips(call, space, b, h0, groups, head_groups, i_first, i_end, unit):
    """Ask the runs hook what each row of the item sees.

    Join rows to strips. Note each group's first key and last.
    """
    apart = call.runs_row // 2
    for g in range(groups):
        i0 = i_first + g % head_groups * call.group_rows
        rows = min(call.group_rows, i_end - i0)
        runs = space + call.row_runs_at + g * call.group_rows * call.runs_row
        for r in range(rows):
            at = runs + r * call.runs_row
            call_runs(call.runs_hook, b, h0 + g // head_groups, i0 + r, call.run_count, at, apart, call.parameters)
        together = space + call.together_at + g * call.group_rows * call.runs_row
        count = _join_rows(call, space + call.strips_at + g * call.strips_row, runs, rows, together, unit)
        first, end = call.N, 0
        for s in range(count):
            at = together + s * call.runs_row
            first, end = min(first, load_int32(at)), max(end, load_int32(at + apart + 4 * call.run_count - 4))
        store_int32(space + call.hulls_at + 8 * g, first)
        store_int32(space + call.hulls_at + 8 * g + 4, end)


@compiled
def _join_rows(call, strips, runs, rows, together, unit):
    """List strips of rows whose runs begin and end a quarter of a vector apart at most from one row to the next.

    List what the rows of each see together; return the number of strips.
    """
    apart, most = call.runs_row // 2, vector_length(unit) // 4
    count = low = 0
    for r in range(1, rows + 1):
        joins = r < rows and r < low + STRIP_ROWS
        if joins and runs_apart(unit, runs + r * call.runs_row, apart, call.run_count) <= most:
            continue
        at = strips + STRIP_BYTES * (count + 1)
        row = min(low, call.group_rows - STRIP_ROWS)
        store_int32(at, row)
        store_int32(at + 4, low - row)
        store_int32(at + 8, r - row)
        store_int32(at + 12, 0)
        to = together + count * call.runs_row
        runs_together(unit, runs + low * call.runs_row, apart, r - low, call.run_count, to)
        count += 1
        low = r
    store_int32(strips, count)
    return count


@compiled
def mark_strips(call, space, marks, b, h0, groups, head_groups, i_first, i_end, j0, j1, unit):
    """Mark all vectors of the tile between the first and the last key that any row of the item sees.

    Return 0 if there are none.
    """
    lanes = vector_length(unit)
    union = marks + groups * (call.key_tile // lanes)
    first, end = j1, j0
    for g in range(groups):
        first = min(first, max(load_int32(space + call.hulls_at + 8 * g), j0))
        end = max(end, min(load_int32(space + call.hulls_at + 8 * g + 4), j1))
    for n in range((first - j0) // lanes, (end - j0 + lanes - 1) // lanes):
        store_byte(union + n, SOME)
    return 1 if end > first else 0


@compiled
def _list_slots(call, strip, runs, ends, j0, j1, unit):
    """List the slots of a strip in a tile, chain of sums by chain; return their number.

    `runs` is what its rows see together. A slot belongs to one chain. For pairs it begins at an even key. `ends` is the
    address of the chains' ends in the list of slots, which follows.
    """
    lanes, pair = vector_length(unit), 1 + is_pairs(unit)
    stops = runs + call.runs_row // 2
    slots = ends + call.slots_head
    n = load_int32(strip + 12)
    while n > 0 and load_int32(stops + 4 * n - 4) > j0:
        n -= 1
    count = 0
    for c0 in range(j0, j1, CHAIN_VECTORS * lanes):
        c1 = min(c0 + CHAIN_VECTORS * lanes, j1)
        while n < call.run_count and load_int32(runs + 4 * n) < c1:
            end = load_int32(stops + 4 * n)
            column, stop = (max(load_int32(runs + 4 * n), c0) - j0) // pair * pair, min(end, c1) - j0
            while column < stop and count < call.slots_most:
                at = slots + SLOT_BYTES * count
                store_int32(at, column)
                store_int32(at + 4, min(stop - column, lanes))
                store_int32(at + 8, n)
                count += 1
                column += lanes
            if end > c1:
                break
            n += 1
        store_int32(ends + (c0 - j0) // (CHAIN_VECTORS * lanes) * 4, count)
    store_int32(strip + 12, min(n, call.run_count - 1))
    return count


@compiled
def _count_of(call, space, s, j0, j1, unit):
    """Return the number of slots of strip `s` of those at work."""
    chain = CHAIN_VECTORS * vector_length(unit)
    return load_int32(space + call.slots_at + s * call.slots_row + (j1 - j0 - 1) // chain * 4)


@compiled
def _strip_products(call, space, queries, strips, count, most, j0, j1, unit):
    """Fill the slots of some strips with q . K.

    Slot by slot through all of them, which lie side by side: the keys they share stay in the first-level cache.
    """
    lanes, word = vector_length(unit), word_bytes(unit)
    keys, length = space + call.keys_at, call.packed_row
    for n in range(0, most, 2):
        for s in range(count):
            left = _count_of(call, space, s, j0, j1, unit) - n
            if left <= 0:
                continue
            slot = space + call.slots_at + s * call.slots_row + call.slots_head + n * SLOT_BYTES
            look_ahead(call, space)
            a = queries + load_int32(strips + s * STRIP_BYTES) * call.depth * word
            to = space + call.packed_at + (s * STRIP_ROWS * length + n * lanes) * word
            column = load_int32(slot)
            b = keys + column * word
            if left > 1:
                apart = (load_int32(slot + SLOT_BYTES) - column) * word
                strip_scores_2(unit, a, call.depth, b, call.keys_row, to, length, call.depth, apart)
            else:
                strip_scores_1(unit, a, call.depth, b, call.keys_row, to, length, call.depth, 0)


@compiled
def _modify(call, space, strips, count, b, h, i0, j0, j1, unit):
    """Apply the modifiers to the slots of some strips."""
    lanes, word = vector_length(unit), word_bytes(unit)
    for s in range(count):
        low, high = load_int32(strips + s * STRIP_BYTES + 4), load_int32(strips + s * STRIP_BYTES + 8)
        i = i0 + load_int32(strips + s * STRIP_BYTES) + low
        slots = space + call.slots_at + s * call.slots_row + call.slots_head
        scores = space + call.packed_at + (s * STRIP_ROWS + low) * call.packed_row * word
        for n in range(_count_of(call, space, s, j0, j1, unit)):
            j, width = j0 + load_int32(slots + n * SLOT_BYTES), load_int32(slots + n * SLOT_BYTES + 4)
            at = scores + n * lanes * word
            call_edit(call.modify_hook, at, call.packed_row, b, h, i, high - low, j, width, call.parameters)


@compiled
def _exclude(call, space, strips, count, g, j0, j1, unit):
    """Exclude from the slots what a row does not see; note the largest score of each row."""
    number, word = accumulator(unit), word_bytes(unit)
    tops = space + call.rows_at
    row_fill(number, tops, call.state_rows, -np.inf)
    for s in range(count):
        strip = strips + s * STRIP_BYTES
        row = load_int32(strip)
        runs = space + call.row_runs_at + (g * call.group_rows + row) * call.runs_row
        slots = space + call.slots_at + s * call.slots_row + call.slots_head
        scores = space + call.packed_at + s * STRIP_ROWS * call.packed_row * word
        strip_exclude(
            unit, scores, call.packed_row * word, slots, _count_of(call, space, s, j0, j1, unit), runs,
            call.runs_row // 2, j0, load_int32(strip + 4), load_int32(strip + 8), tops + row * word,
        )  # fmt: skip


@compiled
def _score_batch(call, space, queries, first, count, b, h, i0, g, j0, j1, unit):
    """Fill the slots of some strips of a group, from `first` on, with final scores; return the most of a strip."""
    strips = space + call.strips_at + g * call.strips_row + STRIP_BYTES * (first + 1)
    together = space + call.together_at + (g * call.group_rows + first) * call.runs_row
    most = 0
    for s in range(count):
        ends = space + call.slots_at + s * call.slots_row
        listed = _list_slots(call, strips + s * STRIP_BYTES, together + s * call.runs_row, ends, j0, j1, unit)
        most = max(most, listed)
    if most:
        _strip_products(call, space, queries, strips, count, most, j0, j1, unit)
        if call.modify_hook:
            _modify(call, space, strips, count, b, h, i0, j0, j1, unit)
        _exclude(call, space, strips, count, g, j0, j1, unit)
    return most


@compiled
def _strip_softmax(call, space, strips, count, g, rows, j0, j1, unit):
    """As `softmax`, for the slots of some strips."""
    number, word = accumulator(unit), word_bytes(unit)
    advance(call, space, g, rows, unit)
    shifts = space + call.rows_at + call.state_rows * word
    added = shifts + 2 * call.state_rows * word
    clear(added, call.state_rows, unit)
    for s in range(count):
        strip = strips + s * STRIP_BYTES
        at = load_int32(strip) * word
        slots = space + call.slots_at + s * call.slots_row + call.slots_head
        scores = space + call.packed_at + s * STRIP_ROWS * call.packed_row * word
        strip_weigh(
            unit, scores, call.packed_row * word, slots, _count_of(call, space, s, j0, j1, unit), shifts + at,
            load_int32(strip + 4), load_int32(strip + 8), added + at, type(number)(call.factor),
        )  # fmt: skip
    rescale(call, space, g, rows, unit)


@compiled
def _strip_values(call, space, values, strips, count, local, j0, j1, unit):
    """Add the weighted values of some strips, chain by chain, four vectors of columns at a time, fewer at the end."""
    lanes, word = vector_length(unit), word_bytes(unit)
    width, chain = call.value_width, CHAIN_VECTORS * lanes
    _, _, base, values_row = operands_of(call, space, values, j0, 0, unit)
    e = 0
    while e < width:
        left = (width - e) // lanes
        vectors = 4 if left >= 4 and TILE_ROWS > STRIP_ROWS else 2 if left >= 2 else 1  # as the register file allows
        b = base + e * word
        for c in range((j1 - j0 + chain - 1) // chain):
            for s in range(count):
                ends = space + call.slots_at + s * call.slots_row
                first, end = load_int32(ends + 4 * c - 4) if c else 0, load_int32(ends + 4 * c)
                if first == end:
                    continue
                a = space + call.packed_at + s * STRIP_ROWS * call.packed_row * word
                row = local + load_int32(strips + s * STRIP_BYTES)
                to = space + call.out_at + (row * width + e) * word
                slots = ends + call.slots_head
                if vectors == 4:
                    strip_values_4(unit, a, call.packed_row, b, values_row, to, width, slots, first, end)
                elif vectors == 2:
                    strip_values_2(unit, a, call.packed_row, b, values_row, to, width, slots, first, end)
                else:
                    strip_values_1(unit, a, call.packed_row, b, values_row, to, width, slots, first, end)
        e += vectors * lanes


@compiled
def _sees(call, space, g, j0, j1):
    hull = space + call.hulls_at + 8 * g
    return load_int32(hull) < j1 and load_int32(hull + 4) > j0


@compiled
def attend_strips(call, space, values, kinds, queries, b, h, i0, g, rows, j0, j1, special, unit):
    """Attend one group of rows to one tile of keys, some strips at a time."""
    if special or call.dropout_hook:
        count = score_strips(call, space, kinds, queries, b, h, i0, g, rows, j0, j1, unit)
        if count:
            weigh(call, space, values, kinds, space + call.runs_at, count, b, h, i0, g, rows, j0, j1, special, unit)
        return
    if not _sees(call, space, g, j0, j1):
        return
    listed = space + call.strips_at + g * call.strips_row
    batch = call.group_rows // STRIP_ROWS
    for s in range(0, load_int32(listed), batch):
        count = min(batch, load_int32(listed) - s)
        strips = listed + STRIP_BYTES * (s + 1)
        if _score_batch(call, space, queries, s, count, b, h, i0, g, j0, j1, unit):
            _strip_softmax(call, space, strips, count, g, rows, j0, j1, unit)
            _strip_values(call, space, values, strips, count, g * call.group_rows, j0, j1, unit)


@compiled
def score_strips(call, space, kinds, queries, b, h, i0, g, rows, j0, j1, unit):
    """Fill the group's rows of scores of a tile, minus infinity where a row sees no key; return the number of runs."""
    if not _sees(call, space, g, j0, j1):
        return 0
    number = accumulator(unit)
    lanes, word = vector_length(unit), word_bytes(unit)
    vectors = (j1 - j0 + lanes - 1) // lanes
    for n in range(vectors):
        store_byte(kinds + n, NONE)
    for r in range(rows):
        row_fill(number, space + call.scores_at + r * call.strip_row * word, vectors * lanes, -np.inf)
    listed = space + call.strips_at + g * call.strips_row
    batch = call.group_rows // STRIP_ROWS
    for s in range(0, load_int32(listed), batch):
        count = min(batch, load_int32(listed) - s)
        strips = listed + STRIP_BYTES * (s + 1)
        if _score_batch(call, space, queries, s, count, b, h, i0, g, j0, j1, unit):
            _spread(call, space, kinds, strips, count, g, j0, j1, unit)
    return list_runs(space + call.runs_at, kinds, j1 - j0, lanes)


@compiled
def _spread(call, space, kinds, strips, count, g, j0, j1, unit):
    """Copy what rows see of the slots of some strips to the rows of scores; mark the vectors that have some."""
    number = accumulator(unit)
    lanes, word = vector_length(unit), word_bytes(unit)
    for s in range(count):
        strip = strips + s * STRIP_BYTES
        row = load_int32(strip)
        slots = space + call.slots_at + s * call.slots_row + call.slots_head
        for n in range(_count_of(call, space, s, j0, j1, unit)):
            slot = slots + n * SLOT_BYTES
            column, width = load_int32(slot), load_int32(slot + 4)
            for vector in range(column // lanes, (column + width - 1) // lanes + 1):
                store_byte(kinds + vector, SOME)
            for r in range(load_int32(strip + 4), load_int32(strip + 8)):
                runs = space + call.row_runs_at + (g * call.group_rows + row + r) * call.runs_row
                at = runs + 4 * load_int32(slot + 8)
                first, end = load_int32(at) - j0 - column, load_int32(at + call.runs_row // 2) - j0 - column
                to = space + call.scores_at + ((row + r) * call.strip_row + column) * word
                source = space + call.packed_at + ((s * STRIP_ROWS + r) * call.packed_row + n * lanes) * word
                put_between(number, to, source, max(first, 0), min(end, width))

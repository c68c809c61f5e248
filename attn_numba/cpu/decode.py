"""Decode: few query rows of each sequence against all that is cached for it, K and V read once.

One item is one split of a team's keys, as one key head's queries (those of all heads that it serves) see it. A team is
one sequence, or several that share the memory where the split begins: keys and values that they share are read once for
the queries of all. An item writes partial sums; who finishes the last item of a sequence's key head merges them, split
by split, and writes the results.

Same bits wherever keys lie and whoever else is in the batch or the team: splits begin at fixed multiples of `SPLIT`, a
weighted sum is one chain over the keys of a split, partial sums are added in the order of splits. A key left out would
have added an exact zero; a key that a row does not see is left out of that row's chain, whatever its value holds.

The functions below run in compiled workers and check nothing. `number` is a zero of the accumulator's type, `team` says
which sequences an item has (see `_member`), whose rows follow each other.
"""

from __future__ import annotations

import numpy as np

from attn_numba.cpu.decode_rows import call_finish, call_ready
from attn_numba.cpu.decode_state import BLOCK, SPLIT, decode_call_of
from attn_numba.cpu.decode_tiles import (
    add_scaled,
    arrive,
    call_scores,
    call_values,
    copy_row,
    weigh,
)
from attn_numba.cpu.keys import ALL, NONE, SOME, run_end
from attn_numba.cpu.rows import clear, compiled, inlined, read_row, write_row
from attn_numba.cpu.softmax import divided
from attn_numba.cpu.tiles import (
    call_edit,
    call_kind,
    claim,
    load_byte,
    load_number,
    load_word,
    normalized,
    row_fill,
    row_largest,
    store_byte,
    store_number,
    vector_length,
    word_bytes,
)

BLOCKS = SPLIT // BLOCK
BUSY_ROWS = 3  # with fewer query rows the processor itself reads ahead of what it computes,
FAST_BYTES = 32768  # if memory goes on for as long


@compiled
def _place(call, item):
    """Return team, its members, split, key head and block of rows of an item."""
    heads = call.Hk * call.row_blocks
    if call.by_head:
        count = call.items // heads
        rest, index = item // count, item % count
    else:
        index, rest = item // heads, item % heads
    hk, block = rest // call.row_blocks, rest % call.row_blocks
    if call.teams:
        at = call.teams + 24 * index
        return load_word(at + 8), load_word(at + 16), load_word(at), hk, block
    low, high = 0, call.B
    while high - low > 1:
        middle = (low + high) // 2
        if load_word(call.starts + 8 * middle) <= index:
            low = middle
        else:
            high = middle
    return low, 1, index - load_word(call.starts + 8 * low), hk, block


@compiled
def _member(call, team, m):
    """Return a sequence of a team: without a table of teams, each is a team of its own, named by its number."""
    return load_word(call.members + 8 * (team + m)) if call.teams else team


@compiled
def _end(call, b, j0):
    """Return the end of the keys of a split that a sequence has."""
    return min(j0 + SPLIT, load_word(call.lengths + 8 * b))


@compiled
def _row(call, team, hk, r):
    """Return sequence, head and query of a row."""
    own = r % call.rows
    return _member(call, team, r // call.rows), hk * (call.H // call.Hk) + own // call.M, own % call.M


@compiled
def _row_address(pages, b, hk, j, call, token, head):
    """Return where key (or value) j of a key head is."""
    n = j // call.page
    return load_word(pages + 8 * (b * call.pages + n)) + hk * head + (j - n * call.page) * token


@compiled
def _load_queries(call, space, team, hk, r0, rows, number):
    """Copy the item's query rows, as keys need them."""
    for r in range(rows):
        b, h, i = _row(call, team, hk, r0 + r)
        source = call.q + b * call.q_b + h * call.q_h + i * call.q_i
        row = space + call.q_at + r * call.query_bytes
        to = space + call.sums_at if call.ready else row
        clear(to, call.key_padded, number)
        read_row(to, source, call.q_d, call.D, call, number)
        if call.ready:
            call_ready(call.ready, to, row)


@compiled
def _mark(call, space, team, hk, r0, rows, j0, j1):
    """Write NONE, SOME or ALL for each head of the item and block of keys; return 0 if nothing is seen."""
    union, blocks = space + call.marks_at, (j1 - j0 + BLOCK - 1) // BLOCK
    for n in range(blocks):
        store_byte(union + n, NONE)
    r, seen, marks = 0, 0, union + BLOCKS
    while r < rows:
        b, h, i = _row(call, team, hk, r0 + r)
        i1, end = min(call.M, i + rows - r), _end(call, b, j0)
        kind = ALL
        if call.tile_hook:
            kind = call_kind(call.tile_hook, b, h, i, i1, j0, end, call.parameters)
        for n in range(blocks):
            each, at = kind, j0 + n * BLOCK
            if at >= end:
                each = NONE
            elif kind == SOME:
                each = call_kind(call.tile_hook, b, h, i, i1, at, min(at + BLOCK, end), call.parameters)
            store_byte(marks + n, each)
            store_byte(union + n, load_byte(union + n) | each)
            seen |= each
        r, marks = r + i1 - i, marks + BLOCKS
    return seen


@compiled
def _asks_far(call, rows, token):
    """Whether memory is asked for well ahead everywhere, or only from keys to values and on to the next item."""
    return rows >= BUSY_ROWS or call.page * token < FAST_BYTES or call.finish != 0


@compiled
def _key_ahead(call, union, b, hk, j, j0, j1):
    """Return where to ask for memory: at key j, or after the last one at the values, if it is to be read at all."""
    if j >= j1:
        j = min(j - j1 + j0, j1 - 1)
        return _row_address(call.values, b, hk, j, call, call.value_token, call.value_head)
    if load_byte(union + (j - j0) // BLOCK):
        return _row_address(call.keys, b, hk, j, call, call.key_token, call.key_head)
    return call.q


@compiled
def _value_ahead(call, state, union, b, hk, j, j0, j1):
    """Return where to ask for memory: at value j, or after the last one at the keys of the next item to be claimed."""
    if j >= j1:
        team, _, split, hk, _ = _place(call, min(load_word(state), call.items - 1))
        b = _member(call, team, 0)
        j = min(split * SPLIT + j - j1, load_word(call.lengths + 8 * b) - 1)
        return _row_address(call.keys, b, hk, j, call, call.key_token, call.key_head)
    if load_byte(union + (j - j0) // BLOCK):
        return _row_address(call.values, b, hk, j, call, call.value_token, call.value_head)
    return call.q


@compiled
def _sharing(call, pages, team, members, m, j0, j, count):
    """Return up to which member of a team those from m on have the same keys j to j + count; m if it has none."""
    b = _member(call, team, m)
    own = min(count, _end(call, b, j0) - j)
    if own <= 0:
        return m
    page, last = j // call.page, m + 1
    address = load_word(pages + 8 * (b * call.pages + page))
    while last < members:
        other = _member(call, team, last)
        if load_word(pages + 8 * (other * call.pages + page)) != address:
            break
        if min(count, _end(call, other, j0) - j) != own:
            break
        last += 1
    return last


@compiled
def _score(call, space, team, members, hk, rows, j0, j1, number):
    """Fill the strip with products of the item's queries and the keys that any of its heads sees."""
    union, j = space + call.marks_at, j0
    while j < j1:
        end = min(j0 + ((j - j0) // BLOCK + 1) * BLOCK, j1)
        if not load_byte(union + (j - j0) // BLOCK):
            j = end
            continue
        count, m = min(end - j, call.page - j % call.page), 0
        while m < members:
            last = _sharing(call, call.keys, team, members, m, j0, j, count)
            if last > m:
                first, own = m * call.rows, rows if members == 1 else last * call.rows
                _score_rows(call, space, _member(call, team, m), hk, first, own, j0, j, count, number)
            m = max(last, m + 1)
        j += count


@compiled
def _score_rows(call, space, b, hk, first, rows, j0, j, count, number):
    """Fill rows `first` to `rows` of the strip with products of their queries and some keys of a sequence."""
    word, union, j1 = word_bytes(number), space + call.marks_at, _end(call, b, j0)
    count = min(count, j1 - j)
    keys = _row_address(call.keys, b, hk, j, call, call.key_token, call.key_head)
    soon, far = keys, _asks_far(call, rows - first, call.key_token)
    if far or j + count == j1:
        soon = _key_ahead(call, union, b, hk, j + (call.keys_ahead if far else count), j0, j1)
    strip = space + call.scores_at + (j - j0) * word
    while count > 0:
        some, r = min(count, call.chunk), first
        while r < rows:  # the last rows ask for memory
            to, q = strip + r * call.score_row, space + call.q_at + r * call.query_bytes
            if call.scores_4 and rows - r > 2:
                call_scores(call.scores_4, q, keys, some, to, call.score_row, soon if rows - r <= 4 else keys)
                r += 4
            elif rows - r >= 2:
                call_scores(call.scores_2, q, keys, some, to, call.score_row, soon if rows - r == 2 else keys)
                r += 2
            else:
                call_scores(call.scores_1, q, keys, some, to, call.score_row, soon)
                r += 1
        keys, soon, strip = keys + some * call.key_token, soon + some * call.key_token, strip + some * word
        count -= some


@compiled
def _edit(call, space, team, hk, r0, rows, j0, j1, number):
    """Apply the hooks to the products; minus infinity where a head sees nothing."""
    word, blocks = word_bytes(number), (j1 - j0 + BLOCK - 1) // BLOCK
    r, marks = 0, space + call.marks_at + BLOCKS
    while r < rows:
        b, h, i = _row(call, team, hk, r0 + r)
        count, columns = min(call.M - i, rows - r), _end(call, b, j0) - j0
        n = 0
        while n < blocks:
            end, kind = run_end(marks, n, blocks), load_byte(marks + n)
            first, last = n * BLOCK, min(end * BLOCK, columns)
            at = space + call.scores_at + r * call.score_row + first * word
            hook = call.edit_hook if kind == SOME else call.modify_hook
            if kind == NONE:
                for more in range(count):
                    row_fill(number, at + more * call.score_row, (end - n) * BLOCK, -np.inf)
            elif hook:
                length = call.score_row // word
                call_edit(hook, at, length, b, h, i, count, j0 + first, last - first, call.parameters)
            n = end
        r, marks = r + count, marks + BLOCKS


@compiled
def _facts(call, part, r, number):
    """Return where the largest score and the total weight of a row stand in a partial result."""
    return part + (call.block_rows * call.value_width + 2 * r) * word_bytes(number)


@compiled
def _weigh_rows(call, space, part, team, hk, r0, rows, j0, number):
    """Turn scores into weights; return whether a row does not see all keys."""
    word, lanes, careful = word_bytes(number), vector_length(number), 0
    for r in range(rows):
        b, h, i = _row(call, team, hk, r0 + r)
        row, count = space + call.scores_at + r * call.score_row, _end(call, b, j0) - j0
        columns = (count + lanes - 1) // lanes * lanes
        for j in range(count, columns):
            store_number(number, row + j * word, -np.inf)
        if call.weights:
            copy_row(number, call.weights + (((b * call.H + h) * call.M + i) * call.N + j0) * word, row, count)
        top = row_largest(number, row, columns, type(number)(-np.inf))
        shift = top if top > -np.inf else type(number)(0)
        total = weigh(number, row, count, space + call.sums_at, type(number)(call.factor), shift)
        careful |= load_word(space + call.sums_at)
        facts = _facts(call, part, r, number)
        store_number(number, facts, top)
        store_number(number, facts + word, total)
    return careful


@compiled
def _sum_values(call, space, state, part, team, members, hk, rows, j0, j1, careful, number):
    """Add the weighted values to the item's partial sums."""
    union, j = space + call.marks_at, j0
    clear(part, rows * call.value_width, number)
    while j < j1:
        end = min(j0 + ((j - j0) // BLOCK + 1) * BLOCK, j1)
        if not load_byte(union + (j - j0) // BLOCK):
            j = end
            continue
        count, m = min(end - j, call.page - j % call.page), 0
        while m < members:
            last = _sharing(call, call.values, team, members, m, j0, j, count)
            if last > m:
                first, own = m * call.rows, rows if members == 1 else last * call.rows
                b = _member(call, team, m)
                _sum_rows(call, space, state, part, b, hk, first, own, j0, j, count, careful, number)
            m = max(last, m + 1)
        j += count


@compiled
def _sum_rows(call, space, state, part, b, hk, first, rows, j0, j, count, careful, number):
    """Add some weighted values of a sequence to the partial sums of rows `first` to `rows`."""
    word, union, j1 = word_bytes(number), space + call.marks_at, _end(call, b, j0)
    count = min(count, j1 - j)
    values = _row_address(call.values, b, hk, j, call, call.value_token, call.value_head)
    soon, far = values, _asks_far(call, rows - first, call.value_token)
    if far or j + count == j1:
        soon = _value_ahead(call, state, union, b, hk, j + (call.values_ahead if far else count), j0, j1)
    tile_1 = call.careful_1 if careful else call.values_1
    tile_2 = call.careful_2 if careful else call.values_2
    tile_4 = call.careful_4 if careful else call.values_4
    strip = space + call.scores_at + (j - j0) * word
    while count > 0:
        some, r = min(count, call.chunk), first
        while r < rows:
            left, to = strip + r * call.score_row, part + r * call.value_width * word
            if tile_4 and rows - r > 3:
                call_values(tile_4, left, call.score_row, values, some, to, soon if rows - r == 4 else values)
                r += 4
            elif rows - r > 1:
                call_values(tile_2, left, call.score_row, values, some, to, soon if rows - r == 2 else values)
                r += 2
            else:
                call_values(tile_1, left, call.score_row, values, some, to, soon)
                r += 1
        values, soon, strip = values + some * call.value_token, soon + some * call.value_token, strip + some * word
        count -= some


@compiled
def _attend_nothing(call, part, team, hk, r0, rows, j0, number):
    """Note that the item's rows see nothing of its split."""
    word = word_bytes(number)
    for r in range(rows):
        b, h, i = _row(call, team, hk, r0 + r)
        facts = _facts(call, part, r, number)
        store_number(number, facts, -np.inf)
        store_number(number, facts + word, 0.0)
        if call.weights:
            at = call.weights + (((b * call.H + h) * call.M + i) * call.N + j0) * word
            for j in range(_end(call, b, j0) - j0):
                store_number(number, at + j * word, -np.inf)


@compiled
def _part_of(call, b, split, hk, block):
    """Return where the partial result of a sequence's split is, and the first of its rows there."""
    index, row = load_word(call.starts + 8 * b) + split, 0
    if call.teams:
        row = load_word(call.place_of + 8 * index) * call.rows
        index = load_word(call.team_of + 8 * index)
    heads, rest = call.Hk * call.row_blocks, hk * call.row_blocks + block
    item = rest * (call.items // heads) + index if call.by_head else index * heads + rest
    return call.parts + item * call.part_bytes, row


@compiled
def _merge(call, space, b, hk, block, rows, splits, number):
    """Merge the partial sums of a sequence's key head in the order of splits; write the results."""
    word, served, lanes = word_bytes(number), call.H // call.Hk, vector_length(number)
    width, sums, r0 = call.value_width, space + call.sums_at, block * call.block_rows
    for r in range(rows):
        h, i = hk * served + (r0 + r) // call.M, (r0 + r) % call.M
        largest = -np.inf
        for split in range(splits):
            part, first = _part_of(call, b, split, hk, block)
            largest = max(largest, np.float64(load_number(number, _facts(call, part, first + r, number))))
        shift, total = largest if largest > -np.inf else 0.0, 0.0
        clear(sums, width, number)
        for split in range(splits):
            part, first = _part_of(call, b, split, hk, block)
            facts = _facts(call, part, first + r, number)
            top = np.float64(load_number(number, facts))
            added = np.float64(load_number(number, facts + word))
            if top == -np.inf and added == 0.0:
                continue
            shrink = np.exp2((top - shift) * call.factor)
            total += added * shrink
            add_scaled(number, sums, part + (first + r) * width * word, width, type(number)(shrink))
        inverse, lse = divided(call, b, h, largest * call.factor, total)
        if call.finish:
            call_finish(call.finish, sums)
        to = call.out + b * call.out_b + h * call.out_h + i * call.out_i
        write_row(to, call.out_e, sums, call.E, inverse, call, number)
        if call.lse:
            store_number(number, call.lse + ((b * call.H + h) * call.M + i) * word, lse)
        if call.weights:
            row = call.weights + ((b * call.H + h) * call.M + i) * call.N * word
            length = load_word(call.lengths + 8 * b)
            for j in range(0, length, lanes):
                at, factor = row + j * word, type(number)(call.factor)
                count = min(lanes, length - j)
                copy_row(number, sums, at, count)
                normalized(number, sums, at, count, factor, type(number)(shift), type(number)(inverse))


@inlined
def _attend(call, space, state, item, number):
    team, members, split, hk, block = _place(call, item)
    j0, r0 = split * SPLIT, block * call.block_rows
    rows = min(call.block_rows, members * call.rows - r0)
    j1 = j0
    for m in range(members):
        j1 = max(j1, _end(call, _member(call, team, m), j0))
    part = call.parts + item * call.part_bytes
    if _mark(call, space, team, hk, r0, rows, j0, j1):
        _load_queries(call, space, team, hk, r0, rows, number)
        _score(call, space, team, members, hk, rows, j0, j1, number)
        _edit(call, space, team, hk, r0, rows, j0, j1, number)
        careful = _weigh_rows(call, space, part, team, hk, r0, rows, j0, number)
        _sum_values(call, space, state, part, team, members, hk, rows, j0, j1, careful, number)
    else:
        _attend_nothing(call, part, team, hk, r0, rows, j0, number)
    for m in range(members):
        b = _member(call, team, m)
        splits = load_word(call.starts + 8 * (b + 1)) - load_word(call.starts + 8 * b)
        if arrive(call.arrived + 8 * ((b * call.Hk + hk) * call.row_blocks + block)) == splits - 1:
            _merge(call, space, b, hk, block, min(rows, call.rows), splits, number)


@inlined
def _work(state, worker, number):
    call = decode_call_of(state)
    space = call.workspace + worker * call.workspace_bytes
    while True:
        item = claim(state)
        if item >= call.items:
            return
        _attend(call, space, state, item, number)


def _decode_float32(state, worker):
    _work(state, worker, np.float32(0))


def _decode_float64(state, worker):
    _work(state, worker, np.float64(0))


WORKERS = {"float32": _decode_float32, "float64": _decode_float64}

"""Gradients by the arrays of modifiers: what each place gives, summed as far as a tile goes.

An array with an element for each query and key has its own sums, tile by tile; one without an axis of keys gets sums
over the keys of each row, (B, H, M), one without an axis of queries sums over the rows, (B, H, N). What is left to sum
is left to the host.

A record is RECORD words: the hook that gives each place's term, the kind, the address of the sums and the bytes from
one sequence's to the next, from one head's, and from one row's.
"""

from __future__ import annotations

from attn_numba.cpu.gradient_tiles import add_lanes, add_row, fold
from attn_numba.cpu.rows import clear, compiled
from attn_numba.cpu.tiles import (
    call_gradient,
    load_int32,
    load_number,
    load_word,
    store_number,
    vector_length,
    word_bytes,
)

ROWS, COLUMNS, PLACES = range(3)  # what is summed: over keys, over queries, nothing
RECORD = 6


@compiled
def _fill_terms(call, space, hook, runs, count, b, h, i0, rows, j0, j1, unit):
    word = word_bytes(unit)
    for run in range(count):
        first, end = load_int32(runs + 8 * run), min(load_int32(runs + 8 * run + 4), j1 - j0)
        at = first * word
        call_gradient(
            hook, space + call.raw_at + at, space + call.gradients_at + at, space + call.terms_at + at, call.strip_row,
            b, h, i0, rows, j0 + first, end - first, call.parameters,
        )  # fmt: skip


@compiled
def _add_stretch(to, source, columns, unit):
    lanes, word = vector_length(unit), word_bytes(unit)
    whole = columns // lanes * lanes
    add_row(unit, to, source, whole)
    for n in range(whole, columns):
        at = n * word
        store_number(unit, to + at, load_number(unit, to + at) + load_number(unit, source + at))


@compiled
def _add_row_sum(call, space, to, terms, runs, count, unit):
    """Add the terms of one row, lane by lane, to one number."""
    lanes, word = vector_length(unit), word_bytes(unit)
    lane_sums = space + call.sums_at
    clear(lane_sums, lanes, unit)
    for run in range(count):
        first, end = load_int32(runs + 8 * run), load_int32(runs + 8 * run + 4)
        whole = (end - first) // lanes * lanes
        add_lanes(unit, lane_sums, terms + first * word, whole)
        for n in range(end - first - whole):
            at = lane_sums + n * word
            term = load_number(unit, terms + (first + whole + n) * word)
            store_number(unit, at, load_number(unit, at) + term)
    store_number(unit, to, load_number(unit, to) + fold(unit, lane_sums))


@compiled
def add_learned(call, space, runs, count, b, h, i0, rows, j0, j1, own, unit):
    """Add a tile's terms to the sums of all arrays: to those that the item owns (`own`), or to those that it shares."""
    word = word_bytes(unit)
    for n in range(call.learned_count):
        record = call.learned + n * RECORD * 8
        kind = load_word(record + 8)
        if (kind == COLUMNS) != own:
            continue
        _fill_terms(call, space, load_word(record), runs, count, b, h, i0, rows, j0, j1, unit)
        sums = load_word(record + 16) + b * load_word(record + 24) + h * load_word(record + 32)
        for r in range(rows):
            terms, to = space + call.terms_at + r * call.strip_row * word, sums + (i0 + r) * load_word(record + 40)
            if kind == ROWS:
                _add_row_sum(call, space, to, terms, runs, count, unit)
                continue
            for run in range(count):
                first, end = load_int32(runs + 8 * run), min(load_int32(runs + 8 * run + 4), j1 - j0)
                _add_stretch(to + (j0 + first) * word, terms + first * word, end - first, unit)

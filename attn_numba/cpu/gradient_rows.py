"""One block of rows: from scores and gradients by weights to weights and gradients by scores.

Of each row is known what made its weights sum to 1: a *shift* of its scores (its largest, so that no digit is lost) and
the *rest*, a factor or a threshold.

| normalizer | weight w, with x = s - shift | slope g | gradient by the score |
| --- | --- | --- | --- |
| softmax | exp(x) * rest | w | g * (dw - mean) |
| sparsemax | max(x - rest, 0) | 1 where w > 0 | g * (dw - mean) |
| entmax-1.5 | max(x / 2 - rest, 0) ** 2 | sqrt(w) | g * (dw - mean) |
| softmax twice | exp(u) * second, with u = exp(x) * rest | | u * (w * (dw - inner) - mean) |

The mean is that of dw under the slopes (of softmax, ``dout . out``; twice, of what u is multiplied with under u, and
`inner` is ``dout . out``). Where it is not known, a first pass sums what it is made of.
"""

from __future__ import annotations

from attn_numba.cpu.gradient_tiles import (
    TERMS,
    double_softmax_gradients,
    entmax15_gradients,
    fold,
    softmax_gradients,
    sparsemax_gradients,
)
from attn_numba.cpu.normalizers import DOUBLE_SOFTMAX, LOG2_E, SOFTMAX, SPARSEMAX
from attn_numba.cpu.rows import clear, compiled, inlined
from attn_numba.cpu.tiles import load_int32, load_number, store_number, vector_length, word_bytes

SHIFT, REST, MEAN, SECOND, INNER, ROW_NUMBERS = range(6)


@inlined
def _weigh_stretch(call, scores, gradients, columns, sums, row, unit, others):
    word = word_bytes(unit)
    factor, scale = type(unit)(call.factor), type(unit)(call.gradient_scale)
    shift, rest = load_number(unit, row + SHIFT * word), load_number(unit, row + REST * word)
    mean = load_number(unit, row + MEAN * word)
    if others is None or call.normalizer == SOFTMAX:
        softmax_gradients(unit, scores, gradients, columns, sums, factor, scale, shift, rest, mean)
    elif call.normalizer == DOUBLE_SOFTMAX:
        second, inner = load_number(unit, row + SECOND * word), load_number(unit, row + INNER * word)
        double_softmax_gradients(
            unit, scores, gradients, columns, sums, factor, scale, shift, rest, mean, second, inner
        )  # fmt: skip
    elif call.normalizer == SPARSEMAX:
        factor = type(unit)(call.factor * (1.0 / LOG2_E))
        sparsemax_gradients(unit, scores, gradients, columns, sums, factor, scale, shift, rest, mean)
    else:
        factor = type(unit)(call.factor * (0.5 / LOG2_E))
        entmax15_gradients(unit, scores, gradients, columns, sums, factor, scale, shift, rest, mean)


@inlined
def weigh_rows(call, space, runs, count, numbers, rows, unit, others):
    """Turn the strips' scores into weights and the gradients by weights into those by scores; leave each row's sums."""
    lanes, word = vector_length(unit), word_bytes(unit)
    lane_sums = space + call.sums_at
    for r in range(rows):
        clear(lane_sums, TERMS * lanes, unit)
        for run in range(count):
            first, end = load_int32(runs + 8 * run), load_int32(runs + 8 * run + 4)
            at = (r * call.strip_row + first) * word
            scores, gradients = space + call.scores_at + at, space + call.gradients_at + at
            row = numbers + r * ROW_NUMBERS * word
            _weigh_stretch(call, scores, gradients, end - first, lane_sums, row, unit, others)
        for n in range(TERMS):
            to = space + call.rows_at + (TERMS * r + n) * word
            store_number(unit, to, fold(unit, lane_sums + n * lanes * word))


@compiled
def add_row_sums(call, space, first_row, rows, unit):
    """Add what the tile gave to the sums of rows."""
    word = word_bytes(unit)
    sums = call.row_sums + first_row * TERMS * word
    for n in range(TERMS * rows):
        added = load_number(unit, space + call.rows_at + n * word)
        store_number(unit, sums + n * word, load_number(unit, sums + n * word) + added)

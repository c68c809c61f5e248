"""What the rules of a call do to its scores, as formulas: which keys count, and what their scores become."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from attn_numba.rules.base import Mask, MaskFormula
from attn_numba.rules.formula import Binder, Node, cast, lift, select, symbol
from attn_numba.rules.interval import interval, known
from attn_numba.rules.modifiers import Modifier
from attn_numba.rules.places import SYMBOLS, Sizes

LEAST_SCALE = 2.0**-60  # for smaller ones an exponential's bound on differences of scores would not be finite


class Formulas(NamedTuple):
    """What a call's rules do to its scores. A node is None where there is nothing to do."""

    seen: MaskFormula | None  # which keys are allowed; of a tile, certain: all are, and their scores are plain
    plain: Node | None  # whether a key is allowed and its score not edited: it counts as the product left it
    score: Node | None  # the new score
    partial: bool  # whether scores are edited where they are not plain only, so that the scale waits


def formulas_of(
    mask: Mask | None, modifiers: Sequence[Modifier], scale: float, sizes: Sizes, binder: Binder
) -> Formulas:
    """Return the formulas of a call's mask, with all that modifiers exclude, and of its modifiers.

    Parameters
    ----------
    mask : Mask or None
        The mask of the call.
    modifiers : sequence of Modifier
        Its modifiers, in their order.
    scale : float
        Factor of the scores, part of the new score unless that is `partial`.
    sizes : Sizes
        Sizes of the call.
    binder : Binder
        Where the parameters of the rules are appended.
    """
    raw = symbol("s", "float")
    seen = None if mask is None else mask.formula(SYMBOLS, sizes, binder)
    score: Node | None = None
    if modifiers or scale < LEAST_SCALE:  # larger ones alone are part of the exponential
        (factor,) = binder.bind((float(scale),))
        score = raw * factor
    for modifier in modifiers:
        assert score is not None
        score = cast(modifier.formula(score, SYMBOLS, sizes, binder), "float")
        excluded = modifier.exclusion(SYMBOLS, sizes, binder)
        if excluded is not None:
            seen = _both(seen, MaskFormula(~excluded, *known(interval(~excluded, binder))))
    neutral = _neutral(modifiers, scale, sizes, binder)
    if score is None or neutral is None:
        return Formulas(seen, None if seen is None else seen.allowed, score, False)
    # The scale stays with the exponential: a score is edited as if it were scaled, then divided by the scale again.
    allowed, certain, possible = seen or MaskFormula(lift(True), lift(True), lift(True))
    seen = MaskFormula(allowed, certain & known(interval(neutral, binder))[0], possible)
    return Formulas(seen, allowed & neutral, select(neutral, raw, score / factor), True)


class Derivatives(NamedTuple):
    """What the gradients by raw scores and by arrays of modifiers are, at one place.

    They hold where a key is allowed; elsewhere all are 0, which the reader must see to.
    """

    score: Node  # by the raw score, the one that the scale has yet to meet
    learned: tuple[tuple[int, Node], ...]  # which modifier, and by the element of its array that this place reads


def derivatives_of(modifiers: Sequence[Modifier], scale: float, sizes: Sizes, binder: Binder) -> Derivatives:
    """Return the formulas of gradients; symbol `s` is the raw score, symbol `ds` the gradient by the last score.

    Parameters
    ----------
    modifiers : sequence of Modifier
        Those of the call, in their order, all of them differentiable.
    scale : float
        Factor of the scores.
    sizes : Sizes
        Sizes of the call.
    binder : Binder
        Where the parameters of the rules are appended.
    """
    (factor,) = binder.bind((float(scale),))
    scores = [symbol("s", "float") * factor]
    for modifier in modifiers[:-1]:
        scores.append(cast(modifier.formula(scores[-1], SYMBOLS, sizes, binder), "float"))
    gradient = symbol("ds", "float")
    learned = []
    for n in reversed(range(len(modifiers))):
        if modifiers[n].learned is not None:
            slope = modifiers[n].learned_derivative_formula(scores[n], SYMBOLS, sizes, binder)
            learned.append((n, _times(gradient, slope)))
        gradient = _times(gradient, modifiers[n].derivative_formula(scores[n], SYMBOLS, sizes, binder))
    return Derivatives(gradient * factor, tuple(reversed(learned)))


def _times(gradient: Node, slope: Node) -> Node:
    return gradient if slope.op == "const" and slope.data == 1 else gradient * slope


def _both(a: MaskFormula | None, b: MaskFormula) -> MaskFormula:
    return b if a is None else MaskFormula(*(x & y for x, y in zip(a, b, strict=True)))


def _neutral(modifiers: Sequence[Modifier], scale: float, sizes: Sizes, binder: Binder) -> Node | None:
    """Return where all modifiers leave a score as it is; None if that is not known or would not save anything."""
    if not LEAST_SCALE <= scale <= 1 / LEAST_SCALE:
        return None
    result = None
    for modifier in modifiers:
        neutral = modifier.neutrality(SYMBOLS, sizes, binder)
        if neutral is None:
            return None
        result = neutral if result is None else result & neutral
    return result

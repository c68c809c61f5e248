"""Derivatives of modifiers and normalizers: as arrays, and as the formulas that kernels will be made of."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import attn_numba as an
from attn_numba.rules import SYMBOLS, Modifier, Sizes, places_of
from attn_numba.rules.chain import derivatives_of, formulas_of
from attn_numba.rules.data import gathered
from attn_numba.rules.formula import Binder, evaluate, symbol

SIZES = Sizes(2, 3, 3, 5, 7, 4, 4)
SHAPE = (2, 3, 5, 7)
PLACES = places_of(SIZES, np.array([2, -1]), np.array([0, 3]))
RANDOM = np.random.default_rng(5)
S = 2 * RANDOM.standard_normal(SHAPE)
DS = RANDOM.standard_normal(SHAPE)
VALUES = {**dict(zip(PLACES._fields, PLACES, strict=True)), "s": S, "ds": DS}

MODIFIERS = {
    "SoftCap": an.SoftCap(1.5),
    "Bias": an.Bias(RANDOM.standard_normal((3, 1, 7))),
    "ALiBi": an.ALiBi([0.5, 0.25, 0.1]),
    "Temperature": an.Temperature(RANDOM.random((2, 3, 5)) + 0.5),
    "ReplaceExcluded": an.ReplaceExcluded(an.SlidingWindow(2, 1), -1.0),
    "AdaptiveSpan": an.AdaptiveSpan(RANDOM.integers(0, 3, (3, 1)) + 0.3, 2.5),
    "CustomModifier": an.CustomModifier(
        lambda s, b, h, i, j, p: s * s * p[0][j + 3] + abs(i),
        params=(RANDOM.random(16),),
        slope=lambda s, b, h, i, j, p: 2 * s * p[0][j + 3],
    ),
}
CHAINS = {
    **{name: (modifier,) for name, modifier in MODIFIERS.items()},
    "none": (),
    "all": tuple(MODIFIERS.values()),
    "all, from the last": tuple(reversed(MODIFIERS.values())),
    "twice": (MODIFIERS["Bias"], MODIFIERS["SoftCap"], MODIFIERS["Bias"]),
}
LEARNED = {name: modifier for name, modifier in MODIFIERS.items() if modifier.learned is not None}


def seen(modifiers):
    """Return where no modifier excludes a key: elsewhere derivatives mean nothing."""
    result = np.ones(SHAPE, bool)
    for modifier in modifiers:
        excluded = modifier.excluded(PLACES, SIZES)
        result &= True if excluded is None else ~excluded
    return result


@pytest.mark.parametrize("name", MODIFIERS)
def test_derivatives_by_the_score(name):
    modifier = MODIFIERS[name]
    step = 1e-5
    with np.errstate(all="ignore"):
        above, below = (modifier.evaluate(S + d, PLACES, SIZES) for d in (step, -step))
        measured = (above - below) / (2 * step)
        found = modifier.derivatives(S, PLACES, SIZES)
    assert found.shape == SHAPE
    where = seen([modifier])
    np.testing.assert_allclose(found[where], measured[where], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", LEARNED)
def test_derivatives_by_an_array(name):
    modifier = LEARNED[name]
    argument, axes = modifier.learned
    others = {field.name: getattr(modifier, field.name) for field in dataclasses.fields(modifier)}
    step = 1e-5

    def at(shift):
        return type(modifier)(**others | {argument: getattr(modifier, argument) + shift}).evaluate(S, PLACES, SIZES)

    with np.errstate(all="ignore"):
        measured = (at(step) - at(-step)) / (2 * step)
        found = modifier.learned_derivatives(S, PLACES, SIZES)
    where = seen([modifier])
    np.testing.assert_allclose(found[where], measured[where], rtol=1e-7, atol=1e-8)
    assert np.abs(found[where]).max() > 0.1
    assert np.broadcast_to(getattr(modifier, argument), [getattr(SIZES, axis) for axis in axes]).size


def test_learned_rules():
    every = {kind.__name__: kind.learned for kind in Modifier.__subclasses__() if kind.learned}
    assert every == {
        "Bias": ("array", "BHMN"),
        "ALiBi": ("slopes", "H"),
        "Temperature": ("t", "BHM"),
        "AdaptiveSpan": ("span", "BHM"),
    }
    assert set(every) == set(LEARNED)


def test_what_is_differentiable():
    assert all(modifier.differentiable for modifier in MODIFIERS.values())
    assert not an.CustomModifier(lambda s, b, h, i, j, p: s).differentiable


@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0])
@pytest.mark.parametrize("name", CHAINS)
def test_formulas_of_a_chain(name, scale):
    """The formulas that kernels will be made of give what the arrays give, step by step."""
    chain = CHAINS[name]
    binder = Binder()
    formulas = derivatives_of(chain, scale, SIZES, binder)
    scores = [S * scale]
    with np.errstate(all="ignore"):
        for modifier in chain:
            scores.append(modifier.evaluate(scores[-1], PLACES, SIZES))
        gradient, learned = DS, []
        for n in reversed(range(len(chain))):
            if chain[n].learned is not None:
                learned.append((n, gradient * chain[n].learned_derivatives(scores[n], PLACES, SIZES)))
            gradient = gradient * chain[n].derivatives(scores[n], PLACES, SIZES)
    where = seen(chain)

    def compare(formula, expected):
        found = np.broadcast_to(evaluate(formula, VALUES, binder.params), SHAPE)
        np.testing.assert_allclose(found[where], expected[where], rtol=1e-12)

    compare(formulas.score, gradient * scale)
    assert [n for n, _ in formulas.learned] == [n for n, _ in learned[::-1]]
    for (_, formula), (_, expected) in zip(formulas.learned, learned[::-1], strict=True):
        compare(formula, expected)


def test_a_slope_of_one_costs_nothing():
    found = derivatives_of((MODIFIERS["Bias"], MODIFIERS["ALiBi"]), 0.5, SIZES, Binder())
    assert repr(found.score) == "(ds * p0)"
    assert repr(found.learned[0][1]) == "ds"


def test_forward_and_backward_share_their_arrays():
    chain, binder = CHAINS["all"], Binder()
    formulas_of(None, chain, 0.5, SIZES, binder)
    arrays = sum(isinstance(param, np.ndarray) for param in binder.params)
    derivatives_of(chain, 0.5, SIZES, binder)
    assert sum(isinstance(param, np.ndarray) for param in binder.params) == arrays


@pytest.mark.parametrize(
    ("normalizer", "by_hand"),
    [
        (an.Softmax(), [0, 0.25, 0.75]),
        (an.Sparsemax(), [0, 1, 1]),
        (an.Entmax15(), [0, 0.5, 0.75**0.5]),
        (an.DoubleSoftmax(), [0, 0.25, 0.75]),
    ],
)
def test_slopes_of_normalizers(normalizer, by_hand):
    w = np.array([0, 0.25, 0.75])
    np.testing.assert_allclose(normalizer.slope(w), by_hand, rtol=1e-15)
    traced = evaluate(normalizer.slope(symbol("w", "float")) * 1.0, {"w": w}, [])
    np.testing.assert_allclose(traced, by_hand, rtol=1e-15)


@pytest.mark.parametrize("shape", [(2, 3, 4), (1, 3, 4), (3, 1), (4,), (1,), (), (2, 1, 1), (1, 1, 1)])
def test_gathered_is_the_transpose_of_broadcasting(shape):
    x, y = RANDOM.standard_normal(shape), RANDOM.standard_normal((2, 3, 4))
    found = gathered(y, shape)
    assert found.shape == shape
    np.testing.assert_allclose((found * x).sum(), (np.broadcast_to(x, (2, 3, 4)) * y).sum(), rtol=1e-12)


def test_gathered_without_elements():
    assert gathered(np.ones((0, 3)), (1, 3)).tolist() == [[0, 0, 0]]
    assert gathered(np.ones((0, 3)), (0, 1)).shape == (0, 1)


def test_symbols_of_a_span_are_row_and_distance():
    formula = MODIFIERS["AdaptiveSpan"].learned_derivative_formula(symbol("s", "float"), SYMBOLS, SIZES, Binder())
    assert "abs((i - j))" in repr(formula)
    assert "row_i" in repr(formula)

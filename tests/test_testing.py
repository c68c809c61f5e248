"""The checks for a rule of one's own: all our rules pass them, and each kind of wrong rule is found out."""

import re

import numpy as np
import pytest

import attn_numba as an
from attn_numba import rules, testing
from attn_numba.rules import Mask, Sizes
from attn_numba.testing import check_attention, check_rule
from cases import CASES, rules_of


def checked():
    """Each case's mask and modifiers, with the sizes and offsets they were made for; a name for each."""
    for case in CASES:
        kwargs = case.kwargs()
        offsets = {name: kwargs[name] for name in ("query_offset", "key_offset") if name in kwargs}
        for name in ("mask", "modifiers"):
            if name in kwargs and 0 not in case.sizes and case.sizes.M * case.sizes.N < 10**5:
                rule = rules.as_mask(kwargs[name]) if name == "mask" else rules.as_modifiers(kwargs[name])
                shape = (case.sizes.B, case.sizes.H, case.sizes.M, case.sizes.N)
                yield pytest.param(rule, shape, offsets, id=f"{case.name}: {name}")


@pytest.mark.parametrize(("rule", "shape", "offsets"), list(checked()))
def test_our_rules_pass(rule, shape, offsets):
    check_rule(rule, [shape], **offsets)


def test_every_public_rule_is_checked():
    seen = set()
    for param in checked():
        rule = param.values[0]
        seen |= {type(x) for x in rules_of({"mask": rule} if isinstance(rule, Mask) else {"modifiers": rule})}
    public = {x for x in vars(rules).values() if isinstance(x, type) and issubclass(x, (rules.Mask, rules.Modifier))}
    assert public - seen == {rules.Mask, rules.Modifier}


def test_default_sizes():
    check_rule(an.SlidingWindow(7, 2))
    check_rule([an.SoftCap(3.0), an.ALiBi(0.25)], seed=3)
    check_rule(an.CustomMask(lambda b, h, i, j, p: i // p[0] == j // p[0], (5,)), query_offset=-8, key_offset=-3)


def answer(value):
    return lambda b, h, i0, i1, j0, j1, p: i0 * 0 + value


class Doubled(rules.Modifier):
    """Its formula and its function are not the same: a bug that only a subclass can have."""

    def evaluate(self, s, places, sizes):
        return 2 * s

    @staticmethod
    def apply(s, b, h, i, j, p):
        return s + s + (j == 3) * 1e-3


class Halves(rules.Mask):
    """Its formula is not its function."""

    def evaluate(self, places, sizes):
        return places.row_j % 2 == 0

    @staticmethod
    def allowed(b, h, i, j, p):
        return j % 2 == 1


WRONG = {
    "a tile that says all": (
        an.CustomMask(lambda b, h, i, j, p: j <= i, tile=answer(2)),
        AssertionError,
        "tile says 2 (all)",
    ),
    "a tile that says none": (
        an.CustomMask(lambda b, h, i, j, p: j <= i, tile=answer(0)),
        AssertionError,
        "tile says 0 (none)",
    ),
    "a tile with a wrong end": (
        an.CustomMask(
            lambda b, h, i, j, p: j <= i, tile=lambda b, h, i0, i1, j0, j1, p: (j0 < i1) * 1 + (j1 <= i1) * 1
        ),
        AssertionError,
        "is not allowed",
    ),
    "a slope that is not": (
        an.CustomModifier(lambda s, b, h, i, j, p: s * s, slope=lambda s, b, h, i, j, p: s),
        AssertionError,
        "CustomModifier: slope is",
    ),
    "a slope that is NaN": (
        an.CustomModifier(lambda s, b, h, i, j, p: s * 2, slope=lambda s, b, h, i, j, p: np.log(-1.0 - s * s)),
        AssertionError,
        "slope is nan",
    ),
    "a modifier of two minds": (Doubled(), AssertionError, "Doubled: its formula gives"),
    "a mask of two minds": (Halves(), AssertionError, "Halves: its formula gives False and its function True"),
    "an index that leaves": (
        an.CustomMask(lambda b, h, i, j, p: p[0][j] > 0, (np.ones(20),)),
        ValueError,
        "CustomMask reads index j of an array (20,)",
    ),
    "an array that does not fit": (an.Bias(np.zeros((3, 4))), ValueError, "Bias: array has shape (3, 4)"),
    "a number": (3, TypeError, "modifiers is int"),
    "nothing": ([], TypeError, "needed a mask, a modifier or a sequence of modifiers"),
    "an array": (np.ones((21, 34), bool), TypeError, "wrap an array"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rules_are_found_out(name):
    rule, kind, message = WRONG[name]
    with pytest.raises(kind, match=re.escape(message)):
        check_rule(rule)


# --- what a backend may err ---


def changed(monkeypatch, change):
    """Let `testing` see results that `change` has worked on."""
    original = testing.attention

    def attention(*arrays, **kwargs):
        found = original(*arrays, **kwargs)
        change(found)
        return found

    monkeypatch.setattr(testing, "attention", attention)


def worse(name, at, by):
    def change(found):
        with np.errstate(invalid="ignore"):
            getattr(found, name)[at] += by

    return change


CHANGES = {
    "out": worse("out", (0, 1, 3, 2), 3e-5),
    "lse": worse("lse", (0, 0, 7), 2e-5),
    "weights": worse("weights", (0, 0, 7, 1), 1e-5),
    "NaN": worse("out", (0, 0, 0, 0), np.nan),
    "a row without keys": worse("lse", (0, 0, 2), np.inf),
    "a row of zeros": worse("out", (0, 0, 2, 0), 1e-3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_wrong_element_is_found(name, monkeypatch, backend):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 8)).astype(np.float32) for n in (12, 20, 20))
    mask = np.ones((12, 20), bool)
    mask[2] = False
    check_attention(q, k, v, backend, mask=mask)
    changed(monkeypatch, CHANGES[name])
    with pytest.raises(AssertionError, match=backend):
        check_attention(q, k, v, backend, mask=mask)


def test_tolerance_is_small():
    """What is allowed is a few units in the last place of numbers near 1."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 1, n, 16)) for n in (30, 60, 60)]
    rules = {"return_lse": True, "return_weights": True}
    exact = an.reference.attention(*arrays, **rules)
    for dtype, place in testing.LAST_PLACES.items():
        errors = testing._rounding_errors(exact, arrays, rules, dtype)
        assert all(0 < error < 8 * place for error in errors[:2]), (dtype, errors)


def test_tiles_are_varied():
    """Over a square of 64: the whole, single elements, aligned and odd ones; ends within the sizes."""
    sizes = Sizes(2, 3, 1, 64, 64, 1, 1)
    b, h, rows, keys = testing._tiles(sizes, np.random.default_rng(0))
    assert set(b) == {0, 1}
    assert set(h) == {0, 1, 2}
    for first, end in (rows, keys):
        size = end - first
        assert (first[0], end[0]) == (0, 64)
        assert (first >= 0).all()
        assert (size >= 1).all()
        assert (end <= 64).all()
        assert {1, 2, 4, 8, 16, 32, 64} <= set(size)
        assert (first % 2 == 1).sum() > 20

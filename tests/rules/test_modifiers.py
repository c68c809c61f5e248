"""Modifiers and dropout against values worked out here, and slopes against central differences."""

import inspect

import numpy as np
import pytest

from attn_numba import rules
from attn_numba.rules import (
    SYMBOLS,
    AdaptiveSpan,
    ALiBi,
    Bias,
    Causal,
    CustomModifier,
    Dropout,
    Modifier,
    ReplaceExcluded,
    Sizes,
    SlidingWindow,
    SoftCap,
    Softmax,
    Temperature,
    as_modifiers,
    places_of,
)
from attn_numba.rules.formula import Binder, evaluate, symbol
from attn_numba.rules.philox import philox4x32

SIZES = Sizes(2, 3, 1, 5, 7, 4, 4)
SHAPE = (2, 3, 5, 7)
QUERY_OFFSET, KEY_OFFSET = [3, -2], [0, 4]
PLACES = places_of(SIZES, QUERY_OFFSET, KEY_OFFSET)
RNG = np.random.default_rng(11)
S = RNG.standard_normal(SHAPE) * 3
BIAS = RNG.standard_normal(SHAPE)
BIAS[RNG.random(SHAPE) < 0.2] = -np.inf
HEADS = np.array([0.5, 0.25, -0.125])
HOT = RNG.random((2, 3, 5)) + 0.5
REACH = 6 * HOT - 4
TABLE = RNG.standard_normal((3, 20))


def value(function):
    """The same function at every place, one at a time."""
    result = np.empty(SHAPE)
    for b, h, r, c in np.ndindex(SHAPE):
        result[b, h, r, c] = function(float(S[b, h, r, c]), b, h, r, c, r + QUERY_OFFSET[b], c + KEY_OFFSET[b])
    return result


MODIFIERS = {
    "SoftCap": (SoftCap(1.5), lambda s, b, h, r, c, i, j: 1.5 * np.tanh(s / 1.5)),
    "Bias": (Bias(BIAS), lambda s, b, h, r, c, i, j: s + BIAS[b, h, r, c]),
    "Bias (H, 1, N)": (Bias(BIAS[0, :, :1]), lambda s, b, h, r, c, i, j: s + BIAS[0, h, 0, c]),
    "Bias of integers": (Bias(np.arange(7)), lambda s, b, h, r, c, i, j: s + c),
    "ALiBi": (ALiBi(HEADS), lambda s, b, h, r, c, i, j: s - HEADS[h] * abs(i - j)),
    "ALiBi one slope": (ALiBi(0.5), lambda s, b, h, r, c, i, j: s - 0.5 * abs(i - j)),
    "Temperature": (Temperature(HOT), lambda s, b, h, r, c, i, j: s / HOT[b, h, r]),
    "Temperature (M,)": (Temperature(HOT[0, 0]), lambda s, b, h, r, c, i, j: s / HOT[0, 0, r]),
    "Temperature one number": (Temperature(-2), lambda s, b, h, r, c, i, j: s / -2),
    "ReplaceExcluded": (
        ReplaceExcluded(Causal() | (BIAS > 1), -7.0),
        lambda s, b, h, r, c, i, j: s if j <= i or BIAS[b, h, r, c] > 1 else -7.0,
    ),
    "ReplaceExcluded array": (
        ReplaceExcluded(BIAS > 0, 2),
        lambda s, b, h, r, c, i, j: s if BIAS[b, h, r, c] > 0 else 2,
    ),
    "AdaptiveSpan": (
        AdaptiveSpan(REACH, 4.5),
        lambda s, b, h, r, c, i, j: s + np.log(np.clip((4.5 + REACH[b, h, r] - abs(i - j)) / 4.5, 0, 1)),
    ),
    "CustomModifier": (
        CustomModifier(
            lambda s, b, h, i, j, p: s * s * p[0] - np.log(1.0 + abs(i - j)) + p[1][h, j],
            params=(0.5, TABLE),
            slope=lambda s, b, h, i, j, p: 2 * p[0] * s,
        ),
        lambda s, b, h, r, c, i, j: 0.5 * s * s - np.log(1 + abs(i - j)) + TABLE[h, j],
    ),
}


@pytest.mark.parametrize("name", MODIFIERS)
def test_modifier_is_its_definition(name):
    modifier, function = MODIFIERS[name]
    modifier.check(SIZES, QUERY_OFFSET, KEY_OFFSET)
    with np.errstate(divide="ignore"):
        expected = value(function)
        result = modifier.evaluate(S, PLACES, SIZES)
    np.testing.assert_allclose(np.broadcast_to(result, SHAPE), expected, rtol=1e-13)
    binder = Binder()
    formula = modifier.formula(symbol("s", "float"), SYMBOLS, SIZES, binder)
    assert formula.kind == "float"
    traced = evaluate(formula, {**PLACES._asdict(), "s": S}, binder.params)
    np.testing.assert_allclose(np.broadcast_to(traced, SHAPE), expected, rtol=1e-13)


@pytest.mark.parametrize("name", [name for name, (modifier, _) in MODIFIERS.items() if modifier.slope is not None])
def test_slope_is_the_derivative(name):
    modifier, _ = MODIFIERS[name]
    step = 1e-6
    slope = modifier.slope(S, *modifier._at(PLACES), modifier.arguments(SIZES))
    with np.errstate(all="ignore"):
        difference = (modifier.evaluate(S + step, PLACES, SIZES) - modifier.evaluate(S - step, PLACES, SIZES)) / (
            2 * step
        )
    known = np.isfinite(difference)
    assert known.mean() > 0.5
    np.testing.assert_allclose(np.broadcast_to(slope, SHAPE)[known], difference[known], rtol=1e-6, atol=1e-8)


def test_every_modifier_is_here():
    ours = {x for x in vars(rules).values() if inspect.isclass(x) and issubclass(x, Modifier) and x is not Modifier}
    assert ours == {type(modifier) for modifier, _ in MODIFIERS.values()}


def test_bias_excludes_where_it_is_minus_infinity():
    modifier = MODIFIERS["Bias"][0]
    np.testing.assert_array_equal(modifier.excluded(PLACES, SIZES), -np.inf == BIAS)
    binder = Binder()
    formula = modifier.exclusion(SYMBOLS, SIZES, binder)
    np.testing.assert_array_equal(evaluate(formula, PLACES._asdict(), binder.params), -np.inf == BIAS)
    assert SoftCap(1.0).excluded(PLACES, SIZES) is None
    assert SoftCap(1.0).exclusion(SYMBOLS, SIZES, Binder()) is None


def test_scores_keep_their_dtype():
    for modifier, _ in MODIFIERS.values():
        with np.errstate(divide="ignore"):
            assert modifier.evaluate(S.astype(np.float32), PLACES, SIZES).dtype == np.float32


def test_positions_or_rows():
    positional = {name for name, (modifier, _) in MODIFIERS.items() if modifier.uses_positions}
    assert positional == {"ALiBi", "ALiBi one slope", "ReplaceExcluded", "AdaptiveSpan", "CustomModifier"}
    assert Dropout(0.5, 0).uses_positions


def test_as_modifiers():
    a, b = SoftCap(1.0), Temperature(2.0)
    assert as_modifiers(None) == as_modifiers(()) == as_modifiers([]) == ()
    assert as_modifiers(a) == (a,)
    assert as_modifiers([a, b]) == (a, b)
    for given, message in (
        (Causal(), "pass a mask as mask="),
        ([a, Causal()], r"modifiers\[1\] is Causal"),
        (np.ones(3), r"wrap an array.*Bias"),
        (SoftCap, r"the class SoftCap; needed SoftCap\(...\)"),
        (lambda s, b, h, i, j, p: s, "wrap a function, CustomModifier"),
        (Dropout(0.1, 0), "dropout="),
        ("softcap", "modifiers is str"),
        ({a: 1}, "modifiers is dict"),
    ):
        with pytest.raises(TypeError, match=message):
            as_modifiers(given)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SoftCap(0), ValueError, "cap is 0.0; needed a finite number above 0"),
        (lambda: SoftCap(np.nan), ValueError, "cap is nan"),
        (lambda: SoftCap("x"), TypeError, "SoftCap: cap"),
        (lambda: SoftCap([1.0, 2.0]), TypeError, "needed a number"),
        (lambda: Bias(np.ones((1, 1, 1, 1, 1))), ValueError, "at most 4 axes"),
        (lambda: Bias(np.ones((3, 3), bool)), TypeError, "array has dtype bool"),
        (lambda: Bias(np.ones(3, complex)), TypeError, "dtype complex128; needed real numbers"),
        (lambda: ALiBi(np.ones((2, 3))), ValueError, "slopes has shape"),
        (lambda: Temperature(np.ones((1, 1, 1, 1))), ValueError, "Temperature: t has shape"),
        (lambda: ReplaceExcluded(None, 0.0), TypeError, "ReplaceExcluded: mask is None"),
        (lambda: ReplaceExcluded(np.ones(3), 0.0), TypeError, "ReplaceExcluded: mask has dtype float64"),
        (lambda: ReplaceExcluded(Causal(), np.nan), ValueError, "value is NaN"),
        (lambda: CustomModifier(1.0), TypeError, "apply is float; needed a function"),
        (lambda: CustomModifier(lambda s, *a: s, slope=3), TypeError, "slope is int"),
        (lambda: CustomModifier(lambda s, *a: s if s > 0 else 0), TypeError, "may not branch"),
        (lambda: Dropout(1.0, 0), ValueError, "rate is 1.0; needed 0 <= rate < 1"),
        (lambda: Dropout(-0.1, 0), ValueError, "rate is -0.1"),
        (lambda: Dropout(0.5, 1.5), TypeError, "seed has dtype float64"),
        (lambda: Dropout(0.5, -1), ValueError, "seed is -1"),
        (lambda: Dropout(0.5, [[1]]), ValueError, r"seed has shape \(1, 1\)"),
        (lambda: Softmax("x"), TypeError, "Softmax: sink"),
        (lambda: Softmax(np.nan), ValueError, "sink holds NaN"),
        (lambda: Softmax(np.ones((1, 1, 1))), ValueError, "sink has shape"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("modifier", "message"),
    [
        (Bias(np.ones((5, 6))), r"Bias: array has shape \(5, 6\); needed .* \(B, H, M, N\) = \(2, 3, 5, 7\)"),
        (ALiBi([1.0, 2.0]), r"ALiBi: slopes has shape \(2,\); needed .* \(H,\) = \(3,\)"),
        (Temperature(np.ones(7)), r"Temperature: t .* \(B, H, M\) = \(2, 3, 5\)"),
        (ReplaceExcluded(np.ones((5, 6), bool), 0.0), "Dense: array has shape"),
        (CustomModifier(lambda s, b, h, i, j, p: s + p[0][j], params=(np.ones(6),)), "CustomModifier reads index j"),
    ],
)
def test_what_does_not_fit_a_call(modifier, message):
    with pytest.raises(ValueError, match=message):
        modifier.check(SIZES)


def test_broadcast_bias_takes_no_memory():
    modifier = Bias(np.broadcast_to(np.float32(0), (2, 3, 5, 7)))
    (array,) = modifier.arguments(SIZES)
    assert array.strides == (0, 0, 0, 0)
    assert array.dtype == np.float32


# --- dropout ---


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    """The vectors published with Random123 for philox4x32, 10 rounds."""
    assert " ".join(f"{int(word):08x}" for word in philox4x32(counter, key)) == words
    assert all(word.dtype == np.uint32 for word in philox4x32(counter, key))


def test_philox_broadcasts_and_wraps():
    i = np.array([-1, 0, 5])[:, None]
    j = np.arange(4)
    words = philox4x32((7, 1, i, j), (3, 4))
    for a, x in enumerate([2**32 - 1, 0, 5]):
        for c in range(4):
            single = philox4x32((7, 1, x, c), (3, 4))
            assert [int(w[a, c]) for w in words] == [int(w) for w in single]


@pytest.mark.parametrize("seed", [0, 12345, 2**64 - 1, [2**33 + 5, 9]])
def test_dropout_is_its_definition(seed):
    dropout = Dropout(0.37, seed)
    kept = dropout.kept(PLACES, SIZES)
    assert kept.shape == SHAPE
    for b, h, r, c in np.ndindex(SHAPE):
        i, j = r + QUERY_OFFSET[b], c + KEY_OFFSET[b]
        of_sequence = isinstance(seed, list)
        key = seed[b] if of_sequence else seed
        words = philox4x32((0 if of_sequence else b, h, i, j // 4), (key % 2**32, key // 2**32))
        assert kept[b, h, r, c] == (int(words[j % 4]) >= 0.37 * 2**32)


def test_dropout_share():
    sizes = Sizes(1, 2, 2, 200, 250, 1, 1)
    for rate in (0.0, 0.1, 0.9):
        kept = Dropout(rate, 5).kept(places_of(sizes), sizes)
        assert abs(kept.mean() - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / kept.size) + 1e-12


def test_dropout_of_a_sequence_does_not_depend_on_its_place():
    both = Dropout(0.5, [3, 8]).kept(places_of(SIZES), SIZES)
    alone = Dropout(0.5, [8]).kept(places_of(SIZES._replace(B=1)), SIZES._replace(B=1))
    np.testing.assert_array_equal(both[1], alone[0])


def test_dropout_of_a_part_is_part_of_the_dropout():
    whole = Dropout(0.5, 3).kept(places_of(SIZES, 10, 20), SIZES)
    part = SIZES._replace(M=2, N=3)
    np.testing.assert_array_equal(Dropout(0.5, 3).kept(places_of(part, 12, 23), part), whole[:, :, 2:4, 3:6])


def test_dropout_of_nothing():
    for empty in (SIZES._replace(M=0), SIZES._replace(N=0), SIZES._replace(B=0)):
        assert Dropout(0.5, 3).kept(places_of(empty), empty).size == 0


def test_dropout_threshold():
    assert Dropout(0.0, 0).threshold == 0
    assert Dropout(0.5, 0).threshold == 2**31
    assert Dropout(0.1, 0).threshold == 429496730  # the ceiling of 429496729.6
    assert Dropout(np.nextafter(1, 0), 0).threshold == 2**32
    np.testing.assert_array_equal(Dropout(0.5, 2**40 + 7).keys(SIZES), [[7, 256]] * 2)
    with pytest.raises(ValueError, match=r"seed has shape \(3,\)"):
        Dropout(0.5, [1, 2, 3]).keys(SIZES)


# --- sink ---


def test_sink_array():
    assert Softmax().sink_array(SIZES) is None
    for sink, expected in (
        (0.5, np.full((2, 3), 0.5)),
        ([1.0, 2.0, 3.0], [[1, 2, 3]] * 2),
        ([[1.0], [2.0]], [[1] * 3, [2] * 3]),
    ):
        array = Softmax(sink).sink_array(SIZES)
        assert array.dtype == np.float64
        np.testing.assert_array_equal(array, expected)
    with pytest.raises(ValueError, match=r"Softmax: sink has shape \(2,\); needed .* \(B, H\) = \(2, 3\)"):
        Softmax([1.0, 2.0]).sink_array(SIZES)


def test_mask_used_twice_is_the_same_mask():
    window = SlidingWindow(1, 1)
    modifier = ReplaceExcluded(window, 0.0)
    assert modifier.mask is window
    assert list(modifier.leaves()) == [modifier, window]

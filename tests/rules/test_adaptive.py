"""AdaptiveSpan against values worked out by hand, its bounds over tiles by brute force; and `adapt`."""

import numpy as np
import pytest

import attn_numba as an
from attn_numba.rules import SYMBOLS, AdaptiveSpan, Sizes, adapt, places_of
from attn_numba.rules.formula import Binder, evaluate, symbol
from attn_numba.rules.interval import interval, known

SIZES = Sizes(2, 3, 1, 11, 13, 4, 4)
SHAPE = (2, 3, 11, 13)
OFFSETS = ((0, 0), (5, -4), (np.array([3, -9]), np.array([0, 6])), (2**30 - 12, 2 - 2**30))
AXES = ("", "M", "H", "HM", "B", "BM", "BH", "BHM")


def shaped(axes):
    return tuple(n if axis in axes else 1 for axis, n in zip("BHM", SHAPE, strict=False))


def spans(axes, seed=0):
    return np.random.default_rng(seed).uniform(-5, 12, shaped(axes))


def ratio(span, ramp, places):
    """The clipped ratio as the definition has it."""
    distance = np.abs(places.i.astype(np.int64) - places.j)
    return np.clip((ramp + np.broadcast_to(span, SHAPE[:3])[..., None] - distance) / ramp, 0, 1)


@pytest.mark.parametrize(
    ("span", "ramp", "expected"),
    [
        (2, 2, [1, 1, 1, 1 / 2, 0, 0]),
        (0, 1, [1, 0, 0, 0, 0, 0]),
        (0, 4, [1, 3 / 4, 1 / 2, 1 / 4, 0, 0]),
        (1.5, 2.5, [1, 1, 4 / 5, 2 / 5, 0, 0]),
        (2.75, 0.5, [1, 1, 1, 1 / 2, 0, 0]),
        (2.25, 0.5, [1, 1, 1, 0, 0, 0]),
        (-1, 3, [2 / 3, 1 / 3, 0, 0, 0, 0]),
        (-0.5, 0.75, [1 / 3, 0, 0, 0, 0, 0]),
        (-3, 3, [0, 0, 0, 0, 0, 0]),
        (-1e30, 3, [0, 0, 0, 0, 0, 0]),
        (1e30, 3, [1, 1, 1, 1, 1, 1]),
        (np.float32(1e30), 3, [1, 1, 1, 1, 1, 1]),
        (np.float32(-1e30), 3, [0, 0, 0, 0, 0, 0]),
        (2**31, 1, [1, 1, 1, 1, 1, 1]),
        (3, 2.0**-126, [1, 1, 1, 1, 0, 0]),
        (-(2.0**126), 2.0**127, [1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2, 1 / 2]),
    ],
)
def test_worked_by_hand(span, ramp, expected):
    """Of keys 0 to 5 positions away, before and after the query."""
    modifier = AdaptiveSpan(span, ramp)
    sizes = Sizes(1, 1, 1, 1, 11, 1, 1)
    places = places_of(sizes, 7, 2)
    factor = np.array(expected[:0:-1] + expected)
    for dtype in (np.float64, np.float32):
        with np.errstate(all="ignore"):
            scores = modifier.evaluate(np.full((1, 1, 1, 11), 0.25, dtype), places, sizes)[0, 0, 0]
        np.testing.assert_allclose(np.exp(scores - 0.25), factor, rtol=1e-6)
        assert (scores[factor == 1] == 0.25).all()
    np.testing.assert_array_equal(modifier.excluded(places, sizes)[0, 0, 0], factor == 0)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(("query_offset", "key_offset"), OFFSETS)
def test_modifier_is_its_definition(axes, query_offset, key_offset):
    s = np.random.default_rng(1).standard_normal(SHAPE)
    places = places_of(SIZES, query_offset, key_offset)
    for ramp in (0.375, 3.0, 6.25):
        modifier = AdaptiveSpan(spans(axes), ramp)
        modifier.check(SIZES, query_offset, key_offset)
        factor = ratio(modifier.span, ramp, places)
        with np.errstate(all="ignore"):
            expected = s + np.log(factor)
            result = modifier.evaluate(s, places, SIZES)
        np.testing.assert_allclose(result, expected, rtol=1e-9, atol=1e-12)
        assert (result[factor == 1] == s[factor == 1]).all()
        np.testing.assert_array_equal(np.broadcast_to(modifier.excluded(places, SIZES), SHAPE), factor == 0)
        binder, values = Binder(), {**places._asdict(), "s": s}
        for formula, value in (
            (modifier.formula(symbol("s", "float"), SYMBOLS, SIZES, binder), expected),
            (modifier.exclusion(SYMBOLS, SIZES, binder), factor == 0),
            (modifier.neutrality(SYMBOLS, SIZES, binder), factor == 1),
        ):
            traced = np.broadcast_to(evaluate(formula, values, binder.params), SHAPE)
            np.testing.assert_allclose(traced, value, rtol=1e-9, atol=1e-12)


def tiles():
    """Every tile of every sequence and head: b, h, and the ends of its rows."""
    ends = [[(a, z) for a in range(n) for z in range(a + 1, n + 1)] for n in SHAPE[2:]]
    b, h, i, j = np.meshgrid(*(np.arange(len(x)) for x in (range(2), range(3), *ends)), indexing="ij")
    (i0, i1), (j0, j1) = (np.array(x)[n.ravel()].T for x, n in zip(ends, (i, j), strict=True))
    return b.ravel(), h.ravel(), i0, i1, j0, j1


def counted(truth, b, h, i0, i1, j0, j1):
    """How many places of each tile are true."""
    sums = np.zeros((*SHAPE[:2], SHAPE[2] + 1, SHAPE[3] + 1), int)
    sums[:, :, 1:, 1:] = truth.cumsum(2).cumsum(3)
    return sums[b, h, i1, j1] - sums[b, h, i0, j1] - sums[b, h, i1, j0] + sums[b, h, i0, j0]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize(("query_offset", "key_offset"), OFFSETS[:3])
def test_bounds_over_every_tile(axes, query_offset, key_offset):
    """What is said of a tile is true; of a row, and where all rows have one span, nothing is left open."""
    places, at = places_of(SIZES, query_offset, key_offset), tiles()
    b, h, *ends = at
    offsets = [np.broadcast_to(x, 2)[b] for x in (query_offset, key_offset)]
    values = {"b": b, "h": h}
    for name, end in zip(("i0", "i1", "j0", "j1"), ends, strict=True):
        values |= {"row_" + name: end, name: end + offsets[name[0] == "j"]}
    area = (ends[1] - ends[0]) * (ends[3] - ends[2])
    for seed, ramp in enumerate((0.375, 3.0, 6.25)):
        modifier = AdaptiveSpan(spans(axes, seed), ramp)
        binder = Binder()
        for truth, formula in (
            (modifier.excluded(places, SIZES), modifier.exclusion(SYMBOLS, SIZES, binder)),
            (ratio(modifier.span, ramp, places) == 1, modifier.neutrality(SYMBOLS, SIZES, binder)),
        ):
            count = counted(np.broadcast_to(truth, SHAPE), *at)
            certain, possible = (evaluate(x, values, binder.params) for x in known(interval(formula, binder)))
            assert (count == area)[certain].all()
            assert (count == 0)[~possible].all()
            exact = ends[1] - ends[0] == 1 if "M" in axes else slice(None)
            np.testing.assert_array_equal(certain[exact], (count == area)[exact])
            np.testing.assert_array_equal(possible[exact], (count > 0)[exact])


def test_slope_is_the_derivative():
    modifier, places = AdaptiveSpan(spans("BHM"), 4.0), places_of(SIZES, 1, 0)
    s, step = np.random.default_rng(2).standard_normal(SHAPE), 1e-6
    with np.errstate(all="ignore"):
        above, below = (modifier.evaluate(s + x, places, SIZES) for x in (step, -step))
        difference = (above - below) / (2 * step)
    kept = ~modifier.excluded(places, SIZES)
    slope = modifier.slope(s, *modifier._at(places), modifier.arguments(SIZES))
    np.testing.assert_allclose(difference[kept], np.broadcast_to(slope, SHAPE)[kept], rtol=1e-8)


@pytest.mark.parametrize("ramp", [1.0, 0.1, 7.3])
def test_the_end_of_the_ramp_is_exact(ramp):
    """A span a hair's breadth above or below the one whose end is a whole number; float32 could not tell them apart."""
    sizes = Sizes(1, 1, 1, 1, 1025, 1, 1)
    places = places_of(sizes, 1024, 0)
    for end in (3, 500, 1000):
        for span, last in ((end - ramp + 1e-9, end), (end - ramp - 1e-9, end - 1)):
            modifier = AdaptiveSpan(span, ramp)
            seen = ~modifier.excluded(places, sizes)[0, 0, 0]
            assert seen.sum() == last + 1
            with np.errstate(divide="ignore"):
                scores = modifier.evaluate(np.zeros((1, 1, 1, 1025), np.float32), places, sizes)[0, 0, 0]
            assert np.isfinite(scores[seen]).all()
            expected = np.log(np.minimum((ramp + np.float64(span) - last) / ramp, 1))
            np.testing.assert_allclose(scores[seen][0], expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: AdaptiveSpan([1.0, np.nan], 2), ValueError, "span holds NaN or infinity; needed finite numbers"),
        (lambda: AdaptiveSpan(np.inf, 2), ValueError, "span holds NaN or infinity"),
        (lambda: AdaptiveSpan("far", 2), TypeError, "AdaptiveSpan: span"),
        (lambda: AdaptiveSpan(np.ones((1, 1, 1, 1)), 2), ValueError, "span has shape .* at most 3 axes"),
        (lambda: AdaptiveSpan(3, 0), ValueError, "ramp is 0.0; needed a number from"),
        (lambda: AdaptiveSpan(3, -1), ValueError, "ramp is -1.0"),
        (lambda: AdaptiveSpan(3, np.inf), ValueError, "ramp is inf"),
        (lambda: AdaptiveSpan(3, np.nan), ValueError, "ramp is nan"),
        (lambda: AdaptiveSpan(3, [1.0, 2.0]), TypeError, "AdaptiveSpan: ramp is list; needed a number"),
        (
            lambda: AdaptiveSpan(np.ones(7), 2).check(SIZES),
            ValueError,
            r"AdaptiveSpan: span has shape \(7,\); needed one that broadcasts to \(B, H, M\) = \(2, 3, 11\)",
        ),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("attend", [an.attention, an.reference.attention])
@pytest.mark.parametrize("normalizer", [an.Sparsemax(), an.Entmax15(), an.DoubleSoftmax()])
def test_only_softmax_multiplies_weights_by_adding_logarithms(attend, normalizer):
    x = np.ones((4, 2))
    message = f"normalizer is {type(normalizer).__name__}, but AdaptiveSpan .* needed Softmax"
    with pytest.raises(ValueError, match=message):
        attend(x, x, x, modifiers=[an.SoftCap(2.0), AdaptiveSpan(1, 1)], normalizer=normalizer)
    attend(x, x, x, modifiers=AdaptiveSpan(1, 1), normalizer=an.Softmax(0.5))


def test_positions_are_needed():
    with pytest.raises(ValueError, match="query_offset is None, but AdaptiveSpan uses positions"):
        an.attention(np.ones((3, 2)), np.ones((4, 2)), np.ones((4, 2)), modifiers=AdaptiveSpan(1, 1))


def test_the_span_is_a_copy_and_of_its_own_dtype():
    span = np.ones((3, 1))
    modifier = AdaptiveSpan(span, 2)
    span[:] = 7
    assert (modifier.span == 1).all()
    assert AdaptiveSpan(np.float16(3.5), 2).span.dtype == np.float32


def test_a_span_for_all_queries_takes_no_memory():
    for array in AdaptiveSpan(3, 2).arguments(SIZES)[:3]:
        assert array.strides == (0, 0, 0)


# --- numbers set by hidden states ---


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_adapt_is_its_definition(dtype):
    rng = np.random.default_rng(3)
    x, w, b = (rng.standard_normal(shape).astype(dtype) for shape in ((2, 5, 7), (3, 7), 3))
    result = adapt(x, w, b, largest=40)
    assert result.shape == (2, 3, 5)
    assert result.dtype == (np.float64 if dtype == np.float64 else np.float32)
    for n, h, i in np.ndindex(result.shape):
        gate = sum(float(p) * float(r) for p, r in zip(w[h], x[n, i], strict=True)) + float(b[h])
        assert result[n, h, i] == pytest.approx(40 / (1 + np.exp(-gate)), rel=1e-5 if dtype != np.float64 else 1e-13)


def test_adapt_takes_fewer_axes():
    rng = np.random.default_rng(4)
    x, w, b = rng.standard_normal((2, 5, 7)), rng.standard_normal((3, 7)), rng.standard_normal(3)
    whole = adapt(x, w, b, largest=2.5)
    np.testing.assert_array_equal(adapt(x[1], w, b, largest=2.5), whole[1:])
    np.testing.assert_allclose(adapt(x, w[1], b[1], largest=2.5), whole[:, 1:2], rtol=1e-14)
    np.testing.assert_allclose(adapt(x, w[1], b, largest=2.5)[:, 1], whole[:, 1], rtol=1e-14)
    np.testing.assert_array_equal(adapt(x, w, largest=2.5), adapt(x, w, np.zeros(3), largest=2.5))


def test_adapt_of_nothing():
    assert adapt(np.ones((2, 0, 7)), np.ones((3, 7)), largest=1).shape == (2, 3, 0)
    assert adapt(np.ones((0, 5, 7)), np.ones((3, 7)), largest=1).shape == (0, 3, 5)


def test_adapt_saturates_without_overflow():
    with np.errstate(all="raise"):
        ends = adapt(np.array([[-1e4], [0.0], [1e4]]), np.ones(1), largest=8)
    np.testing.assert_array_equal(ends, [[[0, 4, 8]]])


@pytest.mark.parametrize(
    ("arguments", "largest", "error", "message"),
    [
        ((np.ones(3), np.ones(3)), 1, ValueError, r"adapt: x has shape \(3,\); needed \(B, M, D\) or \(M, D\)"),
        ((np.ones((2, 3)), np.ones((4, 2))), 1, ValueError, r"adapt: w has shape \(4, 2\); needed .* D = 3"),
        ((np.ones((2, 3)), np.ones((1, 4, 3))), 1, ValueError, "adapt: w has shape"),
        ((np.ones((2, 3)), np.ones((4, 3)), np.ones(3)), 1, ValueError, r"adapt: b has shape \(3,\); .* = \(4,\)"),
        ((np.ones((2, 3)), np.ones(3), np.ones((2, 2))), 1, ValueError, r"adapt: b has shape \(2, 2\); needed one"),
        ((np.ones((2, 3)), np.ones(3)), 0, ValueError, "adapt: largest is 0.0; needed a finite number above 0"),
        ((np.ones((2, 3)), np.ones(3)), np.inf, ValueError, "adapt: largest is inf"),
        ((np.ones((2, 3)), np.ones(3)), np.ones(2), TypeError, "adapt: largest is ndarray; needed a number"),
        ((np.ones((2, 3), bool), np.ones(3)), 1, TypeError, "adapt: x has dtype bool; needed real numbers"),
        ((np.ones((2, 3)), "w"), 1, TypeError, "adapt: w"),
    ],
)
def test_adapt_refuses(arguments, largest, error, message):
    with pytest.raises(error, match=message):
        adapt(*arguments, largest=largest)

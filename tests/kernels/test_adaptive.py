"""AdaptiveSpan on the CPU: it is its dense definition, what is skipped changes no bit, the tile hook answers truly."""

import ctypes

import numpy as np
import pytest

import attn_numba as an
from attn_numba.rules import Sizes, places_of
from cases import allowed

DTYPES = ("float64", "float32", "float16")
ASKED = {"return_lse": True, "return_weights": True, "backend": "cpu"}


def arrays(dtype="float64", B=2, H=2, Hk=None, M=150, N=150, D=24, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, H, M, D), (B, Hk or H, N, D), (B, Hk or H, N, D)
    return rng, [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def literal(q, k, v, span, ramp, offset=0, causal=False):
    """The definition, line by line, over all pairs."""
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    i, j = offset + np.arange(q.shape[-2])[:, None], np.arange(k.shape[-2])
    ratio = np.clip((ramp + span[..., None] - abs(i - j)) / ramp, 0, 1)
    if causal:
        ratio = np.where(j <= i, ratio, 0)
    weights = ratio * np.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    return np.divide(weights, total, out=np.zeros_like(weights), where=total > 0) @ v


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("offset", [0, 40, -200])
def test_transcription(backend, offset, causal):
    """As the paper has it, the ratio multiplies the exponentials, in the sum too."""
    rng, (q, k, v) = arrays()
    span = rng.uniform(-8, 60, (2, 2, 150))
    rules = {"mask": an.Causal() if causal else None, "modifiers": an.AdaptiveSpan(span, 7.5), "query_offset": offset}
    found = an.attention(q, k, v, **rules, backend=backend)
    np.testing.assert_allclose(found, literal(q, k, v, span, 7.5, offset, causal), rtol=1e-11, atol=1e-13)


def test_torch(backend):
    torch = pytest.importorskip("torch")
    rng, (q, k, v) = arrays(seed=1)
    span = rng.uniform(0, 60, (2, 2, 150))
    distance = torch.abs(torch.arange(150)[:, None] - torch.arange(150))
    ratio = torch.clamp((9.0 + torch.from_numpy(span)[..., None] - distance) / 9.0, 0, 1)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *map(torch.from_numpy, (q, k, v)), attn_mask=torch.log(ratio)
    )
    found = an.attention(q, k, v, modifiers=an.AdaptiveSpan(span, 9), backend=backend)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_a_ramp_it_is_a_window_bit_for_bit(dtype):
    """A ramp of less than one position leaves nothing between seen in full and not at all."""
    _, (q, k, v) = arrays(dtype, N=1100, M=1100, B=1)
    for width in (0, 17, 300):
        found = an.attention(q, k, v, modifiers=an.AdaptiveSpan(width, 0.5), **ASKED)
        expected = an.attention(q, k, v, mask=an.SlidingWindow(width, width), **ASKED)
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("axes", ["", "H", "BHM"])
def test_what_is_beyond_the_span_changes_no_bit(dtype, axes):
    rng, (q, k, v) = arrays(dtype, H=4, Hk=2, M=60, N=1000)
    shape = [n if axis in axes else 1 for axis, n in zip("BHM", (2, 4, 60), strict=True)]
    for more in ({}, {"mask": an.Causal()}, {"normalizer": an.Softmax(0.3)}):
        rules = {"modifiers": an.AdaptiveSpan(rng.uniform(0, 150, shape), 20), "query_offset": 450, **more}
        seen = allowed(Sizes(2, 4, 2, 60, 1000, 24, 24), rules).reshape(2, 2, 120, 1000).any(2)
        assert 0.1 < seen.mean() < 0.6
        bad_k, bad_v = k.copy(), v.copy()
        bad_k[~seen], bad_v[~seen] = np.nan, np.inf
        for x, y in zip(
            an.attention(q, k, v, **rules, **ASKED), an.attention(q, bad_k, bad_v, **rules, **ASKED), strict=True
        ):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_threads_alone_and_beside_wider_spans(dtype):
    """A score is the same number whether its tile is edited or not."""
    rng, (q, k, v) = arrays(dtype, M=900, N=900)
    span = 120 + 100 * np.sin(np.arange(900) / 40 + rng.random((2, 2, 1)))
    whole = an.attention(q, k, v, modifiers=an.AdaptiveSpan(span, 30), **ASKED)
    with an.threads(2):
        again = an.attention(q, k, v, modifiers=an.AdaptiveSpan(span, 30), **ASKED)
    for x, y in zip(whole, again, strict=True):
        np.testing.assert_array_equal(x, y)
    for b, h, rows in ((1, 0, slice(None)), (0, 1, slice(411, 430)), (1, 1, slice(77, 78))):
        one = np.s_[b : b + 1, h : h + 1]
        part = an.attention(
            q[one][:, :, rows], k[one], v[one], modifiers=an.AdaptiveSpan(span[one][:, :, rows], 30),
            query_offset=rows.start or 0, **ASKED,
        )  # fmt: skip
        for x, y in zip(part, whole, strict=True):
            np.testing.assert_array_equal(x, y[one][:, :, rows])
    wild = span.copy()  # every other query sees everything, so that neighbors' tiles are of other kinds
    wild[..., ::2] = 5000
    mixed = an.attention(q, k, v, modifiers=an.AdaptiveSpan(wild, 30), **ASKED)
    for x, y in zip(mixed, whole, strict=True):
        np.testing.assert_array_equal(x[:, :, 1::2], y[:, :, 1::2])


def tile_answers(bound, b, h, ends):
    hook = ctypes.CFUNCTYPE(*[ctypes.c_int64] * 8)(bound.hooks[0])
    return np.array([hook(b, h, *map(int, tile), bound.address) for tile in ends])


@pytest.mark.parametrize("axes", ["", "H", "M", "BHM"])
@pytest.mark.parametrize("more", ["nothing", "causal", "random mask", "soft cap", "bias"])
def test_answers_of_the_tile_hook(axes, more):
    """None is answered of no tile with an allowed pair; all, of none with a pair that is excluded or to be edited."""
    from attn_numba.cpu.binding import bind
    from attn_numba.problem import check

    found = set()
    for seed in range(3):
        rng, (q, k, v) = arrays("float32", M=70, N=90, D=8, seed=seed)
        shape = [n if axis in axes else 1 for axis, n in zip("BHM", (2, 2, 70), strict=True)]
        offsets = {"query_offset": rng.integers(-20, 60, 2), "key_offset": int(rng.integers(-9, 9))}
        span = an.AdaptiveSpan(rng.uniform(0, 40, shape), float(rng.uniform(0.1, 12)))
        noise = np.where(rng.random((70, 90)) < 0.01, -np.inf, 0.5)
        rules = {
            "nothing": {"modifiers": span},
            "causal": {"modifiers": span, "mask": an.Causal()},
            "random mask": {"modifiers": span, "mask": rng.random((2, 1, 70, 90)) < 0.97},
            "soft cap": {"modifiers": [an.SoftCap(3.0), span]},
            "bias": {"modifiers": [span, an.Bias(noise)]},
        }[more]
        problem = check(q, k, v, **rules, **offsets)
        bound = bind(problem)
        sizes = problem.sizes
        places = places_of(sizes, problem.query_offset, problem.key_offset)
        counts = allowed(sizes, {**rules, **offsets})
        plain = counts
        if more in ("nothing", "causal", "random mask"):  # else scores are edited in tiles of all kinds
            plain = counts & span.neutral(*span._at(places), span.arguments(sizes))
        ends = []
        for _ in range(400):
            i, j = (np.sort(rng.choice(n + 1, 2, replace=False)) for n in (70, 90))
            ends.append((*i, *j) if rng.random() < 0.5 else (i[0], min(i[0] + 9, 70), j[0], min(j[0] + 16, 90)))
        for b, h in np.ndindex(2, 2):
            for answer, (i0, i1, j0, j1) in zip(tile_answers(bound, b, h, ends), ends, strict=True):
                some, every = counts[b, h, i0:i1, j0:j1].any(), plain[b, h, i0:i1, j0:j1].all()
                assert answer in (1, 2 if every else 1, 1 if some else 0), (answer, some, every)
                if "M" not in axes and more in ("nothing", "random mask"):
                    assert answer == (2 if every else 1 if some else 0)
                found.add(int(answer))
    assert found >= ({0, 1} if "M" in axes else {0, 1, 2})


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_edit_hook_leaves_scores_within_the_span_bit_for_bit(dtype):
    """It gets products of q and k, which the scale meets in the exponential only."""
    from attn_numba.cpu.binding import bind
    from attn_numba.problem import check

    rng, (q, k, v) = arrays(dtype, M=70, N=96, D=8)
    span = an.AdaptiveSpan(rng.uniform(0, 40, (2, 2, 70)), 12.5)
    problem = check(q, k, v, modifiers=span, mask=an.Causal(), scale=0.3, query_offset=20)
    bound = bind(problem)
    assert bound.hooks[1]
    assert not bound.hooks[2]
    places = places_of(problem.sizes, 20)
    strip = rng.standard_normal((70, 96)).astype(dtype) * 5
    edited = strip.copy()
    hook = ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 9)(bound.hooks[1])
    hook(edited.ctypes.data, 96, 1, 0, 0, 70, 0, 96, bound.address)
    at, p = span._at(places), span.arguments(problem.sizes)
    neutral, excluded = (f(*at, p)[1, 0] for f in (span.neutral, span.excludes))
    excluded = excluded | ~an.mask_array(an.Causal(), (2, 2, 70, 96), query_offset=20)[1, 0]
    np.testing.assert_array_equal(edited[excluded], -np.inf)
    np.testing.assert_array_equal(edited[neutral & ~excluded], strip[neutral & ~excluded])
    with np.errstate(divide="ignore"):
        expected = span.evaluate(strip * 0.3, places, problem.sizes)[1, 0] / 0.3
    there = ~neutral & ~excluded
    assert 100 < there.sum() < neutral.sum()
    np.testing.assert_allclose(edited[there], expected[there], rtol=1e-4 if dtype == "float32" else 1e-12)


def test_new_parameters_compile_nothing():
    from numba.core import event

    from attn_numba.cpu import hooks

    rng, (q, k, v) = arrays("float32", H=3)
    for shape in ((), (3, 1), (2, 3, 150)):
        an.attention(q, k, v, modifiers=an.AdaptiveSpan(rng.uniform(0, 90, shape), 8))
        before = len(hooks._engines)
        with event.install_recorder("numba:compile") as recorder:
            for ramp in (0.5, 11.0):
                span = an.AdaptiveSpan(rng.uniform(-9, 90, shape), ramp)
                found = an.attention(q, k, v, modifiers=span)
                expected = an.attention(q, k, v, modifiers=span, backend="reference")
                np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
        assert len(hooks._engines) == before
        assert not recorder.buffer


def test_a_span_set_by_the_input(backend):
    """Hidden states give queries, keys, values, and how far each query looks and how evenly."""
    rng, (q, k, v) = arrays(M=80, N=80)
    x, w = rng.standard_normal((2, 80, 12)), rng.standard_normal((2, 12))
    span, heat = an.adapt(x, w, -0.5, largest=60), 0.5 + an.adapt(x, w[::-1], largest=2)
    found = an.attention(q, k, v, modifiers=[an.Temperature(heat), an.AdaptiveSpan(span, 5)], backend=backend)
    np.testing.assert_allclose(found, literal(q / heat[..., None], k, v, span, 5), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_logarithms_of_a_rule(dtype):
    """From the smallest number to the largest, below one unit in the last place before `lse` rounds again."""
    info = np.finfo(dtype)
    rng = np.random.default_rng(5)
    low, high = np.log(float(info.tiny)) - 10, np.log(float(info.max))
    with np.errstate(under="ignore"):
        x = np.concatenate([rng.random(997), 1 + rng.standard_normal(997) / 500, np.exp(rng.uniform(low, high, 997))])
        x = np.append(x, [0.0, -0.0, -1.0, np.inf, -np.inf, np.nan, 1.0, info.max, info.tiny]).astype(dtype)
    rule = an.CustomModifier(lambda s, b, h, i, j, p: np.log(p[0][j]), params=(x,))
    ones = np.ones((len(x), 1), dtype)
    found = an.attention(
        ones, ones, ones, modifiers=rule, mask=an.SlidingWindow(0, 0), return_lse=True, backend="cpu"
    ).lse
    with np.errstate(all="ignore"):
        expected = np.log(x.astype(np.longdouble))
    known = np.isfinite(expected)
    last_place = np.spacing(np.abs(expected[known].astype(dtype)))
    assert (np.abs(found[known] - expected[known]) <= 3 * last_place).all()
    np.testing.assert_array_equal(found[~known], np.where(x == 0, -np.inf, np.nan)[~known])

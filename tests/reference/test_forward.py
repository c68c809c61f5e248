"""The reference against numbers worked out by hand, and against sums taken one element at a time."""

import itertools
import math

import numpy as np
import pytest

from attn_numba import reference
from attn_numba.rules import (
    Additive,
    ALiBi,
    Bias,
    Bilinear,
    Causal,
    Cosine,
    CustomMask,
    Dense,
    Dot,
    Dropout,
    Padding,
    Places,
    ReplaceExcluded,
    Sizes,
    SlidingWindow,
    SoftCap,
    Softmax,
    Temperature,
)
from cases import BY_NAME, CASES

LOG = math.log


def rows(*values):
    """Return one head of rows (1, 1, len, size) from numbers or rows of numbers."""
    return np.array([value if isinstance(value, tuple) else (value,) for value in values], float)[None, None]


def attend(scores, values=(1.0, 2.0, 6.0), **kwargs):
    """Attention of one query whose scores with the keys are these numbers: (out, lse, weights), each flat."""
    k = rows(*scores)
    result = reference.attention(
        rows(1.0), k, rows(*values), scale=1.0, return_lse=True, return_weights=True, query_offset=0, **kwargs
    )
    return tuple(x.ravel() for x in result)


# --- by hand ---


def test_softmax_of_logarithms():
    """exp of the scores is 1, 2, 5: weights 1/8, 2/8, 5/8; out = (1 + 4 + 30) / 8."""
    out, lse, weights = attend((LOG(1), LOG(2), LOG(5)))
    np.testing.assert_allclose(weights, [0.125, 0.25, 0.625], rtol=1e-15)
    np.testing.assert_allclose(out, [35 / 8], rtol=1e-15)
    np.testing.assert_allclose(lse, [LOG(8)], rtol=1e-15)


def test_mask_takes_a_key_away():
    """Without the third key, exp sums to 3: weights 1/3, 2/3."""
    out, lse, weights = attend((LOG(1), LOG(2), LOG(5)), mask=np.array([True, True, False]))
    np.testing.assert_allclose(weights, [1 / 3, 2 / 3, 0])
    np.testing.assert_allclose(out, [5 / 3])
    np.testing.assert_allclose(lse, [LOG(3)])


def test_sink_takes_weight_and_gives_nothing():
    """A sink of log 8 doubles the sum."""
    out, lse, weights = attend((LOG(1), LOG(2), LOG(5)), normalizer=Softmax(LOG(8)))
    np.testing.assert_allclose(weights, [1 / 16, 2 / 16, 5 / 16])
    np.testing.assert_allclose(out, [35 / 16])
    np.testing.assert_allclose(lse, [LOG(16)])


def test_scale_multiplies_scores():
    q, k, v = rows((1.0, 2.0)), rows((3.0, 4.0), (5.0, -6.0)), rows(0.0, 1.0)  # q.k = 11, -7
    for scale, expected in ((None, 18 / math.sqrt(2)), (1.0, 18.0), (0.0, 0.0), (-0.1, -1.8)):
        out = reference.attention(q, k, v, scale=scale)
        np.testing.assert_allclose(out.item(), 1 / (1 + math.exp(expected)), rtol=1e-12)


def test_modifiers_come_in_order():
    """Capped at 2 and then biased is not biased and then capped."""
    s = (0.5, 3.0, -1.0)
    bias = (0.0, 1.0, -2.0)

    def weights_of(scores):
        powers = [math.exp(x) for x in scores]
        return [x / sum(powers) for x in powers]

    capped_first = [2 * math.tanh(x / 2) + y for x, y in zip(s, bias, strict=True)]
    capped_last = [2 * math.tanh((x + y) / 2) for x, y in zip(s, bias, strict=True)]
    add = Bias(np.array(bias))
    np.testing.assert_allclose(attend(s, modifiers=[SoftCap(2.0), add])[2], weights_of(capped_first))
    np.testing.assert_allclose(attend(s, modifiers=[add, SoftCap(2.0)])[2], weights_of(capped_last))
    cooled = [x / 4 for x in s]
    np.testing.assert_allclose(attend(s, modifiers=Temperature(4.0))[2], weights_of(cooled))
    apart = [x - 0.5 * d for x, d in zip(s, (0, 1, 2), strict=True)]
    np.testing.assert_allclose(attend(s, modifiers=ALiBi([0.5]))[2], weights_of(apart))
    filled = [0.5, -1e9, -1e9]
    np.testing.assert_allclose(attend(s, modifiers=ReplaceExcluded(Causal(), -1e9))[2], weights_of(filled))


def test_bias_of_minus_infinity_excludes_whatever_follows():
    s, bias = (0.0, 0.0, 0.0), Bias(np.array([0.0, -np.inf, 0.0]))
    for later in (SoftCap(1.0), Temperature(-1.0), ReplaceExcluded(Dense(np.zeros((1, 3), bool)), 5.0)):
        np.testing.assert_allclose(attend(s, modifiers=[bias, later])[2], [0.5, 0, 0.5])
    everything = Bias(np.full(3, -np.inf))
    out, lse, weights = attend(s, modifiers=[everything, SoftCap(1.0)])
    assert out == 0
    assert lse == -np.inf
    assert not weights.any()


def test_final_score_of_minus_infinity_excludes():
    out, _, weights = attend((0.0, -np.inf, 0.0), values=(1.0, np.nan, 3.0))
    np.testing.assert_array_equal(weights, [0.5, 0, 0.5])
    np.testing.assert_array_equal(out, [2.0])


def test_replaced_scores_stay_in_the_sum():
    """The old fill: a row with nothing else comes out even."""
    out, _, weights = attend((5.0, 7.0, 9.0), modifiers=ReplaceExcluded(np.zeros(3, bool), -1e9))
    np.testing.assert_allclose(weights, [1 / 3] * 3)
    np.testing.assert_allclose(out, [3.0])


def test_rows_without_keys():
    x = np.random.default_rng(0).standard_normal((1, 2, 4, 3))
    mask = np.ones((4, 4), bool)
    mask[2] = False
    out, lse, weights = reference.attention(x, x, x, mask=mask, return_lse=True, return_weights=True)
    assert not out[:, :, 2].any()
    assert not weights[:, :, 2].any()
    assert (lse[:, :, 2] == -np.inf).all()
    assert np.isfinite(lse[:, :, [0, 1, 3]]).all()
    _, lse = reference.attention(x, x, x, mask=mask, normalizer=Softmax([0.5, -3.0]), return_lse=True)
    np.testing.assert_array_equal(lse[0, :, 2], [0.5, -3.0])


def test_no_keys_and_no_queries():
    q, none = np.ones((2, 3, 4, 5)), np.ones((2, 3, 0, 5))
    out, lse, weights = reference.attention(q, none, none[..., :2], return_lse=True, return_weights=True)
    assert out.shape == (2, 3, 4, 2)
    assert not out.any()
    assert (lse == -np.inf).all()
    assert weights.shape == (2, 3, 4, 0)
    assert reference.attention(none, q, q).shape == (2, 3, 0, 5)
    with pytest.raises(ValueError, match="query_offset"):
        reference.attention(none, q, q, mask=Causal())


def test_causal_means_positions():
    v = rows(1.0, 2.0, 3.0, 4.0)
    k = np.zeros_like(v)
    q = np.zeros((1, 1, 2, 1))
    for offset, expected in ((0, [1.0, 1.5]), (2, [2.0, 2.5]), (-1, [0.0, 1.0]), (9, [2.5, 2.5])):
        np.testing.assert_allclose(reference.attention(q, k, v, mask=Causal(), query_offset=offset).ravel(), expected)
    out = reference.attention(q, k, v, mask=Causal(), query_offset=np.array([5]), key_offset=np.array([4]))
    np.testing.assert_allclose(out.ravel(), [1.5, 2.0])


def test_offset_rules():
    q, k = np.zeros((1, 1, 2, 4)), np.zeros((1, 1, 5, 4))
    for rule in (
        {"mask": Causal()},
        {"modifiers": ALiBi(0.5)},
        {"dropout": Dropout(0.5, 1)},
        {"mask": ~(Padding(3) & SlidingWindow(1, 1))},
    ):
        with pytest.raises(ValueError, match="query_offset=0 .* or query_offset=3"):
            reference.attention(q, k, k, **rule)
    reference.attention(q, k, k, mask=Padding(3), modifiers=[Bias(np.zeros(5)), ReplaceExcluded(Padding(2), 0.0)])
    with pytest.raises(ValueError, match="N - M"):
        reference.attention(q, k, k, modifiers=ReplaceExcluded(Causal(), 0.0))
    # with as many queries as keys, the query offset is the key offset
    x = np.random.default_rng(0).standard_normal((1, 1, 6, 4))
    shifted = reference.attention(x, x, x, mask=CustomMask(lambda b, h, i, j, p: (j <= i) & (i >= 103)), key_offset=100)
    np.testing.assert_array_equal(shifted[0, 0, :3], 0)
    np.testing.assert_array_equal(shifted[0, 0, 3:], reference.attention(x, x, x, mask=Causal())[0, 0, 3:])


def test_grouped_heads_read_their_own_key_head():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((2, heads, 5, 4)) for heads in (6, 3, 3))
    out = reference.attention(q, k, v)
    for h in range(6):
        np.testing.assert_allclose(out[:, h], reference.attention(q[:, h], k[:, h // 2], v[:, h // 2]), rtol=1e-14)


def test_missing_axes_count_as_one():
    rng = np.random.default_rng(2)
    q, k, v = rng.standard_normal((4, 3)), rng.standard_normal((5, 3)), rng.standard_normal((5, 2))
    full = reference.attention(q[None, None], k[None, None], v[None, None], return_lse=True, return_weights=True)
    two = reference.attention(q, k, v, return_lse=True, return_weights=True)
    mixed = reference.attention(q[None], k, v[None, None], return_lse=True, return_weights=True)
    assert [x.shape for x in two] == [(4, 2), (4,), (4, 5)]
    assert [x.shape for x in mixed] == [(1, 4, 2), (1, 4), (1, 4, 5)]
    for x, y, z in zip(full, two, mixed, strict=True):
        np.testing.assert_array_equal(x.ravel(), y.ravel())
        np.testing.assert_array_equal(x.ravel(), z.ravel())


def test_results_asked_for():
    x = np.ones((2, 3), np.float32)
    assert isinstance(reference.attention(x, x, x), np.ndarray)
    for flags, fields in (((1, 0), ("out", "lse")), ((0, 1), ("out", "weights")), ((1, 1), ("out", "lse", "weights"))):
        result = reference.attention(x, x, x, return_lse=bool(flags[0]), return_weights=bool(flags[1]))
        assert result._fields == fields
        assert type(result).__name__ == "Attention"


@pytest.mark.parametrize(
    ("dtype", "accumulator"),
    [("float64", "float64"), ("float32", "float32"), ("float16", "float32"), ("bfloat16", "float32")],
)
def test_dtypes(dtype, accumulator):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k, v, kwargs = BY_NAME["causal and sinks"].build(dtype)
    result = reference.attention(q, k, v, **kwargs, return_lse=True, return_weights=True)
    assert (result.out.dtype.name, result.lse.dtype.name, result.weights.dtype.name) == (
        dtype,
        accumulator,
        accumulator,
    )
    wide = reference.attention(*(x.astype(np.float64) for x in (q, k, v)), **kwargs)
    np.testing.assert_array_equal(result.out, wide.astype(q.dtype))


# --- what is not there ---


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_excluded_places_may_hold_anything(bad):
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((1, 2, 6, 4)) for _ in range(3))
    mask = Padding(6, key_starts=2) & Causal()
    clean = reference.attention(q, k, v, mask=mask, return_lse=True, return_weights=True)
    k[:, :, :2], v[:, :, :2] = bad, bad
    dirty = reference.attention(q, k, v, mask=mask, return_lse=True, return_weights=True)
    for x, y in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_allowed_places_spoil_only_what_sees_them(bad):
    rng = np.random.default_rng(4)
    q, k, v = (rng.standard_normal((1, 1, 6, 4)) for _ in range(3))
    clean = reference.attention(q, k, v, mask=Causal())
    spoiled_v = v.copy()
    spoiled_v[0, 0, 3, 1] = bad
    out = reference.attention(q, k, spoiled_v, mask=Causal())
    seen = np.zeros((6, 4), bool)
    seen[3:, 1] = True
    assert not np.isfinite(out[0, 0][seen]).any()
    np.testing.assert_array_equal(out[0, 0][~seen], clean[0, 0][~seen])
    spoiled_k = k.copy()
    spoiled_k[0, 0, 3] = np.nan
    out = reference.attention(q, spoiled_k, v, mask=Causal())
    assert not np.isfinite(out[0, 0, 3:]).any()
    np.testing.assert_array_equal(out[0, 0, :3], clean[0, 0, :3])


def test_infinite_value_at_weight_zero_is_literal():
    """An allowed key whose weight underflows to 0 still multiplies its infinity: 0 * inf is NaN."""
    out, _, weights = attend((0.0, -1e4, 0.0), values=(1.0, np.inf, 1.0))
    assert weights[1] == 0
    assert np.isnan(out)


# --- one element at a time ---


def philox_word(seed, counter):
    """Philox4x32-10 in Python integers, written from the paper's description."""
    key = [seed & 0xFFFFFFFF, seed >> 32]
    c = [x & 0xFFFFFFFF for x in counter]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ key[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ key[1], a & 0xFFFFFFFF]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def one_score(score, x, y, h, hk):
    """Return the score of a query and a key, in Python numbers."""
    if isinstance(score, Bilinear):
        W = score.W if score.W.ndim == 2 else score.W[h]
        return math.fsum(x[d] * float(W[d, e]) * y[e] for d in range(len(x)) for e in range(len(y)))
    if isinstance(score, Additive):
        parts = (score.Wq, 2, h), (score.Wk, 2, hk), (score.w, 1, h)
        Wq, Wk, w = (part if part.ndim == axes else part[head] for part, axes, head in parts)
        inner = [math.fsum([*(Wq[n] * x), *(Wk[n] * y)]) for n in range(len(w))]
        return math.fsum(float(weight) * math.tanh(u) for weight, u in zip(w, inner, strict=True))
    dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return dot / (math.hypot(*x) * math.hypot(*y)) if isinstance(score, Cosine) else dot


def one_row(q, k, v, z, kwargs, b, h, row):
    """Output, lse and weights of one query, in Python numbers, key by key."""
    per_sequence = lambda x: int(np.broadcast_to(x, (z.B,))[b])  # noqa: E731
    key_offset = kwargs.get("key_offset", 0)
    query_offset = kwargs.get("query_offset")
    query_offset = key_offset if query_offset is None else query_offset
    scale = kwargs.get("scale")
    score = kwargs.get("score", Dot())
    scale = (1 / math.sqrt(z.D) if isinstance(score, Dot) else 1.0) if scale is None else scale
    head = h // (z.H // z.Hk)
    mask, modifiers = kwargs.get("mask"), kwargs.get("modifiers", ())
    mask = Dense(mask) if isinstance(mask, np.ndarray) else mask
    modifiers = modifiers if isinstance(modifiers, (list, tuple)) else [modifiers]
    scores = {}
    for col in range(z.N):
        at = Places(b, h, row + per_sequence(query_offset), col + per_sequence(key_offset), row, col)
        if mask is not None and not mask.evaluate(at, z):
            continue
        if any((e := m.excluded(at, z)) is not None and e for m in modifiers):
            continue
        s = one_score(score, q[b, h, row].tolist(), k[b, head, col].tolist(), h, head) * scale
        for m in modifiers:
            s = float(m.evaluate(np.float64(s), at, z))
        if s != -math.inf:
            scores[col] = s
    sink = kwargs["normalizer"].sink_array(z) if "normalizer" in kwargs else None
    sink = -math.inf if sink is None else float(sink[b, h])
    top = max([*scores.values(), sink], default=-math.inf)
    if top == -math.inf:
        return np.zeros(z.E), -math.inf, np.zeros(z.N)
    total = math.fsum([math.exp(s - top) for s in scores.values()] + [math.exp(sink - top)])
    weights = np.zeros(z.N)
    out = [[] for _ in range(z.E)]
    dropout = kwargs.get("dropout")
    for col, s in scores.items():
        weights[col] = math.exp(s - top) / total
        used = weights[col]
        if dropout is not None:
            i, j = row + per_sequence(query_offset), col + per_sequence(key_offset)
            by_sequence = isinstance(dropout.seed, np.ndarray)
            seed = int(dropout.seed[b]) if by_sequence else dropout.seed
            first_b, first_h = dropout.first
            word = philox_word(seed, (0 if by_sequence else first_b + b, first_h + h, i, j // 4))[j % 4]
            used = 0.0 if word < dropout.rate * 2**32 else used / (1 - dropout.rate)
        for e in range(z.E):
            out[e].append(used * float(v[b, head, col, e]))
    return np.array([math.fsum(terms) for terms in out]), top + math.log(total), weights


def is_softmax(case):
    return isinstance(case.kwargs().get("normalizer", Softmax()), Softmax)


WRITTEN_OUT = [case for case in CASES if not case.spoiled and is_softmax(case)]


@pytest.mark.parametrize("case", WRITTEN_OUT, ids=lambda case: case.name)
def test_case_one_element_at_a_time(case):
    z = case.sizes
    q, k, v, kwargs = case.build(np.float64)
    result = reference.attention(q, k, v, **kwargs, return_lse=True, return_weights=True)
    assert [x.shape for x in result] == [(*q.shape[:-1], z.E), q.shape[:-1], (*q.shape[:-1], z.N)]
    q, k, v = (
        x.reshape(s) for x, s in ((q, (z.B, z.H, z.M, z.D)), (k, (z.B, z.Hk, z.N, z.D)), (v, (z.B, z.Hk, z.N, z.E)))
    )
    out, lse, weights = (x.reshape(z.B, z.H, z.M, *rest) for x, rest in zip(result, ((z.E,), (), (z.N,)), strict=True))
    assert np.isfinite(out).all()
    if kwargs.get("normalizer", Softmax()).sink is None:
        np.testing.assert_allclose(weights.sum(-1), (lse > -np.inf) * 1.0, rtol=1e-12)
    rng = np.random.default_rng(0)
    for _ in range(3 if z.B * z.H * z.M else 0):
        b, h, row = int(rng.integers(z.B)), int(rng.integers(z.H)), int(rng.integers(z.M))
        expected = one_row(q, k, v, z, kwargs, b, h, row)
        for got, want in zip((out[b, h, row], lse[b, h, row], weights[b, h, row]), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13, err_msg=f"{b, h, row}")


@pytest.mark.parametrize("case", [case for case in CASES if case.spoiled], ids=lambda case: case.name)
def test_spoiled_case_spoils_what_sees_it(case):
    from cases import allowed

    z = case.sizes
    q, k, v, kwargs = case.build(np.float64)
    out = reference.attention(q, k, v, **kwargs)
    reads = allowed(z, kwargs)
    group = z.H // z.Hk
    bad_k = ~np.isfinite(k).all(-1).repeat(group, axis=1)
    bad_v = ~np.isfinite(v).repeat(group, axis=1)
    may = (reads & bad_k[:, :, None]).any(-1)[..., None] | np.einsum("bhij,bhje->bhie", reads, bad_v).astype(bool)
    assert np.isfinite(out[~may]).all()
    assert not np.isfinite(out).all()
    only_v = np.einsum("bhij,bhje->bhie", reads, bad_v).astype(bool) & ~(reads & bad_k[:, :, None]).any(-1)[..., None]
    assert not np.isfinite(out[only_v]).any()


# --- less precision ---


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("float16", 2e-3), ("bfloat16", 2e-2)])
def test_compute_dtype_loses_what_it_should(dtype, error):
    q, k, v, kwargs = BY_NAME["plain"].build(np.float64)
    exact = reference.attention(q, k, v, **kwargs)
    less = reference.attention(q, k, v, **kwargs, compute_dtype=dtype)
    assert error / 30 < abs(less - exact).max() < error
    with pytest.raises(TypeError, match="compute_dtype is int32"):
        reference.attention(q, k, v, compute_dtype=np.int32)


@pytest.mark.parametrize(("dtype", "third"), [("float16", 0.333251953125), ("bfloat16", 0.333984375)])
def test_weights_are_rounded_before_they_meet_the_values(dtype, third):
    """Three even keys: float16 has 1365 / 4096 for a third, bfloat16 171 / 512."""
    out, lse, weights = attend((0.0, 0.0, 0.0), values=(1.0, 1.0, 1.0), compute_dtype=dtype)
    assert out == np.float32(3 * third)
    np.testing.assert_array_equal(weights, [np.float32(1) / np.float32(3)] * 3)
    np.testing.assert_allclose(lse, LOG(3), rtol=1e-7)


def test_bfloat16_rounding_is_that_of_ml_dtypes():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    from attn_numba.reference.forward import _rounded_to_bfloat16

    rng = np.random.default_rng(5)
    x = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([x, np.float32([0, -0.0, np.inf, -np.inf, 1, 1 + 2**-8, 1 + 3 * 2**-8, 3.4e38])])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(_rounded_to_bfloat16(x), x.astype(ml_dtypes.bfloat16).astype(np.float32))


# --- merging ---


def test_merge_is_the_whole():
    rng = np.random.default_rng(6)
    q, k, v = (rng.standard_normal((2, 3, n, 4)) for n in (5, 11, 11))
    sink = rng.standard_normal((2, 3))
    mask = CustomMask(lambda b, h, i, j, p: (j < i + 2) & (i != 3))
    whole, lse = reference.attention(q, k, v, mask=mask, query_offset=1, normalizer=Softmax(sink), return_lse=True)
    cuts = [0, 2, 2, 7, 10, 11]
    parts = [
        reference.attention(q, k[:, :, a:b], v[:, :, a:b], mask=mask, query_offset=1, key_offset=a, return_lse=True)
        for a, b in itertools.pairwise(cuts)
    ]
    outs, lses = [p.out for p in parts], [p.lse for p in parts]
    assert any((x == -np.inf).all() for x in lses)
    merged, total = reference.merge(outs, lses, sink=sink)
    np.testing.assert_allclose(merged, whole, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(total, lse, rtol=1e-13)
    without, lse = reference.attention(q, k, v, mask=mask, query_offset=1, return_lse=True)
    merged, total = reference.merge(outs, lses)
    np.testing.assert_allclose(merged, without, rtol=1e-13, atol=1e-15)
    np.testing.assert_allclose(total, lse, rtol=1e-13)


def test_merge_by_hand():
    out, lse = reference.merge([rows(1.0)[0, 0], rows(5.0)[0, 0]], [np.array([LOG(1)]), np.array([LOG(3)])])
    np.testing.assert_allclose([out.item(), lse.item()], [4.0, LOG(4)])
    out, lse = reference.merge(
        [rows(1.0)[0, 0], rows(5.0)[0, 0]], [np.array([LOG(1)]), np.array([LOG(3)])], sink=LOG(4)
    )
    np.testing.assert_allclose([out.item(), lse.item()], [2.0, LOG(8)])
    nothing = np.full((1, 2), -np.inf), np.zeros((1, 2, 3), np.float32)
    out, lse = reference.merge([nothing[1]] * 2, [nothing[0].astype(np.float32)] * 2)
    assert out.dtype == lse.dtype == np.float32
    assert not out.any()
    assert (lse == -np.inf).all()
    out, lse = reference.merge([nothing[1]], [nothing[0]], sink=0.75)
    assert not out.any()
    assert (lse == 0.75).all()


def test_merge_ignores_what_an_empty_part_holds():
    empty = np.full((1, 2), np.nan)
    out, lse = reference.merge([empty, np.ones((1, 2))], [np.array([-np.inf]), np.array([0.5])])
    np.testing.assert_array_equal(out, np.ones((1, 2)))
    np.testing.assert_array_equal(lse, [0.5])


@pytest.mark.parametrize(
    ("outs", "lses", "message"),
    [
        ([], [], "0 parts"),
        ([np.ones((2, 3))], [], "outs has 1 parts, lses 0"),
        ([np.ones((2, 3)), np.ones((2, 4))], [np.ones(2)] * 2, r"outs\[1\] has shape \(2, 4\)"),
        ([np.ones((2, 3))], [np.ones(3)], r"lses\[0\] has shape \(3,\)"),
        ([np.ones(3)], [np.ones(())], r"outs\[0\] has shape \(3,\)"),
    ],
)
def test_merge_refuses(outs, lses, message):
    with pytest.raises(ValueError, match=message):
        reference.merge(outs, lses)


# --- what is refused ---


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": np.ones(4)}, ValueError, "q has 1 axes"),
        ({"k": np.ones((1, 1, 1, 5, 4))}, ValueError, "k has 5 axes"),
        ({"k": np.ones((3, 2, 5, 4))}, ValueError, "k has 3 sequences; q has 2"),
        (
            {"k": np.ones((2, 5, 5, 4)), "v": np.ones((2, 5, 5, 4))},
            ValueError,
            "k has 5 heads; q has 6, not a multiple of 5",
        ),
        ({"q": np.ones((2, 0, 5, 4))}, ValueError, "q has 0 heads"),
        ({"k": np.ones((2, 2, 5, 3))}, ValueError, "k has head size 3; q has 4"),
        ({"v": np.ones((2, 2, 6, 4))}, ValueError, "v has 6 rows; k has 5"),
        ({"v": np.ones((2, 3, 5, 4))}, ValueError, "v has 3 heads; k has 2"),
        ({"k": np.ones((2, 2, 5, 4), np.float32)}, TypeError, "q, k, v have dtypes float64, float32, float64"),
        ({"q": np.ones((2, 6, 5, 4), int)}, TypeError, "q has dtype int64; needed float64"),
        ({"scale": np.nan}, ValueError, "scale is NaN"),
        ({"mask": np.ones((5, 5))}, TypeError, "Bias"),
        ({"mask": np.ones((3, 5), bool)}, ValueError, r"Dense: array has shape \(3, 5\)"),
        ({"modifiers": Causal()}, TypeError, "pass a mask as mask="),
        ({"modifiers": np.ones((5, 5))}, TypeError, r"Bias\(array\)"),
        ({"modifiers": [SoftCap(1.0), Dropout(0.1, 0)]}, TypeError, r"modifiers\[1\] is Dropout.*dropout="),
        ({"score": "dot"}, TypeError, r"score is str; needed Dot\(\)"),
        ({"normalizer": Softmax}, TypeError, "normalizer is the class Softmax"),
        ({"normalizer": Softmax(np.zeros(5))}, ValueError, r"Softmax: sink has shape \(5,\)"),
        ({"query_offset": 0.5}, TypeError, "query_offset is float of dtype float64"),
        ({"query_offset": [1, 2, 3]}, ValueError, r"query_offset has shape \(3,\)"),
        ({"key_offset": 2**30}, ValueError, "key_offset gives positions from 1073741824"),
        ({"dropout": Dropout(0.1, [1, 2, 3])}, ValueError, r"Dropout: seed has shape \(3,\)"),
        ({"dropout": 0.1}, TypeError, "dropout is float"),
    ],
)
def test_refused(change, error, message):
    arguments = {"q": np.ones((2, 6, 5, 4)), "k": np.ones((2, 2, 5, 4)), "v": np.ones((2, 2, 5, 4)), **change}
    with pytest.raises(error, match=message):
        reference.attention(arguments.pop("q"), arguments.pop("k"), arguments.pop("v"), **arguments)


def test_inputs_are_not_written():
    q, k, v, kwargs = BY_NAME["hidden NaN behind a mask"].build(np.float64)
    for x in (q, k, v):
        x.flags.writeable = False
    reference.attention(q, k, v, **kwargs)


def test_sizes_are_a_tuple_of_the_contract():
    assert Sizes._fields == ("B", "H", "Hk", "M", "N", "D", "E")

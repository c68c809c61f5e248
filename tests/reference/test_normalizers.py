"""Normalizers: worked by hand, by what makes their weights optimal, against SciPy's optimizer and literal formulas."""

import numpy as np
import pytest
import scipy.optimize

import attn_numba as an
from attn_numba import reference
from attn_numba.rules import (
    Bias,
    Causal,
    Cosine,
    DoubleSoftmax,
    Dropout,
    Entmax15,
    Padding,
    ReplaceExcluded,
    Softmax,
    Sparsemax,
    as_modifiers,
    places_of,
)
from cases import BY_NAME, CASES

KINDS = [Sparsemax, Entmax15, DoubleSoftmax]
SPARSE = [Sparsemax, Entmax15]


def takes_any_normalizer(case):
    return not any(modifier.softmax_only for modifier in as_modifiers(case.kwargs().get("modifiers")))


SMALL = [
    case for case in CASES if not case.spoiled and case.sizes.M * case.sizes.N <= 2e4 and takes_any_normalizer(case)
]


def weights_of(scores, normalizer, **kwargs):
    """Return the weights of these scores (M, N)."""
    s = np.asarray(scores, np.float64)
    q, k = np.zeros((s.shape[0], 1)), np.zeros((s.shape[1], 1))
    return reference.attention(q, k, k, modifiers=Bias(s), normalizer=normalizer, **kwargs, return_weights=True).weights


def scores_and_allowed(case):
    """Return the final scores of a case, as softmax shows them, and which keys are allowed and not out of reach."""
    q, k, v, kwargs = case.build(np.float64)
    kwargs.pop("normalizer", None)
    found = reference.attention(q, k, v, **kwargs, return_lse=True, return_weights=True)
    with np.errstate(divide="ignore"):
        logarithms = np.log(found.weights)
    seen = found.weights > 0
    return np.where(seen, logarithms + np.where(np.isfinite(found.lse), found.lse, 0)[..., None], -np.inf), seen


# --- by hand ---


def test_sparsemax():
    """(0.5, 0.1): threshold -0.2; (2, 0): one takes all; (0, 0, 0, -0.5): thirds."""
    np.testing.assert_allclose(weights_of([[0.5, 0.1]], Sparsemax()), [[0.7, 0.3]], rtol=1e-14)
    np.testing.assert_array_equal(weights_of([[2.0, 0.0]], Sparsemax()), [[1, 0]])
    np.testing.assert_array_equal(weights_of([[1.0, 0.0]], Sparsemax()), [[1, 0]])
    np.testing.assert_allclose(weights_of([[0, 0, 0, -0.5]], Sparsemax()), [[1 / 3, 1 / 3, 1 / 3, 0]], rtol=1e-14)
    np.testing.assert_allclose(weights_of([[1e6, 1e6 + 0.5]], Sparsemax()), [[0.25, 0.75]], rtol=1e-14)


def test_entmax15():
    """Halves 0.8 and 0.6 above a threshold of 0: their squares are 0.64 and 0.36."""
    np.testing.assert_allclose(weights_of([[1.6, 1.2, -1.0]], Entmax15()), [[0.64, 0.36, 0]], rtol=1e-14)
    np.testing.assert_allclose(weights_of([[7.2, 11.6, 11.2]], Entmax15()), [[0, 0.64, 0.36]], rtol=1e-12)
    np.testing.assert_array_equal(weights_of([[2.0, 0.0]], Entmax15()), [[1, 0]])
    np.testing.assert_allclose(weights_of([[3.0] * 4], Entmax15()), [[0.25] * 4], rtol=1e-14)


def test_double_softmax():
    """First 1/4 and 3/4, then exp(1/4) and exp(3/4) over their sum."""
    np.testing.assert_allclose(
        weights_of([[0.0, np.log(3)]], DoubleSoftmax()), [[0.3775406687981454, 0.6224593312018546]], rtol=1e-14
    )


def test_double_softmax_knows_what_is_far_from_what_is_absent():
    """A key with next to no weight after the first step weighs 1 in the second; one that is excluded weighs nothing."""
    e = np.e
    np.testing.assert_allclose(weights_of([[0.0, -1e9]], DoubleSoftmax()), [[e / (e + 1), 1 / (e + 1)]], rtol=1e-14)
    np.testing.assert_array_equal(weights_of([[0.0, -np.inf]], DoubleSoftmax()), [[1, 0]])
    np.testing.assert_array_equal(weights_of([[0.0, 5.0]], DoubleSoftmax(), mask=Padding(1)), [[1, 0]])
    replaced = ReplaceExcluded(np.array([[True, False]]), -1e9)
    found = reference.attention(np.zeros((1, 1)), np.zeros((2, 1)), np.array([[1.0], [0.0]]), modifiers=replaced,
                                normalizer=DoubleSoftmax())  # fmt: skip
    np.testing.assert_allclose(found, [[e / (e + 1)]], rtol=1e-14)


# --- optimality ---


@pytest.mark.parametrize(("kind", "alpha"), [(Sparsemax, 2.0), (Entmax15, 1.5)])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_case_meets_the_conditions_of_the_optimum(case, kind, alpha):
    """Rows are on the simplex, and ``p = max((alpha - 1) s - t, 0) ** (1 / (alpha - 1))`` with one t for the row."""
    s, allowed = scores_and_allowed(case)
    q, k, v, kwargs = case.build(np.float64)
    found = reference.attention(q, k, v, **{**kwargs, "normalizer": kind()}, return_weights=True)
    p = found.weights
    assert (p >= 0).all()
    assert (p[~allowed] == 0).all()
    rows = allowed.any(-1)
    np.testing.assert_allclose(p.sum(-1), rows, rtol=1e-12)
    if "dropout" not in kwargs:
        V = np.nan_to_num(v.reshape(case.sizes.B, case.sizes.Hk, *v.shape[-2:]), posinf=0, neginf=0)
        served = case.sizes.H // case.sizes.Hk
        out = p.reshape(case.sizes.B, case.sizes.H, *p.shape[-2:]) @ V.repeat(served, 1)
        np.testing.assert_allclose(found.out, out.reshape(found.out.shape), rtol=1e-11, atol=1e-13)
    inside = p > 0
    with np.errstate(invalid="ignore"):
        thresholds = np.where(inside, (alpha - 1) * s - p ** (alpha - 1), np.nan)[rows]
    outside = np.where(allowed & ~inside, (alpha - 1) * s, -np.inf)[rows]
    if not thresholds.size:
        return
    low, high = np.nanmin(thresholds, -1), np.nanmax(thresholds, -1)
    largest = 1 + np.abs(np.where(inside, s, 0)[rows]).max(-1)
    assert (high - low <= 1e-7 * largest).all() if alpha == 1.5 else (high - low <= 1e-12 * largest).all()
    assert (outside.max(-1) <= low + 1e-7 * largest).all()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", SPARSE)
def test_optimizer(kind, seed):
    """The point of the simplex nearest to the scores, and the one of greatest score plus Tsallis entropy (1.5)."""
    rng = np.random.default_rng(seed)
    s = rng.standard_normal(rng.integers(2, 7)) * 1.5

    def loss(p):
        p = np.maximum(p, 0)
        return ((p - s) ** 2).sum() if kind is Sparsemax else -(p @ s + 4 / 3 * (p - p**1.5).sum())

    best = scipy.optimize.minimize(
        loss, np.full(s.size, 1 / s.size), method="SLSQP", bounds=[(0, 1)] * s.size,
        constraints={"type": "eq", "fun": lambda p: p.sum() - 1}, options={"ftol": 1e-14, "maxiter": 500},
    )  # fmt: skip
    found = weights_of(s[None], kind())[0]
    np.testing.assert_allclose(found, best.x, atol=2e-5)
    assert loss(found) <= best.fun + 1e-9


@pytest.mark.parametrize(("kind", "alpha"), [(Sparsemax, 2.0), (Entmax15, 1.5)])
@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.1, 3.0, 1e4])
def test_long_rows(kind, alpha, spread):
    """Thresholds found by bisection, over 3000 keys, many of them tied."""
    rng = np.random.default_rng(1)
    s = np.round(rng.standard_normal((4, 3000)) * spread, 3)
    z = (alpha - 1) * s
    low, high = z.max(-1) - 1, z.max(-1)
    for _ in range(100):
        middle = (low + high) / 2
        above = (np.maximum(z - middle[:, None], 0) ** (1 / (alpha - 1))).sum(-1) >= 1
        low, high = np.where(above, middle, low), np.where(above, high, middle)
    expected = np.maximum(z - low[:, None], 0) ** (1 / (alpha - 1))
    np.testing.assert_allclose(weights_of(s, kind()), expected, rtol=1e-7, atol=1e-11)


# --- literally ---


def double_softmax_of(s, allowed):
    """Return the weights of one row, sums over its allowed keys."""
    a, w = np.zeros(len(s)), np.zeros(len(s))
    keys = [j for j in range(len(s)) if allowed[j]]
    total = sum(np.exp(s[j]) for j in keys)
    for j in keys:
        a[j] = np.exp(s[j]) / total
    total = sum(np.exp(a[j]) for j in keys)
    for j in keys:
        w[j] = np.exp(a[j]) / total
    return w


def test_double_softmax_of_torch(backend):
    torch = pytest.importorskip("torch")
    seeded = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, generator=seeded) for n in (5, 7, 7))
    once = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, dim=-1)
    expected = torch.softmax(once, dim=-1) @ v
    found = an.attention(q.numpy(), k.numpy(), v.numpy(), normalizer=DoubleSoftmax(), backend=backend)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-12, atol=1e-14)


FAR = {"ReplaceExcluded, large", "old fill, divided by the size"}  # scores that are allowed, but out of exp's reach


@pytest.mark.parametrize("case", [case for case in SMALL if case.name not in FAR], ids=lambda case: case.name)
def test_double_softmax_of_a_case(case):
    s, allowed = scores_and_allowed(case)
    q, k, v, kwargs = case.build(np.float64)
    kwargs["normalizer"] = DoubleSoftmax()
    found = reference.attention(q, k, v, **kwargs, return_weights=True).weights
    for row in np.ndindex(found.shape[:-1]):
        if row[-1] % 7 in (0, 1):  # some rows without keys where each third is
            np.testing.assert_allclose(found[row], double_softmax_of(s[row], allowed[row]), rtol=1e-10)


# --- laws ---


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_keys(kind):
    q, k, v, kwargs = BY_NAME["empty rows"].build(np.float64)
    found = reference.attention(q, k, v, **kwargs | {"normalizer": kind()}, return_weights=True)
    assert (found.out[:, :, ::3] == 0).all()
    assert (found.weights[:, :, ::3] == 0).all()
    np.testing.assert_allclose(found.weights[:, :, 1::3].sum(-1), 1, rtol=1e-12)
    for M, N in ((3, 0), (0, 3), (0, 0)):
        found = reference.attention(np.ones((M, 2)), np.ones((N, 2)), np.ones((N, 4)), normalizer=kind(),
                                    return_weights=True)  # fmt: skip
        np.testing.assert_array_equal(found.out, np.zeros((M, 4)))
        assert found.weights.shape == (M, N)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_excluded_keys_may_hold_anything(kind, bad):
    q, k, v, _ = BY_NAME["grouped heads"].build(np.float64)
    rules = {"normalizer": kind(), "mask": Padding(50), "return_weights": True}
    expected = reference.attention(q, k, v, **rules)
    k[:, :, 50:, ::3] = bad
    v[:, :, 50:, ::2] = bad
    found = reference.attention(q, k, v, **rules)
    np.testing.assert_array_equal(found.out, expected.out)
    np.testing.assert_array_equal(found.weights, expected.weights)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_score_that_is_no_number_spoils_its_row(kind, bad):
    s = np.zeros((3, 5))
    s[1, 2] = bad
    found = weights_of(s, kind())
    assert np.isnan(found[1]).all()
    np.testing.assert_allclose(found[[0, 2]], 0.2, rtol=1e-15)
    found = weights_of(s, kind(), mask=Causal(), query_offset=0)
    np.testing.assert_allclose(found[0], [1, 0, 0, 0, 0])
    np.testing.assert_allclose(found[1], [0.5, 0.5, 0, 0, 0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_value_is_seen_by_all_that_are_allowed(kind):
    """Also where its weight is 0: it is there."""
    v = np.array([[1.0, 2.0], [np.nan, 3.0]])
    s = np.array([[9.0, 0.0], [0.0, 0.0]])
    out = reference.attention(np.zeros((2, 1)), np.zeros((2, 1)), v, modifiers=Bias(s), normalizer=kind(),
                              mask=np.array([[True, True], [True, False]]))  # fmt: skip
    np.testing.assert_array_equal(np.isnan(out), [[True, False], [False, False]])
    np.testing.assert_array_equal(out[1], [1, 2])


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_comes_after(kind):
    q, k, v, kwargs = BY_NAME["dropout"].build(np.float64)
    drop = Dropout(0.3, 1234)
    found = reference.attention(q, k, v, **kwargs | {"dropout": drop, "normalizer": kind()}, return_weights=True)
    z = BY_NAME["dropout"].sizes
    np.testing.assert_allclose(found.weights.sum(-1), 1, rtol=1e-12)
    np.testing.assert_allclose(found.out, found.weights * drop.kept(places_of(z), z) / 0.7 @ v, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("kind", KINDS)
def test_another_score(kind):
    """A normalizer sees scores, whoever made them."""
    q, k, v, _ = BY_NAME["plain"].build(np.float64)
    unit = [x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k)]
    found = reference.attention(q, k, v, score=Cosine(), scale=4.0, normalizer=kind())
    np.testing.assert_allclose(found, reference.attention(*unit, v, scale=4.0, normalizer=kind()), rtol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("float16", 3e-2), ("bfloat16", 3e-1)])
def test_compute_dtype_loses_what_it_should(kind, dtype, error):
    q, k, v, _ = BY_NAME["plain"].build(np.float64)
    exact = reference.attention(q, k, v, normalizer=kind(), return_weights=True)
    found = reference.attention(q, k, v, normalizer=kind(), return_weights=True, compute_dtype=dtype)
    assert error * 1e-4 < np.abs(found.out - exact.out).max() < error
    np.testing.assert_allclose(found.weights.sum(-1), 1, rtol=1e-5)


# --- refused ---


@pytest.mark.parametrize("kind", KINDS)
def test_lse_is_softmax_only(kind):
    x = np.zeros((3, 2))
    message = f"return_lse is True, but {kind.__name__} has no lse; needed Softmax"
    with pytest.raises(ValueError, match=message):
        reference.attention(x, x, x, normalizer=kind(), return_lse=True)
    for backend in ("auto", "cpu", "reference"):
        with pytest.raises(ValueError, match=message):
            an.attention(x, x, x, normalizer=kind(), return_lse=True, backend=backend)


@pytest.mark.parametrize("kind", KINDS)
def test_reference_as_a_backend(kind):
    q, k, v, _ = BY_NAME["rank 3"].build(np.float32)
    expected = reference.attention(q, k, v, normalizer=kind(), return_weights=True)
    out = np.full(expected.out.shape, np.nan, np.float32)
    found = an.attention(q, k, v, normalizer=kind(), backend="reference", return_weights=True, out=out)
    assert found.out is out
    assert found._fields == ("out", "weights")
    np.testing.assert_array_equal(out, expected.out)
    np.testing.assert_array_equal(found.weights, expected.weights)
    np.testing.assert_array_equal(an.attention(q, k, v, normalizer=kind(), backend="reference"), out)


@pytest.mark.parametrize("normalizer", ["sparsemax", Sparsemax, Cosine()])
def test_what_is_no_normalizer(normalizer):
    x = np.zeros((3, 2))
    for attention in (reference.attention, an.attention):
        with pytest.raises(TypeError, match=r"normalizer is .*; needed Softmax\(\), Sparsemax\(\), Entmax15\(\) or"):
            attention(x, x, x, normalizer=normalizer)


def test_sinks_are_of_softmax_only():
    for kind in KINDS:
        with pytest.raises(TypeError):
            kind(sink=0.5)
    assert Softmax.streams
    assert not any(kind.streams for kind in KINDS)

"""Scores: worked by hand, against PyTorch, and against formulas written out; and where the CPU computes them too."""

# ruff: noqa: E501  a refusal a line

import itertools

import numpy as np
import pytest

import attn_numba as an
from attn_numba import reference
from attn_numba.rules import Additive, Bias, Bilinear, Causal, Cosine, Padding, Softmax, as_modifiers
from attn_numba.testing import check_attention
from cases import BY_NAME, CASES

SMALL = [case for case in CASES if not case.spoiled and case.sizes.M * case.sizes.N <= 2e4 and case.sizes.D <= 64]
HIDDEN = 5


def scores_of(q, k, **kwargs):
    """Return the scores that weights and lse are made of."""
    found = reference.attention(q, k, np.ones((*k.shape[:-1], 1)), **kwargs, return_lse=True, return_weights=True)
    return np.log(found.weights) + found.lse[..., None]


def made_for(kind, z, key_size=None, heads=True):
    """Return a score for calls of these sizes, its arrays by head or for all of them."""
    rng = np.random.default_rng(7)
    H, Hk = ((z.H,), (z.Hk,)) if heads else ((), ())
    key_size = key_size or z.D
    if kind is Cosine:
        return Cosine()
    if kind is Bilinear:
        return Bilinear(rng.standard_normal((*H, z.D, key_size)) / z.D)
    Wq, Wk = rng.standard_normal((*H, HIDDEN, z.D)), rng.standard_normal((*Hk, HIDDEN, key_size))
    return Additive(Wq / z.D**0.5, Wk / key_size**0.5, rng.standard_normal((*H, HIDDEN)))


def written_out(score, q, k):
    """Return the scores by the published formula; k has a head for each of q's."""
    if isinstance(score, Cosine):
        lengths = np.linalg.norm(q, axis=-1)[..., :, None] * np.linalg.norm(k, axis=-1)[..., None, :]
        return np.einsum("bhid,bhjd->bhij", q, k) / lengths
    if isinstance(score, Bilinear):
        W = np.broadcast_to(score.W, (q.shape[1], *score.W.shape[-2:]))
        return np.einsum("bhid,hde,bhje->bhij", q, W, k, optimize=True)
    served = q.shape[1] // score.Wk.shape[0] if score.Wk.ndim == 3 else 1
    Wq = np.broadcast_to(score.Wq, (q.shape[1], *score.Wq.shape[-2:]))
    Wk = np.broadcast_to(score.Wk.repeat(served, 0), (q.shape[1], *score.Wk.shape[-2:]))
    w = np.broadcast_to(score.w, (q.shape[1], HIDDEN))
    hidden = np.tanh(
        np.einsum("hud,bhid->bhiu", Wq, q)[..., :, None, :] + np.einsum("hud,bhjd->bhju", Wk, k)[:, :, None]
    )
    return np.einsum("hu,bhiju->bhij", w, hidden)


# --- by hand ---


def test_cosine():
    q, k = np.array([[3.0, 4.0]]), np.array([[4.0, 3.0], [-3.0, -4.0], [8.0, -6.0], [0.0, 0.0]])
    np.testing.assert_allclose(scores_of(q, k, score=Cosine()), [[24 / 25, -1, 0, 0]], atol=1e-15)
    np.testing.assert_allclose(scores_of(q, k, score=Cosine(), scale=-10.0), [[-9.6, 10, 0, 0]], atol=1e-14)
    np.testing.assert_allclose(scores_of(0 * q, k, score=Cosine()), np.zeros((1, 4)), atol=1e-15)


def test_bilinear():
    """(2, 3) W = (2, 7, -3), and (2, 7, -3) . (1, 1, 2) = 3."""
    W = [[1, 2, 0], [0, 1, -1]]
    q, k = np.array([[2.0, 3.0]]), np.array([[1.0, 1.0, 2.0], [0.0, 0.0, 1.0]])
    np.testing.assert_allclose(scores_of(q, k, score=Bilinear(W)), [[3, -3]], rtol=1e-14)
    np.testing.assert_allclose(scores_of(q, k, score=Bilinear(W), scale=0.5), [[1.5, -1.5]], rtol=1e-14)


def test_additive():
    """Units (0.5 + 0.25, 0.25 - 0.25), so 2 tanh(0.75); then (0.5 + 0, 0.25 - 0), so 2 tanh(0.5) + 3 tanh(0.25)."""
    score = Additive([[1, 0], [0, 1]], [[1], [-1]], [2, 3])
    q, k = np.array([[0.5, 0.25]]), np.array([[0.25], [0.0]])
    expected = [[2 * 0.6351489523872873, 2 * 0.46211715726000975 + 3 * 0.24491866240370913]]
    np.testing.assert_allclose(scores_of(q, k, score=score), expected, rtol=1e-14)
    np.testing.assert_allclose(scores_of(q, k, score=score, scale=3.0), 3 * np.array(expected), rtol=1e-14)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("dtype", "size"), [("float64", 1e-200), ("float64", 1e200), ("float32", 1e-30), ("float32", 1e30)]
)
def test_cosine_of_long_and_short_vectors(dtype, size, backend):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, 9, 5)).astype(dtype) for _ in range(3))
    expected = an.attention(q, k, v, score=Cosine(), backend=backend)
    found = an.attention(q * np.dtype(dtype).type(size), k, v, score=Cosine(), backend=backend)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


# --- against others ---


@pytest.mark.parametrize("kind", [Cosine, Bilinear, Additive])
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_case_is_a_bias_of_the_formula(case, kind):
    """With the scores written out as a bias of a dot product that is 0, the rest of the call is the same."""
    z = case.sizes
    q, k, v, kwargs = case.build(np.float64)
    score = made_for(kind, z, heads=case.rank == 4)
    softmax = isinstance(kwargs.get("normalizer", Softmax()), Softmax)
    kwargs = {**kwargs, "score": score, "return_lse": softmax, "return_weights": True}
    found = reference.attention(q, k, v, **kwargs)
    q4, k4 = q.reshape(z.B, z.H, z.M, z.D), k.reshape(z.B, z.Hk, z.N, z.D).repeat(z.H // z.Hk, 1)
    with np.errstate(all="ignore"):
        s = written_out(score, q4, k4) * kwargs.pop("scale", 1.0)
    excluded = np.isneginf(s)
    kwargs |= {
        "score": None,
        "modifiers": [Bias(np.where(excluded, np.nan, s)), *as_modifiers(kwargs.get("modifiers"))],
    }
    expected = reference.attention(0 * np.nan_to_num(q, posinf=0, neginf=0), 0 * np.nan_to_num(k), v, **kwargs)
    if softmax:
        np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.weights, expected.weights, rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(found.out, expected.out, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["plain", "head size 1", "head size 17", "5 sequences, 1 head", "1 query, 1 key"])
def test_torch(name):
    torch = pytest.importorskip("torch")
    case = BY_NAME[name]
    z = case.sizes
    q, k, _, _ = case.build(np.float64)
    q_, k_ = torch.from_numpy(q)[..., :, None, :], torch.from_numpy(k)[..., None, :, :]
    expected = torch.nn.functional.cosine_similarity(q_, k_, dim=-1).numpy()
    np.testing.assert_allclose(scores_of(q, k, score=Cosine()), expected, rtol=1e-9, atol=1e-12)
    bilinear, additive = (made_for(kind, z, heads=False) for kind in (Bilinear, Additive))
    shape = (z.B, z.H, z.M, z.N, z.D)
    pairs = (x.expand(shape).reshape(-1, z.D).contiguous() for x in (q_, k_))
    expected = torch.nn.functional.bilinear(*pairs, torch.from_numpy(bilinear.W.copy())[None]).numpy()
    np.testing.assert_allclose(scores_of(q, k, score=bilinear), expected.reshape(shape[:-1]), rtol=1e-9, atol=1e-12)
    Wq, Wk, w = (torch.from_numpy(x.copy()) for x in (additive.Wq, additive.Wk, additive.w))
    hidden = torch.tanh(torch.nn.functional.linear(q_, Wq) + torch.nn.functional.linear(k_, Wk))
    expected = torch.nn.functional.linear(hidden, w[None])[..., 0].numpy()
    np.testing.assert_allclose(scores_of(q, k, score=additive), expected, rtol=1e-9, atol=1e-12)


def test_keras_additive_attention(backend):
    """The layer as its documentation has it: "scores = reduce_sum(scale * tanh(query + key), axis=-1)", then softmax.

    Keras (2024), "AdditiveAttention layer", API documentation, keras.io.
    """
    rng = np.random.default_rng(0)
    query, value, key = (rng.standard_normal((2, n, 6)) for n in (5, 9, 9))
    weight = rng.standard_normal(6)
    scores = np.sum(weight * np.tanh(query[:, :, None] + key[:, None]), axis=-1)
    distribution = np.exp(scores) / np.exp(scores).sum(axis=-1, keepdims=True)
    score = Additive(np.eye(6), np.eye(6), weight)
    found = an.attention(query[:, None], key[:, None], value[:, None], score=score, backend=backend)[:, 0]
    np.testing.assert_allclose(found, distribution @ value, rtol=1e-12, atol=1e-14)


# --- laws ---


@pytest.mark.parametrize("kind", [Bilinear, Additive])
def test_heads_have_their_own_arrays(kind):
    """Six query heads read two key heads; each is the call of that head alone. Keys have another head size."""
    case = BY_NAME["grouped heads"]
    z, rng = case.sizes, np.random.default_rng(0)
    q, _, v, _ = case.build(np.float64)
    k = rng.standard_normal((z.B, z.Hk, z.N, 7))
    score = made_for(kind, z, key_size=7)
    found = reference.attention(q, k, v, score=score, return_weights=True).weights
    for h in range(z.H):
        key_head = h // (z.H // z.Hk)
        arrays = [score.W[h]] if kind is Bilinear else [score.Wq[h], score.Wk[key_head], score.w[h]]
        one, key = np.s_[:, h : h + 1], np.s_[:, key_head : key_head + 1]
        alone = reference.attention(q[one], k[key], v[key], score=kind(*arrays), return_weights=True).weights
        np.testing.assert_allclose(found[one], alone, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("kind", [Cosine, Bilinear, Additive])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
def test_excluded_keys_may_hold_anything(kind, bad):
    q, k, v, _ = BY_NAME["plain"].build(np.float64)
    score = made_for(kind, BY_NAME["plain"].sizes)
    for backend in ("reference", "cpu") if score.dots else ("reference",):
        rules = {"score": score, "mask": Padding(50), "backend": backend}
        expected = an.attention(q, k, v, **rules)
        spoiled = k.copy()
        spoiled[:, :, 50:, ::3] = bad
        np.testing.assert_array_equal(an.attention(q, spoiled, v, **rules), expected)


@pytest.mark.parametrize("kind", [Cosine, Bilinear, Additive])
def test_a_nan_spoils_the_rows_that_see_it(kind):
    q, k, v, _ = BY_NAME["Causal"].build(np.float64)
    score = made_for(kind, BY_NAME["Causal"].sizes)
    for backend in ("reference", "cpu") if score.dots else ("reference",):
        rules = {"score": score, "mask": Causal(), "backend": backend}
        expected = an.attention(q, k, v, **rules)
        keys, queries = k.copy(), q.copy()
        keys[0, 1, 30, 2] = queries[1, 2, 9, 3] = np.nan
        found = an.attention(queries, keys, v, **rules)
        seen = np.zeros(found.shape[:3], bool)
        seen[0, 1, 30:] = seen[1, 2, 9] = True
        assert np.isnan(found[seen]).all()
        np.testing.assert_array_equal(found[~seen], expected[~seen])


@pytest.mark.parametrize("kind", [Cosine, Bilinear, Additive])
@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-5), ("float16", 3e-2), ("bfloat16", 3e-1)])
def test_compute_dtype_loses_what_it_should(kind, dtype, error):
    q, k, v, _ = BY_NAME["plain"].build(np.float64)
    score = made_for(kind, BY_NAME["plain"].sizes)
    exact = reference.attention(q, k, v, score=score)
    found = reference.attention(q, k, v, score=score, compute_dtype=dtype)
    assert error * 1e-4 < np.abs(found - exact).max() < error


# --- on the CPU ---

NAMES = [
    "plain", "grouped heads", "head size 1", "head size 17", "head size 5, value size 17", "0 queries", "0 keys",
    "1 query, 1 key", "no sequence", "layout swapped", "layout columns", "layout reversed", "rank 2", "rank 3",
    "Causal, ends together", "SlidingWindow both sides", "Padding", "Neighborhood 2-D", "BlockSparse, odd tile",
    "Dense", "SoftCap", "Bias (BHMN)", "ALiBi", "Temperature", "scale negative", "sink by head", "empty rows",
    "dropout", "hidden NaN behind a mask", "hidden NaN between keys", "seen NaN and causal",
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("name", "kind"), list(itertools.product(NAMES, [Cosine, Bilinear])))
def test_cpu(name, kind, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    case = BY_NAME[name]
    q, k, v, kwargs = case.build(dtype)
    check_attention(q, k, v, "cpu", name=name, **kwargs, score=made_for(kind, case.sizes))


def test_cpu_with_keys_of_another_head_size():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype("f4") for shape in ((2, 4, 33, 8), (2, 2, 70, 21), (2, 2, 70, 6)))
    check_attention(q, k, v, "cpu", score=Bilinear(rng.standard_normal((8, 21))), mask=Causal(), query_offset=37)


@pytest.mark.parametrize("kind", [Cosine, Bilinear])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
def test_cpu_bits_depend_on_the_row_alone(kind, dtype):
    """One row of queries, one sequence, and any number of threads: the same bits as within the whole."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((3, 4, n, 40)).astype(dtype) for n in (65, 90, 90))
    score = Bilinear(rng.standard_normal((40, 40))) if kind is Bilinear else Cosine()
    whole = an.attention(q, k, v, score=score)
    for row in (0, 31, 64):
        np.testing.assert_array_equal(
            an.attention(q[:, :, row : row + 1], k, v, score=score)[:, :, 0], whole[:, :, row]
        )
    np.testing.assert_array_equal(an.attention(q[1], k[1], v[1], score=score), whole[1])
    swapped = [np.asarray(x, order="F") for x in (q, k, v)]
    np.testing.assert_array_equal(an.attention(*swapped, score=score), whole)
    with an.threads(1):
        np.testing.assert_array_equal(an.attention(q, k, v, score=score), whole)


def test_rules_of_one_call_are_not_another_scores():
    """Calls alike but for the score bind rules of their own: sizes and dtype of the kernel's call differ."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 12, 8)).astype(np.float16) for _ in range(3))
    rules = {"mask": Causal(), "modifiers": an.SoftCap(3.0), "scale": 1.0}
    for score in (None, Cosine(), Bilinear(np.eye(8)), Bilinear(rng.standard_normal((8, 8))), None):
        found = an.attention(q, k, v, score=score, **rules)
        np.testing.assert_allclose(found, an.attention(q, k, v, score=score, **rules, backend="reference"), atol=2e-3)


# --- errors ---

ones = np.ones
REFUSED = {
    "W is a word": (lambda: Bilinear("x"), TypeError, "Bilinear: W"),
    "W is complex": (lambda: Bilinear(ones((2, 2), complex)), TypeError, "Bilinear: W has dtype complex128"),
    "W is one number": (lambda: Bilinear(1.0), ValueError, r"Bilinear: W has shape \(\); needed \(Dq, Dk\) or \(H, Dq"),
    "W is a row": (lambda: Bilinear(ones(3)), ValueError, r"Bilinear: W has shape \(3,\)"),
    "W has 4 axes": (lambda: Bilinear(ones((1, 1, 2, 2))), ValueError, r"Bilinear: W has shape \(1, 1, 2, 2\)"),
    "W is empty": (lambda: Bilinear(ones((2, 0))), ValueError, r"Bilinear: W has shape \(2, 0\); needed sizes of at"),
    "w is a number": (lambda: Additive(ones((2, 3)), ones((2, 3)), 1.0), ValueError, r"w has shape \(\); .*\(hidden,\)"),
    "Wq is a row": (lambda: Additive(ones(3), ones((2, 3)), ones(2)), ValueError, r"Additive: Wq has shape \(3,\)"),
    "Wk has 4 axes": (lambda: Additive(ones((2, 3)), ones((1, 1, 2, 3)), ones(2)), ValueError, "Additive: Wk"),
    "hidden of Wk": (lambda: Additive(ones((2, 3)), ones((4, 3)), ones(2)), ValueError, "Wk has 4 hidden units; Wq has 2"),
    "hidden of w": (lambda: Additive(ones((2, 3)), ones((2, 3)), ones(5)), ValueError, "w has 5 hidden units; Wq has 2"),
    "cosine": (lambda: call(Cosine(), D=8, Dk=5), ValueError, "k has head size 5; q has 8"),
    "W for another q": (lambda: call(Bilinear(ones((7, 5))), Dk=5), ValueError, r"W has shape \(7, 5\); .* = \(8, 5\) or \(4, 8, 5\)"),
    "W for other heads": (lambda: call(Bilinear(ones((2, 8, 8)))), ValueError, r"Bilinear: W has shape \(2, 8, 8\)"),
    "Wq for another q": (lambda: call(Additive(ones((3, 7)), ones((3, 8)), ones(3))), ValueError, r"Additive: Wq has shape \(3, 7\)"),
    "Wk for another k": (lambda: call(Additive(ones((3, 8)), ones((3, 7)), ones(3))), ValueError, r"Additive: Wk has shape \(3, 7\)"),
    "Wk for query heads": (
        lambda: call(Additive(ones((3, 8)), ones((4, 3, 8)), ones(3))), ValueError, r"Wk has shape \(4, 3, 8\); .* or \(Hk, hidden, Dk\)"
    ),
    "w for other heads": (lambda: call(Additive(ones((3, 8)), ones((3, 8)), ones((2, 3)))), ValueError, r"Additive: w has shape \(2, 3\)"),
    "a class": (lambda: call(Cosine), TypeError, r"score is the class Cosine; needed Dot\(\), Cosine\(\)"),
}  # fmt: skip


def call(score, D=8, Dk=8):
    q, k, v = np.zeros((2, 4, 6, D)), np.zeros((2, 2, 9, Dk)), np.zeros((2, 2, 9, 5))
    with pytest.raises((TypeError, ValueError)) as refused:
        reference.attention(q, k, v, score=score)
    with pytest.raises(refused.type) as again:
        an.attention(q, k, v, score=score)
    assert str(again.value) == str(refused.value)
    raise refused.value


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    make, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        make()


def test_arrays_are_copied():
    W = np.ones((3, 3))
    score = Bilinear(W)
    W[:] = 5
    assert (score.W == 1).all()
    with pytest.raises(ValueError, match="read-only"):
        score.W[0, 0] = 2

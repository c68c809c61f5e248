"""What is attended to, dense: worked by hand, and entropies against SciPy's and PyTorch's."""

import numpy as np
import pytest
import scipy.stats

from attn_numba import reference
from attn_numba.rules import (
    Bias,
    Cosine,
    DoubleSoftmax,
    Dropout,
    Entmax15,
    Padding,
    Softmax,
    Sparsemax,
)
from cases import BY_NAME

WITNESSED = [
    "plain", "Causal", "sharp", "scale 0", "grouped heads", "SameDocument", "Bias, some minus infinity", "empty rows",
    "hidden NaN behind a mask",
]  # fmt: skip
NORMALIZERS = [Softmax, Sparsemax, Entmax15, DoubleSoftmax]


def of_weights(function, weights, *arguments, **rules):
    """Return what a function says of rows of weights (M, N) that sum to 1: their logarithms are the scores."""
    weights = np.asarray(weights, np.float64)
    q, k = np.zeros((weights.shape[0], 1)), np.zeros((weights.shape[1], 1))
    with np.errstate(divide="ignore"):
        return function(q, k, *arguments, modifiers=Bias(np.log(weights)), **rules)


# --- by hand ---

WEIGHTS = [[0.5, 0.25, 0.125, 0.125], [0, 1, 0, 0], [0.25, 0.25, 0.25, 0.25]]


def test_entropy():
    """In bits 1/2 + 2/4 + 3/8 + 3/8 = 7/4, then 0, then 2."""
    bits = of_weights(reference.entropy, WEIGHTS) / np.log(2)
    np.testing.assert_allclose(bits, [1.75, 0, 2], rtol=1e-14)
    assert not np.signbit(bits).any()


def test_column_sums():
    np.testing.assert_allclose(of_weights(reference.column_sums, WEIGHTS), [0.75, 1.5, 0.375, 0.375], rtol=1e-14)


def test_top_keys():
    found = of_weights(reference.top_keys, WEIGHTS, 3)
    assert found.indices.tolist() == [[0, 1, 2], [1, 0, 2], [0, 1, 2]]
    np.testing.assert_allclose(found.weights, [[0.5, 0.25, 0.125], [1, 0, 0], [0.25, 0.25, 0.25]], rtol=1e-14)


def test_weights_of():
    np.testing.assert_allclose(of_weights(reference.weights_of, WEIGHTS), WEIGHTS, rtol=1e-14)
    np.testing.assert_allclose(of_weights(reference.weights_of, WEIGHTS, rows=slice(0, 3, 2)), WEIGHTS[::2], rtol=1e-14)


def test_sparse_weights():
    """Scores 0.5 and 0.1 have the sparse weights 0.7 and 0.3; a third key is too low for any."""
    q, k = np.ones((1, 1)), np.array([[0.1], [-2.0], [0.5]])
    rules = {"normalizer": Sparsemax(), "scale": 1.0}
    np.testing.assert_allclose(reference.entropy(q, k, **rules), [-0.7 * np.log(0.7) - 0.3 * np.log(0.3)], rtol=1e-14)
    found = reference.top_keys(q, k, 3, **rules)
    assert found.indices.tolist() == [[2, 0, 1]]
    np.testing.assert_allclose(found.weights, [[0.7, 0.3, 0]], rtol=1e-14)


def test_a_sink_adds_nothing():
    """Two keys and a sink of equal scores: each key has a third, and two thirds of ln 3 are the keys'."""
    q, k = np.zeros((1, 1)), np.zeros((2, 1))
    rules = {"normalizer": Softmax(sink=0.0)}
    np.testing.assert_allclose(reference.entropy(q, k, **rules), [2 / 3 * np.log(3)], rtol=1e-14)
    np.testing.assert_allclose(reference.column_sums(q, k, **rules), [1 / 3, 1 / 3], rtol=1e-14)


def test_a_query_without_keys():
    q, k = np.zeros((2, 1, 2, 1)), np.zeros((2, 1, 3, 1))
    rules = {"mask": Padding([0, 2])}
    np.testing.assert_allclose(reference.entropy(q, k, **rules)[:, 0], [[0, 0], [np.log(2)] * 2], rtol=1e-14)
    np.testing.assert_array_equal(reference.column_sums(q, k, **rules)[:, 0], [[0, 0, 0], [1, 1, 0]])
    assert reference.top_keys(q, k, 3, **rules).indices[0, 0].tolist() == [[0, 1, 2]] * 2


def test_nan_counts_as_largest():
    """It spoils its row of weights, wherever the row has keys that are allowed: those come first."""
    q, k = np.array([[1.0], [np.nan]]), np.array([[1.0], [2.0], [3.0]])
    allowed = np.array([[True, True, True], [False, True, True]])
    found = reference.top_keys(q, k, 3, mask=allowed)
    assert found.indices.tolist() == [[2, 1, 0], [1, 2, 0]]
    assert np.isnan(found.weights).tolist() == [[False] * 3, [True, True, False]]
    assert np.isnan(reference.entropy(q, k, mask=allowed)).tolist() == [False, True]
    assert np.isnan(reference.column_sums(q, k, mask=allowed)).tolist() == [False, True, True]


def test_weights_that_round_to_the_same_number_are_equal():
    """Weights 1/2 and 1/2 + 2**-30: in float32 they are the same, and the lower row comes first."""
    q, k = np.ones((1, 1)), np.array([[0.0], [2.0**-28]])
    assert reference.top_keys(q, k, 2).indices.tolist() == [[1, 0]]
    found = reference.top_keys(q.astype(np.float32), k.astype(np.float32), 2)
    assert found.indices.tolist() == [[0, 1]]
    assert found.weights.tolist() == [[0.5, 0.5]]


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtypes(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k, _, _ = BY_NAME["plain"].build(dtype)
    expected = np.float64 if dtype == "float64" else np.float32
    found = [f(q, k, score=Cosine()) for f in (reference.weights_of, reference.entropy, reference.column_sums)]
    indices, weights = reference.top_keys(q, k, 3, score=Cosine())
    assert [x.dtype for x in (*found, weights)] == [expected] * 4
    assert indices.dtype == np.int64
    wide = [x.astype(np.float64) for x in (q, k)]
    np.testing.assert_array_equal(found[1], reference.entropy(*wide, score=Cosine()).astype(expected))


def test_other_dtypes_are_refused():
    q = np.zeros((2, 3))
    with pytest.raises(TypeError, match="q has dtype int64"):
        reference.entropy(q.astype(np.int64), q)
    with pytest.raises(TypeError, match="float64, float32"):
        reference.entropy(q, q.astype(np.float32))


# --- against the weights of `attention`, and others ---


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", WITNESSED)
def test_the_weights_are_those_of_attention(name, normalizer):
    q, k, v, kwargs = BY_NAME[name].build(np.float32)
    kwargs["normalizer"] = normalizer()
    expected = reference.attention(q, k, v, **kwargs, return_weights=True).weights
    np.testing.assert_array_equal(reference.weights_of(q, k, **kwargs), expected)
    dropped = reference.weights_of(q, k, **{"query_offset": 0, **kwargs}, dropout=Dropout(0.5, 1))
    np.testing.assert_array_equal(dropped, expected)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("name", WITNESSED)
def test_scipy_entropy(name, normalizer):
    q, k, v, kwargs = BY_NAME[name].build(np.float64)
    kwargs["normalizer"] = normalizer()
    weights = reference.attention(q, k, v, **kwargs, return_weights=True).weights
    some = weights.any(axis=-1)
    found = reference.entropy(q, k, **kwargs)
    np.testing.assert_allclose(found[some], scipy.stats.entropy(weights[some], axis=-1), rtol=1e-12, atol=1e-14)
    np.testing.assert_array_equal(found[~some], 0)


@pytest.mark.parametrize("name", WITNESSED)
def test_torch(name):
    """PyTorch's softmax of the scores, the entropy of the distribution that it makes of them, and its top keys."""
    torch = pytest.importorskip("torch")
    q, k, v, kwargs = BY_NAME[name].build(np.float64)
    found = reference.attention(q, k, v, **kwargs, return_lse=True, return_weights=True)
    some = np.isfinite(found.lse)
    with np.errstate(divide="ignore"):
        scores = torch.from_numpy(np.log(found.weights[some]))
    witness = torch.distributions.Categorical(logits=scores)
    np.testing.assert_allclose(reference.entropy(q, k, **kwargs)[some], witness.entropy(), rtol=1e-12, atol=1e-14)
    top, witnessed = reference.top_keys(q, k, 1, **kwargs), torch.softmax(scores, dim=-1).topk(1)
    np.testing.assert_allclose(top.weights[some], witnessed.values, rtol=1e-12)
    if name != "scale 0":  # where all keys weigh the same, PyTorch takes any
        np.testing.assert_array_equal(top.indices[some], witnessed.indices)

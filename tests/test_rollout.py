"""Rollout against its formulas written out, numbers worked by hand, and what it refuses."""

import re

import numpy as np
import pytest

import attn_numba as an

DTYPES = ("float64", "float32", "float16", "bfloat16")


class Elsewhere:
    """An array on a GPU, as far as a glance tells."""

    shape = (2, 3, 4, 4)
    __cuda_array_interface__ = {"shape": shape, "typestr": "<f8", "data": (0, False), "version": 3}  # noqa: RUF012


def layers(*shape, count=3, dtype=np.float64):
    """Return weights of layers, rows that sum to 1."""
    weights = np.random.default_rng(5).random((count, *shape))
    return [(w / w.sum(axis=-1, keepdims=True)).astype(dtype) for w in weights]


def written_out(weights, residual):
    """The formulas one after the other, in float64, for weights (B, H, M, M)."""
    total = np.eye(weights[0].shape[-1])
    for w in weights:
        A = residual * np.eye(w.shape[-1]) + (1 - residual) * w.astype(np.float64).mean(axis=1)
        total = A / A.sum(axis=-1, keepdims=True) @ total
    return total


@pytest.mark.parametrize("residual", [0, 0.25, 0.5, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rollout(residual, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    weights = layers(2, 3, 7, 7, dtype=dtype)
    found = an.rollout(weights, residual)
    assert found.dtype == (np.float64 if dtype == "float64" else np.float32)
    assert found.shape == (2, 7, 7)
    tolerance = 1e-14 if dtype == "float64" else 1e-6
    np.testing.assert_allclose(found, written_out(weights, residual), rtol=0, atol=tolerance)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=tolerance)


def test_rollout_by_hand():
    """Layer 1 mixes states 1 and 2 to (3/4, 1/4; 1/2, 1/2) with the residual, layer 2 halves 1 and keeps 2."""
    first = np.array([[0.5, 0.5], [1.0, 0.0]])
    second = np.array([[0.0, 1.0], [0.0, 1.0]])
    np.testing.assert_array_equal(an.rollout([first]), [[[0.75, 0.25], [0.5, 0.5]]])
    np.testing.assert_array_equal(an.rollout([first, second]), [[[0.625, 0.375], [0.5, 0.5]]])
    np.testing.assert_array_equal(an.rollout([second, first]), [[[0.375, 0.625], [0.25, 0.75]]])
    np.testing.assert_array_equal(an.rollout([first, second], residual=0), [[[1, 0], [1, 0]]])
    np.testing.assert_array_equal(an.rollout([first, second], residual=1), [[[1, 0], [0, 1]]])


def test_rollout_of_weights_with_fewer_axes():
    weights = layers(4, 6, 6)
    expected = an.rollout([w[None] for w in weights])
    np.testing.assert_array_equal(an.rollout(weights), expected)
    np.testing.assert_array_equal(an.rollout(np.stack(weights)), expected)
    np.testing.assert_array_equal(an.rollout(w for w in weights), expected)
    heads = an.rollout([w[:1] for w in weights])
    np.testing.assert_array_equal(an.rollout([w[0] for w in weights]), heads)
    assert expected.shape == heads.shape == (1, 6, 6)
    twice = [np.concatenate([weights[0], weights[0]]), *weights[1:]]  # another number of heads, the same mean
    np.testing.assert_allclose(an.rollout(twice), expected, rtol=1e-14)
    assert an.rollout([np.zeros((2, 3, 0, 0))]).shape == (2, 0, 0)
    assert an.rollout([np.zeros((0, 3, 4, 4))]).shape == (0, 4, 4)


@pytest.mark.parametrize("residual", [0.3, 0])
def test_rollout_of_a_state_that_attends_to_nothing(residual):
    """It stays what it is; without a residual nothing is left of it."""
    weights = layers(1, 2, 5, 5)
    for w in weights:
        w[:, :, 2] = 0
    found = an.rollout(weights, residual)
    np.testing.assert_array_equal(found[0, 2], np.eye(5)[2] if residual else 0)
    assert np.isfinite(found).all()


def test_rollout_of_causal_weights_is_causal():
    q = np.random.default_rng(6).standard_normal((2, 3, 8, 4))
    weights = [an.weights_of(q * n, q, mask=an.Causal(), backend="reference") for n in (1, 2, 3)]
    found = an.rollout(weights)
    np.testing.assert_array_equal(np.triu(found, 1), 0)
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-14)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_nan_reaches_the_rows_of_rollout_that_depend_on_it(layer):
    weights = [np.tril(w) for w in layers(1, 2, 5, 5)]
    clean = an.rollout(weights)
    before = [w.copy() for w in weights]
    weights[layer][0, 1, 3, 2] = np.nan
    found = an.rollout(weights)
    np.testing.assert_array_equal(found[0, :3], clean[0, :3])
    assert np.isnan(found[0, 3]).all()
    assert np.isnan(found[0, 4]).all() == (layer < 2)
    if layer == 2:
        np.testing.assert_array_equal(found[0, 4], clean[0, 4])
    weights[layer][0, 1, 3, 2] = before[layer][0, 1, 3, 2]
    for w, same in zip(weights, before, strict=True):  # inputs are left as they are
        np.testing.assert_array_equal(w, same)


def test_rollout_does_not_depend_on_strides():
    weights = layers(2, 8, 20, 20, dtype=np.float32)
    turned = [np.ascontiguousarray(w.swapaxes(1, 3)).swapaxes(1, 3) for w in weights]
    np.testing.assert_array_equal(an.rollout(turned), an.rollout(weights))


W = np.full((2, 3, 4, 4), 0.25)


@pytest.mark.parametrize(
    ("weights", "residual", "kind", "message"),
    [
        ([], 0.5, ValueError, "weights_per_layer is empty; needed at least one layer"),
        (3, 0.5, TypeError, "weights_per_layer is int; needed a sequence of arrays"),
        ([W, [[1.0]]], 0.5, TypeError, "weights_per_layer[1] is list; needed an array"),
        ([W.astype(int)], 0.5, TypeError, "weights_per_layer[0] has dtype int64; needed float64"),
        ([W, W.astype("f4")], 0.5, TypeError, "weights_per_layer[1] has dtype float32; weights_per_layer[0]"),
        ([W[..., :3]], 0.5, ValueError, "weights_per_layer[0] has shape (2, 3, 4, 3); needed (B, H, M, M)"),
        (W[0, 0], 0.5, ValueError, "weights_per_layer[0] has shape (4,); needed (B, H, M, M)"),
        ([W[:, :0]], 0.5, ValueError, "weights_per_layer[0] has 0 heads; needed at least 1"),
        ([W, W[:1]], 0.5, ValueError, "weights_per_layer[1] has 1 sequences of 4 states; weights_per_layer[0]"),
        ([W, W[..., :3, :3]], 0.5, ValueError, "[1] has 2 sequences of 3 states; weights_per_layer[0] has 2 of 4"),
        ([Elsewhere()], 0.5, NotImplementedError, "weights_per_layer[0] is on a GPU; rollout takes arrays in host"),
        ([W], -0.1, ValueError, "rollout: residual is -0.1; needed 0 to 1"),
        ([W], 1.5, ValueError, "rollout: residual is 1.5; needed 0 to 1"),
        ([W], np.nan, ValueError, "rollout: residual is nan; needed 0 to 1"),
        ([W], "half", TypeError, "rollout: residual"),
        ([W], None, TypeError, "rollout: residual"),
    ],
)  # fmt: skip
def test_rollout_refuses(weights, residual, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        an.rollout(weights, residual)

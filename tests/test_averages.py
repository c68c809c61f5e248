"""Means over cells: of weights without the whole of them, of masks, of entropies."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import attn_numba as an
from attn_numba import averages
from attn_numba.averages import Averages, average, average_entropy, average_mask, average_weights

RANDOM = np.random.default_rng(0)
Q, K = RANDOM.standard_normal((2, 4, 37, 8)), RANDOM.standard_normal((2, 2, 41, 8))
RULES = {"mask": an.Causal() & an.Padding([20, 41]), "query_offset": 4, "modifiers": an.SoftCap(2.0)}


def cell_means(array, rows, columns):
    """Return the means over cells, one by one."""
    M, N = array.shape[-2:]
    means = [
        [array[..., i : i + rows, j : j + columns].mean((-2, -1)) for j in range(0, N, columns)]
        for i in range(0, M, rows)
    ]
    return np.moveaxis(np.array(means), (0, 1), (-2, -1))


@pytest.mark.parametrize("cells", [1, 3, 10, 20, 37, 40, 41, 500])
def test_cells_are_the_means_of_their_parts(cells):
    array = RANDOM.random((2, 3, 37, 41))
    found = average(array, cells)
    assert found.shape == (37, 41)
    assert max(found.values.shape[-2:]) <= cells
    np.testing.assert_allclose(found.values, cell_means(array, *found.cell), rtol=1e-12)
    if cells >= 41:
        assert found.cell == (1, 1)


def test_truth_values_and_integers_have_means():
    np.testing.assert_array_equal(average(np.array([[True, False], [True, True]]), 1).values, [[0.75]])
    np.testing.assert_array_equal(average(np.array([[1, 2], [3, 4]]), 1).values, [[2.5]])
    assert average(np.eye(3, dtype=np.float16), 1).values.dtype == np.float32


@pytest.mark.parametrize("block", [1, 500, 2**22])
@pytest.mark.parametrize("cells", [7, 512])
def test_weights_are_averaged_in_blocks(monkeypatch, block, cells):
    monkeypatch.setattr(averages, "BLOCK", block)
    v = np.ones((2, 2, 41, 1))
    whole = an.attention(Q, K, v, return_weights=True, backend="reference", **RULES).weights
    for backend in "auto", "reference":
        found = average_weights(Q, K, cells=cells, backend=backend, **RULES)
        np.testing.assert_allclose(found.values, average(whole, cells).values, rtol=1e-9, atol=1e-12)
    one = average_weights(Q[0, 0], K[0, 0], cells=cells, mask=an.Causal(), query_offset=4)
    assert one.values.ndim == 2


@pytest.mark.parametrize("block", [1, 2**22])
@pytest.mark.parametrize(
    "mask",
    [
        None,
        an.Causal(),
        an.Causal() & an.Padding([20, 41]) | an.SlidingWindow(2, 2),
        an.Dense(RANDOM.random((4, 37, 41)) < 0.5),
        an.SameDocument(RANDOM.integers(0, 3, (2, 37)), RANDOM.integers(0, 3, (2, 41))),
        ~an.BlockSparse(RANDOM.random((2, 4, 5, 6)) < 0.5, (8, 8)),
        RANDOM.random((37, 41)) < 0.5,
    ],
)
def test_masks_are_averaged_in_blocks(monkeypatch, block, mask):
    monkeypatch.setattr(averages, "BLOCK", block)
    found = average_mask(mask, (2, 4, 37, 41), 4, cells=10)
    whole = average(an.mask_array(mask, (2, 4, 37, 41), 4), 10)
    for place in np.ndindex(2, 4):
        np.testing.assert_array_equal(found.at(*place).values, whole.at(*place).values)


def test_memory_stays_small():
    tracemalloc.start()
    average_mask(an.Causal(), (1, 1, 8192, 8192))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8192 * 8192 / 1.5  # a byte for each pair would be more


def test_entropies_of_layers():
    layers = [RANDOM.random((2, 3, 5)) for _ in range(4)]
    np.testing.assert_allclose(average_entropy(layers), [layer.mean((0, 2)) for layer in layers])
    counted = np.array([[True] * 5, [True, True, False, False, False]])
    expected = [(layer[0].sum(-1) + layer[1, :, :2].sum(-1)) / 7 for layer in layers]
    np.testing.assert_allclose(average_entropy(layers, counted), expected)
    assert average_entropy([np.ones(3)]).shape == (1, 1)
    assert np.isnan(average_entropy(layers, False)).all()


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: average(np.ones(3)), ValueError, r"array has shape \(3,\)"),
        (lambda: average(np.ones((2, 2), complex)), TypeError, "array has dtype complex128"),
        (lambda: average(np.ones((2, 2)), 0), ValueError, "cells is 0; needed at least 1"),
        (lambda: average_weights(np.ones(3), np.ones(3)), ValueError, r"q has shape \(3,\)"),
        (lambda: average_mask(an.Causal(), (1, 1, 2, 3)), ValueError, "query_offset"),
        (lambda: average_mask(an.Padding([1, 2, 3]), (2, 1, 2, 2)), ValueError, "Padding"),
        (lambda: average_entropy([]), ValueError, "entropies is empty"),
        (lambda: average_entropy([np.ones((1, 2)), np.ones((1, 3))]), ValueError, "entropies have shapes"),
        (lambda: average_entropy([np.ones((1, 2))], [1, 0]), TypeError, "counted has dtype int64"),
        (lambda: average_entropy([np.ones((1, 2))], [True] * 3), ValueError, r"counted has shape \(3,\)"),
    ],
)
def test_errors_name_what_came(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_an_axis_of_size_1_stands_for_all_places():
    found = Averages(np.arange(4).reshape(2, 1, 1, 2), (1, 2), (1, 1))
    assert found.at(1, 7).values.tolist() == [[2, 3]]

"""Sequences in batches, training, cost and explanation of the sequence model."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest

import attn_numba as an
from attn_numba.learning import (
    Design,
    Network,
    Ragged,
    Rules,
    Scale,
    Training,
    cost_of,
    cross_entropy,
    explain,
    minimize,
    multiply_adds,
    outputs_of,
    train_in_batches,
    train_on_all,
)
from attn_numba.learning.sequences import as_ragged, kind_of


def a_ragged(count: int = 40, seed: int = 0, dtype: str = "float32") -> Ragged:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 9, count)
    return Ragged(random.standard_normal((lengths.sum(), 3)).astype(dtype), lengths)


def a_network(dtype: str = "float32", rules: Rules | None = None, **options) -> Network:
    return Network(Design("vectors", 3, 2, rules or Rules(2), hidden_size=8, **options), dtype, seed=1)


def first_numbers_sign(sequences: Ragged) -> np.ndarray:
    return (sequences.values[sequences.starts, 0] > 0).astype(np.int64)


def test_batches_hold_the_sequences():
    sequences = a_ragged()
    pieces = np.split(sequences.values, sequences.starts[1:])
    batch = sequences.batch(np.array([4, 0, 7]))
    for tokens, length, n in zip(batch.tokens, batch.lengths, (4, 0, 7), strict=True):
        np.testing.assert_array_equal(tokens[:length], pieces[n])
        assert (tokens[length:] == 0).all()
    taken = sequences.take(np.array([3, 3, 1]))
    np.testing.assert_array_equal(taken.values, np.concatenate([pieces[3], pieces[3], pieces[1]]))
    assert len(taken) == 3


def test_ids_are_filled_with_what_is_no_id():
    batch = as_ragged([[5, 6, 7], [8], []], "ids").batch(np.arange(3))
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7], [8, -1, -1], [-1, -1, -1]])
    np.testing.assert_array_equal(batch.padding.key_lengths, [3, 1, 0])


def test_every_sequence_is_in_one_batch():
    sequences = a_ragged(101)
    for groups in (sequences.buckets(20), list(sequences.shuffled(8, np.random.default_rng(0)))):
        np.testing.assert_array_equal(np.sort(np.concatenate(groups)), np.arange(101))
    assert all(len(group) * sequences.lengths[group].max() <= 20 for group in sequences.buckets(20))
    spread = [np.ptp(sequences.lengths[group]) for group in sequences.shuffled(8, np.random.default_rng(0))]
    assert np.mean(spread) < 3  # of 8 drawn at random it is 6


def test_masks_are_made_once_for_a_batch():
    batch = a_ragged().batch(np.arange(5))
    assert batch.mask(None) is batch.padding
    assert batch.mask((1, 1)) is batch.mask((1, 1))


@pytest.mark.parametrize(
    ("X", "kind"),
    [
        (np.zeros((2, 3, 4)), "vectors"),
        ([np.zeros((3, 4)), np.zeros((2, 4))], "vectors"),
        ([[[1.0, 2.0]], [[1.0, 2.0], [3.0, 4.0]]], "vectors"),
        ([np.array([1, 2]), np.array([3])], "ids"),
        ([[1, 2], [3]], "ids"),
        (np.array([np.array([1, 2]), np.array([3])], object), "ids"),
        (np.zeros((2, 3)), "features"),
        (np.zeros((2, 3), int), "features"),
        ([[1.0, 2.0], [3.0, 4.0]], "features"),
        ([], "features"),
    ],
)
def test_what_samples_are(X, kind):
    assert kind_of(X) == kind


@pytest.mark.parametrize(
    ("X", "kind", "error", "message"),
    [
        (np.zeros((2, 3)), "vectors", ValueError, r"X has shape \(2, 3\); inputs='vectors' needs \(n, L, D\)"),
        ([np.zeros(3)], "vectors", ValueError, r"X\[0\] has shape \(3,\); inputs='vectors' needs \(L, D\)"),
        ([np.zeros((3, 2)), np.zeros((3, 4))], "vectors", ValueError, r"vectors of sizes \[2, 4\]; needed one size"),
        ([np.array([[np.nan]])], "vectors", ValueError, "X holds NaN or infinity"),
        ([np.array([["a"]])], "vectors", TypeError, r"X\[0\] has dtype <U1; inputs='vectors' needs real numbers"),
        ([np.array([1.5])], "ids", TypeError, r"X\[0\] has dtype float64; inputs='ids' needs integers"),
        ([], "ids", ValueError, "X has 0 sequences"),
        ([[], []], "ids", ValueError, "X has 2 sequences, all of them empty"),
    ],
)
def test_samples_that_are_refused(X, kind, error, message):
    with pytest.raises(error, match=message):
        as_ragged(X, kind)


def test_scale():
    values = np.array([[1.0, 7.0], [3.0, 7.0], [100.0, 7.0]])
    scale = Scale.of(values, np.array([1.0, 1.0, 0.0]))
    np.testing.assert_array_equal(scale.applied(values[:2]), [[-1, 0], [1, 0]])
    np.testing.assert_array_equal(scale.undone(scale.applied(values)), values)


def test_training_learns_and_gives_the_same_bits():
    sequences = a_ragged(64)
    targets, weights = first_numbers_sign(sequences), np.ones(64)
    found = []
    for _ in range(2):
        network = a_network(dropout=0.1)
        losses = train_in_batches(
            network, sequences, targets, weights, cross_entropy, Training(25, batch_size=8, learning_rate=2e-2),
            np.random.default_rng(0),
        )  # fmt: skip
        found.append(outputs_of(network, sequences))
        assert losses[-1] < 0.2 < losses[0]
        assert (found[-1].argmax(1) == targets).mean() > 0.95
    np.testing.assert_array_equal(*found)


def test_lbfgs_learns_and_does_not_mind_how_sequences_are_batched(monkeypatch):
    from attn_numba.learning import training

    sequences = a_ragged(30, dtype="float64")
    targets, weights = first_numbers_sign(sequences), np.ones(30)
    losses = []
    for tokens in (8192, 40):
        monkeypatch.setattr(training, "TOKENS", tokens)
        losses.append(
            train_on_all(
                a_network("float64"), sequences, targets, weights, cross_entropy, Training(12, weight_decay=1.0)
            )
        )
    np.testing.assert_allclose(*losses, rtol=1e-6)
    assert losses[0][-1] < 0.5 * losses[0][0]
    assert (np.diff(losses[0]) < 0).all()


def test_training_ends_where_nothing_is_gained():
    sequences = a_ragged(16)
    targets, weights = np.zeros(16, np.int64), np.ones(16)
    said = []
    training = Training(500, tolerance=10.0, progress=said.append)
    losses = train_in_batches(
        a_network(), sequences, targets, weights, cross_entropy, training, np.random.default_rng(0)
    )
    assert len(losses) == 11  # the first, and ten that gained too little
    assert said == losses


def test_minimize_takes_the_decay_of_matrices():
    """The minimum of ``(x - 4)**2 / 2 + decay x**2 / 2`` is at ``4 / (1 + decay)``; vectors do not decay."""
    parameters = {"matrix": np.zeros((1, 1)), "vector": np.zeros(1)}

    def gradients():
        rests = {name: array - 4 for name, array in parameters.items()}
        return sum(0.5 * float((rest**2).sum()) for rest in rests.values()), rests

    minimize(parameters, gradients, iterations=50, tolerance=1e-10, weight_decay=3.0)
    assert parameters["matrix"].item() == pytest.approx(1.0)
    assert parameters["vector"].item() == pytest.approx(4.0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_of_a_network_trains_as_a_whole(copied):
    """What the copy's parts hold are the arrays of its `parameters`."""
    sequences, network = a_ragged(8), a_network(rules=Rules(2, "additive"), layers=2)
    other = copied(network)
    np.testing.assert_array_equal(outputs_of(other, sequences), outputs_of(network, sequences))
    for array in other.parameters.values():
        array += 1
    assert (outputs_of(other, sequences) != outputs_of(network, sequences)).any()
    assert other.blocks[0].mlp.up.parameters["bias"][0] == 1
    assert other.blocks[1].attention.score_parameters["w"] is other.parameters["1.attention.w"]


SCORES = ("dot", "cosine", "bilinear", "additive", "uniform")
MATRICES = ("query", "key_value", "value", "output", "W", "Wq", "Wk")  # each is multiplied by every token once


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("window", [None, (1, 2), (-1, 0)])
def test_multiply_adds_are_those_of_the_products(score, window):
    """Counted one by one: matrices times tokens, and for each visible pair a score and a value of each head."""
    network, lengths = a_network(rules=Rules(2, score), layers=3, window=window), [1, 6, 9]
    scored = 0 if score == "uniform" else 8  # products for the scores of a pair, over the heads
    total = 0.0
    for length in lengths:
        mask = None if window is None else an.SlidingWindow(*window)
        pairs = int(an.mask_array(mask, (1, 1, length, length)).sum())
        for block in network.blocks:
            matrices = [array.size for name, array in block.attention.parameters.items() if name in MATRICES]
            matrices += [array.size for array in block.mlp.parameters.values() if array.ndim == 2]
            total += length * sum(matrices) + pairs * (scored + 8)
        maps = [array.size for name, array in network.pooling.parameters.items() if name == "Wk"]
        total += length * (3 * 8 + sum(maps) + 2 * scored + 8) + 8 * 2  # embedding, pooling, output
    assert multiply_adds(network.design, lengths) == pytest.approx(total / 3)


def test_cost_and_explanation_of_an_adaptive_window():
    """Pairs are counted as the weights have them: those that are not 0."""
    rules = Rules(2, "uniform", largest_span=4.0, ramp=1.5)
    network, sequences = a_network("float64", rules, layers=2), a_ragged(12, dtype="float64")
    random = np.random.default_rng(0)
    for block in network.blocks:
        block.attention.parameters["span_weight"] += random.standard_normal((2, 8))
    found = explain(network, sequences)
    L = sequences.lengths.max()
    assert [w.shape for w in found.layers] == [(12, 2, L, L)] * 2
    assert found.pooling.shape == (12, 2, L)
    np.testing.assert_allclose(found.pooling.sum(-1), 1)
    for weights, spans in zip(found.layers, found.spans, strict=True):
        np.testing.assert_allclose(weights.sum(-1), (np.arange(L) < sequences.lengths[:, None])[:, None].repeat(2, 1))
        assert ((spans > 0) == (np.arange(L) < sequences.lengths[:, None])[:, None]).all()
    assert found.mean_span == pytest.approx(sum(s.sum() for s in found.spans) / (4 * sequences.lengths.sum()))
    pairs = sum(int((weights > 0).sum()) for weights in found.layers) / (2 * 2 * 12)
    cost = cost_of(network, sequences)
    assert cost.parameters == sum(array.size for array in network.parameters.values())
    assert cost.multiply_adds == pytest.approx(multiply_adds(network.design, sequences.lengths, pairs))
    full = a_network("float64", Rules(2, "uniform"), layers=2)
    assert explain(full, sequences).mean_span is None
    assert cost_of(full, sequences).multiply_adds != cost.multiply_adds

"""Gradients of the sequence model against central differences, in float64, along drawn directions of each parameter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import attn_numba as an
from attn_numba.learning import (
    Batch,
    Block,
    Design,
    Network,
    Ragged,
    Rules,
    cross_entropy,
    gathered,
    squared_error,
)

LENGTHS = np.array([5, 3, 1, 4])
STEP = 1e-5


def a_batch(kind: str) -> Batch:
    random = np.random.default_rng(5)
    if kind == "ids":
        ids = random.integers(0, 6, (4, 5))
        ids[0, 1] = -1  # not in the table
        return Batch(np.where(np.arange(5) < LENGTHS[:, None], ids, -1), LENGTHS)
    if kind == "features":
        return Batch(random.standard_normal((4, 5)), np.full(4, 5))
    return Batch(random.standard_normal((4, 5, 3)), LENGTHS)


def a_network(rules: Rules, kind: str = "vectors", **options) -> Network:
    size = {"vectors": 3, "ids": 6, "features": 5}[kind]
    network = Network(Design(kind, size, 3, rules, hidden_size=8, **options), "float64", seed=1)
    random = np.random.default_rng(2)
    for array in network.parameters.values():  # away from the zeros and ones that some start as
        array += 0.1 * random.standard_normal(array.shape)
    return network


def assert_gradients(parameters, value_and_gradients, tolerance=1e-7):
    """Check the slope along one drawn direction of each array."""
    random = np.random.default_rng(3)
    _, found = value_and_gradients()
    assert set(found) == set(parameters)
    for name, array in parameters.items():
        assert found[name].shape == array.shape, name
        direction, before = random.standard_normal(array.shape), array.copy()
        array[...] = before + STEP * direction
        above = value_and_gradients()[0]
        array[...] = before - STEP * direction
        below = value_and_gradients()[0]
        array[...] = before
        measured, given = (above - below) / (2 * STEP), float((found[name] * direction).sum())
        assert abs(measured - given) <= tolerance * (1 + abs(measured)), name


RULES = {
    "dot": Rules(2),
    "cosine": Rules(2, "cosine", temperature=0.3),
    "bilinear": Rules(2, "bilinear"),
    "additive": Rules(2, "additive"),
    "uniform": Rules(2, "uniform"),
    "sparsemax": Rules(2, normalizer="sparsemax"),
    "entmax15": Rules(2, normalizer="entmax15"),
    "double_softmax": Rules(2, normalizer="double_softmax"),
    "adaptive": Rules(2, largest_span=3.0, ramp=2.5),
    "adaptive uniform": Rules(2, "uniform", largest_span=3.0, ramp=2.5),
}


@pytest.mark.parametrize("name", RULES)
def test_each_rule(name):
    network, batch = a_network(RULES[name], window=(1, 2)), a_batch("vectors")
    shares = np.array([0.1, 0.2, 0.3, 0.4])
    assert_gradients(
        network.parameters,
        lambda: network.gradients(batch, np.array([0, 2, 1, 0]), shares, cross_entropy, span_penalty=0.3),
    )


@pytest.mark.parametrize("kind", ["vectors", "ids", "features"])
@pytest.mark.parametrize(("layers", "pooling"), [(2, "attention"), (0, "mean")])
def test_each_kind_of_input(kind, layers, pooling):
    network, batch = a_network(Rules(2), kind, layers=layers, pooling=pooling), a_batch(kind)
    targets = np.random.default_rng(4).standard_normal((4, 3))
    assert_gradients(
        network.parameters, lambda: network.gradients(batch, targets, np.full(4, 0.25), squared_error), tolerance=2e-7
    )


def test_dropout():
    """The same draws drop the same numbers, so the loss is a smooth function of the parameters."""
    network, batch = a_network(Rules(2), dropout=0.4, layers=2), a_batch("vectors")
    targets, shares = np.array([0, 2, 1, 0]), np.full(4, 0.25)

    def gradients():
        return network.gradients(batch, targets, shares, cross_entropy, generator=np.random.default_rng(7))

    assert_gradients(network.parameters, gradients)
    assert gradients()[0] != network.gradients(batch, targets, shares, cross_entropy)[0]


def test_a_block_that_attends_to_a_context():
    random = np.random.default_rng(0)
    hidden, context, dout = random.standard_normal((2, 3, 8)), random.standard_normal((2, 5, 6)), None
    block = Block(8, Rules(2), "float64", random, context_size=6)
    parameters = gathered({"block": block}) | {"hidden": hidden, "context": context}
    dout, mask = random.standard_normal((2, 3, 8)), an.Padding([5, 2])

    def gradients():
        out, saved = block.forward(hidden, mask, context)
        dhidden, dcontext, found = block.vjp(dout, saved)
        named = {f"block.{name}": array for name, array in found.items()}
        return float((out * dout).sum()), named | {"hidden": dhidden, "context": dcontext}

    assert_gradients(parameters, gradients)
    assert (gradients()[1]["context"][1, 2:] == 0).all()


def test_a_batch_gives_the_mean_of_its_sequences():
    """Filling changes nothing: sequences alone and in one batch give the same outputs and gradients."""
    network, batch = a_network(RULES["adaptive"], layers=2), a_batch("vectors")
    values = np.concatenate([x[:length] for x, length in zip(batch.tokens, LENGTHS, strict=True)])
    sequences, targets, shares = Ragged(values, LENGTHS), np.array([0, 2, 1, 0]), np.array([0.1, 0.2, 0.3, 0.4])
    whole, found = network.gradients(batch, targets, shares, cross_entropy, span_penalty=0.1)
    total, sums = 0.0, {name: np.zeros_like(array) for name, array in network.parameters.items()}
    for n in range(4):
        alone = sequences.batch(np.array([n]))
        assert alone.padding is None
        np.testing.assert_allclose(network.forward(alone)[0][0], network.forward(batch)[0][n], rtol=1e-12, atol=1e-14)
        value, more = network.gradients(alone, targets[n : n + 1], shares[n : n + 1], cross_entropy, span_penalty=0.1)
        total += value
        for name in sums:
            sums[name] += more[name]
    assert total == pytest.approx(whole, rel=1e-12)
    for name, array in sums.items():
        np.testing.assert_allclose(array, found[name], rtol=1e-9, atol=1e-13, err_msg=name)


def test_weights_count_like_repetitions():
    network, batch = a_network(Rules(2)), a_batch("vectors")
    targets, counts = np.array([0, 2, 1, 0]), np.array([1, 3, 2, 1])
    repeated = Batch(batch.tokens.repeat(counts, 0), batch.lengths.repeat(counts))
    weighed = network.gradients(batch, targets, counts / 7, cross_entropy)
    among = network.gradients(repeated, targets.repeat(counts), np.full(7, 1 / 7), cross_entropy)
    assert weighed[0] == pytest.approx(among[0], rel=1e-13)
    for name, array in weighed[1].items():
        np.testing.assert_allclose(array, among[1][name], rtol=1e-9, atol=1e-14, err_msg=name)


def test_uniform_scores_are_means():
    """A block of "uniform" attention gives each token the mean of the values it sees; its pooling the mean state."""
    network = a_network(Rules(2, "uniform"), window=(1, 0))
    batch = a_batch("vectors")
    _, kept = network.forward(batch, weights=True)
    [weights], pooling = network.attended(kept)
    for b, length in enumerate(LENGTHS):
        seen = np.arange(length)[:, None] - np.arange(length)
        expected = ((seen == 0) | (seen == 1)).astype(float)
        expected /= expected.sum(1, keepdims=True)
        np.testing.assert_allclose(weights[b, 0, :length, :length], expected, atol=1e-12)
        np.testing.assert_allclose(pooling[b, 1], (np.arange(5) < length) / length, atol=1e-12)


def test_float32_is_close_to_float64():
    exact, batch = a_network(Rules(2), layers=2), a_batch("vectors")
    network = Network(dataclasses.replace(exact.design), "float32")
    for name, array in network.parameters.items():
        array[...] = exact.parameters[name]
    targets, shares = np.array([0, 2, 1, 0]), np.full(4, 0.25)
    loss, found = exact.gradients(batch, targets, shares, cross_entropy)
    narrow = Batch(batch.tokens.astype(np.float32), batch.lengths)
    near, close = network.gradients(narrow, targets, shares, cross_entropy)
    assert near == pytest.approx(loss, rel=1e-5)
    for name, array in close.items():
        assert array.dtype == np.float32, name
        np.testing.assert_allclose(array, found[name], atol=2e-5 * np.abs(found[name]).max() + 1e-7, err_msg=name)

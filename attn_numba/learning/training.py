"""Training of a network on sequences: all at once by L-BFGS, or in batches by AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_numba.learning.layers import Array
from attn_numba.learning.network import Batch, Loss, Network
from attn_numba.learning.optimizers import AdamW, Settings, minimize
from attn_numba.learning.sequences import Ragged

__all__ = ["Training", "outputs_of", "train_in_batches", "train_on_all", "train_once"]

TOKENS = 8192  # of a batch where its size changes no result
WARMUP = 0.05  # share of the steps with a rising rate
PATIENCE = 10  # epochs without a better loss that end training


@dataclass(frozen=True)
class Training:
    """How a network is trained.

    Parameters
    ----------
    epochs : int
        Most passes over the sequences; of L-BFGS most steps.
    batch_size : int
        Sequences of a step of AdamW.
    learning_rate : float
        Largest rate of AdamW.
    weight_decay : float
        Of AdamW the share of a matrix taken away in a step, times the rate. Of L-BFGS half of it times the sum of
        squares of matrices, over the number of sequences, is added to the loss.
    span_penalty : float
        What is added to the loss for each position of the mean span.
    tolerance : float
        L-BFGS stops where no number of the gradient is larger, or a step gains less than a hundredth of it; AdamW
        where ten epochs have not made the loss smaller by it.
    progress : callable, optional
        Is given the loss after each epoch or step.
    """

    epochs: int
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    span_penalty: float = 0.0
    tolerance: float = 1e-4
    progress: Callable[[float], object] | None = None


def train_on_all(
    network: Network, sequences: Ragged, targets: Array, weights: Array, loss: Loss, training: Training
) -> list[float]:
    """Train by L-BFGS and return the loss after each step.

    Parameters
    ----------
    network : Network
        Of float64, without dropout; its parameters are changed.
    sequences : Ragged
        n sequences.
    targets : array (n, ...)
        What `loss` compares outputs with.
    weights : float64 array (n,)
        Of the sequences in the loss, above 0.
    loss : callable
        As `Network.gradients` takes it.
    training : Training
        How.

    Returns
    -------
    list of float
        The losses, with what is added for the weights.
    """
    shares = weights / weights.sum()
    groups = sequences.buckets(TOKENS)
    parts = [(sequences.batch(group), targets[group], shares[group]) for group in groups]

    def gradients() -> tuple[float, dict[str, Array]]:
        found = [network.gradients(*part, loss, span_penalty=training.span_penalty) for part in parts]
        total, sums = found[0]
        for value, more in found[1:]:
            total += value
            for name, array in more.items():
                sums[name] += array
        return total, sums

    return minimize(
        network.parameters, gradients, iterations=training.epochs, tolerance=training.tolerance,
        weight_decay=training.weight_decay / float(weights.sum()), progress=training.progress,
    )  # fmt: skip


def train_in_batches(
    network: Network,
    sequences: Ragged,
    targets: Array,
    weights: Array,
    loss: Loss,
    training: Training,
    generator: np.random.Generator,
) -> list[float]:
    """Train by AdamW and return the mean loss of each epoch.

    Parameters
    ----------
    network, sequences, targets, weights, loss, training
        As `train_on_all` takes them; any dtype, and dropout.
    generator : numpy.random.Generator
        Draws the batches and what is dropped.

    Returns
    -------
    list of float
        The losses.
    """
    steps = training.epochs * -(-len(sequences) // training.batch_size)
    settings = Settings(
        steps=steps, rate=training.learning_rate, warmup=int(WARMUP * steps), weight_decay=training.weight_decay
    )
    optimizer, step = AdamW(network.parameters, settings), 0
    losses: list[float] = []
    best, since = np.inf, 0
    for _ in range(training.epochs):
        value, step = train_once(network, sequences, targets, weights, loss, training, generator, optimizer, step)
        losses.append(value)
        if training.progress is not None:
            training.progress(value)
        best, since = (value, 0) if value < best - training.tolerance else (best, since + 1)
        if since >= PATIENCE:
            break
    return losses


def train_once(
    network: Network,
    sequences: Ragged,
    targets: Array,
    weights: Array,
    loss: Loss,
    training: Training,
    generator: np.random.Generator,
    optimizer: AdamW,
    step: int,
) -> tuple[float, int]:
    """Take the steps of one epoch from `step` on; return their mean loss, and the number of the next step.

    Raises
    ------
    ValueError
        If the loss is no longer finite.
    """
    mean, total = float(weights.mean()), 0.0
    for group in sequences.shuffled(training.batch_size, generator):
        batch, shares = sequences.batch(group), weights[group] / (mean * len(group))
        with np.errstate(all="ignore"):  # of a loss that grows without end the error says more than the warnings
            value, found = network.gradients(
                batch, targets[group], shares, loss, span_penalty=training.span_penalty, generator=generator
            )
            optimizer.update(found, step)
        if not np.isfinite(value):
            raise ValueError(
                f"the loss is {value} at step {step}; learning_rate is {training.learning_rate}: too large"
            )
        total += value * len(group) / len(sequences)
        step += 1
    return total, step


def outputs_of(
    network: Network, sequences: Ragged, look: Callable[[Array, Batch, list[Any]], Any] | None = None
) -> Array:
    """Return the outputs of a network for sequences.

    Parameters
    ----------
    network : Network
        The model.
    sequences : Ragged
        n sequences.
    look : callable, optional
        Is given the indices of each batch, the batch, and what `Network.forward` kept.

    Returns
    -------
    array (n, outputs)
        In the dtype of the network.
    """
    outputs = np.empty((len(sequences), network.design.outputs), network.dtype)
    for group in sequences.buckets(TOKENS):
        batch = sequences.batch(group)
        outputs[group], kept = network.forward(batch)
        if look is not None:
            look(group, batch, kept)
    return outputs

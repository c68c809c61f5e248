"""What is made small in training: losses of sequences and their gradients by the outputs of a model."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["cross_entropy", "log_sum", "squared_error"]

Array = NDArray[Any]


def log_sum(logits: Array) -> Array:
    """Return the logarithm of the sum of exponentials over the last axis.

    Parameters
    ----------
    logits : array (..., classes)
        Numbers of any size.

    Returns
    -------
    array (..., 1)
        Natural logarithms.
    """
    largest = logits.max(axis=-1, keepdims=True)
    return largest + np.log(np.exp(logits - largest).sum(axis=-1, keepdims=True))


def cross_entropy(logits: Array, targets: Array, shares: Array) -> tuple[float, Array]:
    """Return the weighted cross-entropy of logits, and its gradient by them.

    Parameters
    ----------
    logits : array (B, classes)
        Natural, up to a number for each row.
    targets : int array (B,)
        The class of each.
    shares : array (B,)
        Weight of each in the result; together 1 for a mean.

    Returns
    -------
    loss : float
        In nats.
    gradient : array (B, classes)
        In the dtype of `logits`.

    Examples
    --------
    >>> loss, gradient = cross_entropy(np.zeros((1, 2)), np.array([1]), np.ones(1))
    >>> round(loss, 3), gradient.tolist()
    (0.693, [[0.5, -0.5]])
    """
    places = np.arange(len(targets))
    logs = logits - log_sum(logits)
    loss = -float(logs[places, targets].astype(np.float64) @ shares)
    gradient = np.exp(logs)
    gradient[places, targets] -= 1
    gradient *= shares[:, None].astype(logits.dtype)
    return loss, gradient


def squared_error(outputs: Array, targets: Array, shares: Array) -> tuple[float, Array]:
    """Return half the weighted squared error of outputs, and its gradient by them.

    Parameters
    ----------
    outputs, targets : array (B, outputs)
        What came and what was wanted.
    shares : array (B,)
        Weight of each row in the result; together 1 for a mean.

    Returns
    -------
    loss : float
        Half the sum of squares of a row, weighted.
    gradient : array (B, outputs)
        In the dtype of `outputs`.

    Examples
    --------
    >>> squared_error(np.array([[3.0]]), np.array([[1.0]]), np.ones(1))
    (2.0, array([[2.]]))
    """
    rest = outputs - targets.astype(outputs.dtype, copy=False)
    loss = 0.5 * float(np.einsum("bo,bo->b", rest, rest).astype(np.float64) @ shares)
    return loss, rest * shares[:, None].astype(outputs.dtype)

"""The parameters of the estimators: what each may be, and what a network and its training are made with."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from attn_numba.learning.attending import NORMALIZERS, SCORES, Rules
from attn_numba.learning.network import Design
from attn_numba.learning.sequences import KINDS
from attn_numba.learning.training import Training

INTEGERS = {"hidden_size": 1, "heads": 1, "layers": 0, "expansion": 1, "epochs": 1, "batch_size": 1}  # least
CHOICES = {
    "attention_score": SCORES, "normalizer": tuple(NORMALIZERS), "pooling": ("attention", "mean"),
    "positions": ("sinusoidal", "none"), "inputs": ("auto", *KINDS), "solver": ("auto", "lbfgs", "adam"),
}  # fmt: skip
REALS: dict[str, tuple[float, float, bool]] = {  # least, what it stays below, whether it may be the least
    "temperature": (0, np.inf, False), "largest_span": (0, np.inf, False), "ramp": (0, np.inf, False),
    "learning_rate": (0, np.inf, False), "span_penalty": (0, np.inf, True), "weight_decay": (0, np.inf, True),
    "dropout": (0, 1, True), "tolerance": (0, np.inf, True),
}  # fmt: skip
WINDOWS = "None, an integer, two integers, or 'adaptive'"


def check_parameters(estimator: Any) -> None:
    """Check the parameters of an estimator.

    Raises
    ------
    TypeError
        If one is of the wrong kind.
    ValueError
        If one is out of its range, is none of its choices, or does not go with another.
    """
    for name, lowest in INTEGERS.items():
        value = getattr(estimator, name)
        if not _is_integer(value):
            raise TypeError(f"{name} is {value!r}; needed an integer")
        if value < lowest:
            raise ValueError(f"{name} is {value}; needed at least {lowest}")
    for name, known in CHOICES.items():
        value = getattr(estimator, name)
        if not isinstance(value, str) or value not in known:
            raise ValueError(f"{name} is {value!r}; needed one of {', '.join(map(repr, known))}")
    for name, (low, high, including) in REALS.items():
        value = getattr(estimator, name)
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; needed a number")
        if not (low < float(value) < high or (including and value == low)):
            raise ValueError(f"{name} is {value}; needed {'at least' if including else 'above'} {low}, below {high}")
    if estimator.hidden_size % estimator.heads:
        raise ValueError(f"hidden_size is {estimator.hidden_size}, not a multiple of heads, {estimator.heads}")
    if estimator.solver == "lbfgs" and estimator.dropout:
        raise ValueError(f"dropout is {estimator.dropout}; solver='lbfgs' needs 0: its loss must not change by chance")
    _check_window(estimator.window)
    if estimator.window == "adaptive" and estimator.normalizer != "softmax":
        raise ValueError(f"normalizer is {estimator.normalizer!r}; window='adaptive' needs 'softmax'")


def design_of(estimator: Any, inputs: str, input_size: int, outputs: int) -> Design:
    """Return what the network of an estimator is made of."""
    window = estimator.window
    largest = float(estimator.largest_span) if window == "adaptive" else None
    rules = Rules(
        estimator.heads, estimator.attention_score, estimator.normalizer, float(estimator.temperature), largest,
        float(estimator.ramp),
    )  # fmt: skip
    sides = None
    if window is not None and largest is None:
        left, right = (window, window) if _is_integer(window) else window
        sides = int(left), int(right)
    return Design(
        inputs, input_size, outputs, rules, sides, estimator.hidden_size, estimator.layers, estimator.expansion,
        estimator.pooling, estimator.positions, estimator.dropout,
    )  # fmt: skip


def training_of(estimator: Any) -> Training:
    """Return how an estimator is trained."""

    def tell(loss: float) -> None:
        print(f"[{type(estimator).__name__}] loss {loss:.6g}", flush=True)

    return Training(
        estimator.epochs, estimator.batch_size, estimator.learning_rate, estimator.weight_decay, estimator.span_penalty,
        estimator.tolerance, tell if estimator.verbose else None,
    )  # fmt: skip


def _check_window(window: Any) -> None:
    if window is None or (isinstance(window, str) and window == "adaptive"):
        return
    if isinstance(window, str):
        raise ValueError(f"window is {window!r}; needed {WINDOWS}")
    sides, least = ((window,), 0) if _is_integer(window) else (window, -1)
    if not isinstance(sides, (tuple, list)) or not all(map(_is_integer, sides)):
        raise TypeError(f"window is {window!r}; needed {WINDOWS}, in positions")
    if (sides is window and len(sides) != 2) or min(sides) < least:
        raise ValueError(f"window is {window!r}; needed {WINDOWS}: 0 positions and more, or -1 for an open side of two")


def _is_integer(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)

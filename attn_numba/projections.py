"""Projections of hidden states: the parameters of a layer, the products with them, and the gradients of those."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attn_numba.rules.arguments import ACCUMULATORS, ANY_DTYPE, DTYPES
from attn_numba.rules.data import AnyArray, whole_number


def parameter_dtype(layer: str, x: object) -> np.dtype[Any]:
    """Return the dtype of a layer's parameters.

    Raises
    ------
    TypeError
        If it is none of the four.
    ImportError
        If it is bfloat16 by name and the package ml_dtypes is not installed.
    """
    if isinstance(x, str) and x == "bfloat16":
        try:
            from attn_numba.integrations.ml_dtypes import bfloat16
        except ImportError:
            raise ImportError("dtype bfloat16 needs the package ml_dtypes (pip install ml_dtypes)") from None
        return bfloat16
    try:
        dtype: np.dtype[Any] | None = None if x is None else np.dtype(x)  # type: ignore[call-overload]
    except TypeError:
        dtype = None
    if dtype is None or dtype.name not in DTYPES:
        raise TypeError(f"{layer}: dtype is {x if dtype is None else dtype.name!r}; needed {ANY_DTYPE}")
    return dtype.newbyteorder("=")


def generator_of(layer: str, seed: object) -> np.random.Generator:
    """Return the generator of a layer's initial weights: the one given, or a new one of an integer.

    Raises
    ------
    TypeError
        If it is neither.
    ValueError
        If it is negative.
    """
    if isinstance(seed, np.random.Generator):
        return seed
    number = whole_number(layer, "seed", seed)
    if number < 0:
        raise ValueError(f"{layer}: seed is {number}; needed at least 0, or a numpy.random.Generator")
    return np.random.default_rng(number)


def initial_parameters(
    shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], generator: np.random.Generator
) -> dict[str, AnyArray]:
    """Return weights (outputs, inputs), uniform in ``+-sqrt(6 / (inputs + outputs))``, and biases (outputs,) of 0.

    They are drawn in float64 and then rounded, so that one seed gives the same weights in every dtype.

    References
    ----------
    X. Glorot and Y. Bengio (2010), "Understanding the difficulty of training deep feedforward neural networks",
    equation 16.
    """
    parameters: dict[str, AnyArray] = {}
    for name, shape in shapes.items():
        limit = np.sqrt(6 / sum(shape)) if len(shape) == 2 else 0
        drawn = generator.uniform(-limit, limit, shape) if limit else np.zeros(shape)
        parameters[name] = drawn.astype(dtype)
    return parameters


def check_parameters(
    found: Mapping[str, AnyArray], shapes: Mapping[str, tuple[int, ...]], dtype: np.dtype[Any], where: str = ""
) -> None:
    """Check that there are parameters of these names, shapes and dtype, and no others; `where` begins the messages.

    Raises
    ------
    ValueError
        If one is missing, of another shape, or one too many.
    TypeError
        If one has another dtype.
    """
    names = ", ".join(shapes)
    for name in shapes:
        if name not in found:
            raise ValueError(f"{where}parameters lack {name}; needed {names}")
    for name, array in found.items():
        if name not in shapes:
            raise ValueError(f"{where}parameters hold {name}, which the layer has not; needed {names}")
        if array.shape != shapes[name]:
            raise ValueError(f"{where}{name} has shape {array.shape}; needed {shapes[name]}")
        if array.dtype != dtype:
            raise TypeError(f"{where}{name} has dtype {array.dtype.name}; the layer has {dtype.name}")


def in_heads(rows: AnyArray, heads: int) -> AnyArray:
    """Return (B, rows, heads * size) as a view (B, heads, rows, size)."""
    B, count, width = rows.shape
    return rows.reshape(B, count, heads, width // heads).swapaxes(1, 2)


def side_by_side(heads: AnyArray) -> AnyArray:
    """Return (B, heads, rows, size) as (B, rows, heads * size)."""
    B, count, rows, size = heads.shape
    return heads.swapaxes(1, 2).reshape(B, rows, count * size)


def project(x: AnyArray, parameters: Mapping[str, AnyArray], part: str, dtype: Any = None) -> AnyArray:
    """Return states (B, rows, inputs) times the weights of a part, (B, rows, outputs), in their dtype or a given one.

    There is one product for each sequence, whose bits so do not depend on the others.
    """
    exact = ACCUMULATORS[x.dtype.name]
    weight, bias = parameters[f"{part}.weight"], parameters.get(f"{part}.bias")
    with np.errstate(all="ignore"):  # rows that nothing looks at may hold anything
        result: AnyArray = np.ascontiguousarray(x, exact) @ weight.astype(exact, copy=False).T
        if bias is not None:
            result += bias.astype(exact, copy=False)
        return result.astype(x.dtype if dtype is None else dtype, copy=False)


def project_vjp(
    dout: AnyArray, x: AnyArray, parameters: Mapping[str, AnyArray], part: str, found: dict[str, AnyArray]
) -> AnyArray:
    """Return the gradient (B, rows, inputs) of states that were projected, from that of the result.

    The gradients of the part's parameters go to `found`, under their names. All are in the dtype of sums. A row whose
    gradient is 0 adds nothing to those of the parameters, whatever its state holds.
    """
    exact = ACCUMULATORS[x.dtype.name]
    dout, weight = np.ascontiguousarray(dout, exact), parameters[f"{part}.weight"].astype(exact, copy=False)
    reached = (dout != 0).any(axis=-1, keepdims=True)
    with np.errstate(all="ignore"):
        states = np.where(reached, x.astype(exact, copy=False), exact.type(0))  # 0 times NaN is not 0
        found[f"{part}.weight"] = dout.reshape(-1, dout.shape[-1]).T @ states.reshape(-1, x.shape[-1])
        if f"{part}.bias" in parameters:
            found[f"{part}.bias"] = dout.sum(axis=(0, 1))
        dx: AnyArray = dout @ weight
    return dx

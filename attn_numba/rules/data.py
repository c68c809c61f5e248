"""Arguments of rules: what they may be given, and how it is kept."""

from __future__ import annotations

import operator
from typing import Any, TypeAlias

import numpy as np

from attn_numba.rules.formula import INT_HIGH, INT_LOW, Param, lift
from attn_numba.rules.places import Sizes

AnyArray: TypeAlias = "np.ndarray[Any, Any]"

NARROW_FLOATS = ("float16", "bfloat16", "float32")  # dtypes whose numbers are kept as float32


def as_array(x: object, rule: str, name: str = "") -> AnyArray:
    """Return `x` as a NumPy array.

    Raises
    ------
    TypeError
        If it cannot be one.
    """
    label = f"{rule}: {name}" if name else rule
    try:
        array = np.asarray(x)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{label} is {type(x).__name__}, which does not make an array: {error}") from error
    if array.dtype.kind in "OSUMm":
        raise TypeError(f"{label} is {type(x).__name__} of dtype {array.dtype}; needed numbers")
    return array


def frozen(array: AnyArray, dtype: Any = None) -> AnyArray:
    """Return a read-only copy; axes of stride 0 (broadcast) stay so and take no memory."""
    core = array[
        tuple(slice(0, 1) if s == 0 and n > 1 else slice(None) for s, n in zip(array.strides, array.shape, strict=True))
    ]
    copy = np.array(core, dtype=dtype, order="C", copy=True)
    copy.flags.writeable = False
    return np.broadcast_to(copy, array.shape)


def fitted(rule: str, name: str, array: AnyArray, axes: str, sizes: Sizes) -> AnyArray:
    """Return the array broadcast to the given axes of a call, such as ``"BHM"`` (stride 0 where broadcast).

    Raises
    ------
    ValueError
        If it does not broadcast; the message names rule and argument.
    """
    shape = tuple(getattr(sizes, axis) for axis in axes)
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        letters = f"({', '.join(axes)}{',' if len(axes) == 1 else ''})"
        raise ValueError(
            f"{rule}: {name} has shape {array.shape}; needed one that broadcasts to {letters} = {shape}"
        ) from None


def gathered(array: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    """Return an array summed over the axes along which one of `shape` was broadcast to its shape.

    Parameters
    ----------
    array : array
        The gradient by a broadcast array.
    shape : tuple of int
        The shape before it was broadcast.
    """
    result = np.asarray(array.sum(axis=tuple(range(array.ndim - len(shape)))))
    repeated = tuple(n for n, size in enumerate(shape) if size == 1 != result.shape[n])
    return np.asarray(result.sum(axis=repeated, keepdims=True)) if repeated else result


def whole_number(rule: str, name: str, x: object) -> int:
    """Return an integer argument of a rule.

    Raises
    ------
    TypeError
        If it is not an integer.
    """
    if isinstance(x, (bool, np.bool_)):
        raise TypeError(f"{rule}: {name} is {x}; needed an integer")
    try:
        return operator.index(x)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{rule}: {name} is {type(x).__name__}; needed an integer") from None


def real_number(rule: str, name: str, x: object) -> float:
    """Return a number argument of a rule.

    Raises
    ------
    TypeError
        If it is not a number.
    """
    array = as_array(x, rule, name)
    if array.ndim or array.dtype.kind in "bc":
        raise TypeError(f"{rule}: {name} is {type(x).__name__}; needed a number")
    return float(array)


def integers(rule: str, name: str, x: object, ndim: int) -> AnyArray:
    """Return a read-only int32 array with at most `ndim` axes from an integer or integers.

    Raises
    ------
    TypeError
        If they are not integers.
    ValueError
        If there are too many axes, or one exceeds 32 bits.
    """
    array = as_array(x, rule, name)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{rule}: {name} has dtype {array.dtype}; needed integers")
    if array.ndim > ndim:
        raise ValueError(f"{rule}: {name} has shape {array.shape}; needed at most {ndim} axes")
    if array.size and (array.min() < INT_LOW or array.max() > INT_HIGH):
        raise ValueError(f"{rule}: {name} goes from {array.min()} to {array.max()}; needed 32-bit integers")
    return frozen(array, np.int32)


def floats(rule: str, name: str, x: object, ndim: int) -> AnyArray:
    """Return a read-only float32 or float64 array with at most `ndim` axes; narrower floats are widened.

    Raises
    ------
    TypeError
        If they are not real numbers.
    ValueError
        If there are too many axes.
    """
    array = as_array(x, rule, name)
    narrow = array.dtype.name in NARROW_FLOATS
    if not narrow and array.dtype.kind not in "iuf":
        raise TypeError(f"{rule}: {name} has dtype {array.dtype}; needed real numbers")
    if array.ndim > ndim:
        raise ValueError(f"{rule}: {name} has shape {array.shape}; needed at most {ndim} axes")
    return frozen(array, np.float32 if narrow else np.float64)


def require_function(rule: str, name: str, x: object) -> None:
    """Raise a TypeError if `x` is not a function."""
    if not callable(x):
        raise TypeError(f"{rule}: {name} is {type(x).__name__}; needed a function")


def require_kind(rule: str, name: str, result: object, kinds: tuple[str, ...]) -> None:
    """Raise a TypeError if what a traced function returned is not of one of these kinds."""
    kind = lift(result).kind if result is not None else "nothing"
    if kind not in kinds:
        raise TypeError(f"{rule}: {name} returns {kind}; needed {' or '.join(kinds)}")


def custom_params(rule: str, params: object) -> tuple[Param, ...]:
    """Return the parameters of a user's function: Python ints, Python floats, read-only arrays.

    Raises
    ------
    TypeError
        If one is not a number or an array of numbers.
    ValueError
        If an integer exceeds 32 bits.
    """
    if isinstance(params, (np.ndarray, int, float)) or not hasattr(params, "__iter__"):
        raise TypeError(f"{rule}: params is {type(params).__name__}; needed a tuple of numbers and arrays, params=(x,)")
    return tuple(_custom_param(rule, f"params[{n}]", x) for n, x in enumerate(params))


def _custom_param(rule: str, name: str, x: object) -> Param:
    array = as_array(x, rule, name)
    if array.dtype.kind == "c":
        raise TypeError(f"{rule}: {name} is complex; needed real numbers")
    if array.ndim == 0 and array.dtype.kind != "b":
        return whole_number(rule, name, integers(rule, name, x, 0).item()) if array.dtype.kind in "iu" else float(array)
    if array.dtype.kind in "iu":
        return integers(rule, name, array, array.ndim)
    if array.dtype.kind == "b":
        if array.ndim == 0:
            raise TypeError(f"{rule}: {name} is {x}; needed a number: pass {int(array)} and compare")
        return frozen(array)
    return frozen(array, np.float32 if array.dtype.name in NARROW_FLOATS else np.float64)

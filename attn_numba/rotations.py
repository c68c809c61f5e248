"""Rotary positions: pairs of numbers of a query or a key, turned by angles that grow with its position."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from attn_numba.problem import host_array, is_device_array
from attn_numba.rules.arguments import ACCUMULATORS
from attn_numba.rules.data import AnyArray, as_array, real_number

__all__ = ["rotary", "rotary_vjp"]

PAIRS = ("halves", "neighbors")
REMEMBERED_ELEMENTS = 2**18  # larger tables of cosines and sines are not kept


def rotary(x: Any, positions: Any, *, base: float = 10000.0, pairs: str = "halves") -> AnyArray:
    """Return queries or keys with their numbers turned, pair by pair, by angles in proportion to their positions.

    The dot product of a query and a key so turned depends on where they are by the difference of their positions alone.

    Parameters
    ----------
    x : array (B, H, M, D)
        Queries or keys, of even D: float64, float32, float16 or bfloat16. Missing leading axes count as 1. Any strides.
    positions : array (M,), (B, M) or (B, H, M)
        Position of each row: integers or, for interpolated positions, other real numbers; negative ones too. Axes
        before the last may have size 1 and are repeated.
    base : float
        The pair d turns by ``base ** (-2 d / D)`` radians per position; above 0.
    pairs : {"halves", "neighbors"}
        Which numbers make the pair d: d and ``d + D / 2`` (GPT-NeoX, and Llama as Hugging Face keeps it), or ``2 d``
        and ``2 d + 1`` (RoFormer, GPT-J, and Llama as GGUF keeps it).

    Returns
    -------
    array (B, H, M, D)
        A new array in the dtype and rank of `x`.

    Raises
    ------
    TypeError
        If `x` is no array of a supported dtype, or `positions` or `base` are not real numbers.
    ValueError
        If D is odd, the shape of `positions` does not fit, one of them or `base` is not finite, or `pairs` is unknown.
    NotImplementedError
        For arrays on a GPU.

    Notes
    -----
    With ``t = position * base ** (-2 d / D)`` the pair ``(x, y)`` becomes ``(x cos t - y sin t, x sin t + y cos t)``.
    Angles, cosines and sines are computed in float64, and rounded to float32 unless `x` is float64; the products are of
    that dtype, and narrow dtypes are rounded once. A row depends on no other row, its bits included.

    References
    ----------
    J. Su et al. (2021), "RoFormer: Enhanced transformer with rotary position embedding", section 3.4. Positions that
    are no integers: S. Chen et al. (2023), "Extending context window of large language models via positional
    interpolation".

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> x = np.array([[1.0, 0.0], [1.0, 0.0]])
    >>> an.rotary(x, [0, 1]).round(4)
    array([[1.    , 0.    ],
           [0.5403, 0.8415]])
    >>> x = np.array([[1.0, 2.0, 3.0, 4.0]])
    >>> an.rotary(x, [np.pi], base=1.0).round(4), an.rotary(x, [np.pi / 2], base=1.0, pairs="neighbors").round(4)
    (array([[-1., -2., -3., -4.]]), array([[-2.,  1., -4.,  3.]]))
    """
    return _turned(x, "x", positions, base, pairs, 1)


def rotary_vjp(dout: Any, positions: Any, *, base: float = 10000.0, pairs: str = "halves") -> AnyArray:
    """Return the gradient of what `rotary` was given, from that of its result: turned back by the same angles.

    Parameters
    ----------
    dout : array (B, H, M, D)
        Gradient of the result, of one of the four dtypes. Missing leading axes count as 1.
    positions, base, pairs
        As `rotary` got them.

    Returns
    -------
    array (B, H, M, D)
        A new array in the dtype and rank of `dout`.

    Raises
    ------
    TypeError
        As `rotary`.
    ValueError
        As `rotary`.
    NotImplementedError
        For arrays on a GPU.

    Notes
    -----
    A rotation R is linear and ``R^T = R^-1``, so the gradient is the rotation by the opposite angle, and needs not what
    was turned. It undoes a rotation but for rounding.

    References
    ----------
    J. Su et al. (2021), "RoFormer: Enhanced transformer with rotary position embedding", section 3.4.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> x = np.array([[1.0, 2.0, 3.0, 4.0]])
    >>> an.rotary_vjp(an.rotary(x, [5]), [5]).round(12)
    array([[1., 2., 3., 4.]])
    """
    return _turned(dout, "dout", positions, base, pairs, -1)


def check_pairs(owner: str, name: str, pairs: object) -> str:
    """Return which numbers make a pair.

    Raises
    ------
    ValueError
        If it is neither "halves" nor "neighbors"; the message names owner and argument.
    """
    if not (isinstance(pairs, str) and pairs in PAIRS):
        raise ValueError(f"{owner}: {name} is {pairs!r}; needed {' or '.join(map(repr, PAIRS))}")
    return pairs


def check_base(owner: str, base: object) -> float:
    """Return the base of the wavelengths.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it is not above 0 or not finite.
    """
    number = real_number(owner, "base", base)
    if not 0 < number < math.inf:
        raise ValueError(f"{owner}: base is {number}; needed a finite number above 0")
    return number


def positions_of(offset: int | AnyArray, rows: int) -> AnyArray:
    """Return the positions (rows,) or (B, rows) of rows from an offset, or from offsets (B,), on."""
    return np.arange(rows) + np.asarray(offset, np.int64)[..., None]


def _turned(x: object, name: str, positions: object, base: object, pairs: object, direction: int) -> AnyArray:
    owner = "rotary" if direction == 1 else "rotary_vjp"
    if is_device_array(x):
        raise NotImplementedError(f"{name} is on a GPU; {owner} takes arrays in host memory")
    array = host_array(x, name)
    if not 2 <= array.ndim <= 4:
        raise ValueError(f"{name} has {array.ndim} axes, shape {array.shape}; needed 2 to 4, (B, H, M, D)")
    D = array.shape[-1]
    if D < 2 or D % 2:
        raise ValueError(f"{name} has head size {D}; needed an even one: its numbers turn in pairs")
    kind, number = check_pairs(owner, "pairs", pairs), check_base(owner, base)
    shape = (1,) * (4 - array.ndim) + array.shape
    rows = _positions(owner, positions, (shape[0], shape[1], shape[2]))
    dtype = ACCUMULATORS[array.dtype.name]
    make: Any = _tables if rows.size * D <= REMEMBERED_ELEMENTS else _tables.__wrapped__
    cosines, sines = make(rows.tobytes(), rows.shape, D, number, dtype)
    if direction < 0:
        sines = -sines
    first, second = (
        (np.s_[..., : D // 2], np.s_[..., D // 2 :]) if kind == "halves" else (np.s_[..., ::2], np.s_[..., 1::2])
    )
    out = np.empty_like(array, subok=False)  # in the order of x: what is a view of (B, M, H, D) stays so
    old, new = array.reshape(shape), out.reshape(shape)
    with np.errstate(all="ignore"):  # rows that nothing looks at may hold anything
        a, b = old[first].astype(dtype, copy=False), old[second].astype(dtype, copy=False)
        turned = a * cosines
        other = b * sines
        new[first] = np.subtract(turned, other, out=turned)
        np.multiply(a, sines, out=turned)
        np.multiply(b, cosines, out=other)
        new[second] = np.add(turned, other, out=turned)
    return out


@functools.lru_cache(maxsize=16)  # the layers of a model ask for the same ones
def _tables(
    positions: bytes, axes: tuple[int, int, int], D: int, base: float, dtype: np.dtype[Any]
) -> tuple[AnyArray, AnyArray]:
    """Return the cosines and the sines (B, H, M, D / 2) of float64 positions, given as bytes and their axes."""
    angles = np.frombuffer(positions).reshape(*axes, 1) * base ** (np.arange(0, -D, -2) / D)
    tables = np.cos(angles).astype(dtype, copy=False), np.sin(angles).astype(dtype, copy=False)
    for table in tables:
        table.flags.writeable = False
    return tables


def _positions(owner: str, positions: object, rows: tuple[int, int, int]) -> AnyArray:
    """Return positions as float64 with the axes (B, H, M), of which the first two may have size 1."""
    array = as_array(positions, owner, "positions")
    if array.dtype.kind not in "iuf" and array.dtype.name not in ACCUMULATORS:
        raise TypeError(f"{owner}: positions has dtype {array.dtype}; needed real numbers")
    B, _, M = rows
    needed = f"(M,) = ({M},), (B, M) = ({B}, {M}) or (B, H, M) = {rows}"
    if array.ndim == 0:
        cure = f": pass np.arange(start, start + {M})" if M != 1 else ": pass [position]"
        raise ValueError(f"{owner}: positions is one number; needed {needed}{cure}")
    axes = {1: (1, 1, *array.shape), 2: (*array.shape[:1], 1, *array.shape[1:]), 3: array.shape}.get(array.ndim)
    if axes is None or axes[2] != M or any(n not in (1, size) for n, size in zip(axes, rows, strict=True)):
        raise ValueError(f"{owner}: positions has shape {array.shape}; needed {needed}")
    numbers = array.astype(np.float64).reshape(axes)
    if not np.isfinite(numbers).all():
        raise ValueError(f"{owner}: positions holds {numbers[~np.isfinite(numbers)][0]}; needed finite numbers")
    return numbers

"""One validated call: arrays as (B, H, M, D), sizes, rules, scale and offsets. Every input error is raised here."""

from __future__ import annotations

import collections
import functools
import math
import operator
import threading
from collections.abc import Hashable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from attn_numba.rules import Dot, Dropout, Mask, Modifier, Sizes, Softmax, as_mask, as_modifiers

AnyArray: TypeAlias = "np.ndarray[Any, Any]"

# dtype name -> dtype of the accumulators, of lse and of weights
ACCUMULATORS = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float32),
    "bfloat16": np.dtype(np.float32),
}
POSITION_LIMIT = 2**30
REMEMBERED = 64  # combinations of rules and sizes that are known to fit; each keeps its rules alive
REMEMBERED_BYTES = 2**20  # rules with larger arrays are not kept

_fitting: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
_lock = threading.Lock()


class Problem(NamedTuple):
    """One call, checked: what every backend computes from."""

    q: AnyArray  # (B, H, M, D)
    k: AnyArray  # (B, Hk, N, D)
    v: AnyArray  # (B, Hk, N, E)
    sizes: Sizes
    rank: int  # axes of the q that came in, and of the result
    dtype: str
    mask: Mask | None
    modifiers: tuple[Modifier, ...]
    score: Dot
    normalizer: Softmax
    scale: float
    query_offset: int | AnyArray  # (B,) int32 if not one number
    key_offset: int | AnyArray
    dropout: Dropout | None
    key: Hashable  # equal keys: the same rules, sizes, dtype, scale and offsets

    @property
    def accumulator(self) -> np.dtype[Any]:
        """Dtype of sums, lse and weights."""
        return ACCUMULATORS[self.dtype]


@functools.cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name of a dtype; NumPy takes microseconds to make it."""
    return dtype.name


def is_device_array(x: object) -> bool:
    """Whether `x` lives on a GPU."""
    if isinstance(x, np.ndarray):
        return False
    if hasattr(x, "__cuda_array_interface__"):
        return True
    if hasattr(x, "__dlpack_device__"):
        return int(x.__dlpack_device__()[0]) not in (1, 3)  # neither CPU nor pinned CPU memory
    return False


def host_array(x: object, name: str) -> AnyArray:
    """Return `x` as a NumPy array without copying, in native byte order.

    Raises
    ------
    TypeError
        If it is no array of one of the four dtypes.
    """
    if isinstance(x, np.ndarray):
        array = x
    elif hasattr(x, "__array__"):
        array = _converted(np.asarray, x, name)
    elif hasattr(x, "__dlpack__"):
        array = _converted(np.from_dlpack, x, name)
    else:
        raise TypeError(
            f"{name} is {type(x).__name__}; needed an array: NumPy's, or one that offers __array__ or DLPack"
        )
    if dtype_name(array.dtype) not in ACCUMULATORS:
        raise TypeError(f"{name} has dtype {array.dtype.name}; needed float64, float32, float16 or bfloat16")
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _converted(convert: Any, x: object, name: str) -> AnyArray:
    try:
        array: AnyArray = convert(x)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name} is {type(x).__name__}, which does not make a NumPy array: {error}") from error
    return array


def _four_axes(array: AnyArray, name: str) -> AnyArray:
    if not 2 <= array.ndim <= 4:
        letters = "(B, H, M, D)" if name in ("q", "out") else "(B, Hk, N, D)" if name == "k" else "(B, Hk, N, E)"
        raise ValueError(f"{name} has {array.ndim} axes, shape {array.shape}; needed 2 to 4, {letters}")
    return array if array.ndim == 4 else array[(np.newaxis,) * (4 - array.ndim)]


def check_arrays(q: object, k: object, v: object) -> tuple[AnyArray, AnyArray, AnyArray, Sizes, int]:
    """Return q, k, v with four axes, the sizes of the call and the rank of q.

    Raises
    ------
    TypeError
        If one is no array of a supported dtype, or they do not share one.
    ValueError
        If their shapes do not fit.
    """
    arrays = [host_array(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v"))]
    dtype = arrays[0].dtype
    if not arrays[1].dtype == arrays[2].dtype == dtype:
        raise TypeError(
            f"q, k, v have dtypes {', '.join(a.dtype.name for a in arrays)}; needed one dtype for all three"
        )
    rank = arrays[0].ndim
    q4, k4, v4 = (_four_axes(a, name) for a, name in zip(arrays, "qkv", strict=True))
    (B, H, M, D), (_, Hk, N, _), E = q4.shape, k4.shape, v4.shape[3]
    for array, name in ((k4, "k"), (v4, "v")):
        if array.shape[0] != B:
            raise ValueError(f"{name} has {array.shape[0]} sequences; q has {B}")
    if k4.shape[3] != D:
        raise ValueError(f"k has head size {k4.shape[3]}; q has {D}")
    if D < 1 or E < 1:
        raise ValueError(f"{'q' if D < 1 else 'v'} has {'head' if D < 1 else 'value'} size 0; needed at least 1")
    if H < 1 or Hk < 1 or H % Hk:
        raise ValueError(
            f"k has {Hk} heads; q has {H}, not a multiple of {Hk}" if Hk else "k has 0 heads; needed at least 1"
        )
    if v4.shape[1] != Hk:
        raise ValueError(f"v has {v4.shape[1]} heads; k has {Hk}")
    if v4.shape[2] != N:
        raise ValueError(f"v has {v4.shape[2]} rows; k has {N}")
    return q4, k4, v4, Sizes(B, H, Hk, M, N, D, E), rank


def check_scale(scale: object, default: float) -> float:
    """Return the scale as a float.

    Raises
    ------
    TypeError
        If it is not a number.
    ValueError
        If it is NaN.
    """
    if scale is None:
        return default
    if isinstance(scale, (bool, str, bytes)):
        raise TypeError(f"scale is {scale!r}; needed a number or None")
    try:
        value = float(scale)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"scale is {type(scale).__name__}; needed a number or None") from None
    if math.isnan(value):
        raise ValueError("scale is NaN; needed a number")
    return value


def check_offset(offset: object, name: str, sequences: int, rows: int) -> int | AnyArray:
    """Return an offset as an int, or as an int32 array (B,).

    Raises
    ------
    TypeError
        If it is not made of integers.
    ValueError
        If its shape is not (B,), or a position would reach 2**30.
    """
    result: int | AnyArray
    if isinstance(offset, int) and not isinstance(offset, bool):
        result = first = last = offset
    else:
        array = np.asarray(offset)
        if array.dtype.kind not in "iu":
            raise TypeError(
                f"{name} is {type(offset).__name__} of dtype {array.dtype}; needed an integer or integers (B,)"
            )
        if array.shape not in ((), (sequences,)):
            raise ValueError(f"{name} has shape {array.shape}; needed one integer or shape (B,) = ({sequences},)")
        first, last = (int(array.min()), int(array.max())) if array.size else (0, 0)
        result = operator.index(array[()]) if array.ndim == 0 else array.astype(np.int64)
    if first <= -POSITION_LIMIT or last + rows >= POSITION_LIMIT:
        raise ValueError(
            f"{name} gives positions from {first} to {last + rows - 1}; needed less than 2**30 either side of 0"
        )
    return result if isinstance(result, int) else result.astype(np.int32)


def check_offsets(
    query_offset: object, key_offset: object, sizes: Sizes, rules: Any
) -> tuple[int | AnyArray, int | AnyArray]:
    """Return both offsets; a query offset of None stands for the key offset where ``M == N``.

    Raises
    ------
    TypeError
        If one is not made of integers.
    ValueError
        If one does not fit, or `query_offset` is None, ``M != N`` and one of `rules` uses positions.
    """
    key_at = check_offset(key_offset, "key_offset", sizes.B, sizes.N)
    if query_offset is not None:
        return check_offset(query_offset, "query_offset", sizes.B, sizes.M), key_at
    if sizes.M == sizes.N:
        return key_at, key_at
    for rule in rules:
        if rule.uses_positions:
            raise ValueError(
                f"query_offset is None, but {type(rule).__name__} uses positions and q has {sizes.M} rows, k has {sizes.N}: pass "
                f"query_offset=0 (first rows aligned) or query_offset={sizes.N - sizes.M} (N - M, last rows aligned)"
            )
    return 0, key_at


def check_shape(shape: object) -> Sizes:
    """Return (B, H, M, N) as sizes of a call.

    Raises
    ------
    TypeError
        If it is not four integers.
    ValueError
        If one is negative.
    """
    try:
        B, H, M, N = (operator.index(n) for n in shape)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        raise TypeError(f"shape is {shape!r}; needed four integers (B, H, M, N)") from None
    if min(B, H, M, N) < 0:
        raise ValueError(f"shape is {(B, H, M, N)}; needed sizes of at least 0")
    return Sizes(B, H, H, M, N, 1, 1)


def check(
    q: object,
    k: object,
    v: object,
    *,
    mask: object = None,
    modifiers: object = (),
    score: object = None,
    normalizer: object = None,
    scale: object = None,
    query_offset: object = None,
    key_offset: object = 0,
    dropout: object = None,
) -> Problem:
    """Return the call as a `Problem`.

    Raises
    ------
    TypeError
        For arguments of the wrong kind.
    ValueError
        For shapes and values that do not fit.
    """
    q4, k4, v4, sizes, rank = check_arrays(q, k, v)
    rule = as_mask(mask)
    chain = as_modifiers(modifiers)
    dot = _instance(score, Dot, "score", "Dot()")
    softmax = _instance(normalizer, Softmax, "normalizer", "Softmax()")
    softmax.sink_array(sizes)
    drop = dropout if dropout is None else _instance(dropout, Dropout, "dropout", "Dropout(rate, seed)")
    number = check_scale(scale, dot.default_scale(sizes.D))
    users = [x for x in (rule, *chain, drop) if x is not None]
    query_at, key_at = check_offsets(query_offset, key_offset, sizes, users)
    dtype = dtype_name(q4.dtype)
    key = ()
    if users or not number > 0:  # to kernels a scale that is not positive is one more modifier
        key = _key(rule, chain, drop, sizes, dtype, number, query_at, key_at)
        _check_rules(key, rule, chain, drop, sizes, query_at, key_at)
    return Problem(q4, k4, v4, sizes, rank, dtype, rule, chain, dot, softmax, number, query_at, key_at, drop, key)


def _key(
    rule: Any, chain: Any, drop: Any, sizes: Sizes, dtype: str, scale: float, query_at: Any, key_at: Any
) -> Hashable:
    return (
        _identity(rule),
        *map(_identity, chain),
        _identity(drop),
        sizes,
        dtype,
        scale,
        _as_key(query_at),
        _as_key(key_at),
    )


def _identity(rule: Any) -> Hashable:
    """Rules made of plain numbers are equal by value, others to themselves alone: they stay alive while their id is a key."""
    if rule is None:
        return None
    masks = getattr(rule, "masks", None)
    if masks is not None:
        return (type(rule), *map(_identity, masks))
    if is_dataclass(rule):
        values = tuple(getattr(rule, f.name) for f in fields(rule))
        if all(isinstance(x, (int, float)) for x in values):
            return (type(rule), *values)
    return id(rule)


def _as_key(offset: int | AnyArray) -> Hashable:
    return offset if isinstance(offset, int) else offset.tobytes()


def is_light(rule: Any) -> bool:
    """Whether a rule may be kept for calls that repeat: its arrays are small."""
    if isinstance(rule, np.ndarray):
        return rule.nbytes <= REMEMBERED_BYTES
    if isinstance(rule, tuple):
        return all(map(is_light, rule))
    if is_dataclass(rule):
        return all(is_light(getattr(rule, f.name)) for f in fields(rule))
    return is_light(getattr(rule, "masks", ()))


def _check_rules(key: Hashable, rule: Any, chain: Any, drop: Any, sizes: Sizes, query_at: Any, key_at: Any) -> None:
    """Check that the rules fit the call, unless the same ones did before."""
    with _lock:
        if key in _fitting:
            _fitting.move_to_end(key)
            return
    for user in (rule, *chain):
        if user is not None:
            user.check(sizes, query_at, key_at)
    if drop is not None:
        drop.keys(sizes)
    if not is_light((rule, *chain, drop)):
        return
    with _lock:
        _fitting[key] = rule, chain, drop
        if len(_fitting) > REMEMBERED:
            _fitting.popitem(last=False)


def _instance(x: Any, kind: Any, name: str, example: str) -> Any:
    """`x`, or a new `kind` for None."""
    if x is None:
        return kind()
    if isinstance(x, kind):
        return x
    what = f"the class {x.__name__}" if isinstance(x, type) else type(x).__name__
    raise TypeError(f"{name} is {what}; needed {example}")


def check_out(out: object, problem: Problem) -> AnyArray:
    """Return `out` with four axes.

    Raises
    ------
    TypeError
        If it is not a NumPy array of q's dtype.
    ValueError
        If its shape does not fit, it is read-only, or it overlaps an input.
    """
    s = problem.sizes
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out is {type(out).__name__}; needed a NumPy array")
    if out.dtype != problem.q.dtype:
        raise TypeError(f"out has dtype {out.dtype.name}; q has {problem.dtype}")
    shape = (s.B, s.H, s.M, s.E)[4 - problem.rank :]
    if out.shape != shape:
        raise ValueError(f"out has shape {out.shape}; needed {shape}")
    if not out.flags.writeable:
        raise ValueError("out is read-only; needed an array that can be written")
    for array, name in ((problem.q, "q"), (problem.k, "k"), (problem.v, "v")):
        if np.may_share_memory(out, array) and _shares(out, array):
            raise ValueError(f"out overlaps {name}; needed memory of its own")
    if out.size > 1 and _overlaps_itself(out):
        raise ValueError("out has elements that share memory; needed one place for each element")
    return _four_axes(out, "out")


def _shares(a: AnyArray, b: AnyArray) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10_000)
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(array: AnyArray) -> bool:
    """Whether two elements may be in one place: sorted by stride, each axis must step over all smaller ones."""
    reach = array.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False

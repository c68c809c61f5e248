"""Arguments of a call: the checks that every backend, the reference included, makes of them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any, Protocol, TypeVar

import numpy as np

from attn_numba.rules.data import AnyArray, as_array, whole_number
from attn_numba.rules.modifiers import Modifier
from attn_numba.rules.normalizers import Normalizer, Softmax
from attn_numba.rules.places import Sizes
from attn_numba.rules.scores import Dot, Score

# dtype of q, k, v and out -> dtype of sums, of lse and of weights
ACCUMULATORS: dict[str, np.dtype[Any]] = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float32),
    "bfloat16": np.dtype(np.float32),
}
DTYPES = tuple(ACCUMULATORS)
ANY_DTYPE = f"{', '.join(DTYPES[:-1])} or {DTYPES[-1]}"
POSITION_LIMIT = 2**30
ANY_SCORE = "Dot(), Cosine(), Bilinear(W) or Additive(Wq, Wk, w)"
ANY_NORMALIZER = "Softmax(), Sparsemax(), Entmax15() or DoubleSoftmax()"
LETTERS = {"q": "(B, H, M, D)", "k": "(B, Hk, N, D)", "v": "(B, Hk, N, E)"}

Kind = TypeVar("Kind")


class User(Protocol):
    """What may need positions: a mask, a modifier, dropout."""

    @property
    def uses_positions(self) -> bool: ...


def check_dtypes(q: str, k: str, v: str) -> None:
    """Check the names of the dtypes of q, k and v.

    Raises
    ------
    TypeError
        If one is not supported, or they differ.
    """
    if q == k == v and q in ACCUMULATORS:
        return
    for name, dtype in (("q", q), ("k", k), ("v", v)):
        check_dtype(name, dtype)
    raise TypeError(f"q, k, v have dtypes {q}, {k}, {v}; needed one dtype for all three")


def check_dtype(name: str, dtype: str) -> None:
    """Check the name of the dtype of one array.

    Raises
    ------
    TypeError
        If it is not supported.
    """
    if dtype not in ACCUMULATORS:
        raise TypeError(f"{name} has dtype {dtype}; needed {ANY_DTYPE}")


def sizes_of(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], score: Score) -> Sizes:
    """Return the sizes of a call from the shapes of q, k and v; missing leading axes count as 1.

    The score says which head sizes of q and k go together.

    Raises
    ------
    ValueError
        If the shapes do not fit.
    """
    B, H, M, D = _four_sizes("q", q)
    Bk, Hk, N, Dk = _four_sizes("k", k)
    Bv, Hv, Nv, E = _four_sizes("v", v)
    for name, sequences in (("k", Bk), ("v", Bv)):
        if sequences != B:
            raise ValueError(f"{name} has {sequences} sequences; q has {B}")
    if D < 1 or E < 1:
        raise ValueError(f"{'q has head' if D < 1 else 'v has value'} size 0; needed at least 1")
    if H < 1 or Hk < 1:
        raise ValueError(f"{'k' if Hk < 1 else 'q'} has 0 heads; needed at least 1")
    if H % Hk:
        raise ValueError(f"k has {Hk} heads; q has {H}, not a multiple of {Hk}")
    if Hv != Hk:
        raise ValueError(f"v has {Hv} heads; k has {Hk}")
    if Nv != N:
        raise ValueError(f"v has {Nv} rows; k has {N}")
    sizes = Sizes(B, H, Hk, M, N, D, E)
    score.check(sizes, Dk)
    return sizes


def _four_sizes(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if not 2 <= len(shape) <= 4:
        raise ValueError(f"{name} has {len(shape)} axes, shape {shape}; needed 2 to 4, {LETTERS[name]}")
    return shape if len(shape) == 4 else (1,) * (4 - len(shape)) + shape


def check_scale(scale: object, default: float) -> float:
    """Return the scale as a float; `default` for None.

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
    query_offset: object, key_offset: object, sizes: Sizes, users: Iterable[User]
) -> tuple[int | AnyArray, int | AnyArray]:
    """Return both offsets; a query offset of None stands for the key offset where ``M == N``.

    Raises
    ------
    TypeError
        If one is not made of integers.
    ValueError
        If one does not fit, or `query_offset` is None, ``M != N`` and one of the users uses positions.
    """
    key_at = check_offset(key_offset, "key_offset", sizes.B, sizes.N)
    if query_offset is not None:
        return check_offset(query_offset, "query_offset", sizes.B, sizes.M), key_at
    if sizes.M == sizes.N:
        return key_at, key_at
    for user in users:
        if user.uses_positions:
            raise ValueError(
                f"query_offset is None, but {type(user).__name__} uses positions and q has {sizes.M} rows, "
                f"k has {sizes.N}: pass query_offset=0 (first rows aligned) or "
                f"query_offset={sizes.N - sizes.M} (N - M, last rows aligned)"
            )
    return 0, key_at


def check_score(score: object) -> Score:
    """Return the score; `Dot` for None.

    Raises
    ------
    TypeError
        If it is something else.
    """
    return Dot() if score is None else instance(score, Score, "score", ANY_SCORE)


def check_normalizer(normalizer: object, modifiers: Iterable[Modifier] = ()) -> Normalizer:
    """Return the normalizer of a call with these modifiers; `Softmax` for None.

    Raises
    ------
    TypeError
        If it is something else.
    ValueError
        If one of the modifiers has a meaning for softmax only, and this is another.
    """
    if normalizer is None:
        return Softmax()
    result = instance(normalizer, Normalizer, "normalizer", ANY_NORMALIZER)
    for modifier in modifiers:
        if modifier.softmax_only and not isinstance(result, Softmax):
            raise ValueError(
                f"normalizer is {type(result).__name__}, but {type(modifier).__name__} multiplies weights by adding "
                "logarithms to the scores; needed Softmax()"
            )
    return result


def check_lse(return_lse: object, normalizer: Normalizer) -> None:
    """Check that the normalizer has the logarithm of a sum of exponentials, if that is asked for.

    Raises
    ------
    ValueError
        If it has not.
    """
    if return_lse and not isinstance(normalizer, Softmax):
        raise ValueError(f"return_lse is {return_lse}, but {type(normalizer).__name__} has no lse; needed Softmax()")


def check_gradient(shape: tuple[int, ...], dtype: str, needed: tuple[int, ...], q: str) -> None:
    """Check the shape and the name of the dtype of dout against those of the output and of q.

    Raises
    ------
    TypeError
        If the dtype is another than that of q.
    ValueError
        If the shape is another than that of the output.
    """
    if dtype != q:
        raise TypeError(f"dout has dtype {dtype}; q has {q}")
    if shape != needed:
        raise ValueError(f"dout has shape {shape}; needed {needed}, the shape of the output")


def check_differentiable(modifiers: Iterable[Modifier]) -> None:
    """Check that the derivatives of all modifiers are known.

    Raises
    ------
    ValueError
        If one has no slope.
    """
    for n, modifier in enumerate(modifiers):
        if not modifier.differentiable:
            raise ValueError(
                f"modifiers[{n}], {type(modifier).__name__}, has no slope; gradients need it: pass slope=, the "
                "derivative of the new score by s"
            )


def check_saved(
    saved: object, normalizer: Normalizer, needed: tuple[int, ...], dtype: str
) -> tuple[Any, Any] | tuple[None, None]:
    """Return out and lse of a forward call as they came, for an output of the shape needed and the dtype of that name.

    Raises
    ------
    TypeError
        If it is no pair of arrays, or one has another dtype.
    ValueError
        If one has another shape, or the normalizer has no lse.
    """
    if saved is None:
        return None, None
    if not isinstance(normalizer, Softmax):
        raise ValueError(f"saved was given, but {type(normalizer).__name__} has no lse; needed None")
    if not (isinstance(saved, (tuple, list)) and len(saved) == 2 and all(hasattr(x, "dtype") for x in saved)):
        what = f"{len(saved)} things" if isinstance(saved, (tuple, list)) and len(saved) != 2 else type(saved).__name__
        raise TypeError(f"saved is {what}; needed (out, lse), arrays as attention returns them, or None")
    kinds = (dtype, ACCUMULATORS[dtype].name)
    for name, array, shape, kind in zip(("out", "lse"), saved, (needed, needed[:-1]), kinds, strict=True):
        found = getattr(array.dtype, "name", str(array.dtype).removeprefix("torch."))
        if found != kind:
            raise TypeError(f"saved: {name} has dtype {found}; needed {kind}")
        if tuple(array.shape) != shape:
            raise ValueError(f"saved: {name} has shape {tuple(array.shape)}; needed {shape}: it is of another call")
    return saved[0], saved[1]


def check_rows(rows: object, count: int) -> range:
    """Return the rows that a slice takes of so many; all for None.

    Raises
    ------
    TypeError
        If it is not a slice of integers.
    ValueError
        If its step is below 1.
    """
    if rows is None:
        return range(count)
    if not isinstance(rows, slice):
        raise TypeError(f"rows is {type(rows).__name__}; needed a slice of query rows, such as slice(0, 10), or None")
    for part in ("start", "stop", "step"):
        if getattr(rows, part) is not None:
            whole_number("rows", part, getattr(rows, part))
    if rows.step is not None and rows.step < 1:
        raise ValueError(f"rows: step is {rows.step}; needed at least 1")
    return range(count)[rows]


def check_count(count: object, keys: int) -> int:
    """Return a number of keys.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is negative, or there are not so many.
    """
    number = whole_number("top_keys", "count", count)
    if not 0 <= number <= keys:
        raise ValueError(f"top_keys: count is {number}; needed 0 to {keys}, the number of keys")
    return number


def instance(x: object, kind: type[Kind], name: str, example: str) -> Kind:
    """Return `x`, which is a `kind`.

    Raises
    ------
    TypeError
        If `x` is something else; `example` says what to pass.
    """
    if isinstance(x, kind):
        return x
    what = f"the class {x.__name__}" if isinstance(x, type) else type(x).__name__
    raise TypeError(f"{name} is {what}; needed {example}")


def check_parts(
    outs: Iterable[object], lses: Iterable[object], sink: object = None
) -> tuple[list[AnyArray], list[AnyArray], AnyArray | None]:
    """Return partial results over disjoint sets of keys as arrays, and the sink as float64 (B, H).

    Raises
    ------
    TypeError
        If the parts are not of one supported dtype each, or the sink is not of real numbers.
    ValueError
        If there is no part, shapes do not fit, or the sink holds NaN.
    """
    results, sums = _parts("outs", outs), _parts("lses", lses)
    if not results or len(results) != len(sums):
        raise ValueError(f"outs has {len(results)} parts, lses {len(sums)}; needed as many of each, at least one")
    shape = results[0].shape
    if not 2 <= len(shape) <= 4:
        raise ValueError(f"outs[0] has shape {shape}; needed (B, H, M, E), with or without leading axes")
    for n, (out, lse) in enumerate(zip(results, sums, strict=True)):
        if out.shape != shape:
            raise ValueError(f"outs[{n}] has shape {out.shape}; outs[0] has {shape}")
        if lse.shape != shape[:-1]:
            raise ValueError(f"lses[{n}] has shape {lse.shape}; needed {shape[:-1]}, one number for each row of outs")
    if sink is None:
        return results, sums, None
    B, H, M, E = (1,) * (4 - len(shape)) + shape
    return results, sums, Softmax(sink).sink_array(Sizes(B, H, H, M, 0, 1, E))


def _parts(name: str, parts: Iterable[object]) -> list[AnyArray]:
    arrays = [as_array(x, f"{name}[{n}]") for n, x in enumerate(parts)]
    for n, array in enumerate(arrays):
        check_dtype(f"{name}[{n}]", array.dtype.name)
        if array.dtype != arrays[0].dtype:
            raise TypeError(f"{name}[{n}] has dtype {array.dtype}; {name}[0] has {arrays[0].dtype}")
    return arrays

"""One validated call: arrays as (B, H, M, D), sizes, rules, scale and offsets. Every input error is raised here."""

from __future__ import annotations

import collections
import functools
import operator
import os
import threading
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import numpy as np

from attn_numba.rules import Dot, Dropout, Mask, Modifier, Normalizer, Score, Sizes, as_mask, as_modifiers
from attn_numba.rules.arguments import (
    ACCUMULATORS,
    check_dtype,
    check_dtypes,
    check_normalizer,
    check_offsets,
    check_scale,
    check_score,
    instance,
    sizes_of,
)
from attn_numba.rules.blocks import Block, offset_of, part_of
from attn_numba.rules.data import AnyArray

REMEMBERED = 64  # combinations of rules and sizes that are known to fit; each keeps its rules alive
REMEMBERED_BYTES = 2**20  # rules with larger arrays are not kept

_fitting: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # else a forked child may find it held by a thread that it does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class Problem(NamedTuple):
    """One call, checked: what every backend computes from."""

    q: AnyArray  # (B, H, M, D)
    k: AnyArray  # (B, Hk, N, D), or of another head size, which the score knows
    v: AnyArray  # (B, Hk, N, E)
    sizes: Sizes
    rank: int  # axes of the q that came in, and of the result
    dtype: str
    mask: Mask | None
    modifiers: tuple[Modifier, ...]
    score: Score
    normalizer: Normalizer
    scale: float
    query_offset: int | AnyArray  # (B,) int32 if not one number
    key_offset: int | AnyArray
    dropout: Dropout | None
    key: Hashable  # equal keys: the same rules, sizes, dtype, scale and offsets

    @property
    def accumulator(self) -> np.dtype[Any]:
        """Dtype of sums, lse and weights."""
        return ACCUMULATORS[self.dtype]

    def options(self) -> dict[str, Any]:
        """Return the rules as the keyword arguments of `attn_numba.attention`."""
        names = ("mask", "modifiers", "score", "normalizer", "scale", "query_offset", "key_offset", "dropout")
        return {name: getattr(self, name) for name in names}

    def in_block(self, block: Block) -> Problem:
        """Return what the call is in a block: its sizes, rules and offsets there; arrays stay those of the whole.

        Raises
        ------
        NotImplementedError
            If a rule is of a class of which nobody knows what belongs to a block.
        """

        def cut(rule: Any) -> Any:
            return rule if rule is None else part_of(rule, block, self.sizes)

        return self._replace(
            sizes=block.sizes(self.sizes), mask=cut(self.mask), modifiers=tuple(map(cut, self.modifiers)),
            score=cut(self.score), normalizer=cut(self.normalizer), dropout=cut(self.dropout),
            query_offset=offset_of(self.query_offset, block.b, block.i),
            key_offset=offset_of(self.key_offset, block.b, block.j), key=None,
        )  # fmt: skip


_NOTHING = bytes(8)
Reader = Callable[[Any, str], Any]  # of an array and the name of the argument


@functools.cache
def dtype_name(dtype: np.dtype[Any]) -> str:
    """Return the name of a dtype; NumPy takes microseconds to make it."""
    return dtype.name


def is_device_array(x: object) -> bool:
    """Whether `x` lives on a GPU."""
    if isinstance(x, np.ndarray):
        return False
    is_cuda = getattr(x, "is_cuda", None)  # of torch tensors: some have no __cuda_array_interface__ to look at
    if isinstance(is_cuda, bool):
        return is_cuda
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
    check_dtype(name, dtype_name(array.dtype))
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _converted(convert: Any, x: object, name: str) -> AnyArray:
    try:
        array: AnyArray = convert(x)
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise TypeError(f"{name} is {type(x).__name__}, which does not make a NumPy array: {error}") from error
    return array


def nothing(shape: tuple[int, ...], dtype: Any) -> AnyArray:
    """Return an array of a shape to be checked, whose elements all lie in one place and mean nothing."""
    return np.ndarray(shape, dtype, _NOTHING, strides=(0,) * len(shape))


def _four_axes(array: AnyArray) -> AnyArray:
    return array if array.ndim == 4 else array.reshape((1,) * (4 - array.ndim) + array.shape)


def device_view(x: Any, name: str) -> Any:
    """Return the view of an array on a GPU as it is: what `host_array` is for arrays in host memory.

    Raises
    ------
    TypeError
        If it is of none of the four dtypes.
    """
    check_dtype(name, dtype_name(x.dtype))
    return x


def check_arrays(
    q: object, k: object, v: object, score: Score, read: Reader = host_array
) -> tuple[AnyArray, AnyArray, AnyArray, Sizes, int]:
    """Return q, k, v with four axes, the sizes of the call and the rank of q.

    `read` makes an array of what came, `host_array` or `device_view`.

    Raises
    ------
    TypeError
        If one is no array of a supported dtype, or they do not share one.
    ValueError
        If their shapes do not fit.
    """
    queries, keys, values = read(q, "q"), read(k, "k"), read(v, "v")
    check_dtypes(dtype_name(queries.dtype), dtype_name(keys.dtype), dtype_name(values.dtype))
    sizes = sizes_of(queries.shape, keys.shape, values.shape, score)
    return _four_axes(queries), _four_axes(keys), _four_axes(values), sizes, queries.ndim


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
    read: Reader = host_array,
) -> Problem:
    """Return the call as a `Problem`.

    `read` makes an array of q, of k and of v: `host_array`, or `device_view` for views of arrays on a GPU.

    Raises
    ------
    TypeError
        For arguments of the wrong kind.
    ValueError
        For shapes and values that do not fit.
    """
    relation = check_score(score)
    q4, k4, v4, sizes, rank = check_arrays(q, k, v, relation, read)
    rule = as_mask(mask)
    chain = as_modifiers(modifiers)
    weigher = check_normalizer(normalizer, chain)
    weigher.check(sizes)
    drop = dropout if dropout is None else instance(dropout, Dropout, "dropout", "Dropout(rate, seed)")
    number = check_scale(scale, relation.default_scale(sizes.D))
    users = [x for x in (rule, *chain, drop) if x is not None]
    query_at, key_at = check_offsets(query_offset, key_offset, sizes, users)
    dtype = dtype_name(q4.dtype)
    key: Hashable = ()
    if rule is not None and rule is not mask:  # made of an array for this call alone, and never met again
        key = None
        _check_rules(key, rule, chain, drop, sizes, query_at, key_at)
    elif users:
        key = _key(rule, chain, drop, sizes, dtype, number, query_at, key_at)
        _check_rules(key, rule, chain, drop, sizes, query_at, key_at)
    return Problem(q4, k4, v4, sizes, rank, dtype, rule, chain, relation, weigher, number, query_at, key_at, drop, key)


def mapped(problem: Problem) -> Problem:
    """Return the same call with the maps of its score applied to q and k.

    What remains to be done for a score of `dots` is the dot product. Mapped rows are in the accumulator's dtype, and so
    is all that is computed from them.
    """
    if isinstance(problem.score, Dot):
        return problem
    dtype = problem.accumulator
    q, k = problem.score.mapped(problem.q.astype(dtype, copy=False), problem.k.astype(dtype, copy=False))
    sizes = problem.sizes._replace(D=q.shape[-1])
    return problem._replace(
        q=q, k=k, v=problem.v.astype(dtype, copy=False), sizes=sizes, dtype=dtype.name,
        score=Dot() if problem.score.dots else problem.score,
        key=problem.key and (problem.key, sizes, dtype.name),
    )  # fmt: skip


def _key(
    rule: Any, chain: Any, drop: Any, sizes: Sizes, dtype: str, scale: float, query_at: Any, key_at: Any
) -> Hashable:
    return (
        identity(rule),
        *map(identity, chain),
        identity(drop),
        sizes,
        dtype,
        scale,
        _as_key(query_at),
        _as_key(key_at),
    )


def identity(rule: Any) -> Hashable:
    """Return what tells a rule from others: plain numbers are equal by value, all else is equal to itself alone.

    A rule whose id is part of a key stays alive as long as the key.
    """
    if rule is None:
        return None
    masks = getattr(rule, "masks", None)
    if masks is not None:
        return (type(rule), *map(identity, masks))
    kind: Any = type(rule)
    names = _field_names(kind)
    if names is not None:
        values = tuple(getattr(rule, name) for name in names)
        if all(x is None or isinstance(x, (int, float)) for x in values):
            return (kind, *values)
    return id(rule)


@functools.cache
def _field_names(kind: Any) -> tuple[str, ...] | None:
    return tuple(f.name for f in fields(kind)) if is_dataclass(kind) else None


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
    """Check that the rules fit the call, unless the same ones did before; `key` is None if they cannot have."""
    with _lock:
        if key in _fitting:
            _fitting.move_to_end(key)
            return
    for user in (rule, *chain):
        if user is not None:
            user.check(sizes, query_at, key_at)
    if drop is not None:
        drop.keys(sizes)
    if key is None or not is_light((rule, *chain, drop)):
        return
    with _lock:
        _fitting[key] = rule, chain, drop
        if len(_fitting) > REMEMBERED:
            _fitting.popitem(last=False)


def check_out(out: object, problem: Problem) -> AnyArray:
    """Return `out` with four axes.

    Raises
    ------
    TypeError
        If it is not a NumPy array of q's dtype.
    ValueError
        If its shape does not fit, it is read-only, or it overlaps an input.
    """
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out is {type(out).__name__}; needed a NumPy array")
    if out.dtype != problem.q.dtype:
        raise TypeError(f"out has dtype {out.dtype.name}; q has {problem.dtype}")
    _check_out_shape(out.shape, problem)
    if not out.flags.writeable:
        raise ValueError("out is read-only; needed an array that can be written")
    for array, name in ((problem.q, "q"), (problem.k, "k"), (problem.v, "v")):
        if np.may_share_memory(out, array) and _shares(out, array):
            raise ValueError(f"out overlaps {name}; needed memory of its own")
    if out.size > 1 and _overlaps_itself(out):
        raise ValueError("out has elements that share memory; needed one place for each element")
    return _four_axes(out)


def check_out_view(out: Any, problem: Problem) -> Any:
    """Return the view of an `out` on a GPU with four axes.

    Raises
    ------
    TypeError
        If it is not of q's dtype.
    ValueError
        If its shape does not fit, it is read-only, or it may overlap an input: its addresses are among an input's.
    """
    if dtype_name(out.dtype) != problem.dtype:
        raise TypeError(f"out has dtype {dtype_name(out.dtype)}; q has {problem.dtype}")
    _check_out_shape(out.shape, problem)
    if out.readonly:
        raise ValueError("out is read-only; needed an array that can be written")
    first, end = out.span()
    for array, name in ((problem.q, "q"), (problem.k, "k"), (problem.v, "v")):
        low, high = array.span()  # type: ignore[attr-defined]
        if first < high and low < end:
            raise ValueError(f"out overlaps {name}; needed memory of its own")
    if out.size > 1 and _overlaps_itself(out):
        raise ValueError("out has elements that share memory; needed one place for each element")
    return _four_axes(out)


def _check_out_shape(found: tuple[int, ...], problem: Problem) -> None:
    s = problem.sizes
    shape = (s.B, s.H, s.M, s.E)[4 - problem.rank :]
    if found != shape:
        raise ValueError(f"out has shape {found}; needed {shape}")


def _shares(a: AnyArray, b: AnyArray) -> bool:
    try:
        return np.shares_memory(a, b, max_work=10_000)  # type: ignore[arg-type]  # NumPy's stub knows -1 and 0 only
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(array: AnyArray) -> bool:
    """Whether two elements may be in one place: sorted by stride, each axis must step over all smaller ones."""
    reach = array.dtype.itemsize
    for stride, size in sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1):
        if stride < reach:
            return True
        reach = stride * (size - 1) + reach
    return False

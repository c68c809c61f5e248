"""Rules of a part of a call: some neighboring rows of q against some neighboring rows of k.

Positions need nothing but offsets, which the call of the part is given. What a rule reads by row is cut here.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from attn_numba.rules.adaptive import AdaptiveSpan
from attn_numba.rules.base import Dense, Mask, Not, Rule, _Joined
from attn_numba.rules.chain import formulas_of
from attn_numba.rules.data import AnyArray, fitted
from attn_numba.rules.formula import Binder, Param, evaluate
from attn_numba.rules.masks import BlockSparse, Padding, SameDocument
from attn_numba.rules.modifiers import Bias, Modifier, ReplaceExcluded, SoftCap, Temperature
from attn_numba.rules.places import Sizes

__all__ = ["Cutter", "learned_place", "may_see"]

R = TypeVar("R", bound=Rule)


class Cutter:
    """Makes the rules of a part; one rule met twice becomes one part.

    Parameters
    ----------
    rows, keys : (int, int)
        First and end of the rows of q and of the rows of k.
    sizes : Sizes
        Of the whole call.
    """

    def __init__(self, rows: tuple[int, int], keys: tuple[int, int], sizes: Sizes) -> None:
        self.rows, self.keys, self.sizes = rows, keys, sizes
        self._made: dict[int, Any] = {}

    def part(self, rule: R) -> R:
        """Return a rule as it is for the part, the very same if it reads nothing by row.

        Raises
        ------
        NotImplementedError
            If it is of a kind that reads rows in a way that is not known here.
        """
        if id(rule) not in self._made:
            self._made[id(rule)] = rule if self._is_whole() else _cut(rule, self)
        return self._made[id(rule)]  # type: ignore[no-any-return]

    def _is_whole(self) -> bool:
        return self.rows == (0, self.sizes.M) and self.keys == (0, self.sizes.N)

    def array(self, array: AnyArray, axes: str) -> AnyArray:
        """Return a view of the part of an array whose last axis is the last of `axes`, such as ``"BHMN"``."""
        return np.asarray(array[place_of(array.shape, axes, self.rows, self.keys, self.sizes)])

    def changed(self, rule: R, **values: Any) -> R:
        """Return a copy of a rule with other values, which are not checked again."""
        result = copy.copy(rule)
        for name, value in values.items():
            object.__setattr__(result, name, value)
        return result


def place_of(
    shape: Sequence[int], axes: str, rows: tuple[int, int], keys: tuple[int, int], sizes: Sizes
) -> tuple[slice, ...]:
    """Return where the part of an array lies in it; along an axis of one element, all parts share that."""
    own = axes[len(axes) - len(shape) :]
    whole = slice(None)
    along = {"M": (slice(*rows), sizes.M), "N": (slice(*keys), sizes.N)}
    return tuple(
        along[axis][0] if axis in along and size == along[axis][1] else whole
        for axis, size in zip(own, shape, strict=True)
    )


def learned_place(modifier: Modifier, rows: tuple[int, int], keys: tuple[int, int], sizes: Sizes) -> tuple[slice, ...]:
    """Return where the gradient by the array of a part of a modifier belongs in that by the whole array."""
    assert modifier.learned is not None
    name, axes = modifier.learned
    return place_of(np.shape(getattr(modifier, name)), axes, rows, keys, sizes)


@functools.singledispatch
def _cut(rule: Any, cutter: Cutter) -> Any:
    if not rule.positional:
        raise NotImplementedError(
            f"{type(rule).__name__} reads rows of q and k in a way of its own, so a call with it cannot be cut into "
            "parts; needed a rule of this package, or one of positions, such as CustomMask"
        )
    return rule


@_cut.register
def _(rule: _Joined, cutter: Cutter) -> Any:
    return type(rule)(tuple(cutter.part(mask) for mask in rule.masks))


@_cut.register
def _(rule: Not, cutter: Cutter) -> Any:
    return Not(cutter.part(rule.mask))


@_cut.register
def _(rule: ReplaceExcluded, cutter: Cutter) -> Any:
    return cutter.changed(rule, mask=cutter.part(rule.mask))


@_cut.register
def _(rule: SoftCap, cutter: Cutter) -> Any:
    return rule


@_cut.register(Dense)
@_cut.register(Bias)
def _(rule: Any, cutter: Cutter) -> Any:
    return cutter.changed(rule, array=cutter.array(rule.array, "BHMN"))


@_cut.register
def _(rule: Temperature, cutter: Cutter) -> Any:
    return cutter.changed(rule, t=cutter.array(rule.t, "BHM"))


@_cut.register
def _(rule: AdaptiveSpan, cutter: Cutter) -> Any:
    reaches = tuple(cutter.array(x, "BHM") for x in rule._reaches)  # type: ignore[attr-defined]
    return cutter.changed(rule, span=cutter.array(rule.span, "BHM"), _reaches=reaches)


@_cut.register
def _(rule: SameDocument, cutter: Cutter) -> Any:
    keys = rule.query_ids if rule.key_ids is None else rule.key_ids
    return cutter.changed(
        rule, query_ids=cutter.array(rule.query_ids, "BM"), key_ids=cutter.array(np.asarray(keys), "BN")
    )


@_cut.register
def _(rule: Padding, cutter: Cutter) -> Any:
    (first_row, _), (first_key, _) = cutter.rows, cutter.keys
    lengths = None if rule.query_lengths is None else rule.query_lengths - first_row
    return cutter.changed(
        rule, key_starts=rule.key_starts - first_key, key_lengths=rule.key_lengths - first_key, query_lengths=lengths
    )


@_cut.register
def _(rule: BlockSparse, cutter: Cutter) -> Any:
    return _BlocksOfPart(rule, cutter)


class _BlocksOfPart(Mask):
    """`BlockSparse` of a part, whose first rows may lie in the middle of a block."""

    def __init__(self, whole: BlockSparse, cutter: Cutter) -> None:
        blocks, counts, *steps = whole.arguments(cutter.sizes)
        self._arguments = (blocks, counts, *steps, cutter.rows[0], cutter.keys[0])

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return self._arguments

    @staticmethod
    def allowed(b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return BlockSparse.allowed(b, h, i + p[4], j + p[5], p)

    @staticmethod
    def tile(b: Any, h: Any, i0: Any, i1: Any, j0: Any, j1: Any, p: Any) -> Any:
        return BlockSparse.tile(b, h, i0 + p[4], i1 + p[4], j0 + p[5], j1 + p[5], p)


def may_see(
    mask: Mask | None,
    modifiers: Sequence[Modifier],
    sizes: Sizes,
    query_offset: Any,
    key_offset: Any,
    rows: tuple[AnyArray, AnyArray],
    keys: tuple[AnyArray, AnyArray],
) -> tuple[AnyArray, AnyArray]:
    """Return whether the queries of each stretch of rows see anything, and whether all, of each stretch of keys.

    Parameters
    ----------
    mask, modifiers : Mask or None, sequence of Modifier
        Those of the call. What modifiers exclude counts too.
    sizes : Sizes
        Of the call.
    query_offset, key_offset : int or int array (B,)
        Position of query row 0 and of key row 0.
    rows, keys : pairs of int arrays (m,), (n,)
        Firsts and ends of the stretches, none of them empty.

    Returns
    -------
    some, all : bool arrays (m, n)
        Whether a pair may be allowed in some sequence and head, as far as the formulas tell without looking at arrays
        that vary along both queries and keys; and whether all pairs certainly are, in all of them.
    """
    shape = (len(rows[0]), len(keys[0]))
    binder = Binder(query_levels=None)
    seen = formulas_of(mask, modifiers, 1.0, sizes, binder).seen
    if seen is None:
        return np.ones(shape, bool), np.ones(shape, bool)
    queries_at, keys_at = (
        fitted("may_see", name, np.asarray(x, np.int64), "B", sizes)[:, None]
        for name, x in (("query_offset", query_offset), ("key_offset", key_offset))
    )
    values: dict[str, Any] = {"b": np.arange(sizes.B)[:, None], "h": np.arange(sizes.H)}
    for letter, ends, at, axis in (("i", rows, queries_at, (1, 2, 3)), ("j", keys, keys_at, (0, 2, 3))):
        for n, end in enumerate(ends):
            row = np.expand_dims(np.asarray(end, np.int64), axis)  # (m, n, B, H) in all
            values[f"row_{letter}{n}"], values[f"{letter}{n}"] = row, row + at
    found = (np.asarray(evaluate(node, values, binder.params), bool) for node in (seen.possible, seen.certain))
    possible, certain = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in found)
    some, every = possible.any(axis=(2, 3)), certain.all(axis=(2, 3))
    return np.broadcast_to(some, shape).copy(), np.broadcast_to(every, shape).copy()

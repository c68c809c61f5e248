"""Which pairs of a call are seen, as far as its rules tell: what spreading a call over machines needs to know.

`may_see` asks the formulas of the rules about many stretches of queries and keys at once. `answer` asks about one whole
call, such as a block with the rules cut to it, and knows the least and the greatest number of every array there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from attn_numba.rules.base import AllOf, AnyOf, Mask, Not, ranges_of
from attn_numba.rules.chain import formulas_of
from attn_numba.rules.data import AnyArray, fitted
from attn_numba.rules.formula import Binder, Node, evaluate, lift
from attn_numba.rules.interval import known, reader_over
from attn_numba.rules.modifiers import Modifier
from attn_numba.rules.places import SYMBOLS, Sizes

__all__ = ["ALL", "NONE", "SOME", "answer", "may_see"]

NONE, SOME, ALL = 0, 1, 2  # of the pairs of a block, as tiles of a mask are told of


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


def answer(
    mask: Mask | None,
    modifiers: tuple[Modifier, ...],
    sizes: Sizes,
    query_offset: int | AnyArray,
    key_offset: int | AnyArray,
) -> int:
    """Return how many pairs of a call are visible as far as its rules alone tell: `NONE`, `SOME` or `ALL` of them.

    Parameters
    ----------
    mask : Mask or None
        Of the call; of a block, as `part_of` returns it.
    modifiers : tuple of Modifier
        Some of which may exclude keys.
    sizes : Sizes
        Of the call.
    query_offset, key_offset : int or int array (B,)
        Position of query row 0 and of key row 0.

    Returns
    -------
    int
        `NONE` and `ALL` are certain, and `ALL` is of the mask alone; `SOME` may be any number.
    """
    if 0 in (sizes.B, sizes.H, sizes.M, sizes.N):
        return NONE
    bounds = _Bounds(sizes, query_offset, key_offset)
    if any(bounds.excludes(modifier) for modifier in modifiers):
        return NONE
    certain, possible = (True, True) if mask is None else bounds.of_mask(mask)
    return ALL if certain else SOME if possible else NONE


class _Bounds:
    """What masks and modifiers say of a whole call: is it certain of all pairs, is it possible for some pair."""

    def __init__(self, sizes: Sizes, query_offset: Any, key_offset: Any) -> None:
        self.sizes, self.offsets = sizes, (query_offset, key_offset)
        self.binder = Binder()
        self.reader = reader_over(ranges_of(sizes, query_offset, key_offset), self.binder.params)

    def of_mask(self, mask: Mask) -> tuple[bool, bool]:
        if isinstance(mask, AllOf | AnyOf):
            join = all if isinstance(mask, AllOf) else any
            told = [self.of_mask(x) for x in mask.masks]
            return join(certain for certain, _ in told), join(possible for _, possible in told)
        if isinstance(mask, Not):
            certain, possible = self.of_mask(mask.mask)
            return not possible, not certain
        if mask.tile is not None:
            return self._of_tile(mask)
        p = self.binder.bind(mask.arguments(self.sizes))
        return self._of_formula(lift(mask.allowed(*mask._at(SYMBOLS), p)))

    def excludes(self, modifier: Modifier) -> bool:
        """Whether a modifier excludes every key from every query."""
        formula = modifier.exclusion(SYMBOLS, self.sizes, self.binder)
        return formula is not None and self._of_formula(formula)[0]

    def _of_formula(self, formula: Node) -> tuple[bool, bool]:
        certain, possible = (evaluate(x, {}, self.binder.params) for x in known(self.reader.bounds(formula)))
        return bool(certain), bool(possible)

    def _of_tile(self, mask: Mask) -> tuple[bool, bool]:
        """Ask a mask that tells of tiles itself, for each sequence and head."""
        b, h = np.arange(self.sizes.B)[:, None], np.arange(self.sizes.H)
        ends: list[Any] = []
        for offset, length in zip(self.offsets, (self.sizes.M, self.sizes.N), strict=True):
            first = np.reshape(offset, (-1, 1)) if mask.positional else np.zeros((1, 1), int)
            ends += [first, first + length]
        told = np.asarray(mask.tile(b, h, *ends, mask.arguments(self.sizes)))  # type: ignore[misc]
        return bool((told == ALL).all()), bool((told > NONE).any())

"""Blocks of a call: what its rules are for some of its sequences, heads, queries and keys.

What a rule holds for each sequence, head, query or key is cut to the block; what it says of positions stays, for a
block is computed with the offsets that its rows have in the whole. So the results of blocks of keys, merged, are those
of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np

from attn_numba.rules.adaptive import AdaptiveSpan
from attn_numba.rules.base import AllOf, AnyOf, Dense, Not
from attn_numba.rules.data import AnyArray
from attn_numba.rules.dropout import Dropout, DropoutPart
from attn_numba.rules.formula import Param
from attn_numba.rules.masks import (
    OPEN,
    BlockSparse,
    Causal,
    CustomMask,
    Neighborhood,
    Padding,
    PrefixLM,
    SameDocument,
    SlidingWindow,
)
from attn_numba.rules.modifiers import ALiBi, Bias, CustomModifier, Modifier, ReplaceExcluded, SoftCap, Temperature
from attn_numba.rules.normalizers import DoubleSoftmax, Entmax15, Softmax, Sparsemax
from attn_numba.rules.places import Sizes
from attn_numba.rules.scores import Additive, Bilinear, Cosine, Dot

__all__ = ["Block", "learned_place", "offset_of", "part_of"]


class Block(NamedTuple):
    """Where a block lies in a call: slices of sequences, query heads, key heads, queries and keys, with both ends."""

    b: slice
    h: slice
    hk: slice
    i: slice
    j: slice

    @classmethod
    def of_rows(cls, rows: tuple[int, int], keys: tuple[int, int], whole: Sizes) -> Block:
        """Return the block of some queries and some keys, each given by its first and its end, in all heads."""
        b, h, hk = (slice(0, n) for n in whole[:3])
        return cls(b, h, hk, slice(*rows), slice(*keys))

    @property
    def shape(self) -> tuple[int, ...]:
        """How many there are of each."""
        return tuple(x.stop - x.start for x in self)

    def sizes(self, whole: Sizes) -> Sizes:
        """Return the sizes of the block's call."""
        B, H, Hk, M, N = self.shape
        return Sizes(B, H, Hk, M, N, whole.D, whole.E)


def offset_of(offset: int | AnyArray, sequences: slice, rows: slice) -> int | AnyArray:
    """Return the position of the first of some rows, for some of the sequences."""
    first: int = rows.start
    return offset + first if isinstance(offset, int) else offset[sequences] + first


@singledispatch
def part_of(rule: Any, block: Block, sizes: Sizes) -> Any:
    """Return what a rule of a call is in one of its blocks.

    Parameters
    ----------
    rule : Mask, Modifier, Score, Normalizer or Dropout
        Of the whole call, and known to fit it.
    block : Block
        Where the block lies.
    sizes : Sizes
        Of the whole call.

    Returns
    -------
    rule of the same kind
        The very same object where nothing of it depends on the block. Arrays are views of the rule's own.

    Raises
    ------
    NotImplementedError
        If it is a rule of another class than those of this package, and not one of positions alone in a block of all
        sequences and heads: nobody knows what of it belongs to the block.
    """
    if getattr(rule, "positional", False) and block.shape[:2] == sizes[:2]:
        return rule
    raise NotImplementedError(
        f"{type(rule).__name__} cannot be cut into blocks; needed a rule of attn_numba, CustomMask and CustomModifier "
        "among them, or one of positions where sequences and heads are not cut"
    )


@part_of.register(Causal)
@part_of.register(SlidingWindow)
@part_of.register(Neighborhood)
@part_of.register(SoftCap)
@part_of.register(Dot)
@part_of.register(Cosine)
@part_of.register(Sparsemax)
@part_of.register(Entmax15)
@part_of.register(DoubleSoftmax)
def _of_no_place(rule: Any, block: Block, sizes: Sizes) -> Any:
    """Return a rule that holds nothing for any sequence, head, query or key."""
    return rule


@part_of.register(AllOf)
@part_of.register(AnyOf)
def _of_joined(rule: Any, block: Block, sizes: Sizes) -> Any:
    parts = tuple(part_of(mask, block, sizes) for mask in rule.masks)
    return rule if all(a is b for a, b in zip(parts, rule.masks, strict=True)) else type(rule)(parts)


@part_of.register(Not)
@part_of.register(ReplaceExcluded)
def _of_holder(rule: Any, block: Block, sizes: Sizes) -> Any:
    part = part_of(rule.mask, block, sizes)
    return rule if part is rule.mask else _with(rule, mask=part)


@part_of.register(Dense)
@part_of.register(Bias)
def _of_array(rule: Any, block: Block, sizes: Sizes) -> Any:
    return _with(rule, array=_cut(rule.array, block.b, block.h, block.i, block.j))


@part_of.register(ALiBi)
def _of_slopes(rule: ALiBi, block: Block, sizes: Sizes) -> Any:
    return _with(rule, slopes=_cut(rule.slopes, block.h))


@part_of.register(Temperature)
def _of_temperature(rule: Temperature, block: Block, sizes: Sizes) -> Any:
    return _with(rule, t=_cut(rule.t, block.b, block.h, block.i))


@part_of.register(AdaptiveSpan)
def _of_span(rule: AdaptiveSpan, block: Block, sizes: Sizes) -> Any:
    places = (block.b, block.h, block.i)
    reaches: tuple[AnyArray, ...] = rule._reaches  # type: ignore[attr-defined]
    return _with(rule, span=_cut(rule.span, *places), _reaches=tuple(_cut(x, *places) for x in reaches))


@part_of.register(PrefixLM)
def _of_prefix(rule: PrefixLM, block: Block, sizes: Sizes) -> Any:
    return _with(rule, prefix_lengths=_cut(rule.prefix_lengths, block.b))


@part_of.register(Padding)
def _of_padding(rule: Padding, block: Block, sizes: Sizes) -> Any:
    starts, ends, rows = (
        None if x is None else _shifted(_cut(x, block.b), by)
        for x, by in (
            (rule.key_starts, block.j.start),
            (rule.key_lengths, block.j.start),
            (rule.query_lengths, block.i.start),
        )
    )
    return _with(rule, key_starts=starts, key_lengths=ends, query_lengths=rows)


def _shifted(rows: AnyArray, by: int) -> AnyArray:
    """Return rows counted from another one, and what lies beyond every row brought near, where it fits 32 bits."""
    return np.asarray(np.clip(rows.astype(np.int64) - by, -OPEN, OPEN), np.int32)


@part_of.register(SameDocument)
def _of_documents(rule: SameDocument, block: Block, sizes: Sizes) -> Any:
    queries, keys = map(np.asarray, rule.arguments(sizes))
    return _with(rule, query_ids=queries[block.b, block.i], key_ids=keys[block.b, block.j])


@part_of.register(BlockSparse)
def _of_tiles(rule: BlockSparse, block: Block, sizes: Sizes) -> Any:
    own: tuple[int, ...] = getattr(rule, "first", (0, 0))
    first, tiles = [0, 0], [slice(None), slice(None)]
    for axis, rows in enumerate((block.i, block.j)):
        if rule.blocks.shape[2 + axis] > 1:
            step, start = rule.tile_size[axis], own[axis] + rows.start
            top = start // step
            tiles[axis] = slice(top, max(top + 1, -(-(own[axis] + rows.stop) // step)))
            first[axis] = start - top * step
    edges = [x if x.stop is None else slice(x.start, x.stop + 1) for x in tiles]
    counts: AnyArray = rule._counts  # type: ignore[attr-defined]
    return _with(
        rule, BlockSparsePart if any(first) else BlockSparse, first=(first[0], first[1]),
        blocks=_cut(rule.blocks, block.b, block.h, *tiles), _counts=_cut(counts, block.b, block.h, *edges),
    )  # fmt: skip


class BlockSparsePart(BlockSparse):
    """`BlockSparse` of a block whose first query or key lies inside a tile, `first` rows and keys from its begin."""

    first: tuple[int, int]

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        lengths = (n + first if n else 0 for n, first in zip((sizes.M, sizes.N), self.first, strict=True))
        return (*super().arguments(sizes._replace(**dict(zip("MN", lengths, strict=True)))), *self.first)

    @staticmethod
    def allowed(b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return BlockSparse.allowed(b, h, i + p[4], j + p[5], p)

    @staticmethod
    def tile(b: Any, h: Any, i0: Any, i1: Any, j0: Any, j1: Any, p: Any) -> Any:
        return BlockSparse.tile(b, h, i0 + p[4], i1 + p[4], j0 + p[5], j1 + p[5], p)


@part_of.register(CustomMask)
@part_of.register(CustomModifier)
def _of_function(rule: Any, block: Block, sizes: Sizes) -> Any:
    if block.b.start == block.h.start == 0:
        return rule
    first = 1 if isinstance(rule, CustomModifier) else 0  # of its arguments, b; the score comes before it
    name, other = ("apply", "slope") if first else ("allowed", "tile")
    function, also = getattr(rule, name), getattr(rule, other)
    params = (*rule.params, block.b.start, block.h.start)
    return type(rule)(_Moved(function, first), params, also if also is None else _Moved(also, first))


@dataclass(frozen=True)
class _Moved:
    """A function of a rule that is given the sequence and the head of the whole; its last two parameters say where.

    A class, not a function within one, so that it can be sent to another process.
    """

    function: Any
    first: int

    def __call__(self, *arguments: Any) -> Any:
        *places, p = arguments
        places[self.first] += p[-2]
        places[self.first + 1] += p[-1]
        return self.function(*places, p[:-2])


@part_of.register(Bilinear)
def _of_bilinear(rule: Bilinear, block: Block, sizes: Sizes) -> Any:
    return rule if rule.W.ndim == 2 else _with(rule, W=rule.W[block.h])


@part_of.register(Additive)
def _of_additive(rule: Additive, block: Block, sizes: Sizes) -> Any:
    heads = {"Wq": (block.h, 3), "Wk": (block.hk, 3), "w": (block.h, 2)}
    arrays = {name: getattr(rule, name) for name in heads}
    return _with(rule, **{n: x[heads[n][0]] if x.ndim == heads[n][1] else x for n, x in arrays.items()})


@part_of.register(Softmax)
def _of_softmax(rule: Softmax, block: Block, sizes: Sizes) -> Any:
    return rule if rule.sink is None else _with(rule, sink=_cut(rule.sink, block.b, block.h))


@part_of.register(Dropout)
def _of_dropout(rule: Dropout, block: Block, sizes: Sizes) -> Any:
    first_b, first_h = rule.first
    seed = rule.seed[block.b] if rule.by_sequence else rule.seed
    return DropoutPart(rule.rate, seed, first_b + block.b.start, first_h + block.h.start)


def learned_place(modifier: Modifier, block: Block) -> tuple[slice, ...]:
    """Return where the gradient by the array of a modifier's part belongs in that by the whole array."""
    assert modifier.learned is not None
    name, axes = modifier.learned
    along = {"B": block.b, "H": block.h, "M": block.i, "N": block.j}
    return _taken(np.shape(getattr(modifier, name)), [along[axis] for axis in axes])


def _cut(array: AnyArray, *places: slice) -> AnyArray:
    """Return a part of an array that broadcasts along the axes it lacks or has with size 1."""
    taken = _taken(array.shape, places)
    return array[taken] if taken else array


def _taken(shape: Sequence[int], places: Sequence[slice]) -> tuple[slice, ...]:
    own = places[len(places) - len(shape) :]
    return tuple(place if size > 1 else slice(None) for size, place in zip(shape, own, strict=True))


def _with(rule: Any, kind: Any = None, **fields: Any) -> Any:
    """Return a rule with other fields, which are parts of its own and so need no check and no copy."""
    made = object.__new__(kind or type(rule))
    made.__dict__.update(rule.__dict__ | fields)
    return made

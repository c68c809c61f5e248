"""Blocks of a call: what its rules are for some of its sequences, heads, queries and keys, and which blocks are empty.

What a rule holds for each sequence, head, query or key is cut to the block; what it says of positions stays, for a
block is computed with the offsets that its rows have in the whole. So the results of blocks of keys, merged, are those
of the whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np

from attn_numba.rules.adaptive import AdaptiveSpan
from attn_numba.rules.base import AllOf, AnyOf, Dense, Mask, Not, ranges_of
from attn_numba.rules.data import AnyArray
from attn_numba.rules.dropout import Dropout, DropoutPart
from attn_numba.rules.formula import Binder, Node, evaluate, lift
from attn_numba.rules.interval import known, reader_over
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
from attn_numba.rules.places import SYMBOLS, Sizes
from attn_numba.rules.scores import Additive, Bilinear, Cosine, Dot

__all__ = ["ALL", "NONE", "SOME", "Block", "answer", "offset_of", "part_of"]

NONE, SOME, ALL = 0, 1, 2  # of the pairs of a block, as tiles of a mask are told of


class Block(NamedTuple):
    """Where a block lies in a call: slices of sequences, query heads, key heads, queries and keys, with both ends."""

    b: slice
    h: slice
    hk: slice
    i: slice
    j: slice

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
        If it is a rule of another class than those of this package: nobody knows what of it belongs to a block.
    """
    raise NotImplementedError(
        f"{type(rule).__name__} cannot be cut into blocks; needed a rule of attn_numba, CustomMask and CustomModifier "
        "among them"
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
    tiles, size = _cut(rule.blocks, block.b, block.h, slice(None), slice(None)), []
    for axis, rows in ((2, block.i), (3, block.j)):
        step = rule.tile_size[axis - 2]
        size.append(math.gcd(step, rows.start))  # with which a tile begins where the block does
        if tiles.shape[axis] > 1:
            tiles = tiles.take(np.arange(rows.start, max(rows.stop, rows.start + 1), size[-1]) // step, axis)
    return BlockSparse(tiles, tuple(size))


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


def _cut(array: AnyArray, *places: slice) -> AnyArray:
    """Return a part of an array that broadcasts along the axes it lacks or has with size 1."""
    places = places[len(places) - array.ndim :]
    taken = tuple(place if size > 1 else slice(None) for size, place in zip(array.shape, places, strict=True))
    return array[taken] if taken else array


def _with(rule: Any, **fields: Any) -> Any:
    """Return a rule with other fields, which are parts of its own and so need no check and no copy."""
    made = object.__new__(type(rule))
    made.__dict__.update(rule.__dict__ | fields)
    return made


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

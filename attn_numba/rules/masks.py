"""Masks: which keys a query may attend to.

In the formulas below `i` and `j` are positions for the rules marked positional and rows of q and of k for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attn_numba.rules.base import AllOf, AnyOf, Dense, Mask, Not, as_mask
from attn_numba.rules.data import (
    AnyArray,
    as_array,
    custom_params,
    fitted,
    frozen,
    integers,
    require_function,
    require_kind,
    whole_number,
)
from attn_numba.rules.formula import Binder, Node, Param, lift
from attn_numba.rules.places import SYMBOLS, Sizes

__all__ = [
    "AllOf",
    "AnyOf",
    "BlockSparse",
    "Causal",
    "CustomMask",
    "Dense",
    "Mask",
    "Neighborhood",
    "Not",
    "Padding",
    "PrefixLM",
    "SameDocument",
    "SlidingWindow",
    "as_mask",
]

OPEN = 2**30  # a side without end: no position reaches it


@dataclass(frozen=True, eq=False)
class Causal(Mask):
    """Allow keys up to the query's own position: ``j <= i``. Positional.

    References
    ----------
    A. Vaswani et al. (2017), "Attention is all you need", section 3.2.3.

    Examples
    --------
    >>> Causal() & SlidingWindow(2, 0)
    AllOf(Causal(), SlidingWindow(left=2, right=0))
    """

    positional: ClassVar[bool] = True

    @staticmethod
    def allowed(b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return j <= i


@dataclass(frozen=True, eq=False)
class SlidingWindow(Mask):
    """Allow keys within a window around the query: ``i - left <= j <= i + right``. Positional.

    Parameters
    ----------
    left, right : int
        Positions, both ends included; -1 leaves a side open.

    Raises
    ------
    TypeError
        If one is not an integer.
    ValueError
        If one is below -1.

    References
    ----------
    I. Beltagy, M. E. Peters and A. Cohan (2020), "Longformer: the long-document transformer", section 3.1.
    """

    left: int
    right: int
    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            width = whole_number("SlidingWindow", name, getattr(self, name))
            if width < -1:
                raise ValueError(f"SlidingWindow: {name} is {width}; needed at least 0, or -1 for an open side")
            object.__setattr__(self, name, width)

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return tuple(OPEN if width < 0 else min(width, OPEN) for width in (self.left, self.right))

    @staticmethod
    def allowed(b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return (i - p[0] <= j) & (j <= i + p[1])


@dataclass(frozen=True, eq=False)
class Padding(Mask):
    """Allow the keys, and optionally the queries, that a padded sequence really has.

    ``key_starts[b] <= j < key_lengths[b]`` and ``i < query_lengths[b]``; `i` and `j` are rows.

    Parameters
    ----------
    key_lengths : int or int array (B,)
        End of the keys of each sequence, in rows of k.
    key_starts : int or int array (B,), optional
        First key of each sequence, in rows of k.
    query_lengths : int or int array (B,), optional
        Number of queries of each sequence; without it every query counts.

    Raises
    ------
    TypeError
        If these are not integers.
    ValueError
        If they do not fit the number of sequences.

    References
    ----------
    The padding mask of A. Vaswani et al. (2017), "Attention is all you need", as lengths.
    """

    key_lengths: Any
    key_starts: Any = 0
    query_lengths: Any = None

    def __post_init__(self) -> None:
        for name in ("key_lengths", "key_starts", "query_lengths"):
            given = getattr(self, name)
            if given is not None or name != "query_lengths":
                object.__setattr__(self, name, integers("Padding", name, given, 1))

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        lengths = np.asarray(OPEN, np.int32) if self.query_lengths is None else self.query_lengths
        return (
            fitted("Padding", "key_starts", self.key_starts, "B", sizes),
            fitted("Padding", "key_lengths", self.key_lengths, "B", sizes),
            fitted("Padding", "query_lengths", lengths, "B", sizes),
        )

    @staticmethod
    def allowed(b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return (p[0][b] <= j) & (j < p[1][b]) & (i < p[2][b])


@dataclass(frozen=True, eq=False)
class PrefixLM(Mask):
    """Allow a prefix to everyone and the rest causally: ``j <= i`` or ``j < prefix_lengths[b]``. Positional.

    Parameters
    ----------
    prefix_lengths : int or int array (B,)
        End of the prefix of each sequence, a position.

    Raises
    ------
    TypeError
        If these are not integers.
    ValueError
        If they do not fit the number of sequences.

    References
    ----------
    C. Raffel et al. (2020), "Exploring the limits of transfer learning with a unified text-to-text transformer",
    section 3.2.1 ("causal with prefix").
    """

    prefix_lengths: Any
    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "prefix_lengths", integers("PrefixLM", "prefix_lengths", self.prefix_lengths, 1))

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return (fitted("PrefixLM", "prefix_lengths", self.prefix_lengths, "B", sizes),)

    @staticmethod
    def allowed(b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return (j <= i) | (j < p[0][b])


@dataclass(frozen=True, eq=False)
class SameDocument(Mask):
    """Allow keys of the query's own document: ``query_ids[b, i] == key_ids[b, j]``; `i` and `j` are rows.

    Tiles are skipped where the ranges of the ids do not meet, so documents should lie together, as packed ones do.

    Parameters
    ----------
    query_ids : int array, broadcasts to (B, M)
        Document of each query.
    key_ids : int array, broadcasts to (B, N), optional
        Document of each key; without it, that of the query of the same row.

    Raises
    ------
    TypeError
        If the ids are not integers.
    ValueError
        If they do not fit the call.

    References
    ----------
    M. M. Krell et al. (2021), "Efficient sequence packing without cross-contamination", section 3.2.

    Examples
    --------
    >>> packed = Causal() & SameDocument([0, 0, 0, 1, 1])
    """

    query_ids: Any
    key_ids: Any = None

    def __post_init__(self) -> None:
        given = [as_array(self.query_ids, "SameDocument", "query_ids")]
        if self.key_ids is not None:
            given.append(as_array(self.key_ids, "SameDocument", "key_ids"))
        ids = _ranked(given)
        object.__setattr__(self, "query_ids", integers("SameDocument", "query_ids", ids[0], 2))
        if self.key_ids is not None:
            object.__setattr__(self, "key_ids", integers("SameDocument", "key_ids", ids[1], 2))

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        queries = fitted("SameDocument", "query_ids", self.query_ids, "BM", sizes)
        if self.key_ids is None:
            return queries, fitted("SameDocument", "query_ids, for keys too,", self.query_ids, "BN", sizes)
        return queries, fitted("SameDocument", "key_ids", self.key_ids, "BN", sizes)

    @staticmethod
    def allowed(b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return p[0][b, i] == p[1][b, j]


def _ranked(ids: list[AnyArray]) -> list[AnyArray]:
    """Ids beyond 32 bits by their rank among all of them: only their equality matters."""
    if all(x.dtype.kind in "iu" for x in ids) and any(x.size and not -OPEN < x.min() <= x.max() < OPEN for x in ids):
        known = np.unique(np.concatenate([x.ravel() for x in ids]))
        return [np.searchsorted(known, x) for x in ids]
    return ids


@dataclass(frozen=True, eq=False)
class BlockSparse(Mask):
    """Allow whole blocks of rows and keys: ``blocks[b, h, i // tile[0], j // tile[1]]``; `i` and `j` are rows.

    Parameters
    ----------
    blocks : bool array, broadcasts to (B, H, ceil(M / tile[0]), ceil(N / tile[1]))
        True where the block is allowed.
    tile : int or (int, int)
        Rows and keys of a block.

    Raises
    ------
    TypeError
        If `blocks` is not boolean or `tile` not of integers.
    ValueError
        If a block is empty or `blocks` does not fit the call.

    References
    ----------
    R. Child et al. (2019), "Generating long sequences with sparse transformers", section 5.4 (block-sparse kernels).
    Counting the allowed blocks of a tile: F. C. Crow (1984), "Summed-area tables for texture mapping".
    """

    blocks: AnyArray
    tile_size: tuple[int, int]

    def __init__(self, blocks: Any, tile: Any) -> None:
        array = as_array(blocks, "BlockSparse", "blocks")
        if array.dtype != np.bool_:
            raise TypeError(f"BlockSparse: blocks has dtype {array.dtype}; needed a boolean array, True = allowed")
        if not 2 <= array.ndim <= 4:
            raise ValueError(f"BlockSparse: blocks has shape {array.shape}; needed 2 to 4 axes")
        pair = tile if isinstance(tile, (tuple, list)) else (tile, tile)
        if len(pair) != 2:
            raise ValueError(f"BlockSparse: tile is {tile}; needed one integer or two")
        size = tuple(whole_number("BlockSparse", "tile", x) for x in pair)
        if min(size) < 1:
            raise ValueError(f"BlockSparse: tile is {tile}; needed at least 1")
        object.__setattr__(self, "blocks", frozen(array.reshape((1,) * (4 - array.ndim) + array.shape)))
        object.__setattr__(self, "tile_size", size)
        object.__setattr__(self, "_counts", _summed_area(self.blocks))

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        shape = [sizes.B, sizes.H]
        steps = []
        for length, count, step in zip((sizes.M, sizes.N), self.blocks.shape[2:], self.tile_size, strict=True):
            needed = -(-length // step)
            shape.append(count if count == 1 or needed == 0 else needed)
            steps.append(OPEN if count == 1 else step)  # one block for all: a block without end
        blocks, counts = self.blocks, self._counts  # type: ignore[attr-defined]
        try:
            blocks = np.broadcast_to(blocks, shape)
        except ValueError:
            needed_shape = (sizes.B, sizes.H, -(-sizes.M // self.tile_size[0]), -(-sizes.N // self.tile_size[1]))
            raise ValueError(
                f"BlockSparse: blocks has shape {self.blocks.shape}; needed one that broadcasts to {needed_shape}, "
                f"(B, H, M, N) in tiles of {self.tile_size}"
            ) from None
        return (blocks, np.broadcast_to(counts, (*shape[:2], *counts.shape[2:])), *steps)

    @staticmethod
    def allowed(b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        return p[0][b, h, i // p[2], j // p[3]]

    @staticmethod
    def tile(b: Any, h: Any, i0: Any, i1: Any, j0: Any, j1: Any, p: Any) -> Any:
        top, left = i0 // p[2], j0 // p[3]
        bottom, right = (i1 - 1) // p[2] + 1, (j1 - 1) // p[3] + 1
        c = p[1]
        count = c[b, h, bottom, right] - c[b, h, top, right] - c[b, h, bottom, left] + c[b, h, top, left]
        return (count > 0) * 1 + (count == (bottom - top) * (right - left)) * 1


def _summed_area(blocks: AnyArray) -> AnyArray:
    """How many of ``blocks[..., :r, :c]`` are True, for every r and c: int32 (..., R + 1, C + 1)."""
    rows, columns = blocks.shape[-2:]
    counts = np.zeros((*blocks.shape[:-2], rows + 1, columns + 1), np.int32)
    counts[..., 1:, 1:] = blocks.cumsum(-2, dtype=np.int32).cumsum(-1, dtype=np.int32)
    counts.flags.writeable = False
    return counts


@dataclass(frozen=True, eq=False)
class Neighborhood(Mask):
    """Allow the `size` nearest keys along each axis of a grid; at a border the window is shifted, not cut. Positional.

    Positions count the places of the grid with the last axis fastest. Along one axis of length L, the window of
    coordinate c starts at ``clip(c - size // 2, 0, L - size)``. With dilation d the coordinates of the same remainder
    by d form a grid of their own, and the rule holds within it.

    Parameters
    ----------
    shape : int or 1 to 3 ints
        Lengths of the axes of the grid.
    size : int or one int for each axis
        Keys each query sees along an axis.
    dilation : int or one int for each axis, optional
        Distance of neighbors, in places of the grid.

    Raises
    ------
    TypeError
        If these are not integers.
    ValueError
        If there are not 1 to 3 axes, a window does not fit its axis (``size * dilation`` exceeds the length), or, in
        a call, a position is not in the grid.

    References
    ----------
    A. Hassani et al. (2023), "Neighborhood attention transformer", section 3.1; dilation: A. Hassani and H. Shi
    (2022), "Dilated neighborhood attention transformer", section 3; even sizes as in the authors' NATTEN: one more
    key before than after.

    Examples
    --------
    >>> Neighborhood((8, 8), 3)
    Neighborhood(shape=(8, 8), size=(3, 3), dilation=(1, 1))
    """

    shape: Any
    size: Any
    dilation: Any = 1
    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        given = self.shape if isinstance(self.shape, (tuple, list, np.ndarray)) else (self.shape,)
        shape = tuple(whole_number("Neighborhood", "shape", x) for x in given)
        if not 1 <= len(shape) <= 3:
            raise ValueError(f"Neighborhood: shape is {shape}; needed 1 to 3 axes")
        object.__setattr__(self, "shape", shape)
        for name in ("size", "dilation"):
            value = getattr(self, name)
            values = value if isinstance(value, (tuple, list, np.ndarray)) else (value,) * len(shape)
            values = tuple(whole_number("Neighborhood", name, x) for x in values)
            if len(values) != len(shape):
                raise ValueError(
                    f"Neighborhood: {name} is {values}; needed one integer, or one for each axis of {shape}"
                )
            if min(values) < 1:
                raise ValueError(f"Neighborhood: {name} is {values}; needed at least 1")
            object.__setattr__(self, name, values)
        for length, size, dilation in zip(self.shape, self.size, self.dilation, strict=True):
            if size * dilation > length:
                raise ValueError(
                    f"Neighborhood: size {size} with dilation {dilation} spans more than an axis of length {length}"
                )

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return (*self.shape, *self.size, *self.dilation)

    def allowed(self, b: Any, h: Any, i: Any, j: Any, p: Any) -> Any:
        """Return whether key position j is a neighbor of query position i; whether an axis is dilated is structure."""
        axes = len(self.shape)
        result = None
        for axis in reversed(range(axes)):
            length, size, dilation = p[axis], p[axis + axes], p[axis + 2 * axes]
            x, y = (i % length, j % length) if axis else (i, j)
            i, j = i // length, j // length
            neighbors = None
            if self.dilation[axis] > 1:
                group = x % dilation
                neighbors = y % dilation == group
                x, y, length = x // dilation, y // dilation, (length - group + dilation - 1) // dilation
            start = np.maximum(np.minimum(x - size // 2, length - size), 0)
            within = (start <= y) & (y < start + size)
            within = within if neighbors is None else within & neighbors
            result = within if result is None else result & within
        return result

    @property
    def run_count(self) -> int:
        """Rows of the grid that a query's neighbors lie in; 0 unless they lie there side by side, and are few."""
        if len(self.shape) == 1 or self.dilation[-1] > 1 or 3 * self.size[-1] > self.shape[-1]:
            return 0
        return int(np.prod(self.size[:-1]))

    def run(self, b: Any, h: Any, i: Any, n: Any, p: Any) -> tuple[Any, Any]:
        """Return first and end of the neighbors of query position i in row n of its window."""
        axes = len(self.shape)
        at, step = 0, 1
        for axis in reversed(range(axes)):
            length, size, dilation = p[axis], p[axis + axes], p[axis + 2 * axes]
            x = i % length if axis else i
            i = i // length
            group = 0
            if self.dilation[axis] > 1:
                group, x = x % dilation, x // dilation
                y = np.maximum(np.minimum(x - size // 2, (length - group + dilation - 1) // dilation - size), 0)
            else:
                y = np.maximum(np.minimum(x - size // 2, length - size), 0)
            if axis == 0:
                y = y + n
            elif axis < axes - 1:
                y, n = y + n % size, n // size
            at = at + step * (group + y * dilation)
            step = step * length
        return at, at + p[2 * axes - 1]

    def _check_places(self, ranges: dict[str, tuple[int, int]]) -> None:
        count = int(np.prod(self.shape))
        for name, (first, last) in (("query", ranges["i"]), ("key", ranges["j"])):
            if first < 0 or last >= count:
                raise ValueError(
                    f"Neighborhood: {name} positions go from {first} to {last}; grid {self.shape} has 0 to {count - 1}"
                )


@dataclass(frozen=True, eq=False)
class CustomMask(Mask):
    """Allow what a plain Python function says. Positional.

    The function is called once with symbols, here, and its formula compiled; so it may not branch. It may use
    operators, indexing into `p`, and NumPy's ``exp log tanh sqrt abs minimum maximum``; ``&``, ``|``, ``~`` in place
    of ``and``, ``or``, ``not``. Integers are 32-bit.

    Parameters
    ----------
    allowed : function ``(b, h, i, j, p) -> bool``
        Whether query position `i` may attend to key position `j` in sequence `b` and query head `h`.
    params : tuple of numbers and arrays, optional
        What `p` holds: a number is used as ``p[n]``, an array as ``p[n][b, j]``, one index for each axis. Numbers and
        arrays given here may change from call to call at no cost; numbers written in the function are constants of
        the compiled formula.
    tile : function ``(b, h, i0, i1, j0, j1, p) -> int``, optional
        What is known of the tile of positions ``i0 <= i < i1``, ``j0 <= j < j1``: 0 if it allows none, 2 if it allows
        all, 1 otherwise. Without it this is worked out from `allowed`. It is trusted.

    Raises
    ------
    TypeError
        If the function branches, uses what a rule may not use, or does not return a truth value.
    ValueError
        In a call, if an index can leave its array.

    Examples
    --------
    >>> blocks = CustomMask(lambda b, h, i, j, p: i // p[0] == j // p[0], params=(64,))
    >>> CustomMask(lambda b, h, i, j, p: j < i and j > 3)
    Traceback (most recent call last):
    TypeError: a rule may not branch: use & | ~ and numpy.minimum, not if, and, or, not, min

    References
    ----------
    Ours; the idea of a mask as a function of indices is that of J. Dong et al. (2024), "Flex attention".
    """

    allowed: Callable[..., Any]
    params: tuple[Any, ...] = ()
    tile: Callable[..., Any] | None = None
    positional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_function("CustomMask", "allowed", self.allowed)
        object.__setattr__(self, "params", custom_params("CustomMask", self.params))
        p = Binder().bind(self.params)
        require_kind("CustomMask", "allowed", self.allowed(*self._at(SYMBOLS), p), ("bool",))
        if self.tile is not None:
            require_function("CustomMask", "tile", self.tile)
            require_kind("CustomMask", "tile", self.tile(SYMBOLS.b, SYMBOLS.h, *self._tile_symbols(), p), ("int",))

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        return self.params

    def _formulas(self, p: tuple[Any, ...]) -> Iterator[Node]:
        yield lift(self.allowed(*self._at(SYMBOLS), p))
        if self.tile is not None:
            yield lift(self.tile(SYMBOLS.b, SYMBOLS.h, *self._tile_symbols(), p))

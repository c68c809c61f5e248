"""The pages of a cache: memory that grows without being moved, and who holds which page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from attn_numba.rules.data import AnyArray
from attn_numba.rules.storage import Pair

__all__ = ["PARTS", "Pool"]

PARTS = ("keys", "values")
LINE = 64  # bytes of a cache line, with which rows of usual sizes begin
GROWTH = 2  # a pool grows by its pages over this, or by what is needed if that is more


class Pool:
    """Pages of one size, each held by any number of sequences.

    A page is a number; its arrays lie in one of some segments, which stay where they are when the pool grows.

    Parameters
    ----------
    key_heads : int
        Heads of a page.
    page : int
        Tokens of a page.
    sizes : tuple of int
        Numbers of a key and of a value.
    codes : Pair
        How they are stored.
    limit : int or None
        Most pages that there may ever be.

    Attributes
    ----------
    holders : int array (pages,)
        How many sequences hold each page; 0 of free ones.
    wipes : bool
        Whether free pages are filled with NaN, to show in tests that nobody reads them.
    """

    wipes = False

    def __init__(self, key_heads: int, page: int, sizes: tuple[int, int], codes: Pair, limit: int | None) -> None:
        self.page, self.limit = page, limit
        self._parts = {
            name: ((key_heads, page, code.width(size)), code.stored)
            for name, code, size in zip(PARTS, codes, sizes, strict=True)
        }
        self._segments: list[dict[str, AnyArray]] = []
        self._place = np.zeros((0, 2), np.int64)  # of each page: its segment, and its number there
        self._free: list[int] = []
        self.holders = np.zeros(0, np.int64)
        self.addresses: dict[str, AnyArray] = {name: np.zeros(0, np.uint64) for name in PARTS}

    def __len__(self) -> int:
        return len(self._place)

    @property
    def free(self) -> int | None:
        """How many pages can still be had; None where there is no limit."""
        return None if self.limit is None else self.limit - len(self) + len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of all pages."""
        return sum(array.nbytes for segment in self._segments for array in segment.values())

    def part(self, name: str, page: int) -> AnyArray:
        """Return the keys or the values of a page, (heads, page, width); to be read and written."""
        segment, number = self._place[page].tolist()
        return self._segments[segment][name][number]

    def write(self, pages: AnyArray, slots: AnyArray, rows: Mapping[str, AnyArray]) -> None:
        """Write one token each into slots of pages: arrays (tokens, heads, ...) for keys and values."""
        segments, numbers = self._place[pages].T
        of_tokens = dict.fromkeys(segments.tolist())
        for s in of_tokens:
            here = slice(None) if len(of_tokens) == 1 else np.flatnonzero(segments == s)
            for name, x in rows.items():
                self._segments[s][name][numbers[here], :, slots[here]] = x[here]

    def stored(self, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Return shape and dtype of the keys or the values of a page."""
        return self._parts[name]

    def reserve(self, count: int) -> None:
        """See to it that so many pages can be taken.

        Raises
        ------
        MemoryError
            If there are not so many, before anything has changed.
        """
        missing = count - len(self._free)
        if missing <= 0:
            return
        if self.limit is not None and len(self) + missing > self.limit:
            raise MemoryError(f"{count} pages of {self.page} tokens are needed; {self.free} of {self.limit} are free")
        wanted = max(missing, len(self) // GROWTH)
        self._grow(wanted if self.limit is None else min(wanted, self.limit - len(self)))

    def take(self) -> int:
        """Return a free page, held once from now on; `reserve` has seen to it that there is one."""
        page = self._free.pop()
        self.holders[page] = 1
        return page

    def hold(self, pages: AnyArray) -> None:
        """Note one holder more of each page, as often as it is named."""
        np.add.at(self.holders, pages, 1)

    def release(self, pages: AnyArray) -> None:
        """Note one holder less of each page, as often as it is named; without one it is free."""
        np.subtract.at(self.holders, pages, 1)
        freed = [page for page in dict.fromkeys(pages.tolist()) if not self.holders[page]]
        self._free.extend(reversed(freed))
        if self.wipes:
            self._wipe(freed)

    def copy(self, page: int) -> int:
        """Return a new page with the contents of another one, of which it takes over one holder."""
        new = self.take()
        for name in PARTS:
            self.part(name, new)[...] = self.part(name, page)
        self.holders[page] -= 1
        return new

    def _grow(self, count: int) -> None:
        segment = {name: _aligned((count, *shape), dtype) for name, (shape, dtype) in self._parts.items()}
        first = len(self)
        self._segments.append(segment)
        new = np.stack([np.full(count, len(self._segments) - 1), np.arange(count)], axis=1)
        self._place = np.concatenate([self._place, new])
        self.holders = np.concatenate([self.holders, np.zeros(count, np.int64)])
        self._free[:0] = range(first + count - 1, first - 1, -1)
        self._note_addresses(segment)
        if self.wipes:
            self._wipe(range(first, first + count))

    def _note_addresses(self, segment: dict[str, AnyArray]) -> None:
        for name, array in segment.items():
            offsets = np.arange(len(array), dtype=np.uint64) * np.uint64(array.strides[0])
            self.addresses[name] = np.concatenate([self.addresses[name], np.uint64(array.ctypes.data) + offsets])

    def _wipe(self, pages: Iterable[int]) -> None:
        for page in pages:
            for name in PARTS:
                array = self.part(name, page)
                array[...] = np.nan if array.dtype.kind == "f" else np.iinfo(array.dtype).max  # NaN in all codes

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "addresses"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.addresses = {name: np.zeros(0, np.uint64) for name in PARTS}
        for segment in self._segments:
            for name, array in segment.items():
                segment[name] = _aligned(array.shape, array.dtype)
                segment[name][...] = array
            self._note_addresses(segment)


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> AnyArray:
    """Return an array that begins with a cache line, as large ones of NumPy do not."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + LINE, np.uint8)
    start = -memory.ctypes.data % LINE
    return memory[start : start + memory.size - LINE].view(dtype).reshape(shape)

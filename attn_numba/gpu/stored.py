"""Rows of a cache on a card, read 16 bytes at a time: what each code's bytes are as numbers.

A cache's keys, and its values, are one array of 32-bit words where a row takes a whole number of 16 bytes, and of
elements otherwise (`words` tells). A *piece* is what one thread reads of a row at a time: 16 bytes of codes, or as many
elements. Numbers of a piece follow each other in the row, but those of int4: its second half is from the row's second
half. What a row of each code looks like is said by `rules.storage.Code`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu.elements import element_type, float_of, reader, uint32
from attn_numba.gpu.ptx import instruction
from attn_numba.gpu.target import SIMULATED, device, language, types

__all__ = ["Stored", "load_words"]

GROUP = 16  # numbers that share a scale and a center, as in `rules.storage`
BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "int4": 1}

load_words: Callable[..., Any]  # (words, at, found): fill `found` with the four words from number `at` on


def _simulated(words, at, found):
    for n in range(4):
        found[n] = words[at + n]


if SIMULATED:
    load_words = _simulated
else:
    from attn_numba.gpu.ptx import FOUR, address, u64

    _load = instruction("ld.global.nc.v4.u32 {$0,$1,$2,$3}, [$4];", FOUR, u64)

    @device
    def _compiled(words, at, found):
        found[0], found[1], found[2], found[3] = _load(types.uint64(address(words) + types.uint64(at) * 4))

    load_words = _compiled


class Stored(NamedTuple):
    """How rows of `size` numbers of a code lie in a cache on a card."""

    code: str
    size: int

    @property
    def grouped(self) -> bool:
        """Whether numbers are codes of groups."""
        return self.code in ("int8", "int4")

    @property
    def part(self) -> int:
        """Numbers of a row's first half for int4, else all of them."""
        return -(-self.size // 2) if self.code == "int4" else self.size

    @property
    def groups(self) -> int:
        """Groups of a part."""
        return -(-self.part // GROUP)

    @property
    def words(self) -> bool:
        """Whether the array is of 32-bit words."""
        return self.grouped or (self.code != "float64" and self.size * BYTES[self.code] % 16 == 0)

    @property
    def numbers(self) -> int:
        """Numbers of a piece."""
        return 32 if self.code == "int4" else 16 // BYTES[self.code]

    @property
    def pieces(self) -> int:
        """Pieces of a row."""
        return self.groups if self.grouped else -(-self.size // self.numbers)

    @property
    def step(self) -> int:
        """Elements of the array from a row to the next."""
        if self.grouped:
            return self.groups * (GROUP + 4 * (2 if self.code == "int4" else 1)) // 4
        return self.size * BYTES[self.code] // 4 if self.words else self.size

    @property
    def element(self) -> Any:
        """Numba type of the array's elements."""
        return types.uint32 if self.words else element_type(self.code)

    @property
    def block(self) -> int:
        """Numbers that are rotated with each other; 0 where none are."""
        return self.size & -self.size if self.grouped else 0

    def place(self) -> Callable[..., Any]:
        """Return the device function (piece, n) for where in the row a piece's number n is; size or more if nowhere."""
        code, count, part, size = self.code, self.numbers, self.part, self.size

        @device
        def halves(piece, n):
            if n < GROUP:
                at = piece * GROUP + n
                return at if at < part else size
            at = piece * GROUP + n - GROUP
            return part + at if at < part else size

        @device
        def straight(piece, n):
            return piece * count + n

        return halves if code == "int4" else straight

    def reading(self, number: np.dtype[Any]) -> Callable[..., Any]:
        """Return the device function (rows, first, piece, found, x) that fills `x` with the numbers of a piece.

        `first` is the number of the row's first element in the array, `found` has room for four words. What is beyond
        the row is zero, or the center of its group.
        """
        real = language(number)["number"]
        if not self.words:
            return self._elements(real)
        return {"float32": self._floats, "int8": self._bytes, "int4": self._nibbles}.get(self.code, self._halves)(real)

    def _elements(self, real: Any) -> Callable[..., Any]:
        count, size, read = self.numbers, self.size, reader(self.code)

        @device
        def fill(rows, first, piece, found, x):
            for n in range(count):
                at = piece * count + n
                x[n] = real(read(rows[first + at])) if at < size else real(0)

        return fill

    def _floats(self, real: Any) -> Callable[..., Any]:
        @device
        def fill(rows, first, piece, found, x):
            load_words(rows, first + 4 * piece, found)
            for n in range(4):
                x[n] = float_of(found[n])

        return fill

    def _halves(self, real: Any) -> Callable[..., Any]:
        read = reader(self.code)

        @device
        def fill(rows, first, piece, found, x):
            load_words(rows, first + 4 * piece, found)
            for n in range(4):
                x[2 * n] = real(read(uint32(found[n]) & uint32(0xFFFF)))
                x[2 * n + 1] = real(read(uint32(found[n]) >> uint32(16)))

        return fill

    def _bytes(self, real: Any) -> Callable[..., Any]:
        code, groups = _signed(8), self.groups

        @device
        def fill(rows, first, piece, found, x):
            load_words(rows, first + 4 * piece, found)
            word = uint32(rows[first + 4 * groups + piece])
            scale, center = float_of(uint32(word << uint32(16))), float_of(uint32(word & uint32(0xFFFF0000)))
            for n in range(4):
                for m in range(4):
                    x[4 * n + m] = real(code(found[n], 24 - 8 * m)) * scale + center

        return fill

    def _nibbles(self, real: Any) -> Callable[..., Any]:
        code, groups = _signed(4), self.groups

        @device
        def fill(rows, first, piece, found, x):
            load_words(rows, first + 4 * piece, found)
            for half in range(2):
                word = uint32(rows[first + 4 * groups + half * groups + piece])
                scale, center = float_of(uint32(word << uint32(16))), float_of(uint32(word & uint32(0xFFFF0000)))
                for n in range(4):
                    for m in range(4):
                        shift = 28 - 8 * m - 4 * half
                        x[16 * half + 4 * n + m] = real(code(found[n], shift)) * scale + center

        return fill


def _signed(bits: int) -> Callable[..., Any]:
    """Return the device function (word, shift) for the code that the upper bits hold after a shift to the left."""
    down = 32 - bits

    @device
    def compiled(word, shift):
        return types.int32(types.int32(uint32(word) << uint32(shift)) >> types.int32(down))

    def simulated(word, shift):
        return int(np.uint32((int(word) << shift) & 0xFFFFFFFF).view(np.int32)) >> down

    return simulated if SIMULATED else compiled

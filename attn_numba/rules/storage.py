"""How a cache keeps the keys and values of its sequences: how a row is coded, and where a reader finds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from attn_numba.rules.data import AnyArray

__all__ = ["CODES", "GROUP", "CacheView", "Code", "Pair", "codes_named", "rotated", "rotation"]

GROUP = 16  # numbers that share a scale and a center
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)  # spreads of a group that four bits are tried with; the best is kept


@dataclass(frozen=True)
class Code:
    """How a row of numbers is stored.

    Floats are stored as they are. Integers are codes of the rotated row (see `rotated`) in groups of 16, each with a
    scale and a center of its own: a number is ``code * scale + center``. A row in memory is its codes, filled up to
    whole groups, then a word of 32 bits for each group: its scale in the low half, its center in the high half, both
    bfloat16. Of int8 (two's complement) byte i is number i. Of int4 byte i holds number i in its low half and number
    h + i in its high half, where h is half of the size, rounded up; its words are those of the low halves, then those
    of the high ones.

    Parameters
    ----------
    name : str
        Its name: float64, float32, float16, bfloat16, int8 or int4.
    stored : numpy.dtype
        Of the elements of a row; bfloat16 as its 16 bits, integers as bytes.
    bits : int
        Of an integer code; 0 for floats.

    References
    ----------
    S. Ashkboos et al. (2024), "QuaRot: outlier-free 4-bit inference in rotated LLMs". Z. Liu et al. (2024), "KIVI: a
    tuning-free asymmetric 2bit quantization for KV cache".

    Examples
    --------
    >>> row = CODES["int8"].keys.encode(np.array([[1.0, -2.0, 0.5, 3.0]]))
    >>> row.shape, CODES["int8"].keys.decode(row, 4).round(1)
    ((1, 20), array([[ 1. , -2. ,  0.5,  3. ]], dtype=float32))
    """

    name: str
    stored: np.dtype[Any]
    bits: int = 0

    def width(self, size: int) -> int:
        """Return how many elements store a row of `size` numbers."""
        if not self.bits:
            return size
        parts, groups = self._cut(size)
        return groups * (GROUP + 4 * parts)

    def encode(self, x: AnyArray) -> AnyArray:
        """Return rows of numbers as they are stored.

        Floats are rounded to the nearest. An integer row with a NaN or an infinity is read back as NaN throughout.

        Parameters
        ----------
        x : array (..., size)
            Numbers of any float dtype; bfloat16 too.

        Returns
        -------
        array (..., width)
            What is stored.
        """
        if self.name == "bfloat16":
            return x.view(np.uint16) if x.dtype.name == self.name else _bfloat16_bits(x)
        if not self.bits:
            with np.errstate(over="ignore"):
                return x.astype(self.stored, copy=False)
        with np.errstate(all="ignore"):
            return self._integers(x.astype(np.float32))

    def decode(self, stored: AnyArray, size: int) -> AnyArray:
        """Return the numbers that stored rows stand for: float64 of float64, else float32.

        Parameters
        ----------
        stored : array (..., width)
            What `encode` returned.
        size : int
            Numbers of a row.
        """
        if self.name == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        if not self.bits:
            return stored.astype(np.float64 if self.name == "float64" else np.float32)
        parts, groups = self._cut(size)
        codes = np.ascontiguousarray(stored[..., : GROUP * groups]).view(np.int8)
        if parts == 2:
            codes = np.concatenate([(codes << 4) >> 4, codes >> 4], axis=-1)
        words = np.ascontiguousarray(stored[..., GROUP * groups :]).view(np.uint32)[..., None]
        scale, center = (words << 16).view(np.float32), (words & 0xFFFF0000).view(np.float32)
        with np.errstate(all="ignore"):
            numbers = codes.reshape(*words.shape[:-1], GROUP) * scale + center
            part, shape = -(-size // parts), stored.shape[:-1]
            each = numbers.reshape(*shape, parts, GROUP * groups)[..., :part]
            return rotated(each.reshape(*shape, parts * part)[..., :size])

    def _cut(self, size: int) -> tuple[int, int]:
        """Return into how many parts an integer row is cut, and how many groups each of them has."""
        parts = 8 // self.bits
        return parts, -(-size // (parts * GROUP))

    def _integers(self, x: AnyArray) -> AnyArray:
        shape, size = x.shape[:-1], x.shape[-1]
        parts, groups = self._cut(size)
        part = -(-size // parts)
        y, filled = rotated(x), np.empty((*shape, parts, GROUP * groups), np.float32)
        for p in range(parts):
            one = y[..., p * part : (p + 1) * part]
            filled[..., p, : one.shape[-1]] = one
            filled[..., p, one.shape[-1] :] = y[..., -1:] if p == parts - 1 else one[..., -1:]  # which widens no group
        grouped = filled.reshape(*shape, parts * groups, GROUP)
        low, high = grouped.min(-1, keepdims=True), grouped.max(-1, keepdims=True)
        codes, words = self._nearest(grouped, low, high, SHRUNK if self.bits == 4 else SHRUNK[:1])
        finite = np.asarray(np.isfinite(y).all(axis=-1))[..., None, None]
        words = np.where(finite, words, 0x7FC07FC0).astype(np.uint32)
        codes = codes.reshape(*shape, parts, GROUP * groups)
        for p in range(parts):
            codes[..., p, min(part, size - p * part) :] = 0
        row = codes[..., 0, :] if parts == 1 else (codes[..., 0, :] & 15) | (codes[..., 1, :] << 4)
        return np.concatenate([row.view(np.uint8), np.ascontiguousarray(words[..., 0]).view(np.uint8)], axis=-1)

    def _nearest(self, x: AnyArray, low: AnyArray, high: AnyArray, spreads: Any) -> tuple[AnyArray, AnyArray]:
        """Return codes and words of groups, by the spread of a group's numbers that leaves the smallest error."""
        half, found = 2 ** (self.bits - 1), None
        for spread in spreads:
            middle, reach = (low + high) / 2, (high - low) / 2 * np.float32(spread)
            center = _bfloat16_bits(middle + reach / (2 * half - 1))  # for there is one code more below 0
            value = _numbers(center)
            widest = np.maximum((middle + reach - value) / (half - 1), (value - middle + reach) / half)
            scale = ((np.maximum(widest, 0).view(np.uint32) + 0xFFFF) >> 16).astype(np.uint16)  # rounded up
            step = _numbers(scale)
            codes = np.clip(np.rint((x - value) / np.where(step == 0, np.float32(1), step)), -half, half - 1)
            error = _total((codes * step + value - x) ** 2)
            new = codes, scale | (center.astype(np.uint32) << 16), error
            if found is not None:
                new = tuple(np.where(error < found[2], a, b) for a, b in zip(new, found, strict=True))
            found = new
        assert found is not None
        return np.nan_to_num(found[0]).astype(np.int8), found[1]


def rotation(size: int) -> int:
    """Return how many numbers of a row of `size` are rotated with each other: the largest power of two that fits."""
    return size & -size


def rotated(x: AnyArray) -> AnyArray:
    """Return rows times an orthonormal Hadamard matrix, in blocks of `rotation` numbers; its own inverse.

    Products of rows do not change; what was large in a few places is spread over all, so that few bits lose less.

    Parameters
    ----------
    x : array (..., size)
        Numbers.

    Returns
    -------
    array (..., size)
        In the dtype of `x`. The bits of a row do not depend on the others.

    Examples
    --------
    >>> rotated(np.array([4.0, 0.0, 0.0, 0.0])), rotated(np.array([2.0, 2.0, 2.0, 2.0]))
    (array([2., 2., 2., 2.]), array([4., 0., 0., 0.]))
    """
    size = x.shape[-1]
    block, rows, step = rotation(size), x.size // max(size, 1), 1
    y = np.array(x.reshape(rows, size).T, order="C")  # a copy; numbers of many rows lie beside each other
    spare = np.empty_like(y)
    while step < block:
        pairs, to = (z.reshape(size // (2 * step), 2, step * rows) for z in (y, spare))
        np.add(pairs[:, 0], pairs[:, 1], out=to[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=to[:, 1])
        y, spare, step = spare, y, 2 * step
    found: AnyArray = np.multiply(y.T, x.dtype.type(block**-0.5), order="C").reshape(x.shape)
    return found


def _bfloat16_bits(x: AnyArray) -> AnyArray:
    """Return the upper halves of float32 numbers, rounded to the nearest, ties to even."""
    with np.errstate(over="ignore"):
        bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _numbers(bits: AnyArray) -> AnyArray:
    """Return the float32 numbers of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _total(x: AnyArray) -> AnyArray:
    """Return the sums of groups, halves added to halves: compiled code adds in the same order."""
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x


class Pair(NamedTuple):
    """How a cache stores its keys and its values."""

    keys: Code
    values: Code


_FLOATS = (("float64", np.float64), ("float32", np.float32), ("float16", np.float16), ("bfloat16", np.uint16))
_BYTES = np.dtype(np.uint8)
CODES = {name: Pair(Code(name, np.dtype(stored)), Code(name, np.dtype(stored))) for name, stored in _FLOATS}
CODES["int8"] = Pair(*[Code("int8", _BYTES, 8)] * 2)
# An error of a key passes through the exponential: with keys of four bits outputs of real models err by 10 % and more.
CODES["int4"] = Pair(CODES["int8"].keys, Code("int4", _BYTES, 4))


def codes_named(dtype: Any) -> tuple[str, Pair]:
    """Return the name of a cache's dtype, given as a name or a NumPy dtype, and the codes of its keys and values."""
    name = dtype if isinstance(dtype, str) else getattr(np.dtype(dtype), "name", "")
    if name not in CODES:
        raise ValueError(f"dtype is {dtype!r}; needed one of {', '.join(CODES)}")
    return name, CODES[name]


class CacheView(NamedTuple):
    """What reads a cache needs to know: everything is pages.

    A page holds `page` tokens of one sequence for all key heads. A head's tokens in it are rows side by side, as `Code`
    says. What lies beyond a length is never read.
    """

    key_code: str  # of a `Code`
    value_code: str
    lengths: AnyArray  # int64 (B,): tokens of each sequence
    longest: int  # of the lengths
    key_heads: int
    head_size: int
    value_size: int
    page: int  # tokens of a page
    keys: AnyArray  # uint64 (B, pages): the address of each page's keys
    values: AnyArray
    key_token: int  # bytes of a row, which is how far the next token's is
    key_head: int  # bytes from a head to the next
    value_token: int
    value_head: int
    shared: bool  # whether some pages are held by several sequences
    table: AnyArray  # int64 (B, pages): the number of each page
    keep: Any  # what keeps the memory alive, the pool of the pages

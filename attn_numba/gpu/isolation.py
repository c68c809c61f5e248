"""Values that are not finite, on the tensor cores: kept from the sums of rows that may not see them.

Zero times NaN is NaN, and a pair that does not count has weight zero. A block computes as if all values were finite. If
its sums are not finite, it begins anew and is *careful*: it puts zeros into the tile in place of such values, remembers
which rows see one in which columns, and spoils those at the end. The products are the same ones, so the bits of all
else are too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from attn_numba.gpu import ptx
from attn_numba.gpu.target import cuda, device, types

EXPONENT = {"bfloat16": 0x7F80, "float16": 0x7C00}  # bits that are all set in infinity and NaN alone

int32, uint32, float32 = types.int32, types.uint32, types.float32


class Guard(NamedTuple):
    """Functions for the device, for sums that are products with tiles of some lines of values.

    ``unsound(sums)`` is 1 if a sum of the thread is not finite, else 0. ``forget(words, count)`` makes words of shared
    memory zero. ``clean(tile, words)`` puts zeros in place of values that are not finite, and notes in `words`, line by
    line, in which columns. ``remember(word, row, lane, noted, words)`` joins what was noted of the lines that a row
    sees, one of the block's; `word` has a bit for each of the thread's columns. ``spoil(r, sums, first, lane, words)``
    makes NaN of what sees a value that is not finite. `forget` and `clean` end with a barrier.
    """

    unsound: Callable[..., Any]
    forget: Callable[..., Any]
    clean: Callable[..., Any]
    remember: Callable[..., Any]
    spoil: Callable[..., Any]


def guard_of(
    dtype: str, threads: int, lines: int, row_tiles: int, size: int, words: int, place: Callable[..., Any]
) -> Guard:
    """Return the functions.

    Parameters
    ----------
    dtype : str
        "bfloat16" or "float16".
    threads : int
        Of a block.
    lines : int
        Of a tile.
    row_tiles : int
        Of 16 rows of sums each, in a warp.
    size : int
        Values of a line, a multiple of 8.
    words : int
        Words that hold one bit for each value of a line.
    place : device function (row, chunk) -> int
        Where 16 bytes of a line lie in the tile.
    """
    load, store, load4, store4, join = (
        ptx.load_shared, ptx.store_shared, ptx.load_shared4, ptx.store_shared4, ptx.or_shared,
    )  # fmt: skip
    opaque = ptx.opaque
    LINES, THREADS, WORDS, CHUNKS = lines, threads, words, -(-size // 8)
    NT, DT = lines // 8, -(-size // 16) * 2
    LOW, HIGH = uint32(EXPONENT[dtype]), uint32(EXPONENT[dtype] << 16)
    NAN, count = float32(math.nan), row_tiles * DT * 4

    @device
    def unsound(sums):
        probe = float32(0)
        for n in range(count):
            probe += sums[n] - sums[n]
        return int32(1) if probe != float32(0) else int32(0)

    @device
    def forget(words, count):
        for n in range(int32(cuda.threadIdx.x), count, THREADS):
            store(uint32(words + uint32(4 * n)), uint32(0))
        cuda.syncthreads()

    @device
    def finite(word):
        """Return two values with zeros in place of those that are not finite, and a bit for each of these."""
        bits = uint32(0)
        if word & LOW == LOW:
            word, bits = uint32(word & uint32(0xFFFF0000)), uint32(1)
        if word & HIGH == HIGH:
            word, bits = uint32(word & uint32(0xFFFF)), uint32(bits | uint32(2))
        return word, bits

    @device
    def clean(tile, words):
        forget(words, int32(LINES * WORDS))
        end = int32(opaque(uint32(LINES * CHUNKS)))  # else the loop is unrolled, where registers are few
        for n in range(int32(cuda.threadIdx.x), end, THREADS):
            line, chunk = int32(n // CHUNKS), int32(n % CHUNKS)
            at = uint32(tile + uint32(place(line, chunk)))
            values = load4(at)
            a, first = finite(values[0])
            b, second = finite(values[1])
            c, third = finite(values[2])
            d, fourth = finite(values[3])
            bits = uint32(
                first | uint32(second << uint32(2)) | uint32(third << uint32(4)) | uint32(fourth << uint32(6))
            )
            if bits != uint32(0):
                store4(at, a, b, c, d)
                word = uint32(words + uint32(4 * (line * WORDS + (chunk >> 2))))
                join(word, uint32(bits << uint32(8 * (chunk & 3))))
        cuda.syncthreads()

    @device
    def remember(word, row, lane, noted, words):
        for x in range(2 * NT):
            if uint32(word >> uint32(x)) & uint32(1) != uint32(0):
                line = int32(8 * int32(x >> 1) + 2 * int32(lane & 3) + int32(x & 1))
                for n in range(WORDS):
                    bits = load(uint32(noted + uint32(4 * (line * WORDS + n))))
                    if bits != uint32(0):
                        join(uint32(words + uint32(4 * (row * WORDS + n))), bits)

    @device
    def spoil(r, sums, first, lane, words):
        row = int32(first + 8 * r + (lane >> 2))
        for n in range(DT):
            x = ((r >> 1) * DT + n) * 4 + (r & 1) * 2
            bits = load(uint32(words + uint32(4 * (row * WORDS + (n >> 2)))))
            bits = uint32(bits >> uint32(8 * (n & 3) + 2 * (lane & 3)))
            if bits & uint32(1) != uint32(0):
                sums[x] = NAN
            if bits & uint32(2) != uint32(0):
                sums[x + 1] = NAN

    return Guard(unsound, forget, clean, remember, spoil)

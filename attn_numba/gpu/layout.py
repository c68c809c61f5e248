"""The sizes of a block's work on the tensor cores, and how rows come to shared memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from attn_numba.gpu import ptx
from attn_numba.gpu.target import device, types

int32, int64, uint32, uint64 = types.int32, types.int64, types.uint32, types.uint64


class Layout(NamedTuple):
    """Sizes of a block's work that are compiled in."""

    dtype: str
    head_size: int  # D, a multiple of 8
    value_size: int  # E, a multiple of 8
    rows: int  # of queries
    keys: int  # of a tile
    threads: int
    row_tiles: int  # of 16 rows each, in a warp
    sink: bool

    @property
    def key_columns(self) -> int:
        """Groups of eight keys in a tile."""
        return self.keys // 8

    @property
    def value_columns(self) -> int:
        """Groups of eight values; an even number of them."""
        return -(-self.value_size // 16) * 2

    @property
    def value_words(self) -> int:
        """Words that hold one bit for each value."""
        return padded(self.value_size) // 32

    @property
    def scan_words(self) -> int:
        """Words that hold one bit for each tile that a block's threads look at together."""
        return self.threads // 32

    @property
    def notes(self) -> tuple[int, int, int]:
        """Bytes of shared memory that the steps take: for scans and a zero, for keys, and for rows."""
        return 4 * (2 * self.scan_words + 4), 4 * self.value_words * self.keys, 4 * self.value_words * self.rows

    @property
    def parts(self) -> tuple[int, int, int]:
        """Bytes of shared memory for the queries, and for two tiles each of keys and values."""
        key_row, value_row = 2 * padded(self.head_size), 2 * padded(self.value_size)
        # results are laid where the queries were
        return self.rows * max(key_row, value_row), 2 * self.keys * key_row, 2 * self.keys * value_row

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return sum((*self.parts, *self.notes))


def padded(size: int) -> int:
    """Return how many elements a row takes in shared memory, where rows are whole 128 bytes and a power of two."""
    return 64 if size <= 64 else 128 if size <= 128 else 256


def loader(threads: int, size: int, rows: int, pitch: int, place: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function for the device that begins to bring rows to shared memory, 16 bytes a thread and pass.

    Parameters
    ----------
    threads : int
        Threads of a block.
    size : int
        Elements of a row, a multiple of 8; zeros follow to its `padded` size.
    rows : int
        How many; zeros in place of those beyond the array.
    pitch : int
        Bytes from a row to the next in shared memory.
    place : device function (row, chunk) -> int
        Where 16 bytes of a row are laid, from the start; the pattern of a row's chunks has a period of eight rows.
    """
    chunks = padded(size) // 8
    pass_rows, passes = threads // chunks, rows * chunks // threads
    copy = ptx.copy16

    @device
    def load(tile, source, stride, left, t):
        row, chunk = int32(t // chunks), int32(t % chunks)
        at = uint32(tile + uint32(place(row, chunk)))
        first = source + int64(row) * stride + 16 * int64(chunk)
        for n in range(passes):
            there = row + n * pass_rows < left and 8 * chunk < size
            to = uint32(uint32(at + uint32(n * pass_rows * pitch)) ^ uint32(((n * pass_rows) & 7) << 4))
            copy(to, uint64(first + n * pass_rows * stride), uint32(16) if there else uint32(0))

    return load

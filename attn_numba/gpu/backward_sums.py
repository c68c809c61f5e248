"""Small kernels of gradients: sums over some axes of an array, and the maps of a score undone.

All sums are in double precision, in one order: each thread of a block takes one number in so many, from the left to the
right, and their sums are added from thread to thread. Each result is written by one thread.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from attn_numba.gpu.elements import element_type, reader, writer
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import SIMULATED, cuda, language, types

__all__ = [
    "copies_grid", "copies_program", "outer_grid", "outer_program", "sums_grid", "sums_program", "unit_slopes_grid",
    "unit_slopes_program",
]  # fmt: skip

THREADS = 32 if SIMULATED else 128  # of a block that sums
ROWS = 4  # of a block that undoes a map, 32 threads each
SIDE = DEPTH = 16  # of a tile of weights, and rows in shared memory at a time: a thread brings one number of each


# --- sums over axes ---


def sums_program(number: np.dtype[Any]) -> Program:
    """Return the kernel that sums numbers of a dtype."""
    real = getattr(types, number.name)
    signature = (types.Array(real, 4, "A"), types.int64, types.int32, types.CPointer(real))
    make = functools.partial(make_sums, number)
    return Program("sums", (number.name, THREADS), None, make, signature, (THREADS,), 1, 0, False)


def sums_grid(shape: tuple[int, ...], count: int) -> tuple[int, int, int]:
    """Return the number of blocks: one for each of so many results."""
    return count, 1, 1


def make_sums(number: np.dtype[Any]) -> Callable[..., None]:
    """Return ``kernel(source, count, add, result)``: sums over the last axes of `source`, four axes in all.

    `result` has an element for each combination of the first axes, side by side, and the last ones have `count` each;
    with `add` the sum is added to what is there.
    """
    real, wide = language(number)["number"], (np if SIMULATED else types).float64

    def kernel(source, count, add, result):
        parts = cuda.shared.array(THREADS, wide)
        t, element = cuda.threadIdx.x, cuda.blockIdx.x
        _, H, M, N = source.shape
        total = wide(0)
        for n in range(t, count, THREADS):
            place = element * count + n
            total += wide(source[place // (H * M * N), place // (M * N) % H, place // N % M, place % N])
        parts[t] = total
        cuda.syncthreads()
        if t == 0:
            total = wide(0)
            for n in range(THREADS):
                total += parts[n]
            result[element] = real(total + wide(result[element])) if add != 0 else real(total)

    return kernel


# --- maps of a score, undone ---


def unit_slopes_program(name: str, number: np.dtype[Any], written: str) -> Program:
    """Return the kernel of gradients by rows of `name` from those by rows of length 1, written as `written`."""
    arrays = (element_type(name), getattr(types, number.name), element_type(written))
    signature = tuple(types.Array(x, 4, "A") for x in arrays)
    make = functools.partial(make_unit_slopes, name, number, written)
    return Program("unit_slopes", (name, number.name, written), None, make, signature, (32, ROWS), 1, 0, False)


def unit_slopes_grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of blocks for rows (B, H, M, D)."""
    return -(-shape[0] * shape[1] * shape[2] // ROWS), 1, 1


def make_unit_slopes(name: str, number: np.dtype[Any], written: str) -> Callable[..., None]:
    """Return ``kernel(rows, gradient, result)``, all (B, H, M, D): the gradient by rows that were made of length 1.

    A row of zeros has none, and neither has one whose gradient is 0 throughout: it may hold anything.
    """
    names, read, write = language(number), reader(name), writer(written)
    real, absolute, sqrt = names["number"], names["absolute"], names["sqrt"]
    shape = (3, ROWS, 32)

    def kernel(rows, gradient, result):
        fold = cuda.shared.array(shape, real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        B, H, M, D = rows.shape
        row = cuda.blockIdx.x * ROWS + ty
        found = row < B * H * M
        place = row if found else 0
        b, h, i = place // (H * M), place // M % H, place % M

        largest, reached = real(0), real(0)
        if found:
            for d in range(tx, D, 32):
                x = absolute(real(read(rows[b, h, i, d])))
                largest = x if x > largest or x != x else largest
                if gradient[b, h, i, d] != 0:
                    reached = real(1)
        fold[0, ty, tx], fold[1, ty, tx] = largest, reached
        cuda.syncthreads()
        for n in range(32):
            x = fold[0, ty, n]
            largest = x if x > largest or x != x else largest
            reached = reached if reached > 0 else fold[1, ty, n]
        cuda.syncthreads()
        divisor = largest if largest != 0 else real(1)

        square, dot = real(0), real(0)
        if found:
            for d in range(tx, D, 32):
                x = real(read(rows[b, h, i, d])) / divisor
                square += x * x
                dot += x * gradient[b, h, i, d]
        fold[0, ty, tx], fold[2, ty, tx] = square, dot
        cuda.syncthreads()
        square, dot = real(0), real(0)
        for n in range(32):
            square += fold[0, ty, n]
            dot += fold[2, ty, n]
        length = sqrt(square)
        if found:
            for d in range(tx, D, 32):
                x = real(0)
                if largest != 0 and reached > 0:
                    unit = real(read(rows[b, h, i, d])) / divisor / length
                    x = (gradient[b, h, i, d] - unit * (dot / length)) / length / divisor
                result[b, h, i, d] = write(real(x))

    return kernel


def outer_program(name: str, number: np.dtype[Any]) -> Program:
    """Return the kernel of gradients by matrices that rows of `name` were multiplied by."""
    real = getattr(types, number.name)
    signature = (types.Array(element_type(name), 4, "A"), types.Array(real, 4, "A"), types.Array(real, 3, "A"))
    make = functools.partial(make_outer, name, number)
    return Program("outer", (name, number.name), None, make, signature, (SIDE, SIDE), 1, 0, False)


def outer_grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of blocks for matrices (heads, D, E)."""
    return shape[0] * -(-shape[1] // SIDE), -(-shape[2] // SIDE), 1


def make_outer(name: str, number: np.dtype[Any]) -> Callable[..., None]:
    """Return ``kernel(rows, gradient, result)``: sums of ``rows[b, h, i, d] * gradient[b, h, i, e]`` over b and i.

    `rows` is (B, H, M, D), `gradient` (B, H, M, E), `result` (H, D, E). What meets a gradient of 0 may hold anything.
    """
    read, wide = reader(name), (np if SIMULATED else types).float64
    real = language(number)["number"]
    shape = (DEPTH, SIDE + 1)

    def kernel(rows, gradient, result):
        left = cuda.shared.array(shape, real)
        right = cuda.shared.array(shape, real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        B, M, D, E = rows.shape[0], rows.shape[2], rows.shape[3], gradient.shape[3]
        strips = (D + SIDE - 1) // SIDE
        h, d0 = cuda.blockIdx.x // strips, cuda.blockIdx.x % strips * SIDE
        e0 = cuda.blockIdx.y * SIDE
        total = wide(0)
        for b in range(B):
            for i0 in range(0, M, DEPTH):
                cuda.syncthreads()
                x, y = real(0), real(0)
                if i0 + ty < M:
                    if d0 + tx < D:
                        x = real(read(rows[b, h, i0 + ty, d0 + tx]))
                    if e0 + tx < E:
                        y = gradient[b, h, i0 + ty, e0 + tx]
                left[ty, tx], right[ty, tx] = x, y
                cuda.syncthreads()
                part = real(0)
                for n in range(DEPTH):
                    if right[n, tx] != 0:
                        part += left[n, ty] * right[n, tx]
                total += wide(part)
        if d0 + ty < D and e0 + tx < E:
            result[h, d0 + ty, e0 + tx] = real(total)

    return kernel


def copies_program(number: np.dtype[Any], written: str) -> Program:
    """Return the kernel that writes numbers of a dtype as `written`."""
    signature = (types.Array(getattr(types, number.name), 4, "A"), types.Array(element_type(written), 4, "A"))
    make = functools.partial(make_copies, written)
    return Program("copies", (number.name, written), None, make, signature, (THREADS,), 1, 0, False)


def copies_grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of blocks for rows (B, H, M, D): one for each row."""
    return shape[0] * shape[1] * shape[2], 1, 1


def make_copies(written: str) -> Callable[..., None]:
    """Return ``kernel(source, result)``, both (B, H, M, D)."""
    write = writer(written)

    def kernel(source, result):
        _, H, M, D = source.shape
        row = cuda.blockIdx.x
        b, h, i = row // (H * M), row // M % H, row % M
        for d in range(cuda.threadIdx.x, D, THREADS):
            result[b, h, i, d] = write(source[b, h, i, d])

    return kernel

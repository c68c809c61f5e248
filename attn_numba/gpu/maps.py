"""What a score does to q and k before it compares them, on the device: rows of length 1, and rows times a matrix.

What a row becomes depends on no other row, its bits included: a row is summed in one order, which depends on its length
alone, and what is not finite stays where it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from attn_numba.gpu.elements import element_name, element_type, reader
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import SIMULATED, cuda, language, types
from attn_numba.problem import Problem
from attn_numba.rules import Additive, Bilinear, Cosine, Dot

__all__ = ["mapped", "refusal"]

UNIT_BLOCK = (32, 4)  # threads that share a row, and rows
PRODUCT_BLOCK = (16, 16)  # threads that share a row, and threads that share a column
PART = 4  # rows and columns of one thread in a product
DEPTH = 16  # numbers of each row in shared memory at a time
CHAIN = 128  # products that are summed in one run, before rounding errors gather
ALIGNMENT = None if SIMULATED else 16  # bytes; of shared memory, so that four numbers are read at once


# --- for the host ---


def refusal(problem: Problem) -> str:
    """Return why q and k cannot be mapped on the device; an empty text where they can, which takes no work."""
    if type(problem.score) in (Dot, Cosine, Bilinear, Additive):
        return ""
    return f"it knows Dot, Cosine, Bilinear and Additive, and the score is {type(problem.score).__name__}"


def mapped(
    problem: Problem,
    upload: Callable[[np.ndarray], Any],
    empty: Callable[[tuple[int, ...], np.dtype[Any]], Any],
    run: Callable[[Program, tuple[int, int, int], tuple[Any, ...]], None],
) -> Problem:
    """Return the same call with the maps of its score applied to q and k, v as it is.

    What remains to be done for a score of `dots` is the dot product. Mapped rows are in the accumulator's dtype; `k` of
    `Bilinear`, which has no map, stays as it came. The call's dtype remains that of v and of the output.

    Parameters
    ----------
    problem : Problem
        The call, its arrays on the device.
    upload : function (NumPy array) -> array view
        Brings a contiguous array to the device.
    empty : function (shape, dtype) -> array view
        Makes a contiguous array on the device.
    run : function (program, grid, arguments)
        Starts a kernel; one that is started later sees its results.

    Raises
    ------
    NotImplementedError
        If the score is one that the device does not know.
    """
    reason, score, number = refusal(problem), problem.score, problem.accumulator
    if reason:
        raise NotImplementedError(f"cuda cannot map q and k: {reason}; the reference and cpu can")

    def unit(rows: Any) -> Any:
        result = empty(tuple(rows.shape), number)
        if all(result.shape):
            name = element_name(rows, problem)
            run(unit_program(name, number), unit_grid(rows.shape), (rows, result))
        return result

    def product(rows: Any, matrices: np.ndarray) -> Any:
        weights = np.ascontiguousarray(matrices if matrices.ndim == 3 else matrices[None], number)
        shape = (*rows.shape[:3], weights.shape[2])
        result = empty(shape, number)
        if all(shape):
            name = element_name(rows, problem)
            run(product_program(name, number), product_grid(shape), (rows, upload(weights), result))
        return result

    q, k = problem.q, problem.k
    if isinstance(score, Cosine):
        q, k = unit(q), unit(k)
    elif isinstance(score, Bilinear):
        q = product(q, score.W)
    elif isinstance(score, Additive):
        q, k = product(q, score.Wq.swapaxes(-1, -2)), product(k, score.Wk.swapaxes(-1, -2))
    else:
        return problem
    sizes = problem.sizes._replace(D=q.shape[3])
    return problem._replace(
        q=q, k=k, sizes=sizes, score=Dot() if score.dots else score, key=problem.key and (problem.key, sizes, "mapped")
    )


def unit_program(name: str, number: np.dtype[Any]) -> Program:
    """Return the kernel that gives rows of `name` length 1, in the dtype `number`."""
    real = getattr(types, number.name)
    signature = (types.Array(element_type(name), 4, "A"), types.Array(real, 4, "A"))
    make = functools.partial(make_unit_rows, name, number)
    return Program("unit_rows", (name, number.name), None, make, signature, UNIT_BLOCK, 1, 0, False)


def unit_grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of blocks for rows (B, H, M, D)."""
    return -(-shape[0] * shape[1] * shape[2] // UNIT_BLOCK[1]), 1, 1


def product_program(name: str, number: np.dtype[Any]) -> Program:
    """Return the kernel that multiplies rows of `name` by matrices of the dtype `number`, in which the result is."""
    real = getattr(types, number.name)
    signature = (types.Array(element_type(name), 4, "A"), types.Array(real, 3, "A"), types.Array(real, 4, "A"))
    make = functools.partial(make_products, name, number)
    return Program("products", (name, number.name), None, make, signature, PRODUCT_BLOCK, 1, 0, False)


def product_grid(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return the number of blocks for results (B, H, M, E)."""
    across, down = (PART * threads for threads in PRODUCT_BLOCK)
    return shape[0] * shape[1] * -(-shape[2] // down), -(-shape[3] // across), 1


# --- for the device ---


def make_unit_rows(name: str, number: np.dtype[Any]) -> Callable[..., None]:
    """Return ``kernel(rows, result)``: rows (B, H, M, D), numbers of `name`, become rows of length 1; zeros stay zeros.

    A row of threads computes a row. Each number is divided by the largest of its row first, so that no square leaves
    the range of the dtype. A row that is not finite becomes NaN.
    """
    names, read = language(number), reader(name)
    real, absolute, sqrt = names["number"], names["absolute"], names["sqrt"]
    across, down = UNIT_BLOCK
    shape = (down, across)

    def kernel(rows, result):
        fold = cuda.shared.array(shape, real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        B, H, M, D = rows.shape
        row = cuda.blockIdx.x * down + ty
        found = row < B * H * M
        place = row if found else 0
        b, h, i = place // (H * M), place // M % H, place % M

        largest = real(0)
        if found:
            for d in range(tx, D, across):
                x = absolute(real(read(rows[b, h, i, d])))
                largest = x if x > largest else largest
        fold[ty, tx] = largest
        cuda.syncthreads()
        for n in range(across):
            largest = fold[ty, n] if fold[ty, n] > largest else largest
        cuda.syncthreads()
        divisor = largest if largest != 0 else real(1)

        total = real(0)
        if found:
            for d in range(tx, D, across):
                x = real(read(rows[b, h, i, d])) / divisor
                total += x * x
        fold[ty, tx] = total
        cuda.syncthreads()
        total = real(0)
        for n in range(across):
            total += fold[ty, n]
        length = sqrt(total)
        if length == 0:
            length = real(1)
        if found:
            for d in range(tx, D, across):
                result[b, h, i, d] = real(read(rows[b, h, i, d])) / divisor / length

    return kernel


def make_products(name: str, number: np.dtype[Any]) -> Callable[..., None]:
    """Return ``kernel(rows, matrices, result)``: rows (B, H, M, D), numbers of `name`, times matrices.

    Matrices are (1, D, E) for all heads or (H, D, E), results (B, H, M, E). A block computes a tile of a head's result;
    sums are over D from the left to the right, in runs of `CHAIN`.
    """
    names, read = language(number), reader(name)
    real = names["number"]
    across, down = PRODUCT_BLOCK
    threads, rows_tile, columns_tile = across * down, PART * down, PART * across
    sums_size = PART * PART
    # Four words beyond a row: rows stay aligned, and columns lie in different banks.
    rows_shape, columns_shape = (DEPTH, rows_tile + 4), (DEPTH, columns_tile + 4)
    rows_count, columns_count = DEPTH * rows_tile, DEPTH * columns_tile

    def kernel(rows, matrices, result):
        left = cuda.shared.array(rows_shape, real, ALIGNMENT)
        right = cuda.shared.array(columns_shape, real, ALIGNMENT)
        sums = cuda.local.array(sums_size, real)
        chain = cuda.local.array(sums_size, real)
        tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
        t = ty * across + tx
        H, M, D, E = rows.shape[1], rows.shape[2], rows.shape[3], result.shape[3]
        blocks = (M + rows_tile - 1) // rows_tile
        head, i0 = cuda.blockIdx.x // blocks, cuda.blockIdx.x % blocks * rows_tile
        b, h, e0 = head // H, head % H, cuda.blockIdx.y * columns_tile
        matrix = h if matrices.shape[0] > 1 else 0
        for n in range(sums_size):
            sums[n] = real(0)
            chain[n] = real(0)
        for d0 in range(0, D, DEPTH):
            cuda.syncthreads()
            for x in range(t, rows_count, threads):
                r, d = x // DEPTH, x % DEPTH
                found = real(0)
                if i0 + r < M and d0 + d < D:
                    found = real(read(rows[b, h, i0 + r, d0 + d]))
                left[d, r] = found
            for x in range(t, columns_count, threads):
                d, e = x // columns_tile, x % columns_tile
                found = real(0)
                if d0 + d < D and e0 + e < E:
                    found = matrices[matrix, d0 + d, e0 + e]
                right[d, e] = found
            cuda.syncthreads()
            for d in range(DEPTH):
                for r in range(PART):
                    for e in range(PART):
                        chain[r * PART + e] += left[d, ty * PART + r] * right[d, tx * PART + e]
            if (d0 + DEPTH) % CHAIN == 0 or d0 + DEPTH >= D:
                for n in range(sums_size):
                    sums[n] += chain[n]
                    chain[n] = real(0)
        for r in range(PART):
            for e in range(PART):
                if i0 + ty * PART + r < M and e0 + tx * PART + e < E:
                    result[b, h, i0 + ty * PART + r, e0 + tx * PART + e] = sums[r * PART + e]

    return kernel

"""Attention forward on the tensor cores of any card since Ampere (``mma.sync``): float16 and bfloat16, softmax.

A block of four warps computes the rows of queries that its layout says. Keys and values come to shared memory tile by
tile with ``cp.async``, the next tile under the products of this one. Scores stay in registers, are rounded to 16 bits
as weights, and meet the values there. The order of all sums is that of keys and of head size, whatever lies beside.
"""

from __future__ import annotations

import math
from typing import Any

from attn_numba.gpu import ptx
from attn_numba.gpu.fragments import LOG2_E, steps_of
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.layout import Layout, loader, padded
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import cuda, device, types
from attn_numba.gpu.tensor_cores import arguments, grid_of, program_of, refusal_of_any
from attn_numba.problem import Problem

__all__ = ["arguments", "grid", "make", "program", "refusal"]

WARPS = 4

int32, int64, uint32, uint64, float32 = types.int32, types.int64, types.uint32, types.uint64, types.float32


# --- for the host ---


def refusal(problem: Problem, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot serve a call on a card of that capability; an empty text where it can."""
    if capability < (8, 0):
        return f"it needs a card of compute capability 8.0 or more, and this one has {capability[0]}.{capability[1]}"
    return refusal_of_any(problem)


def layout_of(dtype: str, D: int, E: int, sink: bool) -> Layout:
    """Return the sizes of a block's work: what registers hold of scores and sums."""
    wide = max(padded(D), padded(E))
    row_tiles, keys = {64: (2, 64), 128: (2, 32), 256: (1, 16)}[wide]
    return Layout(dtype, D, E, 16 * WARPS * row_tiles, keys, 32 * WARPS, row_tiles, sink)


def layout_for(problem: Problem) -> Layout:
    """Return the sizes of a block's work for a call."""
    s = problem.sizes
    return layout_of(problem.dtype, s.D, s.E, problem.normalizer.sink is not None)


def program(problem: Problem, bound: Bound, *, lse: bool = False, stats: bool = False) -> Program:
    """Return the kernel of a call."""
    return program_of("mma", layout_for(problem), bound, make, resident=2, specific=False)


def grid(problem: Problem) -> tuple[int, int, int]:
    """Return the number of blocks."""
    return grid_of(problem, layout_for(problem))


# --- for the device ---


def make(layout: Layout, hooks: Hooks) -> Any:
    """Return the kernel, a plain function."""
    bfloat16 = layout.dtype == "bfloat16"
    mma = ptx.mma_bfloat16 if bfloat16 else ptx.mma_float16
    load, load_transposed = ptx.load_matrices, ptx.load_matrices_transposed
    commit, arrived, opaque, shared_address = ptx.copy_commit, ptx.copy_wait0, ptx.opaque, ptx.shared_address
    D, E, ROWS, KEYS, THREADS, MT = (
        layout.head_size, layout.value_size, layout.rows, layout.keys, layout.threads, layout.row_tiles,
    )  # fmt: skip
    NT, DT, WORDS = layout.key_columns, layout.value_columns, layout.value_words
    KEY_ROW, VALUE_ROW = 2 * padded(D), 2 * padded(E)  # bytes
    QUERIES, KEY_TILES, VALUE_TILES = layout.parts
    SCANS, KEY_NOTES, _ = layout.notes
    KEY_TILE, VALUE_TILE = KEY_TILES // 2, VALUE_TILES // 2
    depth_steps, key_steps = -(-D // 16), KEYS // 16
    scores_size, sums_size, rows_size, halves_size = MT * NT * 4, MT * DT * 4, MT * 2, MT * NT * 2
    sink, scaled = layout.sink, hooks.scores and not hooks.partial
    fixed = hooks.fixed
    NEGATIVE = float32(-math.inf)

    def placer(row_bytes):
        """Return the function for the place of 16 bytes in swizzled rows."""

        @device
        def place(row, chunk):
            return row * row_bytes + ((chunk ^ (row & 7)) << 4)

        return place

    key_place, value_place = placer(KEY_ROW), placer(VALUE_ROW)
    steps = steps_of(hooks, layout, value_place, value_place)

    @device
    def add_product(sums, x, a0, a1, a2, a3, b0, b1):
        found = mma((sums[x], sums[x + 1], sums[x + 2], sums[x + 3]), a0, a1, a2, a3, b0, b1)
        sums[x], sums[x + 1], sums[x + 2], sums[x + 3] = found

    load_queries = loader(THREADS, D, ROWS, KEY_ROW, key_place)
    load_keys, load_values = (
        loader(THREADS, D, KEYS, KEY_ROW, key_place),
        loader(THREADS, E, KEYS, VALUE_ROW, value_place),
    )

    def kernel(q, k, v, out, lse, stats, sinks, strides, M, N, H, group, scale, factor, p):
        memory = cuda.shared.array(0, types.uint16, alignment=1024)
        queries = uint32(shared_address(memory))
        keys, values = uint32(queries + uint32(QUERIES)), uint32(queries + uint32(QUERIES + KEY_TILES))
        scanned = uint32(values + uint32(VALUE_TILES))
        noted, spoils = uint32(scanned + uint32(SCANS)), uint32(scanned + uint32(SCANS + KEY_NOTES))
        t = int32(cuda.threadIdx.x)
        lane, first = int32(t & 31), int32((t >> 5) * (16 * MT))  # the warp's first row in the block
        b, h, hk, i0 = steps.place(M, H, group)
        steps.begin(scanned)
        f = fixed(b, h, p)
        extra = float32(0)
        if sink:
            extra = float32(sinks[b * H + h])
        if scaled:
            scale, factor = float32(1), float32(LOG2_E)
        q_head = int64(q) + int64(b) * strides[0] + int64(h) * strides[1] + int64(i0) * strides[2]
        k_head = int64(k) + int64(b) * strides[3] + int64(hk) * strides[4]
        v_head = int64(v) + int64(b) * strides[6] + int64(hk) * strides[7]

        scores = cuda.local.array(scores_size, float32)
        sums = cuda.local.array(sums_size, float32)
        halves = cuda.local.array(halves_size, uint32)
        tops = cuda.local.array(rows_size, float32)
        totals = cuda.local.array(rows_size, float32)
        shrinks = cuda.local.array(rows_size, float32)

        # Where a lane reads 8 x 8 matrices. Rows start at multiples of their length, a power of two, so the step to the
        # next 32 bytes of a swizzled row is one exclusive or of the whole address.
        low, high = int32(lane & 15), int32(lane >> 4)
        query_at = uint32(queries + uint32((first + low) * KEY_ROW) + uint32((high ^ (low & 7)) << 4))
        key_row = int32((lane & 7) + 8 * high)
        key_at = uint32(keys + uint32(key_row * KEY_ROW) + uint32((((lane >> 3) & 1) ^ (lane & 7)) << 4))
        value_at = uint32(values + uint32(low * VALUE_ROW) + uint32((high ^ (low & 7)) << 4))

        careful = int32(0)
        while True:
            for n in range(sums_size):
                sums[n] = float32(0)
            for n in range(rows_size):
                tops[n] = NEGATIVE
                totals[n] = float32(0)
            if careful != 0:
                steps.forget(spoils, int32(ROWS * WORDS))
            load_queries(queries, q_head, strides[2], int32(M - i0), t)
            j, said = steps.next_tile(int32(0), scanned, b, h, i0, M, N, f, p)
            stage = int32(0)
            if j * KEYS < N:
                j0 = int32(j * KEYS)
                load_keys(keys, k_head + int64(j0) * strides[5], strides[5], int32(N - j0), t)
                load_values(values, v_head + int64(j0) * strides[8], strides[8], int32(N - j0), t)
            commit()
            while j * KEYS < N:
                arrived()
                cuda.syncthreads()
                j0, now = int32(j * KEYS), said
                u = int32(opaque(uint32(t)))  # the thread again: else the compiler keeps all that follows from it
                row, column = int32(i0 + first + ((u & 31) >> 2)), int32(j0 + 2 * (u & 3))
                j, said = steps.next_tile(int32(j + 1), scanned, b, h, i0, M, N, f, p)
                key_base, value_base = uint32(key_at + uint32(stage * KEY_TILE)), uint32(stage * VALUE_TILE)
                stage = int32(1 - stage)
                if j * KEYS < N:
                    n0 = int32(j * KEYS)
                    to_keys, to_values = uint32(stage * KEY_TILE), uint32(stage * VALUE_TILE)
                    load_keys(uint32(keys + to_keys), k_head + int64(n0) * strides[5], strides[5], int32(N - n0), u)
                    load_values(
                        uint32(values + to_values), v_head + int64(n0) * strides[8], strides[8], int32(N - n0), u
                    )
                    commit()
                query_base = opaque(query_at)  # else the compiler keeps one address a step in registers
                for n in range(scores_size):
                    scores[n] = float32(0)
                for d in range(depth_steps):
                    from_queries, from_keys = uint32(query_base ^ uint32(32 * d)), uint32(key_base ^ uint32(32 * d))
                    a = load(from_queries)
                    if MT == 2:
                        a2 = load(uint32(from_queries + uint32(16 * KEY_ROW)))
                    for n in range(NT // 2):
                        c = load(uint32(from_keys + uint32(n * (16 * KEY_ROW))))
                        add_product(scores, 8 * n, a[0], a[1], a[2], a[3], c[0], c[1])
                        add_product(scores, 8 * n + 4, a[0], a[1], a[2], a[3], c[2], c[3])
                        if MT == 2:
                            x = 4 * NT + 8 * n
                            add_product(scores, x, a2[0], a2[1], a2[2], a2[3], c[0], c[1])
                            add_product(scores, x + 4, a2[0], a2[1], a2[2], a2[3], c[2], c[3])
                steps.edit(scores, now, row, column, M, N, scanned, b, h, f, p)
                if careful != 0:
                    steps.clean(uint32(values + value_base), noted)
                    for r in range(rows_size):
                        steps.remember(steps.seen(scores, r), int32(row - i0 + 8 * r), u, noted, spoils)
                steps.softmax(scores, tops, totals, shrinks, factor)
                steps.drop(scores, row, column, M, b, h, f, p)
                steps.shrink(sums, shrinks)
                steps.pack(scores, halves)
                value_base = uint32(value_at + value_base)
                for n in range(key_steps):
                    for e in range(DT // 2):
                        c = load_transposed(uint32(uint32(value_base ^ uint32(32 * e)) + uint32(n * (16 * VALUE_ROW))))
                        x, w = 8 * e, 4 * n
                        add_product(sums, x, halves[w], halves[w + 1], halves[w + 2], halves[w + 3], c[0], c[1])
                        add_product(sums, x + 4, halves[w], halves[w + 1], halves[w + 2], halves[w + 3], c[2], c[3])
                        if MT == 2:
                            x, w = 4 * DT + 8 * e, 2 * NT + 4 * n
                            add_product(sums, x, halves[w], halves[w + 1], halves[w + 2], halves[w + 3], c[0], c[1])
                            add_product(sums, x + 4, halves[w], halves[w + 1], halves[w + 2], halves[w + 3], c[2], c[3])
            arrived()
            if careful != 0 or not steps.spoiled(sums):
                break
            careful = int32(1)

        # Read again, so that the loop does not keep what is needed after it.
        u = int32(opaque(uint32(t)))
        lane, first = int32(u & 31), int32((u >> 5) * 16 * MT)
        b, h = int32(opaque(uint32(b))), int32(opaque(uint32(h)))
        head = int64(b) * H + h
        if lse != 0:
            lse = lse + uint64(4 * head * M)
        if stats != 0:
            stats = stats + uint64(8 * head * M)
        out_head = int64(out) + int64(b) * strides[9] + int64(h) * strides[10]
        steps.finish(
            sums, tops, totals, first, lane, queries, careful, spoils, i0, M, out_head, strides[11], int64(lse),
            int64(stats), extra, scale, p,
        )  # fmt: skip

    return kernel

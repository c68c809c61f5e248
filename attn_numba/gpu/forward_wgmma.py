"""Attention forward on the tensor cores of Hopper (``wgmma``): float16 and bfloat16, softmax.

Two warpgroups of four warps compute 64 rows of queries each. The scores of one tile and the weighted values of the tile
before are in flight together, and the softmax of the first runs under the second. Keys and values come to shared memory
with ``cp.async``, in halves of 64 columns whose rows of 128 bytes are swizzled as the matrix descriptors say.
"""

from __future__ import annotations

import math
from typing import Any

from attn_numba.gpu import ptx
from attn_numba.gpu.fragments import LOG2_E, steps_of
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.layout import Layout, loader
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import cuda, device, types
from attn_numba.gpu.tensor_cores import arguments, grid_of, program_of, refusal_of_any
from attn_numba.problem import Problem

__all__ = ["arguments", "grid", "make", "program", "refusal"]

GROUP_ROWS, GROUP_THREADS = 64, 128  # of a warpgroup
ROW = 128  # bytes of a row of a swizzled half
SWIZZLED = 1 << 62  # of a matrix descriptor: swizzled in pieces of 128 bytes
EIGHT_ROWS = (8 * ROW >> 4) << 32  # the step from eight rows to the next eight, in units of 16 bytes

int32, int64, uint32, uint64, float32 = types.int32, types.int64, types.uint32, types.uint64, types.float32


# --- for the host ---


def refusal(problem: Problem, capability: tuple[int, int]) -> str:
    """Return why the kernel cannot serve a call on a card of that capability; an empty text where it can."""
    if capability != (9, 0):
        return f"it needs a card of compute capability 9.0, and this one has {capability[0]}.{capability[1]}"
    return refusal_of_any(problem)


def layout_of(dtype: str, D: int, E: int, sink: bool, groups: int = 2) -> Layout:
    """Return the sizes of a block's work: what registers hold of scores and sums."""
    keys = 64 if max(D, E) > 128 else 128
    return Layout(dtype, D, E, GROUP_ROWS * groups, keys, GROUP_THREADS * groups, 1, sink)


def layout_for(problem: Problem) -> Layout:
    """Return the sizes of a block's work for a call."""
    s = problem.sizes
    return layout_of(problem.dtype, s.D, s.E, problem.normalizer.sink is not None)


def program(problem: Problem, bound: Bound, *, lse: bool = False, stats: bool = False) -> Program:
    """Return the kernel of a call."""
    return program_of("wgmma", layout_for(problem), bound, make, resident=1, specific=True)


def grid(problem: Problem) -> tuple[int, int, int]:
    """Return the number of blocks."""
    return grid_of(problem, layout_for(problem))


# --- for the device ---


def make(layout: Layout, hooks: Hooks) -> Any:
    """Return the kernel, a plain function."""
    commit, arrived = ptx.copy_commit, ptx.copy_wait0
    fence, opaque, pin = ptx.fence_async, ptx.opaque, ptx.pin
    uniform, shared_address = ptx.uniform, ptx.shared_address
    D, E, ROWS, KEYS, THREADS = layout.head_size, layout.value_size, layout.rows, layout.keys, layout.threads
    WORDS = layout.value_words
    QUERIES, KEY_TILES, VALUE_TILES = layout.parts
    SCANS, KEY_NOTES, _ = layout.notes
    KEY_TILE, VALUE_TILE = KEY_TILES // 2, VALUE_TILES // 2
    QUERY_HALF, KEY_HALF = ROWS * ROW, KEYS * ROW  # bytes of 64 columns of the queries, and of keys or values
    value_columns = 8 * layout.value_columns
    scores_size, sums_size, halves_size = KEYS // 2, value_columns // 2, KEYS // 4
    depth_steps, key_steps = -(-D // 16), KEYS // 16
    # Sixteen columns of queries and keys are 32 bytes of a half; sixteen keys are 16 rows of the values.
    score_product = ptx.gemm(
        KEYS, depth_steps, [(n // 4) * (QUERY_HALF >> 4) + (n % 4) * 2 for n in range(depth_steps)],
        [(n // 4) * (KEY_HALF >> 4) + (n % 4) * 2 for n in range(depth_steps)], zero=True, dtype=layout.dtype,
    )  # fmt: skip
    value_product = ptx.gemm(
        value_columns, key_steps, None, [n * (16 * ROW >> 4) for n in range(key_steps)], a_in_registers=True,
        transposed_b=True, dtype=layout.dtype,
    )  # fmt: skip
    scores_done, scores_done_before_values = ptx.wgmma_wait(scores_size, 0), ptx.wgmma_wait(scores_size, 1)
    values_done = ptx.wgmma_wait(sums_size, 0)
    # Of values the columns lead: one half after the other is a step of a whole half.
    KEY_FORM = SWIZZLED | EIGHT_ROWS | (1 << 16)
    VALUE_FORM = SWIZZLED | EIGHT_ROWS | ((KEY_HALF >> 4) << 16)
    sink, scaled = layout.sink, hooks.scores and not hooks.partial
    fixed = hooks.fixed
    NEGATIVE = float32(-math.inf)

    def placer(half_bytes):
        """Return the function for the place of 16 bytes in swizzled halves."""

        @device
        def place(row, chunk):
            return (chunk >> 3) * half_bytes + row * ROW + (((chunk & 7) ^ (row & 7)) << 4)

        return place

    result_place, value_place = placer(QUERY_HALF), placer(KEY_HALF)  # queries lie as results do
    steps = steps_of(hooks, layout, value_place, result_place)

    load_queries = loader(THREADS, D, ROWS, ROW, result_place)
    load_keys, load_values = loader(THREADS, D, KEYS, ROW, value_place), loader(THREADS, E, KEYS, ROW, value_place)

    def kernel(q, k, v, out, lse, stats, sinks, strides, M, N, H, group, scale, factor, p):
        memory = cuda.shared.array(0, types.uint16, alignment=1024)
        queries = uint32(shared_address(memory))
        keys, values = uint32(queries + uint32(QUERIES)), uint32(queries + uint32(QUERIES + KEY_TILES))
        scanned = uint32(values + uint32(VALUE_TILES))
        noted, spoils = uint32(scanned + uint32(SCANS)), uint32(scanned + uint32(SCANS + KEY_NOTES))
        t = int32(cuda.threadIdx.x)
        lane, first = int32(t & 31), int32((t >> 5) * 16)  # the warp's first row in the block
        b, h, hk, i0 = steps.place(M, H, group)
        steps.begin(scanned)
        f = fixed(b, h, p)
        row, column = int32(i0 + first + (lane >> 2)), int32(2 * (lane & 3))
        extra = float32(0)
        if sink:
            extra = float32(sinks[b * H + h])
        if scaled:
            scale, factor = float32(1), float32(LOG2_E)
        q_head = int64(q) + int64(b) * strides[0] + int64(h) * strides[1] + int64(i0) * strides[2]
        k_head = int64(k) + int64(b) * strides[3] + int64(hk) * strides[4]
        v_head = int64(v) + int64(b) * strides[6] + int64(hk) * strides[7]
        k_row, v_row = strides[5], strides[8]

        scores = cuda.local.array(scores_size, float32)
        sums = cuda.local.array(sums_size, float32)
        halves = cuda.local.array(halves_size, uint32)
        tops = cuda.local.array(2, float32)
        totals = cuda.local.array(2, float32)
        shrinks = cuda.local.array(2, float32)
        for n in range(scores_size):
            scores[n] = float32(0)
        # a warpgroup's 64 rows of queries follow those of the one before
        warpgroup = uniform(uint32(t >> 7))
        query_matrix = uint64(KEY_FORM) | uint64(
            uint32(queries + uint32(warpgroup * uint32(GROUP_ROWS * ROW))) >> uint32(4)
        )
        key_matrix = uint64(KEY_FORM) | uint64(keys >> uint32(4))
        value_matrix = uint64(VALUE_FORM) | uint64(values >> uint32(4))

        careful, seen0, seen1 = int32(0), uint32(0), uint32(0)
        while True:
            for n in range(sums_size):
                sums[n] = float32(0)
            for n in range(2):
                tops[n] = NEGATIVE
                totals[n] = float32(0)
            if careful != 0:
                steps.forget(spoils, int32(ROWS * WORDS))
            j, said = steps.next_tile(int32(0), scanned, b, h, i0, M, N, f, p)
            if j * KEYS < N:
                load_queries(queries, q_head, strides[2], int32(M - i0), t)
                j0 = int32(j * KEYS)
                load_keys(keys, k_head + int64(j0) * k_row, k_row, int32(N - j0), t)
                commit()
                now = said
                arrived()
                fence()
                cuda.syncthreads()
                # its values, and the keys of the tile after it, come while its scores are computed
                load_values(values, v_head + int64(j0) * v_row, v_row, int32(N - j0), t)
                j, said = steps.next_tile(int32(j + 1), scanned, b, h, i0, M, N, f, p)
                if j * KEYS < N:
                    n0 = int32(j * KEYS)
                    load_keys(uint32(keys + uint32(KEY_TILE)), k_head + int64(n0) * k_row, k_row, int32(N - n0), t)
                commit()
                score_product(scores, query_matrix, key_matrix)
                scores_done(scores)
                steps.edit(scores, now, row, int32(j0 + column), M, N, scanned, b, h, f, p)
                if careful != 0:
                    seen0, seen1 = steps.seen(scores, 0), steps.seen(scores, 1)
                steps.softmax(scores, tops, totals, shrinks, factor)
                steps.drop(scores, row, int32(j0 + column), M, b, h, f, p)
                steps.pack(scores, halves)
                stage = int32(0)  # where the values are that come next, and the keys that were before
                while j * KEYS < N:
                    arrived()
                    fence()
                    cuda.syncthreads()
                    j0, now = int32(j * KEYS), said
                    other = int32(1 - stage)
                    u = int32(opaque(uint32(t)))  # the thread again: else the compiler keeps all that follows from it
                    row, column = int32(i0 + (u >> 5) * 16 + ((u & 31) >> 2)), int32(2 * (u & 3))
                    if careful != 0:
                        steps.clean(uint32(values + uint32(stage * VALUE_TILE)), noted)
                        steps.remember(seen0, int32(row - i0), u, noted, spoils)
                        steps.remember(seen1, int32(row - i0 + 8), u, noted, spoils)
                        fence()
                        cuda.syncthreads()
                    load_values(
                        uint32(values + uint32(other * VALUE_TILE)), v_head + int64(j0) * v_row, v_row,
                        int32(N - j0), u,
                    )  # fmt: skip
                    j, said = steps.next_tile(int32(j + 1), scanned, b, h, i0, M, N, f, p)
                    if j * KEYS < N:
                        n0 = int32(j * KEYS)
                        load_keys(
                            uint32(keys + uint32(stage * KEY_TILE)), k_head + int64(n0) * k_row, k_row,
                            int32(N - n0), u,
                        )  # fmt: skip
                    commit()
                    score_product(scores, query_matrix, key_matrix + uint64(uint32(other * KEY_TILE) >> uint32(4)))
                    value_product(sums, halves, value_matrix + uint64(uint32(stage * VALUE_TILE) >> uint32(4)))
                    scores_done_before_values(scores)
                    steps.edit(scores, now, row, int32(j0 + column), M, N, scanned, b, h, f, p)
                    if careful != 0:
                        seen0, seen1 = steps.seen(scores, 0), steps.seen(scores, 1)
                    steps.softmax(scores, tops, totals, shrinks, factor)
                    # else the compiler waits for the values first, and nothing runs under their product
                    pin(uint32(0), totals[0])
                    pin(uint32(0), totals[1])
                    values_done(sums)
                    steps.drop(scores, row, int32(j0 + column), M, b, h, f, p)
                    steps.shrink(sums, shrinks)
                    steps.pack(scores, halves)
                    stage = other
                arrived()
                fence()
                cuda.syncthreads()
                if careful != 0:
                    u = int32(opaque(uint32(t)))
                    lane, first = int32(u & 31), int32((u >> 5) * 16)
                    steps.clean(uint32(values + uint32(stage * VALUE_TILE)), noted)
                    steps.remember(seen0, int32(first + (lane >> 2)), lane, noted, spoils)
                    steps.remember(seen1, int32(first + (lane >> 2) + 8), lane, noted, spoils)
                    fence()
                    cuda.syncthreads()
                value_product(sums, halves, value_matrix + uint64(uint32(stage * VALUE_TILE) >> uint32(4)))
                values_done(sums)
            if careful != 0 or not steps.spoiled(sums):
                break
            careful = int32(1)

        # Read again, so that the loop does not keep what is needed after it.
        u = int32(opaque(uint32(t)))
        lane, first = int32(u & 31), int32((u >> 5) * 16)
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

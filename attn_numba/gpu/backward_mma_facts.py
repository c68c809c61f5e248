"""Facts of queries on the tensor cores, from which `backward_mma` makes weights and gradients of pairs.

The facts of a query are four numbers of float32, (B, H, M, 4):

- what scores are diminished by: the largest score of the row, times the factor that makes powers of two of exponentials
  unless rules edit scores; plus infinity for a row that sees no key;
- the inverse of the sum of exponentials, the sink's among them; 0 for a row that sees no key;
- the mean of the gradients by its weights, ``sum_j w_ij dw_ij``, where `dw` has what dropout makes of it;
- the gradient by the sink's score, 0 without one.

A block owns rows of q and dout and walks over tiles of k and v. The mean is summed as the output of the forward pass
is: it shrinks as the largest score grows.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from attn_numba.gpu import ptx
from attn_numba.gpu.backward_fragments import Work, chunk_place, placer, product
from attn_numba.gpu.fragments import LOG2_E, steps_of, unrolled
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.layout import Layout, loader, padded
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import cuda, device, types
from attn_numba.problem import Problem

__all__ = ["FACTS", "arguments", "grid", "make", "program", "work_of"]

WARPS = 4
FACTS = 4  # numbers of a query

int32, int64, uint32, uint64, float32 = types.int32, types.int64, types.uint32, types.uint64, types.float32


# --- for the host ---


def work_of(dtype: str, D: int, E: int) -> Work:
    """Return the sizes of a block's work: what registers hold of scores and of gradients by weights."""
    row_tiles, lines = (2, 32) if max(padded(D), padded(E)) == 64 else (1, 32)
    return Work(dtype, D, E, False, 16 * WARPS * row_tiles, lines, 32 * WARPS, row_tiles)


def work_for(problem: Problem) -> Work:
    """Return the sizes of a block's work for a call."""
    return work_of(problem.dtype, problem.sizes.D, problem.sizes.E)


def program(problem: Problem, bound: Bound) -> Program:
    """Return the kernel of a call."""
    work, hooks, sink = work_for(problem), bound.hooks, getattr(problem.normalizer, "sink", None) is not None
    number = types.int32
    signature = (
        *(types.uint64,) * 5, types.CPointer(types.float64), types.UniTuple(types.int64, 12), *(number,) * 4,
        types.float32, types.float32, bound.signature(),
    )  # fmt: skip
    return Program(
        "mma_facts", (*work, sink), hooks, lambda: make(work, hooks, sink), signature, (work.threads,), 2, work.shared,
        False,
    )  # fmt: skip


def grid(problem: Problem, work: Work | None = None) -> tuple[int, int, int]:
    """Return the number of blocks: all rows of a head, then the next head."""
    s, work = problem.sizes, work_for(problem) if work is None else work
    return s.B * s.H * -(-s.M // work.rows), 1, 1


def arguments(problem: Problem, entries: tuple[Any, ...], dout: Any, facts: Any, sink: Any = None) -> tuple[Any, ...]:
    """Return the kernel's parameters.

    Parameters
    ----------
    problem : Problem
        The call.
    entries : tuple
        ``bound.entries`` with the arrays on the device.
    dout : view (B, H, M, E)
        Gradient by the output, not misplaced.
    facts : view (B, H, M, 4)
        Where the facts go, contiguous float32.
    sink : view (B, H), optional
        Scores of the sink, contiguous float64.
    """
    s, scale = problem.sizes, np.float32(problem.scale)
    strides = tuple(np.int64(x) for view in (problem.q, dout, problem.k, problem.v) for x in view.strides[:3])
    return (
        problem.q, dout, problem.k, problem.v, facts, sink, strides, np.int32(s.M), np.int32(s.N), np.int32(s.H),
        np.int32(s.H // s.Hk), scale, np.float32(scale * LOG2_E), entries,
    )  # fmt: skip


# --- for the device ---


def make(work: Work, hooks: Hooks, sink: bool) -> Any:
    """Return the kernel, a plain function.

    ``kernel(q, dout, k, v, facts, sinks, strides, M, N, H, group, scale, factor, p)`` writes the facts (B, H, M, 4).
    """
    D, E = work.head_size, work.value_size
    ROWS, LINES, THREADS, MT, NT = work.rows, work.lines, work.threads, work.row_tiles, work.columns
    A_ROW, B_ROW = work.pitches
    OWN_A, OWN_B, OTHER_A, OTHER_B, TOLD = work.parts
    A_TILE, B_TILE = OTHER_A // 2, OTHER_B // 2
    commit, arrived, opaque, shared_address = ptx.copy_commit, ptx.copy_wait0, ptx.opaque, ptx.shared_address
    ex2, rcp, exchange, store_float = ptx.ex2, ptx.rcp, ptx.shuffle_xor, ptx.store_global_f32
    pairs_size, rows_size = MT * NT * 4, MT * 2
    fixed, drops, keep_factor = hooks.fixed, hooks.drops, hooks.keep_factor
    scored, scaled = hooks.scores, hooks.scores and not hooks.partial
    NEGATIVE, POSITIVE, log2e = float32(-math.inf), float32(math.inf), float32(LOG2_E)
    a_place, b_place = placer(A_ROW), placer(B_ROW)
    a_lane, b_lane = chunk_place(A_ROW), chunk_place(B_ROW)
    load_own_a, load_own_b = loader(THREADS, D, ROWS, A_ROW, a_place), loader(THREADS, E, ROWS, B_ROW, b_place)
    load_a, load_b = loader(THREADS, D, LINES, A_ROW, a_place), loader(THREADS, E, LINES, B_ROW, b_place)
    scores_of, gradients_of = product(work, D, A_ROW), product(work, E, B_ROW)
    layout = Layout(work.dtype, D, E, ROWS, LINES, THREADS, MT, sink)
    steps = steps_of(hooks, layout, b_place, b_place)

    @device
    def average(s, u, means, shrinks):
        """Add to the sums of the rows their weights times the gradients by these."""
        for r in range(rows_size):
            total = float32(0)
            for n in range(NT):
                for c in range(2):
                    x = ((r >> 1) * NT + n) * 4 + (r & 1) * 2 + c
                    if s[x] != float32(0):  # else it may not be there, and its gradient be anything
                        total += s[x] * u[x]
            means[r] = means[r] * shrinks[r] + total

    @device
    def finish_row(r, tops, totals, means, first, lane, i0, M, facts, extra, scale, factor, p):
        """Write the facts of a row."""
        total, mean, top = totals[r], means[r], tops[r]
        total += exchange(total, int32(1))
        total += exchange(total, int32(2))
        mean += exchange(mean, int32(1))
        mean += exchange(mean, int32(2))
        shift, inverse, of_sink = POSITIVE, float32(0), float32(0)
        if total == float32(0):
            mean = float32(0)
        else:
            shift = top if scored else float32(top * factor)
            own = float32(0)
            if sink and extra != NEGATIVE:
                own = ex2((extra - top * scale) * log2e)
            inverse = rcp(total + own)
            mean = mean * inverse
            if drops:
                mean = mean * float32(keep_factor(p))
            if sink and inverse != float32(0):  # else the sink is above all, and the mean 0
                of_sink = -own * inverse * mean
        row = int32(first + 8 * r + (lane >> 2))
        if (lane & 3) == 0 and i0 + row < M:
            at = uint64(facts + 4 * FACTS * int64(i0 + row))
            store_float(at, shift)
            store_float(uint64(at + uint64(4)), inverse)
            store_float(uint64(at + uint64(8)), mean)
            store_float(uint64(at + uint64(12)), of_sink)

    row_arguments = "tops, totals, means, first, lane, i0, M, facts, extra, scale, factor, p"
    finish = unrolled(rows_size, finish_row, row_arguments)

    def kernel(q, dout, k, v, facts, sinks, strides, M, N, H, group, scale, factor, p):
        memory = cuda.shared.array(0, types.uint16, alignment=1024)
        rows_a = uint32(shared_address(memory))
        rows_b, lines_a = uint32(rows_a + uint32(OWN_A)), uint32(rows_a + uint32(OWN_A + OWN_B))
        lines_b = uint32(lines_a + uint32(OTHER_A))
        scanned = uint32(lines_b + uint32(OTHER_B + TOLD))
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
        d_head = int64(dout) + int64(b) * strides[3] + int64(h) * strides[4] + int64(i0) * strides[5]
        k_head = int64(k) + int64(b) * strides[6] + int64(hk) * strides[7]
        v_head = int64(v) + int64(b) * strides[9] + int64(hk) * strides[10]

        scores = cuda.local.array(pairs_size, float32)
        gradients = cuda.local.array(pairs_size, float32)
        tops = cuda.local.array(rows_size, float32)
        totals = cuda.local.array(rows_size, float32)
        shrinks = cuda.local.array(rows_size, float32)
        means = cuda.local.array(rows_size, float32)
        for n in range(rows_size):
            tops[n] = NEGATIVE
            totals[n] = float32(0)
            means[n] = float32(0)

        # Where a lane reads 8 x 8 matrices: of rows, and of lines.
        low, high = int32(lane & 15), int32(lane >> 4)
        a_at = uint32(rows_a + uint32(first * A_ROW) + a_lane(low, high))
        b_at = uint32(rows_b + uint32(first * B_ROW) + b_lane(low, high))
        line, half = int32((lane & 7) + 8 * high), int32((lane >> 3) & 1)
        a_line, b_line = uint32(lines_a + a_lane(line, half)), uint32(lines_b + b_lane(line, half))

        load_own_a(rows_a, q_head, strides[2], int32(M - i0), t)
        load_own_b(rows_b, d_head, strides[5], int32(M - i0), t)
        j, said = steps.next_tile(int32(0), scanned, b, h, i0, M, N, f, p)
        stage = int32(0)
        if j * LINES < N:
            j0 = int32(j * LINES)
            load_a(lines_a, k_head + int64(j0) * strides[8], strides[8], int32(N - j0), t)
            load_b(lines_b, v_head + int64(j0) * strides[11], strides[11], int32(N - j0), t)
        commit()
        while j * LINES < N:
            arrived()
            cuda.syncthreads()
            j0, now = int32(j * LINES), said
            u = int32(opaque(uint32(t)))  # the thread again: else the compiler keeps all that follows from it
            row, column = int32(i0 + first + ((u & 31) >> 2)), int32(j0 + 2 * (u & 3))
            j, said = steps.next_tile(int32(j + 1), scanned, b, h, i0, M, N, f, p)
            a_stage, b_stage = uint32(stage * A_TILE), uint32(stage * B_TILE)
            stage = int32(1 - stage)
            if j * LINES < N:
                n0 = int32(j * LINES)
                to_a, to_b = uint32(lines_a + uint32(stage * A_TILE)), uint32(lines_b + uint32(stage * B_TILE))
                load_a(to_a, k_head + int64(n0) * strides[8], strides[8], int32(N - n0), u)
                load_b(to_b, v_head + int64(n0) * strides[11], strides[11], int32(N - n0), u)
                commit()
            # Opaque, else the compiler keeps one address a step in registers.
            scores_of(scores, opaque(a_at), uint32(a_line + a_stage))
            gradients_of(gradients, opaque(b_at), uint32(b_line + b_stage))
            steps.edit(scores, now, row, column, M, N, scanned, b, h, f, p)
            steps.softmax(scores, tops, totals, shrinks, factor)
            steps.drop(scores, row, column, M, b, h, f, p)
            average(scores, gradients, means, shrinks)
        arrived()
        head = int64(b) * H + h
        finish(
            tops, totals, means, first, lane, i0, M, int64(facts) + 4 * FACTS * head * M, extra, scale, factor, p
        )  # fmt: skip

    return kernel

"""Gradients on the tensor cores of any card since Ampere (``mma.sync``): float16 and bfloat16, softmax.

Three kernels, each result element of one writer, no atomics:

- `facts` (`backward_mma_facts`): of each query what makes weights and gradients of its pairs: its largest score, the
  inverse of the sum of its exponentials, and its mean gradient ``sum_j w_ij dw_ij``. A block owns queries and walks
  over tiles of keys.
- `queries`: dq. A block owns rows of q and dout and walks over tiles of k and v:
  ``s = q k^T``, ``dw = dout v^T``, ``w = exp(s - ...)``, ``ds = w (dw - mean)`` in 16 bits, ``dq += ds k``.
- `keys`: dk and dv. A block owns rows of k and v and walks over tiles of q and dout, of all the query heads that share
  its head, in their order: ``s^T = k q^T``, ``dw^T = v dout^T``, ``dv += w^T dout``, ``dk += ds^T q``.

The order of all sums is that of lines (keys, or heads and queries) and of sizes, whatever lies beside; it depends on
dtype, D and E alone.

Why two walks more than a single kernel with atomics has: 7 products in place of 5, for the same bits each run. Why the
facts are computed, and not made of the output and lse of the forward pass (2 products more): the mean as
``dout . out`` with `out` rounded to 16 bits errs by 2^-9 (bfloat16) of ``|dout| |out|``, which is not diminished where
the values have something in common, as gradients by scores are. Measured against float64, the error of dq and dk is
then 1.5 to 4 times what the reference's own is for normal values with mean 0, 8 times at mean 5 and 48 times at mean
20, where twice is allowed; with the mean from the weights it is 1.4 to 1.7 times, which is the rounding of the result.
And lse in float32 cannot tell the weights of scores near -1e9 apart, where the largest score and the sum can.

Values that are not finite: as `isolation` has it. k in a `queries` block, q and dout in a `keys` block are what sums
are products with. A pair that counts and has such a value in q, k or v spoils its weights or its mean, and these all
that belongs to it; only dout reaches dv by itself, so only its columns are noted.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_numba.gpu import ptx
from attn_numba.gpu.backward_fragments import (
    FACT_BYTES,
    Work,
    chunk_place,
    pairs_of,
    placer,
    product,
    storer,
    sum_product,
)
from attn_numba.gpu.fragments import LOG2_E, unrolled
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.isolation import guard_of
from attn_numba.gpu.layout import loader, padded
from attn_numba.gpu.program import Program
from attn_numba.gpu.target import cuda, device, types
from attn_numba.gpu.tensor_cores import misplaced, refusal_of_any
from attn_numba.gpu.walk import walker
from attn_numba.problem import Problem

__all__ = ["arguments", "grid", "make", "program", "refusal", "work_of"]

WARPS = 4
LARGEST = 128  # of head and value size: the sums of dk and dv share a thread's registers
KINDS = ("queries", "keys")

int32, int64, uint32, uint64, float32 = types.int32, types.int64, types.uint32, types.uint64, types.float32


# --- for the host ---


def refusal(problem: Problem, dout: Any, capability: tuple[int, int]) -> str:
    """Return why the kernels cannot serve a call on a card of that capability; an empty text where they can."""
    if capability < (8, 0):
        return f"it needs a card of compute capability 8.0 or more, and this one has {capability[0]}.{capability[1]}"
    s = problem.sizes
    if max(s.D, s.E) > LARGEST:
        return f"it takes head and value sizes to {LARGEST}, and they are {s.D} and {s.E}"
    return refusal_of_any(problem) or misplaced(dout, "dout")


def work_of(kind: str, dtype: str, D: int, E: int) -> Work:
    """Return the sizes of a block's work, for "queries" or "keys": what registers hold of scores and sums."""
    narrow = max(padded(D), padded(E)) == 64
    row_tiles, lines = {("queries", True): (2, 32), ("queries", False): (1, 32), ("keys", True): (1, 64)}.get(
        (kind, narrow), (1, 32)
    )
    return Work(dtype, D, E, kind == "keys", 16 * WARPS * row_tiles, lines, 32 * WARPS, row_tiles)


def work_for(kind: str, problem: Problem) -> Work:
    """Return the sizes of a block's work for a call."""
    return work_of(kind, problem.dtype, problem.sizes.D, problem.sizes.E)


def program(kind: str, problem: Problem, bound: Bound) -> Program:
    """Return the kernel "queries" or "keys" of a call; `bound` are its rules with their derivatives."""
    work, hooks = work_for(kind, problem), bound.hooks
    return Program(
        f"mma_{kind}", tuple(work), hooks, lambda: make(work, hooks), signature(bound), (work.threads,), 2, work.shared,
        False,
    )  # fmt: skip


def signature(bound: Bound) -> tuple[Any, ...]:
    """Return the types of the parameters."""
    number = types.int32
    return (
        *(types.uint64,) * 7, types.UniTuple(types.int64, 18), *(number,) * 4, types.float32, types.float32,
        bound.signature(),
    )  # fmt: skip


def grid(kind: str, problem: Problem, work: Work | None = None) -> tuple[int, int, int]:
    """Return the number of blocks: all rows of a head, then the next head."""
    s, work = problem.sizes, work_for(kind, problem) if work is None else work
    count, heads = (s.N, s.Hk) if work.by_keys else (s.M, s.H)
    return s.B * heads * -(-count // work.rows), 1, 1


def arguments(
    kind: str, problem: Problem, entries: tuple[Any, ...], dout: Any, facts: Any, first: Any, second: Any = None
) -> tuple[Any, ...]:
    """Return the parameters of a kernel.

    Parameters
    ----------
    kind : {"queries", "keys"}
        Which kernel.
    problem : Problem
        The call.
    entries : tuple
        ``bound.entries`` with the arrays on the device.
    dout : view (B, H, M, E)
        Gradient by the output, not misplaced.
    facts : view (B, H, M, 4)
        What the kernel of facts wrote, contiguous float32.
    first, second : view
        Where dq (B, H, M, D) goes, or dk (B, Hk, N, D) and dv (B, Hk, N, E); not misplaced.
    """
    s, scale = problem.sizes, np.float32(problem.scale)
    own, other = (problem.q, dout), (problem.k, problem.v)
    if kind == "keys":
        own, other = other, own
    views = (*own, *other, first, second)
    strides = tuple(np.int64(x) for view in views for x in ((0, 0, 0) if view is None else view.strides[:3]))
    return (
        *views, facts, strides, np.int32(s.M), np.int32(s.N), np.int32(s.H), np.int32(s.H // s.Hk), scale,
        np.float32(scale * LOG2_E), entries,
    )  # fmt: skip


# --- for the device ---


def make(work: Work, hooks: Hooks) -> Any:
    """Return the kernel, a plain function.

    ``kernel(own_a, own_b, other_a, other_b, result_a, result_b, facts, strides, M, N, H, group, scale, factor, p)``: of
    q and k (a) and of dout and v (b), own are those of the block's side and other those that it walks over. It writes
    dq, or dk and dv.
    """
    by_keys, D, E = work.by_keys, work.head_size, work.value_size
    ROWS, LINES, THREADS, MT, NT = work.rows, work.lines, work.threads, work.row_tiles, work.columns
    WORDS = work.words
    A_ROW, B_ROW = work.pitches
    OWN_A, OWN_B, OTHER_A, OTHER_B, FACTS = work.parts
    SCANS, LINE_NOTES, _ = work.notes
    A_TILE, B_TILE, FACT_TILE = OTHER_A // 2, OTHER_B // 2, FACT_BYTES * LINES
    commit, arrived, opaque, shared_address = ptx.copy_commit, ptx.copy_wait0, ptx.opaque, ptx.shared_address
    copy, udiv = ptx.copy16, ptx.udiv
    pairs_size, halves_size = MT * NT * 4, MT * NT * 2
    a_size, b_size = MT * -(-D // 16) * 8, MT * -(-E // 16) * 8 if by_keys else 1
    fixed, drops, keep_factor = hooks.fixed, hooks.drops, hooks.keep_factor
    scaled, sloped = hooks.scores and not hooks.partial, hooks.slope is not None
    a_place, b_place = placer(A_ROW), placer(B_ROW)
    a_lane, b_lane = chunk_place(A_ROW), chunk_place(B_ROW)
    load_own_a, load_own_b = loader(THREADS, D, ROWS, A_ROW, a_place), loader(THREADS, E, ROWS, B_ROW, b_place)
    load_a, load_b = loader(THREADS, D, LINES, A_ROW, a_place), loader(THREADS, E, LINES, B_ROW, b_place)
    scores_of, gradients_of = product(work, D, A_ROW), product(work, E, B_ROW)
    add_a, add_b = sum_product(work, D, A_ROW), sum_product(work, E, B_ROW)
    store_a, store_b = storer(work, D, A_ROW), storer(work, E, B_ROW)
    next_tile = walker(hooks, THREADS, ROWS, LINES, by_keys)
    pairs = pairs_of(hooks, work)
    guard_a = guard_of(work.dtype, THREADS, LINES, MT, D, WORDS, a_place)
    guard_b = guard_of(work.dtype, THREADS, LINES, MT, E, WORDS, b_place)

    @device
    def remember(r, u, row, lane, noted, words):
        """Join what was noted of the queries that count for a row: a value in dout has spoiled their gradients."""
        guard_b.remember(pairs.spoiled(u, r), int32(row + 8 * r), lane, noted, words)

    remember_rows = unrolled(2 * MT, remember, "u, row, lane, noted, words")
    spoil_rows = unrolled(2 * MT, guard_b.spoil, "sums, first, lane, words")

    @device
    def place(count, heads):
        """Return b, the head and the first row: a causal mask's longest rows first."""
        blocks = uint32((count + ROWS - 1) // ROWS)
        n = uint32(cuda.blockIdx.x)
        head = udiv(n, blocks)
        block = uint32(n - uint32(head * blocks))
        if not by_keys:
            block = uint32(blocks - uint32(1) - block)
        b = udiv(head, uint32(heads))
        return int32(b), int32(head - uint32(b * uint32(heads))), int32(int32(block) * int32(ROWS))

    @device
    def load_facts(to, facts, b, h, H, M, i0, count, t):
        """Begin to bring the facts of `count` queries from `i0` on; zeros in place of those that are not there."""
        if t < count:
            first = (int64(b) * H + h) * M + i0
            copy(
                uint32(to + uint32(FACT_BYTES * t)),
                uint64(int64(facts) + FACT_BYTES * (first + int64(t))),
                uint32(FACT_BYTES) if i0 + t < M else uint32(0),
            )

    @device
    def load_lines(to_a, to_b, to_facts, a, b_array, facts, strides, b, h, head, H, M, j0, left, t):
        """Begin to bring a tile of the other side."""
        a = int64(a) + int64(b) * strides[6] + int64(head) * strides[7] + int64(j0) * strides[8]
        load_a(to_a, a, strides[8], int32(left - j0), t)
        b_array = int64(b_array) + int64(b) * strides[9] + int64(head) * strides[10] + int64(j0) * strides[11]
        load_b(to_b, b_array, strides[11], int32(left - j0), t)
        if by_keys:
            load_facts(to_facts, facts, b, h, H, M, j0, int32(LINES), t)

    def kernel(
        own_a, own_b, other_a, other_b, result_a, result_b, facts, strides, M, N, H, group, scale, factor, p
    ):  # fmt: skip
        memory = cuda.shared.array(0, types.uint16, alignment=1024)
        rows_a = uint32(shared_address(memory))
        rows_b, lines_a = uint32(rows_a + uint32(OWN_A)), uint32(rows_a + uint32(OWN_A + OWN_B))
        lines_b = uint32(lines_a + uint32(OTHER_A))
        told = uint32(lines_b + uint32(OTHER_B))
        scanned = uint32(told + uint32(FACTS))
        noted, spoils = uint32(scanned + uint32(SCANS)), uint32(scanned + uint32(SCANS + LINE_NOTES))
        t = int32(cuda.threadIdx.x)
        first = int32((t >> 5) * (16 * MT))  # the warp's first row in the block
        count, left, heads, parts = M, N, H, int32(1)
        if by_keys:
            count, left, heads, parts = N, M, int32(udiv(uint32(H), uint32(group))), group
        b, own_head, own = place(count, heads)
        if scaled:
            factor = float32(LOG2_E)

        scores = cuda.local.array(pairs_size, float32)
        gradients = cuda.local.array(pairs_size, float32)
        halves = cuda.local.array(halves_size, uint32)
        a_sums = cuda.local.array(a_size, float32)
        b_sums = cuda.local.array(b_size, float32)

        careful = int32(0)
        while True:
            for n in range(a_size):
                a_sums[n] = float32(0)
            for n in range(b_size):
                b_sums[n] = float32(0)
            if by_keys and careful != 0:
                guard_b.forget(spoils, int32(ROWS * WORDS))
            # Here and below, what is opaque is computed where it is needed: else it would be kept in registers.
            u = int32(opaque(uint32(t)))
            from_b, from_head = int64(opaque(uint32(b))), int64(opaque(uint32(own_head)))
            a_own = int64(own_a) + from_b * strides[0] + from_head * strides[1] + int64(own) * strides[2]
            b_own = int64(own_b) + from_b * strides[3] + from_head * strides[4] + int64(own) * strides[5]
            load_own_a(rows_a, a_own, strides[2], int32(count - own), u)
            load_own_b(rows_b, b_own, strides[5], int32(count - own), u)
            for part in range(parts):
                if by_keys:
                    h, other_head = int32(own_head * group + part), int32(own_head * group + part)
                else:
                    h, other_head = own_head, int32(udiv(uint32(own_head), uint32(group)))
                f = fixed(b, h, p)
                if not by_keys:
                    load_facts(told, facts, b, h, H, M, own, int32(ROWS), u)
                j, said = next_tile(int32(0), scanned, b, h, own, count, left, f, p)
                stage = int32(0)
                if j * LINES < left:
                    load_lines(
                        lines_a, lines_b, told, other_a, other_b, facts, strides, int32(opaque(uint32(b))),
                        int32(opaque(uint32(h))), int32(opaque(uint32(other_head))), H, M, int32(j * LINES), left,
                        int32(opaque(uint32(t))),
                    )  # fmt: skip
                commit()
                while j * LINES < left:
                    arrived()
                    cuda.syncthreads()
                    j0, now = int32(j * LINES), said
                    u = int32(opaque(uint32(t)))  # the thread again: else the compiler keeps all that follows from it
                    j, said = next_tile(int32(j + 1), scanned, b, h, own, count, left, f, p)
                    a_stage = uint32(lines_a + uint32(stage * A_TILE))
                    b_stage = uint32(lines_b + uint32(stage * B_TILE))
                    stage = int32(1 - stage)
                    if j * LINES < left:
                        load_lines(
                            uint32(lines_a + uint32(stage * A_TILE)), uint32(lines_b + uint32(stage * B_TILE)),
                            uint32(told + uint32(stage * FACT_TILE)), other_a, other_b, facts, strides,
                            int32(opaque(uint32(b))), int32(opaque(uint32(h))), int32(opaque(uint32(other_head))), H, M,
                            int32(j * LINES), left, u,
                        )  # fmt: skip
                        commit()
                    # Where a lane reads 8 x 8 matrices: of rows, of lines, and of lines whose columns lead.
                    low, high = int32(u & 15), int32((u & 31) >> 4)
                    line, half = int32((u & 7) + 8 * high), int32((u >> 3) & 1)
                    a_at = uint32(rows_a + uint32(first * A_ROW) + a_lane(low, high))
                    b_at = uint32(rows_b + uint32(first * B_ROW) + b_lane(low, high))
                    scores_of(scores, a_at, uint32(a_stage + a_lane(line, half)))
                    gradients_of(gradients, b_at, uint32(b_stage + b_lane(line, half)))
                    if careful != 0:
                        guard_a.clean(a_stage, noted)
                        if by_keys:
                            guard_b.clean(b_stage, noted)
                    u = int32(opaque(uint32(t)))
                    row, column = int32(own + first + ((u & 31) >> 2)), int32(j0 + 2 * (u & 3))
                    told_at = uint32(told + uint32(FACT_BYTES * (row - own)))
                    if by_keys:
                        told_at = uint32(told + uint32((1 - stage) * FACT_TILE) + uint32(2 * FACT_BYTES * (u & 3)))
                    pairs.weigh(scores, gradients, now, row, column, told_at, count, left, b, h, factor, scale, f, p)
                    u = int32(opaque(uint32(t)))
                    low, high = int32(u & 15), int32((u & 31) >> 4)
                    if by_keys:
                        pairs.pack(scores, halves)
                        add_b(b_sums, halves, uint32(b_stage + b_lane(low, high)))
                        if careful != 0:
                            remember_rows(gradients, int32(first + ((u & 31) >> 2)), u, noted, spoils)
                    pairs.pack(gradients, halves)
                    add_a(a_sums, halves, uint32(a_stage + a_lane(low, high)))
                arrived()
                cuda.syncthreads()
            unsound = guard_a.unsound(a_sums)
            if by_keys:
                unsound = int32(unsound | guard_b.unsound(b_sums))
            if careful != 0 or cuda.syncthreads_or(unsound) == 0:
                break
            careful = int32(1)

        # Read again, so that the loop does not keep what is needed after it.
        u = int32(opaque(uint32(t)))
        lane, first = int32(u & 31), int32((u >> 5) * 16 * MT)
        b, own_head = int32(opaque(uint32(b))), int32(opaque(uint32(own_head)))
        a_out = int64(result_a) + int64(b) * strides[12] + int64(own_head) * strides[13]
        store_a(a_sums, float32(1) if sloped else scale, first, lane, rows_a, own, count, a_out, strides[14])
        if by_keys:
            if careful != 0:
                spoil_rows(b_sums, first, lane, spoils)
            b_out = int64(result_b) + int64(b) * strides[15] + int64(own_head) * strides[16]
            kept = float32(1)
            if drops:
                kept = float32(keep_factor(p))
            store_b(b_sums, kept, first, lane, rows_b, own, count, b_out, strides[17])

    return kernel

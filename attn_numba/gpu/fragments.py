"""What both tensor-core kernels do around their matrix products, on fragments of 16 rows that a warp has in registers.

A fragment is what ``mma`` and ``wgmma`` leave of a product in a thread: element ``(t * columns + n) * 4 + 2 * e + c``
of a local array lies in row ``16 * t + 8 * e + lane // 4`` of the warp and in column ``8 * n + 2 * (lane % 4) + c``.
Below, r is ``2 * t + e``: one of the thread's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from attn_numba.gpu import ptx
from attn_numba.gpu.hooks import Hooks
from attn_numba.gpu.isolation import guard_of
from attn_numba.gpu.layout import Layout
from attn_numba.gpu.target import cuda, device, types
from attn_numba.gpu.walk import SOME, walker

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)

int32, int64, uint32, uint64, float32 = types.int32, types.int64, types.uint32, types.uint64, types.float32


def unrolled(count: int, step: Callable[..., Any], arguments: str) -> Callable[..., Any]:
    """Return a function for the device that calls ``step(n, ...)`` for each n below `count`, with these arguments.

    The compiler leaves loops with large bodies as they are, and an array is kept in registers only if each place in it
    that is read or written is a constant.
    """
    names: dict[str, Any] = {"step": step, "int32": int32}
    lines = [f"def every({arguments}):", *(f"    step(int32({n}), {arguments})" for n in range(count))]
    exec(compile("\n".join(lines), "<unrolled>", "exec"), names)
    return device(names["every"])


class Steps(NamedTuple):
    """Functions for the device, made for a layout and for the rules of a call."""

    place: Callable[..., Any]
    begin: Callable[..., Any]
    next_tile: Callable[..., Any]
    edit: Callable[..., Any]
    softmax: Callable[..., Any]
    drop: Callable[..., Any]
    shrink: Callable[..., Any]
    pack: Callable[..., Any]
    spoiled: Callable[..., Any]
    forget: Callable[..., Any]
    clean: Callable[..., Any]
    seen: Callable[..., Any]
    remember: Callable[..., Any]
    finish: Callable[..., Any]


def steps_of(hooks: Hooks, layout: Layout, value_place: Callable[..., Any], result_place: Callable[..., Any]) -> Steps:
    """Return the steps for a layout and for rules.

    Parameters
    ----------
    hooks : Hooks
        The rules as functions for the device.
    layout : Layout
        The sizes.
    value_place, result_place : device function (row, chunk) -> int
        Where 16 bytes of a row lie in shared memory, in bytes from the start: of a tile of values, and of the results,
        which are laid where the queries were. `chunk` counts 16 bytes.
    """
    ex2, lg2, rcp, fmax, exchange = ptx.ex2, ptx.lg2, ptx.rcp, ptx.fmax, ptx.shuffle_xor
    load, store, load4 = ptx.load_shared, ptx.store_shared, ptx.load_shared4
    store_out, store_float, udiv = ptx.store_global4, ptx.store_global_f32, ptx.udiv
    pack2 = ptx.pack_bfloat16 if layout.dtype == "bfloat16" else ptx.pack_float16
    allowed, score, kept, keep_factor = hooks.allowed, hooks.score, hooks.kept, hooks.keep_factor
    masked, scored, partial, drops = hooks.masks, hooks.scores, hooks.partial, hooks.drops
    sink, ROWS, MT, NT, DT = layout.sink, layout.rows, layout.row_tiles, layout.key_columns, layout.value_columns
    CHUNKS, ZERO = -(-layout.value_size // 8), 8 * layout.scan_words
    packed = MT * NT * 2
    NEGATIVE, ln2, log2e = float32(-math.inf), float32(LN_2), float32(LOG2_E)
    next_tile = walker(hooks, layout.threads, layout.rows, layout.keys)
    guard = guard_of(
        layout.dtype, layout.threads, layout.keys, MT, layout.value_size, layout.value_words, value_place
    )  # fmt: skip

    # --- where a block works ---

    @device
    def place(M, H, group):
        """Return b, h, the head of k and v, and the first row: a causal mask's longest rows first."""
        blocks = uint32((M + ROWS - 1) // ROWS)
        n = uint32(cuda.blockIdx.x)
        head = udiv(n, blocks)
        block = uint32(blocks - uint32(1) - uint32(n - uint32(head * blocks)))
        b = udiv(head, uint32(H))
        h = uint32(head - uint32(b * uint32(H)))
        return int32(b), int32(h), int32(udiv(h, uint32(group))), int32(int32(block) * int32(ROWS))

    @device
    def begin(words):
        """Write the zero that `edit` reads; a barrier comes before that."""
        if scored and cuda.threadIdx.x == 0:
            store(uint32(words + uint32(ZERO)), uint32(0))

    # --- scores ---

    @device
    def score_columns(n, s, row, column, M, N, b, h, f, p):
        """Give the pairs of a group of eight keys their new scores."""
        for c in range(2):
            j = int32(min(int32(column + 8 * n + c), int32(N - 1)))
            for r in range(2 * MT):
                i = int32(min(int32(row + 8 * r), int32(M - 1)))
                x = ((r >> 1) * NT + n) * 4 + (r & 1) * 2 + c
                s[x] = score(s[x], b, h, i, j, f, p)

    score_all = unrolled(NT, score_columns, "s, row, column, M, N, b, h, f, p")

    @device
    def choose(s, r, word, other):
        """Put another number in place of those of row `r` whose bit is not set."""
        for n in range(NT):
            x = ((r >> 1) * NT + n) * 4 + (r & 1) * 2
            if word & uint32(1 << (2 * n)) == uint32(0):
                s[x] = other
            if word & uint32(2 << (2 * n)) == uint32(0):
                s[x + 1] = other

    @device
    def exclude(s, row, column, M, N, b, h, f, p):
        """Make minus infinity of the scores of keys that are not seen, or not there."""
        for r in range(2 * MT):
            i = int32(min(int32(row + 8 * r), int32(M - 1)))
            word = uint32(0)
            for n in range(NT):
                for c in range(2):
                    j = int32(column + 8 * n + c)
                    if j < N and (not masked or allowed(b, h, i, j, f, p)):
                        word = uint32(word | uint32(uint32(1) << uint32(2 * n + c)))
            choose(s, r, word, NEGATIVE)

    @device
    def edit(s, said, row, column, M, N, words, b, h, f, p):
        """Apply the rules to a tile; `row` and `column` are this thread's first ones."""
        if scored and (said == SOME or not partial):
            # The zero is read after the product: else places are computed under it, in registers that it leaves none.
            column = int32(column + int32(load(uint32(words + uint32(ZERO)))))
            score_all(s, row, column, M, N, b, h, f, p)
        if said == SOME:
            exclude(s, row, column, M, N, b, h, f, p)

    @device
    def softmax(s, tops, totals, shrinks, factor):
        """Bring largest scores and sums up to date, leave weights in `s` and in `shrinks` what sums shrink by."""
        for r in range(2 * MT):
            first = (r >> 1) * NT * 4 + (r & 1) * 2
            top = tops[r]
            for n in range(NT):
                top = fmax(top, fmax(s[first + 4 * n], s[first + 4 * n + 1]))
            top = fmax(top, exchange(top, int32(1)))
            top = fmax(top, exchange(top, int32(2)))
            shift = float32(0) if top == NEGATIVE else top
            total = float32(0)
            if scored:  # a score may be as low as numbers go: its product with the factor is then minus infinity
                shrinks[r] = ex2((tops[r] - shift) * factor)
                for n in range(NT):
                    x = first + 4 * n
                    s[x] = ex2((s[x] - shift) * factor)
                    s[x + 1] = ex2((s[x + 1] - shift) * factor)
                    total += s[x] + s[x + 1]
            else:
                scaled = shift * factor
                shrinks[r] = ex2(tops[r] * factor - scaled)
                for n in range(NT):
                    x = first + 4 * n
                    s[x] = ex2(s[x] * factor - scaled)
                    s[x + 1] = ex2(s[x + 1] * factor - scaled)
                    total += s[x] + s[x + 1]
            tops[r] = top
            totals[r] = totals[r] * shrinks[r] + total

    @device
    def drop(s, row, column, M, b, h, f, p):
        """Put zeros in place of the weights that dropout drops."""
        if drops:
            for r in range(2 * MT):
                i = int32(min(int32(row + 8 * r), int32(M - 1)))
                word = uint32(0)
                for n in range(NT):
                    for c in range(2):
                        if kept(b, h, i, int32(column + 8 * n + c), f, p):
                            word = uint32(word | uint32(uint32(1) << uint32(2 * n + c)))
                choose(s, r, word, float32(0))

    @device
    def shrink(sums, shrinks):
        for t in range(MT):
            for n in range(DT):
                for x in range(4):
                    sums[(t * DT + n) * 4 + x] *= shrinks[t * 2 + (x >> 1)]

    @device
    def pack(s, halves):
        """Round weights to 16 bits, two a word: the words are a fragment of the left factor of the next product."""
        for n in range(packed):
            halves[n] = pack2(s[2 * n], s[2 * n + 1])

    # --- values that are not finite ---

    @device
    def spoiled(sums):
        """Whether a sum of any thread is not finite."""
        return cuda.syncthreads_or(guard.unsound(sums)) != 0

    @device
    def seen(s, r):
        """Return a bit for each key of a tile that counts in this thread's row `r`."""
        word = uint32(0)
        for n in range(NT):
            for c in range(2):
                if s[((r >> 1) * NT + n) * 4 + (r & 1) * 2 + c] != NEGATIVE:
                    word = uint32(word | uint32(1 << (2 * n + c)))
        return word

    # --- results ---

    @device
    def finish_row(r, sums, tops, totals, first, lane, stage, i0, M, lse, stats, extra, scale, p):
        """Write a row's numbers, and lay its sums over their total."""
        total = totals[r]
        total += exchange(total, int32(1))
        total += exchange(total, int32(2))
        top, factor = tops[r] * scale, float32(1)
        if sink and extra != NEGATIVE:
            new = fmax(top, extra)
            factor = ex2((top - new) * log2e)
            total = total * factor + ex2((extra - new) * log2e)
            top = new
        inverse = float32(0) if total == float32(0) else rcp(total)
        row = int32(first + 8 * r + (lane >> 2))
        if (lane & 3) == 0 and i0 + row < M:
            if lse != 0:
                answer = NEGATIVE if total == float32(0) else top + lg2(total) * ln2
                store_float(uint64(lse + 4 * int64(i0 + row)), answer)
            if stats != 0:
                store_float(uint64(stats + 8 * int64(i0 + row)), top)
                store_float(uint64(stats + 8 * int64(i0 + row) + 4), inverse)
        inverse = inverse * factor
        if drops:
            inverse = inverse * float32(keep_factor(p))
        for n in range(DT):
            x = ((r >> 1) * DT + n) * 4 + (r & 1) * 2
            at = uint32(stage + uint32(result_place(row, int32(n))) + uint32(4 * (lane & 3)))
            store(at, pack2(sums[x] * inverse, sums[x + 1] * inverse))

    spoil_rows = unrolled(2 * MT, guard.spoil, "sums, first, lane, words")
    row_arguments = "sums, tops, totals, first, lane, stage, i0, M, lse, stats, extra, scale, p"
    finish_rows = unrolled(2 * MT, finish_row, row_arguments)

    @device
    def finish(
        sums, tops, totals, first, lane, stage, careful, words, i0, M, out, out_row, lse, stats, extra, scale, p
    ):
        """Write the results of the warp's rows, of which `first` is the first."""
        cuda.syncthreads()  # queries, keys and values are not read any more: results are laid where they were
        if careful != 0:
            spoil_rows(sums, first, lane, words)
        finish_rows(sums, tops, totals, first, lane, stage, i0, M, lse, stats, extra, scale, p)
        cuda.syncwarp()
        for n in range(lane, MT * 16 * CHUNKS, 32):
            row, chunk = int32(first + n // CHUNKS), int32(n % CHUNKS)
            x = load4(uint32(stage + uint32(result_place(row, chunk))))
            if i0 + row < M:
                store_out(uint64(out + int64(i0 + row) * out_row + 16 * int64(chunk)), x[0], x[1], x[2], x[3])

    return Steps(
        place, begin, next_tile, edit, softmax, drop, shrink, pack, spoiled, guard.forget, guard.clean, seen,
        guard.remember, finish,
    )  # fmt: skip

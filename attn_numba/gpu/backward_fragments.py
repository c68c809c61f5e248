"""What the tensor-core kernels of gradients do with tiles: products, weights and gradients by scores, results.

A block owns rows of one side, q and dout or k and v, and walks over tiles of lines of the other side. A fragment is as
`fragments` has it, with the block's own rows as rows and the lines as columns: r is one of the thread's rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from attn_numba.gpu import ptx
from attn_numba.gpu.fragments import unrolled
from attn_numba.gpu.hooks import Hooks
from attn_numba.gpu.layout import padded
from attn_numba.gpu.target import cuda, device, types
from attn_numba.gpu.walk import SOME

__all__ = ["FACT_BYTES", "Pairs", "Work", "chunk_place", "pairs_of", "placer", "product", "storer", "sum_product"]

FACT_BYTES = 16  # of a query: four numbers of float32

int32, int64, uint32, uint64, float32 = types.int32, types.int64, types.uint32, types.uint64, types.float32


class Work(NamedTuple):
    """Sizes of a block's work that are compiled in."""

    dtype: str
    head_size: int  # D, a multiple of 8
    value_size: int  # E, a multiple of 8
    by_keys: bool  # whether the block owns keys, and not queries
    rows: int  # that the block owns
    lines: int  # of a tile, a multiple of 16
    threads: int
    row_tiles: int  # of 16 rows each, in a warp

    @property
    def columns(self) -> int:
        """Groups of eight lines in a tile."""
        return self.lines // 8

    @property
    def pitches(self) -> tuple[int, int]:
        """Bytes of a row in shared memory: of q and k, and of v and dout."""
        return 2 * padded(self.head_size), 2 * padded(self.value_size)

    @property
    def words(self) -> int:
        """Words that hold one bit for each number of a row."""
        return max(padded(self.head_size), padded(self.value_size)) // 32

    @property
    def parts(self) -> tuple[int, int, int, int, int]:
        """Bytes of shared memory for own rows of both arrays, two tiles of lines of both, and facts."""
        a, b = self.pitches
        facts = 2 * self.lines if self.by_keys else self.rows
        return self.rows * a, self.rows * b, 2 * self.lines * a, 2 * self.lines * b, FACT_BYTES * facts

    @property
    def notes(self) -> tuple[int, int, int]:
        """Bytes of shared memory for scans, for lines and for rows."""
        scans = 4 * (2 * (self.threads // 32) + 4)
        return scans, 4 * self.words * self.lines, 4 * self.words * self.rows if self.by_keys else 0

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block."""
        return sum((*self.parts, *self.notes))


# --- products ---


def placer(row_bytes: int) -> Callable[..., Any]:
    """Return the function for the device for the place of 16 bytes in swizzled rows."""

    @device
    def place(row, chunk):
        return row * row_bytes + ((chunk ^ (row & 7)) << 4)

    return place


def chunk_place(row_bytes: int) -> Callable[..., Any]:
    """Return (low, high) -> the place where a lane reads 8 x 8 matrices: row `low`, the first or the second chunk."""

    @device
    def place(low, high):
        return uint32(low * row_bytes + ((high ^ (low & 7)) << 4))

    return place


def _adder(dtype: str) -> Callable[..., Any]:
    mma = ptx.mma_bfloat16 if dtype == "bfloat16" else ptx.mma_float16

    @device
    def add(sums, x, a0, a1, a2, a3, b0, b1):
        found = mma((sums[x], sums[x + 1], sums[x + 2], sums[x + 3]), a0, a1, a2, a3, b0, b1)
        sums[x], sums[x + 1], sums[x + 2], sums[x + 3] = found

    return add


def product(work: Work, size: int, row_bytes: int) -> Callable[..., Any]:
    """Return ``multiply(s, own, lines)``: the products of own rows and lines, over their size.

    `own` and `lines` are where the lane reads its first matrices. Rows start at multiples of their length, a power of
    two, so the step to the next 32 bytes of a swizzled row is one exclusive or of the whole address.
    """
    load, add = ptx.load_matrices, _adder(work.dtype)
    steps, NT, MT, count = -(-size // 16), work.columns, work.row_tiles, work.row_tiles * work.columns * 4
    step_bytes = 16 * row_bytes

    @device
    def multiply(s, own, lines):
        for n in range(count):
            s[n] = float32(0)
        for d in range(steps):
            from_rows, from_lines = uint32(own ^ uint32(32 * d)), uint32(lines ^ uint32(32 * d))
            a = load(from_rows)
            if MT == 2:
                a2 = load(uint32(from_rows + uint32(step_bytes)))
            for n in range(NT // 2):
                c = load(uint32(from_lines + uint32(n * step_bytes)))
                add(s, 8 * n, a[0], a[1], a[2], a[3], c[0], c[1])
                add(s, 8 * n + 4, a[0], a[1], a[2], a[3], c[2], c[3])
                if MT == 2:
                    x = 4 * NT + 8 * n
                    add(s, x, a2[0], a2[1], a2[2], a2[3], c[0], c[1])
                    add(s, x + 4, a2[0], a2[1], a2[2], a2[3], c[2], c[3])

    return multiply


def sum_product(work: Work, size: int, row_bytes: int) -> Callable[..., Any]:
    """Return ``add_lines(sums, halves, lines)``: adds numbers of 16 bits, one for each pair, times the lines.

    `halves` are a fragment of the left factor, two numbers a word; `lines` is where the lane reads its first matrices.
    """
    load, add = ptx.load_matrices_transposed, _adder(work.dtype)
    NT, MT, DT, line_steps = work.columns, work.row_tiles, -(-size // 16) * 2, work.lines // 16
    step_bytes = 16 * row_bytes

    @device
    def add_lines(sums, halves, lines):
        for n in range(line_steps):
            for e in range(DT // 2):
                c = load(uint32(uint32(lines ^ uint32(32 * e)) + uint32(n * step_bytes)))
                x, w = 8 * e, 4 * n
                add(sums, x, halves[w], halves[w + 1], halves[w + 2], halves[w + 3], c[0], c[1])
                add(sums, x + 4, halves[w], halves[w + 1], halves[w + 2], halves[w + 3], c[2], c[3])
                if MT == 2:
                    x, w = 4 * DT + 8 * e, 2 * NT + 4 * n
                    add(sums, x, halves[w], halves[w + 1], halves[w + 2], halves[w + 3], c[0], c[1])
                    add(sums, x + 4, halves[w], halves[w + 1], halves[w + 2], halves[w + 3], c[2], c[3])

    return add_lines


# --- pairs ---


class Pairs(NamedTuple):
    """Functions for the device, of a tile's pairs.

    ``weigh(s, u, said, row, column, facts, count, left, b, h, factor, scale, f, p)`` makes of scores `s` weights, after
    dropout but for its factor, and of the gradients by weights `u` those by products; `row` and `column` are the
    thread's first ones, `facts` where it reads the first fact, `count` and `left` how many rows and lines there are.
    ``spoiled(u, r)`` is a bit for each line with which the row `r` has a gradient that is not finite. ``pack(s,
    halves)`` rounds to 16 bits, two numbers a word.
    """

    weigh: Callable[..., Any]
    spoiled: Callable[..., Any]
    pack: Callable[..., Any]


def pairs_of(hooks: Hooks, work: Work) -> Pairs:
    """Return the functions for some rules."""
    pack2 = ptx.pack_bfloat16 if work.dtype == "bfloat16" else ptx.pack_float16
    masked, partial, allowed, by_keys = hooks.masks, hooks.partial, hooks.allowed, work.by_keys
    NT, MT = work.columns, work.row_tiles
    count_of_words = MT * NT * 2
    ARGUMENTS = "s, u, row, column, facts, count, left, b, h, factor, scale, f, p"

    def groups(edited):
        """Return the function that gives all pairs of a tile their weights and gradients; `edited`, by the rules."""
        pair, load = _pair_of(hooks, by_keys, edited), ptx.load_shared_floats

        @device
        def row_group(r, s, u, row, column, facts, count, left, b, h, factor, scale, f, p):
            fact = load(uint32(facts + uint32(8 * FACT_BYTES * r)))
            own = int32(min(int32(row + 8 * r), int32(count - 1)))
            for n in range(NT):
                for c in range(2):
                    other = int32(min(int32(column + 8 * n + c), int32(left - 1)))
                    x = ((r >> 1) * NT + n) * 4 + (r & 1) * 2 + c
                    pair(x, s, u, own, other, fact[0], fact[1], fact[2], b, h, factor, scale, f, p)

        @device
        def line_group(n, s, u, row, column, facts, count, left, b, h, factor, scale, f, p):
            for c in range(2):
                fact = load(uint32(facts + uint32(FACT_BYTES * (8 * n + c))))
                other = int32(min(int32(column + 8 * n + c), int32(left - 1)))
                for r in range(2 * MT):
                    own = int32(min(int32(row + 8 * r), int32(count - 1)))
                    x = ((r >> 1) * NT + n) * 4 + (r & 1) * 2 + c
                    pair(x, s, u, own, other, fact[0], fact[1], fact[2], b, h, factor, scale, f, p)

        return unrolled(NT, line_group, ARGUMENTS) if by_keys else unrolled(2 * MT, row_group, ARGUMENTS)

    edited = groups(True)
    untouched = groups(False) if partial else edited

    @device
    def counts(own, other, b, h, f, p):
        if by_keys:
            return allowed(b, h, other, own, f, p)
        return allowed(b, h, own, other, f, p)

    @device
    def exclude(s, u, row, column, count, left, b, h, f, p):
        """Put zeros where a pair does not count, whatever became of it."""
        for r in range(2 * MT):
            own, word = int32(min(int32(row + 8 * r), int32(count - 1))), uint32(0)
            for n in range(NT):
                for c in range(2):
                    other = int32(column + 8 * n + c)
                    if other < left and (not masked or counts(own, other, b, h, f, p)):
                        word = uint32(word | uint32(uint32(1) << uint32(2 * n + c)))
            for n in range(NT):
                x = ((r >> 1) * NT + n) * 4 + (r & 1) * 2
                if word & uint32(1 << (2 * n)) == uint32(0):
                    s[x] = float32(0)
                    u[x] = float32(0)
                if word & uint32(2 << (2 * n)) == uint32(0):
                    s[x + 1] = float32(0)
                    u[x + 1] = float32(0)

    @device
    def weigh(s, u, said, row, column, facts, count, left, b, h, factor, scale, f, p):
        if partial:
            if said == SOME:
                edited(s, u, row, column, facts, count, left, b, h, factor, scale, f, p)
            else:
                untouched(s, u, row, column, facts, count, left, b, h, factor, scale, f, p)
        else:
            edited(s, u, row, column, facts, count, left, b, h, factor, scale, f, p)
        if said == SOME:
            exclude(s, u, row, column, count, left, b, h, f, p)

    @device
    def spoiled(u, r):
        word = uint32(0)
        for n in range(NT):
            for c in range(2):
                x = u[((r >> 1) * NT + n) * 4 + (r & 1) * 2 + c]
                if x - x != float32(0):
                    word = uint32(word | uint32(1 << (2 * n + c)))
        return word

    @device
    def pack(s, halves):
        for n in range(count_of_words):
            halves[n] = pack2(s[2 * n], s[2 * n + 1])

    return Pairs(weigh, spoiled, pack)


def _pair_of(hooks: Hooks, by_keys: bool, edited: bool) -> Callable[..., Any]:
    """Return the function of one pair: its weight, and its gradient by the product; `edited` by the rules or not."""
    ex2, score, slope, kept, keep_factor = ptx.ex2, hooks.score, hooks.slope, hooks.kept, hooks.keep_factor
    scored, sloped, drops = hooks.scores, hooks.slope is not None, hooks.drops
    scores, slopes, scales = scored and edited, sloped and edited, sloped and not edited
    NEGATIVE = float32(-math.inf)

    @device
    def pair(x, s, u, own, other, shift, inverse, mean, b, h, factor, scale, f, p):
        i, j = (other, own) if by_keys else (own, other)
        raw, dw = s[x], u[x]
        y = raw
        if scores:
            y = float32(score(raw, b, h, i, j, f, p))
        # As the forward pass has it: a score may be as low as numbers go.
        w = ex2((y - shift) * factor) if scored else ex2(y * factor - shift)
        w = float32(w * inverse)
        used = w
        if drops:
            if kept(b, h, i, j, f, p):
                dw = float32(dw * float32(keep_factor(p)))
            else:
                dw, used = float32(0), float32(0)
        ds = float32(w * float32(dw - mean))
        if slopes:
            ds = float32(slope(raw, ds, b, h, i, j, f, p))
        if scales:
            ds = float32(ds * scale)
        if scores and y == NEGATIVE:  # it is not there, and its slope may be anything
            used, ds = float32(0), float32(0)
        s[x], u[x] = used, ds

    return pair


# --- results ---


def storer(work: Work, size: int, row_bytes: int) -> Callable[..., Any]:
    """Return ``store(sums, factor, first, lane, stage, own, count, out, out_row)``: writes the rows of a warp.

    `first` is the warp's first row in the block and `own` the block's, of `count`; `stage` is shared memory for the
    block's rows, of which a warp uses its own.
    """
    store, load4, store_out = ptx.store_shared, ptx.load_shared4, ptx.store_global4
    pack2 = ptx.pack_bfloat16 if work.dtype == "bfloat16" else ptx.pack_float16
    place, MT, DT, CHUNKS = placer(row_bytes), work.row_tiles, -(-size // 16) * 2, size // 8

    @device
    def lay(r, sums, factor, first, lane, stage):
        row = int32(first + 8 * r + (lane >> 2))
        for n in range(DT):
            x = ((r >> 1) * DT + n) * 4 + (r & 1) * 2
            at = uint32(stage + uint32(place(row, int32(n))) + uint32(4 * (lane & 3)))
            store(at, pack2(sums[x] * factor, sums[x + 1] * factor))

    lay_rows = unrolled(2 * MT, lay, "sums, factor, first, lane, stage")

    @device
    def store_rows(sums, factor, first, lane, stage, own, count, out, out_row):
        lay_rows(sums, factor, first, lane, stage)
        cuda.syncwarp()
        for n in range(lane, MT * 16 * CHUNKS, 32):
            row, chunk = int32(first + n // CHUNKS), int32(n % CHUNKS)
            x = load4(uint32(stage + uint32(place(row, chunk))))
            if own + row < count:
                store_out(uint64(out + int64(own + row) * out_row + 16 * int64(chunk)), x[0], x[1], x[2], x[3])

    return store_rows

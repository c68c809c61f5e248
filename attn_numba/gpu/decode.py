"""Decode on cards of any kind: few query rows of each sequence against all that is cached, keys and values read once.

A block of threads computes one split of a sequence's keys for up to `Options.rows` query rows of one key head: those of
all heads that it serves, so each key and value is read once for them. Rows are read in their pages, and numbers are
made of their codes in registers (`stored`). First all scores of the split, the threads of a key side by side along its
row; then, row by row, the largest score, weights and their sum; then weighted values, the threads of a value side by
side. A second kernel adds up the splits of a row in their order.

Splits begin at fixed multiples of `Cut.split`; a product is summed in a thread from the left to the right and then from
thread to thread; values in a thread over every so many keys and then from thread to thread. So the bits of a row depend
on nothing but its own queries and keys. A key that a row does not see has weight -1 and is left out.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from attn_numba.gpu.elements import element_type, reader, writer
from attn_numba.gpu.hooks import Bound, Hooks
from attn_numba.gpu.program import Program
from attn_numba.gpu.stored import Stored
from attn_numba.gpu.target import SIMULATED, cuda, device, language, types

__all__ = ["USUAL", "Cut", "Options", "grid", "merge_grid", "merging", "options_of", "splitting"]

NUMBERS = 64  # sums of a thread for its part of the values, at most
MOST_ROWS = 8
MOST_SHARED = 47 * 1024  # bytes


class Cut(NamedTuple):
    """How work is cut."""

    split: int  # keys of a block; one begins at a multiple of them
    threads: int
    batch: int  # keys whose products are summed across threads at a time


USUAL = Cut(512, 128, 64)


class Options(NamedTuple):
    """What the kernels depend on beside the rules."""

    keys: Stored
    values: Stored
    q: str  # name of the numbers of q and of the output
    rows: int  # query rows of a block
    cut: Cut
    sink: bool
    lse: bool
    weights: bool

    @property
    def key_lanes(self) -> int:
        """Threads along a key."""
        return _power(min(self.keys.pieces, 32, self.cut.threads))

    @property
    def value_lanes(self) -> int:
        """Threads along a value: each has one piece of it, of all pieces or of `passes` equal shares."""
        return _power(min(self.values.pieces, self.cut.threads))

    @property
    def room(self) -> int:
        """Numbers that threads leave for each other."""
        values = self.cut.threads * self.values.numbers
        return self.rows * max(self.cut.batch * self.key_lanes, values, self.cut.threads // self.rows)

    @property
    def shared(self) -> int:
        """Numbers in shared memory."""
        return self.room + self.rows * (self.cut.split + self.keys.pieces * self.keys.numbers)

    @property
    def passes(self) -> int:
        return -(-self.values.pieces // self.value_lanes)


def options_of(keys: Stored, values: Stored, q: str, rows: int, *, sink: bool, lse: bool, weights: bool) -> Options:
    """Return the options of a call with so many query rows to a key head."""
    fitting = max(1, NUMBERS // max(keys.numbers, values.numbers))
    found = min(MOST_ROWS, fitting, 1 << max(0, rows - 1).bit_length())
    while True:
        options = Options(keys, values, q, found, USUAL, sink, lse, weights)
        if found == 1 or options.shared * (8 if q == "float64" else 4) <= MOST_SHARED:
            return options
        found //= 2


def _power(n: int) -> int:
    """Return the least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def grid(options: Options, B: int, Hk: int, rows: int, longest: int) -> tuple[int, int, int]:
    """Return the blocks of the first kernel: splits, and sequences with their key heads and blocks of rows."""
    return -(-longest // options.cut.split), B * Hk * -(-rows // options.rows), 1


def merge_grid(B: int, H: int, M: int) -> tuple[int, int, int]:
    """Return the blocks of the second kernel: rows."""
    return B * H * M, 1, 1


def resident(options: Options) -> int:
    """Return how many blocks a multiprocessor should hold: as many as leave all sums in registers."""
    return 4 if options.rows * max(options.keys.numbers, options.values.numbers) <= NUMBERS // 2 else 3


def splitting(hooks: Hooks, bound: Bound, options: Options) -> Program:
    """Return the kernel that computes splits."""
    real = getattr(types, hooks.number)
    signature = (
        types.Array(element_type(options.q), 4, "A"),
        *(types.Array(stored.element, 1, "C") for stored in (options.keys, options.values)),
        types.Array(types.int32, 2, "C"), types.Array(types.int32, 1, "C"),
        *(types.Array(real, 1, "C"),) * 2, types.CPointer(real), bound.signature(), real,
        *(types.int32,) * 4,
    )  # fmt: skip
    make = functools.partial(make_splitting, hooks, options)
    return Program(
        "decode", tuple(options), hooks, make, signature, (options.cut.threads,), resident(options), 0, False
    )


def merging(hooks: Hooks, options: Options) -> Program:
    """Return the kernel that adds up splits."""
    real = getattr(types, hooks.number)
    signature = (
        *(types.Array(real, 1, "C"),) * 2, types.Array(types.int32, 1, "C"),
        types.Array(element_type(options.q), 4, "A"), types.CPointer(real), types.CPointer(real),
        types.CPointer(types.float64), types.int32,
    )  # fmt: skip
    make = functools.partial(make_merging, np.dtype(hooks.number), options)
    return Program("decode_merge", (*options, hooks.number), None, make, signature, (options.cut.threads,), 4, 0, False)


def make_splitting(hooks: Hooks, options: Options) -> Callable[..., None]:
    """Return the first kernel, a plain function.

    ``kernel(q, keys, values, table, lengths, parts, facts, weights, p, scale, page, served, key_heads, N)``: q is
    (B, H, M, D), `keys` and `values` are the cache's pages (pages, key heads, tokens, row) as flat arrays, `table`
    (B, pages) names each sequence's. It writes to `parts` (splits, B, H, M, E) sums of weighted values, to `facts`
    (splits, B, H, M, 2) the largest score and the sum of weights, to `weights` (B, H, M, N) scores.
    """
    names = language(np.dtype(hooks.number))
    real, int32, exp, product = (names[name] for name in ("number", "int32", "exp", "product"))
    fixed_masks, scored, partial = hooks.masks, hooks.scores, hooks.partial
    scaled = scored and not partial
    allowed, plain, score, fixed, kind_of = hooks.allowed, hooks.plain, hooks.score, hooks.fixed, hooks.kind
    keys_as, values_as, R, split, threads = (
        options.keys,
        options.values,
        options.rows,
        options.cut.split,
        options.cut.threads,
    )
    D, E, batch, writes = keys_as.size, values_as.size, options.cut.batch, options.weights
    lanes, pieces, count, step = options.key_lanes, keys_as.pieces, keys_as.numbers, keys_as.step
    across, value_pieces, value_count, value_step = (
        options.value_lanes, values_as.pieces, values_as.numbers, values_as.step,
    )  # fmt: skip
    passes, beside, value_beside = options.passes, threads // lanes, threads // across
    padded, rotated = pieces * count, keys_as.block
    rotation = 1 / math.sqrt(rotated) if rotated else 1.0
    sums_size, search = R * value_count, max(1, threads // R)
    read, fill = reader(options.q), keys_as.reading(np.dtype(hooks.number))
    fill_values, place = values_as.reading(np.dtype(hooks.number)), values_as.place()
    queries_shape, scores_shape = (R, padded), (R, split)
    room = options.room

    @device
    def edited(x, b, h, i, j, whole, factor, f, p):
        """Return a product as the final score of a pair: minus infinity where it does not count."""
        seen = True
        if partial:
            if not whole and not plain(b, h, i, j, f, p):
                seen = allowed(b, h, i, j, f, p)
                if seen:
                    x = real(score(x, b, h, i, j, f, p))
        else:
            if fixed_masks and not whole:
                seen = allowed(b, h, i, j, f, p)
            if scored and seen:
                x = real(score(x, b, h, i, j, f, p))
        if not scaled:
            x = real(product(x, factor))
        return x if seen else real(-math.inf)

    def kernel(q, keys, values, table, lengths, parts, facts, weights, p, scale, page, served, key_heads, N):
        qs = cuda.shared.array(queries_shape, real)
        ss = cuda.shared.array(scores_shape, real)
        left = cuda.shared.array(room, real)
        flags = cuda.shared.array(1, types.int32)
        found = cuda.local.array(4, types.uint32)
        x = cuda.local.array(count, real)
        values_of = cuda.local.array(value_count, real)
        sums = cuda.local.array(sums_size, real)

        t = cuda.threadIdx.x
        B, H, M = q.shape[0], q.shape[1], q.shape[2]
        rows = served * M
        blocks = (rows + R - 1) // R
        head, r0 = cuda.blockIdx.y // blocks, cuda.blockIdx.y % blocks * R
        b, hk = int32(head // key_heads), int32(head % key_heads)
        length = lengths[b]
        j0 = cuda.blockIdx.x * split
        j1 = min(j0 + split, length)
        mine = min(R, rows - r0)
        if j0 >= length:
            return

        # --- does any row see anything? ---
        if t == 0:
            flags[0] = 0
        cuda.syncthreads()
        if t < mine:
            h, i = int32(hk * served + (r0 + t) // M), int32((r0 + t) % M)
            if kind_of(b, h, i, int32(i + 1), int32(j0), int32(j1), fixed(b, h, p), p) != 0:
                flags[0] = 1
        for n in range(t, R * padded, threads):
            r, d = n // padded, n % padded
            value = real(0)
            if r < mine and d < D:
                value = real(read(q[b, hk * served + (r0 + r) // M, (r0 + r) % M, d]))
            qs[r, d] = value
        cuda.syncthreads()
        if rotated:
            width = 1
            while width < rotated:
                for n in range(t, R * (D // 2), threads):
                    r, pair = n // (D // 2), n % (D // 2)
                    d = pair // width * 2 * width + pair % width
                    a, c = qs[r, d], qs[r, d + width]
                    qs[r, d] = a + c
                    qs[r, d + width] = a - c
                cuda.syncthreads()
                width *= 2
            for n in range(t, R * D, threads):
                qs[n // D, n % D] = qs[n // D, n % D] * real(rotation)
            cuda.syncthreads()
        nothing = flags[0] == 0

        # --- scores ---
        lane = t % lanes
        for first in range(j0, j1, batch):
            if nothing:
                break
            for k in range(t // lanes, batch, beside):
                j = first + k
                for r in range(R):
                    left[(k * R + r) * lanes + lane] = real(0)
                if j < j1:
                    row = (table[b, j // page] * key_heads + hk) * page + j % page
                    for r in range(R):
                        sums[r] = real(0)
                    for piece in range(lane, pieces, lanes):
                        fill(keys, row * step, piece, found, x)
                        for r in range(R):
                            total = sums[r]
                            for n in range(count):
                                total += qs[r, piece * count + n] * x[n]
                            sums[r] = total
                    for r in range(R):
                        left[(k * R + r) * lanes + lane] = sums[r]
            cuda.syncthreads()
            for n in range(t, batch * R, threads):
                k, r = n // R, n % R
                if first + k < j1:
                    total = real(0)
                    for other in range(lanes):
                        total += left[n * lanes + other]
                    ss[r, first + k - j0] = total
            cuda.syncthreads()

        # --- weights ---
        r, part = t // search, t % search
        top = real(-math.inf)
        if r < mine:
            h, i = int32(hk * served + (r0 + r) // M), int32((r0 + r) % M)
            f = fixed(b, h, p)
            whole = kind_of(b, h, i, int32(i + 1), int32(j0), int32(j1), f, p) == 2
            for j in range(j0 + part, j1, search):
                final = real(-math.inf)
                if not nothing:
                    final = edited(ss[r, j - j0], b, h, i, int32(j), whole, scale, f, p)
                ss[r, j - j0] = final
                if writes:
                    weights[((b * H + h) * M + i) * N + j] = final
                top = final if final > top else top
            left[r * search + part] = top
        cuda.syncthreads()
        total = real(0)
        if r < mine:
            for other in range(search):
                top = real(left[r * search + other]) if left[r * search + other] > top else top
            shift = top if top > -math.inf else real(0)
            for j in range(part, j1 - j0, search):
                weight = real(-1)
                if ss[r, j] != -math.inf:
                    weight = exp(ss[r, j] - shift)
                    total += weight
                ss[r, j] = weight
        cuda.syncthreads()
        if r < mine:
            left[r * search + part] = total
        cuda.syncthreads()
        if r < mine and part == 0:
            total = real(0)
            for other in range(search):
                total += left[r * search + other]
            at = (cuda.blockIdx.x * B * H + b * H + hk * served) * M + r0 + r
            facts[2 * at] = top
            facts[2 * at + 1] = total
        cuda.syncthreads()
        if nothing:
            return

        # --- values ---
        lane, group = t % across, t // across
        for turn in range(passes):
            piece = turn * across + lane
            for n in range(sums_size):
                sums[n] = real(0)
            if piece < value_pieces:
                for j in range(j0 + group, j1, value_beside):
                    row = (table[b, j // page] * key_heads + hk) * page + j % page
                    fill_values(values, row * value_step, piece, found, values_of)
                    for r in range(R):
                        weight = ss[r, j - j0]
                        if r < mine and not weight < 0:
                            for n in range(value_count):
                                sums[r * value_count + n] += weight * values_of[n]
            for r in range(R):
                for n in range(value_count):
                    left[((group * R + r) * across + lane) * value_count + n] = sums[r * value_count + n]
            cuda.syncthreads()
            for m in range(t, R * across * value_count, threads):
                r, rest = m // (across * value_count), m % (across * value_count)
                other, n = rest // value_count, rest % value_count
                e = place(turn * across + other, n)
                if r < mine and turn * across + other < value_pieces and e < E:
                    total = real(0)
                    for g in range(value_beside):
                        total += left[((g * R + r) * across + other) * value_count + n]
                    at = (cuda.blockIdx.x * B * H + b * H + hk * served) * M + r0 + r
                    parts[at * E + e] = total
            cuda.syncthreads()

    return kernel


def make_merging(number: np.dtype[Any], options: Options) -> Callable[..., None]:
    """Return the second kernel, a plain function.

    ``kernel(parts, facts, lengths, out, lse, weights, sink, N)`` writes each row of `out` (B, H, M, E) and of
    `lse` (B, H, M), and makes weights of the scores in `weights`. A part whose split has no score was not written.
    """
    names = language(number)
    real = names["number"]
    wide = (np if SIMULATED else types).float64
    values_as, split, threads = options.values, options.cut.split, options.cut.threads
    E, rotated = values_as.size, values_as.block
    rotation = 1 / math.sqrt(rotated) if rotated else 1.0
    has_sink, writes_lse, writes_weights = options.sink, options.lse, options.weights
    write, room = writer(options.q), E

    def kernel(parts, facts, lengths, out, lse, weights, sink, N):
        row_sums = cuda.shared.array(room, real)
        t, row = cuda.threadIdx.x, cuda.blockIdx.x
        H, M = out.shape[1], out.shape[2]
        rows = out.shape[0] * H * M
        b, h, i = row // (H * M), row // M % H, row % M
        length = lengths[b]
        splits = (length + split - 1) // split
        top = wide(-math.inf)
        for s in range(splits):
            other = wide(facts[2 * (s * rows + row)])
            top = other if other > top else top
        if has_sink:
            extra = sink[b * H + h]
            top = extra if extra > top else top
        shift, total = top if top > -math.inf else wide(0), wide(0)
        for s in range(splits):
            total += wide(facts[2 * (s * rows + row) + 1]) * math.exp(wide(facts[2 * (s * rows + row)]) - shift)
        if has_sink:
            total += math.exp(sink[b * H + h] - shift)
        inverse = wide(1) / total if total != 0 else wide(0)
        for e in range(t, E, threads):
            found = wide(0)
            for s in range(splits):
                at = s * rows + row
                if facts[2 * at + 1] != 0:  # else there is nothing, or NaN
                    found += wide(parts[at * E + e]) * math.exp(wide(facts[2 * at]) - shift)
            row_sums[e] = real(found * inverse)
        cuda.syncthreads()
        if rotated:
            width = 1
            while width < rotated:
                for pair in range(t, E // 2, threads):
                    e = pair // width * 2 * width + pair % width
                    a, c = row_sums[e], row_sums[e + width]
                    row_sums[e] = a + c
                    row_sums[e + width] = a - c
                cuda.syncthreads()
                width *= 2
        for e in range(t, E, threads):
            out[b, h, i, e] = write(real(row_sums[e] * real(rotation)))
        if writes_lse and t == 0:
            lse[row] = real(top + math.log(total)) if total != 0 else real(-math.inf)
        if writes_weights:
            for j in range(t, N, threads):
                at = row * N + j
                weight = real(0)
                if j < length and weights[at] != -math.inf:
                    weight = real(math.exp(wide(weights[at]) - shift) * inverse)
                weights[at] = weight

    return kernel

"""Run sequences of unequal lengths as one call: each is one of its own for the kernels, all have one team of workers.

A worker goes through the state blocks of all sequences, the longest first, and takes what items are left of each. So
nobody waits between sequences, and each has the bits that it has alone.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from attn_numba.cpu import forward, whole_rows
from attn_numba.cpu.binding import bind
from attn_numba.cpu.choices import FORWARD, chosen
from attn_numba.cpu.compilation import compile_worker
from attn_numba.cpu.engine import NORMALIZERS, SMALL, address, in_place, prepared, sink_of, streams
from attn_numba.cpu.launch import Team
from attn_numba.cpu.plan import plan_of, plan_of_whole_rows, unit_of
from attn_numba.cpu.state import STATE_BYTES, Call, WholeRows, borrow, give_back, with_room, write_records
from attn_numba.cpu.tiles import function_pointer, load_word
from attn_numba.parallel import thread_count
from attn_numba.problem import Problem
from attn_numba.rules import Sizes

MANY = 4  # sequences to a thread from which on their items need not be small to go round

call_worker = function_pointer(2, False)  # (state, worker number)


def _several(states, number):
    """Run a worker on one state after the other: its address, the number of states, their addresses."""
    worker, count = load_word(states), load_word(states + 8)
    for n in range(count):
        call_worker(worker, load_word(states + 16 + 8 * n), number)


def prepare() -> None:
    """Compile what goes from sequence to sequence, or load it from the disk cache."""
    compile_worker(_several)


class Part(NamedTuple):
    """One sequence: its number, its first rows of q and of k, its sizes and what follows from them."""

    b: int
    first_query: int
    first_key: int
    sizes: Sizes
    layout: bytes
    part_bytes: int
    whole: WholeRows | None


def attention(
    problem: Problem, query_starts: np.ndarray, key_starts: np.ndarray, out: np.ndarray, lse: np.ndarray | None = None
) -> None:
    """Compute sequences that lie one after the other into `out` (1, H, T, E) and `lse` (1, H, T).

    The problem's q, k, v are (1, H, T, D), (1, Hk, S, D) and (1, Hk, S, E), its sizes and rules those of B sequences of
    the largest lengths.
    """
    inner = prepared(problem)
    result = out if inner.dtype == problem.dtype else np.empty(out.shape, inner.q.dtype)
    lengths, key_lengths = np.diff(query_starts), np.diff(key_starts)
    s = inner.sizes
    adds = int((lengths * key_lengths).sum()) * s.H * (s.D + s.E)
    threads = thread_count()[0] if adds > SMALL else 1
    with Team(threads - 1) as team:
        bound = bind(inner)
        tiled = streams(inner)
        unit = unit_of(inner.dtype, not tiled or inner.dropout is not None)
        share = 1 if MANY * threads <= s.B else threads
        parts = []
        for b in sorted(range(s.B), key=lambda b: -lengths[b] * key_lengths[b]):
            sizes = s._replace(B=1, M=int(lengths[b]), N=int(key_lengths[b]))
            if not sizes.M:
                continue
            whole = None
            if tiled:
                choice = chosen(FORWARD, inner.dtype, sizes, threads, bound.kind)
                plan = plan_of(unit, sizes, share, in_place(inner, unit), bound.run_count, choice)
            else:
                plan = plan_of_whole_rows(unit, sizes, share, in_place(inner, unit))
                whole = _whole_rows(inner, plan.keys_bytes, sizes.M)
            first = int(query_starts[b]), int(key_starts[b])
            parts.append(Part(b, *first, sizes, plan.layout, plan.part_bytes, whole))
        if tiled:
            worker = compile_worker(forward.WORKERS[unit.name, bound.run_count > 0, False])
        else:
            worker = compile_worker(whole_rows.WORKERS[unit.name])
        rows = None if lse is None else np.empty(lse.shape[1] * lse.shape[2], inner.accumulator)
        if parts:
            _run(team, threads, worker, inner, bound, parts, result, rows)
    if lse is not None:
        for part in parts:  # each has written its rows head by head
            first, count = part.first_query, part.sizes.M
            lse[0, :, first : first + count] = rows[first * s.H : (first + count) * s.H].reshape(s.H, count)
    if result is not out:
        out[...] = result


def _run(team: Team, threads: int, worker: int, problem: Problem, bound, parts: list[Part], out, rows) -> None:
    room = max(part.part_bytes for part in parts)
    sink, word = sink_of(problem), problem.accumulator.itemsize
    hidden = None if problem.score.dots else np.ascontiguousarray(problem.score.w, problem.accumulator)
    blocks = np.empty(len(parts) * STATE_BYTES + 64, np.uint8)
    start = -blocks.ctypes.data % 64
    memory, first = memoryview(blocks)[start:], blocks.ctypes.data + start
    space = borrow(threads * room)
    q, k, v = problem.q, problem.k, problem.v
    for n, part in enumerate(parts):
        s = part.sizes
        lse = 0 if rows is None else address(rows) + (part.first_query - part.b * s.M) * s.H * word
        call = Call(
            bound.factor, space.parts,
            address(q) + part.first_query * q.strides[2], 0, *q.strides[1:],
            address(k) + part.first_key * k.strides[2], 0, *k.strides[1:],
            address(v) + part.first_key * v.strides[2], 0, *v.strides[1:],
            address(out) + part.first_query * out.strides[2], 0, *out.strides[1:],
            lse, 0, 0, address(sink), *bound.hooks, bound.address, part.b,
        )  # fmt: skip
        whole = part.whole and part.whole._replace(
            hidden=address(hidden), hidden_h=0 if hidden is None or hidden.ndim == 1 else hidden.strides[0]
        )
        write_records(memory, n * STATE_BYTES, call, with_room(part.layout, room), whole)
    states = np.array([worker, len(parts), *(first + n * STATE_BYTES for n in range(len(parts)))], np.int64)
    team.run(compile_worker(_several), address(states), threads)
    give_back(space)


def _whole_rows(problem: Problem, keys_bytes: int, rows: int) -> WholeRows:
    return WholeRows(*[0] * len(WholeRows._fields))._replace(
        normalizer=NORMALIZERS[type(problem.normalizer)], keys_bytes=keys_bytes, row_end=rows
    )

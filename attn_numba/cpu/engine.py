"""Run one call on the CPU: choose tiles, lay out workspaces, start the workers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from attn_numba.cpu import forward
from attn_numba.cpu.binding import bind
from attn_numba.cpu.launch import compile_worker, run
from attn_numba.cpu.state import Call
from attn_numba.cpu.target import target
from attn_numba.cpu.tiles import BRAIN_FLOAT, HALF_FLOAT, SAME, TILE_ROWS, VECTORS
from attn_numba.parallel import thread_count
from attn_numba.problem import Problem

GROUP_ROWS = 24  # rows that share a strip of scores: whole register tiles of 8 and of 4 rows
BLOCK_ROWS = 192  # rows of an item, which share the packed keys
TILE_BYTES = 400_000  # packed keys and values of one tile: together with the scores they stay in a 1 MB second-level cache
SMALL = 400_000  # multiply-adds below which a second thread costs more than it gives


class Unit(NamedTuple):
    """How a dtype is computed: the worker, its operands and what they are stored as."""

    worker: Any
    word: int  # bytes of an operand
    lanes: int
    pairs: bool
    kind: int
    itemsize: int


@functools.cache
def unit_of(dtype: str, exact_weights: bool) -> Unit:
    """Return how to compute a dtype; `exact_weights`: weights may not be rounded to bfloat16 on their way to the values."""
    lanes = target().vector_bytes // 4
    if dtype == "float64":
        return Unit(forward.forward_float64, 8, lanes // 2, False, SAME, 8)
    if dtype == "bfloat16" and target().bfloat_dot and not exact_weights:
        return Unit(forward.forward_bfloat16, 4, lanes, True, BRAIN_FLOAT, 2)
    kind, itemsize = {"float32": (SAME, 4), "float16": (HALF_FLOAT, 2), "bfloat16": (BRAIN_FLOAT, 2)}[dtype]
    return Unit(forward.forward_float32, 4, lanes, False, kind, itemsize)


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


@functools.cache
def key_tile(unit: Unit, depth: int, width: int) -> int:
    """Return the keys of a tile. It fixes the order of sums: it depends on the unit and on D and E, and on nothing else."""
    step = 4 * VECTORS * unit.lanes  # whole panels, and whole blocks of dropout counters
    fitting = TILE_BYTES // (unit.word * (depth + width)) // step * step
    return min(max(fitting, step), 16 * VECTORS * unit.lanes)


def attention(problem: Problem, out: np.ndarray, lse: np.ndarray | None, weights: np.ndarray | None) -> None:
    """Compute a call into `out` (B, H, M, E), `lse` (B, H, M) and `weights` (B, H, M, N, zeros on entry); the last two may be None.

    Every element of the results is written by one worker.
    """
    if problem.dtype == "float16" and not target().half:  # no float16 conversion in this processor
        wide = problem._replace(q=problem.q.astype("f4"), k=problem.k.astype("f4"), v=problem.v.astype("f4"), dtype="float32")
        result = np.empty(out.shape, np.float32)
        attention(wide, result, lse, weights)
        out[...] = result
        return
    bound = bind(problem)
    unit = unit_of(problem.dtype, problem.dropout is not None)
    call, threads, keep = _plan(problem, unit, bound, out, lse, weights)
    state = call.pack()
    run(compile_worker(unit.worker), state.ctypes.data, threads)
    del keep


def prepare(dtype: str) -> None:
    """Compile the worker of a dtype, or load it from the disk cache."""
    compile_worker(unit_of(dtype, False).worker)


def _plan(problem: Problem, unit: Unit, bound, out, lse, weights) -> tuple[Call, int, list]:
    q, k, v = problem.q, problem.k, problem.v
    B, H, Hk, M, N, D, E = problem.sizes
    lanes, word = unit.lanes, unit.word
    depth = (D + 1) // 2 if unit.pairs else D
    padded, width = _up(depth, lanes), _up(E, lanes)
    tile = key_tile(unit, padded, width)
    panel = VECTORS * lanes
    most = tile // panel

    threads = thread_count()[0] if B * H * M * N * (D + E) > SMALL else 1
    group = M if M <= 2 else min(GROUP_ROWS, _up(M, TILE_ROWS))
    rows = _block_rows(B * Hk, H // Hk, M, group, threads)
    blocks = -(-M // rows)
    served = H // Hk
    set_heads = max(1, min(served, rows // _up(M, group))) if blocks == 1 else 1
    head_sets = -(-served // set_heads)
    items = B * Hk * head_sets * blocks
    threads = max(1, min(threads, items))

    local = set_heads * _up(min(M, rows), group)  # rows of the workspace
    columns = min(tile, _up(N, panel))
    in_place = (
        unit.kind == SAME and v.strides[3] == word and E % lanes == 0 and v.strides[2] % word == 0 and not unit.pairs
    )
    at, size = {}, 0
    scratch_row = max(padded, 2 * _up(width, 2 * lanes))
    for name, count in (
        ("q_at", local * depth * word), ("out_at", local * width * word), ("largest_at", local * word), ("total_at", local * word),
        ("scores_at", group * tile * word), ("pairs_at", group * tile * 2 if unit.pairs else 0), ("sums_at", panel * word),
        ("scratch_at", lanes * scratch_row * word), ("keys_at", columns * padded * word), ("values_at", columns * width * word),
        ("kinds_at", (local // group + 1) * most), ("special_at", 4 * columns), ("seen_at", columns * group),
    ):  # fmt: skip
        at[name] = size
        size += _up(count, 64)
    workspace = np.empty(size * threads + 64, np.uint8)
    start = _up(workspace.ctypes.data, 64)
    sink = _sink(problem)
    call = Call(
        items, start, size, B, H, Hk, M, N, D, E,
        q.ctypes.data, *q.strides, k.ctypes.data, *k.strides, v.ctypes.data, *v.strides, out.ctypes.data, *out.strides,
        0 if lse is None else lse.ctypes.data, 0 if weights is None else weights.ctypes.data,
        0 if sink is None else sink.ctypes.data, unit.kind, unit.itemsize,
        bound.tile, bound.edit, bound.modify, bound.dropout, bound.parameters.ctypes.data,
        head_sets, set_heads, blocks, rows, group, tile, depth, padded, width, int(in_place), **at, factor=bound.factor,
    )  # fmt: skip
    return call, threads, [workspace, sink, bound]


def _block_rows(key_heads: int, served: int, M: int, group: int, threads: int) -> int:
    """Rows of an item: many, to share the packed keys, but enough items to go round."""
    rows = _up(min(M, BLOCK_ROWS), group)
    while rows > group and key_heads * served * -(-M // rows) < 4 * threads:
        rows = max(group, rows // 2 // group * group)
    return rows


def _sink(problem: Problem) -> np.ndarray | None:
    sink = problem.normalizer.sink_array(problem.sizes)
    if sink is None:
        return None
    return np.ascontiguousarray(sink / np.log(2.0), problem.accumulator)

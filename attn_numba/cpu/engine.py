"""Run one call on the CPU: choose tiles, lay out workspaces, start the workers."""

from __future__ import annotations

import ctypes
import functools
from typing import NamedTuple

import numpy as np

from attn_numba.cpu.binding import bind
from attn_numba.cpu.compilation import compile_worker
from attn_numba.cpu.forward import WORKERS
from attn_numba.cpu.keys import AHEAD_HEAD
from attn_numba.cpu.launch import Team
from attn_numba.cpu.state import Call, Layout, borrow, give_back, packed
from attn_numba.cpu.strip_tiles import SLOT_BYTES, STRIP_ROWS
from attn_numba.cpu.strips import STRIP_BYTES
from attn_numba.cpu.target import target
from attn_numba.cpu.tiles import BRAIN_FLOAT, CHAIN_VECTORS, HALF_FLOAT, SAME, TILE_ROWS, VECTORS
from attn_numba.parallel import thread_count
from attn_numba.problem import Problem
from attn_numba.rules import Sizes

GROUP_ROWS = 32  # rows that share a strip of scores: whole register tiles, and fitting into blocks of sparse masks

BLOCK_ROWS = 512  # rows of an item, which share the packed keys
STRIPS_BLOCK_ROWS = 2048  # the same where each row sees few of them
TILE_BYTES = (
    400_000  # packed keys and values of one tile: together with the scores they stay in a 1 MB second-level cache
)
SMALL = 1_500_000  # multiply-adds below which a second thread costs more than it gives


class Unit(NamedTuple):
    """How a dtype is computed: the workers, their operands and what these are stored as."""

    name: str  # of its workers
    word: int  # bytes of an operand
    lanes: int
    pairs: bool
    kind: int
    itemsize: int


@functools.cache
def unit_of(dtype: str, exact_weights: bool) -> Unit:
    """Return how to compute a dtype.

    `exact_weights`: weights may not be rounded to bfloat16 on their way to the values.
    """
    lanes = target().vector_bytes // 4
    if dtype == "float64":
        return Unit("float64", 8, lanes // 2, False, SAME, 8)
    if dtype == "bfloat16" and target().bfloat_dot and not exact_weights:
        return Unit("bfloat16", 4, lanes, True, BRAIN_FLOAT, 2)
    kind, itemsize = {"float32": (SAME, 4), "float16": (HALF_FLOAT, 2), "bfloat16": (BRAIN_FLOAT, 2)}[dtype]
    return Unit("float32", 4, lanes, False, kind, itemsize)


def _up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


@functools.cache
def key_tile(unit: Unit, depth: int, width: int) -> int:
    """Return the keys of a tile.

    It fixes the order of sums: it depends on the unit and on D and E, and on nothing else.
    """
    step = CHAIN_VECTORS * unit.lanes  # whole chains of sums, and whole blocks of dropout counters
    fitting = TILE_BYTES // (unit.word * (depth + width)) // step * step
    return min(max(fitting, step), 16 * VECTORS * unit.lanes)


def attention(problem: Problem, out: np.ndarray, lse: np.ndarray | None, weights: np.ndarray | None) -> None:
    """Compute a call into `out` (B, H, M, E), `lse` (B, H, M) and `weights` (B, H, M, N, zeros on entry).

    The last two may be None.

    Every element of the results is written by one worker.
    """
    if problem.dtype == "float16" and not target().half:  # no float16 conversion in this processor
        wide = problem._replace(
            q=problem.q.astype("f4"), k=problem.k.astype("f4"), v=problem.v.astype("f4"), dtype="float32"
        )
        result = np.empty(out.shape, np.float32)
        attention(wide, result, lse, weights)
        out[...] = result
        return
    threads = thread_count()[0] if _multiply_adds(problem.sizes) > SMALL else 1
    with Team(threads - 1) as team:  # first: it takes them longer to wake than all of what follows
        bound = bind(problem)
        unit = unit_of(problem.dtype, problem.dropout is not None)
        plan = plan_of(unit, problem.sizes, threads, _in_place(problem, unit), bound.run_count)
        worker = compile_worker(WORKERS[unit.name, bound.run_count > 0, weights is not None])
        sink = _sink(problem)
        q, k, v = problem.q, problem.k, problem.v
        space = borrow(plan.part_bytes * plan.threads)
        call = Call(
            bound.factor, space.parts,
            _address(q), *q.strides, _address(k), *k.strides, _address(v), *v.strides,
            _address(out), *out.strides, _address(lse), _address(weights), _address(sink), *bound.hooks, bound.address,
        )  # fmt: skip
        space.write(call, plan.layout)
        team.run(worker, space.state, plan.threads)
        give_back(space)


def prepare(dtype: str) -> None:
    """Compile the worker of a dtype, or load it from the disk cache."""
    compile_worker(WORKERS[unit_of(dtype, False).name, False, False])


def _multiply_adds(s: Sizes) -> int:
    return s.B * s.H * s.M * s.N * (s.D + s.E)


def _in_place(problem: Problem, unit: Unit) -> bool:
    """Whether register tiles can read V where it lies."""
    step, beside = problem.v.strides[2:]
    return unit.kind == SAME and beside == unit.word and problem.sizes.E % unit.lanes == 0 and step % unit.word == 0


class Plan(NamedTuple):
    """Tiles, items and workspace of a call: what follows from its sizes alone."""

    threads: int
    part_bytes: int  # workspace of one worker
    layout: bytes  # as `state.packed` returns it


@functools.lru_cache(maxsize=256)
def plan_of(unit: Unit, sizes: Sizes, most_threads: int, in_place: bool, run_count: int) -> Plan:
    """Return the plan of a call on at most so many threads.

    Its rows see `run_count` stretches of keys each; 0 if that is not known.
    """
    B, H, Hk, M, N, D, E = sizes
    lanes, word = unit.lanes, unit.word
    depth = (D + 1) // 2 if unit.pairs else D
    padded, width = _up(depth, lanes), _up(E, lanes)
    tile = key_tile(unit, padded, width)
    group = M if M <= 2 and not run_count else min(GROUP_ROWS, _up(M, max(TILE_ROWS, STRIP_ROWS)))
    most_rows = STRIPS_BLOCK_ROWS if run_count else BLOCK_ROWS
    rows = _block_rows(B * Hk, H // Hk, M, most_rows, group, most_threads)
    blocks = -(-M // rows)
    served = H // Hk
    set_heads = max(1, min(served, rows // _up(M, group))) if blocks == 1 else 1
    head_sets = -(-served // set_heads)
    items = B * Hk * head_sets * blocks

    local = set_heads * _up(min(M, rows), group)  # rows of the workspace
    state_rows = _up(group, lanes)
    states = local // group * state_rows
    chains = tile // (CHAIN_VECTORS * lanes)
    # Rows of a strip begin and end a run less than a vector apart: two slots more than in one row, in each chain.
    slots = tile // lanes + 3 * (run_count + chains) | 1 if run_count else 0
    marks = (local // group + 1) * (tile // lanes)
    runs_row = 2 * _up(4 * run_count, 64)
    slots_head = _up(4 * chains, SLOT_BYTES)
    columns = min(tile, _up(N, lanes))
    # Rows of whole vectors, an odd number of them, fall into different cache sets.
    strip = columns + (VECTORS + (columns // lanes + VECTORS + 1) % 2) * lanes
    keys_row = columns + lanes * (1 - columns // lanes % 2)
    scratch_row = max(padded, 2 * _up(width, 2 * lanes))
    parts = {
        "q_at": local * depth * word, "out_at": local * width * word,
        "largest_at": states * word, "total_at": states * word, "rows_at": 4 * state_rows * word,
        "scores_at": group * strip * word, "pairs_at": group * strip * 2 if unit.pairs else 0,
        "sums_at": VECTORS * lanes * word, "scratch_at": lanes * scratch_row * word,
        "ahead_at": AHEAD_HEAD + 8 * (tile // lanes),
        "keys_at": (keys_row * padded + VECTORS * lanes) * word, "values_at": columns * width * word,
        "marks_at": 2 * marks, "runs_at": 8 * (tile // lanes),
        "row_runs_at": local * runs_row, "together_at": local * runs_row, "hulls_at": 8 * (local // group),
        "strips_at": local // group * STRIP_BYTES * (group + 1),
        "slots_at": group // STRIP_ROWS * (slots_head + SLOT_BYTES * slots),
        "packed_at": group * slots * lanes * word,
        "special_at": 4 * columns, "seen_at": columns * group,
    }  # fmt: skip
    found, size = {}, 0
    for name, count in parts.items():
        found[name] = size
        size += _up(count, 64)
    found |= {
        "head_sets": head_sets, "set_heads": set_heads, "blocks": blocks, "block_rows": rows,
        "group_rows": group, "key_tile": tile, "state_rows": state_rows, "keys_row": keys_row,
        "strip_row": strip, "run_count": run_count,
        "marks_bytes": marks, "runs_row": runs_row,
        "strips_row": STRIP_BYTES * (group + 1), "slots_row": slots_head + SLOT_BYTES * slots, "slots_head": slots_head,
        "slots_most": slots, "packed_row": slots * lanes,
        "depth": depth, "depth_padded": padded, "value_width": width, "values_in_place": int(in_place),
        "items": items,
        "workspace_bytes": size, "kind": unit.kind, "itemsize": unit.itemsize,
    }  # fmt: skip
    layout = packed(Layout(**found, **sizes._asdict()))
    return Plan(max(1, min(most_threads, items)), size, layout)


def _address(array: np.ndarray | None) -> int:
    if array is None:
        return 0
    return _word.from_address(_pointer(array.__array_struct__, None) + DATA).value or 0


# NumPy's array interface in C: half the time of `array.ctypes.data` and of `array.__array_interface__`.
DATA = 40  # bytes before the address of the data in the structure of that interface
_word = ctypes.c_void_p
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _block_rows(key_heads: int, served: int, M: int, most: int, group: int, threads: int) -> int:
    """Rows of an item: many, to share the packed keys, but enough items to go round."""
    rows = _up(min(M, most), group)
    items = 4 * threads if threads > 1 else 1
    while rows > group and key_heads * served * -(-M // rows) < items:
        rows = max(group, rows // 2 // group * group)
    return rows


def _sink(problem: Problem) -> np.ndarray | None:
    if problem.normalizer.sink is None:
        return None
    sink = problem.normalizer.sink_array(problem.sizes)
    return np.ascontiguousarray(sink / np.log(2.0), np.float64)

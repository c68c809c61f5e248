"""Run one call of decode on the CPU: bind its rules, lay out its work, start the workers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np

from attn_numba.cpu import decode
from attn_numba.cpu.binding import bind
from attn_numba.cpu.compilation import compile_worker
from attn_numba.cpu.decode_codes import Shape
from attn_numba.cpu.decode_rows import decode_rows
from attn_numba.cpu.decode_state import BLOCK, BLOCK_ROWS, SPLIT, Call, Layout, keys_ahead, packed, state_block
from attn_numba.cpu.decode_tiles import decode_tiles
from attn_numba.cpu.engine import SMALL, address, sink_of
from attn_numba.cpu.launch import Team
from attn_numba.cpu.plan import placed, unit_of, up
from attn_numba.cpu.state import borrow, give_back
from attn_numba.cpu.target import target
from attn_numba.parallel import thread_count
from attn_numba.problem import Problem
from attn_numba.rules import Sizes

# Numbers that need no conversion leave little to do while memory arrives. A few query rows then go in pairs through a
# few keys at a time: the first pair meets them as they stream in, the others find them in the first-level cache.
PAIRED_ROWS = 16
CHUNK = 8


class Plan(NamedTuple):
    """Work and workspace of a call: what follows from its sizes, code and dtype."""

    layout: bytes
    heads: int  # items of one split of a sequence
    workspace_bytes: int  # of one worker
    part_bytes: int  # of one item


@functools.lru_cache(maxsize=64)
def plan_of(H: int, Hk: int, M: int, keys: Shape, values: Shape, dtype: str, shared: bool) -> Plan:
    """Return tiles, blocks of rows and workspace of a call."""
    unit = unit_of(dtype, True)
    word, lanes = unit.word, unit.lanes
    rows = H // Hk * M
    block_rows = rows * members_of(rows) if shared else min(rows, BLOCK_ROWS)
    pairs = keys.is_number and values.is_number and block_rows <= PAIRED_ROWS
    used = {1, 2} if block_rows > 2 else {block_rows}
    used |= {4} if block_rows > 2 and not pairs else set()
    found = {rows: decode_tiles(keys, values, rows) for rows in sorted(used)}
    tiles = {
        f"{name}_{n}": getattr(found[n], name) if n in found else 0
        for name in ("scores", "values", "careful")
        for n in (1, 2, 4)
    }
    padded = block_rows + 3  # rows to spare for the last tile
    score_row = (SPLIT + lanes) * word
    places, size = placed({
        "q_at": padded * keys.query_bytes, "scores_at": padded * score_row,
        "marks_at": (block_rows + 2) * (SPLIT // BLOCK), "sums_at": max(values.width + lanes, keys.padded) * word,
    })  # fmt: skip
    fixed = {
        "workspace_bytes": up(size, 64),
        "part_bytes": up((block_rows * values.width + 2 * block_rows) * word, 64),
        "kind": unit.kind, "itemsize": unit.itemsize, "H": H, "Hk": Hk, "M": M, "D": keys.size, "E": values.size,
        "rows": rows, "row_blocks": max(1, -(-rows // block_rows)), "block_rows": block_rows,
        "key_padded": keys.padded, "query_bytes": keys.query_bytes, **decode_rows(keys, values)._asdict(),
        "value_width": values.width, "keys_ahead": keys_ahead(keys), "values_ahead": keys_ahead(values),
        "chunk": CHUNK if pairs and block_rows > 2 else BLOCK, "score_row": score_row, **tiles, **places,
    }  # fmt: skip
    layout = packed(Layout(**fixed))
    return Plan(layout, Hk * fixed["row_blocks"], fixed["workspace_bytes"], fixed["part_bytes"])


class Teams(NamedTuple):
    """Which sequences go together, as `Call` says."""

    teams: np.ndarray
    members: np.ndarray
    team_of: np.ndarray
    place_of: np.ndarray


def members_of(rows: int) -> int:
    """Return how many sequences of so many query rows to a key head may be in a team."""
    return max(1, BLOCK_ROWS // rows)


def teams_of(view: Any, starts: np.ndarray, most: int) -> Teams:
    """Return teams of at most so many sequences: those whose keys of a split begin in the same memory."""
    B, splits = len(view.lengths), -(-view.longest // SPLIT)
    begins = np.arange(splits) * SPLIT
    first = view.keys[:, begins // view.page].T + ((begins % view.page) * view.key_token).astype(np.uint64)[:, None]
    there = begins[:, None] < view.lengths
    first = np.where(there, first, np.uint64(2**64 - 1))
    order = np.argsort(first, axis=1, kind="stable")  # (splits, B); those without keys come last
    first, there = (np.take_along_axis(x, order, axis=1) for x in (first, there))
    number = np.arange(B)
    news = np.ones(first.shape, bool)
    news[:, 1:] = first[:, 1:] != first[:, :-1]
    place = (number - np.maximum.accumulate(np.where(news, number, 0), axis=1)) % most
    begin = np.flatnonzero(place[there] == 0)
    split, members = np.nonzero(there)[0], order[there]
    counts = np.diff(begin, append=len(members))
    index = starts[members] + split
    team_of, place_of = np.empty((2, len(members)), np.int64)
    team_of[index], place_of[index] = np.repeat(np.arange(len(begin)), counts), place[there]
    return Teams(np.stack([split[begin], begin, counts], axis=1), members, team_of, place_of)


def prepare(dtype: str) -> None:
    """Compile the worker of a dtype, or load it from the disk cache."""
    compile_worker(decode.WORKERS["float64" if dtype == "float64" else "float32"])


def run(problem: Problem, view: Any, out: np.ndarray, lse: np.ndarray | None, weights: np.ndarray | None) -> None:
    """Compute a call into `out` (B, H, M, E), `lse` (B, H, M) and `weights` (B, H, M, N), zeros on entry.

    Of the problem, q, sizes and rules are read; its keys and values are those of the cache's `view`.
    """
    result = out
    if problem.dtype == "float16" and not target().half:
        problem = problem._replace(q=problem.q.astype(np.float32), dtype="float32")
        result = np.empty(out.shape, np.float32)
    sizes: Sizes = problem.sizes
    worked = 2 * int(view.lengths.sum()) * sizes.H * sizes.M * max(sizes.D, sizes.E)
    threads = thread_count()[0] if worked > SMALL else 1
    with Team(threads - 1) as team:
        bound = bind(problem)
        shapes = Shape(view.key_code, sizes.D), Shape(view.value_code, sizes.E)
        rows = sizes.H // sizes.Hk * sizes.M
        shared = view.shared and members_of(rows) > 1
        plan = plan_of(sizes.H, sizes.Hk, sizes.M, *shapes, problem.dtype, shared)
        worker = compile_worker(decode.WORKERS["float64" if problem.dtype == "float64" else "float32"])
        starts = np.zeros(sizes.B + 1, np.int64)
        np.cumsum(-(-view.lengths // SPLIT), out=starts[1:])
        teams = teams_of(view, starts, members_of(rows)) if shared else None
        items = (int(starts[-1]) if teams is None else len(teams.teams)) * plan.heads
        threads = max(1, min(threads, items))
        arrived = np.zeros(sizes.B * plan.heads, np.int64)
        sink = sink_of(problem)
        space = borrow(threads * plan.workspace_bytes + items * plan.part_bytes)
        # Items that follow each other read memory that does: of a head in one piece, of all heads in a short page.
        call = Call(
            bound.factor, items, space.parts, space.parts + threads * plan.workspace_bytes, address(arrived),
            address(problem.q), *problem.q.strides, address(result), *result.strides, address(lse), address(weights),
            address(sink), *bound.hooks[:3], bound.address, address(view.lengths), address(starts), address(view.keys),
            address(view.values), view.keys.shape[1], view.page, view.key_token, view.key_head, view.value_token,
            view.value_head, sizes.B, sizes.N, view.page >= SPLIT,
            *((0,) * 4 if teams is None else map(address, teams)),
        )  # fmt: skip
        space.write_record(state_block(call, plan.layout))
        team.run(worker, space.state, threads)
        give_back(space)
    if result is not out:
        out[...] = result

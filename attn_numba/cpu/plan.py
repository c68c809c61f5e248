"""Units, tiles, items and workspaces: what follows from the sizes of a call alone, decided before anything runs."""

from __future__ import annotations

import functools
from math import lcm
from typing import NamedTuple

from attn_numba.cpu.choices import USUAL, Choice
from attn_numba.cpu.gradient_tiles import TERMS
from attn_numba.cpu.keys import AHEAD_HEAD
from attn_numba.cpu.register_tiles import register_tiles
from attn_numba.cpu.state import Layout, packed
from attn_numba.cpu.strip_tiles import SLOT_BYTES, STRIP_ROWS
from attn_numba.cpu.strips import STRIP_BYTES
from attn_numba.cpu.target import target
from attn_numba.cpu.tiles import BRAIN_FLOAT, CHAIN_VECTORS, DEPTH_CHAIN, HALF_FLOAT, SAME, TILE_ROWS, VECTORS
from attn_numba.rules import Sizes

TILE_BYTES = (
    400_000  # packed keys and values of one tile: together with the scores they stay in a 1 MB second-level cache
)
WHOLE_ROWS_BYTES = 1_000_000  # of the strip of a group whose rows are looked at as wholes, if two register tiles fit
WHOLE_BLOCK_ROWS = 256  # rows of an item there, which share the packed keys of a head
WHOLE_BLOCKS = 32  # blocks of a head there, at most
BACKWARD_ROWS = 64  # rows of a strip of gradients: what they add to dk and dv is one chain of sums
BACKWARD_BYTES = 600_000  # keys, values and their gradients of one tile: in the second-level cache with the strips
BACKWARD_TILE = 48  # vectors of keys in a tile there, at most


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


def up(x: int, multiple: int) -> int:
    """Return the least multiple that is not below x."""
    return -(-x // multiple) * multiple


@functools.cache
def key_tile(unit: Unit, depth: int, width: int) -> int:
    """Return the keys of a tile.

    It fixes the order of sums: it depends on the unit and on D and E, and on nothing else.
    """
    step = CHAIN_VECTORS * unit.lanes  # whole chains of sums, and whole blocks of dropout counters
    fitting = TILE_BYTES // (unit.word * (depth + width)) // step * step
    return min(max(fitting, step), 16 * VECTORS * unit.lanes)


class Plan(NamedTuple):
    """Tiles, items and workspace of a call: what follows from its sizes alone."""

    threads: int
    part_bytes: int  # workspace of one worker
    layout: bytes  # as `state.packed` returns it


@functools.lru_cache(maxsize=256)
def plan_of(
    unit: Unit, sizes: Sizes, most_threads: int, in_place: bool, run_count: int, choice: Choice = USUAL
) -> Plan:
    """Return the plan of a call on at most so many threads, computed as chosen.

    Its rows see `run_count` stretches of keys each; 0 if that is not known.
    """
    B, H, Hk, M, N, D, E = sizes
    lanes, word = unit.lanes, unit.word
    depth = (D + 1) // 2 if unit.pairs else D
    padded, width = up(depth, lanes), up(E, lanes)
    tile = key_tile(unit, padded, width)
    least = lcm(TILE_ROWS, STRIP_ROWS, choice.tile_rows)
    group = M if M <= 2 and not run_count else min(choice.group_rows, up(M, least))
    least_items = choice.items * most_threads if most_threads > 1 else 1
    rows = _block_rows(B * Hk, H // Hk, M, choice.block_rows, group, least_items)
    blocks = -(-M // rows)
    served = H // Hk
    set_heads = max(1, min(served, rows // up(M, group))) if blocks == 1 else 1
    head_sets = -(-served // set_heads)
    items = B * Hk * head_sets * blocks

    local = set_heads * up(min(M, rows), group)  # rows of the workspace
    state_rows = up(group, lanes)
    states = local // group * state_rows
    chains = tile // (CHAIN_VECTORS * lanes)
    # Rows of a strip begin and end a run less than a vector apart: two slots more than in one row, in each chain.
    slots = tile // lanes + 3 * (run_count + chains) | 1 if run_count else 0
    marks = (local // group + 1) * (tile // lanes)
    runs_row = 2 * up(4 * run_count, 64)
    slots_head = up(4 * chains, SLOT_BYTES)
    columns = min(tile, up(N, lanes))
    # Rows of whole vectors, an odd number of them, fall into different cache sets.
    strip = columns + (VECTORS + (columns // lanes + VECTORS + 1) % 2) * lanes
    keys_row = columns + lanes * (1 - columns // lanes % 2)
    scratch_row = max(padded, 2 * up(width, 2 * lanes))
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
    found, size = placed(parts)
    found |= {
        "head_sets": head_sets, "set_heads": set_heads, "blocks": blocks, "block_rows": rows,
        "group_rows": group, "key_tile": tile, "state_rows": state_rows, "keys_row": keys_row,
        "strip_row": strip, "run_count": run_count,
        "marks_bytes": marks, "runs_row": runs_row,
        "strips_row": STRIP_BYTES * (group + 1), "slots_row": slots_head + SLOT_BYTES * slots, "slots_head": slots_head,
        "slots_most": slots, "packed_row": slots * lanes,
        "depth": depth, "depth_padded": padded, "value_width": width, "values_in_place": int(in_place),
        "items": items,
        "workspace_bytes": size, "kind": unit.kind, "itemsize": unit.itemsize, "by_heads": int(choice.by_heads),
        **_tiles(unit, choice, group, depth),
    }  # fmt: skip
    layout = packed(Layout(**found, **sizes._asdict()))
    return Plan(max(1, min(most_threads, items)), size, layout)


class WholeRowsPlan(NamedTuple):
    """As `Plan`, for rows that are looked at as wholes."""

    threads: int
    part_bytes: int
    layout: bytes
    keys_bytes: int  # of the packed keys of one tile
    blocks: int  # of rows in a head
    columns: int  # N in whole triples of vectors


@functools.lru_cache(maxsize=256)
def plan_of_whole_rows(unit: Unit, sizes: Sizes, most_threads: int, in_place: bool) -> WholeRowsPlan:
    """Return the plan of a call on at most so many threads whose rows are looked at as wholes; E is 0 without values.

    Its blocks depend on nothing but the number of rows, for they fix the order in which columns are summed.
    """
    B, H, Hk, rows, N, D, E = sizes
    lanes, word = unit.lanes, unit.word
    padded, width, columns = up(D, lanes), up(E, lanes), up(N, VECTORS * lanes)
    tile = key_tile(unit, padded, width)
    tiles = -(-N // tile)
    tile_columns = min(tile, up(N, lanes))
    # Rows of an odd number of vectors fall into different cache sets.
    strip = columns + lanes * (1 - columns // lanes % 2)
    keys_row = tile_columns + lanes * (1 - tile_columns // lanes % 2)
    keys_bytes = up((keys_row * padded + VECTORS * lanes) * word, 64)
    fitting = WHOLE_ROWS_BYTES // (strip * word) // TILE_ROWS * TILE_ROWS
    group = rows if rows <= 2 else min(USUAL.group_rows, max(fitting, 2 * TILE_ROWS), up(rows, TILE_ROWS))
    block_rows = min(up(max(WHOLE_BLOCK_ROWS, -(-rows // WHOLE_BLOCKS)), group), up(rows, group))
    blocks = -(-rows // block_rows)
    served = H // Hk
    set_heads = max(1, min(served, WHOLE_BLOCK_ROWS // block_rows)) if blocks == 1 else 1
    head_sets = -(-served // set_heads)
    items = B * Hk * head_sets * blocks
    groups = set_heads * block_rows // group
    parts = {
        "q_at": group * D * word, "out_at": group * width * word, "rows_at": 8 * group,
        "scores_at": group * strip * word, "sums_at": VECTORS * lanes * word,
        "scratch_at": lanes * max(padded, 2 * up(width, 2 * lanes)) * word, "ahead_at": AHEAD_HEAD,
        "keys_at": tiles * keys_bytes, "values_at": columns * width * word,
        "marks_at": tiles * (groups + 1) * (tile // lanes),
        "runs_at": 8 * (columns // lanes + 1), "row_runs_at": 8 * (tile // lanes + 1),
        "special_at": 4 * N, "seen_at": N * group,
    }  # fmt: skip
    found, size = placed(parts)
    found |= {
        "head_sets": head_sets, "set_heads": set_heads, "blocks": blocks, "block_rows": block_rows,
        "group_rows": group, "key_tile": tile, "keys_row": keys_row, "strip_row": strip,
        "depth": D, "depth_padded": padded, "value_width": width, "values_in_place": int(in_place),
        "items": items, "workspace_bytes": size, "kind": unit.kind, "itemsize": unit.itemsize,
    }  # fmt: skip
    layout = packed(Layout(*[0] * len(Layout._fields))._replace(**found, **sizes._asdict()))
    return WholeRowsPlan(max(1, min(most_threads, items)), size, layout, keys_bytes, blocks, columns)


class BackwardPlan(NamedTuple):
    """As `Plan`, for gradients."""

    threads: int
    part_bytes: int
    layout: bytes
    places: dict[str, int]  # where parts of the workspace begin that `Layout` does not know
    items: int
    row_blocks: int
    key_blocks: int
    depth: int  # of q, in whole vectors


@functools.cache
def backward_tile(unit: Unit, depth: int, width: int) -> int:
    """Return the keys of a tile of gradients; like `key_tile` it fixes the order of sums."""
    step = CHAIN_VECTORS * unit.lanes
    fitting = BACKWARD_BYTES // (unit.word * (3 * depth + 2 * width)) // step * step
    return min(max(fitting, step), BACKWARD_TILE * unit.lanes)


@functools.lru_cache(maxsize=256)
def plan_of_backward(
    unit: Unit, sizes: Sizes, most_threads: int, learned: bool, choice: Choice = USUAL
) -> BackwardPlan:
    """Return the plan of a call's gradients on at most so many threads, those of rules' arrays among them or not."""
    B, _, Hk, M, N, D, E = sizes
    lanes, word = unit.lanes, unit.word
    depth, width = up(D, lanes), up(E, lanes)
    tile = backward_tile(unit, depth, width)
    group = min(BACKWARD_ROWS, up(M, TILE_ROWS))
    row_blocks, key_blocks = -(-M // group), -(-N // tile)
    columns = min(tile, up(N, lanes))
    # Rows of whole vectors, an odd number of them, fall into different cache sets.
    strip = columns + (VECTORS + (columns // lanes + VECTORS + 1) % 2) * lanes
    keys_row = columns + lanes * (1 - columns // lanes % 2)
    strips = dict.fromkeys(("scores_at", "gradients_at", "raw_at"), group * strip * word)
    if learned:
        strips |= dict.fromkeys(("pulled_at", "terms_at"), group * strip * word)
    parts = strips | {
        "q_at": group * depth * word, "douts_at": group * width * word, "added_at": group * depth * word,
        "rows_at": up(TERMS * group, lanes) * word, "sums_at": max(VECTORS * lanes * word, 8 * (tile // lanes)),
        "scratch_at": lanes * max(depth, width) * word, "ahead_at": AHEAD_HEAD,
        "keys_at": (keys_row * depth + VECTORS * lanes) * word,
        "values_packed_at": (keys_row * width + VECTORS * lanes) * word,
        "key_rows_at": columns * depth * word, "dk_at": keys_row * depth * word, "dv_at": columns * width * word,
        "marks_at": tile // lanes, "runs_at": 8 * (tile // lanes), "special_at": 4 * columns, "flags_at": group,
    }  # fmt: skip
    found, size = placed(parts)
    items = B * Hk * key_blocks
    shared = {name: found.pop(name) for name in parts if name in Layout._fields}
    if not learned:  # gradients by final scores are read once, and so can be overwritten
        found |= {"pulled_at": found["gradients_at"], "terms_at": found["gradients_at"]}
    shared |= {
        "group_rows": group, "key_tile": tile, "keys_row": keys_row, "strip_row": strip, "depth": D,
        "depth_padded": depth, "value_width": width, "items": items, "workspace_bytes": size, "kind": unit.kind,
        "itemsize": unit.itemsize, "by_heads": int(choice.by_heads),
    }  # fmt: skip
    layout = packed(Layout(*[0] * len(Layout._fields))._replace(**shared, **sizes._asdict()))
    threads = max(1, min(most_threads, items))
    return BackwardPlan(threads, size, layout, found, items, row_blocks, key_blocks, depth)


def placed(parts: dict[str, int]) -> tuple[dict[str, int], int]:
    """Return where parts of so many bytes begin, one after the other, and where the last one ends."""
    found, size = {}, 0
    for name, count in parts.items():
        found[name] = size
        size += up(count, 64)
    return found, size


def _block_rows(key_heads: int, served: int, M: int, most: int, group: int, items: int) -> int:
    """Rows of an item: many, to share the packed keys, but enough items to go round."""
    rows = up(min(M, most), group)
    while rows > group and key_heads * served * -(-M // rows) < items:
        rows = max(group, rows // 2 // group * group)
    return rows


def _tiles(unit: Unit, choice: Choice, group: int, depth: int) -> dict[str, int]:
    """Return what a layout says of register tiles that are not the worker's own, nothing where these serve."""
    rows, vectors = choice.tile_rows, choice.tile_vectors
    if (rows, vectors) == (TILE_ROWS, VECTORS) or group % rows or depth > DEPTH_CHAIN:
        return dict.fromkeys(("tile_rows", "tile_vectors", "score_tile", "value_tile"), 0)
    tiles = register_tiles(unit.name, rows, vectors)
    return {"tile_rows": rows, "tile_vectors": vectors, "score_tile": tiles.scores, "value_tile": tiles.values}

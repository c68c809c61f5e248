"""The record that a call of decode passes to its workers, and how its work is cut into items."""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np
from numba import from_dtype

from attn_numba.cpu.decode_codes import Shape
from attn_numba.cpu.state import COUNTER_WORDS, reader_of

SPLIT = 1024  # keys of an item; it begins at a multiple of them. With D and E it fixes the order of sums
BLOCK = 64  # keys that the tile hook is asked about
BLOCK_ROWS = 64  # query rows of an item, at most: their scores stay in the second-level cache
AHEAD_BYTES = 65536  # from what is read to what is asked for


class Call(NamedTuple):
    """What differs from call to call. Addresses and strides in bytes."""

    factor: float  # as in `state.Call`
    items: int  # (team, key head, block of rows)
    workspace: int
    parts: int  # partial results, one for each item
    arrived: int  # for each (sequence, key head, block of rows): items that are done, zeros on entry
    q: int
    q_b: int
    q_h: int
    q_i: int
    q_d: int
    out: int
    out_b: int
    out_h: int
    out_i: int
    out_e: int
    lse: int  # 0: not asked for
    weights: int  # (B, H, M, N); 0: not asked for
    sink: int  # float64 (B, H), in units of log2; 0: none
    tile_hook: int
    edit_hook: int
    modify_hook: int
    parameters: int
    lengths: int  # int64 (B,)
    starts: int  # int64 (B + 1,): splits of all sequences before
    keys: int  # uint64 (B, pages): where the keys of a page are
    values: int
    pages: int
    page: int  # tokens of a page
    key_token: int
    key_head: int
    value_token: int
    value_head: int
    B: int
    N: int
    by_head: int  # whether items of a head follow each other, else those of all heads with the same keys
    teams: int  # int64 (teams, 3): split, first of `members`, their number; 0: each sequence is one of its own
    members: int  # int64: sequences, team by team
    team_of: int  # int64 (splits of all sequences,): the team, and the place in it
    place_of: int


class Layout(NamedTuple):
    """What follows from sizes and code. Offsets `*_at` are bytes into a worker's own workspace."""

    workspace_bytes: int
    part_bytes: int
    kind: int  # how q and out are stored: SAME, HALF_FLOAT, BRAIN_FLOAT
    itemsize: int
    H: int
    Hk: int
    M: int
    D: int
    E: int
    rows: int  # query rows of a key head: those of all heads that it serves
    row_blocks: int
    block_rows: int
    key_padded: int  # numbers of D in whole vectors
    query_bytes: int  # from one query's row to the next
    ready: int  # makes a query's numbers a row, 0: they are; and sums of codes numbers, 0: they are
    finish: int
    value_width: int  # numbers of a row of sums
    keys_ahead: int  # from those that are read to those that are asked for
    values_ahead: int
    chunk: int  # keys that meet all query rows before the next ones do, at most
    scores_1: int  # tiles of so many rows; 0 where no item has use for them
    scores_2: int
    scores_4: int
    values_1: int
    values_2: int
    values_4: int
    careful_1: int
    careful_2: int
    careful_4: int
    q_at: int
    scores_at: int
    score_row: int  # bytes from one row of scores to the next
    marks_at: int  # byte (head of the item, block of keys): NONE, SOME, ALL; first a row for what any head sees
    sums_at: int  # a row of sums, for merging


_HEAD = struct.Struct(f"{8 * COUNTER_WORDS}xd{len(Call._fields) - 1}q")
_TAIL = struct.Struct(f"{len(Layout._fields)}q")
_FIELDS = Call._fields + Layout._fields
decode_call_of = reader_of(
    from_dtype(np.dtype([(name, np.float64 if name == "factor" else np.int64) for name in _FIELDS]))
)


def packed(layout: Layout) -> bytes:
    """Return a layout as it stands in a state block."""
    return _TAIL.pack(*layout)


def state_block(call: Call, layout: bytes) -> bytes:
    """Return a state block: the counter at 0, then the records."""
    return _HEAD.pack(*call) + layout


def keys_ahead(shape: Shape) -> int:
    """Return how many rows further on memory is asked for."""
    return min(max(AHEAD_BYTES // shape.row_bytes // BLOCK, 1) * BLOCK, SPLIT)

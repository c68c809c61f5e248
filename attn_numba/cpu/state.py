"""The record that one call passes to its workers: addresses, strides and sizes, decided before the first one starts."""

from __future__ import annotations

import struct
import sys
from typing import NamedTuple

import llvmlite.ir as ir
import numpy as np
from numba import from_dtype, types
from numba.extending import intrinsic

# The counter that hands out items has two cache lines to itself, for every worker writes to it.
COUNTER_WORDS = 16


class Call(NamedTuple):
    """What differs from call to call. Addresses and strides in bytes."""

    factor: float  # log2(e) times the scale, or log2(e) where the hooks apply the scale
    workspace: int  # worker n owns workspace + n * workspace_bytes
    q: int
    q_b: int
    q_h: int
    q_i: int
    q_d: int
    k: int
    k_b: int
    k_h: int
    k_j: int
    k_d: int
    v: int
    v_b: int
    v_h: int
    v_j: int
    v_e: int
    out: int
    out_b: int
    out_h: int
    out_i: int
    out_e: int
    lse: int  # 0: not asked for
    row_facts: int  # float64 (B, H, M, 4), what made the weights of each row sum to 1, see `rows.py`; 0: not asked for
    weights: int  # 0: not asked for
    sink: int  # float64 (B, H), in units of log2; 0: none
    tile_hook: int  # 0: every tile is ALL
    edit_hook: int  # scale, modifiers and mask, for SOME tiles; 0: nothing to do
    modify_hook: int  # scale and modifiers, for ALL tiles; 0: nothing to do
    dropout_hook: int  # 0: none
    runs_hook: int  # lists the stretches of keys that a query sees; 0: the tile hook says what is seen
    parameters: int
    first_b: int = 0  # number of the first sequence, for the rules and for what is indexed by sequence


class Layout(NamedTuple):
    """What follows from the sizes of a call. `*_at` are offsets in bytes into a worker's own workspace."""

    items: int  # (sequence, key head, set of query heads, block of query rows); the last block of rows comes first
    workspace_bytes: int
    B: int
    H: int
    Hk: int
    M: int
    N: int
    D: int
    E: int
    kind: int  # how q, k, v and out are stored: SAME, HALF_FLOAT, BRAIN_FLOAT
    itemsize: int
    run_count: int
    head_sets: int  # sets of query heads that one key head serves
    set_heads: int  # query heads in a set; more than 1 only where a head has few rows
    blocks: int  # blocks of query rows in a head
    block_rows: int
    group_rows: int  # rows that share one strip of scores, a multiple of the register tile's rows unless 1 or 2
    state_rows: int  # group_rows in whole vectors
    key_tile: int  # keys in a tile: whole chains of sums
    depth: int  # words in a row of q: D, or pairs
    depth_padded: int  # in whole vectors
    strip_row: int  # scores from one row of the strip to the next
    keys_row: int  # words from one row of the transposed keys to the next
    value_width: int  # E in whole vectors
    values_in_place: int  # whether V is read where it lies
    q_at: int
    out_at: int
    largest_at: int  # per row: the largest score so far
    total_at: int  # per row: the sum of weights so far, in units of 2**(largest * factor)
    rows_at: int  # four numbers per row of a group: largest of the tile, shift, shrinkage, sum of the tile
    scores_at: int
    pairs_at: int  # weights as bfloat16, if operands are pairs
    sums_at: int
    scratch_at: int
    ahead_at: int  # the keys and values to ask for before their turn, see `keys.look_ahead`
    keys_at: int
    values_at: int
    marks_at: int  # byte (group, vector of keys): NONE, SOME, ALL; one more row for what any group sees; twice
    marks_bytes: int  # of one of the two: the tile at work and the next one
    runs_at: int  # int32 pairs: first and end of each stretch of keys that a group sees
    row_runs_at: int  # int32 lists: for each row the first keys of its runs (stretches of rows of k), then their ends
    runs_row: int  # bytes of one such list
    together_at: int  # like lists of what the rows of each strip see together
    hulls_at: int  # int32 pair for each group: first key that a row of it sees and end of the last stretch
    strips_at: int  # for each group: number of its strips, then their records, see `strips.py`
    strips_row: int  # bytes of one such list
    slots_at: int  # for each strip at work: ends of its chains, then its slots, see `strip_tiles.py`
    slots_row: int  # bytes of one such list
    slots_head: int  # bytes before the slots
    slots_most: int  # slots that fit
    packed_at: int  # scores and weights of the strips at work, slot by slot
    packed_row: int  # of them from one row to the next
    special_at: int  # int32 list of keys whose values are not all finite
    seen_at: int  # byte (special key, row): whether the row sees the key
    by_heads: int  # whether items go through all blocks of a head before the next head's
    tile_rows: int  # of the register tiles at the following addresses, of which group_rows is a multiple
    tile_vectors: int
    score_tile: int  # 0: the worker's own
    value_tile: int


class WholeRows(NamedTuple):
    """What only `whole_rows.py` reads. Addresses are 0 for what is not asked for."""

    normalizer: int  # one of those of `normalizers.py`
    hidden: int  # weights of the hidden units of an additive score; 0: the score is a product
    hidden_h: int  # bytes from one head's to the next
    keys_bytes: int  # of the packed keys of one tile
    row_first: int  # rows of q to go through
    row_end: int
    entropy: int
    top_keys: int
    top_weights: int
    top_count: int
    sums: int  # (B, H, blocks, sums_row): each block's sums of columns
    sums_row: int  # in words


class Backward(NamedTuple):
    """What only `backward.py` reads. Arrays are contiguous, of accumulators; offsets as in `Layout`."""

    gradient_scale: float  # of gradients by scores: 1 where the hook `pull` sees to it
    dout: int
    dout_b: int
    dout_h: int
    dout_i: int
    dout_e: int
    dq: int  # (B, H, query_rows, depth_padded), zeros on entry
    query_rows: int  # M in whole register tiles: rows to spare get numbers of no meaning
    dk: int  # (B, Hk, N, D)
    dv: int  # (B, Hk, N, E)
    row_numbers: int  # (B, H, M, ROW_NUMBERS), see `gradient_rows.py`
    row_sums: int  # (B, H, M, TERMS), zeros on entry
    progress: int  # for each item a cache line, zeros on entry, see `turns.py`
    sums_only: int  # whether the row sums are all that is asked for
    hidden_sums: int  # (B, H, blocks of keys, D), zeros on entry: by the weights of hidden units
    pull_hook: int  # from gradients by final scores to those by products; 0: nothing to do
    learned: int  # records of the rules' arrays whose gradients are asked for, see `learned.py`
    learned_count: int
    shared: int  # which axes several items share elements of these along, see `turns.py`
    row_blocks: int  # blocks of query rows in a head
    douts_at: int  # rows of dout
    gradients_at: int  # strip of gradients by weights, then by final scores
    pulled_at: int  # strip of gradients by products; the same one if nobody reads the other any more
    added_at: int  # what hidden units add to rows of dq
    raw_at: int  # strip of products as they were before the hooks
    terms_at: int  # strip of what a rule's array gets from each place
    values_packed_at: int  # V transposed
    key_rows_at: int  # K as rows
    dk_at: int
    dv_at: int
    flags_at: int  # byte (row): whether its q or its dout is not finite


_FLOATS = ("factor", "gradient_scale")
_FIELDS = Call._fields + Layout._fields + WholeRows._fields + Backward._fields
_HEAD = struct.Struct(f"{8 * COUNTER_WORDS}xd{len(Call._fields) - 1}q")
_TAIL = struct.Struct(f"{len(Layout._fields)}q")
_REST = struct.Struct(f"{len(WholeRows._fields)}q")
_BACKWARD = struct.Struct(f"d{len(Backward._fields) - 1}q")
_RECORD = from_dtype(np.dtype([(name, np.float64 if name in _FLOATS else np.int64) for name in _FIELDS]))


class Workspace:
    """Memory of one call at a time: its state block, then a part for each worker."""

    __slots__ = ("_memory", "_state", "parts", "size", "state")

    def __init__(self, size: int) -> None:
        block = -(-(_HEAD.size + _TAIL.size + _REST.size + _BACKWARD.size) // 64) * 64
        self._memory = np.empty(block + size + 64, np.uint8)
        start = -self._memory.ctypes.data % 64
        self._state = memoryview(self._memory)[start:]
        self.size = size
        self.state = self._memory.ctypes.data + start  # address of the state block
        self.parts = self.state + block

    def write(
        self, call: Call, layout: bytes, whole_rows: WholeRows | None = None, backward: Backward | None = None
    ) -> None:
        """Write the state block: the counter at 0, then the records."""
        write_records(self._state, 0, call, layout, whole_rows)
        if backward is not None:
            _BACKWARD.pack_into(self._state, _HEAD.size + _TAIL.size + _REST.size, *backward)

    def write_record(self, record: bytes) -> None:
        """Write a state block of another kind: the counter at 0, then the record."""
        self._state[: len(record)] = record


STATE_BYTES = -(-(_HEAD.size + _TAIL.size + _REST.size) // 64) * 64  # of a state block without gradients


def write_records(memory: memoryview, at: int, call: Call, layout: bytes, whole_rows: WholeRows | None = None) -> None:
    """Write a state block without gradients at a place in memory: the counter at 0, then the records."""
    _HEAD.pack_into(memory, at, *call)
    end = at + _HEAD.size + _TAIL.size
    memory[at + _HEAD.size : end] = layout
    if whole_rows is not None:
        _REST.pack_into(memory, end, *whole_rows)


def with_room(layout: bytes, workspace_bytes: int) -> bytes:
    """Return a packed layout that gives each worker so much workspace."""
    at = 8 * Layout._fields.index("workspace_bytes")
    return layout[:at] + workspace_bytes.to_bytes(8, sys.byteorder) + layout[at + 8 :]


def packed(layout: Layout) -> bytes:
    """Return a layout as it stands in a state block."""
    return _TAIL.pack(*layout)


_spare: list[Workspace] = []  # for later calls: new memory costs a call a tenth of a millisecond
KEPT_BYTES = 16_000_000  # larger ones are not kept


def borrow(size: int) -> Workspace:
    """Return memory that no other call uses."""
    try:
        found = _spare.pop()
    except IndexError:
        return Workspace(size)
    return found if found.size >= size else Workspace(size)


def give_back(space: Workspace) -> None:
    """Let later calls have the memory; all workers have ended."""
    if space.size <= KEPT_BYTES:
        _spare.append(space)


def reader_of(record):
    """Return an intrinsic that returns the record of the state block at an address."""

    @intrinsic
    def read(typingctx, state):
        def codegen(context, builder, signature, args):
            start = builder.add(args[0], ir.Constant(ir.IntType(64), COUNTER_WORDS * 8))
            return builder.inttoptr(start, context.get_value_type(record))

        return record(types.intp), codegen

    return read


call_of = reader_of(_RECORD)  # all fields of the classes above

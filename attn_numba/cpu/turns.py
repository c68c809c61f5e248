"""Turns: several items add to the same numbers, and each waits until those before it have passed them.

An item goes through positions 0, 1, 2, ... (a query head, and of that a block of rows, the last one first) and says how
many it has passed, those that it skipped too. Items are handed out in order, so one that is waited for is at work or
done: whoever comes first never waits. A worker that waits long lets others run.
"""

from __future__ import annotations

from numba import types

from attn_numba.cpu.gradient_tiles import load_progress, store_progress
from attn_numba.cpu.rows import compiled

LINE = 64  # bytes of progress for each item: workers that write next to each other would hold each other up
PATIENCE = 2000  # looks before a worker lets others run
# Which axes several items share an element of a gradient along, beside the keys.
SEQUENCES, HEADS = 1, 2

_let_others_run = types.ExternalFunction("sched_yield", types.int32())


@compiled
def _wait_until(call, item, passed):
    looks = 0
    while load_progress(call.progress + item * LINE) < passed:
        looks += 1
        if looks > PATIENCE:
            _let_others_run()


@compiled
def wait_for_keys(call, item, position):
    """Wait until all items of the same key head with keys before this one's have passed a position."""
    heads = call.B * call.Hk
    for before in range(item % heads, item, heads):
        _wait_until(call, before, position + 1)


@compiled
def wait_for_heads(call, item, position):
    """Wait until all items of the same keys that share elements of a rule's gradient have passed a position."""
    heads = call.B * call.Hk
    rest = item % heads
    across = position  # where heads share, the same rows of the last head that an item goes through
    if call.shared & HEADS:
        across = (call.H // call.Hk - 1) * call.row_blocks + position % call.row_blocks
    for other in range(rest):
        same_sequence, same_head = other // call.Hk == rest // call.Hk, other % call.Hk == rest % call.Hk
        if (same_sequence or call.shared & SEQUENCES) and (same_head or call.shared & HEADS):
            _wait_until(call, item - rest + other, across + 1)


@compiled
def pass_on(call, item, positions):
    """Say that an item has passed so many positions."""
    store_progress(call.progress + item * LINE, positions)

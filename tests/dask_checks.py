"""What `test_dask.py` lets workers do: functions in a module that these can import, as they cannot a test's own."""

from __future__ import annotations

import time
from pathlib import Path


def in_a_task_of_four_cores():
    from attn_numba import parallel

    before = parallel._from_environment, parallel._from_machine
    parallel._from_environment, parallel._from_machine = lambda: None, lambda: (4, "the machine")
    try:
        return parallel.thread_count()
    finally:
        parallel._from_environment, parallel._from_machine = before


def after_the_gate(block, gate, block_info=None):
    """Return the block; the last one along the keys not before there is a file."""
    until = time.monotonic() + 60
    if block_info[0]["chunk-location"][2] == block_info[0]["num-chunks"][2] - 1:
        while not Path(gate).exists() and time.monotonic() < until:
            time.sleep(0.02)
    return block

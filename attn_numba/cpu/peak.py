"""The rate of the register tile alone: what a kernel could reach if it did nothing but multiply and add."""

from __future__ import annotations

import time

import numpy as np

from attn_numba.cpu import tiles as t
from attn_numba.cpu.compilation import compile_worker
from attn_numba.cpu.launch import Team
from attn_numba.cpu.plan import unit_of
from attn_numba.cpu.rows import compiled
from attn_numba.cpu.tiles import TILE_ROWS, VECTORS

DEPTH = 128  # words: all operands fit into the first-level cache
score_tile_3, load_word = t.score_tile_3, t.load_word


@compiled
def _repeat(state, unit):
    for _ in range(load_word(state)):
        length = VECTORS * load_word(state + 32)
        score_tile_3(
            unit, load_word(state + 8), DEPTH, load_word(state + 16), length, load_word(state + 24), length, DEPTH
        )


def peak_float32(state, number):
    """Repeat the float32 tile; a worker, like the two below."""
    _repeat(state, np.float32(0))


def peak_float64(state, number):
    """Repeat the float64 tile."""
    _repeat(state, np.float64(0))


def peak_bfloat16(state, number):
    """Repeat the tile of pairs of bfloat16."""
    _repeat(state, np.int32(0))


def peak_rate(dtype: str, seconds: float = 0.2) -> float:
    """Return the register tile's rate for a dtype, in floating-point operations per second of one thread.

    Parameters
    ----------
    dtype : {"float64", "float32", "float16", "bfloat16"}
        What is multiplied; float16 is multiplied as float32.
    seconds : float
        About how long to measure; the best of ten parts counts.
    """
    unit = unit_of(dtype, False)
    worker = {"f8": peak_float64, "f4": peak_bfloat16 if unit.pairs else peak_float32}[f"f{unit.word}"]
    address = compile_worker(worker)
    a, b, c = (
        np.zeros(n * unit.word, np.uint8)
        for n in (TILE_ROWS * DEPTH, DEPTH * VECTORS * unit.lanes, TILE_ROWS * VECTORS * unit.lanes)
    )
    flops = 2 * TILE_ROWS * VECTORS * unit.lanes * DEPTH * (2 if unit.pairs else 1)

    def measure(turns: int) -> float:
        state = np.array([turns, *(x.ctypes.data for x in (a, b, c)), unit.lanes], np.int64)
        start = time.perf_counter()
        Team(0).run(address, state.ctypes.data, 1)
        return (time.perf_counter() - start) / turns

    turns = max(1, int(seconds / 10 / measure(1000)))
    return flops / min(measure(turns) for _ in range(10))

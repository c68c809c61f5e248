"""Register tiles of other shapes than the usual one, compiled when a profile asks for them.

A worker calls them by address, as it calls hooks, so that no worker is compiled anew. Such a call costs some
nanoseconds, and a tile computes for a hundred or more.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import llvmlite.ir as ir
from numba import types

from attn_numba.cpu.hooks import compile_hooks
from attn_numba.cpu.tiles import emitter, score_tile, value_tile
from attn_numba.cpu.vectors import I64

UNITS = {"float32": types.float32, "float64": types.float64, "bfloat16": types.int32}


class RegisterTiles(NamedTuple):
    """The addresses of both tiles."""

    scores: int
    values: int


@functools.cache
def register_tiles(unit: str, rows: int, vectors: int) -> RegisterTiles:
    """Compile the tiles of a unit, in some 50 ms, and return their addresses."""
    module = ir.Module()
    for name, count, emit in (("scores", 7, score_tile(rows, vectors)), ("values", 8, value_tile(rows, vectors))):
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * count), name)
        builder = ir.IRBuilder(function.append_basic_block())
        emit(emitter(builder, UNITS[unit]), UNITS[unit], *function.args)
        builder.ret_void()
    return RegisterTiles(**compile_hooks(module))

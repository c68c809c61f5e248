"""What may be chosen for a call without any number of its results changing: a matter of speed alone.

The order of sums is never chosen: `key_tile`, the chains of `CHAIN_VECTORS` and the lanes of a row's sums stay. Which
rows go together, how many an item has, the order of items and the shape of the register tiles are chosen, for in all of
them an element of a result is the same chain of sums.

A call is looked up by its *shape class*, which rounds lengths up to powers of two and head sizes to whole cache lines.
"""

from __future__ import annotations

import functools
from math import lcm
from typing import NamedTuple

from attn_numba.cpu.target import target
from attn_numba.cpu.tiles import TILE_ROWS, VECTORS
from attn_numba.profiles import active
from attn_numba.rules import Sizes

FORWARD, BACKWARD = "forward", "backward"
FULL, MASKED, RUNS = "full", "masked", "runs"  # nothing is excluded; a hook tells of tiles; a hook lists runs of keys


class Choice(NamedTuple):
    """What is chosen for calls of one class.

    Gradients look at `by_heads` alone: their blocks of rows fix the order of sums.
    """

    group_rows: int = 32  # rows that share a strip of scores: whole register tiles, and fitting into blocks of masks
    block_rows: int = 512  # rows of an item, which share the packed keys
    items: int = 4  # of a thread, at least, where there are several threads
    by_heads: bool = False  # all blocks of one head first, or one block of all heads
    tile_rows: int = TILE_ROWS  # of a register tile
    tile_vectors: int = VECTORS


USUAL = Choice()
USUAL_RUNS = USUAL._replace(block_rows=2048)  # each row sees few of the keys that an item packs

GROUP_ROWS = (16, 24, 32, 48, 64)
BLOCK_ROWS = (128, 256, 512, 1024, 2048, 4096)
ITEMS = (2, 4, 8, 16)
# accumulators, operands and a broadcast fit into the vector registers: 32, or 16
SHAPES = {64: ((8, 3), (6, 4), (12, 2)), 32: ((4, 3), (6, 2)), 16: ((TILE_ROWS, 3),)}


def tile_shapes() -> tuple[tuple[int, int], ...]:
    """Return rows and vectors of the register tiles that the processor has registers for, the usual one first."""
    return SHAPES[target().vector_bytes]


def usual(kind: str) -> Choice:
    """Return what is chosen where nothing is known, by whether a call's rows list runs of keys."""
    return USUAL_RUNS if kind == RUNS else USUAL


def usual_of(name: str) -> Choice:
    """Return the same for a class by its name."""
    return usual(name.rsplit(" ", 1)[-1])


def is_valid(choice: Choice, name: str) -> bool:
    """Whether calls of a class may be computed so: only what `ideas` lead to, whoever wrote it."""
    within = (
        all(isinstance(number, int) for number in choice)
        and choice.group_rows in GROUP_ROWS
        and choice.block_rows in BLOCK_ROWS
        and choice.items in ITEMS
        and choice.by_heads in (False, True)
        and (choice.tile_rows, choice.tile_vectors) in tile_shapes()
        and choice.group_rows % lcm(choice.tile_rows, TILE_ROWS) == 0
    )
    return within and (not name.startswith(BACKWARD) or choice._replace(by_heads=False) == usual_of(name))


def ideas(name: str) -> list[list[Choice]]:
    """Return what to try for a class: for each idea the usual choice, changed by it alone.

    Ideas go together: what one changes no other does.
    """
    start = usual_of(name)
    found = [[start._replace(by_heads=True)]]
    if name.startswith(BACKWARD):
        return found
    shapes = tile_shapes()[: 1 if name.endswith(RUNS) else None]  # strips have register tiles of their own
    found.append(
        [
            start._replace(tile_rows=rows, tile_vectors=vectors, group_rows=group)
            for rows, vectors in shapes
            for group in GROUP_ROWS
            if group % lcm(rows, TILE_ROWS) == 0
        ]
    )
    found.append([start._replace(block_rows=rows) for rows in BLOCK_ROWS])
    if " 1 thread," not in name:
        found.append([start._replace(items=items) for items in ITEMS])
    return [[choice for choice in idea if choice != start] for idea in found]


def together(choice: Choice, other: Choice, name: str) -> Choice:
    """Return a choice with what another one changes of the usual."""
    start = usual_of(name)
    changed = {field: new for field, new, old in zip(Choice._fields, other, start, strict=True) if new != old}
    return choice._replace(**changed)


@functools.lru_cache(maxsize=256)
def shape_class(what: str, dtype: str, sizes: Sizes, threads: int, kind: str) -> str:
    """Return the name of a call's class: pass, dtype, sizes, threads and what its mask is like.

    Parameters
    ----------
    what : {"forward", "backward"}
        The pass.
    dtype : str
        Of the arrays.
    sizes : Sizes
        Of the call.
    threads : int
        How many it may use.
    kind : {"full", "masked", "runs"}
        What its mask is like.
    """
    B, H, Hk, M, N, D, E = sizes
    heads, group, rows, keys = (1 << max(n - 1, 0).bit_length() for n in (B * Hk, H // Hk, M, N))
    depth, width = (-(-n // 16) * 16 for n in (D, E))
    count = f"{threads} thread{'s' if threads > 1 else ''}"
    return f"{what} {dtype} {heads}x{group}x{rows}x{keys} D{depth} E{width}, {count}, {kind}"


def chosen(what: str, dtype: str, sizes: Sizes, threads: int, kind: str) -> Choice:
    """Return what to choose for a call: the profile's choice if one is in use and knows its class, else the usual."""
    profile = active()
    if profile is None:
        return usual(kind)
    return profile.get(shape_class(what, dtype, sizes, threads, kind), usual(kind))

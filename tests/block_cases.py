"""Blocks of the shared cases."""

from __future__ import annotations

import itertools

import numpy as np

import cases
from attn_numba.rules import as_mask, as_modifiers
from attn_numba.rules.arguments import check_offsets
from attn_numba.rules.blocks import Block, offset_of

WITH_PLACES = [case for case in cases.CASES if case.kwargs()]


def stretches(length: int, pieces: int) -> list[slice]:
    """Uneven stretches that make up a length; of none, one of none."""
    ends = sorted({0, length, *(length * n // pieces + n % 2 for n in range(1, pieces))})
    return [slice(a, min(b, length)) for a, b in itertools.pairwise(ends)] or [slice(0, 0)]


def blocks(z):
    """Blocks of a call: each sequence, each key head's queries in two parts, three stretches of queries and of keys."""
    group = z.H // z.Hk
    for b, hk, i, j in itertools.product(stretches(z.B, z.B), stretches(z.Hk, 2), stretches(z.M, 3), stretches(z.N, 3)):
        yield Block(b, slice(hk.start * group, hk.stop * group), hk, i, j)


def call_of(case):
    kwargs = case.kwargs()
    mask, modifiers = as_mask(kwargs.get("mask")), as_modifiers(kwargs.get("modifiers"))
    users = [x for x in (mask, *modifiers, kwargs.get("dropout")) if x is not None]
    offsets = check_offsets(kwargs.get("query_offset"), kwargs.get("key_offset", 0), case.sizes, users)
    return mask, modifiers, kwargs, offsets


def offsets_in(block, offsets):
    return offset_of(offsets[0], block.b, block.i), offset_of(offsets[1], block.b, block.j)


def whole_and_part(array, block, z):
    whole = np.broadcast_to(array, (z.B, z.H, z.M, z.N))
    return whole[block.b, block.h, block.i, block.j]

"""What may be seen of a call, as its rules tell it, against what is seen."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from attn_numba import rules
from attn_numba.rules import places_of
from attn_numba.rules.blocks import Block, part_of
from attn_numba.rules.sight import ALL, NONE, SOME, answer, may_see
from block_cases import WITH_PLACES, blocks, call_of, offsets_in, stretches, whole_and_part


@pytest.mark.parametrize("case", WITH_PLACES, ids=lambda case: case.name)
def test_a_block_of_which_nothing_is_seen_is_told(case):
    """Never wrong; and of masks without arrays that vary within the block, never undecided without need."""
    z = case.sizes
    mask, modifiers, _, offsets = call_of(case)
    places = places_of(z, *offsets)
    seen = np.ones((z.B, z.H, z.M, z.N), bool) if mask is None else mask.evaluate(places, z)
    alone = seen
    for rule in modifiers:
        excluded = rule.excluded(places, z)
        alone = alone if excluded is None else alone & ~excluded
    for block in blocks(z):
        parts = tuple(part_of(x, block, z) for x in modifiers)
        part = None if mask is None else part_of(mask, block, z)
        told = answer(part, parts, block.sizes(z), *offsets_in(block, offsets))
        if told == NONE:
            assert not whole_and_part(alone, block, z).any()
        if told == ALL:
            assert whole_and_part(seen, block, z).all()


@pytest.mark.parametrize(
    "mask",
    [
        rules.Causal(),
        ~rules.Causal(),
        rules.SlidingWindow(5, 0),
        rules.SlidingWindow(-1, 3),
        rules.Causal() & rules.SlidingWindow(7, 7),
        rules.Padding([30, 11], [4, 0], [40, 25]),
        rules.PrefixLM([9, 0]),
        rules.SameDocument(np.arange(40) // 7),
        rules.BlockSparse(np.arange(16).reshape(4, 4) % 3 == 0, 10),
        rules.Dense(np.arange(40)[:, None] // 9 == np.arange(40) // 9),
        rules.CustomMask(lambda b, h, i, j, p: j // p[0] == i // p[0] - b, (10,)),
    ],
    ids=lambda mask: type(mask).__name__,
)
def test_of_simple_masks_the_answer_is_exact(mask):
    z = rules.Sizes(2, 2, 1, 40, 40, 8, 8)
    whole = np.broadcast_to(mask.evaluate(places_of(z), z), (2, 2, 40, 40))
    told = set()
    for b, i, j in itertools.product(range(2), stretches(40, 4), stretches(40, 5)):
        block = Block(slice(b, b + 1), slice(0, 2), slice(0, 1), i, j)
        pairs = whole_and_part(whole, block, z)
        expected = ALL if pairs.all() else SOME if pairs.any() else NONE
        assert answer(part_of(mask, block, z), (), block.sizes(z), i.start, j.start) == expected
        told.add(expected)
    assert NONE in told


@pytest.mark.parametrize("case", WITH_PLACES, ids=lambda case: case.name)
def test_what_may_be_seen_holds_what_is_seen(case):
    sizes = case.sizes
    mask, modifiers, _, (query_at, key_at) = call_of(case)
    places = places_of(sizes, query_at, key_at)
    seen = np.ones((sizes.B, sizes.H, sizes.M, sizes.N), bool)
    if mask is not None:
        seen &= mask.evaluate(places, sizes)
    for modifier in modifiers:
        excluded = modifier.excluded(places, sizes)
        seen &= True if excluded is None else ~excluded
    rows, keys = ([(x.start, x.stop) for x in stretches(n, 3) if x.start < x.stop] for n in (sizes.M, sizes.N))
    if not rows or not keys:
        return
    ends = [tuple(np.array(x).T) for x in (rows, keys)]
    some, every = may_see(mask, modifiers, sizes, query_at, key_at, *ends)
    for m, (i0, i1) in enumerate(rows):
        for n, (j0, j1) in enumerate(keys):
            inside = seen[:, :, i0:i1, j0:j1]
            assert some[m, n] or not inside.any()
            assert not every[m, n] or inside.all()


def test_stretches_of_simple_masks_are_known_exactly():
    sizes = rules.Sizes(1, 1, 1, 400, 400, 4, 4)
    ends = np.arange(0, 400, 100), np.arange(100, 500, 100)
    steps = np.subtract.outer(np.arange(4), np.arange(4))
    some, every = may_see(rules.Causal(), (), sizes, 0, 0, ends, ends)
    assert (some == (steps >= 0)).all()
    assert (every == (steps > 0)).all()
    some, _ = may_see(rules.SlidingWindow(99, 0), (), sizes, 0, 0, ends, ends)
    assert (some == np.isin(steps, (0, 1))).all()
    some, every = may_see(rules.SameDocument(np.arange(400) // 200), (), sizes, 0, 0, ends, ends)
    assert (some == (np.arange(4)[:, None] // 2 == np.arange(4) // 2)).all()
    assert (every == some).all()
    some, _ = may_see(rules.Padding([150]), (), sizes, 0, 0, ends, ends)
    assert (some == (np.arange(4) < 2)).all()

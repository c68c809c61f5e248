"""Rules of parts against the same places of the whole, and what parts may see against what they do see."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from attn_numba.rules import Mask, SoftCap, as_mask, as_modifiers, places_of
from attn_numba.rules.arguments import check_offsets
from attn_numba.rules.parts import Cutter, learned_place, may_see
from cases import CASES

CUTS = (0, 0.37, 0.62, 1)  # of the rows: stretches of uneven lengths, borders inside blocks


def stretches(n):
    ends = sorted({round(share * n) for share in CUTS})
    return list(itertools.pairwise(ends))


def offsets(case):
    kwargs = case.kwargs()
    mask, modifiers = as_mask(kwargs.get("mask")), as_modifiers(kwargs.get("modifiers"))
    users = [x for x in (mask, *modifiers) if x is not None]
    return mask, modifiers, *check_offsets(kwargs.get("query_offset"), kwargs.get("key_offset", 0), case.sizes, users)


WITH_RULES = [case for case in CASES if {"mask", "modifiers"} & case.kwargs().keys() and 0 not in case.sizes]


@pytest.mark.parametrize("case", WITH_RULES, ids=lambda case: case.name)
def test_a_part_is_the_whole_at_its_places(case):
    sizes = case.sizes
    mask, modifiers, query_at, key_at = offsets(case)
    places = places_of(sizes, query_at, key_at)
    scores = np.random.default_rng(0).standard_normal((sizes.B, sizes.H, sizes.M, sizes.N))
    for rows in stretches(sizes.M):
        for keys in stretches(sizes.N):
            cutter = Cutter(rows, keys, sizes)
            part = sizes._replace(M=rows[1] - rows[0], N=keys[1] - keys[0])
            there = places_of(part, query_at + rows[0], key_at + keys[0])
            window = (slice(None), slice(None), slice(*rows), slice(*keys))
            shape = (part.B, part.H, part.M, part.N)
            if mask is not None:
                cut = cutter.part(mask)
                cut.check(part, query_at + rows[0], key_at + keys[0])
                whole = np.broadcast_to(mask.evaluate(places, sizes), scores.shape)[window]
                assert np.array_equal(np.broadcast_to(cut.evaluate(there, part), shape), whole)
            for modifier in modifiers:
                cut = cutter.part(modifier)
                with np.errstate(all="ignore"):
                    found = cut.evaluate(scores[window], there, part)
                    whole = np.broadcast_to(modifier.evaluate(scores, places, sizes), scores.shape)[window]
                assert np.array_equal(np.broadcast_to(found, shape), whole, equal_nan=True)
                if modifier.learned is not None:
                    name = modifier.learned[0]
                    place = learned_place(modifier, rows, keys, sizes)
                    assert np.array_equal(getattr(modifier, name)[place], getattr(cut, name))


@pytest.mark.parametrize("case", WITH_RULES, ids=lambda case: case.name)
def test_what_may_be_seen_holds_what_is_seen(case):
    sizes = case.sizes
    mask, modifiers, query_at, key_at = offsets(case)
    places = places_of(sizes, query_at, key_at)
    seen = np.ones((sizes.B, sizes.H, sizes.M, sizes.N), bool)
    if mask is not None:
        seen &= mask.evaluate(places, sizes)
    for modifier in modifiers:
        excluded = modifier.excluded(places, sizes)
        seen &= True if excluded is None else ~excluded
    rows, keys = stretches(sizes.M), stretches(sizes.N)
    ends = [tuple(np.array(x).T) for x in (rows, keys)]
    some, every = may_see(mask, modifiers, sizes, query_at, key_at, *ends)
    for m, (i0, i1) in enumerate(rows):
        for n, (j0, j1) in enumerate(keys):
            inside = seen[:, :, i0:i1, j0:j1]
            assert some[m, n] or not inside.any()
            assert not every[m, n] or inside.all()


def test_what_is_exact_is_known():
    from attn_numba.rules import Causal, Padding, SameDocument, Sizes, SlidingWindow

    sizes = Sizes(1, 1, 1, 400, 400, 4, 4)
    ends = np.arange(0, 400, 100), np.arange(100, 500, 100)
    steps = np.subtract.outer(np.arange(4), np.arange(4))
    some, every = may_see(Causal(), (), sizes, 0, 0, ends, ends)
    assert (some == (steps >= 0)).all()
    assert (every == (steps > 0)).all()
    some, _ = may_see(SlidingWindow(99, 0), (), sizes, 0, 0, ends, ends)
    assert (some == np.isin(steps, (0, 1))).all()
    some, every = may_see(SameDocument(np.arange(400) // 200), (), sizes, 0, 0, ends, ends)
    assert (some == (np.arange(4)[:, None] // 2 == np.arange(4) // 2)).all()
    assert (every == some).all()
    some, _ = may_see(Padding([150]), (), sizes, 0, 0, ends, ends)
    assert (some == (np.arange(4) < 2)).all()


def test_one_rule_met_twice_is_one_part_and_one_without_rows_stays():
    from attn_numba.rules import Causal, Sizes, Temperature

    cutter = Cutter((0, 2), (1, 3), Sizes(1, 1, 1, 4, 4, 1, 1))
    heat, cap, causal = Temperature(np.arange(1.0, 5)), SoftCap(3.0), Causal()
    assert cutter.part(heat) is cutter.part(heat)
    assert cutter.part(heat) is not heat
    assert cutter.part(cap) is cap
    assert cutter.part(causal) is causal


def test_rules_that_read_rows_in_a_way_of_their_own_are_refused_by_name():
    from attn_numba.rules import Sizes

    class Mine(Mask):
        @staticmethod
        def allowed(b, h, i, j, p):
            return i >= j

    class Positional(Mine):
        positional = True

    cutter = Cutter((0, 2), (1, 3), Sizes(1, 1, 1, 4, 4, 1, 1))
    with pytest.raises(NotImplementedError, match="Mine reads rows"):
        cutter.part(~Mine())
    assert isinstance(cutter.part(Positional()), Positional)

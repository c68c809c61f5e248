"""Rules cut to blocks of a call: what they say there of the whole, and empty blocks are known."""

from __future__ import annotations

import itertools
import pickle

import numpy as np
import pytest

import cases
from attn_numba import rules
from attn_numba.rules import Softmax, as_mask, as_modifiers, places_of
from attn_numba.rules.arguments import check_offsets
from attn_numba.rules.blocks import ALL, NONE, SOME, Block, answer, offset_of, part_of

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


@pytest.mark.parametrize("case", WITH_PLACES, ids=lambda case: case.name)
def test_masks_and_modifiers_say_in_a_block_what_they_say_there_of_the_whole(case):
    z = case.sizes
    mask, modifiers, _, offsets = call_of(case)
    places = places_of(z, *offsets)
    scores = np.random.default_rng(0).standard_normal((z.B, z.H, z.M, z.N))
    allowed = None if mask is None else mask.evaluate(places, z)
    with np.errstate(divide="ignore"):
        changed = [rule.evaluate(scores, places, z) for rule in modifiers]
    for block in blocks(z):
        small, at = block.sizes(z), offsets_in(block, offsets)
        here = places_of(small, *at)
        part = None if mask is None else part_of(mask, block, z)
        if mask is not None:
            part.check(small, *at)
            found = np.broadcast_to(part.evaluate(here, small), small[:2] + small[3:5])
            np.testing.assert_array_equal(found, whole_and_part(allowed, block, z))
        for rule, expected in zip(modifiers, changed, strict=True):
            piece = part_of(rule, block, z)
            piece.check(small, *at)
            given = whole_and_part(scores, block, z)
            with np.errstate(divide="ignore"):  # a share of 0 has the logarithm minus infinity
                np.testing.assert_array_equal(piece.evaluate(given, here, small), whole_and_part(expected, block, z))


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


@pytest.mark.parametrize("dropout", [rules.Dropout(0.4, 7), rules.Dropout(0.4, [7, 2**40])], ids=["one", "each"])
def test_a_block_drops_what_the_whole_drops_there(dropout):
    z = rules.Sizes(2, 4, 2, 9, 11, 8, 8)
    whole = dropout.kept(places_of(z, 3, -5), z)
    for block in blocks(z):
        small = block.sizes(z)
        part = part_of(part_of(dropout, block, z), Block(*(slice(0, n) for n in small[:5])), small)
        found = part.kept(places_of(small, 3 + block.i.start, -5 + block.j.start), small)
        np.testing.assert_array_equal(found, whole[block.b, block.h, block.i, block.j])


def test_scores_and_sinks_are_cut_to_heads_and_sequences():
    z = rules.Sizes(2, 4, 2, 5, 5, 3, 3)
    block = Block(slice(1, 2), slice(2, 4), slice(1, 2), slice(0, 5), slice(0, 5))
    rng = np.random.default_rng(0)
    W = rng.standard_normal((4, 3, 6))
    additive = rules.Additive(rng.random((4, 7, 3)), rng.random((2, 7, 3)), rng.random((4, 7)))
    np.testing.assert_array_equal(part_of(rules.Bilinear(W), block, z).W, W[2:])
    part = part_of(additive, block, z)
    part.check(block.sizes(z), 3)
    np.testing.assert_array_equal(part.Wk, additive.Wk[1:])
    np.testing.assert_array_equal(part.w, additive.w[2:])
    sink = rng.random((2, 4))
    np.testing.assert_array_equal(part_of(Softmax(sink), block, z).sink, sink[1:, 2:])
    np.testing.assert_array_equal(part_of(Softmax(sink[0]), block, z).sink, sink[0, 2:])
    assert part_of(Softmax(0.5), block, z).sink == 0.5


def test_every_public_rule_can_be_cut():
    kinds = (rules.Mask, rules.Modifier, rules.Dropout, rules.Score, rules.Normalizer)
    classes = [thing for name in rules.__all__ if isinstance(thing := getattr(rules, name), type)]
    unknown = part_of.dispatch(object)
    bases = {rules.Mask, rules.Modifier, rules.Score, rules.Normalizer}
    assert not [x for x in classes if issubclass(x, kinds) and x not in bases and part_of.dispatch(x) is unknown]


def test_a_rule_of_an_unknown_class_is_refused():
    class Odd(rules.Mask):
        @staticmethod
        def allowed(b, h, i, j, p):
            return (b + j) % 2 == 1

    z = rules.Sizes(1, 1, 1, 4, 4, 2, 2)
    block = Block(*(slice(0, n) for n in z[:5]))
    with pytest.raises(NotImplementedError, match="Odd cannot be cut into blocks; needed a rule of attn_numba"):
        part_of(rules.Causal() & Odd(), block, z)


def test_functions_of_rules_that_were_moved_can_be_sent_to_another_process():
    z = rules.Sizes(2, 2, 2, 4, 4, 2, 2)
    block = Block(slice(1, 2), slice(1, 2), slice(1, 2), slice(0, 4), slice(0, 4))
    part = part_of(rules.CustomMask(keys_of_sequence, (3,)), block, z)
    again = pickle.loads(pickle.dumps(part))
    small = block.sizes(z)
    np.testing.assert_array_equal(again.evaluate(places_of(small), small), part.evaluate(places_of(small), small))


def keys_of_sequence(b, h, i, j, p):
    return j + h < b + p[0]

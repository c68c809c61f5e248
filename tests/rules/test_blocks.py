"""Rules cut to blocks of a call: they say there what they say of the whole."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from attn_numba import rules
from attn_numba.rules import Softmax, places_of
from attn_numba.rules.blocks import Block, learned_place, part_of
from block_cases import WITH_PLACES, blocks, call_of, offsets_in, whole_and_part


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
            if rule.learned is not None:
                name = rule.learned[0]
                np.testing.assert_array_equal(getattr(rule, name)[learned_place(rule, block)], getattr(piece, name))


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

    class OfPositions(Odd):
        positional = True

    mine = OfPositions()
    assert part_of(mine, block._replace(i=slice(1, 3)), z) is mine
    with pytest.raises(NotImplementedError, match="OfPositions cannot be cut"):
        part_of(mine, block, rules.Sizes(1, 2, 1, 4, 4, 2, 2))


def test_tiles_of_a_block_that_begins_inside_one_are_not_cut_smaller():
    """A part of a part too; and where a block begins with a tile, it is an ordinary rule with the same kernels."""
    z = rules.Sizes(2, 2, 1, 40, 50, 8, 8)
    rule = rules.BlockSparse(np.random.default_rng(0).random((2, 1, 6, 5)) < 0.5, (7, 10))
    whole = np.broadcast_to(rule.evaluate(places_of(z), z), (2, 2, 40, 50))
    for i, j, kind in (
        (slice(7, 30), slice(10, 50), "BlockSparse"),
        (slice(8, 30), slice(3, 44), "BlockSparsePart"),
        (slice(33, 33), slice(49, 50), "BlockSparsePart"),
    ):
        block = Block(slice(1, 2), slice(0, 2), slice(0, 1), i, j)
        part, small = part_of(rule, block, z), block.sizes(z)
        assert type(part).__name__ == kind
        assert part.blocks.shape[2] <= -(-small.M // 7) + 1
        shape = (1, 2, small.M, small.N)
        found = np.broadcast_to(part.evaluate(places_of(small), small), shape)
        np.testing.assert_array_equal(found, whole_and_part(whole, block, z))
        rest = Block(slice(0, 1), slice(1, 2), slice(0, 1), slice(0, small.M), slice(small.N // 3, small.N))
        again = pickle.loads(pickle.dumps(part_of(part, rest, small)))
        there = rest.sizes(small)
        found_again = np.broadcast_to(again.evaluate(places_of(there), there), (1, 1, there.M, there.N))
        np.testing.assert_array_equal(found_again, found[:, 1:, :, small.N // 3 :])


def test_functions_of_rules_that_were_moved_can_be_sent_to_another_process():
    z = rules.Sizes(2, 2, 2, 4, 4, 2, 2)
    block = Block(slice(1, 2), slice(1, 2), slice(1, 2), slice(0, 4), slice(0, 4))
    part = part_of(rules.CustomMask(keys_of_sequence, (3,)), block, z)
    again = pickle.loads(pickle.dumps(part))
    small = block.sizes(z)
    np.testing.assert_array_equal(again.evaluate(places_of(small), small), part.evaluate(places_of(small), small))


def keys_of_sequence(b, h, i, j, p):
    return j + h < b + p[0]

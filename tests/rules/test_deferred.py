"""Rules made later: what is taken out of the rules of a call, and that what comes back makes the same rules."""

from __future__ import annotations

import numpy as np
import pytest

import attn_numba as an
from attn_numba.rules.data import AnyArray
from attn_numba.rules.deferred import Template, defer, gradients_of
from attn_numba.rules.results import Gradients

NOTHING = {"mask": None, "modifiers": ()}


class Foreign:
    """An array of a framework, which no rule can be made of."""

    def __init__(self, values: object) -> None:
        self.values = np.asarray(values)


def emptied(**rules: object) -> tuple[Template, list[AnyArray], list[tuple[str, bool]]]:
    """Return the template of these rules, and the values, names and use of what was taken out."""
    template = Template({**NOTHING, **rules}, lambda x: isinstance(x, Foreign))
    operands = template.take_operands()
    assert template.take_operands() == []
    return template, [x.array.values for x in operands], [(x.label, x.learned) for x in operands]


@pytest.mark.parametrize(
    ("rule", "operands"),
    [
        (defer(an.Bias, Foreign([0.5])), [("Bias: array", True)]),
        (defer(an.ALiBi, slopes=Foreign([0.5])), [("ALiBi: slopes", True)]),
        (defer(an.Temperature, Foreign(2.0)), [("Temperature: t", True)]),
        (
            defer(an.AdaptiveSpan, Foreign(2.0), Foreign(1.0)),
            [("AdaptiveSpan: span", True), ("AdaptiveSpan: ramp", False)],
        ),
        (defer(an.SoftCap, Foreign(2.0)), [("SoftCap: cap", False)]),
        (defer(an.ReplaceExcluded, Foreign([True]), value=-1.0), [("ReplaceExcluded: mask", False)]),
        (defer(lambda x: an.ALiBi(x), Foreign(2.0)), [("<lambda>: x", False)]),
        (defer(lambda *x: an.ALiBi(*x), Foreign(2.0)), [("<lambda>: x", False)]),
    ],
)
def test_modifiers(rule, operands):
    template, arrays, found = emptied(modifiers=rule)
    assert found == operands
    made = template.filled(arrays)[0]["modifiers"]
    assert isinstance(made, an.rules.Modifier)  # one given, one back
    (again,) = emptied(modifiers=[rule])[0].filled(arrays)[0]["modifiers"]
    assert type(again) is type(made)


def test_every_place_of_a_call():
    score = defer(an.Additive, Foreign(np.ones((2, 3))), Foreign(np.ones((2, 4))), w=Foreign(np.ones(2)))
    template, arrays, found = emptied(
        mask=defer(an.Padding, Foreign([3, 4])), score=score, normalizer=defer(an.Softmax, Foreign(0.5)),
        query_offset=Foreign(7), dropout=defer(an.Dropout, 0.25, seed=Foreign(3)), scale=0.5,
        modifiers=[an.SoftCap(2.0), defer(an.Bias, Foreign(np.ones(4)))],
    )  # fmt: skip
    assert [label for label, learned in found if learned] == [
        "Bias: array", "Additive: Wq", "Additive: Wk", "Additive: w", "Softmax: sink"
    ]  # fmt: skip
    rules, owners = template.filled(arrays)
    assert rules["mask"].key_lengths.tolist() == [3, 4]
    assert rules["score"].Wk.shape == (2, 4)
    assert rules["normalizer"].sink == 0.5
    assert rules["query_offset"] == 7
    assert (rules["dropout"].rate, rules["dropout"].seed) == (0.25, 3)
    assert rules["scale"] == 0.5
    assert [type(x) for x in rules["modifiers"]] == [an.SoftCap, an.Bias]
    learned = [owner for owner in owners if owner]
    assert [(rule is rules["score"], name) for rule, name in learned[1:4]] == [(True, "Wq"), (True, "Wk"), (True, "w")]

    gradients = Gradients(0, 0, 0, [
        (rules["modifiers"][1], {"array": "bias"}),
        (rules["score"], {"Wq": "wq", "Wk": "wk", "w": "w"}),
        (rules["normalizer"], {"sink": "sink"}),
    ])  # fmt: skip
    found = [x for x in gradients_of(owners, gradients) if x is not None]
    assert found == ["bias", "wq", "wk", "w", "sink"]
    assert len(gradients_of(owners, gradients)) == len(arrays)


def test_what_is_known_without_values():
    """Of placeholders: rules that only ask for their shapes are made, others wait, and an offset is a number."""
    template, arrays, _ = emptied(
        mask=defer(an.Padding, Foreign([3, 4])), dropout=defer(an.Dropout, 0.1, Foreign(1)), query_offset=Foreign(5),
        modifiers=[defer(lambda x: an.ALiBi(x), Foreign(1.0)), an.SoftCap(1.0), defer(an.Bias, Foreign([1.0, 2.0]))],
    )  # fmt: skip
    known, _ = template.filled([np.broadcast_to(np.zeros((), x.dtype), x.shape) for x in arrays], known_only=True)
    assert [type(x) for x in known["modifiers"]] == [an.SoftCap, an.Bias]
    assert known["modifiers"][1].array.shape == (2,)
    assert known["mask"] is known["dropout"] is None
    assert known["query_offset"] == 0


def test_what_may_change_is_copied():
    mask, offset, bias = np.ones((2, 2), bool), np.array([1, 2]), np.ones(2)
    template, _, _ = emptied(mask=mask, key_offset=offset, modifiers=defer(an.Bias, bias))
    mask[:], offset[:], bias[:] = False, 0, 0
    rules, _ = template.filled([])
    assert (rules["modifiers"].array == 1).all()
    assert rules["mask"].array.all()
    assert rules["key_offset"].tolist() == [1, 2]


def test_modifiers_that_are_none():
    assert emptied(modifiers=None)[0].filled([])[0]["modifiers"] == []
    assert emptied(modifiers=(an.SoftCap(1.0),))[0].filled([])[0]["modifiers"][0].cap == 1


def test_parts_are_those_of_the_same_rules():
    cap = an.SoftCap(1.0)
    first, second = (emptied(modifiers=[cap, defer(an.ALiBi, Foreign(x))], scale=0.5)[0].parts for x in (1.0, 2.0))
    assert first == second
    assert first != emptied(modifiers=[cap, defer(an.Temperature, Foreign(1.0))], scale=0.5)[0].parts
    assert first != emptied(modifiers=[an.SoftCap(1.0), defer(an.ALiBi, Foreign(1.0))], scale=0.5)[0].parts
    assert emptied(modifiers=cap)[0].parts != emptied(modifiers=[cap])[0].parts


def test_a_float_mask_is_refused_at_once():
    with pytest.raises(TypeError, match="mask has dtype float64; needed a boolean array"):
        emptied(mask=np.ones((2, 2)))

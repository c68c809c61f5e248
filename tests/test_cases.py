"""The list of cases itself: complete, deterministic, and what it says it is."""

import inspect

import numpy as np
import pytest

from attn_numba import rules
from attn_numba.rules.base import Rule
from cases import BY_NAME, CASES, allowed, rules_of

ABSTRACT = {rules.Mask, rules.Modifier, rules.Score, rules.Normalizer}
PUBLIC = [
    rule
    for name in rules.__all__
    if inspect.isclass(rule := getattr(rules, name))
    and issubclass(rule, Rule | rules.Score | rules.Normalizer | rules.Dropout)
    and rule not in ABSTRACT
]


def test_names_differ():
    assert len(BY_NAME) == len(CASES)


@pytest.mark.parametrize("rule", PUBLIC, ids=lambda rule: rule.__name__)
def test_every_public_rule_has_a_case(rule):
    assert any(type(used) is rule for case in CASES for used in rules_of(case.kwargs()))


def test_every_public_rule_names_its_source():
    for rule in PUBLIC:
        doc = inspect.getdoc(rule)
        assert "References\n---" in doc or rule in (rules.AllOf, rules.AnyOf, rules.Not), rule


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case_builds(case):
    z = case.sizes
    q, k, v, kwargs = case.build(np.float32)
    assert q.dtype == k.dtype == v.dtype == np.float32
    assert q.ndim == case.rank
    assert np.prod(q.shape) == z.B * z.H * z.M * z.D
    assert np.prod(v.shape) == z.B * z.Hk * z.N * z.E
    again = case.build(np.float32)
    for x, y in zip((q, k, v), again[:3], strict=True):
        np.testing.assert_array_equal(x, y)
    if case.poison == "hidden":
        visible = allowed(z, kwargs).reshape(z.B, z.Hk, -1, z.N).any(axis=2)
        assert np.isfinite(k[visible]).all()
        assert np.isfinite(v[visible]).all()
        assert not np.isfinite(v[~visible]).all()


def test_layouts_are_what_they_say():
    strides = {
        name: BY_NAME[f"layout {name}"].build(np.float64)[0].strides
        for name in ("swapped", "reversed", "spaced", "columns", "shared")
    }
    assert strides["swapped"][1] < strides["swapped"][2]
    assert strides["reversed"][3] == -8
    assert strides["spaced"][3] == 16
    assert strides["columns"][2] == 8
    assert strides["shared"][:2] == (0, 0)

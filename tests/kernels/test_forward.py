"""Every backend against the reference, over all cases and dtypes."""

import numpy as np
import pytest

import attn_numba as an
from attn_numba import rules
from attn_numba.rules.base import Rule
from attn_numba.testing import check_attention
from cases import CASES, rules_of
from combinations import BACKENDS, DTYPES, OTHER_RULES, fits


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_case(case, dtype, backend):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k, v, kwargs = case.build(dtype)
    check_attention(q, k, v, backend, name=case.name, **kwargs)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_reference_as_a_backend(case):
    q, k, v, kwargs = case.build("float32")
    check_attention(q, k, v, "reference", name=case.name, **kwargs)


@pytest.mark.parametrize("name", [name for name in rules.__all__ if name[0].isupper() and name != "SYMBOLS"])
def test_every_rule_has_a_case(name):
    rule = getattr(rules, name)
    abstract = (rules.Mask, rules.Modifier, rules.Score, rules.Normalizer)
    if rule in (*abstract, rules.MaskFormula, rules.Places, rules.Sizes):
        pytest.skip("no rule but what rules are made of")
    assert issubclass(rule, Rule | rules.Score | rules.Normalizer | rules.Dropout)
    assert any(type(used) is rule for case in CASES for used in rules_of(case.kwargs()))


COMBINED = [(case, name) for case in CASES for name, other in OTHER_RULES.items() if fits(case, other)]


@pytest.mark.parametrize(("case", "name"), COMBINED, ids=lambda x: getattr(x, "name", x))
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_case_with_another_rule(case, name, backend):
    """Every mask and modifier, grouped heads, empty rows and hidden NaN with each normalizer and the other score."""
    q, k, v, kwargs = case.build("float32")
    ((argument, rule),) = OTHER_RULES[name].items()
    kwargs[argument] = rule(np.random.default_rng(4), case.sizes) if callable(rule) else rule
    check_attention(q, k, v, backend, name=f"{case.name}, {name}", **kwargs)


@pytest.mark.parametrize("size", [300, 512, 1000, 2000])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_large_head_sizes(size, backend):
    rng = np.random.default_rng(size)
    q, k, v = (rng.standard_normal((1, 4, n, size)).astype(np.float32) for n in (96, 150, 150))
    check_attention(q, k, v, backend, name=f"head size {size}")


@pytest.mark.parametrize("scale", [1e-40, 1e-20, 0.0, -1e-20])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_tiny_scales(scale, dtype, backend):
    """Keys weigh the same, and those that are excluded nothing."""
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 2, 40, 24)).astype(dtype) for _ in range(3))
    for mask in (None, an.Causal()):
        check_attention(q, k, v, backend, name=f"scale {scale}", scale=scale, mask=mask)


@pytest.mark.parametrize("fill", [-1e9, -1e15, -1e25, float(np.finfo(np.float32).min), 1e25])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_huge_scores(fill, dtype, backend):
    """Old fills: a row that has nothing else is uniform, however large the number."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((2, 2, n, 16)).astype(dtype) for n in (9, 70, 70))
    kept = rng.random((9, 70)) < 0.5
    kept[::3] = False
    modifiers = [an.ReplaceExcluded(kept, fill)]
    check_attention(q, k, v, backend, name="replaced", modifiers=modifiers)
    out, lse = an.attention(q, k, v, modifiers=modifiers, backend=backend, return_lse=True)
    np.testing.assert_allclose(out[:, :, 0], v.mean(2), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(lse[:, :, 0], fill, rtol=1e-6)


def test_results_by_what_is_asked_for(backend):
    q, k, v, _ = CASES[0].build("float32")
    out = an.attention(q, k, v, backend=backend)
    assert isinstance(out, np.ndarray)
    whole = an.attention(q, k, v, backend=backend, return_lse=True, return_weights=True)
    assert whole._fields == ("out", "lse", "weights")
    assert an.attention(q, k, v, backend=backend, return_lse=True)._fields == ("out", "lse")
    assert an.attention(q, k, v, backend=backend, return_weights=True)._fields == ("out", "weights")
    np.testing.assert_array_equal(out, whole.out)
    np.testing.assert_array_equal(an.attention(q, k, v, backend=backend, return_weights=True).weights, whole.weights)


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_results_have_the_rank_of_q(rank, backend):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape)[(0,) * (4 - rank)] for shape in ((2, 4, 5, 3), (2, 2, 7, 3), (2, 2, 7, 6)))
    out, lse, weights = an.attention(q, k, v, backend=backend, return_lse=True, return_weights=True)
    whole = np.s_[(0,) * (4 - rank)]
    assert out.shape == np.empty((2, 4, 5, 6))[whole].shape
    assert lse.shape == np.empty((2, 4, 5))[whole].shape
    assert weights.shape == np.empty((2, 4, 5, 7))[whole].shape


def test_ranks_may_differ(backend):
    """Missing leading axes count as 1, array by array; the result has the rank of q."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((1, 4, 5, 3)), rng.standard_normal((7, 3)), rng.standard_normal((1, 7, 2))
    expected = an.attention(q, k[None, None], v[None], backend=backend)
    np.testing.assert_array_equal(an.attention(q, k, v, backend=backend), expected)
    assert expected.shape == (1, 4, 5, 2)


def test_a_value_worked_by_hand(backend):
    """Scores 0 and ln 3, so weights 1/4 and 3/4, lse ln 4."""
    q, k, v = np.array([[1.0]]), np.array([[0.0], [np.log(3.0)]]), np.array([[4.0, 0.0], [8.0, 2.0]])
    found = an.attention(q, k, v, scale=1.0, backend=backend, return_lse=True, return_weights=True)
    np.testing.assert_allclose(found.weights, [[0.25, 0.75]], rtol=1e-15)
    np.testing.assert_allclose(found.out, [[7.0, 1.5]], rtol=1e-15)
    np.testing.assert_allclose(found.lse, [np.log(4.0)], rtol=1e-15)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_give_the_mean(dtype, backend):
    """With q = 0 every weight is 1 / N; sums of small integers are exact in every dtype."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    v = np.arange(8.0).reshape(8, 1).astype(dtype)
    q, k = np.zeros((3, 4), dtype), np.ones((8, 4), dtype)
    found = an.attention(q, k, v, backend=backend, return_lse=True)
    np.testing.assert_array_equal(found.out.astype(float), np.full((3, 1), 3.5))
    np.testing.assert_allclose(found.lse, np.log(8), rtol=1e-6)


@pytest.mark.parametrize("limit", [3, 7])
def test_a_parameter_compared_and_negated(limit, backend):
    """What a rule makes of its numbers alone is a truth value too, not a Python bool whose ~ is an integer."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 1, 20, 8)) for _ in range(3))
    mask = an.CustomMask(lambda b, h, i, j, p: ~(p[0] >= 5) & (j <= i), (limit,))
    found = an.attention(q, k, v, mask=mask, backend=backend)
    expected = an.attention(q, k, v, mask=an.Causal(), backend=backend) if limit < 5 else np.zeros_like(found)
    np.testing.assert_array_equal(found, expected)
    assert an.mask_array(mask, (1, 1, 20, 20)).dtype == bool
    assert an.mask_array(mask, (1, 1, 20, 20)).sum() == (210 if limit < 5 else 0)

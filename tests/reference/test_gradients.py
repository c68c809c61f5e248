"""Gradients of the reference: by hand, by central differences, by PyTorch's autograd, and what must not reach them.

The kernels of the CPU are held to PyTorch here too.
"""

from __future__ import annotations

import dataclasses
import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest

import attn_numba as an
from attn_numba import reference
from attn_numba.rules.results import Gradients
from cases import CASES, Case, rules_of, sized, with_

vjp = reference.attention_vjp
HALF = np.sqrt(0.5)

# --- by hand: a query that scores 2 with both of its keys, whose values are 0 and 4 ---

Q, K, V = np.array([[2.0, 1.0]]), np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[0.0], [4.0]])
ONE = np.ones((1, 1))


def test_two_keys_by_hand():
    found = vjp(Q, K, V, ONE, scale=1.0)  # weights 1/2; dw = 0, 4; mean 2; ds = -1, 1
    np.testing.assert_allclose(found.v, [[0.5], [0.5]], rtol=1e-15)
    np.testing.assert_allclose(found.q, [[-1, 2]], rtol=1e-15)
    np.testing.assert_allclose(found.k, [[-2, -1], [2, 1]], rtol=1e-15)


def test_one_key_by_hand():
    found = vjp(Q, K[:1], V[1:], 3 * ONE)
    assert found.v.tolist() == [[3]]
    assert (found.q == 0).all()
    assert (found.k == 0).all()


@pytest.mark.parametrize(
    ("normalizer", "ds"),
    [
        (an.Softmax(2.0), [-4 / 9, 8 / 9]),  # weights 1/3, mean 4/3
        (an.Sparsemax(), [-2, 2]),
        (an.Entmax15(), [-2 * HALF, 2 * HALF]),
        (an.DoubleSoftmax(), [-0.5, 0.5]),
    ],
)
def test_normalizers_by_hand(normalizer, ds):
    bias = an.Bias(np.zeros((1, 2)))
    found = vjp(Q, K, V, ONE, scale=1.0, modifiers=bias, normalizer=normalizer)
    np.testing.assert_allclose(found.of(bias), [ds], rtol=1e-14)
    np.testing.assert_allclose(found.q, np.array([ds]) @ K, rtol=1e-14)
    np.testing.assert_allclose(found.k, np.transpose([ds]) @ Q, rtol=1e-14)


def test_a_key_outside_the_support_by_hand():
    # Scores 1, 0.8, -3: threshold 0.4, weights 0.6, 0.4, 0; the third is not in the mean of the dw 1, 3, 100.
    bias = an.Bias([1.0, 0.8, -3.0])
    v = np.array([[1.0], [3.0], [100.0]])
    found = vjp(np.ones((1, 1)), np.zeros((3, 1)), v, ONE, modifiers=bias, normalizer=an.Sparsemax())
    np.testing.assert_allclose(found.of(bias), [-1, 1, 0], atol=1e-15)
    np.testing.assert_allclose(found.v.ravel(), [0.6, 0.4, 0], atol=1e-15)


def test_rules_by_hand():
    alibi, heat, sink = an.ALiBi([0.0]), an.Temperature(1.0), an.Softmax(2.0)
    found = vjp(Q, K, V, ONE, scale=1.0, modifiers=[alibi, heat], normalizer=sink, query_offset=3)
    np.testing.assert_allclose(found.of(alibi), [3 * 4 / 9 - 2 * 8 / 9], rtol=1e-14)  # distances 3 and 2
    np.testing.assert_allclose(found.of(heat), -2 * (-4 / 9 + 8 / 9), rtol=1e-14)  # both scores are 2
    np.testing.assert_allclose(found.of(sink), -4 / 9, rtol=1e-14)  # weight 1/3, dw 0, mean 4/3
    cap = vjp(Q, K, V, ONE, scale=1.0, modifiers=an.SoftCap(2.0))
    np.testing.assert_allclose(cap.q, np.array([[-1, 2]]) * (1 - np.tanh(1) ** 2), rtol=1e-14)


def test_span_by_hand():
    # Distances 0, 1, 2 with span 0 and ramp 3: ratios 1, 2/3, 1/3, weights 1/2, 1/3, 1/6; dw = 0, 6, 0; mean 2.
    near = an.AdaptiveSpan(0.0, 3.0)
    v = np.array([[0.0], [6.0], [0.0]])
    found = vjp(np.zeros((1, 1)), np.zeros((3, 1)), v, ONE, modifiers=near, query_offset=0)
    np.testing.assert_allclose(found.of(near), 4 / 3 / 2 - 2 / 6 / 1, rtol=1e-14)  # ds over 3 * ratio, on the ramp


def test_a_replaced_score_gives_none():
    fill = an.ReplaceExcluded(np.array([True, False]), 2.0)
    found = vjp(Q, K, V, ONE, scale=1.0, modifiers=fill)
    np.testing.assert_allclose(found.q, [[-1, 0]], rtol=1e-15)
    np.testing.assert_allclose(found.k, [[-2, -1], [0, 0]], rtol=1e-15)


def test_dropout_by_hand():
    dropout = next(
        an.Dropout(0.5, seed)
        for seed in range(99)
        if reference.attention(Q, K, np.eye(2), dropout=an.Dropout(0.5, seed), query_offset=0).tolist() == [[0, 1]]
    )
    found = vjp(Q, K, V, ONE, scale=1.0, dropout=dropout, query_offset=0)  # dw = 0, 8; mean 4; ds = -2, 2
    np.testing.assert_allclose(found.v, [[0], [1]], rtol=1e-15)
    np.testing.assert_allclose(found.q, [[-2, 4]], rtol=1e-15)


# --- central differences ---

SMALL = {"B": 2, "H": 4, "Hk": 2, "M": 5, "N": 7, "D": 3, "E": 2}


def numbers(seed=0):
    return np.random.default_rng(seed)


def custom(s, b, h, i, j, p):
    return s * np.exp(-p[0] * abs(i - j)) + 0.1 * s * s


def custom_slope(s, b, h, i, j, p):
    return np.exp(-p[0] * abs(i - j)) + 0.2 * s


MODIFIERS: dict[str, Any] = {
    "SoftCap": lambda: an.SoftCap(1.5),
    "Bias": lambda: an.Bias(numbers().standard_normal((2, 4, 5, 7))),
    "Bias by head and key": lambda: an.Bias(numbers().standard_normal((4, 1, 7))),
    "Bias, one number": lambda: an.Bias(0.3),
    "ALiBi": lambda: an.ALiBi(numbers().random(4)),
    "ALiBi, one slope": lambda: an.ALiBi(0.2),
    "Temperature": lambda: an.Temperature(0.5 + numbers().random((2, 4, 5))),
    "Temperature by head": lambda: an.Temperature(0.5 + numbers().random((4, 1))),
    "ReplaceExcluded": lambda: an.ReplaceExcluded(an.SlidingWindow(1, 1), 0.5),
    "AdaptiveSpan": lambda: an.AdaptiveSpan(
        numbers().integers(0, 2, (2, 4, 5)) + numbers(1).uniform(0.2, 0.5, (2, 4, 5)), 2.3
    ),
    "AdaptiveSpan, one number": lambda: an.AdaptiveSpan(0.7, 2.6),
    "CustomModifier": lambda: an.CustomModifier(custom, (0.1,), custom_slope),
    "all": lambda: [MODIFIERS[name]() for name in ("SoftCap", "Bias", "ALiBi", "Temperature", "ReplaceExcluded")],
    "all, another order": lambda: [
        MODIFIERS[name]() for name in ("AdaptiveSpan", "CustomModifier", "Temperature", "SoftCap", "ALiBi", "Bias")
    ],
    "replaced, then capped": lambda: [MODIFIERS[name]() for name in ("Bias", "ReplaceExcluded", "SoftCap")],
}
SCORES: dict[str, Any] = {
    "Cosine": an.Cosine,
    "Bilinear": lambda: an.Bilinear(numbers().standard_normal((3, 3))),
    "Bilinear by head": lambda: an.Bilinear(numbers().standard_normal((4, 3, 3))),
    "Additive": lambda: an.Additive(*numbers().standard_normal((2, 6, 3)), numbers(1).standard_normal(6)),
    "Additive by head": lambda: an.Additive(
        numbers().standard_normal((4, 6, 3)), numbers(1).standard_normal((2, 6, 3)), numbers(2).standard_normal((4, 6))
    ),
}
NORMALIZERS: dict[str, Any] = {
    "Softmax with a sink": lambda: an.Softmax(0.3),
    "sink by head": lambda: an.Softmax(numbers().standard_normal(4)),
    "sink by sequence": lambda: an.Softmax(numbers().standard_normal((2, 1))),
    "Sparsemax": an.Sparsemax,
    "Entmax15": an.Entmax15,
    "DoubleSoftmax": an.DoubleSoftmax,
}
OPTIONS: dict[str, Any] = {
    "plain": dict,
    "Causal": lambda: {"mask": an.Causal()},
    "window, offsets": lambda: {"mask": an.SlidingWindow(2, 1), "query_offset": [4, -1], "key_offset": [2, -3]},
    "scale 0": lambda: {"scale": 0.0},
    "scale negative": lambda: {"scale": -0.7},
    "Dropout": lambda: {"dropout": an.Dropout(0.4, 5)},
    "sink, mask, dropout": lambda: {
        "normalizer": an.Softmax([0.1, 1.0, -1.0, 0.0]), "mask": an.Causal(), "dropout": an.Dropout(0.4, 5),
        "modifiers": MODIFIERS["Bias"](),
    },
    "Sparsemax, mask, cap, cosine": lambda: {
        "normalizer": an.Sparsemax(), "mask": an.Causal(), "modifiers": [an.SoftCap(2.0), an.ALiBi(0.05)],
        "score": an.Cosine(), "scale": 1.5,
    },
    "Entmax15, additive, dropout": lambda: {
        "normalizer": an.Entmax15(), "score": SCORES["Additive"](), "dropout": an.Dropout(0.3, 1),
    },
    "DoubleSoftmax, bilinear, mask": lambda: {
        "normalizer": an.DoubleSoftmax(), "score": SCORES["Bilinear by head"](), "mask": an.Causal(),
    },
}  # fmt: skip
CALLS = {
    **OPTIONS,
    **{name: lambda make=make: {"modifiers": make()} for name, make in MODIFIERS.items()},
    **{name: lambda make=make: {"score": make()} for name, make in SCORES.items()},
    **{name: lambda make=make: {"normalizer": make()} for name, make in NORMALIZERS.items()},
}


def call(name):
    """Return q, k, v, dout and rules of a small call."""
    z, rng = SMALL, numbers(7)
    q, k = rng.standard_normal((z["B"], z["H"], z["M"], z["D"])), rng.standard_normal((z["B"], z["Hk"], z["N"], z["D"]))
    v = rng.standard_normal((z["B"], z["Hk"], z["N"], z["E"]))
    dout = rng.standard_normal((z["B"], z["H"], z["M"], z["E"]))
    return q, k, v, dout, {"query_offset": 2, **CALLS[name]()}


def arrays_of(kwargs):
    """Return each (rule, argument) of a call whose array has a gradient."""
    modifiers = kwargs.get("modifiers", ())
    rules = list(modifiers) if isinstance(modifiers, (list, tuple)) else [modifiers]
    rules += [kwargs.get("normalizer"), kwargs.get("score")]
    names = {"Bias": ["array"], "ALiBi": ["slopes"], "Temperature": ["t"], "AdaptiveSpan": ["span"]}
    names |= {"Softmax": ["sink"], "Bilinear": ["W"], "Additive": ["Wq", "Wk", "w"]}
    return [
        (rule, name) for rule in rules for name in names.get(type(rule).__name__, []) if getattr(rule, name) is not None
    ]


def gradient_of(found, rule, name):
    gradient = found.of(rule)
    return getattr(gradient, name) if hasattr(gradient, "_fields") else gradient


def with_array(kwargs, rule, name, array):
    """Return the rules of a call with one array of one of them replaced."""
    fields = {field.name: getattr(rule, field.name) for field in dataclasses.fields(rule)} | {name: array}
    other = type(rule)(**fields)

    def changed(x):
        return [changed(part) for part in x] if isinstance(x, (list, tuple)) else other if x is rule else x

    return {key: changed(x) if key != "mask" else x for key, x in kwargs.items()}


def measured(function, x, direction, step):
    """Return the derivative of a function along a direction, by central differences of the sixth order."""
    terms = ((3 / 4, 1), (-3 / 20, 2), (1 / 60, 3))
    return sum(c * (function(x + n * step * direction) - function(x - n * step * direction)) for c, n in terms) / step


@pytest.mark.parametrize("name", CALLS)
def test_central_differences(name):
    q, k, v, dout, kwargs = call(name)
    found = vjp(q, k, v, dout, **kwargs)
    rng = numbers(3)
    step = 2e-5 if "Sparsemax" in name else 1e-3  # within one support it is smooth, and supports are narrow

    def compare(gradient, function, x):
        assert gradient.shape == x.shape
        for _ in range(3):
            direction = rng.standard_normal(x.shape)
            direction /= np.linalg.norm(direction)
            slope = measured(function, x, direction, step)
            error = abs(slope - (gradient * direction).sum())
            # The second term is what rounding of the sums measured comes to; some gradients are 0 by a law.
            assert error <= 1e-9 * np.linalg.norm(gradient) + 1e-11, (error, np.linalg.norm(gradient))

    arrays = {"q": q, "k": k, "v": v}
    for letter, x in arrays.items():
        compare(
            getattr(found, letter),
            lambda x, letter=letter: (dout * reference.attention(**{**arrays, letter: x}, **kwargs)).sum(),
            x,
        )
    for rule, argument in arrays_of(kwargs):
        compare(
            gradient_of(found, rule, argument),
            lambda x, at=(rule, argument): (dout * reference.attention(q, k, v, **with_array(kwargs, *at, x))).sum(),
            np.asarray(getattr(rule, argument)),
        )


# --- PyTorch ---


def relative_error(found, expected):
    largest = np.abs(expected).max(initial=0.0)
    difference = np.abs(found - expected).max(initial=0.0)
    return difference / largest if largest > 1e-10 else difference  # some gradients are 0 by a law


COMPUTE = {"reference": vjp, "cpu": partial(an.attention_vjp, backend="cpu")}


def check_against_torch(compute, q, k, v, dout, kwargs, allowed=1e-9):
    pytest.importorskip("torch")
    import autograd

    found = compute(q, k, v, dout, **kwargs)
    inputs, learned = autograd.gradients(q, k, v, dout, kwargs, torch_custom)
    for letter, expected in inputs.items():
        assert relative_error(getattr(found, letter), expected.reshape(getattr(found, letter).shape)) < 1e-9, letter
    at = {(id(rule), name): (rule, name) for rule, name in arrays_of(kwargs)}
    assert set(at) == set(learned)
    for key, expected in learned.items():
        gradient = gradient_of(found, *at[key])
        assert gradient.shape == expected.shape
        assert relative_error(gradient, expected) < allowed, at[key]


def torch_custom(s, i, j, modifier):
    import torch

    assert modifier.apply is custom
    return s * torch.exp(-modifier.params[0] * (i - j).abs()) + 0.1 * s * s


@pytest.mark.parametrize("backend", COMPUTE)
@pytest.mark.parametrize("name", CALLS)
def test_torch_of_small_calls(name, backend):
    check_against_torch(COMPUTE[backend], *call(name))


def is_smooth(case: Case) -> bool:
    return not case.spoiled and not any(
        isinstance(rule, an.CustomModifier) and rule.slope is None for rule in rules_of(case.kwargs())
    )


@pytest.mark.parametrize("backend", COMPUTE)
@pytest.mark.parametrize("case", [case for case in CASES if is_smooth(case)], ids=lambda case: case.name)
def test_torch_of_all_cases(case, backend):
    q, k, v, kwargs = case.build(np.float64)
    dout = numbers(11).standard_normal((*q.shape[:-1], v.shape[-1]))
    # Scores of -1e9 by a temperature: terms a billion times their sum, which so has nine digits less.
    allowed = 1e-6 if case.name == "old fill, divided by the size" else 1e-9
    check_against_torch(COMPUTE[backend], q, k, v, dout, kwargs, allowed)


def test_enough_cases_are_smooth():
    assert sum(map(is_smooth, CASES)) > 0.9 * len(CASES)


# --- what is not there ---

HIDDEN = an.Padding([5, 3], key_starts=1)
WITH_HIDDEN = {
    "plain": {},
    **{name: {"score": make()} for name, make in SCORES.items()},
    **{name: {"normalizer": make()} for name, make in NORMALIZERS.items()},
    "modifiers": {"modifiers": MODIFIERS["all"]()},
    "span, custom": {"modifiers": MODIFIERS["all, another order"]()},
    "dropout": {"dropout": an.Dropout(0.3, 2)},
}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("name", WITH_HIDDEN)
def test_an_excluded_key_has_gradient_0_and_changes_no_bit(name, bad):
    q, k, v, dout, _ = call("plain")
    kwargs = {"mask": HIDDEN, "query_offset": 2, **WITH_HIDDEN[name]}
    clean = vjp(q, k, v, dout, **kwargs)
    hidden = ~an.mask_array(HIDDEN, (2, 1, 1, 7))[:, 0, 0]
    for b, j in np.argwhere(hidden):
        k[b, :, j], v[b, :, j] = bad, -bad
    found = vjp(q, k, v, dout, **kwargs)
    for letter in "qkv":
        np.testing.assert_array_equal(getattr(found, letter), getattr(clean, letter))
    for rule, argument in arrays_of(kwargs):
        np.testing.assert_array_equal(gradient_of(found, rule, argument), gradient_of(clean, rule, argument))
    assert (found.k.swapaxes(1, 2)[hidden] == 0).all()
    assert (found.v.swapaxes(1, 2)[hidden] == 0).all()
    assert np.abs(found.k.swapaxes(1, 2)[~hidden]).min() > 0


@pytest.mark.parametrize("name", WITH_HIDDEN)
def test_an_empty_row_has_gradient_0_and_gives_none(name):
    q, k, v, dout, _ = call("plain")
    mask = np.ones((5, 7), bool)
    mask[2] = False
    kwargs = {"mask": mask, "query_offset": 2, **WITH_HIDDEN[name]}
    clean = vjp(q, k, v, dout, **kwargs)
    q[:, :, 2], dout[:, :, 2] = np.nan, np.inf
    found = vjp(q, k, v, dout, **kwargs)
    assert (found.q[:, :, 2] == 0).all()
    for letter in "qkv":
        np.testing.assert_array_equal(getattr(found, letter), getattr(clean, letter))
    for rule, argument in arrays_of(kwargs):
        np.testing.assert_array_equal(gradient_of(found, rule, argument), gradient_of(clean, rule, argument))


def test_no_key_at_all():
    for kwargs in ({"mask": an.Padding(0)}, {"normalizer": an.Softmax(0.5), "mask": an.Padding(0)}):
        q, k, v, dout, _ = call("plain")
        found = vjp(q, k, v, dout, **kwargs)
        assert all((getattr(found, letter) == 0).all() for letter in "qkv")
    sink = an.Softmax(0.5)
    assert vjp(q, k[:, :, :0], v[:, :, :0], dout, normalizer=sink).of(sink) == 0
    assert vjp(q[:, :, :0], k, v, dout[:, :, :0]).k.tolist() == np.zeros(k.shape).tolist()


def test_a_sink_of_minus_infinity_is_none():
    q, k, v, dout, kwargs = call("Causal")
    sink = an.Softmax(-np.inf)
    found, plain = vjp(q, k, v, dout, **kwargs, normalizer=sink), vjp(q, k, v, dout, **kwargs)
    assert found.of(sink) == 0
    np.testing.assert_array_equal(found.q, plain.q)
    empty = vjp(q, k, v, dout, mask=an.Padding([0, 7]), normalizer=sink)
    assert empty.of(sink) == 0
    assert (empty.q[0] == 0).all()


def test_a_key_excluded_by_bias_or_span_has_gradient_0():
    q, k, v, dout, _ = call("plain")
    bias = an.Bias(np.where(np.arange(7) == 3, -np.inf, 0.0))
    near = an.AdaptiveSpan(0.0, 1.0)  # of the key at the query's own position alone
    for modifier, hidden in ((bias, np.arange(7) == 3), (near, np.isin(np.arange(7), [0, 1]))):
        k[:, :, hidden] = v[:, :, hidden] = np.nan
        found = vjp(q, k, v, dout, modifiers=modifier, query_offset=2)
        assert all(np.isfinite(getattr(found, letter)).all() for letter in "qkv")
        assert (found.k[:, :, hidden] == 0).all()
        assert (found.v[:, :, hidden] == 0).all()
        assert np.isfinite(found.of(modifier)).all()
        k[:, :, hidden] = v[:, :, hidden] = 1.0
    assert vjp(q, k, v, dout, modifiers=bias).of(bias)[3] == 0


def test_a_nan_that_is_seen_reaches_what_sees_it_and_no_other():
    q, k, v, dout, _ = call("plain")
    k[0, 0, 4] = np.nan  # of the rows at positions 4 and up, in heads 0 and 1 of sequence 0
    clean = vjp(q, np.nan_to_num(k), v, dout, mask=an.Causal(), query_offset=2)
    found = vjp(q, k, v, dout, mask=an.Causal(), query_offset=2)
    reached = np.zeros(q.shape, bool)
    reached[0, :2, 2:] = True
    np.testing.assert_array_equal(~np.isfinite(found.q), reached)
    np.testing.assert_array_equal(found.q[~reached], clean.q[~reached])
    np.testing.assert_array_equal(found.k[1], clean.k[1])
    np.testing.assert_array_equal(found.v[0, 1], clean.v[0, 1])


def test_the_cosine_of_a_zero_vector_has_gradient_0():
    q, k, v, dout, _ = call("plain")
    q[0, 0, 0] = k[1, 1, 2] = 0
    found = vjp(q, k, v, dout, score=an.Cosine())
    assert (found.q[0, 0, 0] == 0).all()
    assert (found.k[1, 1, 2] == 0).all()
    assert all(np.isfinite(getattr(found, letter)).all() for letter in "qkv")


# --- results ---


def test_shapes_and_dtypes_of_results():
    q, k, v, dout, _ = (x[0].astype(np.float32) if n < 4 else x for n, x in enumerate(call("plain")))
    bias, sink = an.Bias(np.zeros((4, 1, 1))), an.Softmax(0.0)
    found = vjp(q, k, v, dout, modifiers=bias, normalizer=sink)
    assert [getattr(found, letter).shape for letter in "qkv"] == [q.shape, k.shape, v.shape]
    assert {getattr(found, letter).dtype for letter in "qkv"} == {np.dtype(np.float32)}
    assert (found.of(bias).shape, found.of(bias).dtype) == ((4, 1, 1), np.float32)
    assert (found.of(sink).shape, found.of(sink).dtype) == ((), np.float32)
    half = vjp(*(x.astype(np.float16) for x in (q, k, v, dout)), modifiers=bias)
    assert (half.q.dtype, half.of(bias).dtype) == (np.float16, np.float32)


def test_a_rule_used_twice_has_the_sum():
    q, k, v, dout, _ = call("plain")
    once, again = an.Bias(np.ones(7)), an.Bias(np.ones(7))
    apart = vjp(q, k, v, dout, modifiers=[once, an.SoftCap(1.0), again])
    together = vjp(q, k, v, dout, modifiers=[once, an.SoftCap(1.0), once])
    np.testing.assert_allclose(together.of(once), apart.of(once) + apart.of(again), rtol=1e-14)
    assert np.abs(apart.of(once) - apart.of(again)).max() > 1e-3


def test_gradients_of_several_arrays_come_by_name():
    q, k, v, dout, kwargs = call("Additive by head")
    found = vjp(q, k, v, dout, **kwargs).of(kwargs["score"])
    wq, wk, w = found
    assert (found.Wq is wq, found.Wk is wk, found.w is w) == (True, True, True)
    again = pickle.loads(pickle.dumps(found))
    assert again._fields == ("Wq", "Wk", "w")
    assert type(again) is type(found)
    np.testing.assert_array_equal(again.w, w)


def test_a_rule_without_gradient_is_refused():
    q, k, v, dout, _ = call("plain")
    bias = an.Bias(0.0)
    found = vjp(q, k, v, dout, modifiers=[bias, an.SoftCap(2.0)])
    assert repr(found) == "Gradients(q, k, v, Bias)"
    for other, name in ((an.SoftCap(2.0), "SoftCap"), (an.Bias(0.0), "Bias"), (an.Softmax(), "Softmax")):
        with pytest.raises(ValueError, match=f"rule is {name}, of which this call has no gradient; .* one of: Bias"):
            found.of(other)
    with pytest.raises(ValueError, match="rule is Causal, but no rule of this call has an array with a gradient"):
        vjp(q, k, v, dout).of(an.Causal())


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-5), ("float16", 1e-2), ("bfloat16", 1e-1)])
def test_precision(dtype, most):
    case = Case("gradients", sized(), with_(modifiers=an.ALiBi(0.1), query_offset=0))
    q, k, v, kwargs = case.build()
    dout = numbers().standard_normal((*q.shape[:-1], v.shape[-1]))
    exact, found = vjp(q, k, v, dout, **kwargs), vjp(q, k, v, dout, **kwargs, compute_dtype=dtype)
    for letter in "qkv":
        error = relative_error(getattr(found, letter), getattr(exact, letter))
        assert most / 1000 < error < most
    assert 0 < relative_error(found.of(kwargs["modifiers"]), exact.of(kwargs["modifiers"])) < 30 * most


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_meets_inputs_is_rounded(dtype):
    """The rows of the identity show gradients by scores, and weights, as they are when they meet K, Q and dout."""
    name = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.float16
    rng, eye = numbers(), np.eye(6)
    by_keys = vjp(rng.standard_normal((6, 6)), eye, rng.standard_normal((6, 6)), eye, scale=1.0, compute_dtype=dtype)
    by_queries = vjp(eye, rng.standard_normal((6, 6)), *rng.standard_normal((2, 6, 6)), scale=1.0, compute_dtype=dtype)
    for gradient in (by_keys.q, by_keys.v, by_queries.k):
        np.testing.assert_array_equal(gradient, gradient.astype(name).astype(np.float64))


# --- saved results of the forward call, and bad input ---


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "Causal", "sink, mask, dropout", "all", "scale negative"])
def test_saved_results_of_the_same_call(name, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    q, k, v, dout, kwargs = call(name)
    q, k, v, dout = (x.astype(dtype) for x in (q, k, v, dout))
    saved = an.attention(q, k, v, **kwargs, return_lse=True, backend="cpu")
    found, plain = vjp(q, k, v, dout, **kwargs, saved=saved), vjp(q, k, v, dout, **kwargs)
    np.testing.assert_array_equal(found.q, plain.q)
    other = an.attention(k[:, :, :5].repeat(2, 1), k, v, **kwargs, return_lse=True, backend="cpu")
    with pytest.raises(ValueError, match=r"saved: lse is .* at \(0, 0, 0\); this call gives .*: it is of another"):
        vjp(q, k, v, dout, **kwargs, saved=other)
    with pytest.raises(ValueError, match="saved: out is .*; this call gives .*: it is of another"):
        vjp(q, k, v, dout, **kwargs, saved=(-saved.out, saved.lse))


def test_saved_results_with_empty_rows():
    q, k, v, dout, _ = call("plain")
    mask = np.ones((5, 7), bool)
    mask[2] = False
    saved = reference.attention(q, k, v, mask=mask, return_lse=True)
    vjp(q, k, v, dout, mask=mask, saved=saved)
    with pytest.raises(ValueError, match=r"saved: lse is -inf at \(0, 0, 2\)"):
        vjp(q, k, v, dout, saved=saved)
    unknown = np.where(saved.lse == -np.inf, np.nan, saved.lse)
    with pytest.raises(ValueError, match=r"saved: lse is nan at \(0, 0, 2\); this call gives -inf"):
        vjp(q, k, v, dout, mask=mask, saved=(saved.out, unknown))


FORWARD = reference.attention(*call("plain")[:3], return_lse=True)


@pytest.mark.parametrize("compute", [vjp, lambda *a, **k: an.attention_vjp(*a, **k, backend="reference")])
@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"dout": np.zeros((2, 4, 5, 3))}, ValueError, r"dout has shape .*3\); needed \(2, 4, 5, 2\), the shape"),
        ({"dout": np.zeros((4, 5, 2))}, ValueError, r"dout has shape \(4, 5, 2\); needed \(2, 4, 5, 2\)"),
        ({"dout": np.zeros((2, 4, 5, 2), np.float32)}, TypeError, "dout has dtype float32; q has float64"),
        ({"k": np.zeros((2, 3, 7, 3))}, ValueError, "k has 3 heads; q has 4, not a multiple of 3"),
        ({"modifiers": [an.SoftCap(1.0), an.CustomModifier(custom, (0.1,))], "query_offset": 0}, ValueError,
         r"modifiers\[1\], CustomModifier, has no slope; .* slope="),
        ({"saved": FORWARD, "normalizer": an.Sparsemax()}, ValueError, "saved was given, but Sparsemax has no lse"),
        ({"saved": FORWARD.out}, TypeError, r"saved is ndarray; needed \(out, lse\)"),
        ({"saved": (*FORWARD, None)}, TypeError, "saved is 3 things; needed"),
        ({"saved": (FORWARD.out, None)}, TypeError, "saved is tuple; needed"),
        ({"saved": (FORWARD.out, FORWARD.lse.astype("f4"))}, TypeError, "saved: lse has dtype float32; needed float64"),
        ({"saved": (FORWARD.out[1:], FORWARD.lse)}, ValueError, r"saved: out has shape \(1, 4, 5, 2\); needed \(2, 4"),
        ({"saved": (FORWARD.out, FORWARD.lse[..., 1:])}, ValueError, r"saved: lse has shape \(2, 4, 4\); needed"),
        ({"mask": np.zeros((5, 7))}, TypeError, "mask has dtype float64; needed a boolean array"),
        ({"mask": an.Causal()}, ValueError, "query_offset is None, but Causal uses positions"),
    ],
)  # fmt: skip
def test_errors(compute, changes, kind, message):
    q, k, v, dout, _ = call("plain")
    with pytest.raises(kind, match=message):
        compute(**{"q": q, "k": k, "v": v, "dout": dout, **changes})


@pytest.mark.parametrize("name", ["plain", "Additive by head", "all", "sink, mask, dropout"])
def test_the_public_function(name):
    q, k, v, dout, kwargs = call(name)
    found = an.attention_vjp(q, k, v, dout, **kwargs, backend="reference")
    expected = vjp(q, k, v, dout, **kwargs)
    assert isinstance(found, Gradients)
    np.testing.assert_array_equal(found.q, expected.q)
    for rule, argument in arrays_of(kwargs):
        np.testing.assert_array_equal(gradient_of(found, rule, argument), gradient_of(expected, rule, argument))


def test_what_the_public_function_refuses():
    q, k, v, dout, _ = call("plain")
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        an.attention_vjp(q, k, v, dout, backend="gpu")
    with pytest.raises(TypeError, match="dout is list; needed an array"):
        an.attention_vjp(q, k, v, dout.tolist(), backend="reference")
    with pytest.raises(ValueError, match="stream is int; needed None"):
        an.attention_vjp(q, k, v, dout, backend="reference", stream=1)


def test_arrays_in_different_places_are_refused():
    class OnCard:
        @property
        def __cuda_array_interface__(self):
            return {"shape": (2, 4, 5, 2), "typestr": "<f8", "data": (0, False), "version": 3}

    q, k, v, dout, _ = call("plain")
    with pytest.raises(TypeError, match="q, k, v, dout are in different places: .*, dout on a GPU; .* for all four"):
        an.attention_vjp(q, k, v, OnCard())
    with pytest.raises(TypeError, match="q on a GPU, k on a host, .* for all four"):
        an.attention_vjp(OnCard(), k, v, dout)

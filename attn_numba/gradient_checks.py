"""Checks of a backend's gradients, for one's own rules and for the package's tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_numba.api import attention_vjp
from attn_numba.comparison import largest_difference
from attn_numba.reference import attention_vjp as reference_attention_vjp
from attn_numba.reference.forward import Call, Steps, checked, computed
from attn_numba.reference.normalizers import softmax
from attn_numba.rules import Additive, Bilinear, Cosine, DoubleSoftmax
from attn_numba.rules.arguments import ACCUMULATORS
from attn_numba.rules.data import AnyArray, gathered
from attn_numba.rules.results import Gradients

LAST_PLACES = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def check_attention_vjp(
    q: Any, k: Any, v: Any, dout: Any, backend: str = "auto", *, name: str = "attention_vjp",
    saved: Any = None, **rules: Any,
) -> None:  # fmt: skip
    """Check a backend's gradients, those of rules' arrays among them, against the reference in float64.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries.
    k : array (B, Hk, N, D)
        Keys.
    v : array (B, Hk, N, E)
        Values.
    dout : array (B, H, M, E)
        Gradient by the output.
    backend : str
        Whom to check.
    name : str
        Of what is checked, for messages.
    saved : (out, lse), optional
        What the backend gets of the forward call.
    **rules
        The other arguments of `attention_vjp`.

    Raises
    ------
    AssertionError
        If a gradient errs more than twice what the reference errs when it computes in the dtype of q, plus a unit in
        the last place of the result, and of the sums of magnitudes that it is the difference of; or is not finite where
        it should be, or the other way round.
    """
    dtype = np.asarray(q).dtype
    wide = [np.asarray(x).astype(np.float64) for x in (q, k, v, dout)]
    exact = reference_attention_vjp(*wide, **rules)
    errors = _rounding_errors(exact, wide, rules, dtype.name)
    sums = gradient_magnitudes(*wide, **rules)
    found = attention_vjp(q, k, v, dout, **rules, saved=saved, backend=backend)
    accumulator = ACCUMULATORS[dtype.name]
    results = arrays_of(found)
    for key, expected in arrays_of(exact).items():
        result = results[key]
        label = f"{name}: gradient by {key[-1]} of {backend} in {dtype.name}"
        wanted = dtype if key in ("q", "k", "v") else accumulator
        assert result.dtype == wanted, f"{label} has dtype {result.dtype}; needed {wanted}"
        assert result.shape == expected.shape, f"{label} has shape {result.shape}; needed {expected.shape}"
        largest = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
        tolerance = 2 * errors[key] + 4 * LAST_PLACES[wanted.name] * largest
        tolerance += LAST_PLACES[accumulator.name] * sums.get(key, 0.0)
        difference = largest_difference(result, expected)
        assert difference <= tolerance, f"{label} is {difference:.3g} from the reference's; {tolerance:.3g} is allowed"


def arrays_of(gradients: Gradients) -> dict[Any, AnyArray]:
    """Return all gradients of a call: ``"q"``, ``"k"``, ``"v"``, and (id of the rule, name) for arrays of rules."""
    inputs = {"q": gradients.q, "k": gradients.k, "v": gradients.v}
    return inputs | {
        (id(rule), name): array for rule, arrays in gradients.learned for name, array in arrays.items()
    }  # fmt: skip


def _rounding_errors(exact: Gradients, arrays: list[AnyArray], rules: dict[str, Any], dtype: str) -> dict[Any, float]:
    """Return how much the reference errs in a dtype, of each gradient the largest error of an element.

    For float64, as `testing.check_attention` does: from what float32 errs on nearly the same numbers.
    """
    if dtype != "float64":
        rounded = arrays_of(reference_attention_vjp(*arrays, **rules, compute_dtype=dtype))
        return {key: _finite_difference(rounded[key], x) for key, x in arrays_of(exact).items()}
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = [x.astype(np.float32).astype(np.float64) for x in arrays]
    errors = _rounding_errors(reference_attention_vjp(*narrow, **rules), narrow, rules, "float32")
    return {key: 2 * error * LAST_PLACES["float64"] / LAST_PLACES["float32"] for key, error in errors.items()}


def _finite_difference(result: AnyArray, expected: AnyArray) -> float:
    both = np.isfinite(result) & np.isfinite(expected)
    return float(np.abs(result[both] - expected[both]).max(initial=0.0))


def gradient_magnitudes(q: AnyArray, k: AnyArray, v: AnyArray, dout: AnyArray, **rules: Any) -> dict[Any, float]:
    """Return the largest sum of magnitudes of what makes an element of a gradient, by `arrays_of`'s keys.

    A gradient by a score is a difference that may cancel, such as that of a row with one key, which is 0: what rounding
    leaves of it is measured by the two numbers, not by what remains.
    """
    call = checked(q, k, v, **rules)
    sizes = call.sizes
    if 0 in (sizes.B, sizes.M, sizes.N):
        return {}
    found = computed(call)
    with np.errstate(all="ignore"):
        dw = _sizes_of(dout.reshape(sizes.B, sizes.H, sizes.M, sizes.E)) @ _sizes_of(found.values).swapaxes(2, 3)
        ds = _score_magnitudes(call, found, dw if found.kept is None else np.where(found.kept, dw, 0))
        sums: dict[Any, float] = {}
        for modifier, s in zip(call.modifiers[::-1], found.scores[-2::-1], strict=True):
            if modifier.learned is not None:
                name, axes = modifier.learned
                by_place = ds * _sizes_of(modifier.learned_derivatives(s, call.places, sizes))
                by_element = by_place.sum(axis=tuple(n for n, letter in enumerate("BHMN") if letter not in axes))
                sums[id(modifier), name] = float(gathered(by_element, getattr(modifier, name).shape).max(initial=0.0))
            ds = ds * _sizes_of(modifier.derivatives(s, call.places, sizes))
        return sums | _input_magnitudes(call, found, ds * abs(call.scale))


def _sizes_of(x: AnyArray) -> AnyArray:
    """Return magnitudes, 0 for what is not finite."""
    sizes: AnyArray = np.nan_to_num(np.abs(x), posinf=0.0)
    return sizes


def _input_magnitudes(call: Call, found: Steps, ds: AnyArray) -> dict[Any, float]:
    """Return the sums of `gradient_magnitudes` by q and k, and by arrays of the score."""
    score, largest = call.score, lambda x: float(x.max(initial=0.0))
    if isinstance(score, Additive):
        weights = np.abs(score.w)
        by_q = ds.sum(axis=3)[..., None] * (weights[:, None] if weights.ndim == 2 else weights)
        by_k = ds.sum(axis=2)[..., None] * (weights[:, None] if weights.ndim == 2 else weights)
    else:
        by_q = ds @ _sizes_of(found.mapped_keys)
        by_k = ds.swapaxes(2, 3) @ _sizes_of(found.mapped_queries)
    by_k = by_k.reshape(*found.keys.shape[:2], -1, *by_k.shape[2:]).sum(axis=2)
    rows_q, rows_k = _sizes_of(found.queries), _sizes_of(found.keys)
    if isinstance(score, Additive):
        wq, wk = np.abs(score.Wq), np.abs(score.Wk)
        arrays = {"Wq": np.einsum("bhmd,bhmu->hud", rows_q, by_q), "Wk": np.einsum("bhmd,bhmu->hud", rows_k, by_k)}
        sums = {(id(score), name): largest(gathered(x, getattr(score, name).shape)) for name, x in arrays.items()}
        sums[id(score), "w"] = largest(gathered(ds.sum(axis=(0, 2, 3))[:, None], (*score.w.shape[:-1], 1)))
        return sums | {"q": largest(by_q @ wq), "k": largest(by_k @ wk)}
    if isinstance(score, Bilinear):
        by_weights = np.einsum("bhmd,bhme->hde", rows_q, by_q)
        sums = {(id(score), "W"): largest(gathered(by_weights, score.W.shape))}
        return sums | {"q": largest(by_q @ np.abs(score.W).swapaxes(-1, -2)), "k": largest(by_k)}
    if isinstance(score, Cosine):
        by_q, by_k = (_unit_magnitudes(x, by) for x, by in ((rows_q, by_q), (rows_k, by_k)))
    return {"q": largest(by_q), "k": largest(by_k)}


def _unit_magnitudes(x: AnyArray, by_unit: AnyArray) -> AnyArray:
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    unit = np.where(length == 0, 0, x / np.where(length == 0, 1, length))
    sums: AnyArray = by_unit + unit * (unit * by_unit).sum(axis=-1, keepdims=True)
    return np.where(length == 0, 0, sums / np.where(length == 0, 1, length))


def _score_magnitudes(call: Call, found: Steps, dw: AnyArray) -> AnyArray:
    """Return ``g * (dw + sum(g * dw) / sum(g))``, of `DoubleSoftmax` twice."""
    ds = dw
    steps = [found.weights]
    if isinstance(call.normalizer, DoubleSoftmax):
        steps.append(softmax(found.scores[-1], found.allowed)[0])
    for weights in steps:
        g = np.nan_to_num(np.where(found.allowed, call.normalizer.slope(weights), 0))
        total = g.sum(axis=-1, keepdims=True)
        ds = g * (ds + np.where(total == 0, 0, (g * ds).sum(axis=-1, keepdims=True) / np.where(total == 0, 1, total)))
    result: AnyArray = ds
    return result

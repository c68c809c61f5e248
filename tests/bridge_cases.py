"""Calls for the bridges to other frameworks: rules made of arrays that have gradients there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

import attn_numba as an

B, H, Hk, M, N, D, E = 2, 4, 2, 5, 7, 3, 2
RANDOM = np.random.default_rng(5)


class Call(NamedTuple):
    """One call of attention.

    Attributes
    ----------
    rules : function (make, *arrays) -> dict
        Arguments of `attention`, given `make(maker, *arguments)`, which makes a rule or defers it.
    arrays : tuple of arrays
        What the rules learn.
    sizes : dict of str to int
        Those that differ from the usual.
    """

    rules: Callable[..., dict[str, Any]]
    arrays: tuple[np.ndarray, ...] = ()
    sizes: dict[str, int] | None = None

    def build(self, dtype: Any = np.float64) -> list[np.ndarray]:
        """Return q, k, v and the gradient by the output."""
        z = {"B": B, "H": H, "Hk": Hk, "M": M, "N": N, "D": D, "E": E, **(self.sizes or {})}
        axes = ("BHMD", "BkND", "BkNE", "BHME")
        random = np.random.default_rng(3)
        return [random.standard_normal([z["Hk" if a == "k" else a] for a in text]).astype(dtype) for text in axes]


def at_once(maker: Any, *arguments: Any, **named: Any) -> Any:
    """Return a rule made now: what `defer` does later."""
    return maker(*arguments, **named)


def spans() -> np.ndarray:
    """Return spans from whose ends every key is away by a distance that differences do not cross."""
    return RANDOM.integers(0, 2, (B, H, M)) + RANDOM.uniform(0.2, 0.5, (B, H, M))


def normal(*shape: int) -> np.ndarray:
    return RANDOM.standard_normal(shape)


CALLS = {
    "plain": Call(lambda make: {}),
    "causal": Call(lambda make: {"mask": an.Causal(), "query_offset": 2}),
    "one head": Call(lambda make: {"scale": 0.7}, sizes={"B": 1, "H": 1, "Hk": 1, "M": 3, "N": 4}),
    "one key head": Call(lambda make: {}, sizes={"Hk": 1}),
    "square, window, soft cap": Call(
        lambda make: {"mask": an.SlidingWindow(2, 1), "modifiers": an.SoftCap(1.5)}, sizes={"N": 5}
    ),
    "empty rows": Call(lambda make: {"mask": an.Padding([4, 0])}),
    "boolean array": Call(lambda make: {"mask": np.arange(M)[:, None] >= np.arange(N) - 1}),
    "dropout": Call(lambda make: {"dropout": an.Dropout(0.4, 7), "query_offset": 0}),
    "Sparsemax": Call(lambda make: {"normalizer": an.Sparsemax()}),
    "Entmax15": Call(lambda make: {"normalizer": an.Entmax15()}),
    "DoubleSoftmax": Call(lambda make: {"normalizer": an.DoubleSoftmax()}),
    "Cosine": Call(lambda make: {"score": an.Cosine(), "scale": 3.0}),
    "Bias": Call(lambda make, array: {"modifiers": make(an.Bias, array)}, (normal(B, H, M, N),)),
    "Bias, broadcast": Call(lambda make, array: {"modifiers": make(an.Bias, array)}, (normal(H, 1, N),)),
    "Bias, one number": Call(lambda make, array: {"modifiers": [make(an.Bias, array)]}, (np.array(0.3),)),
    "ALiBi": Call(lambda make, slopes: {"modifiers": make(an.ALiBi, slopes), "query_offset": 2}, (RANDOM.random(H),)),
    "Temperature": Call(lambda make, t: {"modifiers": make(an.Temperature, t)}, (0.5 + RANDOM.random((B, H, M)),)),
    "AdaptiveSpan": Call(
        lambda make, span: {"modifiers": make(an.AdaptiveSpan, span, ramp=2.3), "query_offset": 1}, (spans(),)
    ),
    "sink": Call(lambda make, sink: {"normalizer": make(an.Softmax, sink)}, (normal(H),)),
    "Bilinear": Call(lambda make, W: {"score": make(an.Bilinear, W=W)}, (normal(H, D, D),)),
    "Additive": Call(
        lambda make, *arrays: {"score": make(an.Additive, *arrays)}, (normal(4, D), normal(Hk, 4, D), normal(H, 4))
    ),
    "Additive, one of three": Call(
        lambda make, w: {"score": make(an.Additive, np.ones((4, D)), np.eye(4, D), w=w)}, (normal(4),)
    ),
    "several": Call(
        lambda make, slopes, array, t, sink: {
            "mask": an.Causal(),
            "query_offset": 2,
            "modifiers": [make(an.ALiBi, slopes), an.SoftCap(2.0), make(an.Bias, array), make(an.Temperature, t)],
            "normalizer": make(an.Softmax, sink),
            "dropout": an.Dropout(0.2, 3),
        },
        (RANDOM.random(H), normal(M, N), 0.5 + RANDOM.random((H, 1)), normal(H)),
    ),
}


def made_of(call: Call, arrays: Any = None) -> tuple[dict[str, Any], list[tuple[Any, int]]]:
    """Return the rules of a call made at once, and for each array its rule and the place among the rule's arrays."""
    owners: dict[int, tuple[Any, int]] = {}
    arrays = call.arrays if arrays is None else arrays

    def make(maker: Any, *arguments: Any, **named: Any) -> Any:
        rule = maker(*arguments, **named)
        place = 2 if maker is an.Additive and len(arrays) == 1 else 0
        for x in (*arguments, *named.values()):
            for n, array in enumerate(arrays):
                if x is array:
                    owners[n] = rule, place
                    place += 1
        return rule

    rules = call.rules(make, *arrays)
    return rules, [owners[n] for n in range(len(arrays))]


def expected(call: Call, inputs: list[np.ndarray], backend: str, arrays: Any = None) -> tuple[Any, list[np.ndarray]]:
    """Return output and all gradients of a call, by `attention` and `attention_vjp` as a bridge is to use them."""
    *qkv, dout = inputs
    rules, owners = made_of(call, arrays)
    if isinstance(rules.get("normalizer"), an.Softmax | None):
        saved = an.attention(*qkv, **rules, backend=backend, return_lse=True)
        out = saved.out
    else:
        saved, out = None, an.attention(*qkv, **rules, backend=backend)
    found = an.attention_vjp(*qkv, dout, **rules, backend=backend, saved=saved)
    learned = [found.of(rule) for rule, _ in owners]
    learned = [x[place] if isinstance(x, tuple) else x for x, (_, place) in zip(learned, owners, strict=True)]
    return out, [found.q, found.k, found.v, *learned]


def require_gradients(backend: str) -> str:
    """Return the backend; skip the test where it has no gradients."""
    try:
        an.attention_vjp(*np.zeros((4, 0, 1)), backend=backend)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return backend


def bits(x: np.ndarray) -> Iterator[Any]:
    """Yield what two arrays must share to be the same, NaN and signs of zeros included."""
    yield from (x.shape, x.dtype.name, x.tobytes())

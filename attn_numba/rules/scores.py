"""Scores: what a query and a key have to do with each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attn_numba.rules.data import AnyArray, floats, gathered
from attn_numba.rules.places import Sizes

__all__ = ["Additive", "Bilinear", "Cosine", "Dot", "Score"]


class Score:
    """What scores share: a map of the queries, a map of the keys, and what becomes of two mapped rows.

    Attributes
    ----------
    dots : bool
        Whether the score is the dot product of the mapped rows.
    """

    dots: ClassVar[bool] = True

    def default_scale(self, head_size: int) -> float:
        """Return the scale used when none is given, for queries of head size D."""
        return 1.0

    def check(self, sizes: Sizes, key_size: int) -> None:
        """Check the score against one call, whose keys have head size `key_size`.

        Raises
        ------
        ValueError
            If the head sizes do not fit.
        """
        if key_size != sizes.D:
            raise ValueError(f"k has head size {key_size}; q has {sizes.D}")

    def mapped(self, q: AnyArray, k: AnyArray) -> tuple[AnyArray, AnyArray]:
        """Return q (B, H, M, D) and k (B, Hk, N, D), each of its rows mapped, in their dtype.

        What a row becomes depends on no other row, its bits included.
        """
        return q, k

    def between(self, q: AnyArray, k: AnyArray) -> AnyArray:
        """Return the scores (B, H, M, N) of mapped queries and mapped keys, the keys with as many heads as they."""
        scores: AnyArray = q @ k.swapaxes(2, 3)
        return scores

    def between_gradients(
        self, q: AnyArray, k: AnyArray, ds: AnyArray, allowed: AnyArray
    ) -> tuple[AnyArray, AnyArray, dict[str, AnyArray]]:
        """Return gradients by what `between` was given, and by arrays of the score that it reads, by name.

        `ds` (B, H, M, N) is the gradient by the scores, 0 where not `allowed`; what is not allowed may hold anything.
        Only for scores that are not `dots`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no gradients of its own: it is a dot product")

    def pulled(
        self, q: AnyArray, k: AnyArray, dq: AnyArray, dk: AnyArray
    ) -> tuple[AnyArray, AnyArray, dict[str, AnyArray]]:
        """Return gradients by q and k, and by arrays of the maps, by name, from those by the mapped rows.

        Parameters
        ----------
        q, k : arrays (B, H, M, D), (B, Hk, N, D)
            Rows before their maps; one whose gradient is 0 throughout may hold anything.
        dq, dk : arrays (B, H, M, ...), (B, Hk, N, ...)
            Gradients by the mapped rows.

        Returns
        -------
        tuple of array (B, H, M, D), array (B, Hk, N, D), dict of str to array
            Gradients by q, by k, and by the score's arrays in the shapes they were given.
        """
        return dq, dk, {}


@dataclass(frozen=True)
class Dot(Score):
    """Score by dot product: the sum of ``q * k`` over the head size; the scale defaults to ``1 / sqrt(D)``.

    References
    ----------
    A. Vaswani et al. (2017), "Attention is all you need", equation 1.
    """

    def default_scale(self, head_size: int) -> float:
        return 1.0 / math.sqrt(head_size)


@dataclass(frozen=True)
class Cosine(Score):
    """Score by the cosine of the angle between q and k, -1 to 1; 0 if one of them is zero. The scale defaults to 1.

    References
    ----------
    A. Graves, G. Wayne and I. Danihelka (2014), "Neural Turing machines", equation 6 (there the scale is the key
    strength).
    """

    def mapped(self, q: AnyArray, k: AnyArray) -> tuple[AnyArray, AnyArray]:
        return _unit(q), _unit(k)

    def pulled(
        self, q: AnyArray, k: AnyArray, dq: AnyArray, dk: AnyArray
    ) -> tuple[AnyArray, AnyArray, dict[str, AnyArray]]:
        return _unit_gradient(q, dq), _unit_gradient(k, dk), {}


@dataclass(frozen=True, eq=False)
class Bilinear(Score):
    """Score by a bilinear form: ``q W k``, the sum of ``q[d] * W[d, e] * k[e]``. The scale defaults to 1.

    Parameters
    ----------
    W : array (Dq, Dk) or (H, Dq, Dk)
        For all query heads or for each; q has head size Dq, k has Dk.

    Raises
    ------
    TypeError
        If W is not of real numbers.
    ValueError
        If it has another number of axes, or does not fit the call.

    References
    ----------
    M.-T. Luong, H. Pham and C. D. Manning (2015), "Effective approaches to attention-based neural machine
    translation", section 3.1 ("general").
    """

    W: Any

    def __post_init__(self) -> None:
        object.__setattr__(self, "W", _per_head("Bilinear", "W", self.W, "Dq, Dk"))

    def check(self, sizes: Sizes, key_size: int) -> None:
        _require_shape("Bilinear", "W", self.W, {"H": sizes.H, "Dq": sizes.D, "Dk": key_size})

    def mapped(self, q: AnyArray, k: AnyArray) -> tuple[AnyArray, AnyArray]:
        return _projected(q, self.W), k

    def pulled(
        self, q: AnyArray, k: AnyArray, dq: AnyArray, dk: AnyArray
    ) -> tuple[AnyArray, AnyArray, dict[str, AnyArray]]:
        return _projected(dq, self.W.swapaxes(-1, -2)), dk, {"W": _weights_gradient(q, dq, self.W)}


@dataclass(frozen=True, eq=False)
class Additive(Score):
    """Score by a layer of hidden units: ``w . tanh(Wq q + Wk k)``. The scale defaults to 1.

    Parameters
    ----------
    Wq : array (hidden, Dq) or (H, hidden, Dq)
        For all query heads or for each; q has head size Dq.
    Wk : array (hidden, Dk) or (Hk, hidden, Dk)
        For all key heads or for each; k has head size Dk.
    w : array (hidden,) or (H, hidden)
        Weights of the hidden units, for all query heads or for each.

    Raises
    ------
    TypeError
        If one is not of real numbers.
    ValueError
        If one has another number of axes, the numbers of hidden units differ, or one does not fit the call.

    Notes
    -----
    An infinite number in q or k saturates the units that it reaches, and so may give a finite score.

    References
    ----------
    D. Bahdanau, K. Cho and Y. Bengio (2015), "Neural machine translation by jointly learning to align and translate",
    appendix A.1.2.
    """

    Wq: Any
    Wk: Any
    w: Any
    dots: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "Wq", _per_head("Additive", "Wq", self.Wq, "hidden, Dq"))
        object.__setattr__(self, "Wk", _per_head("Additive", "Wk", self.Wk, "hidden, Dk", head="Hk"))
        object.__setattr__(self, "w", _per_head("Additive", "w", self.w, "hidden"))
        hidden = self.Wq.shape[-2]
        for name, units in (("Wk", self.Wk.shape[-2]), ("w", self.w.shape[-1])):
            if units != hidden:
                raise ValueError(f"Additive: {name} has {units} hidden units; Wq has {hidden}")

    def check(self, sizes: Sizes, key_size: int) -> None:
        hidden = self.Wq.shape[-2]
        _require_shape("Additive", "Wq", self.Wq, {"H": sizes.H, "hidden": hidden, "Dq": sizes.D})
        _require_shape("Additive", "Wk", self.Wk, {"Hk": sizes.Hk, "hidden": hidden, "Dk": key_size})
        _require_shape("Additive", "w", self.w, {"H": sizes.H, "hidden": hidden})

    def mapped(self, q: AnyArray, k: AnyArray) -> tuple[AnyArray, AnyArray]:
        return _projected(q, self.Wq.swapaxes(-1, -2)), _projected(k, self.Wk.swapaxes(-1, -2))

    def between(self, q: AnyArray, k: AnyArray) -> AnyArray:
        w = self.w.astype(q.dtype)
        scores: AnyArray = np.zeros((*q.shape[:3], k.shape[2]), q.dtype)
        for unit in range(w.shape[-1]):  # one at a time: all of them together are `hidden` times the scores
            scores += w[..., unit, None, None] * np.tanh(q[..., :, None, unit] + k[..., None, :, unit])
        return scores

    def between_gradients(
        self, q: AnyArray, k: AnyArray, ds: AnyArray, allowed: AnyArray
    ) -> tuple[AnyArray, AnyArray, dict[str, AnyArray]]:
        w = self.w.astype(q.dtype)
        dq, dk, dw = np.zeros_like(q), np.zeros_like(k), np.zeros((q.shape[1], w.shape[-1]), q.dtype)
        for unit in range(w.shape[-1]):
            t = np.where(allowed, np.tanh(q[..., :, None, unit] + k[..., None, :, unit]), 0)
            dw[:, unit] = (ds * t).sum(axis=(0, 2, 3))
            inner = ds * (1 - t * t) * w[..., unit, None, None]
            dq[..., unit], dk[..., unit] = inner.sum(axis=3), inner.sum(axis=2)
        return dq, dk, {"w": gathered(dw, self.w.shape)}

    def pulled(
        self, q: AnyArray, k: AnyArray, dq: AnyArray, dk: AnyArray
    ) -> tuple[AnyArray, AnyArray, dict[str, AnyArray]]:
        weights = {
            "Wq": _weights_gradient(q, dq, self.Wq.swapaxes(-1, -2)).swapaxes(-1, -2),
            "Wk": _weights_gradient(k, dk, self.Wk.swapaxes(-1, -2)).swapaxes(-1, -2),
        }
        return _projected(dq, self.Wq), _projected(dk, self.Wk), weights


def _unit(x: AnyArray) -> AnyArray:
    """Return the rows of `x` with length 1; zero rows stay zero."""
    x = np.ascontiguousarray(x)  # numbers side by side are summed in one order, wherever they came from
    with np.errstate(all="ignore"):  # rows that nothing looks at may hold anything
        largest = np.abs(x).max(axis=-1, keepdims=True)
        x = x / np.where(largest == 0, 1, largest)  # so that no square leaves the range of the dtype
        length = np.sqrt((x * x).sum(axis=-1, keepdims=True))
        rows: AnyArray = x / np.where(length == 0, 1, length)
    return rows


def _unit_gradient(x: AnyArray, gradient: AnyArray) -> AnyArray:
    """Return the gradient by the rows of `x` from that by `_unit` of them; 0 for a zero row, where there is none."""
    with np.errstate(all="ignore"):
        largest = np.abs(x).max(axis=-1, keepdims=True)
        length = np.linalg.norm(x / largest, axis=-1, keepdims=True)
        unit = _unit(x)
        rows: AnyArray = (gradient - unit * (unit * gradient).sum(axis=-1, keepdims=True)) / length / largest
    rows = np.where((largest == 0) | _unreached(gradient), 0, rows).astype(x.dtype, copy=False)
    return rows


def _unreached(gradient: AnyArray) -> AnyArray:
    """Return which rows have gradient 0 throughout: no score depends on them, so they may hold anything."""
    rows: AnyArray = (gradient == 0).all(axis=-1, keepdims=True)
    return rows


def _weights_gradient(x: AnyArray, gradient: AnyArray, weights: AnyArray) -> AnyArray:
    """Return the gradient by weights (D, E) or (heads, D, E) from that by the rows of `x` times them."""
    with np.errstate(all="ignore"):
        rows = np.where(_unreached(gradient), 0, x)
        return gathered(np.einsum("bhmd,bhme->hde", rows, gradient), weights.shape)


def _projected(x: AnyArray, weights: AnyArray) -> AnyArray:
    """Return the rows of `x` (B, heads, rows, D) times `weights` (D, E) or (heads, D, E)."""
    heads, inner = ("h" if weights.ndim == 3 else ""), np.ascontiguousarray(weights, x.dtype)
    with np.errstate(all="ignore"):  # rows that nothing looks at may hold anything
        # A matrix product would be faster, but the order of its sums depends on the number of rows and of threads.
        rows: AnyArray = np.einsum(f"bhmd,{heads}de->bhme", np.ascontiguousarray(x), inner)
    return rows


def _per_head(rule: str, name: str, x: object, axes: str, head: str = "H") -> AnyArray:
    """Return an array with these axes, and perhaps one for heads in front."""
    array, count = floats(rule, name, x, 3), len(axes.split(", "))
    if array.ndim not in (count, count + 1):
        raise ValueError(f"{rule}: {name} has shape {array.shape}; needed {_shapes(axes, head)}")
    if 0 in array.shape:
        raise ValueError(f"{rule}: {name} has shape {array.shape}; needed sizes of at least 1")
    return array


def _require_shape(rule: str, name: str, array: AnyArray, sizes: dict[str, int]) -> None:
    """Raise a ValueError if an array has not the sizes of its axes, the first of which may be left out."""
    needed, (head, *axes) = tuple(sizes.values()), sizes
    if array.shape not in (needed, needed[1:]):
        letters = _shapes(", ".join(axes), head)
        raise ValueError(f"{rule}: {name} has shape {array.shape}; needed {letters} = {needed[1:]} or {needed}")


def _shapes(axes: str, head: str) -> str:
    return f"({axes}{'' if ', ' in axes else ','}) or ({head}, {axes})"

"""Attention that adapts to its input: a span for each query, and numbers set by the hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attn_numba.rules.data import NARROW_FLOATS, AnyArray, as_array, fitted, floats, frozen, real_number
from attn_numba.rules.formula import INT_HIGH, Param
from attn_numba.rules.modifiers import Modifier
from attn_numba.rules.places import Places, Sizes

__all__ = ["AdaptiveSpan", "adapt"]

LEAST_RAMP, LARGEST_RAMP = 2.0**-126, 2.0**127  # a kernel may compute in float32


@dataclass(frozen=True, eq=False)
class AdaptiveSpan(Modifier):
    """Weigh keys down beyond the span of a query, from 1 at its end to 0 after a ramp; positional, softmax only.

    ``s + log(clip((ramp + span[b, h, i] - abs(i - j)) / ramp, 0, 1))``, where the `i` of the span is a row and the
    distance is one of positions. So the weight is multiplied by the clipped ratio before the row is normalized. Where
    that ratio is 0 the key is excluded, whatever follows, and where it is 1 the score stays as it is.

    Parameters
    ----------
    span : float or float array, broadcasts to (B, H, M)
        Positions either side of a query that are seen in full; finite. A query sees keys less than ``span + ramp``
        away: with a span from -ramp down it sees none.
    ramp : float
        Positions over which the weight falls from 1 to 0, above 0.

    Raises
    ------
    TypeError
        If these are not real numbers.
    ValueError
        If `span` is not finite, has more than three axes or does not fit the call; if `ramp` is not above 0, or
        beyond what float32 holds (2**-126 to 2**127); in a call, with another normalizer than `Softmax`.

    See Also
    --------
    adapt : A span for each head and query, from the hidden states.

    Notes
    -----
    Keys beyond the span are skipped, not computed, tile by tile: the time of a call goes with its mean span. A
    causal mask leaves the keys before the query.

    The gradient by the span comes from keys on the ramp; one at the very end of the span, whose ratio is 1, gives none.

    References
    ----------
    S. Sukhbaatar, E. Grave, P. Bojanowski and A. Joulin (2019), "Adaptive attention span in transformers", section
    2.2.

    Examples
    --------
    Scores of 0, so that the weights are the clipped ratios, over their sum: 1, 1, 2/3, 1/3, 0.

    >>> import numpy as np
    >>> import attn_numba as an
    >>> near = an.AdaptiveSpan(span=1, ramp=3)
    >>> q, k, v = np.zeros((1, 4)), np.zeros((5, 4)), np.eye(5)
    >>> an.attention(q, k, v, modifiers=near, query_offset=0).round(3)
    array([[0.333, 0.333, 0.222, 0.111, 0.   ]])
    """

    span: Any
    ramp: float
    positional: ClassVar[bool] = True
    softmax_only: ClassVar[bool] = True
    learned: ClassVar[tuple[str, str]] = ("span", "BHM")

    def __post_init__(self) -> None:
        span = floats("AdaptiveSpan", "span", self.span, 3)
        if not np.isfinite(span).all():
            raise ValueError("AdaptiveSpan: span holds NaN or infinity; needed finite numbers")
        ramp = real_number("AdaptiveSpan", "ramp", self.ramp)
        if not LEAST_RAMP <= ramp <= LARGEST_RAMP:
            raise ValueError(f"AdaptiveSpan: ramp is {ramp}; needed a number from 2**-126 to 2**127, in positions")
        object.__setattr__(self, "span", span)
        object.__setattr__(self, "ramp", ramp)
        object.__setattr__(self, "_reaches", _reaches(span, ramp))

    def arguments(self, sizes: Sizes) -> tuple[Param, ...]:
        reaches: tuple[AnyArray, ...] = self._reaches  # type: ignore[attr-defined]
        fitted("AdaptiveSpan", "span", self.span, "BHM", sizes)
        return (*(np.broadcast_to(x, (sizes.B, sizes.H, sizes.M)) for x in reaches), self.ramp)

    def _at(self, places: Places) -> tuple[Any, Any, Any, Any]:
        """Return b, h, the row of q and, in place of j, the distance in positions."""
        return places.b, places.h, places.row_i, abs(places.i - places.j)

    @staticmethod
    def apply(s: Any, b: Any, h: Any, i: Any, distance: Any, p: Any) -> Any:
        share = (p[2][b, h, i] + (p[1][b, h, i] - distance)) / p[3]
        return s + np.log(np.minimum(np.maximum(share, 0.0), 1.0))

    @staticmethod
    def slope(s: Any, b: Any, h: Any, i: Any, distance: Any, p: Any) -> Any:
        return 1.0

    @staticmethod
    def learned_slope(s: Any, b: Any, h: Any, i: Any, distance: Any, p: Any) -> Any:
        return 1.0 / (p[2][b, h, i] + (p[1][b, h, i] - distance))  # of what is on the ramp; 0 where neutral

    @staticmethod
    def excludes(b: Any, h: Any, i: Any, distance: Any, p: Any) -> Any:
        return distance > p[1][b, h, i]

    @staticmethod
    def neutral(b: Any, h: Any, i: Any, distance: Any, p: Any) -> Any:
        return distance <= p[0][b, h, i]


def _reaches(span: AnyArray, ramp: float) -> tuple[AnyArray, AnyArray, AnyArray]:
    """Return the greatest distances that are seen in full and seen at all, and how far the ramp goes beyond the latter.

    Distances are integers, so comparing them with these is exact in any precision; and the numerator of the ratio,
    ``rest + (reach - distance)``, keeps its digits where it is near 0.
    """
    span = span.astype(np.float64)  # which holds every 32-bit integer
    end = span + ramp
    full = np.clip(np.floor(span), -1, INT_HIGH)
    reach = np.clip(np.ceil(end) - 1, full, INT_HIGH)
    return frozen(full, np.int32), frozen(reach, np.int32), frozen(end - reach, np.float64)


def adapt(x: Any, w: Any, b: Any = 0.0, *, largest: float) -> AnyArray:
    """Return a number for each head and query, set by its hidden state: ``largest * sigmoid(w[h] . x[b, i] + b[h])``.

    Parameters
    ----------
    x : float array (B, M, D)
        Hidden states of the queries; a missing leading axis counts as 1.
    w : float array (H, D)
        Weights of each head; (D,) for the same in all heads.
    b : float or float array (H,)
        What is added for each head. Far below 0, all start small; far above, all start at `largest`.
    largest : float
        What the result stays below, above 0: for a span in positions, for a temperature as a number.

    Returns
    -------
    array (B, H, M)
        From 0 to `largest`; H is 1 where neither `w` nor `b` has heads. float32 where `x` has no more digits, else
        float64.

    Raises
    ------
    TypeError
        If these are not real numbers.
    ValueError
        If their shapes do not fit, or `largest` is not above 0 and finite.

    Notes
    -----
    The paper's dynamic span, ``z = S sigmoid(v . x + b)``, for whatever is given per query: a span, or a temperature.

    References
    ----------
    S. Sukhbaatar, E. Grave, P. Bojanowski and A. Joulin (2019), "Adaptive attention span in transformers", section
    2.3.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> random = np.random.default_rng(0)
    >>> x, w = random.standard_normal((2, 100, 16)), random.standard_normal((4, 16))
    >>> span = an.adapt(x, w, [-2.0, -1.0, 0.0, 1.0], largest=50)
    >>> span.shape, bool(0 <= span.min() and span.max() <= 50)
    ((2, 4, 100), True)
    >>> q = k = v = x.reshape(2, 100, 4, 4).swapaxes(1, 2)
    >>> an.attention(q, k, v, mask=an.Causal(), modifiers=an.AdaptiveSpan(span, ramp=8)).shape
    (2, 4, 100, 4)

    A temperature must stay above 0: it is added to the least that is wanted.

    >>> heat = an.Temperature(0.5 + an.adapt(x, w, largest=1.5))
    >>> an.attention(q, k, v, modifiers=heat).shape
    (2, 4, 100, 4)
    """
    from scipy.special import expit  # here, so that importing this package does not import SciPy

    hidden, weights, bias = (_widened(name, array) for name, array in (("x", x), ("w", w), ("b", b)))
    if hidden.ndim not in (2, 3):
        raise ValueError(f"adapt: x has shape {hidden.shape}; needed (B, M, D) or (M, D)")
    D = hidden.shape[-1]
    if weights.ndim not in (1, 2) or weights.shape[-1] != D:
        raise ValueError(f"adapt: w has shape {weights.shape}; needed (H, D) or (D,), where D = {D}")
    heads = weights.shape[:-1] or bias.shape
    if bias.shape not in ((), heads) or bias.ndim > 1:
        raise ValueError(f"adapt: b has shape {bias.shape}; needed one number or (H,){f' = {heads}' if heads else ''}")
    bound = real_number("adapt", "largest", largest)
    if not 0 < bound < np.inf:
        raise ValueError(f"adapt: largest is {bound}; needed a finite number above 0")
    gate = hidden[(np.newaxis,) * (3 - hidden.ndim)] @ np.atleast_2d(weights).T + bias  # (B, M, H)
    result: AnyArray = bound * expit(gate.swapaxes(1, 2).astype(hidden.dtype, copy=False))
    return result


def _widened(name: str, x: Any) -> AnyArray:
    array = as_array(x, "adapt", name)
    if array.dtype.name not in NARROW_FLOATS and array.dtype.kind not in "iuf":
        raise TypeError(f"adapt: {name} has dtype {array.dtype}; needed real numbers")
    return array.astype(np.float32 if array.dtype.name in NARROW_FLOATS else np.float64, copy=False)

"""Normalizers: scores of a row to weights that sum to one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attn_numba.rules.data import AnyArray, fitted, floats
from attn_numba.rules.places import Sizes

__all__ = ["DoubleSoftmax", "Entmax15", "Normalizer", "Softmax", "Sparsemax"]


class Normalizer:
    """What normalizers share.

    A subclass gives `slope`, a static function of a weight. With ``g = slope(w)`` and the gradient ``dw`` by the
    weights, the gradient by the scores is ``g * (dw - sum(g * dw) / sum(g))``, both sums over the row and the sink,
    whose ``dw`` is 0.

    Attributes
    ----------
    streams : bool
        Whether it can be computed over parts of the keys and merged.
    """

    streams: ClassVar[bool] = False
    slope: Callable[[Any], Any]

    def check(self, sizes: Sizes) -> None:
        """Check the normalizer against one call.

        Raises
        ------
        ValueError
            If an array of it does not fit.
        """


@dataclass(frozen=True, eq=False)
class Softmax(Normalizer):
    """Weigh by the exponential of the score, over its sum in the row.

    Parameters
    ----------
    sink : float or array, broadcasts to (B, H), optional
        Score of one more key, which every query sees and whose value is 0: it takes weight and gives nothing.

    Raises
    ------
    TypeError
        If the sink is not of real numbers.
    ValueError
        If it holds NaN, or does not fit the call.

    References
    ----------
    Softmax: A. Vaswani et al. (2017), "Attention is all you need", equation 1. A learned sink for each head: OpenAI
    (2025), "gpt-oss-120b & gpt-oss-20b model card", section 2.2; G. Xiao et al. (2024), "Efficient streaming language
    models with attention sinks".
    """

    sink: Any = None
    streams: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sink is not None:
            sink = floats("Softmax", "sink", self.sink, 2)
            if np.isnan(sink).any():
                raise ValueError("Softmax: sink holds NaN; needed numbers")
            object.__setattr__(self, "sink", sink)

    def check(self, sizes: Sizes) -> None:
        self.sink_array(sizes)

    @staticmethod
    def slope(w: Any) -> Any:
        return w

    def sink_array(self, sizes: Sizes) -> AnyArray | None:
        """Return the sink of each query head as a float64 array (B, H), or None if there is none."""
        if self.sink is None:
            return None
        return fitted("Softmax", "sink", self.sink.astype(np.float64), "BH", sizes)


@dataclass(frozen=True)
class Sparsemax(Normalizer):
    """Weigh by how far the score is above a threshold: ``max(s - t, 0)``, with t such that the row sums to 1.

    The weights of a row are the point of the simplex that is nearest to its scores; scores far below the greatest get
    exactly 0.

    References
    ----------
    A. F. T. Martins and R. F. Astudillo (2016), "From softmax to sparsemax: a sparse model of attention and
    multi-label classification", equations 2 and 3, algorithm 1.
    """

    @staticmethod
    def slope(w: Any) -> Any:
        return (w > 0) + 0 * w  # NaN stays NaN


@dataclass(frozen=True)
class Entmax15(Normalizer):
    """Weigh by ``max(s / 2 - t, 0) ** 2``, with t such that the row sums to 1: between softmax and sparsemax.

    References
    ----------
    B. Peters, V. Niculae and A. F. T. Martins (2019), "Sparse sequence-to-sequence models", equation 10 with alpha =
    1.5, algorithm 2.
    """

    @staticmethod
    def slope(w: Any) -> Any:
        return np.sqrt(w)


@dataclass(frozen=True)
class DoubleSoftmax(Normalizer):
    """Weigh by the softmax of the softmax of the scores, both over the allowed keys of the row; ours.

    ``a_ij = exp(s_ij) / sum_k exp(s_ik)``, then ``w_ij = exp(a_ij) / sum_k exp(a_ik)``: no weight is more than e times
    another.

    References
    ----------
    Each of the two steps: A. Vaswani et al. (2017), "Attention is all you need", equation 1. Their sequence is ours.
    """

    @staticmethod
    def slope(w: Any) -> Any:
        """Return the slope of each of the two steps, of the weights that it makes."""
        return w

"""Normalizers: scores of a row to weights that sum to one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from attn_numba.rules.data import AnyArray, fitted, floats
from attn_numba.rules.places import Sizes

__all__ = ["Softmax"]


@dataclass(frozen=True, eq=False)
class Softmax:
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
    streams: ClassVar[bool] = True  # can be computed over parts of the keys and merged

    def __post_init__(self) -> None:
        if self.sink is not None:
            sink = floats("Softmax", "sink", self.sink, 2)
            if np.isnan(sink).any():
                raise ValueError("Softmax: sink holds NaN; needed numbers")
            object.__setattr__(self, "sink", sink)

    def sink_array(self, sizes: Sizes) -> AnyArray | None:
        """Return the sink of each query head as a float64 array (B, H), or None if there is none."""
        if self.sink is None:
            return None
        return fitted("Softmax", "sink", self.sink.astype(np.float64), "BH", sizes)

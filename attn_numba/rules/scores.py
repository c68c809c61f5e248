"""Scores: what a query and a key have to do with each other."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Dot"]


@dataclass(frozen=True)
class Dot:
    """Score by dot product: the sum of ``q * k`` over the head size; the scale defaults to ``1 / sqrt(D)``.

    References
    ----------
    A. Vaswani et al. (2017), "Attention is all you need", equation 1.
    """

    def default_scale(self, head_size: int) -> float:
        """Return the scale used when none is given, for heads of size D."""
        return 1.0 / math.sqrt(head_size)

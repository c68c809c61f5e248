"""What every data set is: a training part and a test part that is looked at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.weights import WeightsError


@dataclass(frozen=True)
class Part:
    """Inputs and what they are.

    Attributes
    ----------
    inputs : sequence
        One entry per sample: an image, a text, a sequence of frames.
    labels : array (samples,), int
        A place in the data set's `names`, per sample.
    """

    inputs: Sequence[Any]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Data:
    """A data set in its official or fixed parts.

    Attributes
    ----------
    training, test : Part
        What is learned from, and what is scored once.
    names : tuple of str
        The classes.
    """

    training: Part
    test: Part
    names: tuple[str, ...]


def expect(whether: bool, what: str) -> None:
    """Raise WeightsError unless a file is in the form that was published."""
    if not whether:
        raise WeightsError(f"{what}: not the form this script reads")

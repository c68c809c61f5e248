"""AdamW with warmup, cosine decay and clipped gradients.

References
----------
I. Loshchilov and F. Hutter (2019), "Decoupled weight decay regularization" (AdamW); (2017), "SGDR" (the cosine).
R. Pascanu, T. Mikolov and Y. Bengio (2013), "On the difficulty of training recurrent neural networks" (clipping).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """How steps are taken.

    Attributes
    ----------
    rate : float
        Largest learning rate, reached after `warmup` steps.
    final : float
        What share of it is left at the last step.
    warmup, steps : int
        Steps with a rising rate, and steps in all.
    decays : tuple of float
        By how much the two moments decay in a step.
    weight_decay : float
        Share of a matrix taken away in a step, times the rate; vectors keep theirs.
    longest : float
        Longest gradient, over all parameters; longer ones are scaled down to it.
    epsilon : float
        Added to the root of the second moment.
    """

    steps: int
    rate: float = 3e-3
    final: float = 0.05
    warmup: int = 50
    decays: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    longest: float = 1.0
    epsilon: float = 1e-8

    def rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.rate * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


class AdamW:
    """The optimizer: changes parameters in place.

    Attributes
    ----------
    first, second : dict of str to array
        Moments of the gradients, in the names and shapes of the parameters.
    """

    def __init__(self, parameters: dict[str, Array], settings: Settings) -> None:
        self.parameters, self.settings = parameters, settings
        self.first = {name: np.zeros_like(array) for name, array in parameters.items()}
        self.second = {name: np.zeros_like(array) for name, array in parameters.items()}

    def update(self, gradients: dict[str, Array], step: int) -> float:
        """Take one step, counted from 0, and return the length of the gradient before clipping."""
        s, rate = self.settings, self.settings.rate_at(step)
        length = math.sqrt(sum(float(np.vdot(gradient, gradient)) for gradient in gradients.values()))
        shrink = min(1.0, s.longest / (length + 1e-12))
        slow, slower = s.decays
        first_share, second_share = 1 - slow ** (step + 1), 1 - slower ** (step + 1)  # of moments that began at 0
        for name, parameter in self.parameters.items():
            gradient = gradients[name] * shrink
            first, second = self.first[name], self.second[name]
            first += (1 - slow) * (gradient - first)
            second += (1 - slower) * (gradient * gradient - second)
            if parameter.ndim > 1:
                parameter *= 1 - rate * s.weight_decay
            parameter -= rate / first_share * first / (np.sqrt(second / second_share) + s.epsilon)
        return length

"""How parameters are trained: AdamW with warmup, cosine decay and clipped gradients, and L-BFGS.

References
----------
I. Loshchilov and F. Hutter (2019), "Decoupled weight decay regularization" (AdamW); (2017), "SGDR" (the cosine).
R. Pascanu, T. Mikolov and Y. Bengio (2013), "On the difficulty of training recurrent neural networks" (clipping).
D. C. Liu and J. Nocedal (1989), "On the limited memory BFGS method for large scale optimization".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["AdamW", "Settings", "minimize"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Settings:
    """How steps are taken.

    Parameters
    ----------
    steps : int
        Steps in all.
    rate : float
        Largest learning rate, reached after `warmup` steps.
    final : float
        What share of it is left at the last step.
    warmup : int
        Steps with a rising rate.
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
        """Return the learning rate of a step.

        Parameters
        ----------
        step : int
            Counted from 0.

        Returns
        -------
        float
            What the step is multiplied by.
        """
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.rate * (self.final + (1 - self.final) * (1 + math.cos(math.pi * done)) / 2)


class AdamW:
    """The optimizer: changes parameters in place.

    Parameters
    ----------
    parameters : dict of str to array
        What is to be trained.
    settings : Settings
        How.

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
        """Take one step.

        Parameters
        ----------
        gradients : dict of str to array
            Of the loss, under the names of the parameters.
        step : int
            Counted from 0.

        Returns
        -------
        float
            Length of the gradient, over all parameters, before it was scaled down.
        """
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


def minimize(
    parameters: Mapping[str, Array],
    gradients: Callable[[], tuple[float, Mapping[str, Array]]],
    *,
    iterations: int,
    tolerance: float,
    weight_decay: float = 0.0,
    progress: Callable[[float], object] | None = None,
) -> list[float]:
    """Change parameters in place until a loss no longer falls, by SciPy's L-BFGS.

    Parameters
    ----------
    parameters : dict of str to array
        Where to begin; float64 arrays that `gradients` reads.
    gradients : callable
        Returns the loss at the parameters as they are, and its gradient under their names.
    iterations : int
        Most steps.
    tolerance : float
        Stop where no number of the gradient is larger, or where a step (relative to the loss, if that is above 1)
        gains less than a hundredth of it.
    weight_decay : float
        Half of it times the sum of squares of matrices is added to the loss; vectors are left out.
    progress : callable, optional
        Is given the loss after each step.

    Returns
    -------
    list of float
        The loss after each step, with what is added to it.

    Examples
    --------
    >>> x = {"x": np.array([3.0, 4.0])}
    >>> losses = minimize(x, lambda: (float(x["x"] @ x["x"]), {"x": 2 * x["x"]}), iterations=20, tolerance=1e-9)
    >>> bool(abs(x["x"]).max() < 1e-9), losses[-1] < 1e-12
    (True, True)
    """
    from scipy.optimize import minimize as search

    losses: list[float] = []

    def at(vector: Array) -> tuple[float, Array]:
        _spread(vector, parameters)
        loss, found = gradients()
        flat = np.concatenate([found[name].reshape(-1) for name in parameters]).astype(np.float64, copy=False)
        for name, place in places.items():
            if weight_decay and parameters[name].ndim > 1:
                loss += 0.5 * weight_decay * float(vector[place] @ vector[place])
                flat[place] += weight_decay * vector[place]
        return loss, flat

    def after(intermediate_result: Any) -> None:
        losses.append(float(intermediate_result.fun))
        if progress is not None:
            progress(losses[-1])

    ends = np.cumsum([array.size for array in parameters.values()])
    places = {
        name: slice(end - array.size, end) for (name, array), end in zip(parameters.items(), ends.tolist(), strict=True)
    }
    start = np.concatenate([array.reshape(-1) for array in parameters.values()]).astype(np.float64)
    options = {"maxiter": iterations, "maxfun": 20 * iterations, "gtol": tolerance, "ftol": 0.01 * tolerance}
    found = search(at, start, jac=True, method="L-BFGS-B", callback=after, options=options)
    _spread(found.x, parameters)
    return losses


def _spread(vector: Array, parameters: Mapping[str, Array]) -> None:
    """Write one vector of all parameters into their arrays."""
    begin = 0
    for array in parameters.values():
        array[...] = vector[begin : begin + array.size].reshape(array.shape)
        begin += array.size

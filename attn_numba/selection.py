"""What a search for an estimator's parameters found: the score and cost of each candidate, and which are worth it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["COSTS", "Candidate", "Search"]

COSTS = {
    "multiply_adds": ("multiply-adds", ""),
    "parameter_count": ("parameters", ""),
    "seconds_per_sample": ("seconds per sample", "s"),
    "fit_seconds": ("seconds of a fit", "s"),
}
"""What a score can be held against: the field of `Candidate`, what it is called, its unit."""


class Candidate(NamedTuple):
    """What cross-validation found of one choice of parameters.

    Parameters
    ----------
    parameters : mapping of str to object
        What was tried.
    resource : int
        Training samples of a fold, in the mean.
    score, deviation : float
        Mean of the folds' scores, and their standard deviation around it (over the number of folds).
    fit_seconds : float
        What the training on a fold took, in the mean; seconds.
    seconds_per_sample : float
        What it took to predict and score a sample, in the mean; seconds.
    parameter_count : float or None
        Numbers that are learned, in the mean; None where the estimator has no ``cost``.
    multiply_adds : float or None
        Products, each with its sum, for a sample, in the mean; None where the estimator has no ``cost``.
    """

    parameters: Mapping[str, Any]
    resource: int
    score: float
    deviation: float
    fit_seconds: float
    seconds_per_sample: float
    parameter_count: float | None = None
    multiply_adds: float | None = None


@dataclass(frozen=True)
class Search:
    """What `attn_numba.search` found.

    Parameters
    ----------
    best : mapping of str to object
        The parameters of the best candidate.
    best_score : float
        Its mean score.
    candidates : sequence of Candidate
        In the order in which they were tried; one that was tried with several numbers of samples, once for each.
    records : sequence of mappings
        Every fit, as the log has it: candidate by candidate, and fold by fold.
    estimator : object, optional
        The estimator with the best parameters, fitted to all samples; None where that was not asked for.

    Examples
    --------
    >>> small = Candidate({"size": 8}, 90, 0.9, 0.01, 1.0, 1e-3)
    >>> large = Candidate({"size": 16}, 90, 0.9, 0.0, 2.0, 2e-3)
    >>> search = Search(small.parameters, small.score, [small, large], [])
    >>> [candidate.parameters for candidate in search.front("seconds_per_sample")]
    [{'size': 8}]
    """

    best: Mapping[str, Any]
    best_score: float
    candidates: Sequence[Candidate]
    records: Sequence[Mapping[str, Any]] = field(repr=False)
    estimator: Any = None

    def front(self, cost: str | None = None) -> list[Candidate]:
        """Return the candidates that are worth their cost: none scores as well and costs less, or better at the cost.

        Only those are compared that were tried with the most samples.

        Parameters
        ----------
        cost : {"multiply_adds", "parameter_count", "seconds_per_sample", "fit_seconds"}, optional
            Without it, the first of these that is known.

        Returns
        -------
        list of Candidate
            From the cheapest to the best; of candidates with the same score and cost, all.

        Raises
        ------
        ValueError
            If the cost is none of these, or the estimator does not tell it.
        """
        cost = self._cost(cost)
        front: list[Candidate] = []
        for one in sorted(self._finalists(), key=lambda one: (getattr(one, cost), -one.score)):
            last = front[-1] if front else None
            equal = last and (one.score, getattr(one, cost)) == (last.score, getattr(last, cost))
            if last is None or one.score > last.score or equal:
                front.append(one)
        return front

    def table(self, cost: str | None = None) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Return the candidates as a table, the best first.

        Parameters
        ----------
        cost : str, optional
            As `front` takes it: those that are worth it are marked.

        Returns
        -------
        columns : tuple of str
            Headings.
        rows : list of tuple of str
            One text per column.

        Raises
        ------
        ValueError
            As `front`.

        Examples
        --------
        >>> one = Candidate({"size": 8, "window": None}, 90, 0.9, 0.01, 1.0, 1e-3)
        >>> columns, rows = Search(one.parameters, one.score, [one], []).table()
        >>> columns[:4], rows[0][:4]
        (('size', 'window', 'samples', 'score'), ('8', 'none', '90', '0.9000'))
        """
        cost = self._cost(cost)
        front = {id(one) for one in self.front(cost)}
        names = list(dict.fromkeys(name for one in self.candidates for name in one.parameters))
        counted = [name for name in ("parameter_count", "multiply_adds") if self._known(name)]
        columns = (
            *names, "samples", "score", "deviation", *(COSTS[name][0] for name in counted),
            "seconds per sample", "seconds of a fit", f"front by {COSTS[cost][0]}",
        )  # fmt: skip
        rows = []
        for one in sorted(self.candidates, key=lambda one: (-one.resource, -one.score)):
            chosen = [_word(one.parameters[name]) if name in one.parameters else "" for name in names]
            costs = [f"{getattr(one, name):.0f}" for name in counted]
            seconds = (f"{one.seconds_per_sample:.2e}", f"{one.fit_seconds:.2f}")
            marked = "yes" if id(one) in front else ""
            rows.append(
                (*chosen, str(one.resource), f"{one.score:.4f}", f"{one.deviation:.4f}", *costs, *seconds, marked)
            )
        return columns, rows

    def plot(self, path: str | Path, cost: str | None = None, *, overwrite: bool = False) -> None:
        """Draw score against cost into a file, with the front of what is worth its cost.

        Parameters
        ----------
        path : str or Path
            Where to: ``.png``, ``.svg`` or ``.pdf``.
        cost : str, optional
            As `front` takes it.
        overwrite : bool
            Whether a file that exists may be replaced.

        Raises
        ------
        ValueError
            As `front`, or the suffix is another.
        FileExistsError
            The file exists and `overwrite` is False.
        OSError
            It cannot be written.
        ImportError
            If matplotlib is not installed.
        """
        from attn_numba.integrations import matplotlib as pictures

        cost = self._cost(cost)
        shown, front = self._finalists(), {id(one) for one in self.front(cost)}
        name, unit = COSTS[cost]
        figure = pictures.plot_front(
            [getattr(one, cost) for one in shown],
            [one.score for one in shown],
            [place for place, one in enumerate(shown) if id(one) in front],
            deviations=[one.deviation for one in shown],
            labels=[", ".join(f"{key}={_word(value)}" for key, value in one.parameters.items()) for one in shown],
            cost=name,
            unit=unit,
        )
        pictures.save(figure, path, overwrite=overwrite)

    def _finalists(self) -> list[Candidate]:
        """Return the candidates that were tried with the most samples, whose scores alone can be compared."""
        most = max(one.resource for one in self.candidates)
        return [one for one in self.candidates if one.resource == most]

    def _known(self, cost: str) -> bool:
        return all(getattr(one, cost) is not None for one in self.candidates)

    def _cost(self, cost: str | None) -> str:
        if cost is None:
            return next(name for name in COSTS if self._known(name))
        if cost not in COSTS:
            raise ValueError(f"cost is {cost!r}; needed one of {', '.join(COSTS)}")
        if not self._known(cost):
            raise ValueError(f"cost is {cost!r}, which the estimator does not tell, for it has no method `cost`")
        return cost


def _word(value: object) -> str:
    return "none" if value is None else str(value)

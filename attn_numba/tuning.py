"""Find out what makes the kernels of this processor fastest, by timing the named workloads in turns.

Only what cannot change a bit of any result is chosen, see `attn_numba/cpu/choices.py`, and only what is faster beyond
the noise: timings of the usual choice against itself, taken in the same turns.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from attn_numba.api import attention, attention_vjp
from attn_numba.parallel import thread_count
from attn_numba.profiles import trying
from attn_numba.workloads import Workload

if TYPE_CHECKING:
    from attn_numba.cpu.choices import Choice

__all__ = ["PASSES", "QUICK", "USUAL_EFFORT", "Effort", "Measurement", "ratios_of", "tune", "tuned"]

PASSES = ("forward", "backward")
LEAST_GAIN = 0.01
"""A choice that gains less is not worth a line in a profile."""

Call = Callable[[], Any]


class Effort(NamedTuple):
    """How much time goes into a class of calls.

    Parameters
    ----------
    seconds : float
        About how long one idea's choices are timed.
    least, most : int
        Turns that are taken at least and at most.
    """

    seconds: float = 6.0
    least: int = 5
    most: int = 15


USUAL_EFFORT, QUICK = Effort(), Effort(1.0, 3, 5)
TIMED = 0.01
"""Seconds that a single timing takes at least: shorter calls are repeated."""


class Measurement(NamedTuple):
    """What was found for one workload and pass.

    Parameters
    ----------
    workload : str
        Its name.
    shape_class : str
        The class of its calls.
    choice : Choice
        The fastest, or the usual one where no other is faster beyond the noise.
    milliseconds : float
        Of a call as usual, the median.
    gain : float
        The time as usual over the time as chosen, the median over the turns; 1 where the usual choice is kept.
    found : float
        The same of the fastest candidate, kept or not.
    noise : float
        How far the usual choice's time over its own, measured in the same turns, was from 1.
    changed : dict of str to int
        What the choice has that the usual one has not.
    """

    workload: str
    shape_class: str
    choice: Choice
    milliseconds: float
    gain: float
    found: float
    noise: float
    changed: dict[str, int]


def tuned(
    workloads: Iterable[Workload],
    dtype: np.dtype,
    passes: Sequence[str] = PASSES,
    effort: Effort = USUAL_EFFORT,
) -> Iterator[Measurement]:
    """Yield what is fastest for workloads, with as many threads as calls use here.

    Parameters
    ----------
    workloads : iterable of Workload
        The problems; one whose class of calls had its turn is passed over.
    dtype : numpy.dtype
        Of their arrays. Gradients of two-byte numbers are computed in float32, whose classes serve them.
    passes : sequence of str
        Of ``forward`` and ``backward``.
    effort : Effort
        How long to time.

    Yields
    ------
    Measurement

    Raises
    ------
    ValueError
        If a pass is neither of the two.
    RuntimeError
        If a choice changes a bit of a result, which none does.

    Examples
    --------
    >>> from attn_numba.workloads import WORKLOADS
    >>> (found,) = tuned([WORKLOADS["gpt2"].small()], np.dtype("float32"), ["forward"], Effort(0.01, 1, 1))
    >>> found.gain >= 1
    True
    """
    if unknown := [name for name in passes if name not in PASSES]:
        raise ValueError(f"passes has {unknown[0]!r}; needed {' or '.join(PASSES)}")
    seen = set()
    for workload in workloads:
        for name in passes:
            if name == "backward" and dtype.itemsize < 4:
                continue
            call, shape_class = _call_of(workload, dtype, name)
            if shape_class not in seen:
                seen.add(shape_class)
                yield tune(call, shape_class, effort)._replace(workload=f"{workload.name}, {name}")


def tune(call: Call, shape_class: str, effort: Effort = USUAL_EFFORT) -> Measurement:
    """Return what is fastest for a call.

    Parameters
    ----------
    call : callable
        Takes nothing, returns a tuple of arrays.
    shape_class : str
        The class of the call.
    effort : Effort
        How long to time.

    Returns
    -------
    Measurement

    Raises
    ------
    RuntimeError
        If the fastest choice changes a bit of the result, which none does.
    """
    from attn_numba.cpu.choices import ideas, together, usual_of

    usual = best = usual_of(shape_class)
    for idea in ideas(shape_class):
        candidates = [together(best, other, shape_class) for other in idea]
        gains = [statistics.median(turns) for turns in ratios_of(call, [best, *candidates], effort)[1]]
        if max(gains) > 1 + LEAST_GAIN:
            best = candidates[gains.index(max(gains))]
    seconds, ((*itself,), (*gained,)) = ratios_of(call, [usual, usual, best], effort._replace(least=2 * effort.least))
    noise, found = abs(statistics.median(itself) - 1), statistics.median(gained)
    low = statistics.quantiles(gained, n=4)[0] if len(gained) > 1 else found
    if low <= 1 + max(noise, LEAST_GAIN):
        best = usual
    _require_same_bits(call, usual, best)
    changed = {field: int(new) for field, new, old in zip(best._fields, best, usual, strict=True) if new != old}
    gain = found if changed else 1.0
    return Measurement("", shape_class, best, 1e3 * seconds, gain, found, noise, changed)


def ratios_of(call: Call, choices: Sequence[Choice], effort: Effort) -> tuple[float, list[list[float]]]:
    """Time a call by several choices in turns.

    Parameters
    ----------
    call : callable
        What is timed. On one thread its processor time counts, which others on the machine disturb less.
    choices : sequence of Choice
        The first is what the others are held to.
    effort : Effort
        How long.

    Returns
    -------
    seconds : float
        Of the first choice, the median over the turns.
    ratios : list of list of float
        For each of the others the first one's time over its own, turn by turn.
    """
    clock = thread_time if thread_count()[0] == 1 else perf_counter
    longest, repeat = 0.0, 1
    for choice in choices:  # compiles what is to be compiled, and fills caches
        with trying(choice):
            call()
            longest = max(longest, _time(call, 1, clock))
    if longest < TIMED:
        repeat = int(TIMED / max(longest, 1e-6)) + 1
    turns = int(effort.seconds / (longest * repeat * len(choices)))
    times: list[list[float]] = [[] for _ in choices]
    for turn in range(min(max(turns, effort.least), effort.most)):
        order = range(len(choices)) if turn % 2 == 0 else range(len(choices) - 1, -1, -1)
        for n in order:
            with trying(choices[n]):
                times[n].append(_time(call, repeat, clock))
    first, *others = times
    return statistics.median(first), [[a / b for a, b in zip(first, other, strict=True)] for other in others]


def _time(call: Call, repeat: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeat):
        call()
    return (clock() - start) / repeat


def _call_of(workload: Workload, dtype: np.dtype, name: str) -> tuple[Call, str]:
    """Return a call of a workload's pass and the name of its class."""
    q, k, v = workload.arrays(dtype)
    options = workload.options() | {"backend": "cpu"}
    forward = partial(attention, q, k, v, return_lse=True, **options)
    call: Call = forward
    if name == "backward":
        random = np.random.default_rng(1)
        dout = random.standard_normal((*q.shape[:3], v.shape[3]), dtype=np.float32).astype(dtype)
        call = partial(_gradients, q, k, v, dout, saved=tuple(forward()), **options)
    with trying(None) as trial:
        call()
    return call, next(shape_class for shape_class in trial.asked if shape_class.startswith(name))


def _gradients(*arrays: np.ndarray, **options: Any) -> tuple[np.ndarray, ...]:
    found = attention_vjp(*arrays, **options)
    return found.q, found.k, found.v


def _require_same_bits(call: Call, usual: Choice, other: Choice) -> None:
    results = []
    for choice in (usual, other):
        with trying(choice):
            results.append([x.tobytes() for x in call() if x is not None])
    if results[0] != results[1]:
        raise RuntimeError(f"{other} changes the result of a call: please report it")

"""How far a result is from the reference, how far it may be, and what the same work costs in plain NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from attn_numba.api import attention
from attn_numba.environment import backends
from attn_numba.job import Job
from attn_numba.reference import attention as reference_attention
from attn_numba.rules import Modifier, Places, Sizes, as_modifiers
from attn_numba.workloads import Workload, allowed_rows, places_of_rows

__all__ = [
    "Agreement",
    "Comparison",
    "agreement",
    "check_workload",
    "compare_backends",
    "contenders",
    "largest_difference",
    "plain_attention",
    "plain_table",
    "rounding_dtype",
    "time_call",
]

FULL_CHECK = 2**25
"""Scores up to which a workload is compared in all its rows; beyond, in 128 of them."""

DENSE_LIMIT = 2**26
"""Scores up to which a workload is timed in what writes all of them down: the reference and plain NumPy."""

REFERENCE_PAIRS = 2**22
"""Scores that the reference holds at once in `compare_backends`: 32 MB each time it writes them down."""

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Takes a label and the pairs to come; gives the function that is told of pairs done."""


class Agreement(NamedTuple):
    """How far a result is from the float64 reference.

    Parameters
    ----------
    difference : float
        The largest absolute difference of an element; infinite where one is finite and the other is not.
    tolerance : float
        How large it may be.
    """

    difference: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.difference <= self.tolerance


class Comparison(NamedTuple):
    """What one backend made of a job.

    Parameters
    ----------
    backend : str
        Its name.
    agreement : Agreement or None
        How far it is from the reference; None where it did not run.
    seconds : float
        Of its fastest run; NaN where it did not run.
    reason : str
        Why it did not run.
    """

    backend: str
    agreement: Agreement | None
    seconds: float
    reason: str


@contextmanager
def _silent(label: str, pairs: int) -> Iterator[Callable[[int], object]]:
    yield lambda pairs: None


def compare_backends(job: Job, repeat: int = 3, progress: Progress = _silent) -> Iterator[Comparison]:
    """Yield what each backend makes of a job, against the reference in float64.

    Parameters
    ----------
    job : Job
        The call.
    repeat : int
        How often each compiled backend is timed; the reference is timed once.
    progress : callable, optional
        Is told of the reference's progress.

    Yields
    ------
    Comparison
        For each of `attn_numba.backends`, the reference first.

    Examples
    --------
    >>> from attn_numba.job import Job, RuleSet
    >>> q = k = v = np.random.default_rng(0).standard_normal((8, 32, 16), dtype=np.float32)
    >>> rows = list(compare_backends(Job(q, k, v, RuleSet(causal=True))))
    >>> [row.backend for row in rows]
    ['reference', 'cpu', 'cuda']
    >>> all(row.agreement.passed for row in rows if row.agreement)
    True
    """

    def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, **options: Any) -> Any:
        return reference_attention(*(x.astype(np.float64) for x in (q, k, v)), **options)

    def rounded(*arrays: np.ndarray, **options: Any) -> Any:
        return reference_attention(*arrays, compute_dtype=rounding_dtype(job.q.dtype), **options)

    pieces = job.pieces(REFERENCE_PAIRS)
    pairs = job.pairs
    with progress("float64", pairs) as advance:
        expected = job.run(exact, pieces, advance)["out"]
    with progress(job.q.dtype.name, pairs) as advance:
        in_dtype = job.run(rounded, pieces, advance)["out"]
    for backend, (available, reason) in sorted(backends().items(), key=lambda item: item[0] != "reference"):
        if not available:
            yield Comparison(backend, None, float("nan"), reason)
            continue
        call = partial(job.run, partial(attention, backend=backend))
        if backend == "reference":
            call = partial(call, pieces)
        out = call()["out"]  # compiles what is to be compiled
        seconds = time_call(call, 1 if backend == "reference" else repeat)
        yield Comparison(backend, agreement(out, expected, in_dtype), seconds, "")


def contenders(
    workload: Workload, arrays: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> dict[str, Callable[[], np.ndarray] | str]:
    """Return what can compute a workload: by name a call that does, or the reason why there is none.

    Parameters
    ----------
    workload : Workload
        The problem.
    arrays : tuple of numpy.ndarray
        Its q, k and v.

    Returns
    -------
    dict of str to callable or str
        ``reference``, ``cpu``, ``cuda`` and ``numpy`` (`plain_attention`).
    """
    options, sizes = workload.options(), workload.sizes
    calls: dict[str, Callable[[], np.ndarray] | str] = {}
    for backend, (available, reason) in backends().items():
        calls[backend] = partial(attention, *arrays, backend=backend, **options) if available else reason
    scores = sizes.B * sizes.H * sizes.M * sizes.N
    if scores > DENSE_LIMIT:
        calls["reference"] = calls["numpy"] = f"{scores:.1e} scores; written down only up to {DENSE_LIMIT:.1e}"
    elif options.get("modifiers"):
        calls["numpy"] = "plain NumPy is written here for masks, not for modifiers"
    elif arrays[0].dtype.itemsize < 4:
        calls["numpy"] = f"NumPy has no fast matrix product of {arrays[0].dtype.name}"
    else:
        allowed = allowed_rows(options, sizes, np.arange(sizes.M, dtype=np.int32))
        calls["numpy"] = partial(plain_attention, *arrays, allowed, options.get("scale"))
    return calls


def largest_difference(result: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference of two arrays of one shape.

    Parameters
    ----------
    result, expected : numpy.ndarray
        Of one shape.

    Returns
    -------
    float
        Infinite where an element is finite in one and not in the other. NaN and infinity count as the same, since which
        of them comes out of an input that holds one is not promised.

    Examples
    --------
    >>> largest_difference(np.array([1.0, np.nan]), np.array([1.5, np.inf]))
    0.5
    >>> largest_difference(np.array([1.0]), np.array([np.nan]))
    inf
    """
    result, expected = result.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(expected)
    if (np.isfinite(result) != finite).any():
        return float("inf")
    return float(np.abs(result[finite] - expected[finite]).max(initial=0.0))


def agreement(result: np.ndarray, expected: np.ndarray, rounded: np.ndarray) -> Agreement:
    """Return how far a result is from the float64 reference, and how far it may be.

    Parameters
    ----------
    result : numpy.ndarray
        What is judged.
    expected : numpy.ndarray
        The reference's answer in float64.
    rounded : numpy.ndarray
        The reference's answer computed in `rounding_dtype` of the call's dtype.

    Returns
    -------
    Agreement
        The tolerance is twice the rounding error of the reference in the dtype of the call, plus four units in the last
        place of the largest element.

    Notes
    -----
    What float64 itself loses cannot be seen against float64: there it is what float32 loses, times 2^-29.
    """
    finite = np.abs(expected[np.isfinite(expected)])
    last_place = _epsilon(result.dtype) * float(finite.max(initial=0.0))
    rounding = largest_difference(rounded, expected)
    if result.dtype == np.float64:
        rounding *= _epsilon(np.dtype(np.float64)) / _epsilon(np.dtype(np.float32))
    tolerance = 2 * (rounding if np.isfinite(rounding) else 0.0) + 4 * last_place
    return Agreement(largest_difference(result, expected), tolerance)


def rounding_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype that the reference computes in to show what a call in another loses.

    Parameters
    ----------
    dtype : numpy.dtype
        Of the call.

    Returns
    -------
    numpy.dtype
        The same, but float32 for float64: `agreement` scales what it finds.
    """
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def check_workload(
    workload: Workload, arrays: tuple[np.ndarray, np.ndarray, np.ndarray], result: np.ndarray
) -> Agreement:
    """Return how far a result for a workload is from the reference.

    Parameters
    ----------
    workload : Workload
        The problem; its rules may be a mask, modifiers, offsets and a scale.
    arrays : tuple of numpy.ndarray
        q (B,H,M,D), k (B,Hk,N,D), v (B,Hk,N,E).
    result : numpy.ndarray
        What is judged, (B,H,M,E).

    Returns
    -------
    Agreement
        Over every query row up to `FULL_CHECK` scores, else over 128 rows spread evenly: a row of the output depends on
        no other query row.
    """
    options, sizes = workload.options(), workload.sizes
    rows = np.arange(sizes.M, dtype=np.int32)
    if sizes.B * sizes.H * sizes.M * sizes.N > FULL_CHECK:
        rows = np.unique(np.linspace(0, sizes.M - 1, 128).astype(np.int32))
    q, k, v = arrays[0][:, :, rows], arrays[1], arrays[2]
    places = places_of_rows(options, sizes, rows)
    modifiers = [_OfRows(modifier, places, sizes) for modifier in as_modifiers(options.get("modifiers"))]
    rules = {
        "mask": allowed_rows(options, sizes, rows), "modifiers": modifiers, "scale": options.get("scale"),
    }  # fmt: skip
    expected = reference_attention(*(x.astype(np.float64) for x in (q, k, v)), **rules)
    rounded = reference_attention(q, k, v, compute_dtype=rounding_dtype(q.dtype), **rules)
    return agreement(result[:, :, rows], expected, rounded)


@dataclass(frozen=True, eq=False)
class _OfRows(Modifier):
    """A modifier of a whole call, for some of its rows."""

    modifier: Modifier
    places: Places
    sizes: Sizes

    def evaluate(self, s: np.ndarray, places: Places, sizes: Sizes) -> np.ndarray:
        return self.modifier.evaluate(s, self.places, self.sizes)

    def excluded(self, places: Places, sizes: Sizes) -> np.ndarray | None:
        return self.modifier.excluded(self.places, self.sizes)


def plain_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, allowed: np.ndarray | None = None, scale: float | None = None
) -> np.ndarray:
    """Return attention as one writes it in NumPy with the matrix products left to its BLAS.

    This is what the compiled backends are measured against where nothing else is installed; the specification is
    `attn_numba.reference`.

    Parameters
    ----------
    q : numpy.ndarray
        (B,H,M,D), contiguous.
    k, v : numpy.ndarray
        (B,Hk,N,D) and (B,Hk,N,E).
    allowed : numpy.ndarray, optional
        Boolean, broadcasts to (B,H,M,N). Every query must have a key.
    scale : float, optional
        1/sqrt(D) if left out.

    Returns
    -------
    numpy.ndarray
        (B,H,M,E), in the dtype of q.

    Examples
    --------
    >>> plain_attention(np.zeros((1, 2, 1, 4)), np.zeros((1, 1, 2, 4)), np.array([[[[1.0], [3.0]]]])).ravel()
    array([2., 2.])
    """
    B, H, M, D = q.shape
    Hk, N = k.shape[1:3]
    grouped = q.reshape(B, Hk, H // Hk * M, D)  # the query heads of one key head as rows of one product
    s = (grouped @ k.swapaxes(-1, -2)).reshape(B, H, M, N)
    s *= q.dtype.type(D**-0.5 if scale is None else scale)
    if allowed is not None:
        np.copyto(s, q.dtype.type(-np.inf), where=~allowed)
    s -= s.max(axis=-1, keepdims=True)
    np.exp(s, out=s)
    s /= s.sum(axis=-1, keepdims=True)
    return (s.reshape(B, Hk, H // Hk * M, N) @ v).reshape(B, H, M, -1)


def plain_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as aligned text.

    Parameters
    ----------
    columns : sequence of str
        The headings.
    rows : sequence of sequence of str
        One text per column. Numbers are aligned right, other texts left.

    Returns
    -------
    str

    Examples
    --------
    >>> print(plain_table(("what", "ms"), [("cpu", "0.5"), ("reference", "12.5")]))
    what         ms
    cpu         0.5
    reference  12.5
    """
    lines = (columns, *rows)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    right = [any(row[n][:1].isdigit() for row in rows) for n in range(len(columns))]
    return "\n".join(
        "  ".join(f"{cell:{'>' if right[n] else '<'}{widths[n]}}" for n, cell in enumerate(line)).rstrip()
        for line in lines
    )


def time_call(function: Callable[[], Any], repeat: int = 3) -> float:
    """Return the seconds of the fastest of several calls.

    Parameters
    ----------
    function : callable
        Takes nothing.
    repeat : int
        How often it is called, at least once.

    Returns
    -------
    float
    """
    times = []
    for _ in range(repeat):
        start = perf_counter()
        function()
        times.append(perf_counter() - start)
    return min(times)


def _epsilon(dtype: np.dtype) -> float:
    return 2.0**-7 if dtype.name == "bfloat16" else float(np.finfo(dtype).eps)

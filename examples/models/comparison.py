"""The same attention on every backend, side by side: largest difference, time, ratio."""

from __future__ import annotations

import timeit
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import attn_numba as an
from attn_numba.integrations.rich import print_table

BUDGET = 0.2  # seconds for the repeated calls of one row


@dataclass(frozen=True)
class Case:
    """One attention call out of a model: what was put in and at which layer, the arrays, the rules by argument name."""

    input: str
    layer: int
    q: NDArray[np.float32]
    k: NDArray[np.float32]
    v: NDArray[np.float32]
    rules: Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What one backend made of one case; times in seconds."""

    case: Case
    backend: str
    difference: float
    reference_seconds: float
    seconds: float


def compare(cases: Iterable[Case]) -> Iterator[Row]:
    """Yield, for each case and each backend that can run here, its result against the reference's."""
    names = [name for name, (available, _) in an.backends().items() if available and name != "reference"]
    for case in cases:
        expected, reference_seconds = _measure("reference", case)
        for name in names:
            out, seconds = _measure(name, case)
            yield Row(case, name, float(np.abs(out - expected).max()), reference_seconds, seconds)


def _measure(backend: str, case: Case) -> tuple[NDArray[Any], float]:
    """Return the result as a host array, and the shortest time of several calls in seconds, without transfers."""
    arrays: list[Any] = [case.q, case.k, case.v]
    if backend == "cuda":
        from numba import cuda

        arrays = [cuda.to_device(np.ascontiguousarray(array)) for array in arrays]

    def call() -> Any:
        out = an.attention(*arrays, backend=backend, **case.rules)
        if backend == "cuda":
            cuda.synchronize()  # the call returns before the device is done
        return out

    out = call()
    timer = timeit.Timer(call)
    seconds = min(timer.repeat(3, number=1))
    seconds = min(timer.repeat(min(100, int(BUDGET / seconds)), number=1), default=seconds)
    return out.copy_to_host() if backend == "cuda" else out, seconds


def report(rows: Iterable[Row]) -> None:
    """Print the rows as a table, and a line for each backend that cannot run here."""
    headings = ["input", "layer", "H", "Hk", "M", "N", "D", "backend", "difference", "reference", "time", "ratio"]
    print_table("The model's own q, k, v: each backend against the reference", headings, [_cells(row) for row in rows])
    print("difference: the largest of any element; time and reference: milliseconds; ratio: reference over time")
    for name, (available, reason) in an.backends().items():
        if not available:
            print(f"{name} did not run: {reason}")


def _cells(row: Row) -> list[str]:
    (*_, H, M, D), (*_, Hk, N, _) = row.case.q.shape, row.case.k.shape
    times = (
        f"{1e3 * row.reference_seconds:.3f}",
        f"{1e3 * row.seconds:.3f}",
        f"{row.reference_seconds / row.seconds:.1f}",
    )
    return [row.case.input, *map(str, (row.case.layer, H, Hk, M, N, D)), row.backend, f"{row.difference:.1e}", *times]

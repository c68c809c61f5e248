"""Forward and backward together over every named workload: reference, cpu and cuda side by side.

    pytest benchmarks/bench_backward.py                   all of it, some minutes
    pytest benchmarks -k smoke                            every workload at a sixteenth of its length, seconds
    pytest benchmarks/bench_backward.py -k "gpt2 and cpu" --threads 1

Before a contender is timed its gradients are held to the reference, or where that would have to write down too many
scores, dq to the reference of some rows and dk and dv to what their sums must be. Red means no number.
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import pytest

import attn_numba as an
from attn_numba.comparison import DENSE_LIMIT, FULL_CHECK
from attn_numba.gradient_checks import check_attention_vjp
from attn_numba.workloads import WORKLOADS, Workload, allowed_rows

CONTENDERS = ("reference", "cpu", "cuda")
PRODUCTS = 7  # of matrices: two of the forward pass, five of the backward one
LONG = 0.2  # seconds: calls that take longer are timed three times
ROWS = 32  # compared where there are too many scores
CASES = [
    pytest.param(workload, contender, id=f"{workload.name}-{contender}", marks=marks)
    for full in WORKLOADS.values()
    for workload, marks in ((full, ()), (full.small(), pytest.mark.smoke))
    for contender in CONTENDERS
]


def call_of(workload: Workload, arrays: list[np.ndarray], backend: str) -> Callable[[], Any]:
    """Return a call of both passes."""
    q, k, v, dout = arrays
    options = workload.options() | {"backend": backend}

    def call() -> Any:
        saved = tuple(an.attention(q, k, v, return_lse=True, **options))
        return an.attention_vjp(q, k, v, dout, saved=saved, **options)

    return call


def check(workload: Workload, arrays: list[np.ndarray], backend: str, found: Any) -> None:
    """Raise an AssertionError if gradients are not what they must be."""
    q, k, v, dout = arrays
    sizes, options = workload.sizes, workload.options()
    if sizes.B * sizes.H * sizes.M * sizes.N <= FULL_CHECK:
        check_attention_vjp(q, k, v, dout, backend, name=workload.name, **options)
        return
    if not options.get("modifiers"):
        rows = np.unique(np.linspace(0, sizes.M - 1, ROWS).astype(np.int32))
        mask, some = allowed_rows(options, sizes, rows), (q[:, :, rows], k, v, dout[:, :, rows])
        expected = an.reference.attention_vjp(
            *(x.astype(np.float64) for x in some), mask=mask, scale=options.get("scale")
        )
        largest = np.abs(expected.q).max()
        assert np.abs(found.q[:, :, rows] - expected.q).max() <= 1e-2 * largest
    shape = (sizes.B, sizes.Hk, -1, sizes.M, sizes.E)
    total = dout.astype(np.float64).reshape(shape).sum(axis=(2, 3))  # weights of a row sum to 1
    np.testing.assert_allclose(found.v.astype(np.float64).sum(axis=2), total, atol=1e-2 * np.abs(total).max())
    products = [
        np.einsum("bhmd,bhmd->", x.astype(np.float64), y.astype(np.float64)) for x, y in ((q, found.q), (k, found.k))
    ]
    np.testing.assert_allclose(*products, rtol=1e-2, atol=1e-2 * np.abs(q * found.q).sum())


@pytest.mark.parametrize(("workload", "contender"), CASES)
def bench_backward(
    benchmark, rows: list[dict[str, str]], dtype: np.dtype, threads: int, workload: Workload, contender: str
) -> None:
    benchmark.group = f"{workload.name}, forward and backward, {dtype.name}"
    row = {"workload": f"{workload.name}, both passes", "what": contender}
    rows.append(row)
    reason = unavailable(workload, contender)
    if reason:
        row["note"] = f"skipped: {reason}"
        pytest.skip(f"{contender}: {reason}")
    sizes = workload.sizes
    dout = np.random.default_rng(1).standard_normal((sizes.B, sizes.H, sizes.M, sizes.E), dtype=np.float32)
    arrays = [*workload.arrays(dtype), dout.astype(dtype)]
    call = call_of(workload, arrays, contender)
    start = perf_counter()
    found = call()
    first = perf_counter() - start
    if contender != "reference":
        check(workload, arrays, contender, found)
    if workload.name.endswith("-smoke") or first > LONG:
        benchmark.pedantic(call, rounds=3, iterations=1, warmup_rounds=1 if first < 2 else 0)
    else:
        benchmark(call)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    rate = PRODUCTS / 2 * workload.flop / seconds
    row |= {"ms": f"{1e3 * seconds:.3f}", "GFLOP/s visible": f"{rate / 1e9:.1f}"}
    benchmark.extra_info |= {
        "dtype": dtype.name,
        "threads": threads,
        "sizes": sizes._asdict(),
        "source": workload.source,
        "flop": PRODUCTS / 2 * workload.flop,
        "gflops": rate / 1e9,
    }


def unavailable(workload: Workload, contender: str) -> str:
    """Return why a contender cannot run a workload; empty if it can."""
    available, reason = an.backends()[contender]
    if not available:
        return reason
    s = workload.sizes
    scores = s.B * s.H * s.M * s.N
    if contender == "reference" and scores > DENSE_LIMIT:
        return f"{scores:.1e} scores; written down only up to {DENSE_LIMIT:.1e}"
    return ""

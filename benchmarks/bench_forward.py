"""The forward pass over every named workload: reference, cpu, cuda and plain NumPy side by side.

    pytest benchmarks/bench_forward.py                    all of it, some minutes
    pytest benchmarks -k smoke                            every workload at a sixteenth of its length, seconds
    pytest benchmarks/bench_forward.py -k "gpt2 and cpu" --threads 1 --dtype bfloat16

Before a contender is timed its result is held to the reference; where it is further off than the rounding of its dtype
allows, the test fails and there is no number.
"""

from __future__ import annotations

from time import perf_counter

import numpy as np
import pytest

from attn_numba.comparison import check_workload, contenders
from attn_numba.workloads import WORKLOADS, Workload

CONTENDERS = ("reference", "cpu", "cuda", "numpy")
LONG = 0.2  # seconds: calls that take longer are timed three times, the others as often as pytest-benchmark sees fit
CASES = [
    pytest.param(workload, contender, id=f"{workload.name}-{contender}", marks=marks)
    for full in WORKLOADS.values()
    for workload, marks in ((full, ()), (full.small(), pytest.mark.smoke))
    for contender in CONTENDERS
]


@pytest.mark.parametrize(("workload", "contender"), CASES)
def bench_forward(
    benchmark, rows: list[dict[str, str]], dtype: np.dtype, threads: int, workload: Workload, contender: str
) -> None:
    benchmark.group = f"{workload.name}, {dtype.name}"
    row = {"workload": workload.name, "what": contender}
    rows.append(row)
    arrays = workload.arrays(dtype)
    call = contenders(workload, arrays)[contender]
    if isinstance(call, str):
        row["note"] = f"skipped: {call}"
        pytest.skip(f"{contender}: {call}")
    start = perf_counter()
    result = call()
    first = perf_counter() - start
    found = check_workload(workload, arrays, result)
    row |= {"difference": f"{found.difference:.1e}", "allowed": f"{found.tolerance:.1e}"}
    if not found.passed:
        row["note"] = "FAILED: not timed"
    assert found.passed, f"{contender} differs from the reference by {found.difference}, allowed {found.tolerance}"
    smoke = workload.name.endswith("-smoke")
    if smoke or first > LONG:
        benchmark.pedantic(call, rounds=3, iterations=1, warmup_rounds=1 if first < 2 else 0)
    else:
        benchmark(call)
    if benchmark.stats is None:  # --benchmark-disable
        return
    seconds = benchmark.stats.stats.median
    rate = workload.flop / seconds
    row |= {"ms": f"{1e3 * seconds:.3f}", "GFLOP/s visible": f"{rate / 1e9:.1f}"}
    benchmark.extra_info |= {
        "dtype": dtype.name,
        "threads": threads,
        "sizes": workload.sizes._asdict(),
        "source": workload.source,
        "flop": workload.flop,
        "bytes": sum(array.nbytes for array in (*arrays, result)),
        "gflops": rate / 1e9,
        "difference": found.difference,
    }
    if contender == "cpu":
        from attn_numba.cpu.peak import peak_rate

        share = rate / (threads * peak_rate(dtype.name))
        row["of tile's peak"] = f"{share:.2f}"
        benchmark.extra_info["share_of_peak"] = share

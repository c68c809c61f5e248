"""What a process pays before its first result: importing, loading compiled code, compiling it.

Each figure comes from processes of their own. Run with ``pytest benchmarks/bench_compile.py``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

IMPORT = "import time; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
FIRST_CALL = """
import time
start = time.perf_counter()
import numpy as np
import attn_numba as an
q = k = v = np.ones((1, 1, 8, 8), "{dtype}")
an.attention(q, k, v, mask={mask})
print(time.perf_counter() - start)
"""
MASKS = {"none": "None", "causal": "an.Causal()", "custom": "an.CustomMask(lambda b, h, i, j, p: i * 3 + 7 >= j)"}


def run(code: str, cache: Path | None = None) -> float:
    """Return the seconds that a new process says it took."""
    environment = os.environ | ({} if cache is None else {"NUMBA_CACHE_DIR": str(cache)})
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def report(benchmark, rows: list[dict[str, str]], what: str, code: str, rounds: int, cache: Path | None = None) -> None:
    inner: list[float] = []
    benchmark.group = "start"
    benchmark.pedantic(lambda: inner.append(run(code, cache)), rounds=rounds, iterations=1)
    seconds = sorted(inner)[len(inner) // 2]
    benchmark.extra_info["seconds_inside"] = seconds
    rows.append({"workload": "start", "what": what, "ms": f"{1e3 * seconds:.1f}"})


@pytest.mark.parametrize("name", ["numpy", "attn_numba"])
def bench_import(benchmark, rows: list[dict[str, str]], name: str) -> None:
    report(benchmark, rows, f"import {name}", IMPORT.format(name=name), rounds=9)


@pytest.mark.parametrize("mask", MASKS)
def bench_first_call_warm(benchmark, rows: list[dict[str, str]], mask: str) -> None:
    code = FIRST_CALL.format(dtype="float32", mask=MASKS[mask])
    run(code)  # fills the disk cache
    report(benchmark, rows, f"import and first call, warm disk cache, mask {mask}", code, rounds=5)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def bench_first_call_cold(benchmark, rows: list[dict[str, str]], dtype: str, tmp_path: Path) -> None:
    code = FIRST_CALL.format(dtype=dtype, mask="None")
    report(benchmark, rows, f"import and first call, nothing compiled, {dtype}", code, rounds=1, cache=tmp_path)

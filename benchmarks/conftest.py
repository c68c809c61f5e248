"""Options of the benchmarks, and a table at their end that also says what was skipped and why."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import attn_numba as an
from attn_numba.parallel import thread_count
from attn_numba.workloads import named_dtype
from timing import machine

ROWS = pytest.StashKey[list[dict[str, str]]]()
COLUMNS = ("workload", "what", "ms", "GFLOP/s visible", "of tile's peak", "difference", "allowed", "note")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attn-numba")
    group.addoption("--dtype", default="float32", help="of q, k, v: float64, float32, float16 or bfloat16")
    group.addoption("--threads", type=int, help="threads of each call (default: as in a program)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.option.benchmark_quiet = True  # the table below has its numbers, and the skipped contenders too


@pytest.fixture(scope="session")
def dtype(pytestconfig: pytest.Config) -> np.dtype:
    return named_dtype(pytestconfig.getoption("--dtype"))


@pytest.fixture(autouse=True)
def threads(pytestconfig: pytest.Config) -> Iterator[int]:
    with an.threads(pytestconfig.getoption("--threads") or thread_count()[0]):
        yield thread_count()[0]


@pytest.fixture(scope="session")
def rows(pytestconfig: pytest.Config) -> list[dict[str, str]]:
    """Rows of the table at the end."""
    return pytestconfig.stash[ROWS]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    threads = config.getoption("--threads") or thread_count()[0]
    found = machine(threads)
    versions = ", ".join(f"{name} {number}" for name, number in found["versions"].items())
    terminalreporter.section(f"{config.getoption('--dtype')}, {threads} thread(s)")
    terminalreporter.write_line(f"{found['processor']}; {versions}")
    widths = [max(len(row.get(name, "")) for row in ({c: c for c in COLUMNS}, *rows)) for name in COLUMNS]
    last = None
    for row in ({name: name for name in COLUMNS}, *rows):
        if row["workload"] != last:
            terminalreporter.write_line("")
        last = row["workload"]
        cells = (row.get(name, "") for name in COLUMNS)
        aligned = [f"{cell:{'<' if n in (0, 1, 7) else '>'}{widths[n]}}" for n, cell in enumerate(cells)]
        terminalreporter.write_line("  ".join(aligned).rstrip())

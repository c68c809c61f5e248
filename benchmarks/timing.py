"""What all measurements share: turns taken one after the other, and the machine they were taken on."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import attn_numba as an

Row = tuple[str, float, str]  # what, figure, unit

RESULTS = Path(__file__).parent / "results"
PAUSE = 0.005  # seconds: idle threads of an OpenMP pool go on spinning for about a millisecond after a call


def bind(threads: int) -> None:
    """Bind this process to as many cores as threads, and start it anew so that every library counts just these."""
    wanted = {f"{pool}_NUM_THREADS": str(threads) for pool in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
    if wanted.items() <= os.environ.items():
        return
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


def interleave(
    calls: Mapping[str, Callable[[], object]], turns: int = 5, seconds: float = 0.1
) -> dict[str, list[float]]:
    """Return seconds per call of each, one entry a turn; the calls take turns, so that changes of the machine hit all.

    A turn is a pause, one call that is not timed (it wakes pools and fills caches), then calls for about `seconds`, of
    which the median counts.
    """
    for call in calls.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns):
        names = list(calls) if turn % 2 == 0 else list(calls)[::-1]
        for name in names:
            call = calls[name]
            time.sleep(PAUSE)
            call()
            taken: list[float] = []
            while not taken or sum(taken) < seconds:
                start = time.perf_counter()
                call()
                taken.append(time.perf_counter() - start)
            times[name].append(statistics.median(taken))
    return times


def ratio(times: Mapping[str, Sequence[float]], over: str, under: str) -> float:
    """Return the median over the turns of one call's time over the other's."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


def machine(threads: int, *packages: str) -> dict[str, Any]:
    """Return what a figure cannot be read without: processor, threads, versions, day."""
    versions = {}
    for name in ("attn-numba", "numpy", "numba", "llvmlite", *packages):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": date.today().isoformat(),
    }


def save(name: str, content: Mapping[str, Any], folder: Path = RESULTS) -> Path:
    """Write one result file, whole or not at all, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path


def process(code: str, environment: dict[str, str] | None = None) -> str:
    """Run Python code in a process of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | (environment or {}), capture_output=True, text=True, check=True
    )
    return done.stdout


def run_parts(doc: str, name: str, parts: dict[str, Callable[[argparse.Namespace], Iterator[Row]]]) -> None:
    """Take the figures of the parts that the command line names, print them and write them to `name`."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.2, help="timed per turn and call")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default: benchmarks/results)")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(parts):
        parser.error(f"unknown part {unknown.pop()}; known are {', '.join(parts)}")
    bind(arguments.threads)
    content = {"dtype": arguments.dtype, "machine": machine(arguments.threads)}
    with an.threads(arguments.threads):
        take(parts, arguments, f"{name}-{arguments.dtype}-{arguments.threads}", content)


def take(
    parts: Mapping[str, Callable[[argparse.Namespace], Iterator[Row]]],
    arguments: argparse.Namespace,
    name: str,
    content: Mapping[str, Any],
) -> None:
    """Take the figures of `arguments.parts`, or of all, print them and write them to `name` beside `content`."""
    rows: list[dict[str, Any]] = []
    for part in arguments.parts or parts:
        for what, figure, unit in parts[part](arguments):
            rows.append({"part": part, "what": what, "figure": figure, "unit": unit})
            print(f"{what}: {figure:.4g} {unit}", flush=True)
    save(name, {**content, "rows": rows}, arguments.folder)
    print()
    print(markdown(("what", "figure", ""), [(row["what"], f"{row['figure']:.3g}", row["unit"]) for row in rows]))


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column aligned left and the others right."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()

"""Attention over Dask arrays against one call, taken in turns, and what a task costs; needs dask and distributed.

    python benchmarks/dask_tasks.py     8k causal tokens: 2 workers of 1 thread against 1 process of 2, by chunks

Chunks lie on the workers already; results stay there.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
from distributed import Client, LocalCluster, wait

import attn_numba as an
from timing import RESULTS, Row, machine, take

SHAPE = (1, 8, 8192, 64)
CHUNKS = (512, 1024, 2048, 4096)
SMALL = (1, 1, 1024, 8)
CALLS = itertools.count()


def seconds_of(call: Any) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def arrays_on_workers(client: Client, shape: tuple[int, ...], tokens: int) -> list[da.Array]:
    random = da.random.default_rng(0)
    chunks = (*shape[:2], tokens, shape[3])
    found = client.persist([random.standard_normal(shape, chunks=chunks).astype("f4") for _ in range(3)])
    wait(found)
    return list(found)


def computed(client: Client, arrays: list[da.Array]) -> None:
    """Compute a call that no other one's results can serve: each has its own scale."""
    scale = (1 + 1e-6 * next(CALLS)) * SHAPE[3] ** -0.5
    wait(client.persist(an.dask.attention(*arrays, mask=an.Causal(), scale=scale)))


def tasks_of(graph: da.Array) -> int:
    return sum(str(key[0]).startswith("attention") for key in graph.dask if isinstance(key, tuple))


def figures(client: Client, turns: int) -> Iterator[Row]:
    """Yield what a task takes beside its work; then, by chunks, times and what docs/cluster.md foretells."""
    small = arrays_on_workers(client, SMALL, 32)
    graph = an.dask.attention(*small, mask=an.Causal())
    count = tasks_of(graph)
    computed(client, small)
    building = statistics.median(seconds_of(lambda: an.dask.attention(*small, mask=an.Causal())) for _ in range(turns))
    of_task = statistics.median(seconds_of(lambda: computed(client, small)) for _ in range(turns)) / count
    yield f"{count} small tasks: for each, until they are known", 1e3 * building / count, "ms"
    yield f"{count} small tasks: for each, until they are done, on 2 workers", 1e3 * of_task, "ms"

    q, k, v = (np.random.default_rng(n).standard_normal(SHAPE, dtype=np.float32) for n in range(3))
    given = {tokens: arrays_on_workers(client, SHAPE, tokens) for tokens in CHUNKS}
    for arrays in given.values():
        computed(client, arrays)
    an.attention(q, k, v, mask=an.Causal())
    seconds: dict[int, list[tuple[float, float]]] = {tokens: [] for tokens in CHUNKS}
    for _ in range(turns):
        for tokens, arrays in given.items():
            with an.threads(2):
                one = seconds_of(lambda: an.attention(q, k, v, mask=an.Causal()))
            seconds[tokens].append((one, seconds_of(lambda: computed(client, arrays))))  # noqa: B023
    for tokens, found in seconds.items():
        name = f"chunks of {tokens} tokens, 2 workers"
        count = tasks_of(an.dask.attention(*given[tokens], mask=an.Causal()))
        yield f"{name}: {count} tasks", 1e3 * statistics.median(two for _, two in found), "ms"
        yield f"{name}: 1 process of 2 threads over it", statistics.median(one / two for one, two in found), "times"
        foretold = [two / (one + count * of_task) for one, two in found]
        yield f"{name}: measured over foretold", statistics.median(foretold), "times"


def main() -> None:
    """Take the figures, print them and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default: benchmarks/results)")
    parser.set_defaults(parts=())
    arguments = parser.parse_args()
    with (
        dask.config.set({"distributed.worker.daemon": True}),
        LocalCluster(
            n_workers=2, threads_per_worker=1, dashboard_address=":0", silence_logs=logging.CRITICAL
        ) as cluster,
        Client(cluster) as client,
    ):
        parts = {"causal": lambda arguments: figures(client, arguments.turns)}
        take(parts, arguments, "dask", {"machine": machine(1, "dask", "distributed")})


if __name__ == "__main__":
    main()

"""Attention over Dask arrays against one call, taken in turns, and what a task costs; needs dask and distributed.

    python benchmarks/dask_tasks.py speed    8k causal tokens: 2 workers of 1 thread against 1 process of 2, by chunks
    python benchmarks/dask_tasks.py tasks    time for each task where there is next to nothing to compute

Chunks lie on the workers already; results stay there.
"""

from __future__ import annotations

import argparse
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
from timing import RESULTS, Row, machine, markdown, save

SHAPE = (1, 8, 8192, 64)
CHUNKS = (512, 1024, 2048, 4096)
SMALL = (1, 1, 1024, 8)


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


def computed(client: Client, q: da.Array, k: da.Array, v: da.Array) -> None:
    wait(client.persist(an.dask.attention(q, k, v, mask=an.Causal())))


def speed(client: Client, turns: int) -> Iterator[Row]:
    """Yield the time of one call with two threads over that of two workers with one each."""
    q, k, v = (np.random.default_rng(n).standard_normal(SHAPE, dtype=np.float32) for n in range(3))
    given = {tokens: arrays_on_workers(client, SHAPE, tokens) for tokens in CHUNKS}
    for arrays in given.values():
        computed(client, *arrays)
    an.attention(q, k, v, mask=an.Causal())
    ratios: dict[int, list[float]] = {tokens: [] for tokens in CHUNKS}
    for _ in range(turns):
        for tokens, arrays in given.items():
            with an.threads(2):
                one = seconds_of(lambda: an.attention(q, k, v, mask=an.Causal()))
            ratios[tokens].append(one / seconds_of(lambda: computed(client, *arrays)))  # noqa: B023
    for tokens, found in ratios.items():
        yield f"chunks of {tokens} tokens: 1 process of 2 threads over 2 workers", statistics.median(found), "times"


def tasks(client: Client, turns: int) -> Iterator[Row]:
    """Yield the time for each task of a graph in which tasks have next to nothing to do."""
    arrays = arrays_on_workers(client, SMALL, 32)
    graph = an.dask.attention(*arrays, mask=an.Causal())
    count = sum(str(key[0]).startswith("attention") for key in graph.dask if isinstance(key, tuple))
    computed(client, *arrays)
    building = statistics.median(seconds_of(lambda: an.dask.attention(*arrays, mask=an.Causal())) for _ in range(turns))
    running = statistics.median(seconds_of(lambda: computed(client, *arrays)) for _ in range(turns))
    yield f"{count} tasks: for each, until they are known", 1e3 * building / count, "ms"
    yield f"{count} tasks: for each, until they are done, on 2 workers", 1e3 * running / count, "ms"


PARTS = {part.__name__: part for part in (speed, tasks)}


def main() -> None:
    """Take the figures of the parts that the command line names, print them and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default: benchmarks/results)")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()}; known are {', '.join(PARTS)}")
    rows: list[dict[str, Any]] = []
    with (
        dask.config.set({"distributed.worker.daemon": True}),
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0") as cluster,
        Client(cluster) as client,
    ):
        for part in arguments.parts or PARTS:
            for what, figure, unit in PARTS[part](client, arguments.turns):
                rows.append({"part": part, "what": what, "figure": figure, "unit": unit})
                print(f"{what}: {figure:.4g} {unit}", flush=True)
    save("dask", {"machine": machine(1, "dask", "distributed"), "rows": rows}, arguments.folder)
    print()
    print(markdown(("what", "figure", ""), [(row["what"], f"{row['figure']:.3g}", row["unit"]) for row in rows]))


if __name__ == "__main__":
    main()

"""Attention on a ring of MPI ranks against one process, taken in turns; needs mpi4py and mpiexec.

    python benchmarks/mpi.py speed      16k causal tokens: 2 ranks of 1 thread, 1 rank of 1 thread, 1 process of 2
    python benchmarks/mpi.py waiting    how long the 2 ranks wait for messages, of their time
    python benchmarks/mpi.py memory     65k tokens on 4 ranks: peak of each beyond an idle one's; about a minute
    python benchmarks/mpi.py balance    visible pairs of each rank over their mean, causal, 2 to 64 ranks
    python benchmarks/mpi.py model      time of 2 ranks over what docs/cluster.md foretells, 512 to 8192 tokens a rank

The ratios are what counts: ranks of one machine share its memory and its clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import attn_numba as an
from timing import RESULTS, Row, machine, take

SHAPE = (1, 8, 16384, 64)
LONG = (1, 8, 65536, 64)
CAUSAL = an.Causal()
POOLS = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def launched(ranks: int, threads: int, *words: str) -> list[Any]:
    """Return what each rank of a new job reports of one measurement."""
    beside = Path(sysconfig.get_path("scripts")) / "mpiexec"
    command = [str(beside) if beside.exists() else "mpiexec", "-n", str(ranks), sys.executable, "-m", "mpi4py"]
    environment = os.environ | dict.fromkeys(POOLS, str(threads))
    done = subprocess.run(
        [*command, __file__, "rank", *words], env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def speed(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the times of the three ways, and what the ring's is to the others', turn by turn."""
    ways = {"1 rank": (1, 1, "attention"), "2 ranks": (2, 1, "attention"), "1 process, 2 threads": (1, 2, "process")}
    for name, gradients in (("forward", "no"), ("gradients", "yes")):
        times: dict[str, list[float]] = {way: [] for way in ways}
        busy: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(arguments.turns):
            for way, (ranks, threads, kind) in ways.items():
                reports = launched(ranks, threads, kind, gradients)
                times[way].append(max(wall for wall, _ in reports))
                busy[way].append(max(processor for _, processor in reports))
        for way, seconds in times.items():
            yield f"{name}: {way}", statistics.median(seconds), "seconds"
        for way in ("1 rank", "1 process, 2 threads"):
            ratios = [one / two for one, two in zip(times[way], times["2 ranks"], strict=True)]
            yield f"{name}: time of {way} over that of 2 ranks", statistics.median(ratios), "times"
        ratios = [one / two for one, two in zip(busy["1 rank"], busy["2 ranks"], strict=True)]
        yield f"{name}: processor time of 1 rank over that of the busier of 2", statistics.median(ratios), "times"


def waiting(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the share of their time that ranks wait for messages at the ends of steps."""
    found = [max(launched(2, 1, "waiting")) for _ in range(arguments.turns)]
    yield "2 ranks: waiting for each other at the ends of steps", statistics.median(found), "of 1"


def memory(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield each rank's peak beyond an idle rank's, over its share of q, k, v, out and two blocks of k and v."""
    for rank, (peak, share) in enumerate(launched(4, 1, "memory")):
        yield f"rank {rank} of 4: peak beyond an idle rank's", peak / 2**20, "MiB"
        yield f"rank {rank} of 4: over q, k, v, out and two blocks", peak / share, "times"


def balance(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the visible pairs of the busiest rank over the mean, counted."""
    from attn_numba.integrations.mpi.layouts import stretches_of

    n = SHAPE[2]
    for ranks in (2, 4, 16, 64):
        for layout in ("contiguous", "zigzag"):
            counts = [
                sum((end * (end + 1) - first * (first + 1)) // 2 for first, end in stretches)
                for stretches in stretches_of(n, ranks, layout)
            ]
            yield f"{ranks} ranks, {layout}: pairs of the busiest over the mean", max(counts) / np.mean(counts), "times"


def model(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the speed between ranks and the rate of one, then measured times over those of the cost model."""
    found: list[dict[str, float]] = launched(2, 1, "model", str(arguments.turns))[0]
    facts, *sizes = found
    yield "between 2 ranks of this machine, both ways at once", facts["link"] / 1e9, "GB/s each"
    yield "a rank's rate, full attention, D = 64", facts["rate"] / 1e9, "GFLOP/s"
    for row in sizes:
        name = f"{row['tokens']:.0f} tokens a rank, {row['heads']:.0f} heads, D = 64"
        yield f"{name}: measured", 1e3 * row["seconds"], "ms"
        yield f"{name}: measured over foretold", row["seconds"] / row["foretold"], "times"


def as_rank(words: list[str]) -> None:
    """Do one rank's part of a measurement; rank 0 prints what all report."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    kind, *rest = words
    found = MEASURED[kind](comm, *rest)
    reports = comm.gather(found)
    if reports is not None:
        print(json.dumps(reports))


def arrays_of_rank(shape: tuple[int, ...], comm: Any, count: int, mask: Any = CAUSAL) -> tuple[Any, list[np.ndarray]]:
    B, H, n, D = shape
    shard = an.mpi.Shard(n, comm, mask=mask)
    random = np.random.default_rng(comm.rank)
    mine = (B, H, len(shard.positions), D)
    return shard, [random.standard_normal(mine, dtype=np.float32) for _ in range(count)]


def timed(comm: Any, call: Any) -> tuple[float, float]:
    """Return the seconds of a call, and those that a processor worked on it: others' work takes none of these."""
    comm.Barrier()
    start, worked = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - worked


def time_ring(comm: Any, gradients: str) -> tuple[float, float]:
    """Return the seconds of a call on the ring, after one that compiles."""
    shard, (q, k, v, dout) = arrays_of_rank(SHAPE, comm, 4)
    rules = {"mask": an.Causal(), "exchange": "ring"}
    warm(comm, gradients == "yes")
    if gradients == "no":
        return min(timed(comm, lambda: an.mpi.attention(q, k, v, shard=shard, **rules)) for _ in range(2))
    saved = an.mpi.attention(q, k, v, shard=shard, **rules, return_lse=True)
    return timed(comm, lambda: an.mpi.attention_vjp(q, k, v, dout, shard=shard, **rules, saved=saved))


def time_process(comm: Any, gradients: str) -> tuple[float, float]:
    """Return the seconds of a call without MPI."""
    _, (q, k, v, dout) = arrays_of_rank(SHAPE, comm, 4)
    warm(comm, gradients == "yes")
    if gradients == "no":
        return min(timed(comm, lambda: an.attention(q, k, v, mask=an.Causal())) for _ in range(2))
    saved = an.attention(q, k, v, mask=an.Causal(), return_lse=True)
    return timed(comm, lambda: an.attention_vjp(q, k, v, dout, mask=an.Causal(), saved=saved))


def warm(comm: Any, gradients: bool) -> None:
    shard, (q, k, v, dout) = arrays_of_rank((1, 1, 256, 64), comm, 4)
    an.mpi.warm_up(gradients=gradients)
    an.mpi.attention(q, k, v, shard=shard, mask=an.Causal(), exchange="ring")
    if gradients:
        an.mpi.attention_vjp(q, k, v, dout, shard=shard, mask=an.Causal(), exchange="ring")


def share_waited(comm: Any) -> float:
    """Return the share of a call on the ring that is waiting for messages."""
    from attn_numba.integrations.mpi.transfers import Requests

    shard, (q, k, v) = arrays_of_rank(SHAPE, comm, 3)
    warm(comm, False)
    waited = []
    wait = Requests.wait

    def counted(requests: Requests) -> None:
        start = time.perf_counter()
        wait(requests)
        waited.append(time.perf_counter() - start)

    Requests.wait = counted  # type: ignore[method-assign]
    whole = timed(comm, lambda: an.mpi.attention(q, k, v, shard=shard, mask=an.Causal(), exchange="ring"))
    return sum(waited) / whole[0]


def model_of_rank(comm: Any, turns: str) -> list[dict[str, float]]:
    """Return link and rate, then for each number of tokens what the ring took and what the model says.

    The ring does for full attention what it does for every other; ranks of one machine copy messages themselves, so a
    transfer adds to the time of a step and is not hidden behind it.
    """
    warm(comm, False)
    other = 1 - comm.rank
    there, back = np.zeros(2**26, np.uint8), np.zeros(2**26, np.uint8)
    link = there.size / min(timed(comm, lambda: comm.Sendrecv(there, other, 0, back, other, 0))[0] for _ in range(5))
    H, D = SHAPE[1], SHAPE[3]

    _, arrays = arrays_of_rank((1, H, 2 * 2048, D), comm, 3, mask=None)
    an.attention(*arrays)
    pairs = H * 2048**2
    rate = 4 * D * pairs / min(timed(comm, lambda: an.attention(*arrays))[0] for _ in range(5))
    rows = [{"link": link, "rate": rate}]
    for tokens in (512, 1024, 2048, 4096, 8192):
        shard, (q, k, v) = arrays_of_rank((1, H, 2 * tokens, D), comm, 3, mask=None)
        call = lambda: an.mpi.attention(q, k, v, shard=shard, exchange="ring")  # noqa: B023, E731
        call()
        seconds = min(timed(comm, call)[0] for _ in range(int(turns)))
        foretold = 2 * 4 * D * H * tokens**2 / rate + (k.nbytes + v.nbytes) / link
        rows.append({"tokens": tokens, "heads": H, "seconds": seconds, "foretold": foretold})
    return rows


def peak_memory(comm: Any) -> tuple[int, int]:
    """Return the peak beyond an idle rank's, and what it is held to, both in bytes."""
    warm(comm, False)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    shard, (q, k, v) = arrays_of_rank(LONG, comm, 3)
    out = an.mpi.attention(q, k, v, shard=shard, mask=an.Causal(), exchange="ring")
    share = q.nbytes + k.nbytes + v.nbytes + out.nbytes
    return _status("VmHWM") - before, share + 2 * (k.nbytes + v.nbytes)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])


MEASURED = {
    "attention": time_ring,
    "process": time_process,
    "waiting": share_waited,
    "memory": peak_memory,
    "model": model_of_rank,
}
PARTS = {part.__name__: part for part in (speed, waiting, memory, balance, model)}


def main() -> None:
    """Take the figures of the parts that the command line names, print them and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default: benchmarks/results)")
    arguments = parser.parse_args()
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()}; known are {', '.join(PARTS)}")
    take(PARTS, arguments, "mpi", {"machine": machine(1, "mpi4py", "mpich")})


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        as_rank(sys.argv[2:])
    else:
        main()

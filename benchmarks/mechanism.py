"""What other normalizers, the additive score and explanations cost, against softmax in the same run, taken in turns.

    python benchmarks/mechanism.py                        every part, one thread
    python benchmarks/mechanism.py explanations --threads 2

Parts: ``normalizers`` (time over that of a softmax), ``additive`` (time for each tanh on each core), ``explanations``
(time over that of the forward call they explain), ``memory`` (what explanations take beside their inputs).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

import attn_numba as an
from attn_numba.workloads import named_dtype
from timing import Row, interleave, process, ratio, run_parts

TOP = 8  # keys


def _arrays(arguments: argparse.Namespace, *shape: int) -> list[np.ndarray]:
    dtype = named_dtype(arguments.dtype)
    return [np.random.default_rng(n).standard_normal(shape, np.float32).astype(dtype) for n in range(3)]


def normalizers(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the time of each normalizer over that of a softmax, 4096 queries and keys of size 64."""
    q, k, v = _arrays(arguments, 1, 2, 4096, 64)
    kinds = {kind.__name__: kind() for kind in (an.Softmax, an.Sparsemax, an.Entmax15, an.DoubleSoftmax)}
    masks: dict[str, dict[str, Any]] = {"": {}, ", causal": {"mask": an.Causal()}}
    calls = {
        f"{name}{note}": partial(an.attention, q, k, v, normalizer=kind, **mask)
        for name, kind in kinds.items()
        for note, mask in masks.items()
    }
    times = interleave(calls, arguments.turns, arguments.seconds)
    for name in kinds:
        for note in masks:
            if name != "Softmax":
                yield f"{name}{note}: time over softmax", ratio(times, f"{name}{note}", f"Softmax{note}"), "times"


def additive(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the time for each tanh on each core, 2048 queries and keys, 64 hidden units."""
    n, hidden = 2048, 64
    q, k, v = _arrays(arguments, 1, 1, n, 64)
    rng = np.random.default_rng(3)
    maps = (rng.standard_normal((hidden, 64)) / 8 for _ in range(2))
    score = an.Additive(*maps, rng.standard_normal(hidden) / 8)
    times = interleave({"additive": partial(an.attention, q, k, v, score=score)}, arguments.turns, arguments.seconds)
    seconds = statistics.median(times["additive"]) * arguments.threads
    yield "Additive, 64 hidden units: each tanh, with all else", 1e9 * seconds / (n * n * hidden), "ns a core"


def explanations(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the time of each explanation over that of the forward call, (1, 8, 16384, 64)."""
    q, k, v = _arrays(arguments, 1, 8, 16384, 64)
    masks: dict[str, dict[str, Any]] = {"": {}, ", causal": {"mask": an.Causal()}}
    for note, mask in masks.items():
        calls = {
            "forward": partial(an.attention, q, k, v, **mask),
            "entropy": partial(an.entropy, q, k, **mask),
            "top_keys": partial(an.top_keys, q, k, TOP, **mask),
            "column_sums": partial(an.column_sums, q, k, **mask),
        }
        times = interleave(calls, min(arguments.turns, 3), arguments.seconds)
        for name in ("entropy", "top_keys", "column_sums"):
            yield f"{name}{note}: time over forward", ratio(times, name, "forward"), "times"


MEMORY = """
import numpy as np
import attn_numba as an

def peak():  # of this process alone: what getrusage tells begins with its parent's
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

q, k, v = (np.random.default_rng(n).standard_normal((1, 8, 16384, 64), dtype=np.float32) for n in range(3))
call = lambda q, k, v: {call}
call(*(x[:, :, :512] for x in (q, k, v)))
before = peak()
result = call(q, k, v)
print((peak() - before) / 2**20)
"""


def memory(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the peak memory of calls of (1, 8, 16384, 64) beyond a small one and the inputs, results included."""
    threads = {"NUMBA_NUM_THREADS": str(arguments.threads)}
    calls = {
        "entropy": "an.entropy(q, k)",
        "top_keys": f"an.top_keys(q, k, {TOP})",
        "column_sums": "an.column_sums(q, k)",
        "Sparsemax": "an.attention(q, k, v, normalizer=an.Sparsemax())",
        "Entmax15": "an.attention(q, k, v, normalizer=an.Entmax15())",
        "DoubleSoftmax": "an.attention(q, k, v, normalizer=an.DoubleSoftmax())",
    }
    for name, call in calls.items():
        found = process(MEMORY.format(call=call), threads)
        yield f"{name} of (1, 8, 16384, 64): beyond the inputs", float(found), "MiB"


if __name__ == "__main__":
    parts = (normalizers, additive, explanations, memory)
    run_parts(__doc__, "mechanism", {part.__name__: part for part in parts})

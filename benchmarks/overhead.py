"""What rules, small calls and starting cost, against the plain case in the same run, taken in turns.

    python benchmarks/overhead.py                        every part, one thread, some minutes
    python benchmarks/overhead.py masks modifiers --threads 2

Parts: ``peak`` (share of the register tile's own rate, and NumPy's matrix products of the same count), ``masks`` (time
per visible pair over that of dense attention of the same lengths), ``modifiers`` (time over that without), ``spans``
(time of adaptive spans over that of full and of causal attention), ``calls`` (the smallest call), ``start`` (new
processes), ``memory`` (a long sequence).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

import attn_numba as an
from attn_numba.workloads import WORKLOADS, Workload, named_dtype
from timing import Row, interleave, process, ratio, run_parts


def peak(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield shares of the tile's own rate for square problems of length 2048."""
    from attn_numba.cpu.peak import peak_rate

    dtype = named_dtype(arguments.dtype)
    for D in (64, 128):
        q, k, v = Workload("square", "", 1, 8, 8, 2048, 2048, D, D, lambda workload: {}).arrays(dtype)
        full, causal = partial(an.attention, q, k, v), partial(an.attention, q, k, v, mask=an.Causal())
        calls: dict[str, Any] = {"full": full, "causal": causal}
        if dtype.itemsize >= 4:
            calls["numpy"] = partial(_two_products, q[0], k[0], v[0])
        peaks = []
        calls["peak"] = lambda peaks=peaks: peaks.append(peak_rate(dtype.name))
        times = interleave(calls, arguments.turns, arguments.seconds)
        rate = statistics.median(peaks) * arguments.threads
        flop = {"full": 4 * D * 8 * 2048**2, "causal": 4 * D * 8 * 2048 * 2049 // 2}
        rates = {name: flop[name] / statistics.median(times[name]) for name in flop}
        for name in flop:
            yield f"D={D} {name}", rates[name] / 1e9, "GFLOP/s"
            yield f"D={D} {name}: share of the tile's rate", rates[name] / rate, "of 1"
        yield f"D={D} causal's rate over full's", rates["causal"] / rates["full"], "times"
        if "numpy" in times:
            yield f"D={D} NumPy's two matrix products over full attention", ratio(times, "numpy", "full"), "times"


def _two_products(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Return (q k^T) v: the multiplications of attention and nothing else."""
    return q @ k.swapaxes(-1, -2) @ v


def masks(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the time per visible pair over that of dense attention of the same lengths."""
    dtype = named_dtype(arguments.dtype)

    def pattern(workload: Workload) -> dict[str, Any]:
        """Return a mask of one's own over half the pairs: alternate stretches of 256 keys, without a tile function."""
        return {"mask": an.CustomMask(lambda b, h, i, j, p: (i // 256 + j // 256) % 2 == 0)}

    def own_window(workload: Workload) -> dict[str, Any]:
        return {"mask": an.CustomMask(lambda b, h, i, j, p: (j <= i) & (i - j <= p[0]), params=(512,))}

    named = [WORKLOADS[name] for name in ("window-16k", "block-sparse", "documents", "padding", "neighborhood")]
    own = [
        Workload("custom mask, stretches", "", 1, 2, 2, 4096, 4096, 64, 64, pattern),
        Workload("custom mask, window", "", 1, 2, 2, 8192, 8192, 64, 64, own_window),
    ]
    for workload in named + own:
        q, k, v = workload.arrays(dtype)
        few = max(1, 2**24 * 4 // (workload.M * workload.N))  # heads of the dense call: enough work, not minutes of it
        dense = [x[:1, :few] for x in (q, k, v)]
        calls = {
            "dense": partial(an.attention, *dense),
            "mask": partial(an.attention, q, k, v, **workload.options()),
        }
        times = interleave(calls, arguments.turns, arguments.seconds)
        pairs = dense[0].shape[1] * workload.M * workload.N
        visible = workload.visible_pairs
        share = visible / (workload.B * workload.H * workload.M * workload.N)
        what = f"{workload.name} (visible {100 * share:.1f} %): time per pair over dense"
        yield what, ratio(times, "mask", "dense") * pairs / visible, "times"


def modifiers(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the time with a modifier over that without, at a head size of 64."""
    dtype = named_dtype(arguments.dtype)
    q, k, v = WORKLOADS["dense-2048"].arrays(dtype)
    H, M = q.shape[1:3]
    random = np.random.default_rng(1)
    tried = {
        "SoftCap(30)": an.SoftCap(30.0),
        "ALiBi": an.ALiBi(2.0 ** -np.arange(1, H + 1)),
        "Bias (M,N)": an.Bias(random.standard_normal((M, M), dtype=np.float32)),
        "Bias (H,M,N)": an.Bias(random.standard_normal((H, M, M), dtype=np.float32)),
    }
    calls = {"plain": partial(an.attention, q, k, v)}
    calls |= {name: partial(an.attention, q, k, v, modifiers=modifier) for name, modifier in tried.items()}
    times = interleave(calls, arguments.turns, arguments.seconds)
    for name in tried:
        yield f"{name}: time over plain", ratio(times, name, "plain"), "times"


def spans(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the time of adaptive spans, a tenth of the keys on average, over that of full attention."""
    dtype = named_dtype(arguments.dtype)
    workload = WORKLOADS["adaptive-span"]
    q, k, v = workload.arrays(dtype)
    by_query = workload.options()["modifiers"]
    tried = {"one span": an.AdaptiveSpan(workload.N / 10, by_query.ramp), "spans by query": by_query}
    kinds: dict[str, dict[str, Any]] = {"both sides": {}, "causal": {"mask": an.Causal()}}
    options = {f"{name}, {kind}": {**kinds[kind], "modifiers": x} for name, x in tried.items() for kind in kinds}
    calls = {name: partial(an.attention, q, k, v, **rules) for name, rules in (kinds | options).items()}
    times = interleave(calls, arguments.turns, arguments.seconds)
    for name, rules in options.items():
        visible = replace(workload, name=name, rules=lambda workload, rules=rules: rules).visible_pairs
        share = visible / (workload.H * workload.M * workload.N)
        what = f"{name} (visible {100 * share:.1f} %)"
        yield f"{what}: time over full", ratio(times, name, "both sides"), "times"
        if name.endswith("causal"):
            yield f"{what}: time over causal", ratio(times, name, "causal"), "times"
        yield f"{what}: time per pair over dense", ratio(times, name, "both sides") / share, "times"


def calls(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the time of the smallest calls."""
    dtype = named_dtype(arguments.dtype)
    x = np.ones((1, 1, 8, 8), dtype)
    tried = {
        "(1,1,8,8)": partial(an.attention, x, x, x),
        "(1,1,8,8) causal": partial(an.attention, x, x, x, mask=an.Causal()),
        "(1,1,8,8) into out": partial(an.attention, x, x, x, out=np.empty_like(x)),
    }
    times = interleave(tried, arguments.turns, arguments.seconds)
    for name in tried:
        yield f"{name}: one call", 1e6 * statistics.median(times[name]), "microseconds"


START = "import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
FIRST_CALL = "import numpy as np, attn_numba as an; x = np.ones((1, 1, 8, 8), np.float32); an.attention(x, x, x)"


def start(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the seconds a new process needs, by its own clock."""
    process(START.format(code=FIRST_CALL))  # fills the disk cache
    codes = {"import numpy": "import numpy", "import attn_numba": "import attn_numba", "warm": FIRST_CALL}
    tried = {name: [] for name in codes}
    for _ in range(2 * arguments.turns + 1):
        for name, code in codes.items():
            tried[name].append(float(process(START.format(code=code))))
    numpy, package, warm = (statistics.median(seconds) for seconds in tried.values())
    yield "import attn_numba over import numpy", package / numpy, "times"
    yield "import and first call, warm disk cache", warm, "seconds"
    with tempfile.TemporaryDirectory() as folder:
        cold = float(process(START.format(code=FIRST_CALL), {"NUMBA_CACHE_DIR": folder}))
    yield "import and first call, nothing compiled", cold, "seconds"


MEMORY = """
import numpy as np
import attn_numba as an

def peak():  # of this process alone: what getrusage tells begins with its parent's
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

q, k, v = (np.random.default_rng(n).standard_normal((1, 1, 65536, 64), dtype=np.float32) for n in range(3))
an.attention(q[:, :, :512], k[:, :, :512], v[:, :, :512], mask=an.Causal())
before = peak()
out = an.attention(q, k, v, mask=an.Causal())
print((peak() - before - out.nbytes) / 2**20)
"""


def memory(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the peak memory of one long causal head beyond a small call, the inputs and the output."""
    threads = {"NUMBA_NUM_THREADS": str(arguments.threads)}
    yield "65536 x 65536 x 64 causal: beyond inputs and output", float(process(MEMORY, threads)), "MiB"


if __name__ == "__main__":
    parts = (peak, masks, modifiers, spans, calls, start, memory)
    run_parts(__doc__, "overhead", {part.__name__: part for part in parts})

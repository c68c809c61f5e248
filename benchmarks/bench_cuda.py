"""The forward pass on a CUDA card, in turns with torch's own attention and its matrix product, timed by events.

    python benchmarks/bench_cuda.py                      every size, dtype and rule: some minutes
    python benchmarks/bench_cuda.py --quick              a few of each: three minutes
    python benchmarks/bench_cuda.py forward --limit 60   one part, for 60 seconds

Parts: ``bandwidth`` (a copy), ``forward`` (512 to 16384 tokens in batches of 16384, width 2048, as FlashAttention's own
benchmark), ``latency`` (a launch of next to no work), ``rules`` (masks and modifiers against none). A result is held to
the float64 reference in some rows and to torch's in all elements before it is timed: red means no number. Results go to
``benchmarks/results/`` as JSON, row by row.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest

import attn_numba as an
from attn_numba.comparison import Agreement, agreement, check_workload, rounding_dtype
from attn_numba.reference import attention as reference_attention
from attn_numba.workloads import Workload, named_dtype
from card import CLOSE, Card, Measured, Run, relative_error
from launches import Without, recorded
from report import card_tables
from timing import RESULTS, ratio

TOKENS, WIDTH = 16384, 2048  # of a batch; heads times head size
LENGTHS, HEAD_SIZES, DTYPES = (512, 1024, 2048, 4096, 8192, 16384), (64, 128, 256), ("bfloat16", "float16", "float32")
PRODUCT = 8192  # sizes of the matrix product that stands for what the card can attain
SAMPLED = 64  # rows of two heads that are held to the reference
PEERS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
SETS = 8  # of inputs at most that calls take turns with, so that they do not find them in the cache


class Shape(NamedTuple):
    """One size of the forward pass."""

    dtype: str
    N: int
    D: int
    causal: bool
    B: int
    H: int

    @property
    def label(self) -> str:
        """What it is called in tables."""
        return f"{self.dtype} B{self.B} H{self.H} N{self.N} D{self.D} {'causal' if self.causal else 'full'}"

    @property
    def flop(self) -> int:
        """Operations of the two products, half of them for causal attention."""
        return 4 * self.B * self.H * self.N**2 * self.D // (2 if self.causal else 1)


# --- what is compared ---


def shapes(lengths: tuple[int, ...], head_sizes: tuple[int, ...], dtypes: tuple[str, ...]) -> Iterator[Shape]:
    for N in lengths:
        for D in head_sizes:
            for dtype in dtypes:
                for causal in (False, True):
                    yield Shape(dtype, N, D, causal, max(1, TOKENS // N), max(1, WIDTH // D))


def ordered(quick: bool) -> list[Shape]:
    """Return the shapes, those first that say most."""
    first = [
        *shapes((8192,), (128,), ("bfloat16",)), *shapes((8192,), (64,), ("bfloat16",)),
        *shapes((2048,), (128,), ("bfloat16", "float32")), *shapes((8192,), (128,), ("float16",)),
        *shapes((8192,), (256,), ("bfloat16",)), *shapes((2048,), (64,), ("float32",)),
        *shapes((512, 16384), (128,), ("bfloat16",)),
    ]  # fmt: skip
    rest = shapes((8192, 2048, 512, 16384, 4096, 1024), (128, 64, 256), DTYPES)
    return first if quick else list(dict.fromkeys([*first, *rest]))


def inputs(card: Card, shape: Shape) -> list[tuple[Any, Any, Any]]:
    """Return sets of q, k and v: as many as the card's cache does not hold together."""
    size = 3 * shape.B * shape.H * shape.N * shape.D * named_dtype(shape.dtype).itemsize
    count = min(SETS, max(1, math.ceil(2 * card.cache / size)))
    one = (shape.B, shape.H, shape.N, shape.D)
    return [tuple(card.random(*one, dtype=shape.dtype) for _ in "qkv") for _ in range(count)]


def ours(card: Card, sets: list[Any], options: Mapping[str, Any], *left_out: str) -> Run:
    """Return our calls, with some kernels left out on purpose."""
    without = Without(*left_out)

    def run(count: int) -> Any:
        with without, card.torch.inference_mode():
            for n in range(count):
                result = an.attention(*sets[n % len(sets)], backend=card.backend, **options)
        return result

    return run


def theirs(card: Card, sets: list[Any], name: str, causal: bool) -> Run:
    """Return torch's calls by one of its backends."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    attention, backend = card.torch.nn.functional.scaled_dot_product_attention, getattr(SDPBackend, PEERS[name])

    def run(count: int) -> Any:
        with sdpa_kernel(backend), card.torch.inference_mode():
            for n in range(count):
                result = attention(*sets[n % len(sets)], is_causal=causal)
        return result

    return run


def product(card: Card, dtype: str, size: int) -> Run:
    """Return torch's matrix product: what the card attains in a dtype, in the same turns."""
    a, b = (card.random(size, size, dtype=dtype) for _ in "ab")

    def run(count: int) -> Any:
        for _ in range(count):
            result = a @ b
        return result

    return run


class Truth(NamedTuple):
    """Some rows of one head as the reference has them: in float64, and computed in the dtype of the call."""

    b: int
    h: int
    rows: Any  # on the device
    exact: np.ndarray
    rounded: np.ndarray


def truth(card: Card, shape: Shape, arrays: tuple[Any, Any, Any]) -> list[Truth]:
    """Return what some rows of the first and the last head are to be."""
    rows = np.unique(np.linspace(0, shape.N - 1, SAMPLED).astype(np.int64))
    mask = rows[:, None] >= np.arange(shape.N) if shape.causal else None
    index = card.torch.from_numpy(rows).to(arrays[0].device)
    found = []
    for b, h in sorted({(0, 0), (shape.B - 1, shape.H - 1)}):
        q, k, v = (card.host(x) for x in (arrays[0][b, h, index], arrays[1][b, h], arrays[2][b, h]))
        exact = reference_attention(*(x.astype(np.float64) for x in (q, k, v)), mask=mask)
        rounded = reference_attention(q, k, v, mask=mask, compute_dtype=rounding_dtype(q.dtype))
        found.append(Truth(b, h, index, exact, rounded))
    return found


def truth_of_last(card: Card, arrays: tuple[Any, Any, Any], options: dict[str, Any], first: int) -> list[Truth]:
    """Return what the rows of the first head from `first` on are to be by some rules."""
    q, k, v = (card.host(x[0, 0]) for x in arrays)
    options = options | {"query_offset": first}
    exact = reference_attention(q[first:].astype(np.float64), k.astype(np.float64), v.astype(np.float64), **options)
    rounded = reference_attention(q[first:], k, v, compute_dtype=rounding_dtype(q.dtype), **options)
    return [Truth(0, 0, slice(first, None), exact, rounded)]


def held(card: Card, known: list[Truth], result: Any) -> Agreement:
    """Return how far a result is from what is known of it, where that is worst; too far also by its relative error."""
    found = []
    for x in known:
        mine = card.host(result[x.b, x.h, x.rows])
        near = relative_error(mine, x.exact) <= CLOSE[mine.dtype.name]
        by_element = agreement(mine, x.exact, x.rounded)
        found.append(by_element if near else by_element._replace(tolerance=0.0))
    return max(found, key=lambda x: (not x.passed, x.difference))


def off_by(found: Agreement) -> str:
    """Say how wrong a result is."""
    if found.tolerance == 0:
        return f"its relative error is too large; elements are off by up to {found.difference:.2e}"
    return f"off by {found.difference:.2e}, {found.tolerance:.2e} is allowed"


# --- the parts ---


def bandwidth(measured: Measured, quick: bool) -> None:
    """Measure a copy: bytes read and written over time."""
    card = measured.card
    size = 2**31 if card.device == "cuda" else 2**20
    source, target = (card.torch.ones(size // 4, device=card.device) for _ in range(2))
    times = measured.interleave({"copy": lambda count: [target.copy_(source) for _ in range(count)]})
    measured.figure(
        "bandwidth", "copy, bytes read and written", 2 * size / statistics.median(times["copy"]) / 1e9, "GB/s"
    )


def forward(measured: Measured, quick: bool, chosen: list[Shape] | None = None) -> None:
    """Measure attention of all sizes."""
    wanted = ordered(quick) if chosen is None else chosen
    for shape in wanted:
        if measured.in_time(shape.label):
            try:
                row = forward_row(measured, shape)
            except Exception as error:  # one size that breaks loses nothing of the others
                measured.wrong(shape.label, f"{type(error).__name__}: {error}")
                continue
            if row is not None:
                measured.rows.append(row)
                measured.save()
                rates = (f"{name} {rate:.3g}" for name, rate in row["tflops"].items())
                print(f"{shape.label} ({row['kernel']}): {', '.join(rates)} TFLOP/s", flush=True)


def forward_row(measured: Measured, shape: Shape) -> dict[str, Any] | None:
    """Return what is found of one size; None, with the reason kept, if our result is wrong."""
    card, sets = measured.card, inputs(measured.card, shape)
    options = {"mask": an.Causal()} if shape.causal else {}
    runs: dict[str, Run] = {"ours": ours(card, sets, options)}
    kernel = card.backend
    if card.device == "cuda":
        with recorded() as started:
            runs["ours"](1)
        kernel = "+".join(dict.fromkeys(started)) or "unknown"
    if kernel == "wgmma":
        runs["ours, mma"] = ours(card, sets, options, "wgmma")
    known, missing, errors, results = truth(card, shape, sets[0]), {}, {}, {}
    relative: dict[str, float] = {}
    for name in list(runs):
        result = card.tensor(runs[name](1))
        found = held(card, known, result)
        if not found.passed:
            measured.wrong(f"{shape.label}, {name}", off_by(found))
            if name == "ours":
                return None
            del runs[name]
            continue
        errors[name], results[name], tolerance = found.difference, result, found.tolerance
    for name in PEERS:
        try:
            run = theirs(card, sets, name, shape.causal)
            result = run(1)
            errors[name] = held(card, known, result).difference
            relative[name] = max(relative_error(card.host(result[x.b, x.h, x.rows]), x.exact) for x in known)
            card.synchronize()
        except Exception as error:  # torch says in many ways that a backend does not serve a call
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[:200]
            continue
        runs[name] = run
        for mine in list(results):
            difference = results[mine].float() - result.float()
            worst, near = float(difference.abs().max()), float(difference.norm() / result.float().norm())
            if not (worst <= 4 * tolerance + errors[name] and near <= 2 * CLOSE[shape.dtype] + relative[name]):
                measured.wrong(
                    f"{shape.label}, {mine}", f"differs from torch's {name} by {worst:.2e}, {near:.2e} of all"
                )
                if mine == "ours":
                    return None
                del runs[mine], results[mine]
    results.clear()
    size = PRODUCT if card.device == "cuda" else 256
    times = measured.interleave(runs | {"product": product(card, shape.dtype, size)})
    flop = dict.fromkeys(runs, shape.flop) | {"product": 2 * size**3}
    middle = {name: statistics.median(found) for name, found in times.items()}
    return {
        **shape._asdict(),
        "label": shape.label,
        "kernel": kernel,
        "flop": shape.flop,
        "ours_ms": 1e3 * middle["ours"],
        "ms": {name: 1e3 * seconds for name, seconds in middle.items()},
        "tflops": {name: flop[name] / seconds / 1e12 for name, seconds in middle.items()},
        "ratio": {name: ratio(times, name, "ours") for name in runs if name != "ours"},
        "spread": {name: max(found) / min(found) for name, found in times.items()},
        "error": errors,
        "tolerance": tolerance,
        "not_served": missing,
        "sets": len(sets),
    }


def kinds(parts: list[str], quick: bool) -> list[tuple[str, int, str, tuple[str, ...]]]:
    """Return dtype, head size, rules and kernels left out of all that is measured: each is a kernel of its own."""
    found = []
    if "latency" in parts:
        found += [(dtype, 64, name, ()) for dtype in ("bfloat16", "float32") for name in ("none", "Causal")]
    if "forward" in parts:
        for shape in ordered(quick):
            for left_out in ((), ("wgmma",)) if shape.dtype != "float32" else ((),):
                found.append((shape.dtype, shape.D, "Causal" if shape.causal else "none", left_out))
    if "rules" in parts:
        found += [("bfloat16", 128, name, ()) for name in ("none", *tried())]
    return list(dict.fromkeys(found))


def compiled_ahead(jobs: list[tuple[str, int, str, tuple[str, ...]]], seconds: float) -> None:
    """Compile kernels in as many processes as there are cores, for the cache on disk."""
    workers = max(1, min(len(jobs), 12, (os.cpu_count() or 2) - 1))
    start = time.monotonic()
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    futures = [pool.submit(first_call, *job) for job in jobs]
    done, late = wait(futures, timeout=seconds)
    failed = [str(future.exception()) for future in done if future.exception()]
    if late:
        for process in list(pool._processes.values()):  # or the end of this program waits for them
            process.kill()
    pool.shutdown(wait=not late, cancel_futures=True)
    ready = len(done) - len(failed)
    print(f"{ready} of {len(jobs)} kernels are ready after {time.monotonic() - start:.0f} s", flush=True)
    for problem in sorted(set(failed)):
        print(f"  {problem[:300]}", flush=True)


def first_call(dtype: str, D: int, name: str, left_out: tuple[str, ...]) -> None:
    """Make the smallest call that needs a kernel."""
    x = np.ones((1, 1, 16, D), named_dtype(dtype))
    options = {} if name == "none" else tried()[name](1, 16, 16)
    with Without(*left_out):
        an.attention(x, x, x, backend="cuda", **options)


def latency(measured: Measured, quick: bool) -> None:
    """Measure a call of next to no work: until it returns, and from one to the next on the card."""
    card = measured.card
    for dtype, H, N in (("bfloat16", 8, 128), ("float32", 8, 128)) if card.device == "cuda" else (("float32", 1, 16),):
        shape = Shape(dtype, N, 64, False, 1, H)
        sets = [tuple(card.random(1, H, N, 64, dtype=dtype) for _ in "qkv")]
        out = card.torch.empty_like(sets[0][0]) if card.device == "cuda" else None
        runs = {"ours": ours(card, sets, {})}
        runs |= {"ours, causal": ours(card, sets, {"mask": an.Causal()})}
        if out is not None:
            runs["ours, out given"] = ours(card, sets, {"out": out})
        found = held(card, truth(card, shape, sets[0]), card.tensor(runs["ours"](1)))
        if not found.passed:
            measured.wrong(f"latency {shape.label}", off_by(found))
            continue
        for name in ("flash", "efficient"):
            with contextlib.suppress(Exception):  # what torch does not serve is not compared
                theirs(card, sets, name, False)(1)
                runs[f"torch, {name}"] = theirs(card, sets, name, False)
        times = measured.interleave(runs)
        for name, run in runs.items():
            issued = []
            for _ in range(measured.turns):
                run(10)
                card.synchronize()
                start = time.perf_counter()
                run(100)
                issued.append((time.perf_counter() - start) / 100)
                card.synchronize()
            measured.figure("latency", f"{dtype}, {name}: until a call returns", 1e6 * statistics.median(issued), "us")
            found_us = 1e6 * statistics.median(times[name])
            measured.figure("latency", f"{dtype}, {name}: from call to call on the card", found_us, "us")


def tried() -> dict[str, Callable[[int, int, int], dict[str, Any]]]:
    """Return rules by name: functions of the number of heads, of the length, and of how many of the last queries."""

    def documents(H: int, N: int, M: int) -> dict[str, Any]:
        ids = np.arange(N, dtype=np.int32) * 16 // N
        return {"mask": an.Causal() & an.SameDocument(ids[N - M :], ids)}

    def own(H: int, N: int, M: int) -> dict[str, Any]:
        return {"mask": an.CustomMask(lambda b, h, i, j, p: (j <= i) & (i - j <= p[0]), params=(N // 8,))}

    def slopes(H: int) -> an.ALiBi:
        return an.ALiBi(2.0 ** -np.arange(1, H + 1))

    return {
        "Causal": lambda H, N, M: {"mask": an.Causal()},
        "SlidingWindow, an eighth": lambda H, N, M: {"mask": an.SlidingWindow(N // 8, 0)},
        "16 documents, causal": documents,
        "CustomMask, the same window": own,
        "ALiBi": lambda H, N, M: {"modifiers": slopes(H)},
        "SoftCap": lambda H, N, M: {"modifiers": an.SoftCap(30.0)},
        "Causal, ALiBi, SoftCap": lambda H, N, M: {"mask": an.Causal(), "modifiers": [slopes(H), an.SoftCap(30.0)]},
    }


def rules(measured: Measured, quick: bool) -> None:
    """Measure what masks and modifiers cost: time over that of none, and for masks time per visible pair over it."""
    card = measured.card
    on_card = card.device == "cuda"
    B, N, D = (2, 8192, 128) if on_card else (1, 96, 16)
    H = WIDTH // D if on_card else 2
    for dtype in ("bfloat16", "float32") if on_card and not quick else ("bfloat16",) if on_card else ("float32",):
        if dtype == "float32" and on_card:
            B = 1
        sets = inputs(card, Shape(dtype, N, D, False, B, H))
        plain = ours(card, sets, {})
        for name, options in tried().items():
            what = f"{dtype} D{D} N{N}, {name}"
            if not measured.in_time(what, 15):
                continue
            try:
                run = ours(card, sets, options(H, N, N))
                result = card.tensor(run(1))
                one = [card.host(x[:1, :1]) for x in sets[0]]
                alone = Workload(name, "", 1, 1, 1, N, N, D, D, lambda w, options=options: options(1, N, N))
                found = check_workload(alone, tuple(one), card.host(result[:1, :1]))
                if found.passed:
                    found = held(card, truth_of_last(card, sets[0], options(1, N, SAMPLED), N - SAMPLED), result)
                if not found.passed:
                    measured.wrong(what, off_by(found))
                    continue
                times = measured.interleave({"plain": plain, name: run})
            except Exception as error:  # one rule that breaks loses nothing of the others
                measured.wrong(what, f"{type(error).__name__}: {error}")
                continue
            over = ratio(times, name, "plain")
            measured.figure("rules", f"{what}: time over none", over, "times")
            share = alone.visible_pairs / N**2
            if share < 1:
                measured.figure("rules", f"{what}: time per visible pair over none", over / share, "times")


PARTS = {"bandwidth": bandwidth, "forward": forward, "latency": latency, "rules": rules}
ORDER = ("bandwidth", "latency", "forward", "rules")


def main(words: list[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--turns", type=int, default=0, help="default: 5, quick 3")
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="timed per turn and call (default: 0.03, quick 0.02)"
    )
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds after which nothing new is begun")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where results go (default: benchmarks/results)")
    arguments = parser.parse_args(words)
    arguments.turns = arguments.turns or (3 if arguments.quick else 5)
    arguments.seconds = arguments.seconds or (0.02 if arguments.quick else 0.03)
    if unknown := set(arguments.parts) - set(PARTS):
        parser.error(f"unknown part {unknown.pop()}; known are {', '.join(PARTS)}")
    reason = unavailable()
    if reason:
        print(f"nothing is measured: {reason}")
        return 2
    chosen = arguments.parts or list(PARTS)
    if jobs := kinds(chosen, arguments.quick):
        compiled_ahead(jobs, max(10.0, min(150.0, arguments.limit / 2)))
    arguments.limit -= time.monotonic() - start
    measured = Measured(Card("cuda"), arguments)
    for name in ORDER:
        if name in chosen and measured.in_time(name):
            try:
                PARTS[name](measured, arguments.quick)
            except Exception as error:  # one part that breaks loses nothing of the others
                measured.wrong(name, f"{type(error).__name__}: {error}")
    path = measured.save()
    print(f"\n{path}\n\n{card_tables(path)}")
    return 1 if measured.red else 0


def unavailable() -> str:
    """Return why nothing can be measured here; an empty text where it can."""
    available, reason = an.backends()["cuda"]
    if not available:
        return f"backend 'cuda' cannot run: {reason}"
    if find_spec("torch") is None:
        return "torch, which makes the arrays and is measured against, is not installed"
    import torch

    return "" if torch.cuda.is_available() else "torch does not see the card"


# --- whether it runs ---


@pytest.mark.smoke
def bench_smoke(tmp_path: Path) -> None:
    """Every part on tiny sizes: on the card, or without one with the CPU kernels and torch on the CPU in its place."""
    torch = pytest.importorskip("torch", reason="torch makes the arrays and is measured against")
    device = "cuda" if not unavailable() else "cpu"
    settings = SimpleNamespace(turns=2, seconds=1e-3, limit=600.0, folder=tmp_path)
    measured = Measured(Card(device), settings)  # type: ignore[arg-type]
    torch.manual_seed(0)
    small = [Shape("float32", 96, 32, causal, 2, 2) for causal in (False, True)]
    for part in (bandwidth, latency, partial(forward, chosen=small), rules):
        part(measured, True)
    assert not measured.red
    assert not measured.left_out
    assert [row["causal"] for row in measured.rows] == [False, True]
    assert all("flash" in row["ms"] or row["not_served"] for row in measured.rows)
    assert {figure["part"] for figure in measured.figures} == {"bandwidth", "latency", "rules"}
    assert "96" in card_tables(measured.save())


if __name__ == "__main__":
    sys.exit(main())

"""Decode against the speed of memory and against PyTorch: one new token for each sequence of a long cache.

    python benchmarks/decode.py                          every part, one thread, some minutes
    python benchmarks/decode.py bandwidth torch --threads 2

Parts: ``bandwidth`` (bytes of keys and values read per second over those of a plain sum over the same bytes, in the
same run with the same threads; tokens per second of compressed caches over those of float32), ``shared`` (time of
sequences that are copies over that of sequences that share their beginning), ``torch`` (time of PyTorch's
scaled_dot_product_attention over ours; other copies of the same sizes), ``calls`` (the smallest call).
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numba
import numpy as np

import attn_numba as an
from timing import Row, interleave, ratio, run_parts

D = 128
SHAPES = ((32, 4096), (8, 32768))  # key heads, keys
BATCHES = (1, 8)
PIECE = 256  # tokens that are written at a time


def filled(code: str, sequences: int, heads: int, length: int, page: int) -> an.PagedKVCache:
    """Return a cache with random numbers in every place."""
    cache = an.PagedKVCache(sequences, heads, D, dtype=code, capacity=length, page=page)
    k, v = np.random.default_rng(0).standard_normal((2, sequences, heads, PIECE, D), np.float32)
    for _ in range(length // PIECE):
        cache.append(k, v)
    return cache


def memory_of(cache: an.PagedKVCache) -> list[np.ndarray]:
    """Return the bytes of its keys and of its values, one after the other."""
    [segment] = cache._pool._segments
    return [part.reshape(-1).view(np.uint8) for part in segment.values()]


@numba.njit(nogil=True, fastmath=True)
def total(numbers: np.ndarray) -> float:
    """Sum in whatever order is fastest."""
    found = np.float32(0)
    for n in range(numbers.size):
        found += numbers[n]
    return found


def reader(memory: list[np.ndarray], threads: int) -> Any:
    """Return a call that reads all bytes once with so many threads."""
    shares = zip(*(np.array_split(part.view(np.float32), threads) for part in memory), strict=True)
    pool, parts = ThreadPoolExecutor(threads), list(shares)
    return lambda: list(pool.map(lambda share: [total(part) for part in share], parts))


def queries(sequences: int, heads: int, dtype: str = "float32") -> np.ndarray:
    return np.random.default_rng(0).standard_normal((sequences, heads, 1, D)).astype(dtype)


def bandwidth(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield shares of the read bandwidth, and tokens per second over those of float32."""
    for B in BATCHES:
        for heads, length in SHAPES:
            plain = partial(an.decode, queries(B, heads), filled("float32", B, heads, length, length))
            for code, served, page in (
                ("float32", 1, length), ("float32", 1, 64), ("float32", 4, length), ("bfloat16", 1, length),
                ("int8", 1, length), ("int8", 1, 64), ("int4", 1, length),
            ):  # fmt: skip
                cache = filled(code, B, heads, length, page)
                calls = {
                    "ours": partial(an.decode, queries(B, heads * served), cache),
                    "sum": reader(memory_of(cache), arguments.threads),
                    "float32": plain,
                }
                times = interleave(calls, arguments.turns, arguments.seconds)
                name = f"{B} x {heads} heads x {length}, {code}, {served} to a key head, "
                name += f"pages of {page}" if page < length else "contiguous"
                yield f"{name}: share of read bandwidth", ratio(times, "sum", "ours"), "of 1"
                yield f"{name}: keys and values", cache.nbytes / statistics.median(times["ours"]) / 1e9, "GB/s"
                if code != "float32":
                    yield f"{name}: tokens per second over float32", ratio(times, "float32", "ours"), "times"
                del cache, calls


def shared(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield what it saves that 8 sequences share a beginning of 8192 tokens and differ in the last 100."""
    rng, heads, length, own = np.random.default_rng(0), 8, 8192, 100
    k, v = rng.standard_normal((2, 1, heads, length, D), np.float32)
    ends = rng.standard_normal((2, 8, heads, own, D), np.float32)
    for code in ("float32", "bfloat16", "int8"):
        together, apart = an.PagedKVCache(1, heads, D, dtype=code), an.PagedKVCache(8, heads, D, dtype=code)
        together.append(k, v)
        for _ in range(7):
            together.fork(0)
        for b in range(8):
            apart.append(k, v, sequences=[b])
        for cache in (together, apart):
            cache.append(*ends)
        for served in (1, 4):
            q = queries(8, heads * served)
            calls = {"shared": partial(an.decode, q, together), "apart": partial(an.decode, q, apart)}
            times = interleave(calls, arguments.turns, arguments.seconds)
            yield f"{code}, {served} to a key head: copies over shared", ratio(times, "apart", "shared"), "times"


def peer(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the time of PyTorch's attention over ours."""
    import torch

    torch.set_num_threads(arguments.threads)
    for B in BATCHES:
        for heads, length in SHAPES:
            for code in ("float32", "bfloat16"):
                cache = filled(code, B, heads, length, length)
                q = queries(B, heads)
                k, v = (
                    torch.from_numpy(x).view(getattr(torch, code)).reshape(B, heads, length, D)
                    for x in memory_of(cache)
                )
                attend = torch.nn.functional.scaled_dot_product_attention
                calls = {
                    "ours": partial(an.decode, q, cache),
                    "torch": partial(attend, torch.from_numpy(q).to(k.dtype), k, v),
                }
                with torch.inference_mode():
                    times = interleave(calls, arguments.turns, arguments.seconds)
                yield f"{B} x {heads} heads x {length}, {code}: torch over ours", ratio(times, "torch", "ours"), "times"


def calls(arguments: argparse.Namespace) -> Iterator[Row]:
    """Yield the time of the smallest call."""
    times = interleave(
        {"small": partial(an.decode, queries(1, 1), filled("float32", 1, 1, PIECE, PIECE))},
        arguments.turns,
        arguments.seconds,
    )
    yield f"1 head x {PIECE} keys", 1e6 * statistics.median(times["small"]), "us"


if __name__ == "__main__":
    run_parts(__doc__, "decode", {"bandwidth": bandwidth, "shared": shared, "torch": peer, "calls": calls})

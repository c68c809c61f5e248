"""Random calls: small, of every rule and dtype, some with keys for several tiles.

A normal run takes a few hundred; the environment variable ``ATTN_NUMBA_CASES=10000`` takes that many.
"""

import os
from typing import Any

import numpy as np

import attn_numba as an
from attn_numba.rules import Sizes
from cases import documents

COUNT = int(os.environ.get("ATTN_NUMBA_CASES", "400"))
BATCH = 25  # calls in one test
BATCHES = -(-COUNT // BATCH)
DTYPES = ["float32", "float64", "float16"]

try:
    import ml_dtypes

    DTYPES.append(ml_dtypes.bfloat16)
except ImportError:  # then bfloat16 is left out, visibly in the tests that ask for it by name
    pass


def seeds(batch: int) -> range:
    """Return the seeds of a batch."""
    return range(batch * BATCH, min((batch + 1) * BATCH, COUNT))


def random_call(seed: int) -> tuple[np.random.Generator, str, Sizes, list[np.ndarray], dict[str, Any]]:
    """Return a generator for more, a label, the sizes, q, k, v and the other arguments."""
    rng = np.random.default_rng(seed)
    z, make = random_sizes(rng), RULES[rng.integers(len(RULES))]
    dtype = np.dtype(DTYPES[rng.integers(len(DTYPES))])
    kwargs = make(rng, z)
    shapes = (z.B, z.H, z.M, z.D), (z.B, z.Hk, z.N, z.D), (z.B, z.Hk, z.N, z.E)
    return (
        rng,
        f"seed {seed}: {make.__name__}, {dtype.name}, {z}",
        z,
        [random_array(rng, x, dtype) for x in shapes],
        kwargs,
    )


def no_mask(rng, z):
    return {}


def causal(rng, z):
    return {"mask": an.Causal(), **offsets(rng, z)}


def window(rng, z):
    return {"mask": an.SlidingWindow(int(rng.integers(-1, 20)), int(rng.integers(-1, 20))), **offsets(rng, z)}


def padding(rng, z):
    return {"mask": an.Padding(rng.integers(0, z.N + 1, z.B), rng.integers(0, z.N // 2 + 1, z.B))}


def dense(rng, z, axes="BHMN"):
    return {"mask": an.Dense(rng.random([getattr(z, a) if a in axes else 1 for a in "BHMN"]) < rng.random())}


def some_keys(rng, z):
    return dense(rng, z, "BN")


def bias(rng, z, axes="BHMN"):
    array = rng.standard_normal([getattr(z, a) if a in axes else 1 for a in "BHMN"]).astype(np.float32)
    array[rng.random(array.shape) < rng.random()] = -np.inf
    return {"modifiers": an.Bias(array)}


def capped_bias(rng, z):
    return {"modifiers": [bias(rng, z, "BN")["modifiers"], an.SoftCap(float(rng.uniform(0.5, 20)))]}


def causal_and_keys(rng, z):
    return {"mask": an.Causal() & some_keys(rng, z)["mask"], **offsets(rng, z)}


def joined(rng, z):
    ids = an.SameDocument(documents(3, z.M), documents(3, z.N))
    return {"mask": (ids | ~an.SlidingWindow(12, 40)) & padding(rng, z)["mask"], **offsets(rng, z)}


def blocks(rng, z):
    shape = (z.B, z.H, -(-z.M // 8), -(-z.N // 16))
    return {"mask": an.BlockSparse(rng.random(shape) < 0.4, (8, 16))}


def custom(rng, z):
    table = rng.integers(0, 6, (z.B, z.N))
    mask = an.CustomMask(lambda b, h, i, j, p: (p[0][b, j] < 3) & (i >= p[1]), (table, int(rng.integers(-5, 5))))
    return {"mask": mask, "query_offset": 0}


def replaced(rng, z):
    return {**some_keys(rng, z), "modifiers": an.ReplaceExcluded(an.Padding(int(rng.integers(0, z.N + 1))), 0.5)}


def dropped(rng, z):
    return {**dense(rng, z), "dropout": an.Dropout(0.4, int(rng.integers(2**60))), **offsets(rng, z)}


def spans(rng, z):
    ramp = float(rng.uniform(0.1, 30))
    shape = [n if rng.random() < 0.5 else 1 for n in (z.B, z.H, z.M)]
    return {"modifiers": an.AdaptiveSpan(rng.uniform(-1.2 * ramp, z.N / 3, shape), ramp), **offsets(rng, z)}


def capped_spans(rng, z):
    rules = spans(rng, z)
    return {**rules, "mask": some_keys(rng, z)["mask"], "modifiers": [rules["modifiers"], an.SoftCap(4.0)]}


def with_sink(rng, z):
    return {**dense(rng, z), "normalizer": an.Softmax(rng.standard_normal(z.H))}


def normalized(rng, z):
    kind = (an.Sparsemax, an.Entmax15, an.DoubleSoftmax)[rng.integers(3)]
    return {**(causal, dense, some_keys)[rng.integers(3)](rng, z), "normalizer": kind()}


def added(rng, z):
    wq, wk = (rng.standard_normal((9, z.D)) / np.sqrt(z.D) for _ in range(2))
    return {**normalized(rng, z), "score": an.Additive(wq, wk, rng.standard_normal(9) / 3)}


RULES = (
    no_mask, causal, window, padding, dense, some_keys, bias, capped_bias, causal_and_keys, joined, blocks, custom,
    replaced, dropped, with_sink, normalized, added, spans, capped_spans,
)  # fmt: skip


def offsets(rng, z):
    key_offset = int(rng.integers(-9, 10))
    return {"query_offset": key_offset + rng.integers(-5, z.N + 1, z.B), "key_offset": key_offset}


def random_sizes(rng):
    """Small calls; in one of eight the keys take several tiles: there are many of them, or the head size is large."""
    several_tiles = rng.random() < 0.125
    D, E = (int(x) for x in rng.choice([1, 3, 8, 16, 17, 40, 64], 2))
    M, N = int(rng.integers(1, 40)), int(rng.integers(1, 130))
    if several_tiles and rng.random() < 0.5:
        M, N = int(rng.integers(1, 12)), int(rng.integers(800, 1700))
    elif several_tiles:
        M, N = int(rng.integers(1, 9)), int(rng.integers(200, 450))
        D, E = (int(x) for x in rng.integers(500, 900, 2))
    Hk, served = int(rng.integers(1, 3)), int(rng.integers(1, 4))
    return Sizes(int(rng.integers(1, 3)), Hk * served, Hk, M, N, D, E)


def random_array(rng, shape, dtype):
    """Numbers of a dtype, side by side in memory or with the heads inside the rows."""
    array = rng.standard_normal(shape, np.float32).astype(dtype)
    return np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2) if rng.random() < 0.3 else array

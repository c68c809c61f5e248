"""Checks of decode's CUDA kernels in the simulator, on tiny shapes; they run in a process of their own."""

import numpy as np

import attn_numba as an
from attn_numba.comparison import agreement
from attn_numba.gpu import decode, forward_general
from attn_numba.gpu.tiles import Tile
from stored import stored

SMALL = decode.Cut(split=16, threads=4, batch=4)  # what takes time in the simulator is waiting for each other
LENGTHS = [37, 9]
RULES = {
    "plain": {},
    "causal, sink": {"mask": an.Causal(), "normalizer": an.Softmax(sink=0.3)},
    "window, soft cap": {"mask": an.SlidingWindow(6, 0), "modifiers": an.SoftCap(2.0)},
    "padding, ALiBi": {"mask": an.Padding([0, 5]), "modifiers": an.ALiBi([0.1, 0.5])},
    "documents": {"mask": an.SameDocument(np.zeros((2, 2), int), np.arange(74).reshape(2, 37) % 3)},
}


def problem(code, H=2, Hk=1, M=2, D=5, E=6, seed=0):
    rng, dtype = np.random.default_rng(seed), np.float64 if code == "float64" else np.float32
    k, v = (rng.standard_normal((2, Hk, 37, size)).astype(dtype) for size in (D, E))
    return rng.standard_normal((2, H, M, D)).astype(dtype), k, v


def check(q, cache, **rules):
    options = {"return_lse": True, "return_weights": True, **rules}
    found, exact = (an.decode(q, cache, backend=backend, **options) for backend in ("cuda", "reference"))
    k, v = (x.astype(q.dtype) for x in cache.arrays())
    beyond = an.Padding(cache.lengths)
    mask = rules.get("mask")
    rounded = an.reference.attention(
        q, k, v, **{**rules, "mask": beyond if mask is None else mask & beyond}, return_lse=True, return_weights=True,
        query_offset=cache.lengths - q.shape[2], compute_dtype=q.dtype.name,
    )  # fmt: skip
    for name in found._fields:
        same = agreement(getattr(found, name), getattr(exact, name), getattr(rounded, name))
        assert same.passed, f"{name}: {same}"
    return found


def check_every_code():
    decode.USUAL = SMALL
    for code in ("float64", "float32", "float16", "bfloat16", "int8", "int4"):
        for sizes in ({"H": 4, "Hk": 2, "D": 8, "E": 8}, {"M": 1, "D": 40, "E": 36}, {}):
            q, k, v = problem(code, **sizes)
            check(q, stored(k, v, LENGTHS, code, page=5), **RULES["causal, sink"])


def check_every_rule():
    decode.USUAL = SMALL
    for name, rules in RULES.items():
        q, k, v = problem("float32")
        cache = stored(k, v, LENGTHS, page=5)
        found = check(q, cache, **rules)
        for b in range(2):  # alone or among others
            if name not in ("padding, ALiBi", "documents"):
                alone = an.decode(q[[b]], cache, sequences=[b], backend="cuda", return_lse=True, **rules)
                np.testing.assert_array_equal(alone.out, found.out[[b]])
                np.testing.assert_array_equal(alone.lse, found.lse[[b]])


def check_what_is_not_seen():
    decode.USUAL = SMALL
    q, k, v = problem("float32")
    mask = an.SlidingWindow(6, 0)
    clean = an.decode(q, stored(k, v, LENGTHS, page=5), mask=mask, backend="cuda")
    k[0, :, 3], v[0, :, 4], v[0, :, 20, 1] = np.nan, np.inf, np.nan
    np.testing.assert_array_equal(an.decode(q, stored(k, v, LENGTHS, page=5), mask=mask, backend="cuda"), clean)
    v[1, :, 7, 2] = np.nan
    seen = an.decode(q, stored(k, v, LENGTHS, page=5), mask=mask, backend="cuda")
    assert np.isnan(seen[1, ..., 2]).all()
    np.testing.assert_array_equal(np.delete(seen[1], 2, -1), np.delete(clean[1], 2, -1))
    q[0, 1, 0, 0] = np.nan  # a row alone
    found = an.decode(q, stored(k, v, LENGTHS, page=5), mask=mask, backend="cuda")
    assert np.isnan(found[0, 1, 0]).all()
    np.testing.assert_array_equal(found[0, 0], clean[0, 0])


def check_other_ways():
    """Other normalizers and scores go by plain arrays; sequences that share pages bring them once."""
    decode.USUAL = SMALL
    forward_general.tile_of = lambda problem: Tile(8, 8, 4, 4, 4, 4, 2)
    q, k, v = problem("float32")
    cache = stored(k, v, LENGTHS, page=5)
    found, expected = (
        an.decode(q, cache, normalizer=an.Sparsemax(), mask=an.Causal(), backend=backend) for backend in ("cuda", "cpu")
    )
    np.testing.assert_allclose(found, expected, atol=1e-6)
    cache.fork(0)
    q = q[[0, 1, 0]]
    np.testing.assert_array_equal(*(an.decode(q, cache, backend="cuda")[[n]] for n in (0, 2)))

"""NaN and infinity: where they are not allowed they change no bit; elsewhere they reach the rows that see them.

Random cases, a few hundred in a normal run; ``ATTN_NUMBA_CASES=10000`` runs that many.
"""

import os

import numpy as np
import pytest

import attn_numba as an
from attn_numba.rules import Sizes, places_of
from attn_numba.testing import LAST_PLACES
from cases import allowed, documents

CASES = int(os.environ.get("ATTN_NUMBA_CASES", "400"))
BATCH = 25  # cases in one test
DTYPES = ("float32", "float64", "bfloat16", "float16")
BAD = (np.nan, np.inf, -np.inf, 1e38, -6e4, 1e-38)


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


def with_sink(rng, z):
    return {**dense(rng, z), "normalizer": an.Softmax(rng.standard_normal(z.H))}


RULES = (
    no_mask, causal, window, padding, dense, some_keys, bias, capped_bias, causal_and_keys, joined, blocks, custom,
    replaced, dropped, with_sink,
)  # fmt: skip


def offsets(rng, z):
    key_offset = int(rng.integers(-9, 10))
    return {"query_offset": key_offset + rng.integers(-5, z.N + 1, z.B), "key_offset": key_offset}


def random_sizes(rng):
    """Small calls; one in eight has a head so large that its keys take several tiles."""
    several_tiles = rng.random() < 0.125
    D, E = (int(x) for x in (rng.integers(500, 900, 2) if several_tiles else rng.choice([1, 3, 8, 16, 17, 40, 64], 2)))
    N = int(rng.integers(200, 450) if several_tiles else rng.integers(1, 130))
    Hk, served = int(rng.integers(1, 3)), int(rng.integers(1, 4))
    return Sizes(int(rng.integers(1, 3)), Hk * served, Hk, int(rng.integers(1, 9 if several_tiles else 40)), N, D, E)


def random_array(rng, shape, dtype):
    """Numbers of a dtype, side by side in memory or with the heads inside the rows."""
    array = rng.standard_normal(shape, np.float32).astype(dtype)
    return np.ascontiguousarray(array.swapaxes(1, 2)).swapaxes(1, 2) if rng.random() < 0.3 else array


def seen_scores(z, kwargs, seen):
    """Which scores reach a result: those of seen keys that are not replaced."""
    modifier = kwargs.get("modifiers")
    if isinstance(modifier, an.ReplaceExcluded):
        return seen & modifier.mask.evaluate(places_of(z), z)
    return seen


def poisoned(rng, k, v, seen_k, seen_v):
    """Copies of k and v with bad numbers in all places no query sees, and in a few that some see; (B, Hk, N) both."""
    k, v = k.copy(), v.copy()
    with np.errstate(over="ignore"):
        bad = np.array(BAD, np.float64).astype(k.dtype)
    for array, seen in ((k, seen_k), (v, seen_v)):
        hidden = np.argwhere(~seen)
        if rng.random() < 0.5:
            array[tuple(hidden.T)] = rng.choice(bad, (len(hidden), array.shape[-1]))
        else:
            array[tuple(hidden.T)] = rng.choice(bad, (len(hidden), 1))
    which = rng.integers(3)  # nothing that is seen; a few values; a key
    visible = np.argwhere(seen_v if which == 1 else seen_k)
    if which and len(visible):
        places = visible[rng.integers(len(visible), size=int(rng.integers(1, 4)))]
        if which == 1:
            v[tuple(places.T)] = np.where(
                rng.random(v.shape[-1]) < 0.4, rng.choice(bad[:3], v.shape[-1]), v[tuple(places.T)]
            )
        else:
            k[(*places.T, rng.integers(k.shape[-1]))] = np.nan
    return k, v


def check_case(seed):
    rng = np.random.default_rng(seed)
    z, make = random_sizes(rng), RULES[rng.integers(len(RULES))]
    dtype = DTYPES[rng.integers(len(DTYPES))]
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    kwargs = make(rng, z)
    q = random_array(rng, (z.B, z.H, z.M, z.D), dtype)
    k = random_array(rng, (z.B, z.Hk, z.N, z.D), dtype)
    v = random_array(rng, (z.B, z.Hk, z.N, z.E), dtype)
    seen = allowed(z, kwargs)
    scored = seen_scores(z, kwargs, seen)
    by_key_head = (z.B, z.Hk, z.H // z.Hk * z.M, z.N)
    bad_k, bad_v = poisoned(rng, k, v, scored.reshape(by_key_head).any(2), seen.reshape(by_key_head).any(2))

    asked = {"return_lse": True, "return_weights": True}
    clean = an.attention(q, k, v, **kwargs, **asked)
    found = an.attention(q, bad_k, bad_v, out=np.full_like(clean.out, np.nan), **kwargs, **asked)

    spoiled_keys = ~np.isfinite(bad_k.astype(np.float32)).all(-1).repeat(z.H // z.Hk, 1)  # (B, H, N)
    rows = (scored & spoiled_keys[:, :, None]).any(-1)  # (B, H, M)
    spoiled_values = ~np.isfinite(bad_v.astype(np.float32)).repeat(z.H // z.Hk, 1)  # (B, H, N, E)
    elements = (seen.astype(np.float32) @ spoiled_values.astype(np.float32) > 0) | rows[..., None]
    label = f"seed {seed}: {make.__name__}, {np.dtype(dtype).name}, {z}"
    for name, reached in (("out", elements), ("lse", rows), ("weights", seen & rows[..., None])):
        before, after = (getattr(x, name).astype(np.float64) for x in (clean, found))
        same = before == after
        if name == "out":  # a row may add a key with a bad value last: its other columns may round differently
            near = np.abs(after - before) <= 8 * LAST_PLACES[np.dtype(dtype).name] * np.abs(v.astype(np.float64)).max()
            same |= near & elements.any(-1, keepdims=True)
        assert (same | reached).all(), f"{label}: {name} {first(before, after, ~(same | reached))}"
        finite = np.isfinite(after) & reached
        assert not finite.any(), f"{label}: {name} stays finite {first(before, after, finite)}"


def first(before, after, where):
    at = tuple(np.argwhere(where)[0])
    return f"at {tuple(map(int, at))}: {before[at]} became {after[at]}"


@pytest.mark.parametrize("batch", range(-(-CASES // BATCH)))
def test_random_cases(batch):
    for seed in range(batch * BATCH, min((batch + 1) * BATCH, CASES)):
        check_case(seed)


def test_generator_is_varied():
    """Over the cases of a normal run: every rule, tiles of all kinds, hidden keys, rows without keys."""
    rng = np.random.default_rng(0)
    several, hidden, empty, partly = 0, 0, 0, 0
    for _ in range(200):
        z = random_sizes(rng)
        seen = allowed(z, RULES[rng.integers(len(RULES))](rng, z))
        several += z.D > 100
        hidden += not seen.any((1, 2)).all()
        empty += not seen.any(-1).all()
        partly += seen.any() and not seen.all()
    assert min(several, hidden, empty, partly) >= 10


def test_a_huge_hidden_value_moves_nothing(backend):
    """1e38 times a weight that is tiny but not 0 would be seen at once."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 16)).astype(np.float32) for n in (9, 40, 40))
    mask = an.Padding(25)
    expected = an.attention(q, k, v, mask=mask, backend=backend)
    k[:, :, 25:] = v[:, :, 25:] = np.finfo(np.float32).max
    np.testing.assert_array_equal(an.attention(q, k, v, mask=mask, backend=backend), expected)


def test_memory_outside_the_arrays_is_not_read(backend):
    """Views into an array of NaN: what lies around q, k and v does not count."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((2, 3, n, 20)).astype(np.float32) for n in (11, 37, 37)]
    expected = an.attention(*arrays, backend=backend)
    views = []
    for array in arrays:
        wide = np.full((3, 5, array.shape[2] + 7, 29), np.nan, np.float32)
        view = wide[1:3, 1:4, 3 : 3 + array.shape[2], 4:24]
        view[...] = array
        views.append(view)
    np.testing.assert_array_equal(an.attention(*views, backend=backend), expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_bad_query_spoils_its_own_row_only(value, backend):
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 16)).astype(np.float32) for n in (30, 40, 40))
    expected = an.attention(q, k, v, backend=backend, return_lse=True)
    q[0, 1, 7, 3] = value
    found = an.attention(q, k, v, backend=backend, return_lse=True)
    assert not np.isfinite(found.out[0, 1, 7]).any()
    for name in ("out", "lse"):
        kept, before = (np.delete(getattr(x, name)[0, 1], 7, 0) for x in (found, expected))
        np.testing.assert_array_equal(kept, before)
        np.testing.assert_array_equal(getattr(found, name)[0, 0], getattr(expected, name)[0, 0])

"""Caches of keys and values against plain lists of arrays; what is stored; errors that change nothing."""

from __future__ import annotations

import copy
import os
import pickle

import numpy as np
import pytest
from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import attn_numba as an
from attn_numba.caches.pool import PARTS, Pool
from attn_numba.rules.storage import CODES, rotated

HEADS, SIZE, VALUE_SIZE = 2, 3, 5
STEPS = int(os.environ.get("ATTN_NUMBA_CASES", "600"))  # operations in all
A_RUN = 50


@pytest.fixture(autouse=True)
def wiped(monkeypatch):
    monkeypatch.setattr(Pool, "wipes", True)


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def tokens(seed: int, sequences: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    both = drawn(seed, sequences, HEADS, count, SIZE + VALUE_SIZE)
    return both[..., :SIZE], both[..., SIZE:]


def check_pages(cache) -> None:
    """Each page is free or held, as often as is noted; what is free holds NaN."""
    pool = cache._pool
    held = cache._held(np.arange(len(cache)))
    np.testing.assert_array_equal(pool.holders, np.bincount(held, minlength=len(pool)))
    assert sorted(pool._free) == np.flatnonzero(pool.holders == 0).tolist()
    for page in pool._free:
        for name, code, size in zip(PARTS, CODES[cache.dtype], (SIZE, VALUE_SIZE), strict=True):
            assert np.isnan(code.decode(pool.part(name, page), size)).all()


class Operations(RuleBasedStateMachine):
    """Any operations on a cache and on a list of arrays (heads, tokens, numbers), which must stay the same."""

    @initialize(
        kind=st.sampled_from(["pages", "few pages", "chunks"]),
        dtype=st.sampled_from(["float32", "float16", "int8", "int4"]),
    )
    def begin(self, kind, dtype):
        shape = (2, HEADS, SIZE, VALUE_SIZE)
        self.cache = (
            an.KVCache(*shape, dtype=dtype)
            if kind == "chunks"
            else an.PagedKVCache(*shape, dtype=dtype, page=4, pages=12 if kind == "few pages" else None)
        )
        self.model = [self.nothing() for _ in range(2)]
        self.freed = set()

    def nothing(self):
        return np.zeros((HEADS, 0, SIZE + VALUE_SIZE), "float32")

    def stored(self, x):
        parts = zip(CODES[self.cache.dtype], (x[..., :SIZE], x[..., SIZE:]), strict=True)
        return np.concatenate([code.decode(code.encode(part), part.shape[-1]) for code, part in parts], axis=-1)

    def attempt(self, call):
        """Return whether a call was served; if not for want of pages, nothing may have changed."""
        try:
            return True, call()
        except MemoryError:
            return False, None

    @rule(data=st.data(), count=st.integers(0, 9), seed=st.integers(0, 99))
    def append(self, data, count, seed):
        chosen = data.draw(st.lists(st.integers(0, len(self.model) - 1), unique=True))
        lengths = data.draw(st.lists(st.integers(0, count), min_size=len(chosen), max_size=len(chosen)))
        k, v = tokens(seed, len(chosen), count)
        if self.attempt(lambda: self.cache.append(k, v, chosen, lengths))[0]:
            for row, (i, length) in enumerate(zip(chosen, lengths, strict=True)):
                new = self.stored(np.concatenate([k[row], v[row]], axis=-1)[:, :length])
                self.model[i] = np.concatenate([self.model[i], new], axis=1)
                if length:
                    self.freed.discard(i)

    @rule(data=st.data())
    @precondition(lambda self: len(self.model) < 8 or self.freed)
    def fork(self, data):
        i = data.draw(st.integers(0, len(self.model) - 1))
        expected = min(self.freed, default=len(self.model))
        assert self.cache.fork(i) == expected
        self.freed.discard(expected)
        self.model[expected:] = [self.model[i], *self.model[expected + 1 :]]

    @rule(data=st.data())
    def free(self, data):
        i = data.draw(st.integers(0, len(self.model) - 1))
        self.cache.free(i)
        self.freed.add(i)
        self.model[i] = self.nothing()

    @rule(data=st.data(), last=st.integers(0, 9), sinks=st.integers(0, 5))
    def trim(self, data, last, sinks):
        i = data.draw(st.integers(0, len(self.model) - 1))
        if self.attempt(lambda: self.cache.trim(i, last, sinks))[0]:
            length = self.model[i].shape[1]
            if length > last + sinks:
                kept = [*range(sinks), *range(length - last, length)]
                self.model[i] = self.model[i][:, kept]

    @rule(data=st.data())
    def reorder(self, data):
        count = len(self.model)
        indices = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=count))
        self.cache.reorder(indices)
        self.model = [self.model[i] for i in indices]
        self.freed = {b for b, i in enumerate(indices) if i in self.freed}

    @rule(how=st.sampled_from([copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))]))
    def copied(self, how):
        self.cache = how(self.cache)

    @invariant()
    def same(self):
        if not hasattr(self, "cache"):
            return
        assert self.cache.lengths.tolist() == [x.shape[1] for x in self.model]
        k, v = self.cache.arrays()
        for b, expected in enumerate(self.model):
            found = np.concatenate([k[b], v[b]], axis=-1)
            np.testing.assert_array_equal(found[:, : expected.shape[1]], expected)
            assert not found[:, expected.shape[1] :].any()
        check_pages(self.cache)


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=-(-STEPS // A_RUN), stateful_step_count=A_RUN, deadline=None)


def filled(dtype: str = "float32", paged: bool = True, **options) -> tuple:
    kind = an.PagedKVCache if paged else an.KVCache
    cache = kind(2, HEADS, SIZE, VALUE_SIZE, dtype=dtype, **({"page": 4} if paged else {}), **options)
    k, v = tokens(1, 2, 7)
    cache.append(k, v, lengths=[7, 5])
    return cache, k, v


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_floats_are_rounded_to_the_nearest(dtype):
    x = np.random.default_rng(0).standard_normal((50, 9)) * np.logspace(-4, 4, 50)[:, None]
    code = CODES[dtype].keys
    stored = code.encode(x)
    assert stored.shape == (50, code.width(9)) == (50, 9)
    found = code.decode(stored, 9)
    bound = {
        "float64": 0 * x,
        "float32": np.abs(x) * 2**-24,
        "float16": np.abs(x) * 2**-11 + 2**-25,
        "bfloat16": np.abs(x) * 2**-8,
    }
    assert (np.abs(found - x) <= bound[dtype]).all()
    assert found.dtype == (np.float64 if dtype == "float64" else np.float32)


@pytest.mark.parametrize("size", [1, 2, 9, 16, 33, 40, 64, 96, 128])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_errors_of_integers_are_bounded(dtype, size):
    x = np.random.default_rng(0).standard_normal((50, size)) * np.logspace(-4, 4, 50)[:, None] + 3
    code, steps = CODES[dtype].values, {"int8": 254, "int4": 14}[dtype]
    stored = code.encode(x)
    assert stored.shape == (50, code.width(size))
    found = code.decode(stored, size)
    assert found.dtype == np.float32
    # half a step for each number of the rotated row, and bfloat16 rounds scales up
    y = rotated(x)
    widest = y.max(axis=1) - y.min(axis=1) + np.abs(y).max(axis=1) / 128
    assert (np.linalg.norm(found - x, axis=1) <= np.sqrt(size) / 2 * 1.01 * widest / steps).all()


def test_a_row_of_int8_by_hand():
    # rotated: (2.5, 0.5, -1.5, 0.5); center (2.5 - 1.5) / 2 + 2 / 255 in bfloat16 is 0.5078125
    # the widest side, below it, is 2.0078125 over 128 steps: 0.01568604 is rounded up to 0.015686035 = 0x3C80 + 1
    x = np.array([1.0, 0.0, 2.0, 2.0]) * [1.0, 1.0, 1.0, -1.0]
    assert rotated(x).tolist() == [0.5, 2.5, 0.5, -1.5]
    row = CODES["int8"].keys.encode(x[None])[0]
    scale, center = (row[16:].view("uint32")[0] << np.array([16, 0], "uint32") & 0xFFFF0000).view("float32")
    assert center == 0.5078125
    assert 2.0078125 / 128 <= scale <= 2.0078125 / 128 * (1 + 2**-7)
    assert row[:4].view("int8").tolist() == np.rint((np.array([0.5, 2.5, 0.5, -1.5]) - center) / scale).tolist()
    assert not row[4:16].any()


def test_rotation_is_orthonormal_and_its_own_inverse():
    for size in (1, 2, 6, 8, 12, 64):
        matrix = rotated(np.eye(size))
        np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=1e-15)
        np.testing.assert_array_equal(matrix, matrix.T)
        assert (matrix != 0).sum() == size * (size & -size)


def test_bfloat16_is_rounded_as_ml_dtypes_does():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    x = np.concatenate([drawn(0, 5000) * 1e3, [0.0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, 1e-40, 1.00390625]])
    x = x.astype("float32")
    bits = CODES["bfloat16"].keys.encode(x)
    expected = x.astype(ml_dtypes.bfloat16)
    found = bits.view(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    np.testing.assert_array_equal(bits[~np.isnan(x)], expected.view(np.uint16)[~np.isnan(x)])
    assert CODES["bfloat16"].keys.encode(expected).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("odd", [np.nan, np.inf])
def test_a_row_of_integers_with_nan_is_nan(dtype, odd):
    x = drawn(0, 3, 4)
    x[1, 2] = odd
    x[2] = 0
    code = CODES[dtype].values
    found = code.decode(code.encode(x), 4)
    assert np.isnan(found[1]).all()
    assert np.isfinite(found[[0, 2]]).all()
    assert not found[2].any()


def test_forks_share_pages_until_one_writes():
    cache, k, v = filled()
    before = cache._pool.holders.sum()
    new = cache.fork(0)
    assert (new, cache.lengths.tolist()) == (2, [7, 5, 7])
    assert cache._pool.holders.sum() == before + 2
    assert np.count_nonzero(cache._pool.holders) == 4
    more_k, more_v = tokens(2, 1, 1)
    cache.append(more_k, more_v, [0])
    assert np.count_nonzero(cache._pool.holders) == 5  # the last page of both is no longer one
    np.testing.assert_array_equal(cache.arrays([2])[0][0], k[0])
    np.testing.assert_array_equal(cache.arrays([0])[1][0], np.concatenate([v[0], more_v[0]], axis=1))
    check_pages(cache)


def test_whole_pages_are_dropped_without_a_copy():
    cache = an.PagedKVCache(1, HEADS, SIZE, VALUE_SIZE, page=4)
    k, v = tokens(3, 1, 14)
    cache.append(k, v)
    pages = cache._pages(0).tolist()
    cache.trim(0, last=6, sinks=4)
    assert cache._pages(0).tolist() == [pages[0], *pages[2:]]
    np.testing.assert_array_equal(cache.arrays()[0][0], k[0][:, [*range(4), *range(8, 14)]])
    check_pages(cache)


def test_a_cache_grows_without_moving_what_it_has():
    cache = an.KVCache(1, 1, 2)
    x = np.ones((1, 1, 300, 2), "float32")
    cache.append(x, x)
    first = cache.view().keys[0, 0]
    for _ in range(5):
        cache.append(x, x)
        assert cache.view().keys[0, 0] == first
    assert cache.lengths.tolist() == [1800]


@pytest.mark.parametrize("paged", [True, False])
@pytest.mark.parametrize("dtype", list(CODES))
def test_saved_and_loaded(paged, dtype, tmp_path):
    pytest.importorskip("safetensors")
    cache, _, _ = filled(dtype, paged)
    cache.free(cache.fork(1))
    cache.fork(0)
    cache.fork(0)
    path = tmp_path / "cache.safetensors"
    cache.save(path)
    with pytest.raises(FileExistsError):
        cache.save(path)
    loaded = type(cache).load(path)
    assert loaded.lengths.tolist() == cache.lengths.tolist()
    assert loaded.dtype == dtype
    for found, expected in zip(loaded.arrays(), cache.arrays(), strict=True):
        np.testing.assert_array_equal(found, expected)
    check_pages(loaded)
    k, v = tokens(4, 4, 3)
    for each in (cache, loaded):
        each.append(k, v)
    np.testing.assert_array_equal(loaded.arrays()[0], cache.arrays()[0])
    other = an.KVCache if paged else an.PagedKVCache
    with pytest.raises(ValueError, match=f"holds a {type(cache).__name__}; needed a {other.__name__}"):
        other.load(path)


def test_damaged_files_are_refused(tmp_path):
    pytest.importorskip("safetensors")
    from attn_numba.files import read_arrays, write_arrays

    cache, _, _ = filled()
    path, other = tmp_path / "cache.safetensors", tmp_path / "other.safetensors"
    cache.save(path)
    arrays = dict(read_arrays(path))
    for name, wrong, message in [
        ("sizes", arrays["sizes"] * 9, "sizes are"),
        ("table", arrays["table"] + 9, "table names pages"),
        ("lengths", arrays["lengths"] * 9, "lengths go from"),
        ("keys", arrays["keys"][:, :1], "keys has shape"),
        ("freed", np.array([0]), "freed is"),
    ]:
        write_arrays(other, {**arrays, name: np.ascontiguousarray(wrong)}, overwrite=True)
        with pytest.raises(ValueError, match=message):
            an.PagedKVCache.load(other)
    write_arrays(other, {"x": np.zeros(3)}, overwrite=True)
    with pytest.raises(ValueError, match="has no sizes"):
        an.PagedKVCache.load(other)


ONE = np.ones((2, HEADS, 1, SIZE), "float32"), np.ones((2, HEADS, 1, VALUE_SIZE), "float32")


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda c: c.append(ONE[0].astype(int), ONE[1]), TypeError, "k has dtype int64"),
        (lambda c: c.append(ONE[0][:1], ONE[1]), ValueError, r"k has shape \(1, 2, 1, 3\); needed \(2, 2, n, 3\)"),
        (lambda c: c.append(ONE[0], ONE[0]), ValueError, r"v has shape \(2, 2, 1, 3\); needed \(2, 2, n, 5\)"),
        (lambda c: c.append(np.zeros((2, 2, 2, 3)), ONE[1]), ValueError, "v has 1 tokens; needed 2"),
        (lambda c: c.append(*ONE, sequences=[0, 0]), ValueError, r"sequences are \[0, 0\]; needed each once"),
        (lambda c: c.append(*ONE, sequences=[0, 2]), ValueError, "sequences are 0 to 2; needed 0 to 1"),
        (lambda c: c.append(*ONE, lengths=[0, 2]), ValueError, "lengths are 0 to 2; needed 0 to 1"),
        (lambda c: c.append(*ONE, lengths=[1]), ValueError, "lengths is"),
        (
            lambda c: c.append(np.ones((2, 2, 99, 3)), np.ones((2, 2, 99, 5))),
            MemoryError,
            "49 pages of 4 tokens are needed; 2 of 6 are free",
        ),
        (lambda c: c.fork(2), ValueError, "i is 2; needed 0 to 1"),
        (lambda c: c.free(-1), ValueError, "i is -1; needed at least 0"),
        (lambda c: c.trim(0, -1), ValueError, "last is -1; needed at least 0"),
        (lambda c: c.trim(0, 1.5), TypeError, "last is float; needed an integer"),
        (lambda c: c.reorder([0, 5]), ValueError, "indices are 0 to 5; needed 0 to 1"),
        (lambda c: c.reorder("ab"), TypeError, "indices is 'ab'; needed a list of whole numbers"),
    ],
)
def test_a_failed_call_leaves_the_cache_as_it_was(call, kind, message):
    cache, _, _ = filled(pages=6)
    before = pickle.dumps(cache)
    with pytest.raises(kind, match=message):
        call(cache)
    assert pickle.dumps(cache) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": -1}, "sequences is -1; needed at least 0"),
        ({"key_heads": 0}, "key_heads is 0; needed at least 1"),
        ({"value_size": 0}, "value_size is 0; needed at least 1"),
        ({"dtype": "int2"}, "dtype is 'int2'; needed one of float64, float32"),
        ({"page": 0}, "page is 0; needed at least 1"),
        ({"pages": -1}, "pages is -1; needed at least 0"),
    ],
)
def test_sizes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        an.PagedKVCache(**{"sequences": 1, "key_heads": 1, "head_size": 4} | options)

"""Decode against the reference: every storage, layout and rule."""

from pathlib import Path

import numpy as np
import pytest

import attn_numba as an
from attn_numba import reference
from attn_numba.comparison import agreement
from attn_numba.cpu.decode_engine import members_of, teams_of
from attn_numba.cpu.decode_state import SPLIT
from attn_numba.rules import as_mask, as_modifiers
from cases import CASES
from stored import stored

DATA = Path(__file__).parents[1] / "data"
CODES = ("float64", "float32", "float16", "bfloat16", "int8", "int4")
PART_NAMES = ("out", "lse", "weights")


def decodes(case):
    """Whether a dense case is read from pages, and one of new tokens: its last query is at its last key."""
    z, kwargs = case.sizes, case.kwargs()
    softmax = isinstance(kwargs.get("normalizer") or an.Softmax(), an.Softmax)
    dot = isinstance(kwargs.get("score") or an.Dot(), an.Dot) and kwargs.get("dropout") is None
    if z.M > z.N or not z.N * z.B or case.rank < 4 or not softmax or not dot:
        return False
    used = as_mask(kwargs.get("mask")), *as_modifiers(kwargs.get("modifiers", ()))
    at, first = kwargs.get("query_offset"), kwargs.get("key_offset", 0)
    if not any(x.uses_positions for x in used if x is not None):
        return True
    if not np.array_equal(first, 0):
        return False
    return z.M == z.N if at is None else bool(np.all(np.asarray(at) == z.N - z.M))


def check(found, q, k, v, **kwargs):
    """Hold results to the float64 reference of plain keys and values, and its own errors in float32."""
    wide = [x.astype(np.float64) for x in (q, k, v)]
    exact = reference.attention(*wide, **kwargs, return_lse=True, return_weights=True)
    rounded = reference.attention(*wide, **kwargs, compute_dtype=q.dtype.name, return_lse=True, return_weights=True)
    for name in PART_NAMES:
        result, expected = getattr(found, name), getattr(exact, name)
        same = agreement(result, expected, getattr(rounded, name))
        assert same.passed, f"{name}: {same}"


@pytest.mark.parametrize("case", [case for case in CASES if decodes(case)], ids=lambda case: case.name)
def test_dense_case_from_pages(case):
    q, k, v, kwargs = case.build("float32")
    kwargs = {name: x for name, x in kwargs.items() if not name.endswith("_offset")}
    z = case.sizes
    lengths = [z.N] * z.B
    arguments = {**kwargs, "return_lse": True, "return_weights": True}
    whole, paged = (an.decode(q, stored(k, v, lengths, page=page), **arguments) for page in (z.N, 13))
    check(whole, q, k, v, **kwargs, query_offset=z.N - z.M)
    for a, b in zip(whole, paged, strict=True):
        np.testing.assert_array_equal(a, b)


def problem(code, M=1, H=4, Hk=2, D=33, E=20, lengths=(SPLIT + 188, 3, SPLIT + 1), page=64, seed=0):
    rng = np.random.default_rng(seed)
    dtype = np.float64 if code == "float64" else np.float32
    B, N = len(lengths), max(lengths)
    q, k, v = (rng.standard_normal(x).astype(dtype) for x in ((B, H, M, D), (B, Hk, N, D), (B, Hk, N, E)))
    return q, stored(k, v, lengths, code, page)


@pytest.mark.parametrize("code", CODES)
def test_storage(code):
    if code == "bfloat16":
        pytest.importorskip("ml_dtypes")
    for M, H, D, E in ((1, 2, 33, 20), (3, 10, 64, 96)):
        q, cache = problem(code, M, H, D=D, E=E)
        kwargs = {"mask": an.Causal(), "modifiers": an.ALiBi(0.1), "normalizer": an.Softmax(sink=0.5)}
        found = an.decode(q, cache, **kwargs, return_lse=True, return_weights=True)
        slow = an.decode(q, cache, **kwargs, backend="reference", return_lse=True, return_weights=True)
        k, v = cache.arrays()
        for b, length in enumerate(cache.view().lengths):
            one = an.decode(q[b : b + 1], cache, sequences=[b], **kwargs, return_lse=True, return_weights=True)
            for name in PART_NAMES:
                part = getattr(found, name)[b : b + 1]
                part = part[..., :length] if name == "weights" else part
                np.testing.assert_array_equal(getattr(one, name), part)  # alone or among others
            own = np.s_[b : b + 1, :, :length]
            check(one, q[b : b + 1], k[own], v[own], **kwargs, query_offset=int(length) - M)
            assert not found.weights[b, ..., length:].any()
        np.testing.assert_allclose(found.out, slow.out, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.lse, slow.lse, rtol=1e-5)


@pytest.mark.parametrize("code", CODES)
def test_caches_have_the_same_bits(code):
    """However long pages are, and whoever wrote them."""
    if code == "bfloat16":
        pytest.importorskip("ml_dtypes")
    longest, rng = SPLIT + 188, np.random.default_rng(0)
    lengths = [longest, 3, SPLIT + 1]
    dtype = np.float64 if code == "float64" else np.float32
    q, k, v = (
        rng.standard_normal((3, *shape)).astype(dtype) for shape in ((4, 2, 33), (2, longest, 33), (2, longest, 20))
    )
    caches = [an.KVCache(3, 2, 33, 20, dtype=code)]
    caches += [an.PagedKVCache(3, 2, 33, 20, dtype=code, page=page) for page in (5, 64)]
    expected = an.decode(q, stored(k, v, lengths, code), mask=an.Causal(), return_lse=True)
    for cache in caches:
        cache.append(k[:, :, :2], v[:, :, :2])
        cache.append(k[:, :, 2:], v[:, :, 2:], lengths=[n - 2 for n in lengths])
        for a, b in zip(expected, an.decode(q, cache, mask=an.Causal(), return_lse=True), strict=True):
            np.testing.assert_array_equal(a, b)
    forked = caches[1].fork(2)
    found = an.decode(q[[2, 0]], caches[1], sequences=[forked, 0], mask=an.Causal())
    np.testing.assert_array_equal(found, expected.out[[2, 0]])


@pytest.mark.parametrize("code", ["float64", "float32", "int8"])
@pytest.mark.parametrize(("page", "M", "H"), [(16, 1, 2), (100, 2, 8), (512, 1, 6)])
def test_shared_beginnings_have_the_same_bits(code, page, M, H):
    """Sequences that were forked, at several depths, and went on by themselves, against copies of their own."""
    rng, dtype = np.random.default_rng(0), np.float64 if code == "float64" else np.float32

    def tokens(count):
        return rng.standard_normal((2, 1, 2, count, 24)).astype(dtype)

    cache = an.PagedKVCache(1, 2, 24, dtype=code, page=page)
    cache._pool.wipes = True
    texts = [tokens(2 * SPLIT + 76)]
    cache.append(*texts[0])
    for source, own in ((0, 3), (0, SPLIT + 88), (1, 40), (0, 0), (2, 30), (2, 1), *[(0, 5)] * 9):
        new, more = cache.fork(source), tokens(own)
        assert new == len(texts)
        texts.append(np.concatenate([texts[source], more], axis=3))
        cache.append(*more, sequences=[new])
    texts.append(tokens(SPLIT + 188))  # and a stranger
    cache.reorder([*range(len(cache)), 0])
    cache.free(len(cache) - 1)
    cache.append(*texts[-1], sequences=[len(cache) - 1])
    view = cache.view()
    assert view.shared
    lengths = [text.shape[3] for text in texts]
    k, v = (
        np.concatenate([np.pad(x, ((0, 0), (0, 0), (0, max(lengths) - x.shape[2]), (0, 0))) for x in part])
        for part in zip(*texts, strict=True)
    )
    apart = stored(k, v, lengths, code, page)
    assert not apart.view().shared
    q = rng.standard_normal((len(texts), H, M, 24)).astype(dtype)
    for mask in (an.Causal(), an.SlidingWindow(SPLIT + 388, 0)):
        results = [an.decode(q, x, mask=mask, return_lse=True, return_weights=True) for x in (cache, apart)]
        for a, b in zip(*results, strict=True):
            np.testing.assert_array_equal(a, b)
    starts = np.concatenate([[0], np.cumsum(-(-np.array(lengths) // SPLIT))])
    teams = teams_of(view, starts, members_of(H // 2 * M))
    together = {tuple(teams.members[first : first + count]) for split, first, count in teams.teams if split == 0}
    assert {b for team in together for b in team} == set(range(len(texts)))
    assert (len(texts) - 1,) in together
    assert len(together) == 1 + -(-(len(texts) - 1) // members_of(H // 2 * M))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_short_queries(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    q, cache = problem("float16")
    found = an.decode(q.astype(dtype), cache)
    assert found.dtype == dtype
    expected = an.decode(q.astype(dtype).astype(np.float32), cache).astype(dtype)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("D", [1, 16, 100, 128, 272, 576])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_queries_meet_codes(D, heads):
    """Every width of rows, one to four query rows together, queries of any magnitude."""
    rng = np.random.default_rng(0)
    k, v = rng.standard_normal((2, 1, 1, 70, D)).astype(np.float32)
    cache = stored(k, v, [70], "int8")
    k, v = (x.astype(float) for x in cache.arrays())
    q = rng.standard_normal((1, heads, 1, D)).astype(np.float32)
    for size in (1.0, 1e-20, 1e-28, 1e20):
        found = an.decode(q * np.float32(size), cache, scale=D**-0.5 / size, return_lse=True)
        expected = reference.attention(
            (q * np.float32(size)).astype(float), k, v, scale=D**-0.5 / size, return_lse=True
        )
        np.testing.assert_allclose(found.out, expected.out, rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(found.lse, expected.lse, rtol=2e-6)
    q[0, 0] = 0
    found = an.decode(q, cache)
    np.testing.assert_allclose(found[0, 0, 0], v.mean(axis=2)[0, 0], atol=1e-6)
    q[0, 0, 0, D // 2] = np.nan
    found = an.decode(q, cache)
    assert np.isnan(found[0, 0]).all()
    assert np.isfinite(found[0, 1:]).all()


def test_what_needs_plain_arrays():
    q, cache = problem("int8", M=2)
    arguments = {"mask": an.Causal(), "score": an.Cosine(), "modifiers": an.SoftCap(2.0)}
    found = an.decode(q, cache, **arguments, return_lse=True)
    expected = an.decode(q, cache, **arguments, return_lse=True, backend="reference")
    np.testing.assert_allclose(found.out, expected.out, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.lse, expected.lse, rtol=1e-5)


def test_same_bits_for_any_threads_heads_and_rows():
    q, cache = problem("float32", M=40, H=12)
    whole = an.decode(q, cache, sequences=[0, 2, 0])
    with an.threads(2):
        again = an.decode(q, cache, sequences=[0, 2, 0])
    np.testing.assert_array_equal(whole, again)
    few = an.decode(q[:, [0, 6], -3:], cache, sequences=[0, 2, 0])
    np.testing.assert_array_equal(few, whole[:, [0, 6], -3:])
    out = np.full_like(whole, np.nan)
    assert an.decode(q, cache, sequences=[0, 2, 0], out=out) is out
    np.testing.assert_array_equal(out, whole)


def test_hidden_keys_change_nothing_and_seen_nan_shows():
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, 2, n, 24)).astype(np.float32) for n in (1, SPLIT + 88, SPLIT + 88))
    mask = an.SlidingWindow(SPLIT + 38, 0)
    clean = an.decode(q, stored(k, v, [SPLIT + 88]), mask=mask, return_lse=True)
    k[:, :, :49], v[:, :, :49] = np.inf, np.nan
    for a, b in zip(clean, an.decode(q, stored(k, v, [SPLIT + 88]), mask=mask, return_lse=True), strict=True):
        np.testing.assert_array_equal(a, b)
    v[0, 1, 300, 5] = np.nan
    found = an.decode(q, stored(k, v, [SPLIT + 88]), mask=mask)
    assert np.argwhere(np.isnan(found)).tolist() == [[0, 1, 0, 5]]


def test_nothing_seen():
    q, cache = problem("float32", M=2)
    found = an.decode(q, cache, mask=np.zeros((1, 1, 1, 1), bool), return_lse=True, return_weights=True)
    assert not found.out.any()
    assert not found.weights.any()
    assert (found.lse == -np.inf).all()


def test_errors():
    q, cache = problem("float32")
    with pytest.raises(ValueError, match="q has 4 queries of each sequence; sequence 1 has 3 tokens"):
        an.decode(np.repeat(q, 4, axis=2), cache)
    with pytest.raises(ValueError, match="q has 2 sequences; the cache has 3"):
        an.decode(q[:2], cache)
    with pytest.raises(ValueError, match="q has head size 32; the cache has 33"):
        an.decode(q[..., :32], cache)
    with pytest.raises(ValueError, match="2 key heads; q has 3"):
        an.decode(q[:, :3], cache)
    with pytest.raises(TypeError, match="q has dtype float64 and the cache float32"):
        an.decode(q.astype(np.float64), cache)
    with pytest.raises(ValueError, match=r"backend is 'gpu'; needed one of"):
        an.decode(q, cache, backend="gpu")


@pytest.mark.parametrize(("code", "most"), [("float32", 1e-5), ("bfloat16", 0.006), ("int8", 0.01), ("int4", 0.06)])
def test_errors_on_real_data(code, most):
    """Queries, keys and values of SmolLM2-135M-Instruct (four layers, one key head each, 128 tokens of English)."""
    with np.load(DATA / "smollm2_attention.npz") as arrays:
        q, k, v = (arrays[name].astype(np.float32) for name in "qkv")
    expected = reference.attention(q, k, v, mask=an.Causal())
    cache = an.PagedKVCache(len(k), *k.shape[1::2], dtype=code)
    cache.append(k, v)
    found = an.decode(q, cache, mask=an.Causal())
    error, size = (np.sqrt((x.astype(np.float64) ** 2).sum(axis=(1, 2, 3))) for x in (found - expected, expected))
    errors = error / size
    print(errors)
    assert errors.max() <= most

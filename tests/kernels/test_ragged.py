"""Sequences one after the other: each as if it were alone."""

import numpy as np
import pytest

import attn_numba as an
from attn_numba import reference
from attn_numba.comparison import agreement

QUERIES, KEYS = np.array([5, 0, 130, 40, 1]), np.array([9, 3, 130, 0, 70])
STARTS, KEY_STARTS = (np.concatenate([[0], np.cumsum(n)]) for n in (QUERIES, KEYS))
H, HK, D, E = 4, 2, 24, 10
B, M, N = len(QUERIES), int(QUERIES.max()), int(KEYS.max())


def drawn(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def inputs(dtype=np.float32):
    sizes = (STARTS[-1], H, D), (KEY_STARTS[-1], HK, D), (KEY_STARTS[-1], HK, E)
    return [drawn(*size, seed=n).astype(dtype) for n, size in enumerate(sizes)]


def alone(b, q, k, v):
    """Return q, k, v of one sequence, (1, H, M, D)."""
    own, keys = slice(STARTS[b], STARTS[b + 1]), slice(KEY_STARTS[b], KEY_STARTS[b + 1])
    return q[own].swapaxes(0, 1)[None], k[keys].swapaxes(0, 1)[None], v[keys].swapaxes(0, 1)[None]


LENGTHS, BIAS, SPANS = np.array([4, 2, 99, 0, 70]), drawn(B, 1, M, N), np.abs(drawn(B, H, M)) * 20
IDS, KEY_IDS = (np.random.default_rng(3).integers(0, 3, (B, n)) for n in (M, N))
SINKS, TEMPERATURES, OFFSETS = drawn(B, H), np.abs(drawn(B, H, M)) + 0.5, np.array([4, 0, 0, 7, 60])

# The rules of a case, of whose arrays `cut` takes what belongs to some sequences, with axes named by letters.
CASES = {
    "plain": lambda cut: {},
    "causal": lambda cut: {"mask": an.Causal()},
    "window": lambda cut: {"mask": an.SlidingWindow(7, 3), "modifiers": an.ALiBi([0.1, 0.2, 0.3, 0.4])},
    "padding": lambda cut: {"mask": an.Padding(cut(LENGTHS, "B"))},
    "documents": lambda cut: {"mask": an.SameDocument(cut(IDS, "BM"), cut(KEY_IDS, "BN"))},
    "dense": lambda cut: {"mask": an.Dense(cut(BIAS > -1, "BHMN")), "modifiers": an.Bias(cut(BIAS, "BHMN"))},
    "temperature": lambda cut: {"modifiers": an.Temperature(cut(TEMPERATURES, "BHM"))},
    "sink": lambda cut: {"normalizer": an.Softmax(sink=cut(SINKS, "BH")), "mask": an.Causal()},
    "dropout": lambda cut: {"dropout": an.Dropout(0.3, cut(np.arange(B), "B"))},
    "entmax": lambda cut: {"normalizer": an.Entmax15(), "mask": an.Causal()},
    "double": lambda cut: {"normalizer": an.DoubleSoftmax()},
    "cosine": lambda cut: {"score": an.Cosine(), "modifiers": an.SoftCap(2.0), "scale": 3.0},
    "additive": lambda cut: {"score": an.Additive(*(drawn(D, D, seed=n) for n in (5, 6)), drawn(D, seed=7))},
    "span": lambda cut: {"modifiers": an.AdaptiveSpan(cut(SPANS, "BHM"), 8.0)},
}


def rules(case):
    """Return the rules of all sequences."""
    return {**CASES[case](lambda array, axes: array), "query_offset": OFFSETS}


def rules_alone(case, b):
    """Return the rules of one sequence alone."""
    own = {"B": slice(b, b + 1), "H": slice(None), "M": slice(QUERIES[b]), "N": slice(KEYS[b])}
    kwargs = CASES[case](lambda array, axes: array[tuple(own[axis] for axis in axes)])
    return {**kwargs, "query_offset": OFFSETS[b : b + 1]}


@pytest.mark.parametrize("case", CASES)
def test_each_sequence_is_as_if_alone(case):
    q, k, v = inputs()
    softmax = isinstance(rules(case).get("normalizer", an.Softmax()), an.Softmax)
    found = an.ragged_attention(q, k, v, STARTS, KEY_STARTS, **rules(case), return_lse=softmax)
    filled = an.ragged_attention(q, k, v, STARTS, KEY_STARTS, **rules(case), backend="reference", return_lse=softmax)
    with an.threads(1):
        single = an.ragged_attention(q, k, v, STARTS, KEY_STARTS, **rules(case), return_lse=softmax)
    for x, y in zip(found if softmax else [found], single if softmax else [single], strict=True):
        np.testing.assert_array_equal(x, y)
    for b in range(B):
        own = slice(STARTS[b], STARTS[b + 1])
        arrays, one = alone(b, q, k, v), rules_alone(case, b)
        expected = an.attention(*arrays, **one, return_lse=softmax)
        exact = reference.attention(*(x.astype(float) for x in arrays), **one, return_lse=softmax)
        rounded = reference.attention(*arrays, **one, compute_dtype="float32", return_lse=softmax)
        for name in ("out", "lse") if softmax else ("out",):
            parts = (getattr(x, name) if softmax else x for x in (found, filled, expected, exact, rounded))
            mine, from_reference, kernel, right, near = parts
            mine, from_reference = (x[own].swapaxes(0, 1)[None] for x in (mine, from_reference))
            np.testing.assert_array_equal(mine, kernel)
            for result in (mine, from_reference):
                same = agreement(result, right, near)
                assert same.passed, f"sequence {b}, {name}: {same}"


@pytest.mark.parametrize("case", ["plain", "window", "dense", "sink", "entmax", "cosine", "span"])
def test_gradients(case):
    q, k, v = inputs(np.float64)
    dout, kwargs = drawn(len(q), H, E, seed=9), rules(case)
    found = an.ragged_attention_vjp(q, k, v, dout, STARTS, KEY_STARTS, **kwargs)
    for b in range(B):
        own, keys = slice(STARTS[b], STARTS[b + 1]), slice(KEY_STARTS[b], KEY_STARTS[b + 1])
        arrays = alone(b, q, k, v)
        expected = reference.attention_vjp(*arrays, dout[own].swapaxes(0, 1)[None], **rules_alone(case, b))
        for name, rows in (("q", own), ("k", keys), ("v", keys)):
            mine = getattr(found, name)[rows].swapaxes(0, 1)[None]
            np.testing.assert_allclose(mine, getattr(expected, name), rtol=1e-10, atol=1e-12)
    slow = an.ragged_attention_vjp(q, k, v, dout, STARTS, KEY_STARTS, **kwargs, backend="reference")
    for (rule, arrays), (_, expected) in zip(found.learned, slow.learned, strict=True):
        assert rule in (*np.atleast_1d(kwargs.get("modifiers", ())), kwargs.get("normalizer"))
        for name, array in arrays.items():
            np.testing.assert_allclose(array, expected[name], rtol=1e-10, atol=1e-12)
    if case == "sink":
        kept = an.ragged_attention(q, k, v, STARTS, KEY_STARTS, **kwargs, return_lse=True)
        again = an.ragged_attention_vjp(q, k, v, dout, STARTS, KEY_STARTS, **kwargs, saved=tuple(kept))
        np.testing.assert_allclose(again.q, found.q, rtol=1e-9, atol=1e-12)


def test_nothing_reaches_another_sequence():
    q, k, v = inputs()
    clean = an.ragged_attention(q, k, v, STARTS, KEY_STARTS, return_lse=True)
    for array, starts in ((q, STARTS), (k, KEY_STARTS), (v, KEY_STARTS)):
        array[starts[2] : starts[3]] = np.nan
    found = an.ragged_attention(q, k, v, STARTS, KEY_STARTS, return_lse=True)
    others = np.r_[0 : STARTS[2], STARTS[3] : STARTS[-1]]
    for a, b in zip(clean, found, strict=True):
        np.testing.assert_array_equal(a[others], b[others])
    assert np.isnan(found.out[STARTS[2] : STARTS[3]]).all()


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_dtypes_strides_and_places(dtype):
    kind = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    q, k, v = (x.astype(kind) for x in inputs())
    expected = an.ragged_attention(q, k, v, STARTS, KEY_STARTS)
    assert expected.dtype == q.dtype
    turned = [np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1) for x in (q, k, v)]
    out = np.full((E, *expected.shape[:2]), np.nan).astype(kind).transpose(1, 2, 0)
    assert an.ragged_attention(*turned, STARTS, KEY_STARTS, out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_many_sequences_alone_or_among_others():
    rng = np.random.default_rng(0)
    starts = np.concatenate([[0], np.cumsum(rng.integers(0, 60, 50))])
    q, k, v = (rng.standard_normal((starts[-1], 2, 8)) for _ in range(3))
    whole = an.ragged_attention(q, k, v, starts, starts, mask=an.Causal())
    few = an.ragged_attention(*(x[: starts[7]] for x in (q, k, v)), starts[:8], starts[:8], mask=an.Causal())
    np.testing.assert_array_equal(whole[: starts[7]], few)


def test_nothing_at_all():
    q = np.zeros((0, 2, 4))
    assert an.ragged_attention(q, q, q, [0], [0]).shape == (0, 2, 4)
    assert an.ragged_attention(q, q, q, [0, 0], [0, 0]).shape == (0, 2, 4)
    assert an.ragged_attention_vjp(q, q, q, q, [0, 0], [0, 0]).k.shape == (0, 2, 4)


def test_pack_and_unpack():
    padded, lengths = drawn(3, 5, 2, 4), [5, 0, 2]
    packed, starts = an.pack(padded, lengths)
    assert starts.tolist() == [0, 5, 5, 7]
    np.testing.assert_array_equal(packed, np.concatenate([padded[0], padded[2, :2]]))
    again, mask = an.unpack(packed, starts)
    assert again.shape == padded.shape
    np.testing.assert_array_equal(again[2, :2], padded[2, :2])
    assert not again[1].any()
    assert not again[2, 2:].any()
    assert mask.key_lengths.tolist() == mask.query_lengths.tolist() == lengths


def test_errors():
    q, k, v = inputs()
    call = an.ragged_attention
    with pytest.raises(ValueError, match=r"q has 2 axes.*needed 3: tokens, heads, size"):
        call(q[:, 0], k, v, STARTS, KEY_STARTS)
    with pytest.raises(ValueError, match=r"query_starts is from 0 to 176; needed 0 to 175, the rows of q"):
        call(q[:-1], k, v, STARTS, KEY_STARTS)
    with pytest.raises(ValueError, match=r"key_starts has 5 numbers; query_starts has 6"):
        call(q, k, v, STARTS, KEY_STARTS[[0, 1, 2, 3, 5]])
    with pytest.raises(ValueError, match=r"key_starts has 12 and then 9"):
        call(q, k, v, STARTS, KEY_STARTS[[0, 2, 1, 3, 4, 5]])
    with pytest.raises(TypeError, match=r"query_starts is \[0.0, 176.0\]; needed a list of whole numbers"):
        call(q, k, v, [0.0, 176.0], [0, 212])
    with pytest.raises(ValueError, match=r"Causal uses positions and sequence 0 has 5 queries and 9 keys"):
        call(q, k, v, STARTS, KEY_STARTS, mask=an.Causal())
    with pytest.raises(ValueError, match=r"Entmax15 has no lse"):
        call(q, k, v, STARTS, KEY_STARTS, normalizer=an.Entmax15(), return_lse=True)
    with pytest.raises(ValueError, match=r"out has shape \(176, 4, 24\); needed \(176, 4, 10\)"):
        call(q, k, v, STARTS, KEY_STARTS, out=np.empty_like(q))
    with pytest.raises(ValueError, match=r"lengths are 0 to 6; needed 0 to 5"):
        an.pack(drawn(2, 5), [6, 0])
    with pytest.raises(ValueError, match=r"starts is from 1 to 5; needed 0 to 5, the rows of packed"):
        an.unpack(drawn(5), [1, 5])

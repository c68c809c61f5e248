"""Same inputs, same bits: whatever the threads, the company, the memory layout and the form of the mask."""

import functools
import json
import operator

import numpy as np
import pytest

import attn_numba as an
from attn_numba.rules import Mask
from cases import BY_NAME, CASES, documents
from processes import run_python

DTYPES = ("float32", "float64", "bfloat16", "float16")
ASKED = {"return_lse": True, "return_weights": True}
OTHERS = {
    "softmax": {},
    "sparsemax": {"normalizer": an.Sparsemax()},
    "entmax15": {"normalizer": an.Entmax15()},
    "double softmax": {"normalizer": an.DoubleSoftmax()},
}


def asked(kwargs):
    """All results that a call can have: only a softmax has an lse."""
    return ASKED if isinstance(kwargs.get("normalizer", an.Softmax()), an.Softmax) else {"return_weights": True}


def dtype_of(name):
    return pytest.importorskip("ml_dtypes").bfloat16 if name == "bfloat16" else np.dtype(name)


def arrays(B=2, H=4, Hk=2, M=70, N=250, D=40, E=24, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = (B, H, M, D), (B, Hk, N, D), (B, Hk, N, E)
    return [rng.standard_normal(shape).astype(dtype_of(dtype)) for shape in shapes]


def assert_same(found, expected, part=np.s_[:]):
    """All results have the same bits; the sign of a zero apart."""
    for name in expected._fields:
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name)[part], err_msg=name)


def rules(B=2, H=4, M=70, N=250):
    """Arguments of several kinds: nothing, a mask by position, one by array, modifiers, a sink, dropout."""
    rng = np.random.default_rng(1)
    return {
        "nothing": {},
        "causal": {"mask": an.Causal(), "query_offset": N - M},
        "padding": {"mask": an.Padding(rng.integers(1, N, B))},
        "dense": {"mask": rng.random((B, H, M, N)) < 0.3},
        "bias": {"modifiers": [an.Bias(rng.standard_normal((B, H, M, N)).astype(np.float32)), an.SoftCap(5.0)]},
        "sink": {"mask": an.SlidingWindow(30, 9), "query_offset": 100, "normalizer": an.Softmax(0.5)},
        "dropout": {"dropout": an.Dropout(0.3, np.arange(5, 5 + B)), "query_offset": 0},
        "sparsemax": {"mask": an.Causal(), "query_offset": N - M, "normalizer": an.Sparsemax()},
        "entmax15": {"modifiers": an.SoftCap(4.0), "normalizer": an.Entmax15()},
        "double softmax": {"mask": an.SlidingWindow(90, 9), "query_offset": 100, "normalizer": an.DoubleSoftmax()},
        "additive": {"score": an.Additive(*(rng.standard_normal((7, 40)) / 6 for _ in range(2)), np.ones(7))},
    }


# --- threads ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", rules())
def test_one_and_two_threads(name, dtype):
    q, k, v = arrays(dtype=dtype)
    results = []
    for count in (1, 2, 3):
        with an.threads(count):
            results.append(an.attention(q, k, v, **rules()[name], **asked(rules()[name])))
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


BITS = """
import hashlib, json, sys
import numpy as np
import attn_numba as an
from attn_numba.rules import Mask
from test_promises import arrays, asked, rules
found = {}
for name, kwargs in rules().items():
    for dtype in ("float32", "float64"):
        result = an.attention(*arrays(dtype=dtype), **kwargs, **asked(kwargs))
        found[f"{name} {dtype}"] = hashlib.sha256(b"".join((x + 0.0).tobytes() for x in result)).hexdigest()
print(json.dumps([an.config_report()["threads"]["count"], found]))
"""


def test_four_threads_in_a_process_of_their_own():
    by_threads = [json.loads(run_python(BITS, NUMBA_NUM_THREADS=n, OMP_NUM_THREADS=None)) for n in ("1", "2", "4")]
    assert [used for used, _ in by_threads] == [[n, "NUMBA_NUM_THREADS"] for n in (1, 2, 4)]
    assert len(by_threads[0][1]) == 2 * len(rules())
    assert by_threads[0][1] == by_threads[1][1] == by_threads[2][1]


def test_run_after_run():
    q, k, v = arrays(M=300, N=700)
    with an.threads(2):
        results = [an.attention(q, k, v, mask=an.Causal(), query_offset=400, **ASKED) for _ in range(5)]
    for result in results[1:]:
        assert_same(result, results[0])


# --- company ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", rules())
def test_a_sequence_alone(name, dtype):
    q, k, v = arrays(dtype=dtype)
    kwargs = rules()[name]
    whole = an.attention(q, k, v, **kwargs, **asked(kwargs))
    for b in range(2):
        one = dict(kwargs)
        if name == "padding":
            one["mask"] = an.Padding(kwargs["mask"].key_lengths[b : b + 1])
        elif name == "dense":
            one["mask"] = kwargs["mask"][b : b + 1]
        elif name == "bias":
            one["modifiers"] = [an.Bias(kwargs["modifiers"][0].array[b : b + 1]), an.SoftCap(5.0)]
        elif name == "dropout":
            one["dropout"] = an.Dropout(0.3, [5 + b])
        found = an.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], **one, **asked(one))
        assert_same(found, whole, np.s_[b : b + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 5, 70])
@pytest.mark.parametrize("other", OTHERS)
def test_a_head_alone(other, M, dtype):
    """Few rows of several heads are computed together, many rows apart; a row has the same bits either way."""
    q, k, v = arrays(H=6, M=M, dtype=dtype)
    rules = {"mask": an.SlidingWindow(99, 3), "query_offset": 150, **OTHERS[other], **asked(OTHERS[other])}
    whole = an.attention(q, k, v, **rules)
    for h in range(6):
        key_head = np.s_[:, h // 3 : h // 3 + 1]
        found = an.attention(q[:, h : h + 1], k[key_head], v[key_head], **rules)
        assert_same(found, whole, np.s_[:, h : h + 1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("other", OTHERS)
def test_queries_in_pieces(other, dtype):
    q, k, v = arrays(M=250, dtype=dtype)
    rules = {"mask": an.Causal() & an.SlidingWindow(120, 0), "modifiers": an.ALiBi([0.1, 0.2, 0.3, 0.4])}
    rules |= OTHERS[other] | asked(OTHERS[other])
    whole = an.attention(q, k, v, **rules)
    start = 0
    for size in (1, 2, 3, 8, 23, 25, 60, 128):
        rows = np.s_[:, :, start : start + size]
        assert_same(an.attention(q[rows], k, v, query_offset=start, **rules), whole, rows)
        start += size
    assert start == 250


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("D", "N"), [(40, 250), (700, 900)])
@pytest.mark.parametrize("other", OTHERS)
def test_keys_beyond_a_mask(other, D, N, dtype):
    """However many keys follow that no query sees, the bits are the same; 900 keys of size 700 are several tiles."""
    q, k, v = arrays(B=1, M=9, N=N, D=D, E=D, dtype=dtype)
    length, rules = N * 2 // 3, OTHERS[other]
    short = an.attention(q, k[:, :, :length], v[:, :, :length], **rules, **asked(rules))
    for end in (length, length + 1, length + 17, N):
        for mask in (an.Padding(length), an.Dense(np.arange(end) < length)):
            found = an.attention(q, k[:, :, :end], v[:, :, :end], mask=mask, **rules, **asked(rules))
            assert_same(found, short._replace(weights=np.pad(short.weights, [(0, 0)] * 3 + [(0, end - length)])))


# --- the form of a mask ---


def is_masked_alone(case):
    kwargs = case.kwargs()
    return "mask" in kwargs and not {"modifiers", "dropout"} & set(kwargs) and case.poison != "seen"


MASKED = [case for case in CASES if is_masked_alone(case)]


@pytest.mark.parametrize("case", MASKED, ids=lambda case: case.name)
def test_a_rule_and_its_array(case):
    """Which tiles are skipped does not show: the mask as an array gives the same bits."""
    q, k, v, kwargs = case.build("float32")
    z = case.sizes
    offsets = [kwargs.get("query_offset"), kwargs.get("key_offset", 0)]
    array = an.mask_array(kwargs["mask"], (z.B, z.H, z.M, z.N), *offsets)
    found = an.attention(q, k, v, **{**kwargs, "mask": an.Dense(array)}, **asked(kwargs))
    assert_same(found, an.attention(q, k, v, **kwargs, **asked(kwargs)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_rule_and_its_array_over_several_tiles(dtype):
    q, k, v = arrays(B=1, M=400, N=1700, D=64, E=64, dtype=dtype)
    mask = an.Causal() & an.SameDocument(documents(7, 400), documents(7, 1700))
    array = an.mask_array(mask, (1, 4, 400, 1700), 1300)
    found = an.attention(q, k, v, mask=array, return_lse=True)
    assert_same(found, an.attention(q, k, v, mask=mask, query_offset=1300, return_lse=True))


SHORT_STRETCHES = {
    "neighbors above": an.Neighborhood((9, 5), (5, 1)),
    "more neighbors above": an.Neighborhood((26, 11), (15, 1)),
    "dilated neighbors": an.Neighborhood((15, 20), (3, 5), (5, 4)),
    "neighbors in a volume": an.Neighborhood((6, 7, 8), (3, 1, 2)),
    "the diagonal": an.SlidingWindow(0, 0),
    "a few": an.SlidingWindow(3, -1) & an.SlidingWindow(-1, 2),
    "every third": an.CustomMask(lambda b, h, i, j, p: (i - j) % p[0] == 0, (3,)),
    "two diagonals": an.CustomMask(lambda b, h, i, j, p: abs(i - j) == p[0], (40,)),
    "pairs": an.Causal() & an.CustomMask(lambda b, h, i, j, p: (j // 2 + i) % p[0] == 0, (5,)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHORT_STRETCHES)
def test_short_stretches_of_keys(name, dtype):
    """Rows that see single keys here and there, some of them neighbors of those that the next row sees."""
    mask = SHORT_STRETCHES[name]
    size = int(np.prod(getattr(mask, "shape", 300)))
    q, k, v = arrays(M=size, N=size, D=16, E=32, dtype=dtype)
    array = an.mask_array(mask, (2, 4, size, size))
    found = an.attention(q, k, v, mask=mask, **ASKED)
    assert_same(found, an.attention(q, k, v, mask=array, **ASKED))


class Stretches(Mask):
    """Each query sees stretches of keys from a table (M, count, 2) of first keys and ends."""

    def __init__(self, table):
        self.table = np.ascontiguousarray(table, np.int32)

    uses_positions = True

    def arguments(self, sizes):
        return (self.table,)

    def allowed(self, b, h, i, j, p):
        return functools.reduce(operator.or_, (self._seen(i, j, n, p) for n in range(self.run_count)))

    def _seen(self, i, j, n, p):
        return (j >= p[0][i, n, 0]) & (j < p[0][i, n, 1])

    @property
    def run_count(self):
        return self.table.shape[1]

    def run(self, b, h, i, n, p):
        return p[0][i, n, 0], p[0][i, n, 1]


def steady(rng, M, N, count):
    """Stretches that move on by a key or none from query to query, now and then by many."""
    starts = np.linspace(0, N - 200, count).astype(int) + np.minimum(np.arange(M), N // count // 2)[:, None]
    starts[M // 2 :] += 9
    return np.stack([starts, starts + rng.integers(0, 3, (M, 1)) + 11], -1)


def unsteady(rng, M, N, count):
    """Stretches of any length, many of them without a key, that nothing joins to those of the next query."""
    cuts = np.sort(rng.integers(0, N + 1, (M, 2 * count)))
    return cuts.reshape(M, count, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [3, 5, 37, 140])
@pytest.mark.parametrize("kind", [steady, unsteady])
def test_stretches_from_a_table(kind, M, dtype):
    rng = np.random.default_rng(M)
    table = kind(rng, M, 1000, 7)
    q, k, v = arrays(B=1, M=M, N=1000, D=64, E=80, dtype=dtype)
    mask = Stretches(table)
    j = np.arange(1000)
    array = ((j >= table[..., :1]) & (j < table[..., 1:])).any(1)
    found = an.attention(q, k, v, mask=mask, query_offset=0, **ASKED)
    assert_same(found, an.attention(q, k, v, mask=array, **ASKED))
    dropped = {"dropout": an.Dropout(0.3, 5), "query_offset": 0, "return_lse": True}
    assert_same(an.attention(q, k, v, mask=mask, **dropped), an.attention(q, k, v, mask=array, **dropped))


# --- memory ---


def not_aligned(x):
    return np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("E", [24, 32])
def test_any_strides(E, dtype):
    q, k, v = arrays(D=32, E=E, dtype=dtype)
    expected = an.attention(q, k, v, mask=an.Causal(), query_offset=100, **ASKED)
    for layout in (
        lambda x: np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2),
        lambda x: np.ascontiguousarray(x[:, :, ::-1, ::-1])[:, :, ::-1, ::-1],
        lambda x: np.ascontiguousarray(x.swapaxes(2, 3)).swapaxes(2, 3),
        lambda x: np.repeat(x, 2, axis=3)[..., ::2],
        not_aligned,
    ):
        found = an.attention(*map(layout, (q, k, v)), mask=an.Causal(), query_offset=100, **ASKED)
        assert_same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_out_of_any_strides(dtype, backend):
    q, k, v = arrays(dtype=dtype)
    expected = an.attention(q, k, v, backend=backend)
    targets = [
        np.empty((2, 4, 70, 24), q.dtype),
        np.empty((2, 70, 4, 24), q.dtype).swapaxes(1, 2),
        np.empty((2, 4, 70, 49), q.dtype)[..., 1::2],
        np.empty((2, 4, 70, 24), q.dtype)[:, ::-1, ::-1, ::-1],
        np.empty((2, 4, 24, 70), q.dtype).swapaxes(2, 3),
    ]
    for out in targets:
        around = out.base if out.base is not None else out
        around[...] = np.nan
        found = an.attention(q, k, v, out=out, backend=backend)
        assert found is out
        np.testing.assert_array_equal(out, expected)
        assert np.isnan(around.astype(np.float32)).sum() == around.size - out.size  # nothing else is written


def test_out_comes_back_in_the_tuple(backend):
    q, k, v = arrays(B=1)
    out = np.full((1, 4, 70, 24), np.nan, np.float32)
    found = an.attention(q, k, v, out=out, backend=backend, **ASKED)
    assert found.out is out
    assert np.isfinite(out).all()


@pytest.mark.parametrize("name", rules())
def test_inputs_are_not_written(name, backend):
    inputs = arrays()
    before = [x.copy() for x in inputs]
    for x in inputs:
        x.flags.writeable = False
    kwargs = rules()[name]
    mask = kwargs.get("mask")
    mask_before = mask.copy() if isinstance(mask, np.ndarray) else None
    an.attention(*inputs, **kwargs, backend=backend, **asked(kwargs))
    for x, y in zip(inputs, before, strict=True):
        np.testing.assert_array_equal(x, y)
    if mask_before is not None:
        np.testing.assert_array_equal(mask, mask_before)


def test_a_changed_array_is_read_anew():
    """Calls that repeat are recognized by their rules; arrays that changed since are not taken for the old ones."""
    q, k, v = arrays(B=1, M=20, N=20)
    mask = np.ones((20, 20), bool)
    first = an.attention(q, k, v, mask=mask)
    mask[:, 10:] = False
    second = an.attention(q, k, v, mask=mask)
    np.testing.assert_array_equal(second, an.attention(q, k[:, :, :10], v[:, :, :10]))
    assert not np.array_equal(first, second)
    k[...] = 0.0
    np.testing.assert_allclose(an.attention(q, k, v)[0, 0, 0], v[0, 0].mean(0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-25, 1.0])
def test_a_scale_is_not_taken_for_that_of_another_call(scale):
    """Calls that differ in dtype, sizes or offsets alone, one after the other."""
    for dtype in DTYPES + DTYPES[::-1]:
        for B, M, N in ((1, 3, 5), (3, 40, 90)):
            q, k, v = arrays(B=B, M=M, N=N, dtype=dtype)
            found = an.attention(q, k, v, scale=scale).astype(np.float64)
            expected = an.attention(q, k, v, scale=scale, backend="reference").astype(np.float64)
            np.testing.assert_allclose(found, expected, rtol=2e-2, atol=2e-2 if dtype == "bfloat16" else 2e-3)


# --- positions ---


@pytest.mark.parametrize("shift", [-(2**29), -7, 1, 2**29])
def test_only_differences_of_positions_count(shift, backend):
    """For rules that look at differences alone; dropout counts positions themselves."""
    q, k, v = arrays(B=2, M=30, N=90)
    rules = {"mask": an.SlidingWindow(40, 2) | ~an.Causal(), "modifiers": an.ALiBi(0.25), "backend": backend}
    expected = an.attention(q, k, v, query_offset=[60, 20], **rules, **ASKED)
    offsets = {"query_offset": np.array([60, 20]) + shift, "key_offset": shift}
    assert_same(an.attention(q, k, v, **offsets, **rules, **ASKED), expected)
    dropout = an.Dropout(0.5, 1)
    moved = an.attention(q, k, v, **offsets, dropout=dropout, backend=backend)
    assert not np.array_equal(moved, an.attention(q, k, v, query_offset=[60, 20], dropout=dropout, backend=backend))


def test_equal_lengths_start_together(backend):
    q, k, v = arrays(M=50, N=50)
    expected = an.attention(q, k, v, mask=an.Causal(), backend=backend)
    for offsets in ({"key_offset": 12}, {"key_offset": np.array([12, -3])}, {"query_offset": 9, "key_offset": 9}):
        np.testing.assert_array_equal(an.attention(q, k, v, mask=an.Causal(), backend=backend, **offsets), expected)
    np.testing.assert_array_equal(expected[:, :, 0], v[:, :, 0].repeat(2, 1))  # the first query sees the first key


def test_array_rules_go_by_rows(backend):
    """Offsets move nothing for rules that are as large as the arrays; and without positions none is needed."""
    q, k, v = arrays(M=30, N=90)
    rng = np.random.default_rng(3)
    rules = {
        "mask": an.Padding([50, 90])
        & (rng.random((30, 90)) < 0.5)
        & an.SameDocument(documents(3, 30), documents(3, 90)),
        "modifiers": [an.Bias(rng.standard_normal((30, 90))), an.Temperature(rng.random(30) + 0.5)],
        "backend": backend,
    }
    expected = an.attention(q, k, v, **rules, **ASKED)
    found = an.attention(q, k, v, query_offset=[1000, -1000], key_offset=-77, **rules, **ASKED)
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_leaves_lse_and_weights(dtype, backend):
    q, k, v = arrays(dtype=dtype)
    plain = an.attention(q, k, v, mask=an.Padding([200, 33]), backend=backend, **ASKED)
    dropout = {"dropout": an.Dropout(0.5, 3), "query_offset": 0}
    found = an.attention(q, k, v, mask=an.Padding([200, 33]), backend=backend, **dropout, **ASKED)
    np.testing.assert_allclose(found.weights, plain.weights, rtol=1e-5)  # bfloat16 takes another way with dropout
    np.testing.assert_allclose(found.lse, plain.lse, rtol=1e-6)
    assert not np.array_equal(found.out, plain.out)


# --- weights, lse and output agree ---


@pytest.mark.parametrize("name", [name for name in rules() if name != "dropout"])
def test_weights_lse_and_output_agree(name, backend):
    q, k, v = arrays(dtype="float64")
    found = an.attention(q, k, v, **rules()[name], backend=backend, **asked(rules()[name]))
    np.testing.assert_allclose(found.weights @ v.repeat(2, 1), found.out, rtol=1e-9, atol=1e-12)
    total = found.weights.sum(-1)
    empty = ~found.weights.any(-1)
    sink = 0.5 if name == "sink" else -np.inf
    lse = getattr(found, "lse", np.where(empty, sink, 0.0))
    np.testing.assert_allclose(total[~empty], (1 - np.exp(sink - lse))[~empty], rtol=1e-9)
    assert (lse[empty] == sink).all()
    assert (found.out[empty] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_of_the_keys_merge_into_the_whole(dtype, backend):
    q, k, v = arrays(dtype=dtype)
    rules = {"mask": an.Causal() & an.SlidingWindow(100, 0), "backend": backend, "return_lse": True}
    whole = an.attention(q, k, v, query_offset=180, normalizer=an.Softmax([1.0, -1.0, 0.0, 2.0]), **rules)
    parts = [
        an.attention(q, k[:, :, a:b], v[:, :, a:b], query_offset=180, key_offset=a, **rules)
        for a, b in ((0, 3), (3, 3), (3, 120), (120, 250))
    ]
    merged = an.merge([p.out for p in parts], [p.lse for p in parts], sink=[1.0, -1.0, 0.0, 2.0])
    near = {"float64": 1e-12, "float32": 2e-6, "float16": 4e-3, "bfloat16": 4e-2}[dtype]
    np.testing.assert_allclose(merged[0].astype(float), whole.out.astype(float), atol=near)
    np.testing.assert_allclose(merged[1], whole.lse, rtol=max(near / 10, 1e-13), atol=1e-5 if near > 1e-9 else 1e-12)


def test_zero_queries_and_zero_keys(backend):
    for case in ("0 queries", "0 keys", "nothing at all", "no sequence", "sink without keys"):
        q, k, v, kwargs = BY_NAME[case].build("float32")
        found = an.attention(q, k, v, **kwargs, backend=backend, **ASKED)
        z = BY_NAME[case].sizes
        assert [x.shape for x in found] == [(z.B, z.H, z.M, z.E), (z.B, z.H, z.M), (z.B, z.H, z.M, z.N)]
        assert (found.out == 0).all()
        assert (found.lse == (0.25 if "sink" in case else -np.inf)).all()

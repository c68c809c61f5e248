"""Weights, entropy, top keys and column sums against the dense definitions on every backend; what is refused."""

import re

import numpy as np
import pytest

import attn_numba as an
from attn_numba import reference
from cases import BY_NAME, CASES, Case, additive, bilinear, dense, empty_rows, sized, slopes, square, with_

DTYPES = ("float64", "float32", "float16", "bfloat16")
NORMALIZERS = [an.Softmax, an.Sparsemax, an.Entmax15, an.DoubleSoftmax]
COUNT = 5

NAMED = [
    "plain", "1 query, 1 key", "1 keys", "1 queries", "1601 keys", "grouped heads", "layout columns", "rank 2",
    "rank 3", "Causal", "Causal, offsets by sequence", "Causal, everything in the future", "SlidingWindow, long",
    "nested masks", "Neighborhood 2-D", "BlockSparse, odd tile", "modifiers in order", "Bias, some minus infinity",
    "ALiBi, offsets", "Temperature", "scale 0", "scale negative", "sharp", "sink by sequence and head",
    "empty rows with a sink", "empty rows", "Bilinear by head, grouped heads", "Cosine", "hidden NaN between keys",
    "hidden NaN and bias", "hidden NaN and blocks, grouped heads", "dropout and causal and grouped heads",
    "old fill, divided by the size",
]  # fmt: skip


def of_each_normalizer():
    """Yield what may interact with a normalizer: empty rows, NaN that is excluded, offsets, many keys, heads."""
    for kind in NORMALIZERS:
        name = kind.__name__
        yield Case(name, sized(), with_(normalizer=kind()))
        yield Case(f"{name}, sharp", sized(), with_(normalizer=kind(), scale=4.0), amplitude=1.5)
        yield Case(f"{name}, causal, grouped heads", square(H=6, Hk=2), with_(normalizer=kind(), mask=an.Causal()))
        yield Case(f"{name}, empty rows", sized(), with_(normalizer=kind(), mask=empty_rows))
        yield Case(f"{name}, hidden NaN", sized(), with_(normalizer=kind(), mask=dense(0.6, "BN")), poison="hidden")
        yield Case(
            f"{name}, modifiers",
            square(),
            with_(normalizer=kind(), modifiers=lambda rng, z: [slopes(rng, z), an.SoftCap(3.0)], key_offset=-9),
        )
        yield Case(f"{name}, 2500 keys", sized(B=1, H=2, M=6, N=2500, D=16), with_(normalizer=kind()))
        yield Case(f"{name}, Additive", sized(), with_(normalizer=kind(), score=additive, mask=empty_rows))
        yield Case(f"{name}, Bilinear", sized(), with_(normalizer=kind(), score=bilinear()))


WHOLE = [case for case in CASES if not case.spoiled]
CHOSEN = [BY_NAME[name] for name in NAMED]
OWN = list(of_each_normalizer())


def spread(chosen, step=1):
    """Return parameters (case, dtype): the chosen ones in every dtype, all others in float32."""
    found = [(case, dtype) for case in (*chosen, *OWN) for dtype in DTYPES]
    found += [(case, "float32") for case in WHOLE[::step] if case not in chosen]
    return [pytest.param(case, dtype, id=f"{case.name}-{dtype}") for case, dtype in found]


def built(case, dtype):
    """Return q, k, and the rules of a case."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k, _, rules = case.build(dtype)
    return q, k, rules


def dense_weights(q, k, rules, **options):
    """Return the weights of `attention` in float64, whatever dtype q and k have."""
    q, k = (x.astype(np.float64) for x in (q, k))
    found = an.reference.attention(q, k, np.ones((*k.shape[:-1], 1)), **rules, **options, return_weights=True)
    return found.weights


def by_definition(weights):
    """Return entropy, column sums, and the weights in descending order, in the dtype of the weights."""
    with np.errstate(all="ignore"):
        entropy = -np.where(weights == 0, 0, weights * np.log(weights)).sum(axis=-1)
    return {"entropy": entropy, "sums": weights.sum(axis=-2), "descending": -np.sort(-weights, axis=-1)}


def assert_close(found, exact, rounded, dtype):
    """Twice the error of the reference in this dtype, and a few units in the last place, are allowed."""
    accumulator = np.float64 if dtype == "float64" else np.float32
    assert found.dtype == accumulator
    assert found.shape == exact.shape
    if found.size:
        size = max(1.0, np.abs(exact).max())
        allowed = 2 * np.abs(rounded - exact).max() + 16 * np.finfo(accumulator).eps * size
        assert np.abs(found - exact).max() <= allowed


# --- against the definitions ---


@pytest.mark.parametrize(("case", "dtype"), spread(CHOSEN))
def test_definitions(case, dtype, backend):
    q, k, rules = built(case, dtype)
    exact = dense_weights(q, k, rules)
    accumulator = "float64" if dtype == "float64" else "float32"
    rounded = dense_weights(q, k, rules, compute_dtype=accumulator).astype(accumulator)
    expected, nearly = by_definition(exact), by_definition(rounded)
    rules = {**rules, "backend": backend}

    weights = an.weights_of(q, k, **rules)
    assert_close(weights, exact, rounded, dtype)
    assert_close(an.entropy(q, k, **rules), expected["entropy"], nearly["entropy"], dtype)
    assert_close(an.column_sums(q, k, **rules), expected["sums"], nearly["sums"], dtype)

    count = min(COUNT, k.shape[-2])
    indices, largest = an.top_keys(q, k, count, **rules)
    assert indices.dtype == np.int64
    order = (-weights).argsort(axis=-1, kind="stable")[..., :count]  # what cannot be told apart by weight: by row
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(largest, np.take_along_axis(weights, order, axis=-1))
    assert_close(largest, expected["descending"][..., :count], nearly["descending"][..., :count], dtype)


@pytest.mark.parametrize("case", [case for case in CASES if case.spoiled], ids=lambda case: case.name)
def test_nan_reaches_the_rows_that_see_it_and_no_others(case, backend):
    q, k, rules = built(case, "float64")
    exact = dense_weights(q, k, rules)
    clean = np.isfinite(exact).all(axis=-1)
    assert clean.any() or "random" not in case.name
    rules = {**rules, "backend": backend}
    entropy = an.entropy(q, k, **rules)
    weights = an.weights_of(q, k, **rules)
    indices, largest = an.top_keys(q, k, COUNT, **rules)
    sums = an.column_sums(q, k, **rules)
    expected = by_definition(exact)
    np.testing.assert_array_equal(np.isfinite(entropy), clean)
    np.testing.assert_allclose(entropy[clean], expected["entropy"][clean], rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(weights[clean], exact[clean], rtol=1e-10, atol=1e-300)
    np.testing.assert_allclose(largest[clean], expected["descending"][clean][:, :COUNT], rtol=1e-10, atol=1e-300)
    assert not np.isfinite(largest[~clean][:, 0]).any()
    assert ((indices >= 0) & (indices < k.shape[-2])).all()
    seen = np.isfinite(expected["sums"])
    np.testing.assert_allclose(sums[seen], expected["sums"][seen], rtol=1e-10, atol=1e-12)
    assert not np.isfinite(sums[~seen]).any()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_excluded_nan_is_not_there(normalizer, backend):
    """What is behind the mask changes no bit."""
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 3, 20, 8)), rng.standard_normal((2, 3, 37, 8))
    rules = {"mask": an.Padding([37, 15]), "normalizer": normalizer(), "backend": backend}
    spoiled = k.copy()
    spoiled[1, :, 15:] = [np.nan, np.inf, -np.inf, 1e300] * 2
    for function in (an.weights_of, an.entropy, an.column_sums):
        np.testing.assert_array_equal(function(q, spoiled, **rules), function(q, k, **rules))
    for found, expected in zip(an.top_keys(q, spoiled, 37, **rules), an.top_keys(q, k, 37, **rules), strict=True):
        np.testing.assert_array_equal(found, expected)
    sums = an.column_sums(q, spoiled, **rules)
    np.testing.assert_allclose(sums.sum(axis=-1), 20)
    assert not sums[1, :, 15:].any()


# --- what follows from the definitions ---


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_column_sums_add_up_to_the_rows_that_see_a_key(normalizer, dtype, backend):
    q, k, rules = built(BY_NAME["empty rows"], dtype)
    sums = an.column_sums(q, k, **rules, normalizer=normalizer(), backend=backend)
    rows = an.mask_array(rules["mask"], (2, 3, 45, 70)).any(axis=-1).sum(axis=-1)
    assert (rows < 45).all()
    np.testing.assert_allclose(sums.sum(axis=-1, dtype=np.float64), rows, rtol=1e-12 if dtype == "float64" else 1e-5)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_scores_have_the_entropy_of_their_number(normalizer, dtype, backend):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k = np.zeros((40, 4)).astype(dtype), np.ones((40, 4)).astype(dtype)
    entropy = an.entropy(q, k, mask=an.Causal(), normalizer=normalizer(), backend=backend)
    np.testing.assert_allclose(entropy, np.log(np.arange(1, 41)), rtol=1e-6, atol=1e-6)
    assert abs(entropy[0]) <= 1e-7


def test_one_key_has_entropy_0(backend):
    """However large or small its score is."""
    q, k = np.array([[1e4], [-1e4], [0.0], [3.0]], np.float32), np.array([[123.0]], np.float32)
    np.testing.assert_array_equal(an.entropy(q, k, backend=backend), 0)
    np.testing.assert_array_equal(an.column_sums(q, k, backend=backend), [4])


def test_a_sink_is_no_key(backend):
    """Two keys beside a sink of the same score have a third each."""
    q, k = np.zeros((1, 2)), np.zeros((2, 2))
    rules = {"normalizer": an.Softmax(sink=0.0), "backend": backend}
    np.testing.assert_allclose(an.weights_of(q, k, **rules), [[1 / 3, 1 / 3]], rtol=1e-14)
    np.testing.assert_allclose(an.entropy(q, k, **rules), [2 / 3 * np.log(3)], rtol=1e-14)
    np.testing.assert_allclose(an.column_sums(q, k, **rules), [1 / 3, 1 / 3], rtol=1e-14)
    np.testing.assert_allclose(an.top_keys(q, k, 1, **rules).weights, [[1 / 3]], rtol=1e-14)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_dropout_changes_nothing(normalizer, backend):
    q, k, _ = built(BY_NAME["plain"], "float32")
    rules = {"normalizer": normalizer(), "query_offset": 0, "backend": backend}
    for function in (an.weights_of, an.entropy, an.column_sums):
        np.testing.assert_array_equal(
            function(q, k, **rules, dropout=an.Dropout(0.5, 3)), function(q, k, **rules), err_msg=function.__name__
        )
    dropped, whole = an.top_keys(q, k, 3, **rules, dropout=an.Dropout(0.5, 3)), an.top_keys(q, k, 3, **rules)
    np.testing.assert_array_equal(dropped.indices, whole.indices)


# --- top keys ---


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_the_lower_row(normalizer, dtype, backend):
    """Keys in groups of equal ones, 300 in all: each group comes in the order of its rows."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(0)
    group = rng.permutation(np.arange(300) % 7)
    q = np.ones((2, 5, 1)).astype(dtype)
    k = np.broadcast_to(group[:, None] / 8, (2, 300, 1)).astype(dtype)
    expected = np.lexsort((np.arange(300), -group))
    for count in (1, 10, 44, 300):
        indices, weights = an.top_keys(q, k, count, scale=0.01, normalizer=normalizer(), backend=backend)
        np.testing.assert_array_equal(indices, np.broadcast_to(expected[:count], (2, 5, count)))
        assert (np.diff(weights, axis=-1) <= 0).all()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_all_keys_in_order(normalizer, backend):
    """With a count of N come the excluded keys too, last and in order, those of queries without any key among them."""
    q, k, rules = built(BY_NAME["empty rows"], "float32")
    rules = {**rules, "normalizer": normalizer(), "backend": backend}
    indices, weights = an.top_keys(q, k, 70, **rules)
    np.testing.assert_array_equal(np.sort(indices, axis=-1), np.broadcast_to(np.arange(70), indices.shape))
    np.testing.assert_array_equal(weights, np.take_along_axis(an.weights_of(q, k, **rules), indices, axis=-1))
    np.testing.assert_array_equal(indices[:, :, ::3], np.broadcast_to(np.arange(70), indices[:, :, ::3].shape))
    for part in (weights[..., 1:] == 0) & (weights[..., :-1] == 0) & (np.diff(indices, axis=-1) < 0), weights < 0:
        assert not part.any()
    few = an.top_keys(q, k, 6, **rules)
    np.testing.assert_array_equal(few.indices, indices[..., :6])
    np.testing.assert_array_equal(few.weights, weights[..., :6])


def test_more_is_asked_for_than_has_weight(backend):
    """Keys that are not allowed come last, the lower rows first."""
    q, k = np.zeros((1, 1)), np.zeros((6, 1))
    found = an.top_keys(q, k, 5, mask=np.array([[0, 0, 1, 0, 1, 0]], bool), backend=backend)
    assert isinstance(found, an.TopKeys)
    np.testing.assert_array_equal(found.indices, [[2, 4, 0, 1, 3]])
    np.testing.assert_array_equal(found.weights, [[0.5, 0.5, 0, 0, 0]])


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 200, 2500])
@pytest.mark.parametrize("normalizer", [an.Softmax, an.Entmax15])
def test_counts(count, normalizer, backend):
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((1, 2, 3, 16)).astype("f4"), rng.standard_normal((1, 2, 2500, 16)).astype("f4")
    rules = {"normalizer": normalizer(), "backend": backend}
    indices, weights = an.top_keys(q, k, np.int32(count), **rules)
    assert indices.shape == weights.shape == (1, 2, 3, count)
    assert (indices.dtype, weights.dtype) == (np.int64, np.float32)
    whole = an.weights_of(q, k, **rules)
    order = (-whole).argsort(axis=-1, kind="stable")[..., :count]
    np.testing.assert_array_equal(indices, order)
    np.testing.assert_array_equal(weights, np.take_along_axis(whole, order, axis=-1))


# --- shapes ---


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_ranks(rank, backend):
    rng = np.random.default_rng(0)
    q, k = (rng.standard_normal(shape)[(0,) * (4 - rank)] for shape in ((2, 4, 5, 3), (2, 2, 7, 3)))
    lead = (2, 4)[4 - rank :] if rank > 2 else ()
    assert an.weights_of(q, k, backend=backend).shape == (*lead, 5, 7)
    assert an.weights_of(q, k, rows=slice(1, 3), backend=backend).shape == (*lead, 2, 7)
    assert an.entropy(q, k, backend=backend).shape == (*lead, 5)
    assert [x.shape for x in an.top_keys(q, k, 2, backend=backend)] == [(*lead, 5, 2)] * 2
    assert an.column_sums(q, k, backend=backend).shape == (*lead, 7)


@pytest.mark.parametrize(("B", "M", "N"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_nothing_to_explain(B, M, N, normalizer, backend):
    q, k = np.zeros((B, 2, M, 5), np.float32), np.zeros((B, 2, N, 5), np.float32)
    rules = {"normalizer": normalizer(), "backend": backend}
    assert an.weights_of(q, k, **rules).shape == (B, 2, M, N)
    for found, shape in (
        (an.entropy(q, k, **rules), (B, 2, M)),
        (an.column_sums(q, k, **rules), (B, 2, N)),
        (an.top_keys(q, k, N, **rules).weights, (B, 2, M, N)),
        (an.top_keys(q, k, 0, **rules).indices, (B, 2, M, 0)),
    ):
        assert found.shape == shape
        assert not found.any()


SLICES = [
    None, slice(None), slice(0, 1), slice(3, 9), slice(-1, None), slice(40, 1000), slice(20, 3), slice(None, None, 7),
    slice(5, None, 64), slice(1, 100, 65), slice(2, -2, 2), slice(np.int64(8), np.int64(9)),
]  # fmt: skip


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("rows", SLICES, ids=str)
def test_rows(rows, normalizer, backend):
    """A query has the same weights, bit by bit, whichever others are asked for."""
    rng = np.random.default_rng(2)
    q, k = rng.standard_normal((2, 4, 100, 16)).astype("f4"), rng.standard_normal((2, 2, 100, 16)).astype("f4")
    rules = {
        "mask": an.Causal() | (rng.random((100, 100)) < 0.2), "modifiers": [an.ALiBi([0.1, 0.2, 0.3, 0.4])],
        "normalizer": normalizer(), "key_offset": 4, "backend": backend,
    }  # fmt: skip
    whole = an.weights_of(q, k, **rules)
    np.testing.assert_array_equal(an.weights_of(q, k, rows=rows, **rules), whole[:, :, rows or slice(None)])


# --- how arrays lie in memory, threads ---


def all_of(q, k, **rules):
    """Return all that there is to know, one array after the other."""
    yield an.weights_of(q, k, **rules)
    yield an.weights_of(q, k, rows=slice(1, None, 3), **rules)
    yield an.entropy(q, k, **rules)
    yield from an.top_keys(q, k, COUNT, **rules)
    yield an.column_sums(q, k, **rules)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("layout", ["swapped", "reversed", "spaced", "columns", "shared"])
def test_layouts(layout, normalizer, backend):
    """Neither strides nor the byte order change a bit, and inputs are left as they are."""
    case = Case(f"layout {layout}", sized(D=24), with_(mask=dense(0.7)), layout=layout)
    q, k, rules = built(case, "float32")
    rules |= {"normalizer": normalizer(), "backend": backend}
    before = q.copy(), k.copy()
    expected = list(all_of(*map(np.ascontiguousarray, before), **rules))
    for arrays in ((q, k), tuple(x.astype(x.dtype.newbyteorder()) for x in (q, k))):
        for found, same in zip(all_of(*arrays, **rules), expected, strict=True):
            np.testing.assert_array_equal(found, same)
    for array, copy in zip((q, k), before, strict=True):
        np.testing.assert_array_equal(array, copy)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_threads(normalizer, backend):
    rng = np.random.default_rng(3)
    q, k = rng.standard_normal((2, 3, 150, 16)).astype("f4"), rng.standard_normal((2, 3, 400, 16)).astype("f4")
    rules = {"mask": an.Causal(), "query_offset": 250, "normalizer": normalizer(), "backend": backend}
    with an.threads(1):
        expected = list(all_of(q, k, **rules))
    with an.threads(2):
        for found, same in zip(all_of(q, k, **rules), expected, strict=True):
            np.testing.assert_array_equal(found, same)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_a_sequence_alone_and_among_others(normalizer, backend):
    rng = np.random.default_rng(4)
    q, k = rng.standard_normal((3, 2, 50, 16)).astype("f4"), rng.standard_normal((3, 2, 90, 16)).astype("f4")
    rules = {"normalizer": normalizer(), "backend": backend}
    for found, among in zip(all_of(q[1:2], k[1:2], **rules), all_of(q, k, **rules), strict=True):
        np.testing.assert_array_equal(found[0], among[1])


# --- what is refused ---


class Elsewhere:
    """An array on a GPU, as far as a glance tells."""

    shape = (2, 4, 6, 8)
    __cuda_array_interface__ = {"shape": shape, "typestr": "<f4", "data": (0, False), "version": 3}  # noqa: RUF012


Q, K = np.zeros((2, 4, 6, 8), np.float32), np.zeros((2, 2, 9, 8), np.float32)
FUNCTIONS = {
    "weights_of": an.weights_of,
    "entropy": an.entropy,
    "top_keys": lambda q, k, **rules: an.top_keys(q, k, 1, **rules),
    "column_sums": an.column_sums,
}
REFUSED = {
    "q is a list": (([[1.0]], K), {}, TypeError, "q is list; needed an array"),
    "k of integers": ((Q, K.astype(int)), {}, TypeError, "k has dtype int64; needed float64, float32, float16 or"),
    "dtypes differ": ((Q, K.astype("f8")), {}, TypeError, "k has dtype float64; q has float32"),
    "k of another size": ((Q, K[..., :5]), {}, ValueError, "k has head size 5; q has 8"),
    "heads": ((Q[:, :3], K), {}, ValueError, "k has 2 heads; q has 3, not a multiple of 2"),
    "sequences": ((Q[:1], K), {}, ValueError, "k has 2 sequences; q has 1"),
    "axes": ((Q[0, 0, 0], K), {}, ValueError, "q has 1 axes, shape (8,); needed 2 to 4"),
    "a float mask": ((Q, K), {"mask": np.zeros((6, 9))}, TypeError, "modifiers=Bias(m)"),
    "a mask of another shape": ((Q, K), {"mask": np.ones((6, 8), bool)}, ValueError, "shape (6, 8)"),
    "no query offset": ((Q, K), {"mask": an.Causal()}, ValueError, "query_offset is None, but Causal uses positions"),
    "dropout": ((Q, K), {"dropout": 0.1}, TypeError, "dropout is float; needed Dropout(rate, seed)"),
    "dropout without an offset": ((Q, K), {"dropout": an.Dropout(0.1, 1)}, ValueError, "Dropout uses positions"),
    "score": ((Q, K), {"score": "dot"}, TypeError, "score is str; needed Dot()"),
    "normalizer": ((Q, K), {"normalizer": an.Softmax}, TypeError, "normalizer is the class Softmax"),
    "scale": ((Q, K), {"scale": np.nan}, ValueError, "scale is NaN"),
    "backend": ((Q, K), {"backend": "gpu"}, ValueError, "backend is 'gpu'; needed one of"),
    "cuda": ((Q, K), {"backend": "cuda"}, NotImplementedError, "run on 'cpu' and 'reference'"),
    "on a device": ((Elsewhere(), Elsewhere()), {}, NotImplementedError, "backend 'cuda' cannot run"),
    "in two places": ((Q, Elsewhere()), {}, TypeError, "q, k are in different places: q on a host, k on a GPU"),
    "values": ((Q, K, K), {}, TypeError, "positional argument"),
    "unknown": ((Q, K), {"causal": True}, TypeError, "unexpected keyword argument 'causal'"),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, function):
    arrays, rules, kind, message = REFUSED[name]
    with pytest.raises(kind, match=re.escape(message)):
        FUNCTIONS[function](*arrays, **rules)


@pytest.mark.parametrize(
    ("count", "kind", "message"),
    [
        (-1, ValueError, "top_keys: count is -1; needed 0 to 9, the number of keys"),
        (10, ValueError, "top_keys: count is 10; needed 0 to 9, the number of keys"),
        (2.0, TypeError, "top_keys: count is float; needed an integer"),
        (True, TypeError, "top_keys: count is True; needed an integer"),
        (None, TypeError, "top_keys: count is NoneType; needed an integer"),
    ],
)
def test_refused_counts(count, kind, message, backend):
    with pytest.raises(kind, match=re.escape(message)):
        an.top_keys(Q, K, count, backend=backend)
    with pytest.raises(kind, match=re.escape(message)):
        reference.top_keys(Q, K, count)


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        (3, TypeError, "rows is int; needed a slice of query rows, such as slice(0, 10), or None"),
        (range(3), TypeError, "rows is range; needed a slice"),
        ([0, 1], TypeError, "rows is list; needed a slice"),
        (slice(0, 2.0), TypeError, "rows: stop is float; needed an integer"),
        (slice(False, 2), TypeError, "rows: start is False; needed an integer"),
        (slice(0, 4, 0), ValueError, "rows: step is 0; needed at least 1"),
        (slice(4, 0, -1), ValueError, "rows: step is -1; needed at least 1"),
    ],
)
def test_refused_rows(rows, kind, message, backend):
    with pytest.raises(kind, match=re.escape(message)):
        an.weights_of(Q, K, rows=rows, backend=backend)
    with pytest.raises(kind, match=re.escape(message)):
        reference.weights_of(Q, K, rows=rows)

"""`merge`: it agrees with the reference's, and with one call over all keys."""

import itertools

import numpy as np
import pytest

import attn_numba as an

MERGES = {"public": an.merge, "reference": an.reference.merge}
SINKS = {"none": None, "scalar": (), "(H,)": (3,), "(B, H)": (2, 3), "(B, 1)": (2, 1)}


def parts(rng, count, shape, dtype=np.float64):
    """Random results of parts; some rows see no key in some parts, row 0 in none."""
    outs, lses = [], []
    for _ in range(count):
        lse = rng.uniform(-30, 30, shape[:-1])
        lse[rng.random(lse.shape) < 0.3] = -np.inf
        lse[..., :1] = -np.inf
        out = rng.standard_normal(shape)
        out[lse == -np.inf] = rng.choice([0.0, np.nan, np.inf])  # what an empty part holds is nothing
        outs.append(out.astype(dtype))
        lses.append(lse.astype(np.float64 if dtype == np.float64 else np.float32))
    return outs, lses


@pytest.mark.parametrize("sink_name", SINKS)
@pytest.mark.parametrize("shape", [(5, 4), (3, 5, 4), (2, 3, 5, 4), (2, 3, 0, 4), (0, 4)])
def test_agrees_with_the_reference(shape, sink_name):
    rng = np.random.default_rng(len(shape))
    sizes = (1,) * (4 - len(shape)) + shape
    sink = SINKS[sink_name]
    if sink is not None:
        sink = rng.uniform(-5, 5, [min(n, size) for n, size in zip(sink, sizes[2 - len(sink) : 2], strict=True)])
    for count, dtype in itertools.product((1, 2, 5), (np.float64, np.float32, np.float16)):
        outs, lses = parts(rng, count, shape, dtype)
        out, lse = an.merge(outs, lses, sink=sink)
        expected, expected_lse = an.reference.merge(outs, lses, sink=sink)
        assert out.shape == expected.shape == shape
        assert lse.shape == expected_lse.shape == shape[:-1]
        assert out.dtype == expected.dtype == dtype
        assert lse.dtype == expected_lse.dtype == lses[0].dtype
        eps = np.finfo(dtype).eps
        np.testing.assert_allclose(out, expected, rtol=64 * eps, atol=64 * eps)
        np.testing.assert_allclose(lse, expected_lse, rtol=64 * np.finfo(lse.dtype).eps)
        empty = np.all([x == -np.inf for x in lses], axis=0)
        assert not out[empty].any()
        if sink is None:
            assert (lse[empty] == -np.inf).all()


@pytest.mark.parametrize("shape", [(7, 4), (3, 7, 4), (2, 3, 7, 4)])
@pytest.mark.parametrize("sink", [None, 0.5, "(B, H)"])
def test_parts_of_a_call_make_the_whole(shape, sink):
    """With a part of no keys, and with queries that see no key."""
    rng = np.random.default_rng(3)
    sizes = (1,) * (4 - len(shape)) + shape
    sink = rng.standard_normal(sizes[:2]) if sink == "(B, H)" else sink
    q, k, v = (rng.standard_normal((*shape[:-2], n, shape[-1])) for n in (7, 20, 20))
    rules = {"mask": an.SlidingWindow(3, 0), "modifiers": an.SoftCap(5.0), "query_offset": -2}
    found = []
    for first, end in itertools.pairwise((0, 0, 6, 7, 20)):
        piece = np.s_[..., first:end, :]
        found.append(an.attention(q, k[piece], v[piece], key_offset=first, return_lse=True, **rules))
    out, lse = an.merge([x.out for x in found], [x.lse for x in found], sink=sink)
    whole = an.attention(q, k, v, normalizer=an.Softmax(sink), return_lse=True, **rules)
    np.testing.assert_allclose(out, whole.out, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(lse, whole.lse, rtol=1e-12)
    assert not out[..., :2, :].any()


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
def test_nan_that_is_seen_stays(merge):
    """However little a part weighs, a NaN in it is seen; infinity is, too, as infinity or NaN."""
    outs = [np.array([[1.0, 2.0]]), np.array([[np.nan, 3.0]])]
    out, lse = merge(outs, [np.array([0.0]), np.array([-2000.0])])
    np.testing.assert_array_equal(out, [[np.nan, 2.0]])
    np.testing.assert_array_equal(lse, [0.0])
    out, lse = merge(outs, [np.array([np.nan]), np.array([0.0])])
    assert np.isnan(out).all()
    assert np.isnan(lse).all()


def test_parts_are_not_written():
    outs, lses = parts(np.random.default_rng(0), 3, (2, 3, 5, 4))
    for array in (*outs, *lses):
        array.flags.writeable = False
    an.merge(outs, lses, sink=1.0)
    an.merge(outs[:1], lses[:1])


def test_iterators_and_lists_are_parts():
    outs, lses = parts(np.random.default_rng(1), 2, (5, 4))
    expected = an.merge(outs, lses)
    found = an.merge(iter(outs), (x.tolist() for x in lses))
    np.testing.assert_array_equal(found.out, expected.out)
    np.testing.assert_array_equal(found.lse, expected.lse)


ONE = np.ones((2, 3)), np.ones(2)
REFUSED = {
    "no part": ([], [], None, ValueError, "outs has 0 parts, lses 0; needed as many of each, at least one"),
    "unequal": ([ONE[0]], [ONE[1]] * 2, None, ValueError, "outs has 1 parts, lses 2"),
    "one axis": ([np.ones(3)], [np.ones(())], None, ValueError, r"outs\[0\] has shape \(3,\); needed \(B, H, M, E\)"),
    "five axes": ([np.ones((1, 1, 1, 2, 3))], [np.ones((1, 1, 1, 2))], None, ValueError, r"needed \(B, H, M, E\)"),
    "shapes": ([ONE[0], np.ones((2, 4))], [ONE[1]] * 2, None, ValueError, r"outs\[1\] has shape \(2, 4\); outs\[0\]"),
    "rows": ([ONE[0]], [np.ones((1, 2))], None, ValueError, r"lses\[0\] has shape \(1, 2\); needed \(2,\)"),
    "integers": ([ONE[0].astype(int)], [ONE[1]], None, TypeError, r"outs\[0\] has dtype int64; needed float64"),
    "words": ([ONE[0]], ["x"], None, TypeError, r"lses\[0\] is str"),
    "dtypes": ([ONE[0], ONE[0].astype("f4")], [ONE[1]] * 2, None, TypeError, r"outs\[1\] has dtype float32"),
    "sink's shape": ([ONE[0]], [ONE[1]], np.ones(2), ValueError, r"sink has shape \(2,\); .* \(B, H\) = \(1, 1\)"),
    "sink's axes": ([ONE[0]], [ONE[1]], np.ones((1, 1, 2)), ValueError, "sink has shape"),
    "sink's kind": ([ONE[0]], [ONE[1]], "1", TypeError, "sink is str"),
    "sink is NaN": ([ONE[0]], [ONE[1]], np.nan, ValueError, "sink holds NaN"),
}


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, merge):
    outs, lses, sink, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        merge(outs, lses, sink=sink)

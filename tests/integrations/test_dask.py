"""Attention over Dask arrays: equal to one call on every scheduler, no task without need, and lost parts made again."""

from __future__ import annotations

import itertools
import os
import signal
import time

import numpy as np
import pytest

pytest.importorskip("dask.array", reason="dask is not installed; it belongs to the extra dask")

import dask
import dask.array as da

import attn_numba as an
import cases
from dask_checks import after_the_gate, in_a_task_of_four_cores
from processes import run_python

TOLERANCE = {"float64": 1e-13, "float32": 3e-6}
LONG = (1, 1, 1024, 8)


def cut(length: int, pieces: int) -> tuple[int, ...]:
    """Uneven chunks that make up a length."""
    ends = sorted({0, length, *(min(length, length * n // pieces + n % 2) for n in range(1, pieces))})
    return tuple(b - a for a, b in itertools.pairwise(ends)) or (0,)


def chunked(q, k, v, whole_rows=False):
    """Return dask arrays of uneven chunks along all axes, those of k and v others than those of q."""

    def chunks(shape, pieces):
        return tuple(cut(n, p) for n, p in zip(shape, pieces[4 - len(shape) :], strict=True))

    rows = 1 if whole_rows else 3
    return (
        da.from_array(q, chunks=chunks(q.shape, (2, 3, 3, 2))),
        da.from_array(k, chunks=chunks(k.shape, (1, 2, rows, 1))),
        da.from_array(v, chunks=chunks(v.shape, (2, 1, 1, 2))),
    )


def close(found, expected, dtype="float64", lse=0.0):
    """Whether results agree, to the tolerance of their dtype times the largest number; not finite ones in places.

    Parts are weighed by exponentials of their lse, so where `lse` is large its rounding shows.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(found), finite)
    largest = np.abs(lse, where=np.isfinite(lse), out=np.zeros(np.shape(lse))).max(initial=0)
    atol = TOLERANCE[dtype] * max(1.0, np.abs(expected[finite]).max(initial=0)) * max(1.0, largest / 100)
    np.testing.assert_allclose(found[finite], expected[finite], rtol=0, atol=atol)


def arrays(B=2, H=4, Hk=2, M=50, N=50, D=16, E=8, dtype="float64"):
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype(dtype) for shape in ((B, H, M, D), (B, Hk, N, D), (B, Hk, N, E))]


def parts(array, what="attention-part"):
    """How many tasks of a kind a graph has."""
    return sum(isinstance(key, tuple) and key[0].startswith(what) for key in array.dask)


# --- equal to one call ---


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_every_case(case):
    """What blocks are given of every rule, in every combination, is right: the reference computes them."""
    q, k, v, rules = case.build()
    streams = isinstance(rules.get("normalizer"), an.Softmax | None)
    given = chunked(q, k, v, whole_rows=not streams)
    options = {**rules, "backend": "reference", "return_lse": streams}
    with np.errstate(all="ignore"):
        expected = an.attention(q, k, v, **options)
        found = dask.compute(an.dask.attention(*given, **options, split_every=2), scheduler="synchronous")[0]
    if streams:
        close(found.out, expected.out, lse=expected.lse)
        close(found.lse, expected.lse)
    else:
        close(found, expected)


CALLS = {
    "plain": {},
    "causal": {"mask": an.Causal()},
    "window": {"mask": an.SlidingWindow(9, 2)},
    "window, sink": {"mask": an.SlidingWindow(6, 0), "normalizer": an.Softmax([0.5, 1.0, -1.0, 3.0])},
    "offsets": {"mask": an.Causal(), "query_offset": np.array([3, -20]), "key_offset": np.array([-4, 5])},
    "padding": {"mask": an.Causal() & an.Padding([41, 7])},
    "documents": {"mask": an.SameDocument(np.arange(50) // 9)},
    "prefix": {"mask": an.PrefixLM([8, 30])},
    "neighborhood": {"mask": an.Neighborhood((5, 10), (3, 5))},
    "blocks": {"mask": an.BlockSparse(np.random.default_rng(1).random((4, 7, 7)) < 0.4, 8)},
    "array": {"mask": np.random.default_rng(2).random((2, 1, 50, 50)) < 0.3},
    "function": {"mask": an.CustomMask(lambda b, h, i, j, p: (i + h - j) % p[0] <= b, (3,))},
    "modifiers": {"modifiers": [an.ALiBi([0.1, 0.2, 0.3, 0.4]), an.SoftCap(3.0)], "mask": an.Causal()},
    "bias": {"modifiers": an.Bias(np.random.default_rng(3).standard_normal((4, 50, 50)))},
    "span": {"modifiers": an.AdaptiveSpan(np.arange(4.0)[:, None] * 3, 5)},
    "dropout": {"dropout": an.Dropout(0.4, 3)},
    "cosine": {"score": an.Cosine(), "scale": 7.0, "mask": an.Causal()},
}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CALLS)
def test_the_kernels_compute_the_parts(name, dtype):
    q, k, v = arrays(dtype=dtype)
    expected = an.attention(q, k, v, **CALLS[name], return_lse=True)
    found = dask.compute(an.dask.attention(*chunked(q, k, v), **CALLS[name], return_lse=True), scheduler="threads")[0]
    close(found.out, expected.out, dtype)
    close(found.lse, expected.lse, dtype)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes(dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
        from ml_dtypes import bfloat16 as dtype
    q, k, v = (x.astype(dtype) for x in arrays())
    exact = an.attention(*(x.astype(float) for x in (q, k, v)), mask=an.Causal())
    found = an.dask.attention(*chunked(q, k, v), mask=an.Causal())
    assert found.dtype == dtype
    errors = [np.abs(x.astype(float) - exact).max() for x in (found.compute(), an.attention(q, k, v, mask=an.Causal()))]
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("normalizer", [an.Sparsemax(), an.Entmax15(), an.DoubleSoftmax()], ids=repr)
def test_other_normalizers_take_all_keys_at_once(normalizer):
    q, k, v = arrays()
    expected = an.attention(q, k, v, mask=an.Causal(), normalizer=normalizer)
    whole = chunked(q, k, v, whole_rows=True)
    close(an.dask.attention(*whole, mask=an.Causal(), normalizer=normalizer).compute(), expected)
    name = type(normalizer).__name__
    with pytest.raises(ValueError, match=rf"normalizer is {name}.* k has 3 chunks.*one chunk: k.rechunk\(\{{2: -1\}}"):
        an.dask.attention(*chunked(q, k, v), normalizer=normalizer)


@pytest.mark.parametrize("heads", [(8,), (1,) * 8, (2, 2, 2, 2), (3, 3, 2), (5, 3), (4, 4), (1, 7)], ids=str)
@pytest.mark.parametrize("key_heads", [(2,), (1, 1)], ids=str)
def test_chunks_of_heads_that_do_not_fit_are_made_to(heads, key_heads):
    q, k, v = arrays(H=8, Hk=2, M=9, N=11)
    given = [da.from_array(x, chunks=(1, n, 5, 8)) for x, n in ((q, heads), (k, key_heads), (v, 1))]
    modifiers = an.ALiBi(np.arange(8) / 8)
    found = an.dask.attention(*given, modifiers=modifiers, query_offset=1, backend="reference")
    close(found.compute(), an.attention(q, k, v, modifiers=modifiers, query_offset=1, backend="reference"))
    assert set(np.cumsum(heads)) <= set(np.cumsum(found.chunks[1]))


@pytest.mark.parametrize("rank", [2, 3])
def test_missing_axes_count_as_one(rank):
    q, k, v = (x[0, 0] if rank == 2 else x[0] for x in arrays())
    found = an.dask.attention(*chunked(q, k, v), mask=an.Causal(), return_lse=True)
    expected = an.attention(q, k, v, mask=an.Causal(), return_lse=True)
    close(found.out.compute(), expected.out)
    close(found.lse.compute(), expected.lse)


def test_empty_chunks_and_sizes():
    q, k, v = arrays(B=1)
    some = (da.from_array(q, chunks=(1, 4, (0, 20, 0, 30), 16)), *(
        da.from_array(x, chunks=(1, 2, (10, 0, 40), 16)) for x in (k, v)
    ))  # fmt: skip
    close(an.dask.attention(*some, mask=an.Causal()).compute(), an.attention(q, k, v, mask=an.Causal()))
    for M, N in ((0, 50), (50, 0), (0, 0)):
        inputs = q[:, :, :M], k[:, :, :N], v[:, :, :N]
        found = an.dask.attention(*map(da.from_array, inputs), normalizer=an.Softmax(0.25), return_lse=True)
        expected = an.attention(*inputs, normalizer=an.Softmax(0.25), return_lse=True)
        close(found.out.compute(), expected.out)
        close(found.lse.compute(), expected.lse)


def test_hidden_numbers_reach_nothing():
    q, k, v = arrays()
    k[:, :, 30:], v[:, :, 30:] = np.nan, np.inf
    found = an.dask.attention(*chunked(q, k, v), mask=an.Padding(30)).compute()
    close(found, an.attention(q, k, v, mask=an.Padding(30)))
    assert np.isfinite(found).all()


# --- the graph ---


def test_a_causal_graph_holds_visible_pairs_only():
    x = da.zeros(LONG, chunks=(1, 1, 128, 8))
    assert parts(an.dask.attention(x, x, x)) == 64
    assert parts(an.dask.attention(x, x, x, mask=an.Causal())) == 8 * 9 // 2
    assert parts(an.dask.attention(x, x, x, mask=~an.Causal())) == 8 * 9 // 2
    assert parts(an.dask.attention(x, x, x, mask=an.Causal(), query_offset=512)) == 5 + 6 + 7 + 5 * 8


@pytest.mark.parametrize(
    ("mask", "pairs"),
    [
        (an.SlidingWindow(127, 0), 8 + 7),
        (an.SlidingWindow(128, 0), 8 + 7),
        (an.SlidingWindow(129, 0), 8 + 7 + 6),
        (an.SlidingWindow(0, 1), 8 + 7),
        (an.SlidingWindow(0, 0), 8),
        (an.Causal() & an.SlidingWindow(200, 200), 8 + 7 + 6),
        (an.SameDocument(np.arange(1024) // 256), 4 * 4),
        (an.Padding(300), 8 * 3),
        (an.Causal() & an.Padding(300), 1 + 2 + 6 * 3),
        (an.PrefixLM(200), 8 * 2 + 6 * 7 // 2),
        (an.BlockSparse(np.eye(4, dtype=bool), 256), 4 * 4),
        (np.eye(1024, dtype=bool), 8),
    ],
    ids=str,
)
def test_graphs_of_other_masks_hold_visible_pairs_only(mask, pairs):
    x = da.zeros(LONG, chunks=(1, 1, 128, 8))
    found = an.dask.attention(x, x, x, mask=mask)
    assert parts(found) == pairs
    array = an.mask_array(mask, (1, 1, 1024, 1024))[0, 0].reshape(8, 128, 8, 128)
    assert pairs == array.any(axis=(1, 3)).sum()


def test_modifiers_that_exclude_leave_pairs_out_too():
    x = da.zeros(LONG, chunks=(1, 1, 128, 8))
    assert parts(an.dask.attention(x, x, x, modifiers=an.AdaptiveSpan(50, 40))) == 8 + 7 + 7
    excluded = np.where(np.eye(8).repeat(128, 0).repeat(128, 1) > 0, 0.0, -np.inf)
    assert parts(an.dask.attention(x, x, x, modifiers=an.Bias(excluded))) == 8


def test_each_sequence_and_head_has_its_own_pairs():
    x = da.zeros((2, 2, 1024, 8), chunks=(1, 1, 128, 8))
    assert parts(an.dask.attention(x, x, x, mask=an.Padding([128, 1024]))) == 2 * (8 + 64)


def test_partial_results_are_merged_as_a_tree():
    x = da.zeros(LONG, chunks=(1, 1, (1024,), 8))
    keys = x.rechunk((1, 1, 32, 8))
    found = an.dask.attention(x, keys, keys, split_every=4)
    assert parts(found) == 32
    assert parts(found, "attention-merge") == 8 + 2
    widest = max(len(dask.core.get_dependencies(dict(found.dask), key)) for key in found.dask)
    assert widest == 4


def test_nothing_is_computed_before_it_is_asked_for():
    def never(block):
        raise RuntimeError("computed")

    x = da.zeros((1, 1, 64, 8), chunks=(1, 1, 16, 8)).map_blocks(never, dtype=float, meta=np.empty((0,) * 4))
    found = an.dask.attention(x, x, x, mask=an.Causal(), return_lse=True)
    assert found.out.chunks == x.chunks
    assert found.lse.chunks == x.chunks[:3]
    with pytest.raises(RuntimeError, match="computed"):
        found.out.compute()


def test_equal_calls_have_equal_names():
    x, mask = da.zeros(LONG, chunks=(1, 1, 128, 8)), an.Causal() & an.Padding(900)
    names = [an.dask.attention(x, x, x, mask=m, scale=s).name for m, s in ((mask, 1), (mask, 1), (None, 1), (mask, 2))]
    assert names[0] == names[1]
    assert len(set(names)) == 3


def test_what_its_owner_changes_later_changes_nothing():
    q, k, v = arrays()
    mask = np.tri(50, dtype=bool)
    before = [x.copy() for x in (q, k, v, mask)]
    found = an.dask.attention(*chunked(q, k, v), mask=mask)
    expected = an.attention(q, k, v, mask=mask)
    mask[...] = True
    close(found.compute(), expected)
    mask[...] = before[3]
    for now, then in zip((q, k, v, mask), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_results_go_on_as_dask_arrays():
    q, k, v = arrays()
    out = an.dask.attention(*chunked(q, k, v), mask=an.Causal())
    close((out.sum(axis=2)[:, 1] * 2).compute(), an.attention(q, k, v, mask=an.Causal()).sum(axis=2)[:, 1] * 2)


# --- what is refused ---


def unknown(x):
    return x[:, :, da.from_array(np.ones(50, bool), chunks=25)]


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda q, k, v: (np.zeros((1, 1, 4, 4)), k, v), {}, TypeError, r"q is ndarray; needed a Dask array"),
        (lambda q, k, v: (q, k, [1.0]), {}, TypeError, "v is list; needed a Dask array"),
        (lambda q, k, v: (q, unknown(k), v), {}, ValueError, "k has chunks of unknown size along axis 2; needed known"),
        (None, {"mask": da.ones((50, 50), dtype=bool)}, TypeError, "mask is a Dask Array; needed a rule or NumPy"),
        (None, {"query_offset": da.zeros(2, dtype=int)}, TypeError, "query_offset is a Dask Array"),
        (None, {"split_every": 1}, ValueError, "split_every is 1; needed at least 2"),
        (None, {"split_every": 2.5}, TypeError, "split_every is float"),
        (None, {"backend": "gpu"}, ValueError, "backend is 'gpu'"),
        (None, {"mask": an.Padding([1, 2, 3])}, ValueError, "Padding"),
        (None, {"normalizer": an.Softmax(np.zeros(3))}, ValueError, "sink has shape"),
        (lambda q, k, v: (q, k[:, :, :20], v[:, :, :20]), {"mask": an.Causal()}, ValueError, "query_offset is None"),
        (lambda q, k, v: (q, k[..., :3], v), {}, ValueError, "k has head size 3; q has 16"),
        (lambda q, k, v: (q.astype(int), k, v), {}, TypeError, "q has dtype int64"),
        (lambda q, k, v: (q.astype("f4"), k, v), {}, TypeError, "one dtype for all three"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_runs(change, options, error, message):
    given = chunked(*arrays())
    with pytest.raises(error, match=message):
        an.dask.attention(*(change(*given) if change else given), **options)


def test_rules_of_unknown_classes_are_refused():
    class Odd(an.rules.Mask):
        @staticmethod
        def allowed(b, h, i, j, p):
            return (i + j) % 2 == 1

    with pytest.raises(NotImplementedError, match="Odd cannot be cut into blocks"):
        an.dask.attention(*chunked(*arrays()), mask=Odd())


def test_without_dask_the_cure_is_named():
    code = (
        "import sys\nsys.modules['dask'] = None\nimport attn_numba as an\ntry:\n    an.dask\nexcept ImportError as e:\n"
    )
    printed = run_python(code + "    print(type(e).__name__, e)")
    assert printed == (
        "ModuleNotFoundError attn_numba.dask needs dask.array, which is not installed: pip install 'attn-numba[dask]'\n"
    )


# --- several processes ---


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """Two workers, each a process with one thread."""
    distributed = pytest.importorskip(
        "distributed", reason="distributed is not installed; it belongs to the extra dask"
    )
    folder = tmp_path_factory.mktemp("workers")
    with (
        distributed.LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0", local_directory=str(folder)
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


@pytest.mark.parametrize("name", ["causal", "window, sink", "padding", "function", "bias", "dropout"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_on_workers_of_distributed(client, name, dtype):
    q, k, v = arrays(dtype=dtype)
    expected = an.attention(q, k, v, **CALLS[name], return_lse=True)
    found = client.gather(client.compute([*an.dask.attention(*chunked(q, k, v), **CALLS[name], return_lse=True)]))
    close(found[0], expected.out, dtype)
    close(found[1], expected.lse, dtype)


def test_a_worker_of_distributed_computes_with_one_thread(client):
    from attn_numba.parallel import thread_count

    assert {count for count, _ in client.run(thread_count).values()} == {1}  # the nanny has told it
    told = client.submit(in_a_task_of_four_cores, pure=False).result(timeout=60)
    assert told == (1, "a task of Dask")


def test_what_a_killed_worker_had_is_computed_again(client, tmp_path):
    """Killed in the middle: the last keys come only after it, and some of the results that it had are needed then."""
    q, k, v = arrays(B=1, H=1, Hk=1, M=512, N=512)
    expected = an.attention(q, k, v, mask=an.SlidingWindow(-1, -1), return_lse=True)
    gate = tmp_path / "gate"
    qd, kd, vd = (da.from_array(x, chunks=(1, 1, 64, x.shape[-1])) for x in (q, k, v))
    late = kd.map_blocks(after_the_gate, str(gate), dtype=k.dtype, meta=np.empty((0,) * 4))
    out, lse = client.compute([*an.dask.attention(qd, late, vd, return_lse=True, split_every=16)])
    pids, victim, held = client.run(os.getpid), None, []
    try:
        until = time.monotonic() + 50
        while len(held) < 4:
            assert time.monotonic() < until, "no worker has results"
            time.sleep(0.02)
            for address, keys in client.has_what().items():
                some = [key for key in keys if "attention-part" in str(key)]
                if len(some) >= 4:
                    victim, held = address, some
        os.kill(pids[victim], signal.SIGKILL)
        while victim in client.scheduler_info()["workers"]:
            assert time.monotonic() < until, "the scheduler has not noticed"
            time.sleep(0.02)
        assert out.status == lse.status == "pending"
    finally:
        gate.touch()
    close(out.result(timeout=60), expected.out)
    close(lse.result(timeout=60), expected.lse)
    assert pids[victim] not in client.run(os.getpid).values()

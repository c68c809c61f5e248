"""The CUDA backend on a card: what the tests of all backends do not ask.

Those run on the card too (`pytest -m gpu` takes them): every case and every random call with arrays of the host. Here:
which kernel served a call, sizes of many tiles, arrays that live on the card, streams, bits, memory.
"""

import contextlib
import threading
import time
from functools import partial

import numpy as np
import pytest

import attn_numba as an
from attn_numba.comparison import agreement, rounding_dtype
from attn_numba.reference import attention as reference_attention
from attn_numba.testing import check_attention
from attn_numba.workloads import named_dtype
from cases import BY_NAME
from device import libraries, library, same

AVAILABLE, REASON = an.backends()["cuda"]
if not AVAILABLE:
    pytest.skip(f"backend 'cuda' cannot run: {REASON}", allow_module_level=True)
pytestmark = pytest.mark.gpu
launches = pytest.importorskip("launches", reason="the folder benchmarks is not beside the tests")
from card import CLOSE, relative_error  # noqa: E402

DTYPES = ("bfloat16", "float16", "float32", "float64")
LIBRARIES = libraries()


def capability():
    from attn_numba.gpu import driver

    return driver.card(0).capability


def torch_on_card():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch does not see the card")
    return torch


def numbers(seed, dtype, *shapes):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32).astype(named_dtype(dtype)) for shape in shapes]


def qkv(dtype, B=1, H=4, Hk=2, M=300, N=300, D=64, E=None, seed=0):
    return numbers(seed, dtype, (B, H, M, D), (B, Hk, N, D), (B, Hk, N, E or D))


def served_by(kernel, call):
    """Return a call's result; fail if another kernel served it."""
    with launches.recorded() as started:
        result = call()
    forward = [name for name in started if name != "weights"]
    assert forward == [kernel], f"served by {started}; needed {kernel}"
    return result


def check_served(kernel, *arrays, **rules):
    """Check who serves a call, each element by what the contract allows, and the whole and its rows more closely."""
    found = served_by(kernel, lambda: an.attention(*arrays, backend="cuda", **rules))
    check_attention(*arrays, "cuda", **rules)
    if found.shape[-1] >= 64:  # else a row may be next to 0
        exact = reference_attention(*(x.astype(np.float64) for x in arrays), **rules)
        close = CLOSE[found.dtype.name]
        assert relative_error(found, exact) <= close
        errors, sizes = (np.linalg.norm(x, axis=-1) for x in (found.astype(np.float64) - exact, exact))
        assert (errors <= 4 * close * (sizes + 0.05 * sizes.mean())).all()


# --- which kernel, and sizes of many tiles ---

KERNELS = [("wgmma", "bfloat16"), ("wgmma", "float16"), ("mma", "bfloat16"), ("mma", "float16")]
KERNELS += [("general", "float32"), ("general", "float64")]


@contextlib.contextmanager
def forced(kernel, dtype):
    """Let a kernel serve what a faster one would, and skip where the card has no such kernel."""
    by_itself = launches.expected(dtype, capability())
    order = launches.KERNELS
    if order.index(kernel) < order.index(by_itself):
        pytest.skip(f"a card of capability {capability()} serves {dtype} by {by_itself}")
    with launches.Without(*order[: order.index(kernel)]):
        yield


@pytest.fixture(params=KERNELS, ids="-".join)
def kernel(request):
    """A kernel that is made to serve calls of a dtype, and the dtype."""
    with forced(*request.param):
        yield request.param


LARGE = {
    "full": ({"M": 1000, "N": 1300}, {}),
    "causal": ({"M": 1153, "N": 1153}, {"mask": an.Causal()}),
    "causal, ends together, grouped": ({"H": 6, "M": 700, "N": 1111}, {"mask": an.Causal(), "query_offset": 411}),
    "offsets by sequence": (
        {"B": 2, "M": 520, "N": 530},
        {"mask": an.Causal(), "query_offset": np.array([37, -100]), "key_offset": np.array([-20, 3])},
    ),
    "window and sink": (
        {"M": 1025, "N": 1025},
        {"mask": an.SlidingWindow(200, 30), "normalizer": an.Softmax(sink=[0.5, -1.0, 2.0, 0.0])},
    ),
    "many keys, few queries": ({"H": 8, "M": 5, "N": 4099}, {}),
}


@pytest.mark.parametrize(
    ("name", "D"),
    [("causal", 128), *((x, 64) for x in LARGE), ("causal", 256), ("causal", 96), *((x, 128) for x in LARGE)],
)
def test_large(name, D, kernel):
    sizes, rules = LARGE[name]
    check_served(kernel[0], *qkv(kernel[1], D=D, **sizes), **rules)


@pytest.mark.parametrize(("D", "E"), [(128, 64), (64, 128), (40, 200), (8, 8), (256, 17), (1, 1)])
def test_head_and_value_sizes(D, E, kernel):
    """Rows that are no whole pieces of 16 bytes are the general kernel's."""
    serves = kernel[0] if D % 8 == E % 8 == 0 else "general"
    check_served(serves, *qkv(kernel[1], M=257, N=391, D=D, E=E), mask=an.Causal(), query_offset=134)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_fastest_kernel_serves_by_itself(dtype):
    check_served(launches.expected(dtype, capability()), *qkv(dtype, D=128), mask=an.Causal())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_tensor_cores_do_not_serve(dtype):
    """Other normalizers and large head sizes go to the general kernel."""
    check_served("general", *qkv(dtype, M=70, N=90, D=64), normalizer=an.Entmax15())
    check_served("general", *qkv(dtype, M=70, N=90, D=272))


# --- bits ---


def test_the_same_bits_again_and_again(kernel):
    arrays = qkv(kernel[1], B=2, M=700, N=900, D=128)
    rules = {"mask": an.Causal(), "query_offset": 200, "return_lse": True}
    first = an.attention(*arrays, backend="cuda", **rules)
    for _ in range(20):
        again = an.attention(*arrays, backend="cuda", **rules)
        same(again.out, first.out)
        same(again.lse, first.lse)


def test_a_sequence_alone_and_among_others(kernel):
    q, k, v = qkv(kernel[1], B=3, M=333, N=333, D=64)
    for rules in ({}, {"mask": an.Causal()}):
        whole = an.attention(q, k, v, backend="cuda", **rules)
        for b in range(3):
            alone = an.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], backend="cuda", **rules)
            same(alone[0], whole[b])
        same(an.attention(q[1, 2], k[1, 1], v[1, 1], backend="cuda", **rules), whole[1, 2])


def test_some_rows_of_a_causal_call(kernel):
    """Queries further down with their offset: the same bits as among the others."""
    q, k, v = qkv(kernel[1], M=640, N=640, D=64)
    whole = an.attention(q, k, v, mask=an.Causal(), backend="cuda")
    for start in (128, 301):
        part = an.attention(q[:, :, start:], k, v, mask=an.Causal(), query_offset=start, backend="cuda")
        same(part, whole[:, :, start:])


# --- what is not there, and what is ---


@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 6e4])
def test_hidden_numbers_change_no_bit(value, D, kernel):
    q, k, v = qkv(kernel[1], B=2, M=400, N=600, D=D)
    rules = {"mask": an.Padding([450, 131]) & an.Causal(), "query_offset": 200, "return_lse": True}
    expected = an.attention(q, k, v, backend="cuda", **rules)
    for b, length in enumerate((450, 131)):
        k[b, :, length:], v[b, :, length:] = value, value
    found = an.attention(q, k, v, backend="cuda", **rules)
    assert np.isfinite(found.out.astype(np.float32)).all()
    same(found.out, expected.out)
    same(found.lse, expected.lse)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_seen_numbers_reach_the_rows_that_see_them(value, kernel):
    q, k, v = qkv(kernel[1], M=500, N=500, D=64)
    rules = {"mask": an.SlidingWindow(40, 0), "return_lse": True}
    expected = an.attention(q, k, v, backend="cuda", **rules)
    k[0, 0, 77, 3], v[0, 1, 300, 5] = value, value
    found = an.attention(q, k, v, backend="cuda", **rules)
    out, clean = found.out.astype(np.float32), expected.out.astype(np.float32)
    by_key, by_value = np.zeros(out.shape, bool), np.zeros(out.shape, bool)
    by_key[:, :2, 77:118] = True
    by_value[:, 2:, 300:341, 5] = True
    assert not np.isfinite(out[by_value]).any()
    if np.isnan(value):
        assert not np.isfinite(out[by_key]).any()
    untouched = ~(by_key | by_value.any(-1, keepdims=True))
    same(out[untouched], clean[untouched])
    same(*(np.delete(x.lse[:, :2], np.s_[77:118], 2) for x in (found, expected)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_what_the_cpu_drops(dtype):
    """Each value is a power of two of its own, so that a result tells which keys were kept."""
    q, k, _ = qkv(dtype, B=2, H=2, Hk=2, M=200, N=8, D=64)
    q[...] = 0
    v = np.broadcast_to((2.0 ** np.arange(8)[:, None]).astype(q.dtype), (2, 2, 8, 64))
    rules = {"dropout": an.Dropout(0.4, 2**40 + 11), "query_offset": np.array([-7, 90]), "key_offset": 5}
    found, expected = (
        an.attention(q, k, v, backend=name, **rules).astype(np.float64) for name in ("cuda", "reference")
    )
    kept, wanted = (np.rint(x * 8 * 0.6) for x in (found, expected))
    tolerance = {"bfloat16": 2, "float16": 0.5}.get(dtype, 0)  # the last places of 255
    assert np.abs(kept - wanted).max() <= tolerance
    assert len(np.unique(wanted)) > 30


# --- arrays on the card ---

SHOWN = ("plain", "Causal", "grouped heads", "layout swapped", "layout swapped, grouped heads", "rank 2", "rank 3")
SHOWN += ("Causal, offsets by sequence", "sink by head", "Bias (HMN)", "empty rows", "0 queries", "0 keys", "dropout")
SHOWN += ("Cosine", "Sparsemax", "hidden NaN behind a mask", "no sequence")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHOWN)
@pytest.mark.parametrize("of", LIBRARIES)
def test_arrays_on_the_card(of, name, dtype):
    """The bits of a call with the host's arrays, in an array of the caller's kind; the inputs stay as they are."""
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
        if of == "numba":
            pytest.skip("Numba's arrays have no bfloat16")
    *arrays, kwargs = BY_NAME[name].build(dtype)
    lib = library(of)
    softmax = isinstance(kwargs.get("normalizer", an.Softmax()), an.Softmax)
    asked = {"return_lse": softmax, "return_weights": True}
    expected = an.attention(*arrays, backend="cuda", **kwargs, **asked)
    try:
        on_card = [lib.device(x) for x in arrays]
    except (TypeError, ValueError) as error:
        pytest.skip(f"{of} cannot hold {dtype}: {error}")
    for backend in ("auto", "cuda"):
        found = an.attention(*on_card, backend=backend, **kwargs, **asked)
        for part in expected._fields:
            result, wanted = getattr(found, part), getattr(expected, part)
            assert isinstance(result, lib.kind), f"{part} is {type(result)}"
            same(lib.host(result), wanted)
    for x, before in zip(on_card, arrays, strict=True):
        same(lib.host(x), before)


@pytest.mark.parametrize("of", LIBRARIES)
def test_out_on_the_card(of):
    lib = library(of)
    arrays = qkv("float16", D=64)
    expected = an.attention(*arrays, backend="cuda")
    on_card = [lib.device(x) for x in arrays]
    out = lib.device(np.full_like(arrays[0], np.nan))
    assert an.attention(*on_card, out=out) is out
    same(lib.host(out), expected)
    with pytest.raises(ValueError, match="overlap"):
        an.attention(*on_card, out=on_card[0])
    with pytest.raises(ValueError, match="out has shape"):
        an.attention(*on_card, out=lib.device(np.empty((1, 4, 300, 63), np.float16)))
    with pytest.raises(TypeError, match="out"):
        an.attention(*on_card, out=lib.device(np.empty(arrays[0].shape, np.float32)))
    with pytest.raises(TypeError, match="out"):
        an.attention(*on_card, out=np.empty(arrays[0].shape, np.float16))
    same(lib.host(on_card[0]), arrays[0])


@pytest.mark.parametrize("of", LIBRARIES)
def test_wrong_places(of):
    lib = library(of)
    q, k, v = qkv("float32", M=8, N=8, D=8)
    with pytest.raises(TypeError, match="host"):
        an.attention(lib.device(q), k, v)
    for backend in ("cpu", "reference"):
        with pytest.raises((TypeError, ValueError, NotImplementedError), match=backend):
            an.attention(*map(lib.device, (q, k, v)), backend=backend)


def test_a_view_into_a_tensor_is_read_where_it_lies():
    """Slices of one tensor of all projections, as models have them; NaN around them."""
    torch = torch_on_card()
    lib = library("torch")
    for dtype in ("bfloat16", "float32"):
        whole = numbers(0, dtype, (2, 150, 3, 4, 80))[0]
        whole[..., :8], whole[..., 72:] = np.nan, np.nan
        on_card = lib.device(whole)
        arrays = [whole[:, :, n, :, 8:72].swapaxes(1, 2) for n in range(3)]
        views = [on_card[:, :, n, :, 8:72].transpose(1, 2) for n in range(3)]
        found = an.attention(*views, mask=an.Causal())
        assert isinstance(found, torch.Tensor)
        same(lib.host(found), an.attention(*arrays, mask=an.Causal(), backend="cuda"))


@pytest.mark.parametrize("shift", [8, 1, 3])
def test_addresses_between(shift, kernel):
    """Arrays that begin where no load of 16 bytes can: another kernel may serve them, and right."""
    torch_on_card()
    lib = library("torch")
    wide = [numbers(n, kernel[1], (1, 2, 90, 64 + 2 * shift))[0] for n in range(3)]
    on_card = [lib.device(x)[..., shift : 64 + shift] for x in wide]
    arrays = [np.ascontiguousarray(x[..., shift : 64 + shift]) for x in wide]
    call = partial(an.attention, *on_card, mask=an.Causal())
    found = lib.host(served_by(kernel[0] if shift == 8 else "general", call))
    exact = reference_attention(*(x.astype(np.float64) for x in arrays), mask=an.Causal())
    rounded = reference_attention(*arrays, mask=an.Causal(), compute_dtype=rounding_dtype(arrays[0].dtype))
    assert agreement(found, exact, rounded).passed
    if shift == 8:
        same(found, an.attention(*arrays, mask=an.Causal(), backend="cuda"))


# --- streams, threads, memory ---


def test_a_call_returns_before_it_is_computed():
    torch = torch_on_card()
    q, k, v = map(library("torch").device, qkv("bfloat16", D=128))
    expected = an.attention(q, k, v)  # compiles
    torch.cuda.synchronize()
    torch.cuda._sleep(1_500_000_000)  # cycles of the card: most of a second
    start = time.perf_counter()
    found = an.attention(q, k, v)
    done = torch.cuda.Event()
    done.record()
    assert not done.query(), f"the call waited for the card: {time.perf_counter() - start:.3f} s"
    assert torch.equal(found, expected)


@pytest.mark.parametrize("given", ["stream", "handle", "current", "default"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_streams(given, dtype):
    """What comes before on the stream is waited for, what follows sees the result: in each way of naming a stream."""
    torch = torch_on_card()
    lib = library("torch")
    arrays = qkv(dtype, D=64)
    source = [lib.device(x) for x in arrays]
    expected = lib.host(an.attention(*source, mask=an.Causal()))
    torch.cuda.synchronize()
    side = torch.cuda.default_stream() if given == "default" else torch.cuda.Stream()
    stream = {"stream": side, "handle": side.cuda_stream}.get(given)
    for _ in range(3):
        with torch.cuda.stream(side):
            late = [torch.full_like(x, float("nan")) for x in source]
            torch.cuda._sleep(100_000_000)
            for target, x in zip(late, source, strict=True):
                target.copy_(x)
            found = an.attention(*late, mask=an.Causal(), stream=stream)
            copy = found.clone()
            for target in late:
                target.fill_(float("nan"))  # after the call on the same stream: it has read what was there
        side.synchronize()
        same(lib.host(copy), expected)
        same(lib.host(found), expected)


def test_inputs_may_be_dropped_at_once():
    """Memory of inputs that nobody holds any more is not given to others before the call has read it."""
    torch = torch_on_card()
    lib = library("torch")
    arrays = qkv("float16", M=600, N=600, D=64)
    source = [lib.device(x) for x in arrays]
    expected = lib.host(an.attention(*source))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    for stream in (None, side):
        torch.cuda._sleep(50_000_000)
        late = [x.clone() for x in source]
        found = an.attention(*late, stream=stream)
        del late
        spoiled = [torch.full_like(x, float("nan")) for x in source]
        torch.cuda.synchronize()
        same(lib.host(found), expected)
        del spoiled


def test_cupy_streams():
    cupy = pytest.importorskip("cupy")
    lib = library("cupy")
    arrays = qkv("float32", D=64)
    expected = an.attention(*arrays, backend="cuda")
    side = cupy.cuda.Stream(non_blocking=True)
    with side:
        late = [lib.device(x) for x in arrays]
        found = an.attention(*late)
        named = an.attention(*late, stream=side)
    side.synchronize()
    same(lib.host(found), expected)
    same(lib.host(named), expected)


def test_threads_with_streams_of_their_own():
    torch = torch_on_card()
    lib = library("torch")
    rules = [{"mask": an.Causal()}, {}, {"modifiers": an.SoftCap(3.0)}, {"mask": an.SlidingWindow(50, 9)}]
    dtypes = ["bfloat16", "float32", "float16", "bfloat16"]
    arrays = [qkv(dtype, D=64, seed=n) for n, dtype in enumerate(dtypes)]
    together, wrong = threading.Barrier(4), []

    def call(n):
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                mine = [lib.device(x) for x in arrays[n]]
                together.wait(timeout=60)
                results = [an.attention(*mine, **rules[n]) for _ in range(20)]
                torch.cuda.current_stream().synchronize()
            expected = an.attention(*arrays[n], backend="cuda", **rules[n])
            wrong.extend((n, "differs") for x in results if not np.array_equal(lib.host(x), expected))
        except Exception as error:
            wrong.append((n, repr(error)))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_allocated_beside_the_results(monkeypatch):
    """Neither torch nor the driver is asked for more than out and lse: no input is copied, no scores are kept."""
    torch = torch_on_card()
    from attn_numba.gpu import driver

    asked = []
    allocate = driver.Card.allocate

    def recorded(self, size, stream):
        asked.append(size)
        return allocate(self, size, stream)

    monkeypatch.setattr(driver.Card, "allocate", recorded)
    q, k, v = (torch.randn(4, 4096, 8, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in "qkv")
    an.attention(q, k, v, mask=an.Causal(), return_lse=True)
    torch.cuda.synchronize()
    del asked[:]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["allocated_bytes.all.current"]
    found = an.attention(q, k, v, mask=an.Causal(), return_lse=True)
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["allocated_bytes.all.peak"] - before
    results = found.out.nbytes + found.lse.nbytes
    assert peak + sum(asked) <= results + 2**20


def test_too_little_memory_is_one_clear_error():
    torch = torch_on_card()
    q = torch.zeros(1, 1, 2**20, 64, device="cuda", dtype=torch.float16)
    with pytest.raises(MemoryError, match="bytes"):
        an.attention(q, q[:, :, : 2**20], q, return_weights=True)  # 2**42 bytes of weights
    assert torch.equal(an.attention(q[:, :, :16], q[:, :, :16], q[:, :, :16]), q[:, :, :16])


def test_long_sequences_beyond_31_bits():
    """More than 2**31 elements: no address is computed in 32 bits."""
    torch = torch_on_card()
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GB of the card's memory")
    lib = library("torch")
    k = torch.randn(1, 130, 2**17, 128, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(1, 130, 9, 128, device="cuda", dtype=torch.bfloat16)
    assert k.numel() > 2**31
    found = lib.host(an.attention(q, k, k, mask=an.SlidingWindow(300, 0), query_offset=2**17 - 9))
    near = lib.host(k[:, 129:, -400:])
    last = lib.host(q[:, 129:])
    expected = an.attention(last, near, near, mask=an.SlidingWindow(300, 0), query_offset=391, backend="cuda")
    same(found[:, 129:], expected)


@pytest.mark.parametrize("code", ["float64", "float32", "float16", "bfloat16", "int8", "int4"])
def test_decode_of_many_splits(code):
    rng, dtype = np.random.default_rng(0), np.float64 if code == "float64" else np.float32
    for H, Hk, M, D, E, page in ((8, 2, 1, 128, 128, 64), (6, 3, 3, 40, 72, 17)):
        k, v = (rng.standard_normal((3, Hk, 3000, size)).astype(dtype) for size in (D, E))
        q = rng.standard_normal((3, H, M, D)).astype(dtype)
        cache = an.PagedKVCache(3, Hk, D, E, dtype=code, page=page)
        cache.append(k, v, lengths=[3000, 1, 1025] if M == 1 else [2999, 3, 512])
        for rules in ({"mask": an.Causal()}, {"mask": an.SlidingWindow(700, 0), "normalizer": an.Softmax(sink=0.5)}):
            found, expected = (
                an.decode(q, cache, **rules, backend=backend, return_lse=True, return_weights=True)
                for backend in ("cuda", "reference")
            )
            tolerance = 1e-12 if code == "float64" else 2e-5
            for name in found._fields:
                np.testing.assert_allclose(
                    getattr(found, name), getattr(expected, name), rtol=tolerance, atol=tolerance
                )
            alone = an.decode(q[1:2], cache, **rules, sequences=[1], backend="cuda")
            np.testing.assert_array_equal(alone, found.out[1:2])

"""The host side of CUDA: arrays read where they lie, streams, errors, what is kept for calls that repeat, with no card.

A `FakeCard` stands in: its memory is the host's, its kernels are noted and not run.
"""

from __future__ import annotations

import importlib.util
import re
import threading
import time

import numpy as np
import pytest

import attn_numba as an
from attn_numba import api, environment

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from numba import config

if config.ENABLE_CUDASIM:
    pytest.skip("Numba simulates CUDA in this process", allow_module_level=True)

from attn_numba.gpu import arrays, driver, engine, launch, machine_code
from attn_numba.gpu.kept import Kept
from fake_card import FakeCard, Lying

CODE = machine_code.Code("kernel", b"\x7fELF of no card")
FLOAT32 = np.dtype(np.float32)


@pytest.fixture
def card(monkeypatch):
    """A fake card, the only one, for which nothing is compiled or kept on disk; `card.compiled` says what would be."""
    fake = FakeCard()
    fake.compiled = []

    def compiled(program, capability):
        fake.compiled.append(program.name)
        return CODE

    monkeypatch.setattr(driver, "card", lambda index: fake if index == 0 else FakeCard(index))
    monkeypatch.setattr(driver, "card_of", lambda pointer: 0)
    for module in (api, environment):
        monkeypatch.setattr(module, "cuda_availability", lambda: (True, fake.name))
    monkeypatch.setattr(machine_code, "compiled", compiled)
    monkeypatch.setattr(machine_code, "cache_folder", lambda: (None, "a test"))
    monkeypatch.setattr(launch, "_ready", {})
    monkeypatch.setattr(engine, "_uploaded", Kept(8, 2**20))
    monkeypatch.setattr(engine, "_prepared", Kept(8, 2**20))
    api.cuda_engine.cache_clear()
    yield fake
    api.cuda_engine.cache_clear()


def host(*shapes, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def lying(*shapes, dtype=np.float32, **options):
    return [Lying(x, **options) for x in host(*shapes, dtype=dtype)]


QKV = ((2, 4, 10, 8), (2, 2, 12, 8), (2, 2, 12, 16))


# --- calls on a card that is not there ---


def pointers(card, n=-1):
    return card.started[n].arguments


def test_arrays_on_a_card_stay_there(card):
    q, k, v = lying(*QKV)
    out = an.attention(q, k, v)
    assert (out.shape, out.dtype) == ((2, 4, 10, 16), FLOAT32)
    assert out.__cuda_array_interface__["data"][0] in pointers(card)
    for x in (q, k, v):
        assert x.array.ctypes.data in pointers(card)
    assert card.started[-1].stream == driver.DEFAULT_STREAM == out.__cuda_array_interface__["stream"]
    assert not [size for size in card.uploads if size >= q.array.nbytes]
    assert card.synchronized <= 1  # for what is kept of the rules


def test_a_call_that_repeats_uploads_and_compiles_nothing(card):
    q, k, v = lying(*QKV)
    bias = np.random.default_rng(1).standard_normal((10, 12))
    rules = {"modifiers": an.Bias(bias), "normalizer": an.Softmax(np.arange(4.0)), "score": an.Bilinear(np.eye(8))}
    an.attention(q, k, v, **rules)
    uploads, compiled, loaded = len(card.uploads), len(card.compiled), len(card.loaded)
    assert uploads > 2
    for _ in range(3):
        an.attention(q, k, v, **rules)
    assert (len(card.uploads), len(card.compiled), len(card.loaded)) == (uploads, compiled, loaded)
    an.attention(q, k, v, **rules | {"modifiers": an.Bias(bias + 1)})
    assert len(card.uploads) > uploads
    assert len(card.compiled) == compiled


def test_a_call_that_repeats_asks_no_kernel(card, monkeypatch):
    q, k, v = lying(*QKV)
    an.attention(q, k, v, mask=an.Causal(), query_offset=2)
    monkeypatch.setattr(engine, "programs_of", None)
    an.attention(q, k, v, mask=an.Causal(), query_offset=2)
    with pytest.raises(TypeError, match="NoneType"):
        an.attention(q, k, v, mask=an.Causal(), query_offset=2, return_lse=True)


def test_other_strides_share_the_arrays_of_the_rules(card):
    q, k, v = lying(*QKV)
    (other,) = host((2, 10, 4, 8))
    rules = {"modifiers": an.ALiBi(np.arange(4.0)), "query_offset": 2}
    an.attention(q, k, v, **rules)
    uploads = len(card.uploads)
    an.attention(Lying(other.swapaxes(1, 2)), k, v, **rules)
    assert len(card.uploads) == uploads


def test_like_calls_of_other_strides_ask_anew_which_kernel_serves_them(card):
    wide = np.zeros((1, 2, 16, 72), np.float16)
    k, v = lying(*[(1, 2, 16, 64)] * 2, dtype=np.float16)
    for start in (0, 1, 0):
        an.attention(Lying(wide[..., start : start + 64]), k, v)
    assert card.compiled == ["wgmma", "general"]
    assert len(card.started) == 3


def test_new_parameters_compile_nothing(card):
    q, k, v = lying(*QKV)
    for left in (1, 2, 3):
        an.attention(q, k, v, mask=an.SlidingWindow(left, 0), query_offset=2)
    assert card.compiled == ["general"]


def test_an_array_as_a_mask_is_read_anew_in_each_call(card):
    q, k, v = lying(*QKV)
    mask = np.ones((10, 12), bool)
    for _ in range(2):
        before = len(card.uploads)
        an.attention(q, k, v, mask=mask)
        assert len(card.uploads) > before


def test_results_beside_the_output(card):
    q, k, v = lying(*QKV)
    found = an.attention(q, k, v, return_lse=True, return_weights=True)
    assert (found.lse.shape, found.weights.shape) == ((2, 4, 10), (2, 4, 10, 12))
    assert [x.name for x in card.started] == ["kernel", "kernel"]
    assert card.compiled == ["general", "weights"]
    flat = pointers(card, 0)
    assert found.lse.__cuda_array_interface__["data"][0] in flat
    with pytest.raises(ValueError, match="Sparsemax"):
        an.attention(q, k, v, normalizer=an.Sparsemax(), return_lse=True)


def test_missing_leading_axes(card):
    q, k, v = lying((10, 8), (12, 8), (12, 16))
    found = an.attention(q, k, v, return_lse=True, return_weights=True)
    assert (found.out.shape, found.lse.shape, found.weights.shape) == ((10, 16), (10,), (10, 12))


def test_strides_reach_the_kernel(card):
    (array,) = host((2, 10, 4, 8))
    q = Lying(array.swapaxes(1, 2))
    k, v = lying(*QKV[1:])
    an.attention(q, k, v)
    at = pointers(card).index(array.ctypes.data)
    assert tuple(pointers(card)[at + 1 : at + 9]) == (2, 4, 10, 8, *array.swapaxes(1, 2).strides)


@pytest.mark.parametrize("shape", [(0, 4, 10, 8), (2, 4, 0, 8)])
def test_nothing_is_started_for_no_rows(card, shape):
    B = shape[0]
    q, k, v = lying(shape, (B, 2, 12, 8), (B, 2, 12, 16))
    found = an.attention(q, k, v, return_lse=True, return_weights=True)
    assert (found.out.shape, found.weights.shape) == ((*shape[:3], 16), (*shape[:3], 12))
    assert not card.started


def test_no_keys_still_give_results(card):
    q, k, v = lying((2, 4, 10, 64), (2, 2, 0, 64), (2, 2, 0, 64), dtype=np.float16)
    an.attention(q, k, v)
    assert card.compiled == ["general"]


def test_host_arrays_go_over_and_come_back(card):
    q, k, v = host(*QKV)
    found = an.attention(q, k, v, backend="cuda", return_lse=True)
    assert type(found.out) is np.ndarray
    assert {x.nbytes for x in (q, k, v)} <= set(card.uploads)
    assert card.started[-1].stream == driver.THREAD_STREAM
    out = np.empty((2, 4, 10, 16), np.float32)
    assert an.attention(q, k, v, backend="cuda", out=out) is out
    with pytest.raises(ValueError, match="stream is int; needed None for arrays in host memory"):
        an.attention(q, k, v, backend="cuda", stream=7)


# --- which kernel ---


@pytest.mark.parametrize(
    ("dtype", "capability", "name"),
    [
        (np.float16, (9, 0), "wgmma"),
        (np.float16, (8, 0), "mma"),
        (np.float16, (10, 0), "mma"),
        (np.float16, (7, 5), "general"),
        (np.float32, (9, 0), "general"),
        (np.float64, (9, 0), "general"),
    ],
)
def test_kernels_by_dtype_and_card(card, dtype, capability, name):
    card.capability = capability
    an.attention(*lying((1, 2, 16, 64), (1, 2, 16, 64), (1, 2, 16, 64), dtype=dtype))
    assert card.compiled == [name]


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": an.Sparsemax()},
        {"score": an.Cosine()},
        {"D": 264},
        {"D": 12},
        {"offset": 1},
    ],
)
def test_what_tensor_cores_do_not_serve_is_served(card, change):
    D = change.pop("D", 64)
    arrays = host(*[(1, 2, 17, D)] * 3, dtype=np.float16)
    offset = change.pop("offset", 0)
    if offset:
        wide = [np.zeros((1, 2, 17, D + 8), np.float16) for _ in range(3)]
        arrays = [x[..., offset : offset + D] for x in wide]
    an.attention(*map(Lying, arrays), **change)
    assert card.compiled[-1] == "general"


def test_the_report_says_which_kernel_serves_what():
    found = engine.served((9, 0))
    assert {dtype: kernel for dtype, (kernel, _) in found.items()} == {
        "float64": "general", "float32": "general", "float16": "wgmma", "bfloat16": "wgmma"
    }  # fmt: skip
    assert "16 bits" in found["float32"][1]
    assert engine.served((8, 6))["bfloat16"][0] == "mma"
    assert "9.0" in engine.served((8, 6))["bfloat16"][1]
    assert engine.served((7, 0))["bfloat16"][0] == "general"


# --- streams ---


class WithStream:
    def __init__(self, name, value):
        setattr(self, name, value)


@pytest.mark.parametrize(
    ("stream", "handle"),
    [
        (77, 77),
        (0, driver.DEFAULT_STREAM),
        (WithStream("cuda_stream", 77), 77),
        (WithStream("ptr", 77), 77),
        (WithStream("ptr", 0), driver.DEFAULT_STREAM),
        (WithStream("handle", WithStream("value", 77)), 77),
        (WithStream("__cuda_stream__", (0, 77)), 77),
        (WithStream("__cuda_stream__", lambda: (0, 77)), 77),
    ],
)
def test_streams_of_any_library(card, stream, handle):
    q, k, v = lying(*QKV)
    out = an.attention(q, k, v, stream=stream)
    assert card.started[-1].stream == handle == out.__cuda_array_interface__["stream"]


@pytest.mark.parametrize(("stream", "error"), [("fast", TypeError), (True, TypeError), (-1, ValueError)])
def test_what_is_no_stream(card, stream, error):
    with pytest.raises(error, match="stream is"):
        an.attention(*lying(*QKV), stream=stream)
    assert not card.started


def test_a_call_is_on_the_stream_of_q_and_waits_for_the_others(card):
    (q,), (k,), (v,) = (lying(shape, stream=n) for shape, n in zip(QKV, (5, 6, 5), strict=True))
    an.attention(q, k, v)
    assert card.started[-1].stream == 5
    assert card.waits == [(6, 5)]


def test_inputs_outlive_a_call_that_their_owner_may_not_know_of(card):
    q, k, v = lying(*QKV, stream=5)
    an.attention(q, k, v, stream=9)
    assert card.waits == [(5, 9)]
    assert card.held[-1] == (q, k, v)


# --- errors ---


def test_arrays_on_different_cards(card, monkeypatch):
    q, k, v = lying(*QKV)
    monkeypatch.setattr(driver, "card_of", lambda pointer: int(pointer == k.array.ctypes.data))
    with pytest.raises(ValueError, match="k is on card 1; q is on card 0"):
        an.attention(q, k, v)


def test_mixed_places_and_named_backends(card):
    q, k, v = lying(*QKV)
    with pytest.raises(TypeError, match="q on a GPU, k on a host, v on a GPU"):
        an.attention(q, k.array, v)
    for backend in ("cpu", "reference"):
        with pytest.raises(TypeError, match=f"backend is '{backend}', and the arrays are on a GPU"):
            an.attention(q, k, v, backend=backend)


ERRORS = {
    "heads": ({"shapes": ((1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8))}, ValueError, "k has 2 heads; q has 3"),
    "rows": ({"shapes": ((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 5, 8))}, ValueError, "v has 5 rows; k has 4"),
    "dtype": ({"dtype": np.int32}, TypeError, "q has dtype int32; needed float64"),
    "two bytes": ({"dtype": np.uint16, "typestr": "<V2"}, TypeError, "q has dtype uint16; needed float64"),
    "byte order": ({"dtype": np.dtype(">f4")}, TypeError, "q has byte order '>'"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_arrays_on_a_card_are_checked_like_others(card, name):
    options, error, message = ERRORS[name]
    options = dict(options)
    shapes = options.pop("shapes", QKV)
    dtype = options.pop("dtype", np.float32)
    arrays = [Lying(np.ones(shape, dtype), **options) for shape in shapes]
    with pytest.raises(error, match=re.escape(message)):
        an.attention(*arrays)
    assert not card.started


def test_out_on_a_card(card):
    q, k, v = lying(*QKV)
    (out,) = lying((2, 4, 10, 16))
    assert an.attention(q, k, v, out=out) is out
    assert out.array.ctypes.data in pointers(card)
    wrong = {
        "out is ndarray in host memory; q is on a GPU": (out.array, TypeError),
        "out has dtype float64; q has float32": (Lying(np.empty((2, 4, 10, 16))), TypeError),
        "out has shape (2, 4, 10, 8); needed (2, 4, 10, 16)": (q, ValueError),
        "out is read-only": (Lying(out.array, readonly=True), ValueError),
        "out has elements that share memory": (Lying(np.broadcast_to(out.array[:1], (2, 4, 10, 16))), ValueError),
    }
    for message, (array, error) in wrong.items():
        with pytest.raises(error, match=re.escape(message)):
            an.attention(q, k, v, out=array)
    big = np.zeros((2, 4, 10, 40), np.float32)
    with pytest.raises(ValueError, match="out overlaps q"):
        an.attention(Lying(big[..., :8]), k, v, out=Lying(big[..., 4:20]))
    with pytest.raises(ValueError, match="out overlaps v"):
        an.attention(q, *lying((2, 2, 10, 8)), Lying(big[:, :2, :, 15:31]), out=Lying(big[..., :16]))
    beside = np.zeros((2, 2, 4, 10, 16), np.float32)
    an.attention(Lying(beside[0]), *lying((2, 2, 12, 16), (2, 2, 12, 16)), out=Lying(beside[1]))


def test_out_of_memory_names_the_bytes(card):
    card.memory = 1000
    with pytest.raises(MemoryError, match=r"fake card 0 has no 5120 bytes .*; 1000 are free"):
        an.attention(*lying(*QKV))


def test_memory_errors_of_libraries():
    class OutOfMemoryError(RuntimeError):
        pass

    for error in (OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("CUDA_ERROR_OUT_OF_MEMORY")):
        with pytest.raises(MemoryError, match="no 7 bytes"):
            driver.raise_memory_error(error, 7, FakeCard())
    driver.raise_memory_error(RuntimeError("an illegal address"), 7, FakeCard())


def test_explanations_have_no_cuda_version(card):
    q, k, _ = lying(*QKV)
    for call in (an.weights_of, an.entropy, an.column_sums):
        with pytest.raises(
            NotImplementedError, match="backend 'cuda' cannot run: what is asked for has no CUDA version"
        ):
            call(q, k)
    with pytest.raises(NotImplementedError, match="run on 'cpu' and 'reference'"):
        an.weights_of(*host(*QKV[:2]), backend="cuda")


# --- threads and memory ---


def test_threads_load_a_kernel_once(card, monkeypatch):
    def slow(program, capability):
        time.sleep(0.05)
        return CODE

    monkeypatch.setattr(machine_code, "compiled", slow)
    together = threading.Barrier(6)
    failed = []

    def call(n):
        q, k, v = lying(*QKV, stream=n + 10)
        together.wait()
        try:
            for _ in range(20):
                an.attention(q, k, v, mask=an.Causal(), query_offset=2)
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(card.started) == 120
    assert {x.stream for x in card.started} == set(range(10, 16))
    assert card.loaded == ["kernel"]


def test_what_is_kept_is_bounded():
    kept: Kept[str] = Kept(3, 100)
    for n in range(5):
        kept.put(n, f"thing {n}", 10)
    assert [kept.get(n) for n in range(5)] == [None, None, "thing 2", "thing 3", "thing 4"]
    kept.get(2)
    kept.put(9, "large", 85)
    assert (kept.get(2), kept.get(3), kept.get(9)) == ("thing 2", None, "large")
    kept.put(10, "too large", 101)
    kept.put(None, "nameless")
    assert kept.get(10) is None
    assert kept.get(None) is None
    assert len(kept) == 2


def test_arrays_that_several_streams_read_are_freed_after_all_of_them(card, monkeypatch):
    monkeypatch.setattr(engine, "_uploaded", Kept(2))
    monkeypatch.setattr(engine, "_prepared", Kept(2))
    q, k, v = lying(*QKV)
    for n in range(2):
        an.attention(q, k, v, modifiers=an.Bias(np.full((10, 12), n)))
    before = card.synchronized
    an.attention(q, k, v, modifiers=an.Bias(np.full((10, 12), 2)))
    assert card.synchronized == before + 2  # what is new is there, and what is old is not read any more
    an.attention(q, k, v, mask=np.ones((10, 12), bool))  # of this call alone: on its own stream
    assert card.synchronized == before + 2


def test_views():
    view = arrays.View(1000, (2, 3), (12, 4), FLOAT32)
    assert view.reshape((1, 1, 2, 3)).strides == (0, 0, 12, 4)
    assert view.span() == (1000, 1024)
    assert arrays.View(1000, (3,), (-4,), FLOAT32).span() == (992, 1004)
    assert arrays.View(1000, (0, 3), (12, 4), FLOAT32).span() == (1000, 1000)
    with pytest.raises(ValueError, match="axes of size 1 before it"):
        view.reshape((3, 2))
    half = arrays.View(0, (2,), (2,), arrays.BFLOAT16)
    assert (half.bits().dtype, half.dtype.name, half.size) == (np.uint16, "bfloat16", 2)


def test_results_of_our_own_kind(card):
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    view = arrays.uploaded(x, card, 5)
    array = arrays.DeviceArray(view, card, 5)
    np.testing.assert_array_equal(array.copy_to_host(), x)
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3), "typestr": "<f4", "data": (view.pointer, False), "strides": None, "stream": 5, "version": 3
    }  # fmt: skip
    assert array.__dlpack_device__() == (2, 0)


def test_bfloat16_by_name(card):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    shape = (1, 2, 16, 64)
    inputs = [Lying(x) for x in host(shape, shape, shape, dtype=ml_dtypes.bfloat16)]
    assert inputs[0].__cuda_array_interface__["typestr"] == "<V2"
    out = an.attention(*inputs)
    assert (out.dtype.name, out.__cuda_array_interface__["typestr"]) == ("bfloat16", "<V2")
    assert card.compiled == ["wgmma"]
    with pytest.raises(TypeError, match="one dtype for all three"):
        an.attention(inputs[0], *lying(shape, shape, dtype=np.float16))


def test_torch_tensors_are_read_where_they_lie_and_made(card, monkeypatch):
    """Of torch for the CPU: its tensors have all but the card."""
    torch = pytest.importorskip("torch")
    from attn_numba.integrations import torch as ours

    monkeypatch.setattr(ours, "current_stream", lambda index: 0)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    q, k, v = (torch.zeros(1, 16, 2, 64, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3))
    real = ours.place
    monkeypatch.setattr(ours, "place", lambda x, name: (*real(x, name)[:4], 0, 0))
    arrays._kind_of_type.cache_clear()
    found = an.attention(q, k, v, return_lse=True)
    arrays._kind_of_type.cache_clear()
    assert (type(found.out), found.out.dtype, found.lse.dtype) == (torch.Tensor, torch.bfloat16, torch.float32)
    assert found.out.shape == (1, 2, 16, 64)
    flat = pointers(card)
    assert {x.data_ptr() for x in (q, k, v, found.out, found.lse)} <= set(flat)
    assert card.compiled == ["wgmma"]
    assert not any(isinstance(x, torch.Tensor) for held in card.held for x in held)
    with pytest.raises(
        TypeError, match=re.escape("k requires grad, which attn_numba.integrations.torch.attention looks after")
    ):
        an.attention(q, k.clone().requires_grad_(), v)
    assert real(q, "q")[1:4] == ((1, 2, 16, 64), (4096, 128, 256, 2), "bfloat16")

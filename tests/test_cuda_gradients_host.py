"""The host side of gradients on CUDA: arrays, streams, errors, what is kept for calls that repeat, with no card.

A `FakeCard` stands in: its memory is the host's, its kernels are noted and not run.
"""

from __future__ import annotations

import importlib.util
import re

import numpy as np
import pytest

import attn_numba as an
from attn_numba import api, environment

if importlib.util.find_spec("numba_cuda") is None or importlib.util.find_spec("cuda") is None:
    pytest.skip("numba-cuda is not installed", allow_module_level=True)

from numba import config

if config.ENABLE_CUDASIM:
    pytest.skip("Numba simulates CUDA in this process", allow_module_level=True)

from attn_numba.gpu import arrays, backward_general, driver, engine, gradients, launch, machine_code
from attn_numba.gpu.kept import Kept
from attn_numba.rules.results import Gradients
from fake_card import FakeCard, Lying

CODE = machine_code.Code("kernel", b"\x7fELF of no card")
SHAPES = ((2, 4, 10, 8), (2, 2, 12, 8), (2, 2, 12, 16), (2, 4, 10, 16))
PASSES = ["gradient_rows", *["gradient"] * 3]


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
    monkeypatch.setattr(gradients, "_prepared", Kept(8))
    api.cuda_engine.cache_clear()
    yield fake
    api.cuda_engine.cache_clear()


def host(*shapes, dtype=np.float32, seed=0):
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def lying(*shapes, dtype=np.float32, **options):
    return [Lying(x, **options) for x in host(*shapes, dtype=dtype)]


def every_rule():
    """Rules that have gradients, of each kind."""
    random = np.random.default_rng(3)
    modifiers = [
        an.Bias(random.standard_normal((4, 10, 12))),
        an.Bias(random.standard_normal(12)),
        an.ALiBi(np.arange(4.0)),
        an.Temperature(random.random((4, 10)) + 0.5),
        an.AdaptiveSpan(3.0, 2.0),
    ]
    return {
        "modifiers": modifiers,
        "normalizer": an.Softmax(np.zeros(4)),
        "score": an.Bilinear(np.eye(8)),
        "query_offset": 2,
    }


def test_arrays_on_a_card_stay_there(card):
    q, k, v, dout = lying(*SHAPES)
    found = an.attention_vjp(q, k, v, dout)
    assert isinstance(found, Gradients)
    assert [x.shape for x in (found.q, found.k, found.v)] == list(SHAPES[:3])
    assert card.compiled == PASSES
    given = {x.array.ctypes.data for x in (q, k, v, dout)}
    for started, result in zip(card.started[1:], (found.q, found.k, found.v), strict=True):
        assert given <= set(started.arguments)
        assert result.__cuda_array_interface__["data"][0] in started.arguments
        assert started.stream == driver.DEFAULT_STREAM == result.__cuda_array_interface__["stream"]
    assert not [size for size in card.uploads if size >= q.array.nbytes]
    assert card.synchronized <= 1  # for what is kept of the rules


def test_gradients_of_rules_are_there_too(card):
    rules = every_rule()
    found = an.attention_vjp(*lying(*SHAPES), **rules)
    for rule, shape in (
        *((x, getattr(x, x.learned[0]).shape) for x in rules["modifiers"]),
        (rules["normalizer"], (4,)),
        (rules["score"], (8, 8)),
    ):
        array = found.of(rule)
        assert (array.shape, array.dtype) == (shape, np.float32)
        assert any(array.__cuda_array_interface__["data"][0] in x.arguments for x in card.started), rule
    with pytest.raises(ValueError, match="rule is SoftCap, of which this call has no gradient"):
        found.of(an.SoftCap(1.0))


def test_a_call_that_repeats_uploads_and_compiles_nothing(card, monkeypatch):
    rules = every_rule()
    inputs = lying(*SHAPES)
    an.attention_vjp(*inputs, **rules)
    uploads, compiled, count = len(card.uploads), len(card.compiled), len(card.started)
    names = [x.grid for x in card.started]
    assert uploads > 5
    monkeypatch.setattr(engine, "bind", None)
    monkeypatch.setattr(backward_general, "program", None)
    for _ in range(2):
        card.started.clear()
        an.attention_vjp(*inputs, **rules)
        assert (len(card.uploads), len(card.compiled), len(card.started)) == (uploads, compiled, count)
        assert [x.grid for x in card.started] == names
    with pytest.raises(TypeError, match="NoneType"):
        an.attention_vjp(*inputs, **rules | {"modifiers": rules["modifiers"][:1]})


def test_the_forward_pass_does_not_share_its_rules(card):
    """Those of gradients have derivatives, and other parameters."""
    q, k, v, dout = lying(*SHAPES)
    cap = an.SoftCap(2.0)
    an.attention(q, k, v, modifiers=cap)
    an.attention_vjp(q, k, v, dout, modifiers=cap)
    an.attention(q, k, v, modifiers=cap)
    assert card.compiled == ["general", *PASSES]


def test_new_parameters_compile_nothing(card):
    inputs = lying(*SHAPES)
    for slope in (0.1, 0.2):
        an.attention_vjp(*inputs, modifiers=an.ALiBi(slope), query_offset=2)
    assert card.compiled == [*PASSES, "gradient_rules", "sums"]


def test_saved_results_take_a_kernel_of_their_own(card):
    q, k, v, dout = lying(*SHAPES)
    out, lse = lying(SHAPES[3], SHAPES[3][:3])
    an.attention_vjp(q, k, v, dout)
    an.attention_vjp(q, k, v, dout, saved=(out, lse))
    assert card.compiled == [*PASSES, "gradient_rows"]
    assert lse.array.ctypes.data in card.started[4].arguments
    with pytest.raises(TypeError, match="saved: lse is ndarray in host memory; q is on a GPU"):
        an.attention_vjp(q, k, v, dout, saved=(out.array, lse.array))


def test_missing_leading_axes(card):
    bias = an.Bias(np.zeros((10, 12)))
    found = an.attention_vjp(*lying((10, 8), (1, 12, 8), (12, 16), (10, 16)), modifiers=bias)
    assert [x.shape for x in (found.q, found.k, found.v)] == [(10, 8), (1, 12, 8), (12, 16)]
    assert found.of(bias).shape == (10, 12)


def test_host_arrays_go_over_and_come_back(card):
    inputs = host(*SHAPES)
    rules = every_rule()
    found = an.attention_vjp(*inputs, backend="cuda", **rules)
    assert {type(x) for x in (found.q, found.k, found.v, found.of(rules["score"]))} == {np.ndarray}
    assert {x.nbytes for x in inputs} <= set(card.uploads)
    assert {x.stream for x in card.started} == {driver.THREAD_STREAM}
    with pytest.raises(ValueError, match="stream is int; needed None for arrays in host memory"):
        an.attention_vjp(*inputs, backend="cuda", stream=7)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_dtypes(card, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    score = an.Additive(np.ones((5, 8)), np.ones((5, 8)), np.ones(5))
    found = an.attention_vjp(*lying(*SHAPES, dtype=dtype), score=score)
    assert found.q.dtype.name == np.dtype(dtype).name
    assert {x.dtype for x in found.of(score)} == {np.dtype("float64" if dtype == "float64" else "float32")}
    assert ("copies" in card.compiled) == (dtype != "float64")


ON_TENSOR_CORES = ["mma_facts", "mma_queries", "mma_keys"]


@pytest.mark.parametrize("given", [False, True])
def test_16_bits_go_to_tensor_cores(card, given):
    """They compute their own facts, so what was saved is not looked at; the host waits for nothing."""
    q, k, v, dout = lying(*SHAPES, dtype=np.float16)
    saved = None
    if given:
        saved = Lying(dout.array), Lying(np.zeros(dout.array.shape[:3], np.float32))
    found = an.attention_vjp(q, k, v, dout, saved=saved, mask=an.Causal(), query_offset=2)
    assert card.compiled == ON_TENSOR_CORES
    facts, queries, keys = card.started
    dq, dk, dv = (x.__cuda_array_interface__["data"][0] for x in (found.q, found.k, found.v))
    inputs = {x.array.ctypes.data for x in (q, k, v, dout)}
    assert all(inputs <= set(started.arguments) for started in card.started)
    assert dq in queries.arguments
    assert {dk, dv} <= set(keys.arguments)
    assert not {dq, dk, dv} & set(facts.arguments)


def test_arrays_of_rules_are_left_to_the_general_kernels(card):
    rules = {"modifiers": an.ALiBi(np.ones(4)), "normalizer": an.Softmax(np.zeros(4)), "query_offset": 0}
    found = an.attention_vjp(*lying(*SHAPES, dtype=np.float16), **rules)
    assert card.compiled == ["gradient_rows", *ON_TENSOR_CORES, "gradient_rules", "sums"]
    assert found.of(rules["modifiers"]).shape == (4,)


def test_saved_of_host_arrays_is_still_looked_at(card, monkeypatch):
    q, k, v, dout = host(*SHAPES, dtype=np.float16)
    asked = []
    monkeypatch.setattr(gradients, "_require_same", lambda lse, total, call, rank: asked.append(total.shape))
    an.attention_vjp(q, k, v, dout, backend="cuda", saved=(dout, np.zeros(dout.shape[:3], np.float32)))
    assert card.compiled == ["gradient_rows", *ON_TENSOR_CORES]
    assert asked == [dout.shape[:3]]


@pytest.mark.parametrize("change", ["size", "odd address", "other normalizer", "older card"])
def test_what_tensor_cores_cannot_serve_goes_to_the_general_kernels(card, change, monkeypatch):
    shapes, rules = SHAPES, {}
    if change == "size":
        shapes = ((2, 4, 10, 12), (2, 2, 12, 12), *SHAPES[2:])
    elif change == "other normalizer":
        rules["normalizer"] = an.Sparsemax()
    elif change == "older card":
        monkeypatch.setattr(card, "capability", (7, 5))
    arrays = lying(*shapes, dtype=np.float16)
    if change == "odd address":
        wide = np.zeros((2, 4, 10, 17), np.float16)
        arrays[3] = Lying(wide[..., 1:])
    an.attention_vjp(*arrays, **rules)
    assert card.compiled == PASSES


@pytest.mark.parametrize("shape", [(0, 4, 10, 8), (2, 4, 0, 8)])
def test_what_has_no_rows_starts_only_what_has_results(card, shape):
    B = shape[0]
    alibi = an.ALiBi(1.0)
    found = an.attention_vjp(
        *lying(shape, (B, 2, 12, 8), (B, 2, 12, 16), (*shape[:3], 16)), modifiers=alibi, query_offset=0
    )
    assert (found.q.shape, found.k.shape) == (shape, (B, 2, 12, 8))
    assert card.compiled == (["sums"] if B == 0 else ["gradient", "gradient", "sums"])  # dk and dv are 0


# --- streams ---


def test_a_call_is_on_the_stream_of_q_and_waits_for_the_others(card):
    streams = (5, 6, 5, 7)
    (q,), (k,), (v,), (dout,) = (lying(x, stream=n) for x, n in zip(SHAPES, streams, strict=True))
    an.attention_vjp(q, k, v, dout)
    assert {x.stream for x in card.started} == {5}
    assert sorted(card.waits) == [(6, 5), (7, 5)]
    an.attention_vjp(q, k, v, dout, stream=9)
    assert card.started[-1].stream == 9
    assert card.held[-1] == (q, k, v, dout)


# --- errors ---


def custom(s, b, h, i, j, p):
    return s + j


ERRORS = {
    "dout has shape (2, 4, 10, 8); needed (2, 4, 10, 16), the shape of the output": (
        {"dout": (2, 4, 10, 8)}, ValueError),
    "dout has dtype float64; q has float32": ({"dout": np.float64}, TypeError),
    "k has 3 heads; q has 4, not a multiple of 3": ({"k": (2, 3, 12, 8)}, ValueError),
    "modifiers[1], CustomModifier, has no slope; gradients need it": (
        {"modifiers": [an.SoftCap(1.0), an.CustomModifier(custom)], "query_offset": 0}, ValueError),
    "saved was given, but Sparsemax has no lse": ({"saved": (1, 2), "normalizer": an.Sparsemax()}, ValueError),
    "saved: lse has shape (2, 4, 9); needed (2, 4, 10)": ({"saved": (SHAPES[3], (2, 4, 9))}, ValueError),
    "saved is 3 things; needed (out, lse)": ({"saved": (1, 2, 3)}, TypeError),
}  # fmt: skip


@pytest.mark.parametrize("place", ["card", "host"])
@pytest.mark.parametrize("message", ERRORS)
def test_errors(card, message, place):
    changes, error = ERRORS[message]
    changes = dict(changes)
    wrap = Lying if place == "card" else lambda x: x
    given = dict(zip(("q", "k", "v", "dout"), map(wrap, host(*SHAPES)), strict=True))
    for name in ("dout", "k"):
        change = changes.pop(name, None)
        if isinstance(change, tuple):
            given[name] = wrap(host(change)[0])
        elif change is not None:
            given[name] = wrap(host(SHAPES[3], dtype=change)[0])
    if isinstance(changes.get("saved", (0,))[0], tuple):
        changes["saved"] = tuple(wrap(x) for x in host(*changes["saved"]))
    with pytest.raises(error, match=re.escape(message)):
        an.attention_vjp(*given.values(), backend="cuda", **changes)
    assert not card.started


def test_arrays_on_different_cards(card, monkeypatch):
    q, k, v, dout = lying(*SHAPES)
    monkeypatch.setattr(driver, "card_of", lambda pointer: int(pointer == dout.array.ctypes.data))
    with pytest.raises(ValueError, match="dout is on card 1; q is on card 0"):
        an.attention_vjp(q, k, v, dout)


def test_what_no_kernel_serves_is_refused_by_name(card, monkeypatch):
    monkeypatch.setattr(backward_general, "MOST_BLOCKS", (3, 3))
    with pytest.raises(NotImplementedError, match=r"gradient by q would take 8 blocks.*'cpu' and 'reference' serve it"):
        an.attention_vjp(*lying(*SHAPES))
    assert not card.started


def test_out_of_memory_names_the_bytes(card):
    card.memory = 1000
    with pytest.raises(MemoryError, match="fake card 0 has no 2560 bytes"):
        an.attention_vjp(*lying(*SHAPES))


def test_an_lse_of_another_call_is_named():
    """By the sums of the weights that it gives, which the kernels write beside it."""
    from attn_numba import problem

    x = np.zeros((2, 3, 4), np.float32)
    call = problem.check(x, x, x)
    lse, total = np.zeros((1, 2, 3), np.float32), np.ones((1, 2, 3), np.float32)
    lse[0, 0], total[0, 0] = (-np.inf, np.nan, 1e4), (0, np.nan, 1.1)  # no key; a key of NaN; digits that are lost
    gradients._require_same(lse, total, call, 2)
    for found, wrong in ((1.1, 0.0), (0.5, -np.inf), (np.nan, 0.0), (0.0, np.nan)):
        other_lse, other = lse.copy(), total.copy()
        other_lse[0, 1, 2], other[0, 1, 2] = wrong, found
        with pytest.raises(ValueError, match=re.escape(f"saved: lse is {wrong:.6g} at (1, 2), and the row's weights")):
            gradients._require_same(other_lse, other, call, 2)


def test_views_change_their_axes():
    view = arrays.View(1000, (2, 3, 4, 5), (240, 80, 20, 4), np.dtype(np.float32))
    moved = gradients._permuted(view, (3, 0, 2, 1))
    assert (moved.shape, moved.strides, moved.pointer) == ((5, 2, 4, 3), (4, 240, 20, 80), 1000)
    column = gradients._column(view, 2)
    assert (column.shape, column.strides, column.pointer) == ((2, 3, 4, 1), (240, 80, 20, 4), 1008)

"""Gradients of every backend against the reference and torch, over all cases and dtypes; and that their bits stay."""

import ctypes

import numpy as np
import pytest

import attn_numba as an
from attn_numba import problem
from attn_numba.cpu.binding import bind
from attn_numba.cpu.choices import GROUP_ROWS
from attn_numba.cpu.plan import BACKWARD_ROWS
from attn_numba.gradient_checks import arrays_of
from attn_numba.rules import as_modifiers
from attn_numba.testing import check_attention_vjp
from cases import CASES, additive, rules_of
from combinations import BACKENDS, DTYPES, OTHER_RULES, fits

BACKENDS = [name for name in BACKENDS if name not in ("reference", "cuda")]
COMBINED = [
    (case, name)
    for n, case in enumerate(CASES)
    for name in [list(OTHER_RULES)[n // 2 % len(OTHER_RULES)]]
    if n % 2 and fits(case, OTHER_RULES[name])
]


def differentiable(kwargs):
    return all(modifier.differentiable for modifier in as_modifiers(kwargs.get("modifiers")))


def gradient_by_output(q, sizes, seed=7):
    shape = (*q.shape[:-1], sizes.E)
    return np.random.default_rng(seed).standard_normal(shape).astype(q.dtype)


DIFFERENTIABLE = [case for case in CASES if differentiable(case.kwargs())]


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


# float16 and bfloat16 are computed in float32: they differ in how arrays are read and written, which some cases show.
TYPED = [(case, dtype) for dtype in DTYPES for case in DIFFERENTIABLE[:: 1 if dtype in ("float64", "float32") else 5]]


@pytest.mark.parametrize(("case", "dtype"), TYPED, ids=lambda x: getattr(x, "name", x))
def test_case(case, dtype, backend):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    q, k, v, kwargs = case.build(dtype)
    check_attention_vjp(q, k, v, gradient_by_output(q, case.sizes), backend, name=case.name, **kwargs)


def test_every_rule_with_a_gradient_has_a_case():
    found = {type(rule) for case in DIFFERENTIABLE for rule in rules_of(case.kwargs())}
    wanted = {an.Bias, an.ALiBi, an.Temperature, an.AdaptiveSpan, an.Bilinear, an.Additive, an.Cosine, an.SoftCap}
    assert wanted | {an.ReplaceExcluded, an.Sparsemax, an.Entmax15, an.DoubleSoftmax, an.Dropout} <= found


@pytest.mark.parametrize("case", [c for c in CASES if c not in DIFFERENTIABLE], ids=lambda case: case.name)
def test_a_modifier_without_slope_is_named(case, backend):
    q, k, v, kwargs = case.build("float32")
    with pytest.raises(ValueError, match=r"modifiers\[\d\], CustomModifier, has no slope"):
        an.attention_vjp(q, k, v, gradient_by_output(q, case.sizes), backend=backend, **kwargs)


@pytest.mark.parametrize(("case", "name"), COMBINED, ids=lambda x: getattr(x, "name", x))
def test_case_with_another_rule(case, name, backend):
    """Masks, modifiers, grouped heads, empty rows and hidden NaN with the other normalizers and the other score."""
    q, k, v, kwargs = case.build("float32")
    if not differentiable(kwargs):
        pytest.skip("a modifier has no slope")
    ((argument, rule),) = OTHER_RULES[name].items()
    kwargs[argument] = rule(np.random.default_rng(4), case.sizes) if callable(rule) else rule
    check_attention_vjp(q, k, v, gradient_by_output(q, case.sizes), backend, name=f"{case.name}, {name}", **kwargs)


def squared(s, b, h, i, j, p):
    return s + p[0] * s * s


CUSTOM = an.CustomModifier(squared, params=(0.1,), slope=lambda s, b, h, i, j, p: 1 + 2 * p[0] * s)


def long_calls():
    """Calls over several tiles of keys and blocks of rows, with everything that items share."""
    rng = np.random.default_rng(3)
    B, H, M, N = 2, 4, 150, 900
    yield "full", {}
    yield "causal", {"mask": an.Causal(), "query_offset": N - M}
    yield "window", {"mask": an.SlidingWindow(200, 30), "query_offset": 500}
    yield "dropout", {"dropout": an.Dropout(0.3, 5), "query_offset": 0}
    yield "custom", {"modifiers": [CUSTOM, an.SoftCap(4.0), an.ALiBi(rng.random(H))], "query_offset": 100}
    for axes in ("BHMN", "HMN", "MN", "BMN", "BN", "HM", "N", "M"):
        shape = [size if axis in axes else 1 for axis, size in zip("BHMN", (B, H, M, N), strict=True)]
        array = rng.standard_normal(shape).astype(np.float32)
        yield f"bias {axes}", {"modifiers": [an.Bias(array), an.Temperature(1 + rng.random((B, H, M)))]}
    yield "span", {"modifiers": an.AdaptiveSpan(rng.uniform(50, 500, (B, H, M)), 40.0), "query_offset": 400}
    yield "sink", {"normalizer": an.Softmax(rng.standard_normal(H)), "mask": an.Causal(), "query_offset": 0}
    yield "sparsemax", {"normalizer": an.Sparsemax(), "scale": 1.0}
    yield "entmax", {"normalizer": an.Entmax15(), "modifiers": an.SoftCap(3.0)}
    yield "softmax twice", {"normalizer": an.DoubleSoftmax(), "mask": an.Causal(), "query_offset": 700}
    yield "cosine", {"score": an.Cosine(), "scale": 8.0}
    yield "negative scale", {"scale": -0.2}


LONG = dict(long_calls())
LONG_SIZES = (2, 4, 2, 150, 900, 40, 24)


def long_arrays(dtype=np.float32, sizes=LONG_SIZES, seed=0):
    B, H, Hk, M, N, D, E = sizes
    rng = np.random.default_rng(seed)
    shapes = (B, H, M, D), (B, Hk, N, D), (B, Hk, N, E), (B, H, M, E)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def same_bits(a, b):
    """Whether all gradients are equal bit for bit (the sign of a zero apart)."""
    x, y = arrays_of(a), arrays_of(b)
    assert x.keys() == y.keys()
    return all(np.array_equal(x[key], y[key], equal_nan=True) for key in x)


@pytest.mark.parametrize("name", LONG)
def test_several_tiles(name, backend):
    check_attention_vjp(*long_arrays(), backend, name=name, **LONG[name])


def test_additive_over_several_tiles(backend):
    q, k, v, dout = long_arrays(sizes=(1, 2, 1, 70, 500, 12, 9))
    check_attention_vjp(
        q, k, v, dout, backend, score=additive(np.random.default_rng(0), an.rules.Sizes(1, 2, 1, 70, 500, 12, 9))
    )


@pytest.mark.parametrize("name", LONG)
def test_same_bits_for_any_number_of_threads(name, backend):
    arrays = long_arrays()
    with an.threads(1):
        alone = an.attention_vjp(*arrays, backend=backend, **LONG[name])
    for threads in (2, 5):
        with an.threads(threads):
            assert same_bits(alone, an.attention_vjp(*arrays, backend=backend, **LONG[name])), threads


@pytest.mark.parametrize("name", ["full", "causal", "window", "sparsemax", "softmax twice", "negative scale"])
def test_same_bits_alone_and_in_a_batch(name, backend):
    arrays = long_arrays()
    whole = an.attention_vjp(*arrays, backend=backend, **LONG[name])
    for b in range(2):
        part = an.attention_vjp(*(x[b : b + 1] for x in arrays), backend=backend, **LONG[name])
        for key in "qkv":
            np.testing.assert_array_equal(getattr(part, key)[0], getattr(whole, key)[b])


@pytest.mark.parametrize("normalizer", [an.Softmax(), an.Sparsemax(), an.Entmax15(), an.DoubleSoftmax()], ids=repr)
def test_same_bits_whatever_is_skipped(normalizer, backend):
    """A mask whose tiles are known, the same one as an array, and the keys left out."""
    q, k, v, dout = long_arrays()
    M, N = q.shape[2], k.shape[2]
    i, j = np.arange(M)[:, None] + 300, np.arange(N)
    rules = {"normalizer": normalizer, "backend": backend}
    known = an.attention_vjp(q, k, v, dout, mask=an.Causal(), query_offset=300, **rules)
    array = an.attention_vjp(q, k, v, dout, mask=an.Dense(j <= i), **rules)
    fewer = an.attention_vjp(q, k[:, :, :450], v[:, :, :450], dout, mask=an.Causal(), query_offset=300, **rules)
    assert same_bits(known, array)
    np.testing.assert_array_equal(known.q, fewer.q)
    np.testing.assert_array_equal(known.k[:, :, :450], fewer.k)
    np.testing.assert_array_equal(known.v[:, :, :450], fewer.v)
    assert not known.k[:, :, 450:].any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("rules", [{}, {"normalizer": an.Sparsemax()},
                                   {"dropout": an.Dropout(0.4, 1), "query_offset": 0},
                                   {"modifiers": [an.SoftCap(5.0)]}, {"normalizer": an.Softmax(0.3)},
                                   {"score": an.Cosine(), "scale": 4.0}], ids=lambda x: " ".join(x))  # fmt: skip
def test_what_is_hidden_changes_no_bit(rules, bad, backend):
    """Keys that nobody sees, and rows that see nothing, in the same tiles as others."""
    q, k, v, dout = long_arrays()
    M, N = q.shape[2], k.shape[2]
    rng = np.random.default_rng(5)
    allowed = rng.random((M, N)) < 0.5
    hidden, empty = rng.random(N) < 0.1, rng.random(M) < 0.2
    allowed[:, hidden], allowed[empty] = False, False
    rules = {"mask": an.Dense(allowed), "backend": backend, **rules}
    clean = an.attention_vjp(q, k, v, dout, **rules)
    q, k, v, dout = (x.copy() for x in (q, k, v, dout))
    k[:, :, hidden], v[:, :, hidden] = bad, -bad
    q[:, :, empty], dout[:, :, empty] = bad, -bad
    assert same_bits(clean, an.attention_vjp(q, k, v, dout, **rules))
    assert not clean.q[:, :, empty].any()
    assert not clean.k[:, :, hidden].any()
    assert not clean.v[:, :, hidden].any()


@pytest.mark.parametrize("place", ["q", "k", "v", "dout"])
def test_a_nan_that_is_seen_reaches_what_sees_it_and_no_other(place, backend):
    """Causal, one head: where the reference is finite, so is the backend, and where not, not."""
    arrays = dict(zip(("q", "k", "v", "dout"), long_arrays(sizes=(1, 1, 1, 450, 450, 20, 20)), strict=True))
    arrays[place][0, 0, 200, 3] = np.nan
    check_attention_vjp(*arrays.values(), backend, mask=an.Causal())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["full", "causal", "custom", "sink", "dropout", "span"])
def test_saved_results(name, dtype, backend):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    arrays = [x.astype(dtype) for x in long_arrays()]
    saved = an.attention(*arrays[:3], backend=backend, return_lse=True, **LONG[name])
    check_attention_vjp(*arrays, backend, name=name, saved=tuple(saved), **LONG[name])


def test_saved_of_another_call_is_named(backend):
    q, k, v, dout = long_arrays()
    out, lse = an.attention(q, k, v, backend=backend, return_lse=True)
    rules = {"backend": backend}
    for other in ((out, lse + 0.2), (out, lse * 0), (out, np.full_like(lse, -np.inf)), (2 * out, lse), (-out, lse)):
        with pytest.raises(ValueError, match="saved: (out|lse) is .*of another call"):
            an.attention_vjp(q, k, v, dout, saved=other, **rules)
    with pytest.raises(ValueError, match="saved: lse is .*of another call"):
        an.attention_vjp(q, k, v, dout, saved=(out, lse), mask=an.Causal(), query_offset=500, **rules)
    with pytest.raises(ValueError, match="saved was given, but Sparsemax has no lse"):
        an.attention_vjp(q, k, v, dout, saved=(out, lse), normalizer=an.Sparsemax(), **rules)
    with pytest.raises(ValueError, match=r"saved: out has shape .*: it is of another call"):
        an.attention_vjp(q, k, v, dout, saved=(out[:1], lse), **rules)
    with pytest.raises(ValueError, match=r"dout has shape \(2, 4, 150, 23\); needed"):
        an.attention_vjp(q, k, v, dout[..., 1:], **rules)
    with pytest.raises(TypeError, match="dout has dtype float64; q has float32"):
        an.attention_vjp(q, k, v, dout.astype(np.float64), **rules)


def test_inputs_stay_and_results_are_new(backend):
    arrays = long_arrays()
    copies = [x.copy() for x in arrays]
    found = an.attention_vjp(*arrays, backend=backend)
    for x, copy in zip(arrays, copies, strict=True):
        np.testing.assert_array_equal(x, copy)
        assert not any(np.shares_memory(x, getattr(found, name)) for name in "qkv")
    assert all(getattr(found, name).flags.c_contiguous and getattr(found, name).flags.writeable for name in "qkv")


@pytest.mark.parametrize("rows", sorted({BACKWARD_ROWS, *GROUP_ROWS}))
def test_as_many_rows_as_kernels_take_are_told_apart_by_their_ids(rows):
    """Else whole tiles of pairs that no row sees would be computed: no wrong number, but sixteen times the time."""
    q = np.zeros((1, 1, 1024, 8), "float32")
    rules = problem.check(q, q, q, mask=an.SameDocument(np.arange(1024)[None] // 256))
    bound = bind(rules, gradients=True)
    kind = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 7)(bound.hooks[0])
    assert [kind(0, 0, 256, 256 + rows, j, j + 256, bound.address) for j in (0, 256, 512)] == [0, 2, 0]

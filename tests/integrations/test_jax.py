"""The bridge to JAX: its own check of gradients, the bits of `attention_vjp`, jit and vmap, and what it refuses."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed; it belongs to the extra jax")

import jax.numpy as jnp  # noqa: E402
from jax.test_util import check_grads  # noqa: E402

import attn_numba as an  # noqa: E402
from attn_numba import api  # noqa: E402
from attn_numba.integrations import jax as bridge  # noqa: E402
from attn_numba.integrations.jax import attention, defer  # noqa: E402
from bridge_cases import CALLS, M, N, at_once, bits, expected, require_gradients  # noqa: E402

DTYPES = ("float64", "float32", "float16", "bfloat16")


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        yield


@pytest.fixture
def backend(backend):
    """Each backend that has gradients."""
    return require_gradients(backend)


def arrays_of(call, dtype="float64"):
    """Return q, k, v and the arrays of rules as JAX's arrays, and the gradient by the output."""
    *qkv, dout = (jnp.asarray(x).astype(dtype) for x in call.build())
    return qkv, [jnp.asarray(x) for x in call.arrays], dout


def function_of(call, backend):
    """Return attention as a function of q, k, v and the arrays of rules."""
    return lambda q, k, v, *learned: attention(q, k, v, **call.rules(defer, *learned), backend=backend)


@pytest.mark.parametrize("name", CALLS)
def test_check_grads(name, backend):
    qkv, learned, _ = arrays_of(CALLS[name])
    function = jax.jit(function_of(CALLS[name], backend))
    check_grads(function, (*qkv, *learned), order=1, modes=["rev"], eps=1e-5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_bits_are_those_of_attention_vjp(name, dtype, backend):
    call = CALLS[name]
    qkv, learned, dout = arrays_of(call, dtype)
    out, pull = jax.vjp(function_of(call, backend), *qkv, *learned)
    wanted, gradients = expected(call, [np.asarray(x) for x in (*qkv, dout)], backend)
    assert [*bits(np.asarray(out))] == [*bits(wanted)]
    for x, found, gradient in zip((*qkv, *learned), pull(dout), gradients, strict=True):
        assert [*bits(np.asarray(found))] == [*bits(gradient.astype(x.dtype))]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_arrays_of_rules_in_narrow_dtypes(dtype, backend):
    call = CALLS["several"]
    qkv, learned, dout = arrays_of(call, "float32")
    learned = [x.astype(dtype) for x in learned]
    _, pull = jax.vjp(function_of(call, backend), *qkv, *learned)
    host = [np.asarray(x) for x in learned]
    _, gradients = expected(call, [np.asarray(x) for x in (*qkv, dout)], backend, host)
    for x, found, gradient in zip(learned, pull(dout)[3:], gradients[3:], strict=True):
        assert [*bits(np.asarray(found))] == [*bits(gradient.astype(x.dtype))]


@pytest.mark.parametrize("name", ["plain", "several", "Sparsemax"])
def test_jit_changes_no_bit(name, backend):
    qkv, learned, dout = arrays_of(CALLS[name], "float32")
    function = function_of(CALLS[name], backend)

    def both(dout, *inputs):
        out, pull = jax.vjp(function, *inputs)
        return out, *pull(dout)

    for x, y in zip(both(dout, *qkv, *learned), jax.jit(both)(dout, *qkv, *learned), strict=True):
        assert [*bits(np.asarray(x))] == [*bits(np.asarray(y))]


@pytest.mark.parametrize("name", ["plain", "causal", "Sparsemax"])
def test_vmap_is_one_call_after_the_other(name, backend):
    (q, k, v), _, _ = arrays_of(CALLS[name])
    function = function_of(CALLS[name], backend)
    np.testing.assert_array_equal(jax.vmap(function)(q, k, v), jnp.stack([*map(function, q, k, v)]))
    many = jax.jit(jax.vmap(function, in_axes=(1, None, None), out_axes=2))(jnp.stack([q, 2 * q, q], 1), k, v)
    np.testing.assert_array_equal(many, jnp.stack([function(q, k, v), function(2 * q, k, v), function(q, k, v)], 2))

    def loss(q, k, v):
        return (function(q, k, v) ** 2).sum()

    gradients = jax.grad(loss, (0, 1, 2))
    one_by_one = [gradients(*x) for x in zip(q, k, v, strict=True)]
    for found, parts, whole in zip(
        jax.vmap(gradients)(q, k, v), zip(*one_by_one, strict=True), gradients(q, k, v), strict=True
    ):
        np.testing.assert_array_equal(found, jnp.stack(parts))
        np.testing.assert_array_equal(found, whole)


def test_vmap_over_the_arrays_of_a_rule(backend):
    (q, k, v), (slopes,), _ = arrays_of(CALLS["ALiBi"])

    @jax.grad
    def gradient(slopes):
        return (attention(q, k, v, modifiers=defer(an.ALiBi, slopes), query_offset=0, backend=backend) ** 2).sum()

    many = jnp.stack([slopes, 2 * slopes])
    np.testing.assert_array_equal(jax.vmap(gradient)(many), jnp.stack([*map(gradient, many)]))


def test_the_host_sees_arrays_where_they_lie(backend, monkeypatch):
    q, k, v = (jax.random.normal(jax.random.key(n), (2, 64, 16), "float32") for n in range(3))
    places = [x.unsafe_buffer_pointer() for x in (q, k, v)]
    real, seen = api.attention, []

    def watched(*arrays, **rules):
        seen.extend(x.ctypes.data for x in arrays)
        return real(*arrays, **rules)

    bridge._require(backend)
    monkeypatch.setattr(api, "attention", watched)
    call = bridge._Call(bridge.Template({"mask": None, "normalizer": None}, lambda x: False), backend, (), ())
    bridge._Forward(call, False)((q, k, v), ())
    assert seen == places


@pytest.mark.parametrize("rank", [2, 3])
def test_missing_leading_axes(rank, backend):
    q = jnp.linspace(-1, 1, 24).reshape((1, 6, 4)[3 - rank :])
    out, pull = jax.vjp(partial(attention, mask=an.Causal(), backend=backend), q, q, q)
    assert out.shape == q.shape
    assert [x.shape for x in pull(out)] == [q.shape] * 3


def test_masks_offsets_lengths_and_seeds_may_be_traced(backend):
    (q, k, v), _, dout = arrays_of(CALLS["plain"])

    def gradients(**rules):
        return jax.vjp(lambda *x: attention(*x, **rules, backend=backend), q, k, v)[1](dout)

    def by_mask(mask):
        return gradients(mask=mask)

    def by_offset(offset):
        return gradients(mask=an.Causal(), query_offset=offset)

    def by_lengths(lengths):
        mask = defer(lambda lengths: an.Causal() & an.Padding(lengths), lengths)
        return gradients(mask=mask, query_offset=2)

    wanted = expected(CALLS["causal"], CALLS["plain"].build(), backend)[1]
    shown = jnp.arange(M)[:, None] >= jnp.arange(N) - 2
    for function, given in ((by_mask, shown), (by_offset, 2), (by_offset, jnp.array([2, 2])), (by_lengths, [7, 7])):
        for found, gradient in zip(jax.jit(function)(jnp.asarray(given)), wanted, strict=True):
            np.testing.assert_array_equal(found, gradient)

    @jax.jit
    def dropped(seed):
        return attention(q, k, v, dropout=defer(an.Dropout, 0.4, seed), query_offset=0, backend=backend)

    host = [np.asarray(x) for x in (q, k, v)]
    for seed in (7, 8):
        at_that = an.attention(*host, dropout=an.Dropout(0.4, seed), query_offset=0, backend=backend)
        np.testing.assert_array_equal(dropped(seed), at_that)


def test_a_mask_may_change_after_the_call(backend):
    (q, k, v), _, dout = arrays_of(CALLS["boolean array"])
    mask = CALLS["boolean array"].rules(at_once)["mask"].copy()
    first = jax.vjp(partial(attention, mask=mask, backend=backend), q, k, v)[1](dout)
    _, pull = jax.vjp(partial(attention, mask=mask, backend=backend), q, k, v)
    mask[:] = ~mask
    for x, y in zip(first, pull(dout), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_same_rules_compile_once(backend):
    slopes = jnp.ones(3)
    cap, calls = an.SoftCap(2.0), []
    for factor in (1.0, 2.0, 3.0):
        template = bridge.Template(
            {"mask": None, "modifiers": [cap, defer(an.ALiBi, factor * slopes)], "scale": 0.5},
            lambda x: isinstance(x, jax.Array),
        )
        calls.append(bridge._Call(template, backend, (True,), bridge._key_of(template)))
    assert len({*calls}) == 1
    template = bridge.Template({"mask": None, "modifiers": [cap, an.ALiBi(0.5)], "scale": 0.5}, lambda x: False)
    assert bridge._Call(template, backend, (True,), bridge._key_of(template)) != calls[0]


def test_training_lowers_a_loss(backend):
    hidden = jax.random.normal(jax.random.key(0), (2, 8, 12), "float32")
    target = jnp.cumsum(hidden, 1)
    weights = 0.3 * jax.random.normal(jax.random.key(1), (12, 36), "float32")
    parameters = {"w": weights, "slopes": jnp.full(3, 0.5, "float32"), "sink": jnp.zeros(3, "float32")}

    def loss(parameters):
        q, k, v = jnp.split((hidden @ parameters["w"]).reshape(2, 8, 9, 4).swapaxes(1, 2), 3, axis=1)
        out = attention(
            q, k, v, mask=an.Causal(), modifiers=defer(an.ALiBi, parameters["slopes"]),
            normalizer=defer(an.Softmax, parameters["sink"]), backend=backend,
        )  # fmt: skip
        return ((out.swapaxes(1, 2).reshape(2, 8, 12) - target) ** 2).mean()

    step = jax.jit(jax.value_and_grad(loss))
    losses = []
    for _ in range(40):
        found, gradients = step(parameters)
        losses.append(float(found))
        parameters = jax.tree.map(lambda x, gradient: x - 0.1 * gradient, parameters, gradients)
    assert losses[-1] < 0.9 * losses[0]
    assert (gradients["slopes"] != 0).all()
    assert (gradients["sink"] != 0).all()


def test_large_arrays_do_not_block(backend):
    q, k = jnp.zeros((1, 64), "float32"), jnp.zeros((2**16, 64), "float32")  # 16 MiB
    out, pull = jax.jit(lambda q, k: jax.vjp(partial(attention, backend=backend), q, k, k))(q, k)
    assert out.shape == q.shape
    assert [x.shape for x in pull(out)] == [q.shape, k.shape, k.shape]


# --- what it refuses ---

X = np.zeros((6, 4), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "k is list; needed an array of JAX or NumPy", lambda: {"k": [[0.0]]}),
        (TypeError, "q has dtype int32; needed float64, float32", lambda: {"q": X.astype("int32")}),
        (TypeError, "q, k, v have dtypes float32, float64, float32", lambda: {"k": X.astype("float64")}),
        (ValueError, "k has head size 3; q has 4", lambda: {"k": X[:, :3]}),
        (
            TypeError,
            "scale has dtype float32, and has no gradient here: pass it as NumPy's, or integers, or modifiers=defer",
            lambda: {"scale": jnp.float32(0.5)},
        ),
        (TypeError, "mask has dtype int32; needed a boolean array", lambda: {"mask": jnp.ones((6, 6), "int32")}),
        (
            TypeError,
            "AdaptiveSpan: ramp has dtype float32, and has no gradient here: pass it as NumPy's, or integers",
            lambda: {"modifiers": defer(an.AdaptiveSpan, 2.0, jnp.float32(1))},
        ),
        (
            ValueError,
            "ALiBi: slopes has shape (3,); needed one that broadcasts to (H,) = (1,)",
            lambda: {"modifiers": [defer(an.ALiBi, jnp.ones(3))]},
        ),
        (
            ValueError,
            "modifiers[1], CustomModifier, has no slope",
            lambda: {"modifiers": [an.SoftCap(1.0), an.CustomModifier(lambda s, b, h, i, j, p: s)]},
        ),
        (ValueError, "backend is 'jax'; needed one of", lambda: {"backend": "jax"}),
    ],
)
def test_errors(error, message, arguments):
    """They come when a function is traced, before there is work."""
    inputs = {"q": X, "k": X, "v": X, "backend": "reference", **arguments()}
    q = inputs.pop("q")
    with pytest.raises(error, match=re.escape(message)):
        jax.eval_shape(jax.grad(lambda v: attention(q, **{**inputs, "v": v}).astype(float).sum()), inputs["v"])


def test_float64_that_jax_would_round_is_refused():
    with (
        jax.enable_x64(False) if hasattr(jax, "enable_x64") else jax.experimental.disable_x64(),
        pytest.raises(TypeError, match="q has dtype float64, which JAX rounds unless jax_enable_x64 is set"),
    ):
        attention(X.astype(float), X, X, backend="reference")


def test_a_traced_array_in_a_rule_is_refused_by_name():
    with pytest.raises(TypeError, match="ALiBi: slopes is .*Tracer, which does not make an array"):
        jax.grad(lambda slopes: attention(X, X, X, modifiers=an.ALiBi(slopes)).sum())(1.0)


def test_values_that_do_not_fit_are_named_when_they_are_known():
    lengths = jnp.array([1, 2, 3])
    with pytest.raises(jax.errors.JaxRuntimeError, match=re.escape("Padding: key_lengths has shape (3,); needed")):
        jax.block_until_ready(attention(X, X, X, mask=defer(an.Padding, lengths), backend="reference"))


def test_a_second_derivative_is_refused(backend):
    def total(q):
        return attention(q, X, X, backend=backend).sum()

    with pytest.raises(NotImplementedError, match="attention of attn_numba has first derivatives; a second one"):
        jax.grad(lambda q: jax.grad(total)(q).sum())(X)
    with pytest.raises(NotImplementedError, match="a second one"):
        jax.hessian(total)(jnp.asarray(X))
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(total, (X,), (X,))


def test_a_backend_without_gradients_is_refused_before_there_is_work(monkeypatch):
    def none(*arrays, backend, **rules):
        raise NotImplementedError(f"backend {backend!r} does not compute gradients")

    bridge._require("reference")
    monkeypatch.setattr(api, "attention_vjp", none)
    bridge._require.cache_clear()
    with pytest.raises(NotImplementedError, match="'reference' does not compute gradients"):
        jax.eval_shape(jax.grad(lambda q: attention(q, X, X, backend="reference").sum()), X)
    bridge._require.cache_clear()

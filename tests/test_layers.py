"""SelfAttention against its formulas written out, hand-worked numbers, ranks, and what it refuses."""

import re
import tracemalloc

import numpy as np
import pytest

import attn_numba as an


def written_out(hidden, mask, hidden_size):
    """The formulas one after the other, as they were first written down."""
    scores = hidden @ hidden.swapaxes(1, 2)
    if mask is not None:
        scores = np.where(np.asarray(mask) == 0, -1e9, scores)
    scores = scores / hidden_size
    powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights = powers / powers.sum(axis=-1, keepdims=True)
    return weights @ hidden, weights


def states(B=3, L=50, size=24, dtype=np.float64, seed=0):
    return np.random.default_rng(seed).standard_normal((B, L, size)).astype(dtype)


def masks(B, L):
    rng = np.random.default_rng(5)
    whole = rng.integers(0, 3, (B, L, L))
    empty_rows = (rng.random((B, L, L)) < 0.4).astype(float)
    empty_rows[:, ::4] = 0
    return {
        "none": None,
        "(B, L, L) integers": whole,
        "(B, L, L) bools": whole > 0,
        "(1, L, L)": whole[:1],
        "(L, L)": np.tril(np.ones((L, L), np.float32)),
        "negative numbers keep": -whole.astype(np.float16),
        "empty rows": empty_rows,
        "(B, 1, L)": rng.integers(0, 2, (B, L))[:, None, :],
        "(B, L, 1)": rng.integers(0, 2, (B, L))[:, :, None],
        "nothing kept": np.zeros((L, L), bool),
        "list": whole[0].tolist(),
    }


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", masks(2, 2))
def test_formulas(name, backend):
    hidden = states()
    mask = masks(3, 50)[name]
    context, weights = an.SelfAttention(24)(hidden, mask=mask, backend=backend)
    expected_context, expected_weights = written_out(hidden, mask, 24)
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(context, expected_context, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [1, 7, 64, 300])
def test_float32(size):
    hidden = states(size=size, dtype=np.float32)
    mask = masks(3, 50)["empty rows"]
    context, weights = an.SelfAttention(size)(hidden, mask)
    expected_context, expected_weights = written_out(hidden.astype(np.float64), mask, size)
    assert context.dtype == weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected_weights, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(context, expected_context, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrow_dtypes(dtype):
    name = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    hidden = states(dtype=name)
    context, weights = an.SelfAttention(24)(hidden, np.tril(np.ones((50, 50))))
    expected_context, expected_weights = written_out(hidden.astype(np.float64), np.tril(np.ones((50, 50))), 24)
    assert context.dtype == hidden.dtype
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights, expected_weights, atol=1e-6)
    np.testing.assert_allclose(context.astype(float), expected_context, rtol=0.02, atol=0.02)


def test_worked_by_hand():
    """Scores (4, 0) / 2 = (2, 0): weights 1 / (1 + e^-2); an excluded pair; a row without a key, uniform over all."""
    hidden = np.array([[[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    context, weights = an.SelfAttention(2)(hidden, mask=np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]]))
    first = 1 / (1 + np.exp(-2.0))
    third = 1 / 3
    np.testing.assert_allclose(weights[0], [[first, 1 - first, 0], [0, 1, 0], [third] * 3], rtol=1e-14)
    np.testing.assert_allclose(context[0], [[2 * first, 2 - 2 * first], [0, 2], [11 / 3, 11 / 3]], rtol=1e-14)


def test_the_fill_is_divided_too():
    """With hidden_size 1e8 the fill is -10: an excluded key still weighs e^-10, but 0 if the fill came last."""
    size = 10**8
    layer = an.SelfAttention(1)
    layer.hidden_size = size
    layer._states = lambda hidden: hidden  # hidden states of that size need not be made
    hidden = np.array([[[0.0], [1.0]]])
    _, weights = layer(hidden, mask=np.array([[1, 0], [1, 1]]))
    np.testing.assert_allclose(weights[0, 0, 1], np.exp(-10) / (1 + np.exp(-10)), rtol=1e-12)


def test_divided_by_the_size_not_its_root():
    hidden = np.array([[[4.0, 0, 0, 0], [0, 0, 0, 0]]])
    _, weights = an.SelfAttention(4)(hidden)
    np.testing.assert_allclose(weights[0, 0, 0], 1 / (1 + np.exp(-16 / 4)), rtol=1e-14)


def test_call_and_forward_are_the_same():
    layer, hidden = an.SelfAttention(24), states()
    for ours, other in zip(layer(hidden), layer.forward(hidden), strict=True):
        np.testing.assert_array_equal(ours, other)
    context, weights = layer.forward(hidden, None, True)
    assert context.shape == (3, 50, 24)
    assert weights.shape == (3, 50, 50)
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-14)


def test_context_alone():
    layer, hidden = an.SelfAttention(24), states(dtype=np.float32)
    mask = masks(3, 50)["empty rows"]
    alone = layer(hidden, mask, return_weights=False)
    assert isinstance(alone, np.ndarray)
    np.testing.assert_array_equal(alone, layer(hidden, mask)[0])


def test_long_input_needs_no_square():
    layer, hidden = an.SelfAttention(16), states(1, 8192, 16, np.float32)
    layer(hidden[:, :64], return_weights=False)
    tracemalloc.start()
    layer(hidden, return_weights=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * 2**20  # one row of weights for each state would be 256 MB


def test_any_strides():
    hidden = states(3, 48, 24)
    view = np.ascontiguousarray(hidden[:, ::-1].swapaxes(0, 1)).swapaxes(0, 1)[:, ::-1]
    np.testing.assert_array_equal(an.SelfAttention(24)(view)[0], an.SelfAttention(24)(hidden)[0])


def test_empty_inputs():
    layer = an.SelfAttention(4)
    for shape in ((0, 5, 4), (2, 0, 4)):
        context, weights = layer(np.zeros(shape))
        assert context.shape == shape
        assert weights.shape == (*shape[:2], shape[1])


def test_inputs_are_not_written():
    hidden, mask = states(), masks(3, 50)["empty rows"]
    before = hidden.copy(), mask.copy()
    hidden.flags.writeable = mask.flags.writeable = False
    an.SelfAttention(24)(hidden, mask)
    np.testing.assert_array_equal(hidden, before[0])
    np.testing.assert_array_equal(mask, before[1])


def test_two_axes_mean_queries_and_keys_even_if_there_are_as_many_sequences():
    hidden = states(5, 5, 8)
    mask = np.tril(np.ones((5, 5)))
    np.testing.assert_array_equal(an.SelfAttention(8)(hidden, mask)[1], an.SelfAttention(8)(hidden, mask[None])[1])


@pytest.fixture
def vjp_backend(backend):
    """Each backend that computes gradients here."""
    x = np.zeros((1, 1))
    try:
        an.attention_vjp(x, x, x, x, backend=backend)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return backend


@pytest.mark.parametrize("name", masks(2, 2))
def test_gradient_by_autograd(name, vjp_backend):
    torch = pytest.importorskip("torch")
    hidden, dout, mask = states(), states(seed=1), masks(3, 50)[name]
    leaf = torch.tensor(hidden, requires_grad=True)
    scores = leaf @ leaf.transpose(1, 2)
    if mask is not None:
        scores = torch.where(torch.tensor(np.asarray(mask) == 0), torch.tensor(-1e9, dtype=torch.float64), scores)
    (((scores / 24).softmax(-1) @ leaf) * torch.tensor(dout)).sum().backward()
    found = an.SelfAttention(24).vjp(hidden, dout, mask, backend=vjp_backend)
    np.testing.assert_allclose(found, leaf.grad, rtol=1e-9, atol=1e-10)


def test_gradient_by_central_differences(vjp_backend):
    """The slope along one direction is the gradient times the direction."""
    hidden, dout, direction, layer = states(), states(seed=1), states(seed=2), an.SelfAttention(24)
    mask, step = masks(3, 50)["empty rows"], 1e-5
    above, below = (layer(hidden + s * direction, mask, return_weights=False) for s in (step, -step))
    slope = ((above - below) * dout).sum() / (2 * step)
    found = layer.vjp(hidden, dout, mask, backend=vjp_backend)
    np.testing.assert_allclose((found * direction).sum(), slope, rtol=1e-6)


def test_gradient_worked_by_hand(vjp_backend):
    """One state attends to itself alone; of two with equal scores each context moves half with either state."""
    found = an.SelfAttention(1).vjp(np.array([[[3.0]]]), np.array([[[5.0]]]), backend=vjp_backend)
    np.testing.assert_array_equal(found, [[[5.0]]])
    zeros = np.zeros((1, 2, 1))
    np.testing.assert_array_equal(an.SelfAttention(1).vjp(zeros, zeros + 1, backend=vjp_backend), zeros + 1)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 0.02), ("bfloat16", 0.1)])
def test_gradient_of_narrower_dtypes(dtype, tolerance, vjp_backend):
    name = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    hidden, dout = states(dtype=name), states(dtype=name, seed=1)
    found = an.SelfAttention(24).vjp(hidden, dout, backend=vjp_backend)
    wanted = an.SelfAttention(24).vjp(hidden.astype(float), dout.astype(float), backend="reference")
    assert found.dtype == hidden.dtype
    np.testing.assert_allclose(found.astype(float), wanted, rtol=tolerance, atol=tolerance)


def layer():
    return an.SelfAttention(8)


def differentiated(hidden, dout):
    return layer().vjp(hidden, dout, backend="reference")


REFUSED = [
    (lambda: an.SelfAttention(2.0), TypeError, "hidden_size is float; needed an integer"),
    (lambda: an.SelfAttention(True), TypeError, "hidden_size is True; needed an integer"),
    (lambda: an.SelfAttention(0), ValueError, "hidden_size is 0; needed at least 1"),
    (lambda: layer()(np.zeros((3, 8))), ValueError, "hidden has shape (3, 8); needed 3 axes, (B, L, hidden_size)"),
    (lambda: layer()(np.zeros((1, 2, 3, 8))), ValueError, "hidden has shape (1, 2, 3, 8)"),
    (lambda: layer()(np.zeros((2, 3, 9))), ValueError, "hidden has states of size 9; the layer was made for 8"),
    (lambda: layer()(np.zeros((2, 3, 8), int)), TypeError, "hidden has dtype int64; needed float64, float32, float16"),
    (lambda: layer()([[[0.0] * 8]]), TypeError, "hidden is list; needed an array"),
    (lambda: layer()(states(2, 3, 8), np.ones((2, 3))), ValueError, "mask[:, None, :]"),
    (lambda: layer()(states(2, 3, 8), np.ones((1, 3))), ValueError, "(2, 3, 3), (1, 3, 3) or (3, 3)"),
    (lambda: layer()(states(2, 3, 8), np.ones((3, 3, 3))), ValueError, "mask has shape (3, 3, 3); needed (2, 3, 3)"),
    (lambda: layer()(states(2, 3, 8), np.ones((2, 1, 3, 3))), ValueError, "mask has shape (2, 1, 3, 3)"),
    (lambda: layer()(states(2, 3, 8), np.ones(3)), ValueError, "mask has shape (3,)"),
    (lambda: layer()(states(2, 3, 8), "causal"), TypeError, "needed numbers or truth values, 0 = excluded"),
    (lambda: layer()(states(2, 3, 8), an.Causal()), TypeError, "mask is Causal"),
    (lambda: layer()(states(2, 3, 8), np.full((3, 3), np.nan)), ValueError, "mask holds NaN"),
    (lambda: layer()(states(2, 3, 8), backend="metal"), ValueError, "backend is 'metal'"),
    (lambda: differentiated(states(2, 3, 8), states(2, 4, 8)), ValueError, "dout has shape (2, 4, 8); needed that of"),
    (lambda: differentiated(states(2, 3, 8), states(2, 3, 8, "f4")), TypeError, "dout has dtype float32; hidden has"),
    (lambda: differentiated(states(2, 3, 9), states(2, 3, 9)), ValueError, "hidden has states of size 9"),
    (lambda: differentiated(states(2, 3, 8), [0.0]), TypeError, "dout is list; needed an array"),
]


@pytest.mark.parametrize(("call", "kind", "message"), REFUSED, ids=[message for _, _, message in REFUSED])
def test_refused(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()

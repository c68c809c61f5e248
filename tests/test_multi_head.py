"""MultiHeadAttention against torch's layer, torch's autograd, central differences and hand-worked numbers."""

import numpy as np
import pytest

import attn_numba as an
from multi_head_cases import PARTS, Written, made, states

TOLERANCE = {"float32": 2e-5, "float16": 2e-2, "bfloat16": 0.1}


@pytest.fixture
def vjp_backend(backend):
    """Each backend that computes gradients here."""
    x = np.zeros((1, 1))
    try:
        an.attention_vjp(x, x, x, x, backend=backend)
    except NotImplementedError as error:
        pytest.skip(str(error))
    return backend


LAYERS = {
    "plain": {},
    "no bias": {"bias": False},
    "grouped": {"key_heads": 2},
    "one key head": {"key_heads": 1, "bias": False},
    "value size": {"value_size": 5, "key_heads": 2},
    "head size": {"head_size": 7},
    "halves": {"head_size": 6, "rotary": "halves", "key_heads": 2},
    "neighbors": {"head_size": 6, "rotary": "neighbors", "base": 50.0},
}
SHAPES = ["self", "cross"]


def called(name, shape, dtype="float64"):
    """A layer, its states, its context, offsets."""
    options = LAYERS[name] | ({"context_size": 8} if shape == "cross" else {})
    layer = made(dtype=dtype, **options)
    context = states(L=9, size=8, seed=1, dtype=dtype) if shape == "cross" else None
    offsets = {"query_offset": np.array([3, 0])} if shape == "cross" else {}
    return layer, states(dtype=dtype), context, offsets


def assert_gradients(grads, written, rtol=1e-9, **bounds):
    pairs = {"hidden": (grads.hidden, written.hidden)}
    pairs |= {name: (grads.parameters[name], leaf) for name, leaf in written.parameters.items()}
    if written.context is not None:
        pairs["context"] = grads.context, written.context
    else:
        assert grads.context is None
    assert list(grads.parameters) == list(written.parameters)
    for name, (found, leaf) in pairs.items():
        expected = leaf.grad.numpy()
        error = np.abs(found.astype(float) - expected).max()
        assert error <= rtol * max(np.abs(expected).max(), 1), f"{name}: {error}"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_forward(name, shape, backend):
    layer, hidden, context, offsets = called(name, shape)
    written = Written(layer, hidden, context)
    allowed = np.arange(6)[:, None] + np.array([3, 0])[:, None, None, None] >= np.arange(9)
    allowed = allowed if shape == "cross" else np.tri(6, dtype=bool)
    scores = written.scores(offsets.get("query_offset", 0))
    out, weights = layer(hidden, context, mask=an.Causal(), return_weights=True, backend=backend, **offsets)
    expected = written.result(scores, allowed).detach().numpy()
    np.testing.assert_allclose(out, expected, rtol=1e-11, atol=1e-12)
    assert weights.shape == scores.shape
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-12)
    np.testing.assert_array_equal(layer.forward(hidden, context, mask=an.Causal(), backend=backend, **offsets), out)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_by_autograd(name, shape, vjp_backend):
    layer, hidden, context, offsets = called(name, shape)
    written, dout = Written(layer, hidden, context), states(seed=5)
    allowed = np.arange(6)[:, None] + np.array([3, 0])[:, None, None, None] >= np.arange(9)
    allowed = allowed if shape == "cross" else np.tri(6, dtype=bool)
    written.result(written.scores(offsets.get("query_offset", 0)), allowed).backward(written.torch.tensor(dout))
    rules = {"mask": an.Causal(), "backend": vjp_backend, **offsets}
    grads = layer.vjp(hidden, dout, context, **rules)
    assert_gradients(grads, written)
    _, saved = layer(hidden, context, return_saved=True, **rules)
    again = layer.vjp(hidden, dout, context, saved=saved, **rules)
    np.testing.assert_array_equal(again.hidden, grads.hidden)
    for part, array in grads.parameters.items():
        np.testing.assert_array_equal(again.parameters[part], array)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_layer_of_torch(shape, bias, vjp_backend):
    torch = pytest.importorskip("torch")
    sizes = {"context_size": 8} if shape == "cross" else {}
    layer = made(bias=bias, **sizes)
    torch_sizes = {"kdim": 8, "vdim": 8} if sizes else {}
    theirs = torch.nn.MultiheadAttention(12, 4, bias=bias, batch_first=True, dtype=torch.float64, **torch_sizes)
    ours = {name: torch.tensor(array) for name, array in layer.parameters.items()}
    loaded = {"out_proj.weight": ours["output.weight"]}
    if sizes:
        loaded |= {f"{part[0]}_proj_weight": ours[f"{part}.weight"] for part in PARTS[:3]}
    else:
        loaded["in_proj_weight"] = torch.cat([ours[f"{part}.weight"] for part in PARTS[:3]])
    if bias:
        loaded["in_proj_bias"] = torch.cat([ours[f"{part}.bias"] for part in PARTS[:3]])
        loaded["out_proj.bias"] = ours["output.bias"]
    theirs.load_state_dict(loaded)
    hidden, context, dout = states(), states(L=9, size=8, seed=1) if sizes else None, states(seed=5)
    x = torch.tensor(hidden, requires_grad=True)
    y = torch.tensor(context, requires_grad=True) if sizes else x
    padding = np.arange(9 if sizes else 6) >= np.array([[5], [3]])
    out, weights = theirs(x, y, y, key_padding_mask=torch.tensor(padding), average_attn_weights=False)
    out.backward(torch.tensor(dout))
    rules = {"mask": an.Padding([5, 3]), "backend": vjp_backend}
    found, found_weights = layer(hidden, context, return_weights=True, **rules)
    np.testing.assert_allclose(found, out.detach(), rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(found_weights, weights.detach(), rtol=1e-11, atol=1e-13)
    grads = layer.vjp(hidden, dout, context, **rules)
    np.testing.assert_allclose(grads.hidden, x.grad, rtol=1e-9, atol=1e-11)
    if sizes:
        np.testing.assert_allclose(grads.context, y.grad, rtol=1e-9, atol=1e-11)
    flat = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    stacked = [grads.parameters[f"{part}.weight"] for part in PARTS[:3]]
    expected = [flat[f"{part[0]}_proj_weight"] for part in PARTS[:3]] if sizes else np.split(flat["in_proj_weight"], 3)
    for mine, other in zip(stacked, expected, strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(grads.parameters["output.weight"], flat["out_proj.weight"], rtol=1e-9, atol=1e-11)
    if bias:
        np.testing.assert_allclose(
            np.concatenate([grads.parameters[f"{part}.bias"] for part in PARTS[:3]]),
            flat["in_proj_bias"], rtol=1e-9, atol=1e-11,
        )  # fmt: skip
        np.testing.assert_allclose(grads.parameters["output.bias"], flat["out_proj.bias"], rtol=1e-9, atol=1e-11)


RULES = {
    "none": {},
    "window, soft cap": {"mask": an.SlidingWindow(2, 1), "modifiers": an.SoftCap(2.0)},
    "array mask": {"mask": np.random.default_rng(4).random((2, 4, 6, 6)) < 0.6},
    "bias, slopes": {"modifiers": (an.Bias(states(4, 6, 6)), an.ALiBi([0.1, 0.2, 0.3, 0.4]))},
    "sink": {"normalizer": an.Softmax(np.array([0.5, -1.0, 0.0, 2.0]))},
    "sparsemax": {"normalizer": an.Sparsemax(), "mask": an.Causal()},
    "entmax": {"normalizer": an.Entmax15()},
    "double softmax": {"normalizer": an.DoubleSoftmax()},
    "cosine": {"score": an.Cosine(), "scale": 3.0},
    "bilinear": {"score": an.Bilinear(np.random.default_rng(6).standard_normal((4, 4)))},
    "additive": {"score": an.Additive(*np.random.default_rng(6).standard_normal((2, 5, 4)), np.ones(5))},
    "dropout": {"dropout": an.Dropout(0.3, 7), "scale": -0.7},
}


@pytest.mark.parametrize("rotary", [None, "halves"])
@pytest.mark.parametrize("name", RULES)
def test_gradients_by_central_differences(name, rotary, vjp_backend):
    """The slope along one direction through states and all parameters at once is the gradient times the direction."""
    layer, hidden, dout = made(key_heads=2, head_size=4, rotary=rotary), states(), states(seed=5)
    rules, rng, step = RULES[name] | {"backend": vjp_backend}, np.random.default_rng(8), 1e-5
    grads = layer.vjp(hidden, dout, **rules)
    start = dict(layer.parameters)
    along = {part: rng.standard_normal(array.shape) for part, array in start.items()}
    direction = rng.standard_normal(hidden.shape)

    def loss(distance):
        layer.parameters = {part: array + distance * along[part] for part, array in start.items()}
        return (dout * layer(hidden + distance * direction, **rules)).sum()

    slope = (loss(step) - loss(-step)) / (2 * step)
    expected = (grads.hidden * direction).sum() + sum((grads.parameters[part] * along[part]).sum() for part in along)
    np.testing.assert_allclose(expected, slope, rtol=1e-6)


def test_gradients_of_rules(vjp_backend):
    layer, hidden, dout = made(), states(), states(seed=5)
    bias, slopes = an.Bias(states(1, 6, 6)[0]), an.ALiBi([0.1, 0.2, 0.3, 0.4])
    written = Written(layer, hidden, None)
    array, factors = written.leaf(bias.array), written.leaf(slopes.slopes)
    distances = written.torch.tensor(np.abs(np.subtract.outer(np.arange(6.0), np.arange(6.0))))
    scores = written.scores() + array - factors[:, None, None] * distances
    written.result(scores).backward(written.torch.tensor(dout))
    grads = layer.vjp(hidden, dout, modifiers=(bias, slopes), backend=vjp_backend)
    assert_gradients(grads, written)
    np.testing.assert_allclose(grads.of(bias), array.grad, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(grads.of(slopes), factors.grad, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="SoftCap"):
        grads.of(an.SoftCap(1.0))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["plain", "halves"])
def test_narrower_dtypes(name, dtype, vjp_backend):
    layer, hidden, _, _ = called(name, "self", dtype)
    written, dout = Written(layer, hidden, None), states(seed=5, dtype=dtype)
    expected = written.result(written.scores(), np.tri(6, dtype=bool))
    expected.backward(written.torch.tensor(dout.astype(float)))
    out, saved = layer(hidden, mask=an.Causal(), return_saved=True, backend=vjp_backend)
    grads = layer.vjp(hidden, dout, mask=an.Causal(), saved=saved, backend=vjp_backend)
    assert {x.dtype for x in (out, grads.hidden, *grads.parameters.values(), *saved[:4])} == {hidden.dtype}
    np.testing.assert_allclose(out.astype(float), expected.detach(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert_gradients(grads, written, rtol=2 * TOLERANCE[dtype])


def test_worked_by_hand(backend):
    """Queries and keys are the states: the state 1 attends by e^1 and e^3; values are 2 and 6, results 10 of each."""
    layer = an.MultiHeadAttention(1, 1, bias=True, dtype="float64")
    layer.parameters |= {"query.weight": np.ones((1, 1)), "key.weight": np.ones((1, 1))}
    layer.parameters |= {"value.weight": np.full((1, 1), 2.0), "output.weight": np.full((1, 1), 10.0)}
    layer.parameters["output.bias"][...] = 0.5
    out = layer(np.array([[[1.0], [3.0]]]), backend=backend)
    w = np.exp([[1, 3], [3, 9]])
    w /= w.sum(-1, keepdims=True)
    np.testing.assert_allclose(out[0, :, 0], 10 * (w @ [2, 6]) + 0.5, rtol=1e-14)


def test_rotary_positions_are_offsets_and_only_their_difference_counts(backend):
    layer, hidden = made(head_size=6, rotary="neighbors"), states()
    out = layer(hidden, mask=an.Causal(), backend=backend)
    shifted = layer(hidden, mask=an.Causal(), query_offset=40, key_offset=np.array([40, 40]), backend=backend)
    np.testing.assert_allclose(shifted, out, rtol=1e-10, atol=1e-11)
    last = layer(hidden[:, 4:], hidden, mask=an.Causal(), query_offset=4, backend=backend)
    np.testing.assert_allclose(last, out[:, 4:], rtol=1e-11, atol=1e-12)
    assert np.abs(layer(hidden[:, 4:], hidden, query_offset=0, backend=backend) - out[:, 4:]).max() > 0.01


def test_a_sequence_has_the_same_bits_alone_and_among_others():
    for dtype in ("float32", "float64", "bfloat16"):
        layer, hidden = made(48, 4, rotary="halves", dtype=dtype), states(5, 33, 48, dtype)
        whole = layer(hidden, mask=an.Causal())
        for b in range(5):
            np.testing.assert_array_equal(layer(hidden[b : b + 1], mask=an.Causal())[0], whole[b])
        with an.threads(1):
            np.testing.assert_array_equal(layer(hidden, mask=an.Causal()), whole)


@pytest.mark.filterwarnings("error")
def test_what_is_excluded_is_not_there(vjp_backend):
    """Padding that holds anything changes no bit of outputs and gradients, and has gradient 0."""
    layer, clean, dout = made(head_size=4, rotary="halves"), states(), states(seed=5)
    lengths = np.array([4, 6])
    padding = np.arange(6) >= lengths[:, None]
    rules = {"mask": an.Causal() & an.Padding(lengths, query_lengths=lengths), "backend": vjp_backend}
    dout[padding] = 0  # a loss does not look at padding
    spoiled = clean.copy()
    spoiled[padding] = np.nan
    spoiled[0, 5, ::2] = np.inf
    out, expected = layer(spoiled, **rules), layer(clean, **rules)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(out[padding], np.broadcast_to(layer.parameters["output.bias"], (2, 12)))
    grads, wanted = layer.vjp(spoiled, dout, **rules), layer.vjp(clean, dout, **rules)
    np.testing.assert_array_equal(grads.hidden, wanted.hidden)
    assert not grads.hidden[padding].any()
    for name, array in grads.parameters.items():
        np.testing.assert_array_equal(array, wanted.parameters[name])


def test_other_normalizers_save_no_lse(vjp_backend):
    layer, hidden, dout = made(), states(), states(seed=5)
    rules = {"normalizer": an.Sparsemax(), "backend": vjp_backend}
    out, weights, saved = layer(hidden, return_weights=True, return_saved=True, **rules)
    assert saved.lse is None
    assert weights.shape == (2, 4, 6, 6)
    np.testing.assert_array_equal(out, layer(hidden, **rules))
    grads = layer.vjp(hidden, dout, saved=saved, **rules)
    np.testing.assert_array_equal(grads.hidden, layer.vjp(hidden, dout, **rules).hidden)


def test_nothing_is_written():
    layer, hidden, dout = made(), states(), states(seed=5)
    before = {name: array.copy() for name, array in layer.parameters.items()}
    for array in (hidden, dout, *layer.parameters.values()):
        array.flags.writeable = False
    layer(hidden)
    layer.vjp(hidden, dout, backend="reference")
    for name, array in layer.parameters.items():
        np.testing.assert_array_equal(array, before[name])
    np.testing.assert_array_equal(hidden, states())


def test_any_strides():
    layer, hidden, context = made(context_size=12), states(), states(L=9, seed=1)
    folded = np.ascontiguousarray(hidden.swapaxes(0, 1)).swapaxes(0, 1)
    reverse = np.ascontiguousarray(context[:, ::-1])[:, ::-1]
    np.testing.assert_array_equal(layer(folded, reverse), layer(hidden, context))


@pytest.mark.parametrize(("B", "M", "N"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_sizes_of_zero(B, M, N, backend):
    layer = made(context_size=8, rotary="halves", head_size=2)
    out = layer(states(B, M), states(B, N, 8), query_offset=0, backend=backend)
    np.testing.assert_array_equal(out, np.broadcast_to(layer.parameters["output.bias"], (B, M, 12)))


@pytest.mark.parametrize(("B", "M", "N"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_gradients_of_sizes_of_zero(B, M, N, vjp_backend):
    layer, hidden, context = made(context_size=8, rotary="halves", head_size=2), states(B, M), states(B, N, 8)
    grads = layer.vjp(hidden, hidden + 1, context, query_offset=0, backend=vjp_backend)
    np.testing.assert_array_equal(grads.hidden, np.zeros(hidden.shape))
    np.testing.assert_array_equal(grads.context, np.zeros(context.shape))
    np.testing.assert_array_equal(grads.parameters.pop("output.bias"), (hidden + 1).sum(axis=(0, 1)))
    for name, array in grads.parameters.items():
        np.testing.assert_array_equal(array, np.zeros(layer.parameters[name].shape))


def test_it_learns(vjp_backend):
    """Steps against the gradient teach a layer to look at the state before, which rotary positions tell apart."""
    layer = an.MultiHeadAttention(16, 4, rotary="halves", bias=True)
    hidden, losses = states(4, 10, 16, "float32"), []
    rules = {"mask": an.Causal(), "backend": vjp_backend}
    for _ in range(80):
        out, saved = layer(hidden, return_saved=True, **rules)
        error = out[:, 1:] - hidden[:, :-1]
        losses.append(np.square(error).mean())
        dout = np.concatenate([np.zeros_like(hidden[:, :1]), 16 * error / error.size], axis=1)
        for name, gradient in layer.vjp(hidden, dout, saved=saved, **rules).parameters.items():
            layer.parameters[name] -= 0.3 * gradient
    assert losses[0] > 0.8
    assert losses[-1] < 0.15

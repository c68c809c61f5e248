"""The reference against implementations of others: PyTorch, ONNX's published cases, SciPy."""

import warnings

import numpy as np
import pytest
import scipy.special

from attn_numba import reference
from attn_numba.rules import Bias, Causal, Padding, SlidingWindow, SoftCap, Softmax, places_of
from cases import BY_NAME

# --- SciPy ---


@pytest.mark.parametrize("name", ["plain", "grouped heads", "sharp", "scale negative", "head size 1"])
def test_scipy_softmax(name):
    case = BY_NAME[name]
    z = case.sizes
    q, k, v, kwargs = case.build(np.float64)
    scores = np.einsum("bhid,bhjd->bhij", q, k.repeat(z.H // z.Hk, 1)) * kwargs.get("scale", z.D**-0.5)
    weights = scipy.special.softmax(scores, axis=-1)
    result = reference.attention(q, k, v, **kwargs, return_lse=True, return_weights=True)
    np.testing.assert_allclose(result.weights, weights, rtol=1e-11, atol=1e-300)
    np.testing.assert_allclose(result.lse, scipy.special.logsumexp(scores, axis=-1), rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(result.out, weights @ v.repeat(z.H // z.Hk, 1), rtol=1e-11, atol=1e-13)


def test_scipy_sink_is_one_more_score():
    q, k, v, kwargs = BY_NAME["sink by sequence and head"].build(np.float64)
    sink = kwargs["normalizer"].sink
    scores = np.einsum("bhid,bhjd->bhij", q, k) / np.sqrt(q.shape[-1])
    more = np.concatenate([scores, np.broadcast_to(sink[..., None, None], (*scores.shape[:-1], 1))], axis=-1)
    result = reference.attention(q, k, v, **kwargs, return_lse=True, return_weights=True)
    np.testing.assert_allclose(result.weights, scipy.special.softmax(more, axis=-1)[..., :-1], rtol=1e-12)
    np.testing.assert_allclose(result.lse, scipy.special.logsumexp(more, axis=-1), rtol=1e-12)


# --- PyTorch ---


@pytest.mark.parametrize(
    "name",
    [
        "plain", "Causal", "Causal, ends together", "SlidingWindow both sides", "Padding", "SameDocument, unordered",
        "PrefixLM", "BlockSparse, odd tile", "Neighborhood 2-D", "Neighborhood 3-D", "Dense", "Dense (HM)",
        "grouped heads", "one key head", "nested masks", "mask | array", "empty rows", "no key allowed", "rank 3",
        "head size 5, value size 17", "scale negative", "scale 0", "layout swapped", "1 query, 1 key", "Bias (HMN)",
        "ALiBi", "hidden NaN behind a mask",
    ],
)  # fmt: skip
def test_torch(name):
    torch = pytest.importorskip("torch")
    case = BY_NAME[name]
    z = case.sizes
    q, k, v, kwargs = case.build(np.float64)
    arrays = [torch.from_numpy(np.nan_to_num(np.ascontiguousarray(x), posinf=9, neginf=9)) for x in (q, k, v)]
    allowed, added = as_torch_mask(z, kwargs)
    mask = torch.from_numpy(np.where(allowed, added, -np.inf))
    if case.rank == 3:
        arrays, mask = [x[None] for x in arrays], mask
    with torch.no_grad():
        expected = torch.nn.functional.scaled_dot_product_attention(
            *arrays, attn_mask=mask, scale=kwargs.get("scale"), enable_gqa=z.Hk != z.H
        ).numpy()
    expected = np.where(allowed.any(-1)[..., None], expected, 0)  # torch: NaN or 0 for a row without keys, by version
    out = reference.attention(q, k, v, **kwargs)
    np.testing.assert_allclose(out, expected.reshape(out.shape), rtol=1e-11, atol=1e-12)


def as_torch_mask(z, kwargs):
    """What the masks of the case allow, and what its modifiers add to a score."""
    from cases import allowed as allowed_of

    offset = kwargs.get("query_offset")
    key_offset = kwargs.get("key_offset", 0)
    places = places_of(z, key_offset if offset is None else offset, key_offset)
    added = np.zeros((z.B, z.H, z.M, z.N))
    modifiers = kwargs.get("modifiers", ())
    for modifier in modifiers if isinstance(modifiers, (list, tuple)) else [modifiers]:
        added = modifier.evaluate(added, places, z)  # of those in the list above, all only add
    return allowed_of(z, kwargs), added


def test_torch_softmax_of_capped_scores():
    torch = pytest.importorskip("torch")
    q, k, v, kwargs = BY_NAME["soft cap and causal and grouped heads"].build(np.float64)
    q_, k_, v_ = (torch.from_numpy(x) for x in (q, k.repeat(2, 1), v.repeat(2, 1)))
    s = q_ @ k_.mT / 8
    s = 5 * torch.tanh(s / 5)
    s = s.masked_fill(torch.ones_like(s, dtype=torch.bool).triu(1), -torch.inf)
    result = reference.attention(q, k, v, **kwargs, return_lse=True, return_weights=True)
    np.testing.assert_allclose(result.weights, torch.softmax(s, -1).numpy(), rtol=1e-11, atol=1e-16)
    np.testing.assert_allclose(result.lse, torch.logsumexp(s, -1).numpy(), rtol=1e-12)
    np.testing.assert_allclose(result.out, (torch.softmax(s, -1) @ v_).numpy(), rtol=1e-11, atol=1e-13)


# --- ONNX ---

ONNX_TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}


def published_cases():
    """Return the cases ONNX publishes with the definition of its operator Attention."""
    node_cases = pytest.importorskip("onnx.backend.test.case.node")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = node_cases.collect_testcases("Attention")
    return [
        case for case in found if case.model.graph.node[0].op_type == "Attention"
    ]  # not the same as other operators


def as_our_arguments(node, arrays):
    """Translate a call of ONNX's Attention.

    There a boolean mask has our meaning; a float mask is added after the soft cap; causal and windows count from the
    end of the past (or of the valid keys, less the number of queries); keys that a mask is too short for are
    excluded.
    """
    import onnx

    options = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    given = dict(zip(("Q", "K", "V", "mask", "past_key", "past_value", "valid"), node.input, strict=False))
    value = {name: arrays[x] for name, x in given.items() if x}
    q, k, v = value["Q"], value["K"], value["V"]
    if q.ndim == 3:  # (B, L, heads * size)
        heads = options["q_num_heads"], options["kv_num_heads"], options["kv_num_heads"]
        q, k, v = (x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2) for x, n in zip((q, k, v), heads, strict=True))
    offset = 0
    if "past_key" in value:
        offset = value["past_key"].shape[2]
        k = np.concatenate([value["past_key"], k], axis=2)
        v = np.concatenate([value["past_value"], v], axis=2)
    kwargs = {"scale": options.get("scale"), "modifiers": [], "return_lse": True, "return_weights": True}
    mask = None
    if options.get("softcap", 0) > 0:
        kwargs["modifiers"].append(SoftCap(options["softcap"]))
    if "mask" in value:
        array = value["mask"]
        short = [(0, 0)] * (array.ndim - 1) + [(0, k.shape[2] - array.shape[-1])]
        if array.dtype == bool:
            mask = np.pad(array, short, constant_values=False)
        else:
            kwargs["modifiers"].append(Bias(np.pad(array.astype(np.float32), short, constant_values=-np.inf)))
    if "valid" in value:
        offset = value["valid"].ravel() - q.shape[2]
        mask = Padding(value["valid"].ravel()) if mask is None else mask & Padding(value["valid"].ravel())
    if options.get("is_causal"):
        mask = Causal() if mask is None else mask & Causal()
    window = options.get("left_window_size", -1), options.get("right_window_size", -1)
    if window != (-1, -1):
        mask = SlidingWindow(*window) if mask is None else mask & SlidingWindow(*window)
    return q, k, v, {**kwargs, "mask": mask, "query_offset": offset}, options


def test_onnx_published_cases():
    cases = published_cases()
    assert len(cases) > 20
    wrong = [f"{case.name}: {message}" for case in cases if (message := difference(case))]
    assert not wrong, "\n".join(wrong)


def difference(case):
    """Return how our answer differs from the published one, or nothing."""
    import onnx

    def numbers(tensor):
        return onnx.numpy_helper.to_array(tensor) if isinstance(tensor, onnx.TensorProto) else np.asarray(tensor)

    (node,) = case.model.graph.node
    inputs, outputs = case.data_sets[0]
    arrays = dict(zip([x.name for x in case.model.graph.input], map(numbers, inputs), strict=True))
    expected = dict(zip([x.name for x in case.model.graph.output], map(numbers, outputs), strict=True))
    q, k, v, kwargs, options = as_our_arguments(node, arrays)
    out, lse, weights = reference.attention(q, k, v, **kwargs)
    want = expected[node.output[0]]
    if want.ndim == 3:
        out = out.swapaxes(1, 2).reshape(want.shape)
    compared = [(out, want)]
    if len(node.output) > 3 and node.output[3]:
        mode, more = options.get("qk_matmul_output_mode", 0), expected[node.output[3]]
        if mode == 2:  # the scores as the softmax sees them
            compared.append((lse, scipy.special.logsumexp(more, axis=-1)))
        if mode == 3:
            compared.append((weights, more))
    tolerance = ONNX_TOLERANCE[want.dtype.name]
    for ours, theirs in compared:
        try:
            np.testing.assert_allclose(*(x.astype(np.float64) for x in (ours, theirs)), rtol=tolerance, atol=tolerance)
        except AssertionError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("opset", [23, 24])
def test_onnx_evaluator(opset):
    """ONNX's own evaluator on our data: grouped heads, boolean mask, soft cap, E other than D."""
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    if onnx.defs.onnx_opset_version() < opset:
        pytest.skip(f"onnx {onnx.__version__} knows opset {onnx.defs.onnx_opset_version()}, not {opset}")
    rng = np.random.default_rng(8)
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 6, 7, 8), (2, 2, 9, 8), (2, 2, 9, 5)))
    mask = rng.random((2, 6, 7, 9)) < 0.6
    mask[..., 0] = True
    kinds = {"q": 1, "k": 1, "v": 1, "m": 9}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Attention", ["q", "k", "v", "m"], ["y"], softcap=2.0, scale=0.4)],
        "attention",
        [onnx.helper.make_tensor_value_info(name, kind, None) for name, kind in kinds.items()],
        [onnx.helper.make_tensor_value_info("y", 1, None)],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    (expected,) = ReferenceEvaluator(model).run(None, {"q": q, "k": k, "v": v, "m": mask})
    out = reference.attention(q, k, v, mask=mask, modifiers=SoftCap(2.0), scale=0.4, normalizer=Softmax())
    np.testing.assert_allclose(out, expected, rtol=2e-5, atol=2e-6)

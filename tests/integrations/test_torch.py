"""The bridge to torch: its own check of gradients, the same bits as `attention_vjp`, no copies, and what it refuses."""

from __future__ import annotations

import re
from types import SimpleNamespace

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed; it belongs to the extra torch")

import attn_numba as an  # noqa: E402
from attn_numba import api  # noqa: E402
from attn_numba.integrations import torch as bridge  # noqa: E402
from attn_numba.integrations.torch import attention, defer  # noqa: E402
from bridge_cases import CALLS, H, M, N, at_once, bits, expected, require_gradients  # noqa: E402

DTYPES = ("float64", "float32", "float16", "bfloat16")


@pytest.fixture
def backend(backend):
    """Each backend that has gradients."""
    return require_gradients(backend)


def leaf(x, dtype=torch.float64):
    return torch.tensor(np.asarray(x, np.float64), dtype=dtype, requires_grad=True)


def leaves(call, dtype=torch.float64):
    """Return q, k, v and the arrays of rules as tensors that require grad, and the gradient by the output."""
    *qkv, dout = (leaf(x, dtype) for x in call.build())
    return qkv, [leaf(x) for x in call.arrays], dout.detach()


def array(x):
    """Return a tensor as a NumPy array, bfloat16 by ml_dtypes."""
    x = x.detach()
    if x.dtype is torch.bfloat16:
        ml_dtypes = pytest.importorskip("ml_dtypes")
        return x.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return x.numpy()


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name, backend):
    call = CALLS[name]
    qkv, learned, _ = leaves(call)
    count = len(qkv)

    def function(*tensors):
        return attention(*tensors[:count], **call.rules(defer, *tensors[count:]), backend=backend)

    assert torch.autograd.gradcheck(function, (*qkv, *learned))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_bits_are_those_of_attention_vjp(name, dtype, backend):
    call = CALLS[name]
    qkv, learned, dout = leaves(call, getattr(torch, dtype))
    out = attention(*qkv, **call.rules(defer, *learned), backend=backend)
    found = torch.autograd.grad(out, (*qkv, *learned), dout)
    wanted, gradients = expected(call, [array(x) for x in (*qkv, dout)], backend)
    assert [*bits(array(out))] == [*bits(wanted)]
    for tensor, gradient, x in zip((*qkv, *learned), found, gradients, strict=True):
        assert gradient.dtype == tensor.dtype
        assert [*bits(array(gradient))] == [*bits(x.astype(array(tensor).dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arrays_of_rules_in_narrow_dtypes(dtype, backend):
    call = CALLS["several"]
    qkv, _, dout = leaves(call, torch.float32)
    learned = [leaf(x, dtype) for x in call.arrays]
    out = attention(*qkv, **call.rules(defer, *learned), backend=backend)
    found = torch.autograd.grad(out, learned, dout)
    wanted, gradients = expected(call, [array(x) for x in (*qkv, dout)], backend, [array(x) for x in learned])
    assert [*bits(array(out))] == [*bits(wanted)]
    for tensor, gradient, x in zip(learned, found, gradients[3:], strict=True):
        assert [*bits(array(gradient))] == [*bits(x.astype(array(tensor).dtype))]


def place(x):
    return x.ctypes.data, x.shape, x.strides


@pytest.mark.parametrize("layout", ["plain", "swapped", "expanded"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_copied(dtype, layout, backend, monkeypatch):
    kind = getattr(torch, dtype)
    q, k, v = (torch.randn(2, 5, 4, 8).to(kind) for _ in range(3))
    if layout == "swapped":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if layout == "expanded":
        q, k, v = (x[:1, :, :1].expand(2, 5, 4, 8) for x in (q, k, v))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    dout = torch.ones((), dtype=kind).expand(q.shape)
    seen, returned = [], []

    def watch(name):
        real = getattr(api, name)

        def watched(*arrays, **rules):
            result = real(*arrays, **rules)
            seen.extend(arrays + tuple(rules.get("saved") or ()))
            returned.append(result)
            return result

        monkeypatch.setattr(api, name, watched)

    out = attention(q, k, v, backend=backend)  # before it is watched: what asks whether there are gradients
    watch("attention")
    watch("attention_vjp")
    out = attention(q, k, v, backend=backend)
    assert out.data_ptr() == returned[0].out.ctypes.data
    found = torch.autograd.grad(out, (q, k, v), dout)
    own = [place(array(x)) for x in (q, k, v)]
    assert [place(x) for x in seen] == [*own, *own, place(array(dout)), place(array(out)), place(returned[0].lse)]
    gradients = returned[1]
    assert [x.data_ptr() for x in found] == [x.ctypes.data for x in (gradients.q, gradients.k, gradients.v)]


@pytest.mark.parametrize("rank", [2, 3])
def test_missing_leading_axes(rank, backend):
    q, k, v = (torch.randn(3, 6, 4)[:1].reshape((1, 6, 4)[3 - rank :]).requires_grad_() for _ in range(3))
    out = attention(q, k, v, mask=an.Causal(), backend=backend)
    assert out.shape == q.shape
    for x, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
        assert gradient.shape == x.shape


def test_ranks_may_differ(backend):
    q, k = torch.randn(1, 2, 4, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    dq, dk = torch.autograd.grad(attention(q, k, k, backend=backend).sum(), (q, k))
    assert (dq.shape, dk.shape) == (q.shape, k.shape)


def test_only_what_is_asked_for_gets_a_gradient(backend):
    call = CALLS["Additive"]
    (q, k, v), (wq, wk, w), _ = leaves(call)
    attention(q.detach(), k, v, **call.rules(defer, wq, wk.detach(), w), backend=backend).sum().backward()
    assert all(x.grad is None for x in (q, wk))
    assert all(x.grad.shape == x.shape for x in (k, v, wq, w))


def test_without_gradients_nothing_is_kept(backend):
    q, k, v = (torch.randn(6, 4) for _ in range(3))
    wanted = torch.from_numpy(an.attention(q.numpy(), k.numpy(), v.numpy(), backend=backend))
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode():
            out = attention(q, k, v, backend=backend)
        assert not out.requires_grad
        assert torch.equal(out, wanted)
        q.requires_grad_(mode is torch.enable_grad)


def test_one_tensor_in_several_places(backend):
    x, slope = leaf(np.sin(np.arange(24.0) ** 2).reshape(6, 4)), leaf(0.3)
    rules = [defer(an.ALiBi, slope), an.SoftCap(3.0), defer(an.ALiBi, slope)]
    found = torch.autograd.grad(attention(x, x, x, modifiers=rules, backend=backend).sum(), (x, slope))
    one, other = an.ALiBi(0.3), an.ALiBi(0.3)
    inputs = array(x)
    wanted = an.attention_vjp(
        inputs, inputs, inputs, np.ones((6, 4)), modifiers=[one, an.SoftCap(3.0), other], backend=backend
    )
    np.testing.assert_allclose(array(found[0]), wanted.q + wanted.k + wanted.v, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(array(found[1]), wanted.of(one) + wanted.of(other), rtol=1e-12)


def test_masks_and_offsets_may_be_tensors(backend):
    (q, k, v), _, dout = leaves(CALLS["plain"])
    mask = torch.arange(M)[:, None] >= torch.arange(N) - 2
    causal = {"mask": an.Causal(), "query_offset": torch.tensor([2, 2]), "key_offset": torch.tensor(0)}
    late = {"mask": defer(lambda lengths: an.Causal() & an.Padding(lengths), torch.tensor([7, 7])), "query_offset": 2}
    wanted, gradients = expected(CALLS["causal"], CALLS["plain"].build(), backend)
    for rules in ({"mask": mask}, causal, late):
        out = attention(q, k, v, **rules, backend=backend)
        np.testing.assert_array_equal(array(out), wanted)
        for found, gradient in zip(torch.autograd.grad(out, (q, k, v), dout), gradients, strict=True):
            np.testing.assert_array_equal(array(found), gradient)


def test_a_negated_view(backend):
    q, k, v = (torch.randn(6, 4, dtype=torch.complex128).conj().imag for _ in range(3))
    assert q.is_neg()
    wanted = attention(*(x.resolve_neg() for x in (q, k, v)), backend=backend)
    assert torch.equal(attention(q, k, v, backend=backend), wanted)


def test_a_mask_may_change_after_the_call(backend):
    (q, k, v), _, dout = leaves(CALLS["boolean array"])
    mask = CALLS["boolean array"].rules(at_once)["mask"]
    offset = np.zeros(2, int)
    rules = {"mask": mask, "dropout": an.Dropout(0.3, 1), "query_offset": offset, "backend": backend}
    first = torch.autograd.grad(attention(q, k, v, **rules), (q, k, v), dout)
    out = attention(q, k, v, **rules)
    mask[:], offset[:] = ~mask, 3
    for x, y in zip(first, torch.autograd.grad(out, (q, k, v), dout), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("changed", ["q", "slopes", "mask", "out"])
def test_a_tensor_that_changes_before_the_gradient_is_noticed(changed, backend):
    (q, k, v), (slopes,), _ = leaves(CALLS["ALiBi"])
    q = q * 1
    mask = torch.ones(M, N, dtype=torch.bool)
    out = attention(q, k, v, mask=mask, modifiers=defer(an.ALiBi, slopes), query_offset=0, backend=backend)
    with torch.no_grad():
        {"q": q, "slopes": slopes, "mask": mask, "out": out}[changed].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_training_lowers_a_loss(backend):
    torch.manual_seed(0)
    hidden = torch.randn(2, 8, 12)
    target = hidden.cumsum(1)
    project = torch.nn.Linear(12, 36)
    slopes, sink = torch.nn.Parameter(torch.full((3,), 0.5)), torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.Adam([*project.parameters(), slopes, sink], 0.03)
    losses = []
    for _ in range(30):
        q, k, v = project(hidden).reshape(2, 8, 9, 4).transpose(1, 2).chunk(3, 1)
        out = attention(
            q, k, v, mask=an.Causal(), modifiers=defer(an.ALiBi, slopes), normalizer=defer(an.Softmax, sink),
            backend=backend,
        )  # fmt: skip
        loss = (out.transpose(1, 2).reshape(2, 8, 12) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert all((x.grad != 0).all() for x in (slopes, sink))


# --- torch's transformations ---


@pytest.mark.parametrize("name", ["plain", "causal", "Sparsemax"])
def test_vmap_is_one_call_after_the_other(name, backend):
    qkv, _, _ = leaves(CALLS[name])

    def function(q, k, v):
        return attention(q, k, v, **CALLS[name].rules(defer), backend=backend)

    q, k, v = (x.detach() for x in qkv)
    assert torch.equal(torch.func.vmap(function)(q, k, v), torch.stack([*map(function, q, k, v)]))
    many = torch.func.vmap(function, in_dims=(1, None, None), out_dims=2)(q[:, None].expand(2, 3, H, M, 3), k, v)
    assert torch.equal(many, torch.stack([function(q, k, v)] * 3, 2))

    def loss(q, k, v):
        return function(q, k, v).square().sum()

    for n in range(3):
        one_by_one = [torch.func.grad(loss, n)(*x) for x in zip(q, k, v, strict=True)]
        assert torch.equal(torch.func.vmap(torch.func.grad(loss, n))(q, k, v), torch.stack(one_by_one))
        wanted = torch.autograd.grad(loss(*qkv), qkv[n])[0]
        assert torch.equal(torch.func.grad(loss, n)(q, k, v), wanted)


def test_vmap_over_the_arrays_of_a_rule(backend):
    (q, k, v), (slopes,), _ = leaves(CALLS["ALiBi"])

    def loss(slopes):
        return attention(q, k, v, modifiers=defer(an.ALiBi, slopes), query_offset=0, backend=backend).square().sum()

    many = torch.stack([slopes, 2 * slopes]).detach()
    assert torch.equal(torch.func.vmap(torch.func.grad(loss))(many), torch.stack([*map(torch.func.grad(loss), many)]))


def test_a_second_derivative_is_refused(backend):
    (q, k, v), _, _ = leaves(CALLS["plain"])

    def total(q):  # whose gradient is linear in a constant: taken for independent of q, its derivative would be 0
        return attention(q, k, v, backend=backend).sum()

    with pytest.raises(NotImplementedError, match="attention of attn_numba has first derivatives; a second one"):
        torch.autograd.functional.hessian(total, q)
    (dq,) = torch.autograd.grad(total(q), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second one"):
        torch.autograd.grad(dq.square().sum(), q)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(total, (q.detach(),), (q.detach(),))


@pytest.mark.slow
def test_torch_compile_leaves_it_alone(backend):
    (q, k, v), (slopes,), _ = leaves(CALLS["ALiBi"])

    def function(q, k, v, slopes):
        rules = {"mask": an.Causal(), "modifiers": defer(an.ALiBi, slopes), "query_offset": 2, "backend": backend}
        return attention(2 * q, k, v, **rules) + 1

    compiled = torch.compile(function, backend="eager")
    inputs = (q, k, v, slopes)
    for _ in range(2):
        assert torch.equal(compiled(*inputs), function(*inputs))
    wanted = torch.autograd.grad(function(*inputs).square().sum(), inputs)
    found = torch.autograd.grad(compiled(*inputs).square().sum(), inputs)
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))


# --- what it refuses ---

X = torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "k is ndarray; needed a tensor of torch", lambda: {"k": np.zeros((6, 4))}),
        (TypeError, "q has dtype int32; needed float64, float32", lambda: {"q": X.int()}),
        (TypeError, "v has dtype complex64; needed", lambda: {"v": X.to(torch.complex64)}),
        (TypeError, "q, k, v have dtypes float32, float64, float32", lambda: {"k": X.double()}),
        (TypeError, "q is on meta; needed cpu or cuda", lambda: {"q": X.to("meta")}),
        (TypeError, "k has layout torch.sparse_coo; needed torch.strided", lambda: {"k": X.to_sparse()}),
        (ValueError, "k has head size 3; q has 4", lambda: {"k": X[:, :3]}),
        (
            TypeError,
            "scale requires grad, and has no gradient here: pass it detached, or modifiers=defer(Temp",
            lambda: {"scale": leaf(0.5)},
        ),
        (TypeError, "mask has dtype float32; needed a boolean array", lambda: {"mask": torch.ones(6, 6)}),
        (
            TypeError,
            "AdaptiveSpan: ramp requires grad, and has no gradient here: pass it detached",
            lambda: {"modifiers": defer(an.AdaptiveSpan, 2.0, leaf(1.0))},
        ),
        (
            TypeError,
            "<lambda>: x requires grad, and has no gradient here",
            lambda: {"modifiers": defer(lambda x: an.ALiBi(x), leaf(1.0))},
        ),
        (
            ValueError,
            "ALiBi: slopes has shape (3,); needed one that broadcasts to (H,) = (1,)",
            lambda: {"modifiers": [defer(an.ALiBi, torch.ones(3))]},
        ),
        (
            ValueError,
            "modifiers[1], CustomModifier, has no slope",
            lambda: {"modifiers": [an.SoftCap(1.0), an.CustomModifier(lambda s, b, h, i, j, p: s)], "q": leaf(X)},
        ),
        (TypeError, "modifiers[0] is Causal; needed a modifier", lambda: {"modifiers": [defer(an.Causal)]}),
        (ValueError, "backend is 'torch'; needed one of", lambda: {"backend": "torch"}),
    ],
)
def test_errors(error, message, arguments):
    inputs = {"q": X, "k": X, "v": X, "backend": "reference", **arguments()}
    if inputs["q"].requires_grad:
        inputs = {name: x.to(torch.float64) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    with pytest.raises(error, match=re.escape(message)):
        attention(**inputs)


def test_errors_of_defer():
    with pytest.raises(TypeError, match="defer: maker is ALiBi; needed a function"):
        defer(an.ALiBi(0.5))
    with pytest.raises(TypeError, match="defer: AdaptiveSpan cannot be called so: missing a required argument: 'ramp'"):
        defer(an.AdaptiveSpan, X)


def test_a_backend_without_gradients_is_refused_before_there_is_work(monkeypatch):
    def none(*arrays, backend, **rules):
        raise NotImplementedError(f"backend {backend!r} does not compute gradients")

    monkeypatch.setattr(api, "attention_vjp", none)
    bridge._require_gradients.cache_clear()
    monkeypatch.setattr(api, "attention", lambda *arrays, **rules: pytest.fail("the output was computed"))
    with pytest.raises(NotImplementedError, match="'reference' does not compute gradients"):
        attention(leaf(X), leaf(X), leaf(X), backend="reference")
    bridge._require_gradients.cache_clear()


def test_tensors_on_a_card_are_handed_on_and_taken_as_they_are(monkeypatch):
    """By a stand-in for the calls, with tensors of torch for the CPU: its tensors have all but the card."""
    q, k, v = (torch.randn(1, 16, 2, 8, dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for _ in range(3))
    slopes = leaf([0.5, 0.25], torch.bfloat16)
    out, lse = torch.zeros(1, 2, 16, 8, dtype=torch.bfloat16), torch.zeros(1, 2, 16)
    gradients = [torch.ones_like(x) for x in (q, k, v)]
    seen = []

    def forward(*arrays, **rules):
        seen.append((arrays, rules))
        return SimpleNamespace(out=out, lse=lse)

    def backward(*arrays, **rules):
        seen.append((arrays, rules))
        return SimpleNamespace(q=gradients[0], k=gradients[1], v=gradients[2], of=lambda rule: torch.full((2,), 3.0))

    monkeypatch.setattr(api, "attention", forward)
    monkeypatch.setattr(api, "attention_vjp", backward)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda x: x.ndim == 4 or x.shape == (1, 2, 16)))
    bridge._require_gradients.cache_clear()
    found = attention(q, k, v, modifiers=defer(an.ALiBi, slopes))
    dq, dk, dv, dslopes = torch.autograd.grad(found, (q, k, v, slopes), torch.ones_like(out))
    bridge._require_gradients.cache_clear()
    (inputs, rules), (again, others) = seen[1:]
    for x, given in zip((*inputs, *again[:3], *others["saved"]), (q, k, v, q, k, v, out, lse), strict=True):
        assert isinstance(x, torch.Tensor)
        assert not x.requires_grad
        assert (x.data_ptr(), x.stride()) == (given.data_ptr(), given.stride())
    assert found.data_ptr() == out.data_ptr()
    assert [x.data_ptr() for x in (dq, dk, dv)] == [x.data_ptr() for x in gradients]
    assert dslopes.tolist() == [3, 3]
    assert dslopes.dtype == torch.bfloat16
    (modifier,) = [rules["modifiers"]] if isinstance(rules["modifiers"], an.ALiBi) else rules["modifiers"]
    assert type(modifier.slopes) is np.ndarray

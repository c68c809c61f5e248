"""Attention with gradients by torch's autograd, and tensors on a GPU read where they lie; needs the package ``torch``.

Examples
--------
>>> import torch
>>> import attn_numba as an
>>> from attn_numba.integrations.torch import attention, defer
>>> q, k, v = torch.zeros(3, 1, 4, 5, 8, dtype=torch.float64, requires_grad=True)
>>> slopes = torch.nn.Parameter(torch.full((4,), 0.5))
>>> out = attention(q, k, v, mask=an.Causal(), modifiers=defer(an.ALiBi, slopes), backend="reference")
>>> out.sum().backward()
>>> slopes.grad
tensor([0., 0., 0., 0.])
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from attn_numba import api
from attn_numba.rules import Softmax, as_modifiers
from attn_numba.rules.arguments import check_differentiable, check_dtype
from attn_numba.rules.data import AnyArray
from attn_numba.rules.deferred import Template, defer, gradients_of

__all__ = ["attention", "current_stream", "defer", "empty", "place"]

DTYPES = {name: getattr(torch, name) for name in ("float64", "float32", "float16", "bfloat16")}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Return the attention of queries over keys and values; autograd gets its gradients from `attention_vjp`.

    Parameters
    ----------
    q : tensor (B, H, M, D)
        Queries, in host memory or on a GPU: float64, float32, float16 or bfloat16. Missing leading axes count as 1.
        Any strides.
    k : tensor (B, Hk, N, D)
        Keys, of q's dtype.
    v : tensor (B, Hk, N, E)
        Values, of q's dtype.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset, dropout : optional
        The rules, as `attn_numba.attention` takes them. A rule with parameters to train is made by `defer`, such as
        ``defer(an.ALiBi, slopes)``: it follows its tensors, and gradients reach them. Masks and offsets may be tensors.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes, as in `attn_numba.attention`.

    Returns
    -------
    tensor (B, H, M, E)
        In the dtype and rank of `q`, and where it is.

    Raises
    ------
    TypeError
        For arguments of the wrong kind; for a tensor that requires grad where none is computed.
    ValueError
        For shapes and values that do not fit, and for a modifier without slope where gradients are asked for.
    NotImplementedError
        For what the backend does not offer, and in the backward pass for a second derivative.

    See Also
    --------
    attn_numba.rules.deferred.defer : A rule that follows tensors.

    Notes
    -----
    Of q, k, v, their gradients and the output nothing is copied. Arrays of rules are, and the host waits for those on a
    GPU. For the gradient, q, k and v are kept, and of `Softmax` the output and its lse; others are computed again.

    ``torch.func.vmap`` computes one call after the other, with `B` as each sees it. ``torch.compile`` breaks its graph
    here.

    Examples
    --------
    >>> q = k = torch.zeros(3, 4)
    >>> v = torch.tensor([[1.0], [2.0], [6.0]], requires_grad=True)
    >>> attention(q, k, v, query_offset=0, backend="reference").sum().backward()
    >>> v.grad.ravel()
    tensor([1., 1., 1.])
    """
    rules = {
        "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
        "query_offset": query_offset, "key_offset": key_offset, "dropout": dropout,
    }  # fmt: skip
    compute = _outside_of_graphs() if torch.compiler.is_compiling() else _attention
    return compute(q, k, v, rules, backend)


def _attention(q: Any, k: Any, v: Any, rules: dict[str, Any], backend: str) -> Any:
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(x, name)
    template = Template(rules, lambda x: isinstance(x, torch.Tensor))
    operands = template.take_operands()
    if torch.is_grad_enabled():
        for operand in operands:
            if operand.array.requires_grad and not operand.learned:
                raise TypeError(operand.refusal("requires grad", "pass it detached"))
    arrays = [operand.array for operand in operands]
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *arrays))
    if trained:
        _require_gradients(backend, q.device)
    out, _ = _Attention.apply(_Call(template, backend, trained), q, k, v, *arrays)
    return out


_known: dict[str, Any] = {}


def _outside_of_graphs() -> Any:
    """Return `_attention` as a function that torch.compile leaves alone.

    It is asked for while torch.compile traces. A decorator would import the compiler, for seconds, with this module.
    """
    if "attention" not in _known:
        _known["attention"] = torch.compiler.disable(_attention)
    return _known["attention"]


class _Call:
    """What the passes of one call share beside tensors; no tuple, which torch would take apart."""

    def __init__(self, template: Template, backend: str, trained: bool) -> None:
        self.template, self.backend, self.trained = template, backend, trained


class _Attention(torch.autograd.Function):
    """Output and lse (None for other normalizers than `Softmax`) of q, k, v and the tensors of rules."""

    @staticmethod
    def forward(call: _Call, q: Any, k: Any, v: Any, *operands: Any) -> tuple[Any, Any]:
        rules, _ = call.template.filled([_host_copy(x) for x in operands])
        if call.trained:
            check_differentiable(as_modifiers(rules["modifiers"]))
        streams = isinstance(rules["normalizer"], Softmax | None)
        found = api.attention(_array(q), _array(k), _array(v), **rules, backend=call.backend, return_lse=streams)
        return (_tensor(found.out), _tensor(found.lse)) if streams else (_tensor(found), None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
        call, q, k, v, *operands = inputs
        out, lse = output
        ctx.call = call
        ctx.set_materialize_grads(False)
        if lse is None:
            out = None
        else:
            ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, out, lse, *operands)

    @staticmethod
    def backward(ctx: Any, dout: Any, dlse: Any) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        found = _Gradients.apply(ctx.call, dout, *ctx.saved_tensors)
        return None, *(x if needed else None for x, needed in zip(found, ctx.needs_input_grad[1:], strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _one_by_one(_Attention, info.batch_size, in_dims, inputs)


class _Gradients(torch.autograd.Function):
    """Gradients by q, k, v and the tensors of rules, None for those without: a function of its own, to be refused."""

    @staticmethod
    def forward(call: _Call, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *operands: Any) -> tuple[Any, ...]:
        rules, owners = call.template.filled([_host_copy(x) for x in operands])
        saved = None if lse is None else (_array(out), _array(lse))
        found = api.attention_vjp(
            _array(q), _array(k), _array(v), _array(dout), **rules, backend=call.backend, saved=saved
        )
        learned = zip(gradients_of(owners, found), operands, strict=True)
        return (
            *map(_tensor, (found.q, found.k, found.v)),
            *(None if x is None else _tensor(x).to(tensor) for x, tensor in learned),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise NotImplementedError("attention of attn_numba has first derivatives; a second one was asked for")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> Any:
        return _one_by_one(_Gradients, info.batch_size, in_dims, inputs)


def _one_by_one(function: Any, count: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> Any:
    """Return the results of `count` calls, each output stacked, and where."""
    pairs = [*zip(inputs, in_dims, strict=True)]
    found = [function.apply(*(x if axis is None else x.select(axis, n) for x, axis in pairs)) for n in range(count)]
    outputs = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*found, strict=True))
    return outputs, tuple(None if x is None else 0 for x in outputs)


def _check_tensor(x: Any, name: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is {type(x).__name__}; needed a tensor of torch")
    check_dtype(name, str(x.dtype).removeprefix("torch."))
    if x.device.type not in ("cpu", "cuda"):
        raise TypeError(f"{name} is on {x.device}; needed cpu or cuda")
    if x.layout is not torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; needed torch.strided")


@functools.cache
def _require_gradients(backend: str, device: torch.device) -> None:
    """Raise what a backend raises that has no gradients, before there is work."""
    nothing = _array(torch.zeros(0, 1, device=device))
    api.attention_vjp(nothing, nothing, nothing, nothing, backend=backend)


def _array(x: torch.Tensor) -> Any:
    """Return a tensor as `api` takes it: in host memory a NumPy view, else the tensor itself."""
    x = x.detach().resolve_neg()
    if x.is_cuda:
        return x
    if x.dtype is torch.bfloat16:  # NumPy has no such dtype of its own, so torch makes no array of it
        from attn_numba.integrations.ml_dtypes import bfloat16

        return x.view(torch.uint16).numpy().view(bfloat16)
    return x.numpy()


def _host_copy(x: torch.Tensor) -> AnyArray:
    """Return a tensor as a NumPy array, a view of one in host memory."""
    array: AnyArray = _array(x.cpu())
    return array


def _tensor(array: Any) -> torch.Tensor:
    """Return a result as a tensor, a view of one in host memory."""
    if isinstance(array, torch.Tensor):
        return array
    array = np.require(array, requirements="W")
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def current_stream(index: int) -> int:
    """Return the handle of torch's current stream on a card.

    Parameters
    ----------
    index : int
        Number of the card.

    Returns
    -------
    int
        0 is the default stream.
    """
    return torch.cuda.current_stream(index).cuda_stream


def place(x: Any, name: str) -> tuple[int, tuple[int, ...], tuple[int, ...], str, int, int]:
    """Return where a tensor lies.

    Parameters
    ----------
    x : torch.Tensor
        On a GPU.
    name : str
        What to call it in messages.

    Returns
    -------
    tuple
        Address, shape, strides in bytes, name of the dtype, number of the card, handle of torch's current stream there.

    Raises
    ------
    TypeError
        If it requires grad, it is not strided, or it is to be negated when read.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise TypeError(
            f"{name} requires grad, which attn_numba.integrations.torch.attention looks after: call that, or pass "
            f"{name}.detach()"
        )
    if x.layout is not torch.strided:
        raise TypeError(f"{name} has layout {x.layout}; needed torch.strided")
    if x.is_neg():
        raise TypeError(f"{name} is a view that torch negates when it is read: pass {name}.resolve_neg()")
    size, index = x.element_size(), x.device.index
    strides = tuple(step * size for step in x.stride())
    return x.data_ptr(), tuple(x.shape), strides, _NAMES.get(x.dtype) or str(x.dtype), index, current_stream(index)


def empty(like: Any, shape: tuple[int, ...], dtype: str, index: int, stream: int) -> tuple[Any, int]:
    """Return a new tensor, allocated on a stream, and its address.

    Parameters
    ----------
    like : torch.Tensor
        One on the same card.
    shape : tuple of int
        Its sizes.
    dtype : str
        Name of its dtype.
    index : int
        Number of the card.
    stream : int
        Handle of the stream; 1 is the default one.

    Returns
    -------
    (torch.Tensor, int)
    """
    kind = DTYPES[dtype]
    if current_stream(index) in ((0, 1) if stream == 1 else (stream,)):
        made = like.new_empty(shape, dtype=kind)
    else:
        with torch.cuda.stream(torch.cuda.ExternalStream(stream, device=index)):
            made = like.new_empty(shape, dtype=kind)
    return made, made.data_ptr()

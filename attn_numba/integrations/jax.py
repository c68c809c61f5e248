"""Attention with gradients in JAX, computed by the host when XLA calls it; needs the package ``jax``.

Examples
--------
>>> import jax
>>> import attn_numba as an
>>> from attn_numba.integrations.jax import attention, defer
>>> def loss(v, slopes):
...     zeros = jax.numpy.zeros((2, 3, 4))
...     bias = defer(an.ALiBi, slopes)
...     return attention(zeros, zeros, v, mask=an.Causal(), modifiers=bias, backend="reference").sum()
>>> v = jax.numpy.asarray([[[1.0], [2.0], [6.0]]] * 2)
>>> dv, dslopes = jax.jit(jax.grad(loss, (0, 1)))(v, jax.numpy.zeros(2))
>>> dslopes
Array([1.9166666, 1.9166666], dtype=float32)
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from attn_numba import api, problem
from attn_numba.rules import Softmax, as_modifiers
from attn_numba.rules.arguments import ACCUMULATORS, check_differentiable, check_dtype
from attn_numba.rules.data import AnyArray
from attn_numba.rules.deferred import Template, defer, gradients_of

__all__ = ["attention", "defer"]


def attention(
    q: Any,
    k: Any,
    v: Any,
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
) -> jax.Array:
    """Return the attention of queries over keys and values, for ``jax.grad``, ``jax.jit`` and ``jax.vmap`` too.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries: float64, float32, float16 or bfloat16. Missing leading axes count as 1.
    k : array (B, Hk, N, D)
        Keys, of q's dtype.
    v : array (B, Hk, N, E)
        Values, of q's dtype.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset, dropout : optional
        The rules, as `attn_numba.attention` takes them. A rule of arrays that are differentiated or traced is made by
        `defer`: ``defer(an.ALiBi, slopes)``, ``defer(an.Dropout, 0.1, seed)``. Masks and offsets may be JAX's arrays.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes, as in `attn_numba.attention`; for it the arrays are in host memory.

    Returns
    -------
    jax.Array (B, H, M, E)
        In the dtype and rank of `q`.

    Raises
    ------
    TypeError
        For arguments of the wrong kind; for an array of floats that a rule has no gradient for.
    ValueError
        For shapes and values that do not fit, and for a modifier without slope where gradients are asked for.
    NotImplementedError
        For what the backend does not offer.
    jax.errors.JaxRuntimeError
        For values of arrays that do not fit, which are known only when they are computed with; it quotes the error.

    See Also
    --------
    attn_numba.rules.deferred.defer : A rule that follows arrays.

    Notes
    -----
    A ``jax.custom_vjp`` of ``jax.pure_callback``: XLA calls back, and a device's arrays come to the host and return.
    There are first derivatives in reverse mode. For them q, k and v are kept, and of `Softmax` the output and its lse;
    others are computed again. ``jax.vmap`` computes one call after the other, with `B` as each sees it; sequences that
    belong to `B` are faster there.

    A `Dropout` made at once drops the same weights each time that a jitted function runs: ``defer`` its seed. XLA calls
    from a thread of its own, which `attn_numba.set_threads` reaches and `attn_numba.threads` does not.

    Examples
    --------
    >>> v = jax.numpy.asarray([[1.0], [2.0], [6.0]])
    >>> zeros = jax.numpy.zeros((3, 4))
    >>> jax.grad(lambda v: attention(zeros, zeros, v, query_offset=0, backend="reference").sum())(v).ravel()
    Array([1., 1., 1.], dtype=float32)
    """
    rules = {
        "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
        "query_offset": query_offset, "key_offset": key_offset, "dropout": dropout,
    }  # fmt: skip
    inputs = tuple(_checked(x, name) for name, x in (("q", q), ("k", k), ("v", v)))
    template = Template(rules, lambda x: isinstance(x, jax.Array))
    operands = template.take_operands()
    for operand in operands:
        if not operand.learned and _is_real(operand.array):
            kind = operand.array.dtype.name
            raise TypeError(operand.refusal(f"has dtype {kind}", "pass it as NumPy's, or integers"))
    arrays = tuple(operand.array for operand in operands)
    known, _ = template.filled([_placeholder(x) for x in arrays], known_only=True)
    problem.check(*map(_placeholder, inputs), **known)
    _require(backend)
    learned = tuple(operand.learned and _is_real(operand.array) for operand in operands)
    call = _Call(template, backend, learned, _key_of(template))
    out: jax.Array = _attention(call, inputs, arrays)
    return out


@dataclass(frozen=True)
class _Call:
    """What host and JAX both know of a call; calls with the same rules are equal, so that JAX compiles them once."""

    template: Template = field(compare=False)  # keeps alive what the key knows by its id
    backend: str
    learned: tuple[bool, ...]  # which operands have a gradient
    key: tuple[Any, ...]

    def rules(self, operands: tuple[Any, ...]) -> tuple[dict[str, Any], list[Any]]:
        return self.template.filled([*map(np.asarray, operands)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(call: _Call, inputs: tuple[Any, ...], operands: tuple[Any, ...]) -> Any:
    return _computed(call, inputs, operands, streams=False)[0]


def _with_residuals(call: _Call, inputs: tuple[Any, ...], operands: tuple[Any, ...]) -> tuple[Any, Any]:
    _require(call.backend, gradients=True)
    known, _ = call.template.filled([_placeholder(x) for x in operands], known_only=True)
    check_differentiable(as_modifiers(known["modifiers"]))
    saved = _computed(call, inputs, operands, streams=isinstance(known["normalizer"], Softmax | None))
    return saved[0], (inputs, operands, saved if len(saved) == 2 else None)


def _pulled(call: _Call, residuals: Any, dout: Any) -> tuple[Any, Any]:
    inputs, operands, _ = residuals
    shapes = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*inputs, *_trained(call, operands)))
    dq, dk, dv, *others = _called(_Backward(call), shapes, (*residuals, dout))
    learned = iter(others)
    return (dq, dk, dv), tuple(next(learned) if has else None for has in call.learned)


_attention.defvjp(_with_residuals, _pulled)


def _computed(call: _Call, inputs: tuple[Any, ...], operands: tuple[Any, ...], streams: bool) -> Any:
    """Return the output, and where it `streams` its lse."""
    q, _, v = inputs
    shapes = [jax.ShapeDtypeStruct((*q.shape[:-1], v.shape[-1]), q.dtype)]
    if streams:
        shapes.append(jax.ShapeDtypeStruct(q.shape[:-1], ACCUMULATORS[q.dtype.name]))
    return _called(_Forward(call, streams), tuple(shapes), (inputs, operands))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _called(host: Any, shapes: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    return jax.pure_callback(host, shapes, *arguments, vmap_method="sequential")


def _refused(host: Any, shapes: Any, *arguments: Any) -> Any:
    raise NotImplementedError("attention of attn_numba has first derivatives; a second one was asked for")


_called.defvjp(_refused, _refused)


@dataclass(frozen=True)
class _Forward:
    """What the host does for `_computed`."""

    call: _Call
    streams: bool

    def __call__(self, inputs: tuple[Any, ...], operands: tuple[Any, ...]) -> tuple[AnyArray, ...]:
        rules, _ = self.call.rules(operands)
        q, k, v = map(np.asarray, inputs)
        found = api.attention(q, k, v, **rules, backend=self.call.backend, return_lse=self.streams)
        return tuple(found) if self.streams else (found,)


@dataclass(frozen=True)
class _Backward:
    """What the host does for `_pulled`."""

    call: _Call

    def __call__(
        self, inputs: tuple[Any, ...], operands: tuple[Any, ...], saved: Any, dout: Any
    ) -> tuple[AnyArray, ...]:
        rules, owners = self.call.rules(operands)
        q, k, v = map(np.asarray, inputs)
        kept = None if saved is None else tuple(map(np.asarray, saved))
        found = api.attention_vjp(q, k, v, np.asarray(dout), **rules, backend=self.call.backend, saved=kept)
        learned = zip(_trained(self.call, gradients_of(owners, found)), _trained(self.call, operands), strict=True)
        return found.q, found.k, found.v, *(x.astype(operand.dtype) for x, operand in learned)


def _trained(call: _Call, of_operands: Any) -> list[Any]:
    return [x for x, learned in zip(of_operands, call.learned, strict=True) if learned]


def _checked(x: Any, name: str) -> jax.Array:
    if not isinstance(x, (jax.Array, np.ndarray)):
        raise TypeError(f"{name} is {type(x).__name__}; needed an array of JAX or NumPy")
    check_dtype(name, x.dtype.name)
    if jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype:
        raise TypeError(f"{name} has dtype {x.dtype.name}, which JAX rounds unless jax_enable_x64 is set")
    return jax.numpy.asarray(x)


def _is_real(x: Any) -> bool:
    return bool(jax.numpy.issubdtype(x.dtype, jax.numpy.inexact))


def _placeholder(x: Any) -> AnyArray:
    """Return zeros of the shape and dtype of an array whose values are not known; they take no memory."""
    return np.broadcast_to(np.zeros((), x.dtype), x.shape)


def _key_of(template: Template) -> tuple[Any, ...]:
    return tuple(map(_key_of_part, template.parts))


def _key_of_part(x: Any) -> Any:
    if isinstance(x, tuple):
        return tuple(map(_key_of_part, x))
    return x if isinstance(x, (int, float, str)) else problem.identity(x)


@functools.cache
def _require(backend: str, gradients: bool = False) -> None:
    """Raise what a backend raises that cannot run, or has no gradients, before there is work."""
    nothing = np.zeros((0, 1), np.float32)
    if gradients:
        api.attention_vjp(nothing, nothing, nothing, nothing, backend=backend)
    else:
        api.attention(nothing, nothing, nothing, backend=backend)

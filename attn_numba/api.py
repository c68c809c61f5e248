"""The public functions: signatures, documentation, and the choice of a backend."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from attn_numba import problem as problems
from attn_numba.environment import cuda_availability
from attn_numba.partition import merge
from attn_numba.problem import Problem
from attn_numba.rules import as_mask, places_of
from attn_numba.rules.arguments import (
    check_differentiable,
    check_gradient,
    check_lse,
    check_offsets,
    check_saved,
)
from attn_numba.rules.results import Gradients, result_of

__all__ = ["attention", "attention_vjp", "mask_array", "merge"]

BACKENDS = ("auto", "reference", "cpu", "cuda")
NO_CUDA = "what is asked for has no CUDA version"


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
    stream: Any = None,
    out: Any = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Any:
    """Return the attention of queries over keys and values.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries: float64, float32, float16 or bfloat16. Missing leading axes count as 1. Any strides.
    k : array (B, Hk, N, D)
        Keys, of q's dtype; `H` is a multiple of `Hk`, and query head h reads key head ``h // (H // Hk)``.
    v : array (B, Hk, N, E)
        Values, of q's dtype.
    mask : mask rule or bool array that broadcasts to (B, H, M, N), optional
        Which keys a query may attend to, True = may; masks join with ``& | ~``. Without it, all.
    modifiers : modifier or sequence of modifiers, optional
        Applied to the scores in this order.
    score : Dot, Cosine, Bilinear or Additive, optional
        Score of a query and a key; without it, `Dot`. `Bilinear` and `Additive` also take keys of another head size
        than the queries.
    normalizer : Softmax, Sparsemax, Entmax15 or DoubleSoftmax, optional
        Makes weights of the scores of a row; without it, `Softmax`, which may hold a sink.
    scale : float, optional
        Factor of the scores; without it ``1 / sqrt(D)`` for `Dot` and 1 for the others.
    query_offset, key_offset : int or int array (B,), optional
        Position of query row 0 and of key row 0. A `query_offset` of None is `key_offset` when ``M == N``.
    dropout : Dropout, optional
        Zeroes weights at random, after the normalizer.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes; "auto" is the CPU for arrays in host memory and CUDA for arrays on a GPU. A named backend runs or
        raises; "cuda" brings host arrays to the GPU and their results back.
    stream : int, or a stream of torch, CuPy, Numba or cuda.core, optional
        On which a call of arrays on a GPU is computed, asynchronously: a handle, or an object with ``__cuda_stream__``,
        ``cuda_stream`` or ``ptr``. Without it, q's own one: the current stream of torch or CuPy, the one that
        ``__cuda_array_interface__`` names, or else the default stream.
    out : array (B, H, M, E), optional
        Where to write the result; in the memory that q is in, and must not overlap an input.
    return_lse, return_weights : bool
        What to return beside the output.

    Returns
    -------
    out : array (B, H, M, E)
        In the dtype and rank of `q`; for arrays on a GPU of q's kind, as are `lse` and `weights`: of torch, CuPy or
        Numba, and else an object with ``__cuda_array_interface__`` and DLPack. With `return_lse` or `return_weights`,
        a named tuple of (out, lse, weights), only those asked for:
    lse : array (B, H, M)
        ``log sum_j exp(s_ij)`` over the allowed keys and the sink, natural; float64 for float64, else float32. Of
        `Softmax` only.
    weights : array (B, H, M, N)
        Before dropout; in the dtype of `lse`.

    Raises
    ------
    TypeError
        For arguments of the wrong kind, such as a float mask.
    ValueError
        For shapes and values that do not fit; where a rule uses positions, ``M != N`` and `query_offset` is None; and
        where `return_lse` is asked of another normalizer than `Softmax`.
    NotImplementedError
        For what the backend does not offer, and for a backend that cannot run here, with the reason.
    MemoryError
        If the GPU has no room for the results.
    RuntimeError
        If the CUDA driver fails, or a CUDA kernel can neither be found nor compiled.

    Notes
    -----
    ``s_ij = q_i . k_j * scale``, then the modifiers, then the mask; ``w_ij = exp(s_ij - lse_i)``; ``out_i = sum_j w_ij
    v_j``. A key that is not allowed is not there: NaN or infinity in it changes nothing. A query with no allowed key
    gets 0, and ``lse`` minus infinity.

    References
    ----------
    A. Vaswani et al. (2017), "Attention is all you need", section 3.2. T. Dao (2023), "FlashAttention-2".

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> q = k = np.zeros((3, 4))
    >>> v = np.array([[1.0], [2.0], [6.0]])
    >>> an.attention(q, k, v, mask=an.Causal()).ravel()
    array([1. , 1.5, 3. ])
    """
    name = choose_backend(backend, q, k, v, cuda=True)
    if name == "cuda":
        found = cuda_engine().attention(
            q, k, v, stream=stream, out=out, return_lse=return_lse, return_weights=return_weights, mask=mask,
            modifiers=modifiers, score=score, normalizer=normalizer, scale=scale, query_offset=query_offset,
            key_offset=key_offset, dropout=dropout,
        )  # fmt: skip
        return result_of(*found) if return_lse or return_weights else found[0]
    if stream is not None:
        raise ValueError(f"stream is {type(stream).__name__}; needed None for arrays in host memory")
    call = problems.check(
        q, k, v, mask=mask, modifiers=modifiers, score=score, normalizer=normalizer, scale=scale,
        query_offset=query_offset, key_offset=key_offset, dropout=dropout,
    )  # fmt: skip
    check_lse(return_lse, call.normalizer)
    target = None if out is None else problems.check_out(out, call)
    run = _on_reference if name == "reference" else _on_cpu
    result, lse, weights = run(call, target, return_lse, return_weights)
    result = ranked(result, call.rank) if out is None else out
    if not (return_lse or return_weights):
        return result
    return result_of(
        result,
        ranked(lse, call.rank - 1) if return_lse else None,
        ranked(weights, call.rank) if return_weights else None,
    )


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    *,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    saved: Any = None,
    backend: str = "auto",
    stream: Any = None,
) -> Gradients:
    """Return the gradients of ``sum(dout * attention(q, k, v))`` by the inputs and by the arrays of rules.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries: float64, float32, float16 or bfloat16. Missing leading axes count as 1. Any strides.
    k : array (B, Hk, N, D)
        Keys, of q's dtype.
    v : array (B, Hk, N, E)
        Values, of q's dtype.
    dout : array (B, H, M, E)
        Gradient by the output, in its shape and dtype.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset, dropout : optional
        The rules, as `attention` takes them. A `CustomModifier` needs its `slope`.
    saved : (out, lse), optional
        What `attention` returned for the same call with `return_lse`, of `Softmax`; without it, computed again.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes, as in `attention`.
    stream : int or stream, optional
        As in `attention`. Gradients of arrays on a GPU are of q's kind, those by arrays of rules too; the `lse` of
        `saved` is used there without a look at whether it is of this call.

    Returns
    -------
    Gradients
        ``.q``, ``.k``, ``.v`` in the shapes and dtype of the inputs. ``.of(rule)`` gives those by the arrays of a rule
        of the call, in the shape it was given: `Bias`, the slopes of `ALiBi`, `Temperature`, the span of
        `AdaptiveSpan`, the sink of `Softmax`, the weights of `Bilinear` and `Additive`.

    Raises
    ------
    TypeError
        For arguments of the wrong kind, and a `dout` or `saved` of another dtype.
    ValueError
        For shapes and values that do not fit, a modifier without slope, and `saved` of another call.
    NotImplementedError
        For a backend that does not compute gradients, or cannot run here.

    Notes
    -----
    Of a softmax ``ds_ij = w_ij (dout_i . v_j - dout_i . out_i)``; of dot products ``dq_i = scale sum_j ds_ij k_j`` and
    ``dk_j = scale sum_i ds_ij q_i``; and ``dv_j = sum_i w_ij dout_i``. A key that is not allowed, and a query with no
    allowed key, have gradient 0 and change no other, whatever they hold.

    References
    ----------
    T. Dao et al. (2022), "FlashAttention: fast and memory-efficient exact attention with IO-awareness", appendix B.2.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> q = k = np.zeros((3, 4))
    >>> v = np.array([[1.0], [2.0], [6.0]])
    >>> alibi = an.ALiBi(0.0)
    >>> grads = an.attention_vjp(q, k, v, np.ones((3, 1)), modifiers=alibi, mask=an.Causal(), backend="reference")
    >>> grads.v.ravel().round(3), grads.of(alibi)
    (array([1.833, 0.833, 0.333]), array(1.91666667))
    """
    name = choose_backend(backend, q, k, v, dout, cuda=True)
    rules = {
        "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
        "query_offset": query_offset, "key_offset": key_offset, "dropout": dropout,
    }  # fmt: skip
    if name == "cuda":
        on_cuda: Gradients = cuda_engine().attention_vjp(q, k, v, dout, saved=saved, stream=stream, **rules)
        return on_cuda
    if stream is not None:
        raise ValueError(f"stream is {type(stream).__name__}; needed None for arrays in host memory")
    q, k, v, dout = (problems.host_array(x, label) for x, label in ((q, "q"), (k, "k"), (v, "v"), (dout, "dout")))
    if name == "reference":
        from attn_numba import reference

        found: Gradients = reference.attention_vjp(q, k, v, dout, **rules, saved=saved)
        return found
    return _cpu_gradients(q, k, v, dout, saved, rules)


def _cpu_gradients(q: Any, k: Any, v: Any, dout: Any, saved: Any, rules: dict[str, Any]) -> Gradients:
    problem = problems.check(q, k, v, **rules)
    check_differentiable(problem.modifiers)
    s = problem.sizes
    shape = (s.B, s.H, s.M, s.E)[4 - problem.rank :]
    check_gradient(dout.shape, dout.dtype.name, shape, problem.dtype)
    out, lse = check_saved(saved, problem.normalizer, shape, problem.dtype)
    if saved is not None:
        saved = np.asarray(out).reshape(s.B, s.H, s.M, s.E), np.asarray(lse).reshape(s.B, s.H, s.M)
    from attn_numba.cpu.gradients import attention_vjp as on_cpu

    dq, dk, dv, learned = on_cpu(problem, dout.reshape(s.B, s.H, s.M, s.E), saved)
    with np.errstate(all="ignore"):
        dq, dk, dv = (
            x.reshape(given.shape).astype(given.dtype, copy=False) for x, given in ((dq, q), (dk, k), (dv, v))
        )
    return Gradients(dq, dk, dv, learned.found())


def ranked(array: Any, rank: int) -> Any:
    """Without the leading axes of size 1 that `check` put in front."""
    return array.reshape(array.shape[array.ndim - rank :]) if array.ndim > rank else array


def choose_backend(backend: str, *arrays: Any, cuda: bool = False) -> str:
    """Return who computes: "reference" or "cpu", or "cuda" for what has a version there (`cuda`)."""
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; needed one of {', '.join(map(repr, BACKENDS))}")
    on_device = [problems.is_device_array(x) for x in arrays]
    if any(on_device) and not all(on_device):
        names = ("q", "k", "v", "dout")[: len(arrays)]
        where = ", ".join(f"{n} on a {'GPU' if d else 'host'}" for n, d in zip(names, on_device, strict=True))
        all_of_them = ("both", "all three", "all four")[len(names) - 2]
        raise TypeError(f"{', '.join(names)} are in different places: {where}; needed one place for {all_of_them}")
    if any(on_device) and backend in ("cpu", "reference"):
        raise TypeError(f"backend is {backend!r}, and the arrays are on a GPU; needed 'cuda', 'auto' or host arrays")
    if any(on_device) or backend == "cuda":
        if not cuda:
            raise _no_cuda(NO_CUDA)
        return "cuda"
    if backend == "auto":
        return "cpu"
    return backend


def _no_cuda(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"backend 'cuda' cannot run: {reason}; arrays in host memory run on 'cpu' and 'reference'"
    )


@functools.cache
def cuda_engine() -> Any:
    """Return the module that runs calls on a GPU.

    Raises
    ------
    NotImplementedError
        If CUDA cannot run here, with the reason.
    """
    available, reason = cuda_availability()
    if not available:
        raise _no_cuda(reason)
    from attn_numba.gpu import engine

    return engine


def _on_cpu(call: Problem, out: Any, return_lse: bool, return_weights: bool) -> tuple[Any, Any, Any]:
    compute = cpu_engine().attention
    s = call.sizes
    if out is None:
        out = np.empty((s.B, s.H, s.M, s.E), call.q.dtype)
    lse = np.empty((s.B, s.H, s.M), call.accumulator) if return_lse else None
    weights = np.zeros((s.B, s.H, s.M, s.N), call.accumulator) if return_weights else None
    if s.B and s.M:
        compute(call, out, lse, weights)
    return out, lse, weights


@functools.cache  # an import statement takes a sixth of a short call
def cpu_engine() -> Any:
    """Return the module that runs calls on the CPU.

    Raises
    ------
    NotImplementedError
        If numba is not installed.
    """
    try:
        from attn_numba.cpu import engine
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("numba", "llvmlite"):
            raise
        raise NotImplementedError(
            f"backend 'cpu' needs numba, which is not installed; 'reference' runs without: {error}"
        ) from error
    return engine


def _on_reference(call: Problem, out: Any, return_lse: bool, return_weights: bool) -> tuple[Any, Any, Any]:
    from attn_numba import reference

    found = reference.attention(
        call.q, call.k, call.v, mask=call.mask, modifiers=call.modifiers, score=call.score, normalizer=call.normalizer,
        scale=call.scale, query_offset=call.query_offset, key_offset=call.key_offset, dropout=call.dropout,
        return_lse=return_lse, return_weights=True,
    )  # fmt: skip
    if out is None:
        out = found.out
    else:
        out[...] = found.out
    return out, found.lse if return_lse else None, found.weights


def mask_array(
    mask: Any, shape: tuple[int, int, int, int], query_offset: Any = None, key_offset: Any = 0
) -> np.ndarray:
    """Return a mask as an array.

    Parameters
    ----------
    mask : mask rule, bool array or None
        As `attention` takes it.
    shape : (B, H, M, N)
        Sequences, query heads, queries, keys.
    query_offset, key_offset : int or int array (B,), optional
        As `attention` takes them.

    Returns
    -------
    bool array (B, H, M, N)
        True where the query may attend to the key.

    Raises
    ------
    TypeError
        If the mask is no mask.
    ValueError
        If it does not fit the shape, or needs a query offset.

    Examples
    --------
    >>> import attn_numba as an
    >>> an.mask_array(an.Causal(), (1, 1, 2, 3), query_offset=1)[0, 0].astype(int)
    array([[1, 1, 0],
           [1, 1, 1]])
    """
    sizes = problems.check_shape(shape)
    rule = as_mask(mask)
    query_at, key_at = check_offsets(query_offset, key_offset, sizes, () if rule is None else (rule,))
    if rule is None:
        return np.ones(tuple(shape), bool)
    rule.check(sizes, query_at, key_at)
    return np.array(np.broadcast_to(rule.evaluate(places_of(sizes, query_at, key_at), sizes), tuple(shape)))

"""Attention of the newest tokens over all that a cache holds."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_numba import problem as problems
from attn_numba.api import choose_backend, cpu_engine, cuda_engine, ranked
from attn_numba.problem import Problem
from attn_numba.rules import Dot, Padding, Softmax, as_mask
from attn_numba.rules.arguments import check_lse
from attn_numba.rules.results import result_of
from attn_numba.rules.storage import CacheView

__all__ = ["decode"]


def decode(
    q: Any,
    cache: Any,
    *,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    dropout: Any = None,
    sequences: Any = None,
    backend: str = "auto",
    out: Any = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Any:
    """Return the attention of the newest tokens of each sequence over all that a cache holds of it.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries of the last M tokens of each sequence, whose keys and values are in the cache already: float64 with a
        cache of float64, else float32, float16 or bfloat16. Missing leading axes count as 1. Any strides.
    cache : KVCache or PagedKVCache
        Of `key_heads` that divide `H`, and of q's head size. Query head h reads key head ``h // (H // key_heads)``.
    mask : mask rule or bool array that broadcasts to (B, H, M, N), optional
        Which keys a query may attend to, among those of its sequence; without it, all. N is the longest length. Nothing
        is implied: several new tokens that must not see each other's future need ``mask=Causal()``.
    modifiers : modifier or sequence of modifiers, optional
        Applied to the scores in this order.
    score : Dot, Cosine, Bilinear or Additive, optional
        Score of a query and a key; without it, `Dot`.
    normalizer : Softmax, Sparsemax, Entmax15 or DoubleSoftmax, optional
        Makes weights of the scores of a row; without it, `Softmax`, which may hold a sink.
    scale : float, optional
        Factor of the scores; without it ``1 / sqrt(D)`` for `Dot` and 1 for the others.
    dropout : Dropout, optional
        Zeroes weights at random, after the normalizer.
    sequences : int array (B,), optional
        Which sequences of the cache the rows of q belong to; without it, all in their order.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes. "cuda" brings the pages to the GPU with each call.
    out : array (B, H, M, E), optional
        Where to write the result; must not overlap q.
    return_lse, return_weights : bool
        What to return beside the output.

    Returns
    -------
    out : array (B, H, M, E)
        In the dtype and rank of `q`. With `return_lse` or `return_weights`, a named tuple of (out, lse, weights), only
        those asked for:
    lse : array (B, H, M)
        ``log sum_j exp(s_ij)`` over the allowed keys and the sink, natural; float64 for float64, else float32. Of
        `Softmax` only.
    weights : array (B, H, M, N)
        Before dropout; 0 beyond a sequence's length.

    Raises
    ------
    TypeError
        For arguments of the wrong kind, and a dtype of q that does not go with the cache's.
    ValueError
        For shapes and values that do not fit, and more queries than a sequence holds tokens.
    NotImplementedError
        For a q on a GPU, and for a backend that cannot run here.

    Notes
    -----
    Row i of q is at position ``length - M + i`` of its sequence, row j of the cache at position j. Rules with arrays
    are indexed by row of q and row of the cache. The softmax of dot products reads keys and values once, where and as
    they are stored, for all query heads that share them; other scores and normalizers, and dropout, work on a plain
    copy of what is cached, which takes longer.

    References
    ----------
    T. Dao et al. (2023), "Flash-Decoding for long-context inference". W. Kwon et al. (2023), "Efficient memory
    management for large language model serving with PagedAttention".
    """
    if problems.is_device_array(q):
        raise NotImplementedError(
            "q is on a GPU, and caches are in host memory; needed a host array, which backend='cuda' brings there "
            "together with the pages"
        )
    name = choose_backend(backend, q, cuda=True)
    queries = problems.host_array(q, "q")
    view = cache.view(sequences)
    rules = {
        "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
        "dropout": dropout,
    }  # fmt: skip
    call = _checked(queries, view, rules)
    check_lse(return_lse, call.normalizer)
    target = None if out is None else problems.check_out(out, call)
    plain = (
        name != "reference" and isinstance(call.score, Dot) and isinstance(call.normalizer, Softmax) and dropout is None
    )
    compute = _from_pages if plain else _from_arrays
    arrays = None if plain else cache.arrays(sequences)
    result, lse, weights = compute(call, view, arrays, target, return_lse, return_weights, name)
    result = ranked(result, call.rank) if out is None else out
    if not (return_lse or return_weights):
        return result
    return result_of(
        result,
        ranked(lse, call.rank - 1) if return_lse else None,
        ranked(weights, call.rank) if return_weights else None,
    )


def _checked(q: Any, view: CacheView, rules: dict[str, Any]) -> Problem:
    """Return the call as a problem whose keys and values have shapes and nothing else."""
    _check_fit(q, view, rules["score"])
    B, M, shape = len(view.lengths), q.shape[-2], (view.key_heads, view.longest)
    k, v = (problems.nothing((B, *shape, size), q.dtype) for size in (view.head_size, view.value_size))
    first = view.lengths - M
    same = B == 1 or (B > 0 and (first == first[0]).all())
    offset: Any = int(first[0]) if same else first.astype(np.int32)
    return problems.check(q, k, v, query_offset=offset, **rules)


def _check_fit(q: Any, view: CacheView, score: Any) -> None:
    if not 2 <= q.ndim <= 4:
        raise ValueError(f"q has {q.ndim} axes, shape {q.shape}; needed 2 to 4, (B, H, M, D)")
    B, H, M, D = (1,) * (4 - q.ndim) + q.shape
    dtype = problems.dtype_name(q.dtype)
    if (dtype == "float64") != (view.value_code == "float64"):
        needed = "float64" if view.value_code == "float64" else "float32, float16 or bfloat16"
        raise TypeError(f"q has dtype {dtype} and the cache {view.value_code}; needed {needed}")
    if len(view.lengths) != B:
        raise ValueError(f"q has {B} sequences; the cache has {len(view.lengths)} for them")
    if H < 1 or H % view.key_heads:
        raise ValueError(f"the cache has {view.key_heads} key heads; q has {H} heads, not a multiple of them")
    if view.head_size != D and (score is None or isinstance(score, Dot)):
        raise ValueError(f"q has head size {D}; the cache has {view.head_size}")
    if B and view.lengths.min() < M:
        b = int(view.lengths.argmin())
        raise ValueError(f"q has {M} queries of each sequence; sequence {b} has {view.lengths[b]} tokens in the cache")


def _from_pages(
    call: Problem, view: CacheView, arrays: Any, out: Any, return_lse: bool, return_weights: bool, backend: str
) -> tuple[Any, Any, Any]:
    s = call.sizes
    if out is None:
        out = np.empty((s.B, s.H, s.M, s.E), call.q.dtype)
    lse = np.empty((s.B, s.H, s.M), call.accumulator) if return_lse else None
    weights = np.zeros((s.B, s.H, s.M, s.N), call.accumulator) if return_weights else None
    if s.B and s.M:
        _engine(backend).run(call, view, out, lse, weights)
    return out, lse, weights


def _engine(backend: str) -> Any:
    if backend == "cuda":
        cuda_engine()
        from attn_numba.gpu import decode_engine as on_cuda

        return on_cuda
    cpu_engine()
    from attn_numba.cpu import decode_engine as on_cpu

    return on_cpu


def _from_arrays(
    call: Problem, view: CacheView, arrays: Any, out: Any, return_lse: bool, return_weights: bool, backend: str
) -> tuple[Any, Any, Any]:
    """Compute from a plain copy of the cache: rows beyond a length are padding."""
    from attn_numba.api import attention

    k, v = arrays
    dtype = np.dtype(call.q.dtype) if call.q.dtype == k.dtype else call.accumulator
    k, v = k.astype(dtype, copy=False), v.astype(dtype, copy=False)
    beyond = Padding(view.lengths)
    mask = beyond if call.mask is None else as_mask(call.mask) & beyond
    found = attention(
        call.q.astype(dtype, copy=False), k, v, mask=mask, modifiers=call.modifiers, score=call.score,
        normalizer=call.normalizer, scale=call.scale, query_offset=call.query_offset, dropout=call.dropout,
        backend=backend, return_lse=return_lse, return_weights=return_weights,
    )  # fmt: skip
    several = return_lse or return_weights
    result = (found.out if several else found).astype(call.q.dtype, copy=False)
    if out is not None:
        out[...] = result
        result = out
    return result, found.lse if return_lse else None, found.weights if return_weights else None

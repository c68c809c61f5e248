"""Attention of sequences of unequal lengths that lie one after the other, without padding."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attn_numba import problem as problems
from attn_numba.api import attention, attention_vjp, choose_backend, cpu_engine
from attn_numba.packing import check_starts, spread
from attn_numba.problem import Problem
from attn_numba.rules import Padding, Softmax, as_mask, as_modifiers
from attn_numba.rules.arguments import check_gradient, check_lse, check_saved
from attn_numba.rules.data import AnyArray
from attn_numba.rules.results import Gradients, result_of

__all__ = ["ragged_attention", "ragged_attention_vjp"]


def ragged_attention(
    q: Any,
    k: Any,
    v: Any,
    query_starts: Any,
    key_starts: Any,
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
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """Return the attention of each of some sequences over its own keys and values; no padding is computed on the CPU.

    Parameters
    ----------
    q : array (T, H, D)
        Queries of all sequences, one after the other: float64, float32, float16 or bfloat16. Any strides.
    k : array (S, Hk, D)
        Keys, of q's dtype; `H` is a multiple of `Hk`.
    v : array (S, Hk, E)
        Values, of q's dtype.
    query_starts, key_starts : int array (B + 1,)
        First row of each sequence in q, and in k and v; then T and S. A sequence may be empty.
    mask : mask rule or bool array that broadcasts to (B, H, M, N), optional
        Which keys of its sequence a query may attend to; without it, all. For this and the other rules b is the number
        of the sequence, rows are counted within it, and M and N are those of the longest.
    modifiers : modifier or sequence of modifiers, optional
        Applied to the scores in this order.
    score : Dot, Cosine, Bilinear or Additive, optional
        Score of a query and a key; without it, `Dot`.
    normalizer : Softmax, Sparsemax, Entmax15 or DoubleSoftmax, optional
        Makes weights of the scores of a row; without it, `Softmax`, which may hold a sink.
    scale : float, optional
        Factor of the scores; without it ``1 / sqrt(D)`` for `Dot` and 1 for the others.
    query_offset, key_offset : int or int array (B,), optional
        Position of each sequence's first query and first key. A `query_offset` of None is `key_offset` where each
        sequence has as many queries as keys.
    dropout : Dropout, optional
        Zeroes weights at random, after the normalizer.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes. "reference" and "cuda" compute on sequences that are filled up to the longest.
    out : array (T, H, E), optional
        Where to write the result; must not overlap an input.
    return_lse : bool
        Whether to return the lse beside the output.

    Returns
    -------
    out : array (T, H, E)
        In the dtype of `q`; with `return_lse` a named tuple of (out, lse):
    lse : array (T, H)
        As of `attention`. Of `Softmax` only.

    Raises
    ------
    TypeError
        For arguments of the wrong kind.
    ValueError
        For shapes and values that do not fit; and where a rule uses positions, a sequence has not as many queries as
        keys, and `query_offset` is None.
    NotImplementedError
        For arrays on a GPU, and for a backend that cannot run here.

    Notes
    -----
    Nothing is shared between sequences: each has the bits that `attention` gives it alone, whatever the others hold.

    References
    ----------
    Packed sequences as in T. Dao (2022), "FlashAttention", `flash_attn_varlen_func`.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> q = k = np.zeros((5, 1, 4))
    >>> v = np.array([1.0, 3.0, 1.0, 2.0, 6.0]).reshape(5, 1, 1)
    >>> an.ragged_attention(q, k, v, [0, 2, 5], [0, 2, 5], mask=an.Causal()).ravel()
    array([1. , 2. , 1. , 1.5, 3. ])
    """
    rules = {
        "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
        "query_offset": query_offset, "key_offset": key_offset, "dropout": dropout,
    }  # fmt: skip
    name = _backend(backend, q, k, v)
    call = _checked(q, k, v, query_starts, key_starts, rules)
    check_lse(return_lse, call.longest.normalizer)
    target = _target(out, call.packed)
    if name == "cpu":
        lse = _on_cpu(call, target, return_lse)
    else:
        lse = _filled_up(call, target, return_lse, name)
    result = target if out is None else out
    return result_of(result, lse)


def ragged_attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    query_starts: Any,
    key_starts: Any,
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
) -> Gradients:
    """Return the gradients of ``sum(dout * ragged_attention(q, k, v))`` by the inputs and by the arrays of rules.

    Parameters
    ----------
    q : array (T, H, D)
        Queries of all sequences, as `ragged_attention` takes them.
    k : array (S, Hk, D)
        Keys.
    v : array (S, Hk, E)
        Values.
    dout : array (T, H, E)
        Gradient by the output, of q's dtype.
    query_starts, key_starts : int array (B + 1,)
        First row of each sequence in q, and in k and v; then T and S.
    mask : mask rule or bool array that broadcasts to (B, H, M, N), optional
        Which keys of its sequence a query may attend to; without it, all. For this and the other rules b is the number
        of the sequence, rows are counted within it, and M and N are those of the longest.
    modifiers : modifier or sequence of modifiers, optional
        Applied to the scores in this order.
    score : Dot, Cosine, Bilinear or Additive, optional
        Score of a query and a key; without it, `Dot`.
    normalizer : Softmax, Sparsemax, Entmax15 or DoubleSoftmax, optional
        Makes weights of the scores of a row; without it, `Softmax`, which may hold a sink.
    scale : float, optional
        Factor of the scores; without it ``1 / sqrt(D)`` for `Dot` and 1 for the others.
    query_offset, key_offset : int or int array (B,), optional
        Position of each sequence's first query and first key. A `query_offset` of None is `key_offset` where each
        sequence has as many queries as keys.
    dropout : Dropout, optional
        Zeroes weights at random, after the normalizer.
    saved : pair of arrays (T, H, E), (T, H), optional
        Output and lse of the forward call, of `Softmax`; without them they are computed again.
    backend : {"auto", "reference", "cpu", "cuda"}
        Who computes.

    Returns
    -------
    Gradients
        ``.q``, ``.k``, ``.v`` in the shapes and dtype of the inputs, and ``.of(rule)``, summed over the sequences where
        they share an array.

    Raises
    ------
    TypeError
        For arguments of the wrong kind, and a `dout` or `saved` of another dtype.
    ValueError
        For shapes and values that do not fit, a modifier without slope, and `saved` of another call.
    NotImplementedError
        For arrays on a GPU, and for a backend that cannot run here.

    Notes
    -----
    Sequences are filled up to the longest for it; the kernels skip blocks of filling.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> q = k = np.zeros((3, 1, 4))
    >>> v = np.array([1.0, 3.0, 5.0]).reshape(3, 1, 1)
    >>> an.ragged_attention_vjp(q, k, v, np.ones((3, 1, 1)), [0, 2, 3], [0, 2, 3]).v.ravel()
    array([1., 1., 1.])
    """
    rules = {
        "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
        "query_offset": query_offset, "key_offset": key_offset, "dropout": dropout,
    }  # fmt: skip
    name = _backend(backend, q, k, v, dout)
    call = _checked(q, k, v, query_starts, key_starts, rules)
    given, s = problems.host_array(dout, "dout"), call.packed.sizes
    shape = (s.M, s.H, s.E)
    check_gradient(given.shape, given.dtype.name, shape, call.packed.dtype)
    kept = check_saved(saved, call.longest.normalizer, shape, call.packed.dtype)
    if saved is not None:
        saved = _saved(call, *map(np.asarray, kept))
    found = attention_vjp(
        *call.filled, _side_by_side(given, call.query_starts), **call.rules_filled, saved=saved, backend=name
    )
    starts = call.query_starts, call.key_starts, call.key_starts
    dq, dk, dv = (_one_after_the_other(x, at) for x, at in zip((found.q, found.k, found.v), starts, strict=True))
    return Gradients(dq, dk, dv, found.learned)


class _Call(NamedTuple):
    """A checked call."""

    packed: Problem  # q, k, v are (1, H, T, D), (1, Hk, S, D), (1, Hk, S, E), its sizes those of one long sequence
    longest: Problem  # B sequences of the largest lengths, as the rules see them; its arrays hold nothing
    query_starts: AnyArray
    key_starts: AnyArray
    rules: dict[str, Any]

    @property
    def filled(self) -> tuple[AnyArray, AnyArray, AnyArray]:
        """q, k and v side by side, filled up."""
        starts = self.query_starts, self.key_starts, self.key_starts
        arrays = self.packed.q, self.packed.k, self.packed.v
        q, k, v = (_side_by_side(x[0].swapaxes(0, 1), at) for x, at in zip(arrays, starts, strict=True))
        return q, k, v

    @property
    def rules_filled(self) -> dict[str, Any]:
        """The rules of a call of arrays that are filled up."""
        own = Padding(np.diff(self.key_starts), query_lengths=np.diff(self.query_starts))
        mask = self.longest.mask
        at = {"query_offset": self.longest.query_offset, "key_offset": self.longest.key_offset}
        return {**self.rules, **at, "mask": own if mask is None else mask & own}


def _backend(backend: str, *arrays: Any) -> str:
    if any(map(problems.is_device_array, arrays)):
        raise NotImplementedError(
            "sequences of unequal lengths are not computed from arrays on a GPU; needed host arrays, which "
            "backend='cuda' brings there"
        )
    return choose_backend(backend, *arrays, cuda=True)


def _checked(q: Any, k: Any, v: Any, query_starts: Any, key_starts: Any, rules: dict[str, Any]) -> _Call:
    arrays = [problems.host_array(x, name) for x, name in ((q, "q"), (k, "k"), (v, "v"))]
    for array, name in zip(arrays, ("q", "k", "v"), strict=True):
        if array.ndim != 3:
            raise ValueError(f"{name} has {array.ndim} axes, shape {array.shape}; needed 3: tokens, heads, size")
    begins = check_starts("query_starts", query_starts, len(arrays[0]), "q")
    key_begins = check_starts("key_starts", key_starts, len(arrays[1]), "k")
    if len(begins) != len(key_begins):
        raise ValueError(f"key_starts has {len(key_begins)} numbers; query_starts has {len(begins)}")
    B, counts, key_counts = len(begins) - 1, np.diff(begins), np.diff(key_begins)
    q4, k4, v4 = (x.swapaxes(0, 1)[np.newaxis] for x in arrays)
    packed = problems.check(q4, k4, v4, score=rules["score"])._replace(rank=3)
    s = packed.sizes
    shapes = (B, s.H, int(counts.max(initial=0)), s.D), (B, s.Hk, int(key_counts.max(initial=0)), k4.shape[3])
    nothing = [problems.nothing(shape, q4.dtype) for shape in (*shapes, (*shapes[1][:3], s.E))]
    if rules["query_offset"] is None and (counts != key_counts).any():
        rules = {**rules, "query_offset": _first_row(rules, counts, key_counts)}
    longest = problems.check(*nothing, **rules)
    return _Call(packed, longest, begins, key_begins, rules)


def _first_row(rules: dict[str, Any], counts: AnyArray, key_counts: AnyArray) -> int:
    """Return a query offset for rules that do not look at it."""
    for user in (as_mask(rules["mask"]), *as_modifiers(rules["modifiers"]), rules["dropout"]):
        if user is not None and user.uses_positions:
            b = int(np.flatnonzero(counts != key_counts)[0])
            raise ValueError(
                f"query_offset is None, but {type(user).__name__} uses positions and sequence {b} has {counts[b]} "
                f"queries and {key_counts[b]} keys: pass query_offset=0 (first rows aligned) or the numbers of keys "
                "minus those of queries (last rows aligned)"
            )
    return 0


def _target(out: Any, packed: Problem) -> AnyArray:
    """Return where the result goes, (T, H, E)."""
    s = packed.sizes
    shape = (s.M, s.H, s.E)
    if out is None:
        return np.empty(shape, packed.q.dtype)
    if getattr(out, "shape", shape) != shape:
        raise ValueError(f"out has shape {out.shape}; needed {shape}")
    problems.check_out(out.swapaxes(0, 1) if isinstance(out, np.ndarray) else out, packed)
    found: AnyArray = out
    return found


def _on_cpu(call: _Call, target: AnyArray, return_lse: bool) -> AnyArray | None:
    cpu_engine()
    from attn_numba.cpu import ragged

    packed, s = call.packed, call.packed.sizes
    lse = np.empty((1, s.H, s.M), packed.accumulator) if return_lse else None
    problem = call.longest._replace(q=packed.q, k=packed.k, v=packed.v)
    ragged.attention(problem, call.query_starts, call.key_starts, target.swapaxes(0, 1)[np.newaxis], lse)
    return None if lse is None else np.ascontiguousarray(lse[0].swapaxes(0, 1))


def _filled_up(call: _Call, target: AnyArray, return_lse: bool, backend: str) -> AnyArray | None:
    found = attention(*call.filled, **call.rules_filled, backend=backend, return_lse=return_lse)
    target[...] = _one_after_the_other(found.out if return_lse else found, call.query_starts)
    return _one_after_the_other(found.lse, call.query_starts) if return_lse else None


def _saved(call: _Call, out: AnyArray, lse: AnyArray) -> tuple[AnyArray, AnyArray]:
    """Return output and lse side by side; rows of filling see nothing but a sink."""
    s, normalizer = call.longest.sizes, call.longest.normalizer
    sinks = normalizer.sink_array(s) if isinstance(normalizer, Softmax) else None
    nothing = np.full((s.B, s.H), -np.inf) if sinks is None else sinks
    found = _side_by_side(lse, call.query_starts)
    filling = np.arange(s.M) >= np.diff(call.query_starts)[:, np.newaxis, np.newaxis]
    np.copyto(found, nothing[..., np.newaxis], where=filling, casting="same_kind")
    return _side_by_side(out, call.query_starts), found


def _side_by_side(packed: AnyArray, starts: AnyArray) -> AnyArray:
    """Return (T, H, ...) as (B, H, L, ...)."""
    return spread(packed, starts).swapaxes(1, 2)


def _one_after_the_other(padded: AnyArray, starts: AnyArray) -> AnyArray:
    """Return (B, H, L, ...) as (T, H, ...)."""
    found = np.empty((int(starts[-1]), padded.shape[1], *padded.shape[3:]), padded.dtype)
    for b, count in enumerate(np.diff(starts).tolist()):
        found[starts[b] : starts[b + 1]] = padded[b, :, :count].swapaxes(0, 1)
    return found

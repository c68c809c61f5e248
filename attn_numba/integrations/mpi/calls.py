"""The calls that all ranks make together."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_numba import problem as problems
from attn_numba.api import cpu_engine, ranked
from attn_numba.integrations.mpi.agreement import agree
from attn_numba.integrations.mpi.backward import gradients_together
from attn_numba.integrations.mpi.gathered import attention_of_gathered
from attn_numba.integrations.mpi.local_call import RING, checked, exchange_of, facts_of, require_shard
from attn_numba.integrations.mpi.ring import Ring, on_ring
from attn_numba.integrations.mpi.shard import Shard
from attn_numba.problem import Problem
from attn_numba.rules.arguments import check_lse
from attn_numba.rules.data import AnyArray
from attn_numba.rules.results import Gradients, result_of

__all__ = ["attention", "attention_vjp"]


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    shard: Shard,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    exchange: str = "auto",
    out: Any = None,
    return_lse: bool = False,
) -> Any:
    """Return the attention of this rank's queries over the keys and values of all ranks. All ranks call it together.

    Parameters
    ----------
    q : array (B, H, tokens, D)
        Queries of this rank's tokens, in the order of ``shard.positions``; in host memory. Dtypes and missing leading
        axes as for `attn_numba.attention`.
    k : array (B, Hk, tokens, D)
        Keys of this rank's tokens.
    v : array (B, Hk, tokens, E)
        Values of this rank's tokens.
    shard : Shard
        Which tokens of the sequence these are.
    mask : mask rule or bool array that broadcasts to (B, H, n_tokens, n_tokens), optional
        Which keys a query may attend to. Its arrays, and those of all rules, are of the whole sequence, the same on
        every rank.
    modifiers : modifier or sequence of modifiers, optional
        Applied to the scores in this order.
    score : Dot, Cosine, Bilinear or Additive, optional
        Score of a query and a key; without it, `Dot`.
    normalizer : Softmax, Sparsemax, Entmax15 or DoubleSoftmax, optional
        Makes weights of the scores of a row; without it, `Softmax`, which may hold a sink. The others want all keys of
        a row at once, and so "allgather".
    scale : float, optional
        Factor of the scores; without it ``1 / sqrt(D)`` for `Dot` and 1 for the others.
    query_offset, key_offset : int or int array (B,), optional
        Position of token 0 of the sequence as a query and as a key. A `query_offset` of None is `key_offset`.
    dropout : Dropout, optional
        Zeroes weights at random, after the normalizer: the same ones as on one machine.
    exchange : {"auto", "ring", "allgather"}
        "ring": blocks of keys and values go round the ranks while these compute; a rank holds two blocks beside its
        own. What a mask hides from all is not sent. "allgather": every rank gets all keys and values first, and results
        are the same bits as on one machine. "auto": the latter where keys and values of the whole sequence take 16 MiB
        or less.
    out : array (B, H, tokens, E), optional
        Where to write the result; must not overlap an input.
    return_lse : bool
        Whether to return the lse too, which gradients can start from.

    Returns
    -------
    out : array (B, H, tokens, E)
        Of this rank's queries, in the dtype and rank of `q`. With `return_lse` a named tuple of (out, lse):
    lse : array (B, H, tokens)
        As `attn_numba.attention` returns it.

    Raises
    ------
    TypeError
        On every rank, as all that follows, if on one: for arguments of the wrong kind, and arrays on a GPU.
    ValueError
        For shapes and values that do not fit, and for arguments that differ between ranks.
    NotImplementedError
        For a normalizer that cannot be computed in parts, where it would have to be; for a rule of one's own that reads
        rows; if numba is not installed.

    See Also
    --------
    attn_numba.attention : The same on one machine, which says what is computed.

    Notes
    -----
    On a ring each rank's rows are averaged over blocks by their lse, as `attn_numba.merge` does, in an order that
    depends on the layout and the number of ranks alone; the lse is kept in float64 meanwhile.

    A rank uses as many threads as any call made there would: on one machine, set ``OMP_NUM_THREADS`` to its cores over
    its ranks.

    References
    ----------
    H. Liu, M. Zaharia and P. Abbeel (2023), "Ring attention with blockwise transformers for near-infinite context".
    The order of tokens in a zigzag is that of Z. Zhu's ring-flash-attention (2024).

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> shard = an.mpi.Shard(3)
    >>> q = k = np.zeros((3, 4))
    >>> v = np.array([[1.0], [2.0], [6.0]])
    >>> an.mpi.attention(*map(shard.take, (q, k, v)), shard=shard, mask=an.Causal(), exchange="ring").ravel()
    array([1. , 1.5, 3. ])
    """
    rules = {
        "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
        "query_offset": query_offset, "key_offset": key_offset, "dropout": dropout,
    }  # fmt: skip
    require_shard(shard)

    def prepare() -> tuple[tuple[Problem, Problem, AnyArray, Ring | None], dict[str, Any]]:
        own, whole = checked(shard, q, k, v, rules)
        check_lse(return_lse, whole.normalizer)
        target = _target(out, own)
        found = exchange_of(exchange, whole)
        ring = Ring(shard, cpu_engine().prepared(whole)) if found == RING else None
        return (own, whole, target, ring), facts_of(whole, found, rules) | {"return_lse": bool(return_lse)}

    (own, whole, target, ring), _ = agree(shard.space, prepare)
    lse: AnyArray | None
    if ring is not None:
        lse = on_ring(ring, target).lse
    else:
        lse = np.empty(target.shape[:3], own.accumulator) if return_lse else None
        attention_of_gathered(shard, whole, target, lse)
    result = ranked(target, own.rank) if out is None else out
    if not return_lse:
        return result
    assert lse is not None
    return result_of(result, ranked(lse.astype(own.accumulator, copy=False), own.rank - 1))


def _target(out: Any, own: Problem) -> AnyArray:
    if out is not None:
        return problems.check_out(out, own)
    s = own.sizes
    return np.empty((s.B, s.H, s.M, s.E), own.q.dtype)


def attention_vjp(
    q: Any,
    k: Any,
    v: Any,
    dout: Any,
    *,
    shard: Shard,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: float | None = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    saved: Any = None,
    exchange: str = "auto",
) -> Gradients:
    """Return the gradients of the sum over all ranks of ``dout * attention(q, k, v)``. All ranks call it together.

    Parameters
    ----------
    q : array (B, H, tokens, D)
        Queries of this rank's tokens.
    k : array (B, Hk, tokens, D)
        Keys of this rank's tokens.
    v : array (B, Hk, tokens, E)
        Values of this rank's tokens.
    dout : array (B, H, tokens, E)
        Gradient by this rank's output, in its shape and dtype.
    shard : Shard
        Which tokens of the sequence these are.
    mask, modifiers, score, normalizer, scale, query_offset, key_offset, dropout : optional
        The rules, as `attention` takes them. A `CustomModifier` needs its `slope`.
    saved : (out, lse), optional
        What `attention` returned for the same call with `return_lse`, given on every rank or on none; without it,
        computed again.
    exchange : {"auto", "ring", "allgather"}
        As for `attention`. On a ring, gradients by keys and values travel with their blocks.

    Returns
    -------
    Gradients
        ``.q``, ``.k``, ``.v`` of this rank's tokens, in the shapes and dtype of the inputs. ``.of(rule)`` gives those
        by the arrays of a rule, which are whole and the same on every rank: sums over all of them.

    Raises
    ------
    TypeError
        On every rank, as all that follows, if on one: for arguments of the wrong kind.
    ValueError
        For shapes and values that do not fit, a modifier without slope, `saved` of another call, and arguments that
        differ between ranks.
    NotImplementedError
        As `attention` does.

    See Also
    --------
    attn_numba.attention_vjp : The same on one machine.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> shard = an.mpi.Shard(3)
    >>> q = k = np.zeros((3, 4))
    >>> v = np.array([[1.0], [2.0], [6.0]])
    >>> grads = an.mpi.attention_vjp(q, k, v, np.ones((3, 1)), shard=shard, mask=an.Causal(), exchange="ring")
    >>> grads.v.ravel().round(3)
    array([1.833, 0.833, 0.333])
    """
    rules = {
        "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
        "query_offset": query_offset, "key_offset": key_offset, "dropout": dropout,
    }  # fmt: skip
    require_shard(shard)

    return gradients_together(shard, (q, k, v), dout, rules, saved, exchange)

"""One rank's share of a call, checked: what every rank finds out before the ranks compare it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from attn_numba import problem as problems
from attn_numba.api import cpu_engine
from attn_numba.integrations.mpi.agreement import described
from attn_numba.integrations.mpi.shard import Shard
from attn_numba.problem import Problem
from attn_numba.rules import Normalizer, Softmax
from attn_numba.rules.arguments import check_score
from attn_numba.rules.blocks import Block

__all__ = ["ALLGATHER", "EXCHANGES", "RING", "checked", "exchange_of", "facts_of", "require_shard"]

RING, ALLGATHER = "ring", "allgather"
EXCHANGES = ("auto", RING, ALLGATHER)
GATHERED_BYTES = 2**24  # of keys and values of the whole sequence, up to which every rank may well have them all


def require_shard(shard: Any) -> Shard:
    """Return what is known to be a shard.

    Raises
    ------
    TypeError
        If it is none.
    """
    if not isinstance(shard, Shard):
        raise TypeError(f"shard is {type(shard).__name__}; needed an attn_numba.mpi.Shard")
    return shard


def checked(shard: Shard, q: Any, k: Any, v: Any, rules: Mapping[str, Any]) -> tuple[Problem, Problem]:
    """Return a call with the arrays of this rank: with its own sizes, and with those of the whole sequence.

    Raises
    ------
    TypeError, ValueError
        As `attn_numba.attention` does for the whole sequence, and for arrays that do not hold this rank's tokens.
    NotImplementedError
        If a rule cannot be cut into parts, or numba is not installed.
    """
    cpu_engine()
    for name, x in (("q", q), ("k", k), ("v", v)):
        if problems.is_device_array(x):
            raise TypeError(f"{name} is on a GPU; needed an array in host memory: ranks compute on the CPU")
    relation = check_score(rules["score"])
    q4, k4, v4, sizes, rank = problems.check_arrays(q, k, v, relation)
    n, total = len(shard.positions), shard.n_tokens
    for name, count in (("q", sizes.M), ("k", sizes.N)):
        if count != n:
            raise ValueError(f"{name} has {count} rows; this rank holds {n} of the {total} tokens of the shard")
    fake = (problems.nothing((*x.shape[:2], total, x.shape[3]), x.dtype) for x in (q4, k4, v4))
    whole = problems.check(*fake, **rules)._replace(q=q4, k=k4, v=v4, rank=rank)
    whole.in_block(Block.of_rows((0, 0), (0, 0), whole.sizes))  # raises what cannot be cut
    return whole._replace(sizes=sizes), whole


def exchange_of(exchange: Any, whole: Problem) -> str:
    """Return how keys and values come to the ranks, "auto" decided.

    Raises
    ------
    ValueError
        If it is none of the three.
    NotImplementedError
        If the normalizer needs a row as a whole and a ring is asked for, or "auto" and all keys are too many.
    """
    if exchange not in EXCHANGES:
        raise ValueError(f"exchange is {exchange!r}; needed {', '.join(map(repr, EXCHANGES))}")
    s = whole.sizes
    key_size = whole.k.shape[-1]
    size = s.B * s.Hk * s.N * (key_size + s.E) * whole.k.itemsize
    found = (ALLGATHER if size <= GATHERED_BYTES else RING) if exchange == "auto" else exchange
    if found == RING and not isinstance(whole.normalizer, Softmax):
        raise _no_ring(whole.normalizer, size)
    return str(found)


def _no_ring(normalizer: Normalizer, size: int) -> NotImplementedError:
    return NotImplementedError(
        f"normalizer is {type(normalizer).__name__}, which needs all scores of a row at once, and on a ring they come "
        f"in parts; needed Softmax(), or exchange='{ALLGATHER}', which takes {size / 2**20:.0f} MiB on every rank for "
        "keys and values"
    )


def facts_of(whole: Problem, exchange: Any, rules: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be the same on every rank."""
    facts = {name: described(rules[name]) for name in ("mask", "modifiers", "score", "normalizer", "dropout")}
    facts |= {"query_offset": described(np.asarray(whole.query_offset)), "scale": whole.scale, "exchange": exchange}
    facts |= {"key_offset": described(np.asarray(whole.key_offset)), "dtype of q, k, v": whole.dtype}
    return {"sizes of the call": tuple(whole.sizes), "head size of k": whole.k.shape[-1], **facts}

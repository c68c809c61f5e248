"""Attention forward, dense: the specification, to be read from top to bottom.

Letters: `B` sequences, `H` query heads, `Hk` key heads, `M` queries, `N` keys, `D` head size, `E` value size; `b h i
j` index sequences, query heads, queries and keys.

1. ``s = score(q_i, k_j) * scale``; the modifiers in their order; the mask; the normalizer over the allowed keys;
   dropout; ``out_i = sum_j w_ij v_j``. Natural logarithms.
2. A key that is not allowed is *not there*: whatever its score, its K or its V hold, NaN and infinity included, changes
   nothing. So is a key whose final score is minus infinity, and one that a modifier excludes, whatever follows.
3. A query with no allowed key gets output 0, weights 0 and ``lse`` minus infinity; with a sink, ``lse`` is the sink.
4. A NaN or infinity in an allowed place makes the rows that see it NaN or infinite (in V: only its own column of them).
5. Row i of q is at position ``query_offset + i``, row j of k at ``key_offset + j``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from attn_numba.reference.normalizers import normalized, softmax
from attn_numba.rules import (
    Dropout,
    Mask,
    Modifier,
    Normalizer,
    Places,
    Score,
    Sizes,
    as_mask,
    as_modifiers,
    places_of,
)
from attn_numba.rules.arguments import (
    ACCUMULATORS,
    ANY_DTYPE,
    check_dtypes,
    check_lse,
    check_normalizer,
    check_offsets,
    check_parts,
    check_scale,
    check_score,
    instance,
    sizes_of,
)
from attn_numba.rules.results import Merged, result_of


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
    dropout: Dropout | None = None,
    compute_dtype: Any = None,
    return_lse: bool = False,
    return_weights: bool = False,
) -> Any:
    """Return the attention of queries over keys and values.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries. Missing leading axes count as 1.
    k : array (B, Hk, N, D)
        Keys; `H` is a multiple of `Hk`, and query head h reads key head ``h // (H // Hk)``.
    v : array (B, Hk, N, E)
        Values.
    mask : mask rule or bool array (B, H, M, N), optional
        Which keys a query may attend to; without it, all.
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
    compute_dtype : dtype or str, optional
        Precision to compute in, to see what it loses; float64 if not given. With float16 and bfloat16 the inputs and,
        before they meet V, the weights are rounded to it, and sums are in float32.
    return_lse, return_weights : bool
        What to return beside the output.

    Returns
    -------
    out : array (B, H, M, E)
        In the dtype and rank of `q`.
    lse : array (B, H, M)
        ``log sum_j exp(s_ij)`` over the allowed keys and the sink; float64 for float64 inputs, else float32.
        Of `Softmax` only.
    weights : array (B, H, M, N)
        Before dropout; in the dtype of `lse`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind.
    ValueError
        If shapes do not fit, the scale is NaN, a rule uses positions and the query offset is unclear, or `return_lse`
        is asked of another normalizer than `Softmax`.

    Notes
    -----
    ``w_ij = exp(s_ij - lse_i)``, or as the normalizer says, and ``out_i = sum_j w_ij v_j``, both over the allowed keys
    of row i.

    References
    ----------
    A. Vaswani et al. (2017), "Attention is all you need", section 3.2.

    Examples
    --------
    >>> import numpy as np
    >>> from attn_numba.rules import Causal
    >>> q = k = np.zeros((3, 4))
    >>> v = np.array([[1.0], [2.0], [6.0]])
    >>> attention(q, k, v, mask=Causal()).ravel()
    array([1. , 1.5, 3. ])
    """
    call = checked(
        q, k, v, mask=mask, modifiers=modifiers, score=score, normalizer=normalizer, scale=scale,
        query_offset=query_offset, key_offset=key_offset, dropout=dropout, compute_dtype=compute_dtype,
    )  # fmt: skip
    check_lse(return_lse, call.normalizer)
    found = computed(call)
    with np.errstate(all="ignore"):  # excluded places may hold anything
        out = weighted_sum(call.precision.rounded(found.used), found.values, found.allowed)
    lead, accumulator = call.q.shape[:-1], ACCUMULATORS[call.q.dtype.name]
    return result_of(
        out.reshape(*lead, call.sizes.E).astype(call.q.dtype),
        found.lse.reshape(lead).astype(accumulator) if return_lse else None,
        found.weights.reshape(*lead, call.sizes.N).astype(accumulator) if return_weights else None,
    )


class Call(NamedTuple):
    """A call whose arguments fit together."""

    q: np.ndarray  # as they were given, k and v too
    k: np.ndarray
    v: np.ndarray
    sizes: Sizes
    places: Places
    mask: Mask | None
    modifiers: tuple[Modifier, ...]
    score: Score
    normalizer: Normalizer
    scale: float
    dropout: Dropout | None
    precision: Precision


class Steps(NamedTuple):
    """What is computed on the way to the output, for each query head."""

    queries: np.ndarray  # (B, H, M, D) and (B, Hk, N, D): rounded, not yet mapped by the score
    keys: np.ndarray
    mapped_queries: np.ndarray  # (B, H, M, D) and (B, H, N, D)
    mapped_keys: np.ndarray
    values: np.ndarray  # (B, H, N, E)
    scores: tuple[np.ndarray, ...]  # (B, H, M, N): what each modifier was given, then what the normalizer was given
    allowed: np.ndarray  # (B, H, M, N), bool
    weights: np.ndarray  # (B, H, M, N)
    lse: Any  # (B, H, M), or None
    kept: np.ndarray | None  # (B, H, M, N), bool; None without dropout
    used: np.ndarray  # (B, H, M, N): weights after dropout


def checked(
    q: Any,
    k: Any,
    v: Any,
    *,
    mask: Any = None,
    modifiers: Any = (),
    score: Any = None,
    normalizer: Any = None,
    scale: Any = None,
    query_offset: Any = None,
    key_offset: Any = 0,
    dropout: Any = None,
    compute_dtype: Any = None,
) -> Call:
    """Return a call whose arguments were checked; they are those of `attention`, as are the errors."""
    q, k, v = np.asarray(q), np.asarray(k), np.asarray(v)
    check_dtypes(q.dtype.name, k.dtype.name, v.dtype.name)
    score = check_score(score)
    sizes = sizes_of(q.shape, k.shape, v.shape, score)
    mask, modifiers = as_mask(mask), as_modifiers(modifiers)
    normalizer = check_normalizer(normalizer, modifiers)
    normalizer.check(sizes)
    if dropout is not None:
        dropout = instance(dropout, Dropout, "dropout", "Dropout(rate, seed)")
    scale = check_scale(scale, score.default_scale(sizes.D))
    rules = [rule for rule in (mask, *modifiers) if rule is not None]
    users = rules if dropout is None else [*rules, dropout]
    query_offset, key_offset = check_offsets(query_offset, key_offset, sizes, users)
    for rule in rules:
        rule.check(sizes, query_offset, key_offset)
    places = places_of(sizes, query_offset, key_offset)
    precision = Precision.of(compute_dtype)
    return Call(q, k, v, sizes, places, mask, modifiers, score, normalizer, scale, dropout, precision)


def computed(call: Call) -> Steps:
    """Return all that is computed before the weights meet the values."""
    sizes, places, precision = call.sizes, call.places, call.precision
    # Arrays with all four axes.
    queries = precision.inputs(call.q).reshape(sizes.B, sizes.H, sizes.M, sizes.D)
    keys = precision.inputs(call.k).reshape(sizes.B, sizes.Hk, sizes.N, call.k.shape[-1])
    values = precision.inputs(call.v).reshape(sizes.B, sizes.Hk, sizes.N, sizes.E)

    with np.errstate(all="ignore"):  # excluded places may hold anything
        mapped_queries, mapped_keys = call.score.mapped(queries, keys)
        shared = sizes.H // sizes.Hk  # query heads that read one key head: as many copies of it
        mapped_keys, values = mapped_keys.repeat(shared, axis=1), values.repeat(shared, axis=1)

        s = call.score.between(mapped_queries, mapped_keys) * precision.number(call.scale)
        scores = [s]
        allowed = np.ones(s.shape, np.bool_)
        for modifier in call.modifiers:
            s = modifier.evaluate(s, places, sizes)
            scores.append(s)
            excluded = modifier.excluded(places, sizes)
            if excluded is not None:
                allowed &= ~excluded
        if call.mask is not None:
            allowed &= call.mask.evaluate(places, sizes)
        allowed &= s != -np.inf

        weights, lse = normalized(call.normalizer, s, allowed, sizes)
        kept, used = None, weights
        if call.dropout is not None:
            kept = call.dropout.kept(places, sizes)
            used = np.where(kept, weights / precision.number(1 - call.dropout.rate), precision.number(0))
    return Steps(
        queries, keys, mapped_queries, mapped_keys, values, tuple(scores), allowed, weights, lse, kept, used
    )  # fmt: skip


def weighted_sum(weights: np.ndarray, values: np.ndarray, allowed: np.ndarray) -> np.ndarray:
    """Return ``sum_j w_ij v_j`` over the allowed keys only: 0 times an excluded NaN is not part of it."""
    finite = np.isfinite(values)
    out = weights @ np.where(finite, values, 0)
    others = np.where(finite, 0, values)
    for j in np.flatnonzero(~finite.all(axis=(0, 1, 3))):
        out += np.where(allowed[..., j, None], weights[..., j, None] * others[:, :, None, j], 0)
    return out


def merge(outs: Sequence[Any], lses: Sequence[Any], sink: Any = None) -> Merged:
    """Return the whole of partial results over disjoint sets of keys.

    Parameters
    ----------
    outs : sequence of arrays (B, H, M, E)
        Outputs of the parts, computed with the positions of the whole and without a sink.
    lses : sequence of arrays (B, H, M)
        Their ``lse``; minus infinity where a part has no key for a query.
    sink : float or array, broadcasts to (B, H), optional
        The sink of the whole.

    Returns
    -------
    out : array (B, H, M, E)
        In the dtype of the parts.
    lse : array (B, H, M)
        In the dtype of the parts.

    Raises
    ------
    TypeError
        If the parts are not arrays of one dtype.
    ValueError
        If there is no part, shapes do not fit, or the sink holds NaN.

    Notes
    -----
    ``lse = log sum_p exp(lse_p)`` and ``out = sum_p exp(lse_p - lse) out_p``.

    References
    ----------
    T. Dao et al. (2023), "Flash-Decoding for long-context inference".

    Examples
    --------
    >>> import numpy as np
    >>> out, lse = merge([np.array([[1.0]]), np.array([[3.0]])], [np.zeros(1), np.zeros(1)])
    >>> out, lse.round(4)
    (array([[2.]]), array([0.6931]))
    """
    outs, lses, extra = check_parts(outs, lses, sink)
    *lead, rows, value_size = (1,) * (4 - outs[0].ndim) + outs[0].shape
    parts = np.stack(lses).astype(np.float64).reshape(len(lses), *lead, rows, 1)
    partial = np.stack(outs).astype(np.float64).reshape(len(outs), *lead, rows, value_size)
    if extra is not None:
        parts = np.concatenate([parts, np.broadcast_to(extra[None, :, :, None, None], (1, *parts.shape[1:]))])
        partial = np.concatenate([partial, np.zeros((1, *partial.shape[1:]))])
    with np.errstate(all="ignore"):
        weights, lse = softmax(np.moveaxis(parts, 0, -1), np.moveaxis(parts, 0, -1) != -np.inf)
        weights = np.moveaxis(weights, -1, 0)
        out = np.where(parts != -np.inf, weights * partial, 0).sum(axis=0)
    return Merged(out.reshape(outs[0].shape).astype(outs[0].dtype), lse.reshape(lses[0].shape).astype(lses[0].dtype))


# --- arguments ---


class Precision(NamedTuple):
    """The precision to compute in: of inputs and weights, and of everything else."""

    name: str
    accumulator: Any

    @classmethod
    def of(cls, dtype: Any) -> Precision:
        name = "float64" if dtype is None else dtype if isinstance(dtype, str) else np.dtype(dtype).name
        if name not in ACCUMULATORS:
            raise TypeError(f"compute_dtype is {name}; needed {ANY_DTYPE}")
        return cls(name, ACCUMULATORS[name].type)

    def inputs(self, x: np.ndarray) -> np.ndarray:
        return self.rounded(x.astype(self.accumulator))

    def number(self, x: float) -> Any:
        return self.accumulator(x)

    def rounded(self, x: np.ndarray) -> np.ndarray:
        if self.name == "float16":
            return x.astype(np.float16).astype(np.float32)
        return _rounded_to_bfloat16(x) if self.name == "bfloat16" else x


def _rounded_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """Return float32 numbers with the 8 significant bits of bfloat16, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(x), x, rounded)

"""What attends in a sequence model: tokens to each other or to a context, and learned queries to all tokens.

Both compute with `attn_numba.attention` and `attn_numba.attention_vjp`, and train the arrays of their rules: the
weights of a score, and the span that each query chooses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from attn_numba.api import attention, attention_vjp
from attn_numba.learning.layers import Array, rows
from attn_numba.projections import in_heads, side_by_side
from attn_numba.rules import (
    AdaptiveSpan,
    Additive,
    Bilinear,
    Cosine,
    Dot,
    DoubleSoftmax,
    Entmax15,
    Softmax,
    Sparsemax,
    adapt,
)

__all__ = ["NORMALIZERS", "SCORES", "Attention", "Pooling", "Rules"]

SCORES = ("dot", "cosine", "bilinear", "additive", "uniform")
NORMALIZERS = {"softmax": Softmax, "sparsemax": Sparsemax, "entmax15": Entmax15, "double_softmax": DoubleSoftmax}


@dataclass(frozen=True)
class Rules:
    """How tokens attend.

    Parameters
    ----------
    heads : int
        Number of heads.
    score : {"dot", "cosine", "bilinear", "additive", "uniform"}
        Of a query and a key; "uniform" gives all keys the same and has neither.
    normalizer : {"softmax", "sparsemax", "entmax15", "double_softmax"}
        Makes weights of scores.
    temperature : float
        What scores are divided by, above 0.
    largest_span : float, optional
        With it, each head and query chooses how many keys it sees to both sides, up to so many positions.
    ramp : float
        Positions over which the weight falls to 0 beyond the span.
    """

    heads: int
    score: str = "dot"
    normalizer: str = "softmax"
    temperature: float = 1.0
    largest_span: float | None = None
    ramp: float = 4.0

    @property
    def adaptive(self) -> bool:
        """Whether queries choose how far they see."""
        return self.largest_span is not None


class Kept(NamedTuple):
    """What a call keeps for its gradient: arrays and the very rules that attention was given."""

    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array | None
    rules: dict[str, Any]
    weights: Array | None


class _Scored:
    """What attends: the weights of its score, the call of attention and its gradient."""

    def __init__(
        self, rules: Rules, query_size: int, key_size: int, dtype: Any, generator: np.random.Generator
    ) -> None:
        self.rules, self.dtype = rules, np.dtype(dtype)
        self.score_parameters = _score_parameters(rules, query_size, key_size, self.dtype, generator)
        by_default = query_size**-0.5 if rules.score == "dot" else 1.0
        self.scale = by_default / rules.temperature

    def _attend(self, q: Array, k: Array, v: Array, mask: Any, span: Any, weights: bool) -> Kept:
        p = self.score_parameters
        score: Any = {"cosine": Cosine, "bilinear": Bilinear, "additive": Additive}.get(self.rules.score, Dot)(**p)
        rules = {
            "mask": mask, "modifiers": () if span is None else (AdaptiveSpan(span, self.rules.ramp),), "score": score,
            "normalizer": NORMALIZERS[self.rules.normalizer](), "scale": self.scale, "query_offset": 0,
        }  # fmt: skip
        streams = self.rules.normalizer == "softmax"
        found = attention(q, k, v, return_lse=streams, return_weights=weights, **rules)
        out, lse = (found.out if streams or weights else found), (found.lse if streams else None)
        return Kept(q, k, v, out, lse, rules, found.weights if weights else None)

    def _pulled(self, dout: Array, kept: Kept) -> tuple[Any, dict[str, Array]]:
        """Return the gradients of a call, and those by the weights of the score under their names."""
        pair = None if kept.lse is None else (kept.out, kept.lse)
        inner = attention_vjp(kept.q, kept.k, kept.v, dout, saved=pair, **kept.rules)
        if not self.score_parameters:
            return inner, {}
        found = inner.of(kept.rules["score"])
        arrays = (found,) if len(self.score_parameters) == 1 else found
        return inner, {
            name: array.astype(self.dtype) for name, array in zip(self.score_parameters, arrays, strict=True)
        }


class Attention(_Scored):
    """Let states attend to each other, or to a context, by several heads.

    Parameters
    ----------
    size : int
        C, of the states that come in and go out; a multiple of the heads.
    rules : Rules
        How they attend.
    dtype : dtype
        Of the parameters: float32 or float64.
    generator : numpy.random.Generator
        Draws the parameters.
    context_size : int, optional
        Size of the states of a context, of which keys and values are made instead.
    gain : float
        How large the result starts, as a mean square.

    Attributes
    ----------
    parameters : dict of str to array
        ``query (C, C)``, ``key_value (context_size, 2 C)``, ``output (C, C)``; of the score "uniform" no query, and
        ``value (context_size, C)``; ``W``, or ``Wq``, ``Wk`` and ``w`` of the score; ``span_weight (H, C)`` and
        ``span_bias (H,)`` of an adaptive window.
    """

    def __init__(
        self, size: int, rules: Rules, dtype: Any, generator: np.random.Generator, context_size: int | None = None,
        gain: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(rules, size // rules.heads, size // rules.heads, dtype, generator)
        source = size if context_size is None else context_size

        def matrix(inputs: int, outputs: int, share: float = 1.0) -> Array:
            return (generator.standard_normal((inputs, outputs)) * (share / inputs) ** 0.5).astype(dtype)

        if rules.score == "uniform":
            self.parameters = {"value": matrix(source, size)}
        else:
            self.parameters = {"query": matrix(size, size), "key_value": matrix(source, 2 * size)}
        self.parameters |= {"output": matrix(size, size, gain)} | self.score_parameters
        if rules.largest_span is not None:
            self.parameters |= {
                "span_weight": np.zeros((rules.heads, size), dtype),
                "span_bias": np.zeros(rules.heads, dtype),
            }

    def forward(
        self, states: Array, mask: Any = None, context: Array | None = None, weights: bool = False
    ) -> tuple[Array, tuple[Any, ...]]:
        """Return what states get from those they attend to, and what `vjp` needs.

        Parameters
        ----------
        states : array (B, M, C)
            Of which queries are made, and without a context keys and values.
        mask : mask, optional
            Which keys a query may attend to.
        context : array (B, N, context_size), optional
            Of which keys and values are made instead.
        weights : bool
            Whether to keep them in ``saved[0].weights``, (B, H, M, N).

        Returns
        -------
        array (B, M, C)
            The result.
        tuple
            What `vjp` takes; ``saved[0]`` holds what attention got, ``saved[1]`` the span of each query, (B, H, M), or
            None.
        """
        p, source = self.parameters, states if context is None else context
        q, k, v = self._projected(states, source)
        span = None
        if self.rules.largest_span is not None:
            span = adapt(states, p["span_weight"], p["span_bias"], largest=self.rules.largest_span)
        kept = self._attend(q, k, v, mask, span, weights)
        merged = side_by_side(kept.out)
        out = (rows(merged) @ p["output"]).reshape(states.shape)
        return out, (kept, span, states, context, merged)

    def vjp(
        self, dout: Array, saved: tuple[Any, ...], dspan: Array | None = None
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        """Return the gradients of a call.

        Parameters
        ----------
        dout : array (B, M, C)
            Gradient by the result.
        saved : tuple
            What `forward` returned.
        dspan : array that broadcasts to (B, H, M), optional
            Gradient of another part of the loss by the span of each query.

        Returns
        -------
        dstates : array (B, M, C)
            Gradient by the states.
        dcontext : array (B, N, context_size) or None
            Gradient by the context; None without one.
        gradients : dict of str to array
            Those by the parameters.
        """
        kept, span, states, context, merged = saved
        p, source, flat = self.parameters, states if context is None else context, rows(dout)
        found = {"output": rows(merged).T @ flat}
        dheads = in_heads((flat @ p["output"].T).reshape(merged.shape), self.rules.heads)
        inner, of_score = self._pulled(dheads, kept)
        found |= of_score
        if self.rules.score == "uniform":
            dstates, dprojected, name = np.zeros_like(states), side_by_side(inner.v), "value"
        else:
            dq = rows(side_by_side(inner.q))
            found["query"] = rows(states).T @ dq
            dstates = (dq @ p["query"].T).reshape(states.shape)
            dprojected, name = np.concatenate([side_by_side(inner.k), side_by_side(inner.v)], axis=2), "key_value"
        found[name] = rows(source).T @ rows(dprojected)
        dsource = (rows(dprojected) @ p[name].T).reshape(source.shape)
        if span is not None:
            dspan = inner.of(kept.rules["modifiers"][0]) + (0 if dspan is None else dspan)
            dgate = (dspan * span * (1 - span / self.rules.largest_span)).astype(states.dtype).swapaxes(1, 2)
            found |= {"span_weight": rows(dgate).T @ rows(states), "span_bias": dgate.sum(axis=(0, 1))}
            dstates += (rows(dgate) @ p["span_weight"]).reshape(states.shape)
        if context is None:
            return dstates + dsource, None, found
        return dstates, dsource, found

    def _projected(self, states: Array, source: Array) -> tuple[Array, Array, Array]:
        p, heads = self.parameters, self.rules.heads
        (B, M), N = states.shape[:2], source.shape[1]
        if self.rules.score == "uniform":
            v = in_heads((rows(source) @ p["value"]).reshape(B, N, -1), heads)
            nothing = np.zeros((), self.dtype)  # scores of 0 throughout
            return np.broadcast_to(nothing, (B, heads, M, 1)), np.broadcast_to(nothing, (B, heads, N, 1)), v
        q = in_heads((rows(states) @ p["query"]).reshape(B, M, -1), heads)
        k, v = (rows(source) @ p["key_value"]).reshape(B, N, 2, heads, -1).transpose(2, 0, 3, 1, 4)
        return q, k, v


class Pooling(_Scored):
    """Make one state of all tokens of a sequence: each head has a query of its own, and takes its share of the states.

    The keys are the whole states, the values of head h their numbers ``h C / H`` to ``(h + 1) C / H``. With the score
    "uniform" it is their mean.

    Parameters
    ----------
    size : int
        C, a multiple of the heads.
    rules : Rules
        How the queries attend; windows do not concern them. A query is learned, so the score "bilinear" is that of
        dot products.
    dtype : dtype
        Of the parameters: float32 or float64.
    generator : numpy.random.Generator
        Draws the parameters.

    Attributes
    ----------
    parameters : dict of str to array
        ``query (H, C)``, none of the score "uniform"; and ``Wq``, ``Wk`` and ``w`` of "additive".

    References
    ----------
    Z. Yang et al. (2016), "Hierarchical attention networks for document classification", section 2.2.
    """

    def __init__(self, size: int, rules: Rules, dtype: Any, generator: np.random.Generator) -> None:
        if rules.score == "bilinear":
            rules = Rules(rules.heads, "dot", rules.normalizer, rules.temperature)
        super().__init__(rules, size, size, dtype, generator)
        self.parameters: dict[str, Array] = {}
        if rules.score != "uniform":
            self.parameters["query"] = generator.standard_normal((rules.heads, size)).astype(dtype)
        self.parameters |= self.score_parameters

    def forward(self, states: Array, mask: Any = None, weights: bool = False) -> tuple[Array, Kept]:
        """Return the pooled states (B, C) of states (B, L, C), and what `vjp` needs."""
        (B, L, C), H = states.shape, self.rules.heads
        if self.rules.score == "uniform":
            q, k = (np.broadcast_to(np.zeros((), self.dtype), (B, H, count, 1)) for count in (1, L))
        else:
            q = np.broadcast_to(self.parameters["query"][:, None], (B, H, 1, C))
            k = np.broadcast_to(states[:, None], (B, H, L, C))
        kept = self._attend(q, k, in_heads(states, H), mask, None, weights)
        return kept.out.reshape(B, C), kept

    def vjp(self, dout: Array, kept: Kept) -> tuple[Array, dict[str, Array]]:
        """Return the gradients by the states and by the parameters."""
        inner, found = self._pulled(dout.reshape(kept.out.shape), kept)
        dstates = side_by_side(inner.v)
        if self.rules.score != "uniform":
            found["query"] = inner.q.sum(axis=(0, 2))
            dstates = dstates + inner.k.sum(axis=1)
        return dstates, found


def _score_parameters(
    rules: Rules, query_size: int, key_size: int, dtype: Any, generator: np.random.Generator
) -> dict[str, Array]:
    """Return the arrays that the score of some heads is made with, to be trained, under the names of its arguments."""
    H, units = rules.heads, key_size
    if rules.score == "bilinear":  # starts as the dot product that it generalizes
        return {"W": np.tile(np.eye(query_size, key_size) * query_size**-0.5, (H, 1, 1)).astype(dtype)}
    if rules.score == "additive":
        return {
            "Wq": (generator.standard_normal((H, units, query_size)) * query_size**-0.5).astype(dtype),
            "Wk": (generator.standard_normal((H, units, key_size)) * key_size**-0.5).astype(dtype),
            "w": (generator.standard_normal((H, units)) * units**-0.5).astype(dtype),
        }
    return {}

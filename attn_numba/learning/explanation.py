"""What a trained network attends to, and what it costs: read off its calls."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attn_numba.learning.cost import Cost, multiply_adds
from attn_numba.learning.layers import Array
from attn_numba.learning.network import Batch, Network
from attn_numba.learning.sequences import Ragged
from attn_numba.learning.training import outputs_of

__all__ = ["Explanation", "cost_of", "explain"]


TOKENS = 1024  # of a batch: the weights of few sequences are held twice


class Explanation(NamedTuple):
    """What a network attends to in sequences; L is the length of the longest.

    Parameters
    ----------
    layers : list of array (n, H, L, L)
        Weights of each block, 0 to 1; 0 beyond the length of a sequence.
    pooling : array (n, H, L)
        Weights with which tokens make one state, 0 to 1.
    lengths : int array (n,)
        Tokens of each sequence.
    spans : list of array (n, H, L)
        Of an adaptive window, how far each token sees in each block, in positions; 0 beyond the length. Else empty.
    mean_span : float or None
        Their mean over blocks, heads and tokens, in positions; None without an adaptive window.
    """

    layers: list[Array]
    pooling: Array
    lengths: Array
    spans: list[Array]
    mean_span: float | None


def explain(network: Network, sequences: Ragged) -> Explanation:
    """Return what a network attends to in sequences.

    Parameters
    ----------
    network : Network
        The model.
    sequences : Ragged
        n sequences, as the network takes them. The weights are ``n H L**2`` numbers for each block.

    Returns
    -------
    Explanation
        The weights, and the spans of an adaptive window.
    """
    n, L = len(sequences), int(sequences.lengths.max(initial=1))
    rules, layers = network.design.rules, network.design.layers
    weights = [np.zeros((n, rules.heads, L, L), network.dtype) for _ in range(layers)]
    spans = [np.zeros((n, rules.heads, L), network.dtype) for _ in range(layers if rules.adaptive else 0)]
    pooling = np.zeros((n, rules.heads, L), network.dtype)
    for group in sequences.buckets(TOKENS):
        batch = sequences.batch(group)
        _, kept = network.forward(batch, weights=True)
        of_blocks, of_pooling = network.attended(kept)
        M = batch.tokens.shape[1]
        real = (np.arange(M) < batch.lengths[:, None])[:, None]
        for place, found in zip(weights, of_blocks, strict=True):
            place[group, :, :M, :M] = found * real[..., None]
        for place, span in zip(spans, network.spans(kept), strict=True):
            place[group, :, :M] = span * real
        pooling[group, :, :M] = of_pooling
    count = float(sequences.lengths.sum()) * rules.heads * len(spans)
    mean = sum(float(span.sum(dtype=np.float64)) for span in spans) / count if count else None
    return Explanation(weights, pooling, sequences.lengths, spans, mean)


def cost_of(network: Network, sequences: Ragged) -> Cost:
    """Return what a network costs for sequences.

    Parameters
    ----------
    network : Network
        The model.
    sequences : Ragged
        As the network takes them: their lengths count, and with an adaptive window what their tokens choose to see.

    Returns
    -------
    Cost
        The learned numbers, and the products for a sequence in the mean.
    """
    design, pairs = network.design, None
    if design.rules.adaptive and design.layers:
        seen: list[float] = []

        def look(_: Array, batch: Batch, kept: list[Any]) -> None:
            seen.extend(_visible_pairs(span, batch.lengths, design.rules.ramp) for span in network.spans(kept))

        outputs_of(network, sequences, look)
        pairs = sum(seen) / (len(sequences) * design.layers)
    count = sum(array.size for array in network.parameters.values())
    return Cost(count, multiply_adds(design, sequences.lengths, pairs))


def _visible_pairs(spans: Array, lengths: Array, ramp: float) -> float:
    """Return how many keys all queries of some sequences see, in the mean of the heads, with spans (B, H, L)."""
    places, last = np.arange(spans.shape[2]), lengths[:, None, None] - 1
    reach = np.ceil(spans.astype(np.float64) + ramp) - 1  # keys less than span and ramp away
    seen = np.minimum(places, reach) + np.minimum(last - places, reach) + 1
    return float((seen * (places <= last)).sum() / spans.shape[1])

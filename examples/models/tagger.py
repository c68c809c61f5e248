"""A model that says something at every token of a sequence, from what came before: one block, and a window."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_numba.learning import Block, Linear, Norm, Rules, cross_entropy, gathered, sinusoids
from attn_numba.rules import Causal, SlidingWindow

Array = NDArray[Any]


class Tagger:
    """The model and its gradient.

    Parameters
    ----------
    inputs, outputs : int
        Sizes of a token and of what is said of it.
    span : int, optional
        Tokens before itself that a token sees; without it, each head and token chooses, up to `largest`.
    largest : float
        Most that can be chosen, in positions.
    ramp : float
        Positions over which the weight falls to 0 beyond what was chosen.
    hidden_size, heads : int
        Of the block.
    seed : int
        Of the initial parameters.
    dtype : str
        float32 or float64.

    Attributes
    ----------
    parameters : dict of str to array
        Of all parts, under their names.
    """

    def __init__(
        self, inputs: int, outputs: int, *, span: int | None = None, largest: float = 64, ramp: float = 4,
        hidden_size: int = 32, heads: int = 2, seed: int = 0, dtype: str = "float32",
    ) -> None:  # fmt: skip
        self.span, self.dtype, self.size = span, np.dtype(dtype), hidden_size
        self.rules = Rules(heads, largest_span=largest if span is None else None, ramp=ramp)
        self.mask: Any = Causal() if span is None else SlidingWindow(span, 0)
        generator = np.random.default_rng(seed)
        self.embedding = Linear(inputs, hidden_size, dtype, generator)
        self.block = Block(hidden_size, self.rules, dtype, generator, gain=0.5)
        self.norm = Norm(hidden_size, dtype)
        self.output = Linear(hidden_size, outputs, dtype, generator, gain=0.0)
        self.parts = {"embedding": self.embedding, "block": self.block, "norm": self.norm, "output": self.output}
        self.parameters = gathered(self.parts)

    def forward(self, tokens: Array, weights: bool = False) -> tuple[Array, tuple[Any, ...]]:
        """Return logits (B, L, outputs) for tokens (B, L, inputs), and what `vjp` needs."""
        hidden, embedded = self.embedding.forward(tokens.astype(self.dtype))
        hidden = hidden + sinusoids(hidden.shape[1], self.size).astype(self.dtype)
        hidden, kept = self.block.forward(hidden, self.mask, weights=weights)
        states, normed = self.norm.forward(hidden)
        logits, last = self.output.forward(states)
        return logits, (embedded, kept, normed, last)

    def vjp(self, dlogits: Array, saved: tuple[Any, ...], dspan: Array | None = None) -> dict[str, Array]:
        """Return the gradients by the parameters, from those by the logits and the spans (B, H, L)."""
        embedded, kept, normed, last = saved
        dstates, of_output = self.output.vjp(dlogits, last)
        dhidden, of_norm = self.norm.vjp(dstates, normed)
        dhidden, _, of_block = self.block.vjp(dhidden, kept, dspan)
        of_embedding = self.embedding.vjp(dhidden, embedded)[1]
        parts = {"embedding": of_embedding, "block": of_block, "norm": of_norm, "output": of_output}
        found = {f"{name}.{key}": array for name, arrays in parts.items() for key, array in arrays.items()}
        return {name: found[name] for name in self.parameters}

    def gradients(self, tokens: Array, targets: Array, penalty: float = 0.0) -> tuple[float, dict[str, Array]]:
        """Return the mean cross-entropy of the tokens that have a target, and its gradient by every parameter.

        Parameters
        ----------
        tokens : array (B, L, inputs)
            Sequences.
        targets : int array (B, L)
            What is to be said; -1 where nothing is.
        penalty : float
            What is added for each position of the mean span, where spans are chosen.
        """
        logits, saved = self.forward(tokens)
        asked = (targets >= 0).reshape(-1)
        shares = asked / max(1, asked.sum())
        flat = logits.reshape(-1, logits.shape[-1])
        loss, dflat = cross_entropy(flat, np.maximum(targets, 0).reshape(-1), shares)
        spans, dspan = self.spans(saved), None
        if penalty and spans is not None:
            loss += penalty * float(spans.mean(dtype=np.float64))
            dspan = np.full(spans.shape, penalty / spans.size)
        return loss, self.vjp(dflat.reshape(logits.shape), saved, dspan)

    def spans(self, saved: tuple[Any, ...]) -> Array | None:
        """Return the span (B, H, L) of each head and token, None where they are not chosen."""
        spans: Array | None = saved[1][1][1]
        return spans

    def visible(self, saved: tuple[Any, ...], shape: tuple[int, int]) -> Array:
        """Return how many keys each head and token sees, its own among them: (B, H, L), for sequences (B, L)."""
        spans, before = self.spans(saved), np.arange(shape[1])
        if spans is None:
            return np.broadcast_to(np.minimum(before, self.span) + 1, (shape[0], self.rules.heads, shape[1]))
        reach = np.ceil(spans.astype(np.float64) + self.rules.ramp) - 1  # keys less than span and ramp away
        return np.minimum(before, reach) + 1

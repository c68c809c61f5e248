"""A character-level transformer in NumPy and its gradient, each step written out; attn_numba computes every attention.

Sizes: `B` sequences, `M` characters of each, `C` numbers of a hidden state, `V` characters of the alphabet.

References
----------
A. Vaswani et al. (2017), "Attention is all you need". B. Zhang and R. Sennrich (2019), "Root mean square layer
normalization". J. Su et al. (2021), "RoFormer" (rotary positions). D. So et al. (2021), "Primer" (the squared ReLU).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import attn_numba as an
from attn_numba.learning import log_sum, normalize, normalize_vjp, rows

Array = NDArray[Any]
Tokens = NDArray[np.int64]

EXPANSION = 4  # how many times larger a state is inside the MLP


@dataclass(frozen=True)
class Config:
    """The sizes of a model: `hidden` is C, `vocabulary` is V, `hidden / heads` is even."""

    vocabulary: int
    hidden: int
    layers: int
    heads: int


class Transformer:
    """A causal language model over characters that knows its gradient.

    Parameters
    ----------
    config : Config
        Sizes.
    seed : int
        Of the initial weights.
    dtype : str
        Of weights and states: float32, or float64 to check gradients.
    backend : str
        Passed to `attn_numba.MultiHeadAttention`.

    Attributes
    ----------
    parameters : dict of str to array
        `embedding (V, C)`; for each layer n `n.attention_norm (C,)`, `n.query.weight`, `n.key.weight`,
        `n.value.weight`, `n.output.weight` (C, C), `n.mlp_norm (C,)`, `n.up (C, 4 C)`, `n.down (4 C, C)`; `norm (C,)`;
        `head (C, V)`. Change them in place: the attention layers hold the same arrays.
    seconds : dict of str to float
        Time in the attention layers so far, projections and rotation included: `forward` and `backward`.
    """

    def __init__(self, config: Config, *, seed: int = 0, dtype: str = "float32", backend: str = "auto") -> None:
        self.config, self.backend = config, backend
        self.seconds = {"forward": 0.0, "backward": 0.0}
        generator = np.random.default_rng(seed)
        C, V = config.hidden, config.vocabulary

        def normal(*shape: int, deviation: float) -> Array:
            return (generator.standard_normal(shape) * deviation).astype(dtype)

        self.parameters: dict[str, Array] = {"embedding": normal(V, C, deviation=1.0)}
        self.attention = []
        quiet = (2 * config.layers) ** -0.5  # so that the sum of all that layers add starts no larger for many
        for n in range(config.layers):
            layer = an.MultiHeadAttention(C, config.heads, rotary="halves", bias=False, dtype=dtype, seed=generator)
            layer.parameters["output.weight"] *= np.dtype(dtype).type(quiet)
            self.attention.append(layer)
            self.parameters[f"{n}.attention_norm"] = np.ones(C, dtype)
            self.parameters |= {f"{n}.{name}": array for name, array in layer.parameters.items()}
            self.parameters[f"{n}.mlp_norm"] = np.ones(C, dtype)
            self.parameters[f"{n}.up"] = normal(C, EXPANSION * C, deviation=C**-0.5)
            self.parameters[f"{n}.down"] = normal(EXPANSION * C, C, deviation=quiet * (EXPANSION * C) ** -0.5)
        self.parameters["norm"] = np.ones(C, dtype)
        self.parameters["head"] = np.zeros((C, V), dtype)  # so that every character starts equally likely

    def load(self, arrays: Mapping[str, Array]) -> None:
        """Take the parameters from arrays of the same names, shapes and dtype; more arrays than these are ignored."""
        for name, array in self.parameters.items():
            if name not in arrays or arrays[name].shape != array.shape or arrays[name].dtype != array.dtype:
                found = "nothing" if name not in arrays else f"{arrays[name].dtype} {arrays[name].shape}"
                raise ValueError(f"{name} is {found}; the model has {array.dtype} {array.shape}: {asdict(self.config)}")
        for name, array in self.parameters.items():
            array[...] = arrays[name]

    def forward(self, tokens: Tokens, kept: list[tuple[Any, ...]] | None = None) -> Array:
        """Return the logits of each character's successor.

        Parameters
        ----------
        tokens : array (B, M)
            Characters.
        kept : list, optional
            Is given what `gradients` needs of each layer, and last of the output.

        Returns
        -------
        array (B, M, V)
            Logits, natural.
        """
        p = self.parameters
        hidden = p["embedding"][tokens]
        for n, layer in enumerate(self.attention):
            normal, size = normalize(hidden)
            states = normal * p[f"{n}.attention_norm"]
            begin = time.perf_counter()
            found = layer(states, mask=an.Causal(), return_saved=kept is not None, backend=self.backend)
            self.seconds["forward"] += time.perf_counter() - begin
            out, saved = found if kept is not None else (found, None)
            hidden = hidden + out
            normal_mlp, size_mlp = normalize(hidden)
            # One product over all rows, (B M, C): NumPy makes B small ones of a product of three axes.
            inner = rows(normal_mlp * p[f"{n}.mlp_norm"]) @ p[f"{n}.up"]
            np.maximum(inner, 0, out=inner)
            hidden = hidden + ((inner * inner) @ p[f"{n}.down"]).reshape(hidden.shape)
            if kept is not None:
                kept.append((normal, size, states, saved, normal_mlp, size_mlp, inner))
        normal, size = normalize(hidden)
        if kept is not None:
            kept.append((normal, size))
        return (rows(normal * p["norm"]) @ p["head"]).reshape(*tokens.shape, -1)

    def gradients(self, tokens: Tokens, following: Tokens) -> tuple[float, dict[str, Array]]:
        """Return the loss and its gradient by every parameter.

        Parameters
        ----------
        tokens, following : array (B, M)
            Characters, and the successor of each.

        Returns
        -------
        loss : float
            Mean cross-entropy, nats per character.
        gradients : dict of str to array
            In the names, shapes and dtype of `parameters`.
        """
        p, kept = self.parameters, []
        logits = self.forward(tokens, kept)
        loss, dlogits = _cross_entropy(rows(logits), following.reshape(-1))
        found: dict[str, Array] = {}
        normal, size = kept.pop()
        found["head"] = rows(normal * p["norm"]).T @ dlogits
        dstates = (dlogits @ p["head"].T).reshape(normal.shape)
        dhidden, found["norm"] = normalize_vjp(dstates, normal, size, p["norm"])
        for n in reversed(range(self.config.layers)):
            normal, size, states, saved, normal_mlp, size_mlp, inner = kept.pop()
            flat = rows(dhidden)
            found[f"{n}.down"] = (inner * inner).T @ flat
            dinner = (flat @ p[f"{n}.down"].T) * inner
            dinner *= 2  # of the square; where the ReLU is 0, so is `inner`
            found[f"{n}.up"] = rows(normal_mlp * p[f"{n}.mlp_norm"]).T @ dinner
            dstates = (dinner @ p[f"{n}.up"].T).reshape(normal.shape)
            added, found[f"{n}.mlp_norm"] = normalize_vjp(dstates, normal_mlp, size_mlp, p[f"{n}.mlp_norm"])
            dhidden = dhidden + added
            begin = time.perf_counter()
            inside = self.attention[n].vjp(states, dhidden, mask=an.Causal(), saved=saved, backend=self.backend)
            self.seconds["backward"] += time.perf_counter() - begin
            found |= {f"{n}.{name}": array for name, array in inside.parameters.items()}
            added, found[f"{n}.attention_norm"] = normalize_vjp(inside.hidden, normal, size, p[f"{n}.attention_norm"])
            dhidden = dhidden + added
        # A character's row is the sum over its places: a product with ones there, in one fixed order.
        places = np.zeros((tokens.size, self.config.vocabulary), dhidden.dtype)
        places[np.arange(tokens.size), tokens.reshape(-1)] = 1
        found["embedding"] = places.T @ rows(dhidden)
        return loss, {name: found[name] for name in p}

    def bits(self, tokens: Tokens, start: int, context: int, batch: int = 16) -> float:
        """Return the mean bits of each of `tokens[start:]`, given at least `context / 2` characters before it.

        Parameters
        ----------
        tokens : array (length,)
            A text.
        start : int
            The first character that counts; at least `context`.
        context, batch : int
            M, and how many windows are computed at a time.
        """
        half = context // 2
        last = np.arange(start - 1 + half, len(tokens) - 1 + half, half)  # window ends; each brings `half` predictions
        total = 0.0
        for first in range(0, len(last), batch):
            ends = np.minimum(last[first : first + batch], len(tokens) - 1)
            fresh = ends - (last[first : first + batch] - half)  # the last window may bring fewer
            places = ends[:, None] - context + np.arange(context)
            logits = self.forward(tokens[places]).astype(np.float64)
            nats = log_sum(logits)[..., 0] - np.take_along_axis(logits, tokens[places + 1][..., None], 2)[..., 0]
            total += float(nats[np.arange(context) >= context - fresh[:, None]].sum())
        return total / np.log(2) / (len(tokens) - start)

    def sample(self, tokens: Tokens, count: int, context: int, seed: int = 0) -> Tokens:
        """Return `count` characters drawn one by one after `tokens` (length,), each seeing at most `context`."""
        generator = np.random.default_rng(seed)
        text = list(tokens)
        for _ in range(count):
            logits = self.forward(np.array([text[-context:]]))[0, -1].astype(np.float64)
            odds = np.exp(logits - logits.max())
            text.append(int(generator.choice(len(odds), p=odds / odds.sum())))
        return np.array(text[len(tokens) :], np.int64)


def _cross_entropy(logits: Array, targets: Tokens) -> tuple[float, Array]:
    """Return the mean cross-entropy (nats) of logits `(rows, V)` with targets `(rows,)`, and its gradient by logits."""
    places = np.arange(len(targets))
    logs = logits - log_sum(logits)
    loss = -float(logs[places, targets].mean(dtype=np.float64))
    gradient = np.exp(logs)
    gradient[places, targets] -= 1
    return loss, gradient / logits.dtype.type(len(targets))

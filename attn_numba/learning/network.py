"""A sequence model and its gradient, written out: embedding, blocks of attention and MLP, pooling, output.

Sizes: `B` sequences, `L` tokens of each, `C` numbers of a hidden state, `H` heads.

References
----------
A. Vaswani et al. (2017), "Attention is all you need". R. Xiong et al. (2020), "On layer normalization in the
transformer architecture" (norms before attention and MLP).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from attn_numba.learning.attending import Attention, Pooling, Rules
from attn_numba.learning.layers import MLP, QUIET, Array, Features, Linear, Norm, Table, dropped, prefixed
from attn_numba.rules import Padding, SlidingWindow

__all__ = ["Batch", "Block", "Design", "Network", "sinusoids"]

Loss = Callable[[Array, Any, Array], tuple[float, Array]]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some sequences, filled up at their ends.

    Parameters
    ----------
    tokens : array (B, L, D), (B, L) for ids or (B, features)
        The sequences.
    lengths : int array (B,)
        Tokens of each.
    """

    tokens: Array
    lengths: Array

    @functools.cached_property  # a rule is compiled once for all calls that are given the same object
    def padding(self) -> Padding | None:
        """What excludes the filling; None if there is none."""
        return Padding(self.lengths) if (self.lengths < self.tokens.shape[1]).any() else None

    @functools.cached_property
    def _windowed(self) -> dict[tuple[int, int], Any]:
        return {}

    def mask(self, window: tuple[int, int] | None) -> Any:
        """Return what says which keys a query sees: no filling, and none beyond a window (left, right) in positions."""
        if window is None:
            return self.padding
        if window not in self._windowed:
            near = SlidingWindow(*window)
            self._windowed[window] = near if self.padding is None else self.padding & near
        return self._windowed[window]


@dataclass(frozen=True)
class Design:
    """What a network is made of.

    Parameters
    ----------
    inputs : {"vectors", "ids", "features"}
        Kind of its tokens.
    input_size : int
        Size of a vector, number of ids, or number of features.
    outputs : int
        Numbers that come out for a sequence.
    rules : Rules
        How tokens attend.
    window : (int, int), optional
        Keys that a query of a block sees before and after itself, in positions, -1 for all; without it, all.
    hidden_size : int
        C, a multiple of the heads.
    layers : int
        Number of blocks; 0 leaves embedding and pooling.
    expansion : int
        How many times larger a state is inside the MLP.
    pooling : {"attention", "mean"}
        How a sequence becomes one state.
    positions : {"sinusoidal", "none"}
        Whether a state is told where it is. Features are told apart by their own biases and get no positions.
    dropout : float
        Share of numbers set to 0 in training, after attention, MLP and pooling; 0 to below 1.
    """

    inputs: str
    input_size: int
    outputs: int
    rules: Rules
    window: tuple[int, int] | None = None
    hidden_size: int = 32
    layers: int = 1
    expansion: int = 2
    pooling: str = "attention"
    positions: str = "sinusoidal"
    dropout: float = 0.0


class Block:
    """Attention, then an MLP, each of normalized states and added to them.

    Parameters
    ----------
    size : int
        C.
    rules : Rules
        How states attend.
    dtype : dtype
        Of the parameters: float32 or float64.
    generator : numpy.random.Generator
        Draws the parameters.
    context_size : int, optional
        Size of the states of a context; with it, states attend to the context and not to each other.
    expansion : int
        How many times larger a state is inside the MLP.
    gain : float
        How large what is added starts, as a mean square.
    dropout : float
        Share of the numbers that are added set to 0 in training.

    Attributes
    ----------
    parameters : dict of str to array
        Those of its parts, ``attention_norm``, ``attention``, ``mlp_norm``, ``mlp`` and ``context_norm``.
    """

    def __init__(
        self, size: int, rules: Rules, dtype: Any, generator: np.random.Generator, *, context_size: int | None = None,
        expansion: int = 2, gain: float = 1.0, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        self.dropout = dropout
        self.attention_norm = Norm(size, dtype)
        self.attention = Attention(size, rules, dtype, generator, context_size, gain)
        self.mlp_norm = Norm(size, dtype)
        self.mlp = MLP(size, expansion, dtype, generator, gain)
        self.context_norm = None if context_size is None else Norm(context_size, dtype)
        self.parameters = gathered(
            {
                "attention_norm": self.attention_norm,
                "attention": self.attention,
                "mlp_norm": self.mlp_norm,
                "mlp": self.mlp,
            }
            | ({} if self.context_norm is None else {"context_norm": self.context_norm})
        )

    def forward(
        self,
        hidden: Array,
        mask: Any = None,
        context: Array | None = None,
        *,
        generator: np.random.Generator | None = None,
        weights: bool = False,
    ) -> tuple[Array, tuple[Any, ...]]:
        """Return new states, and what `vjp` needs.

        Parameters
        ----------
        hidden : array (B, M, C)
            Hidden states.
        mask : mask, optional
            Which keys a state may attend to: those of the context, if there is one.
        context : array (B, N, context_size), optional
            Of which keys and values are made.
        generator : numpy.random.Generator, optional
            Draws what is dropped; without it nothing is.
        weights : bool
            Whether attention keeps its weights, in ``saved[1][0].weights``.

        Returns
        -------
        array (B, M, C)
            The new states.
        tuple
            What `vjp` takes; ``saved[1]`` is that of the attention.
        """
        states, norm = self.attention_norm.forward(hidden)
        context_norm = None
        if self.context_norm is not None and context is not None:
            context, context_norm = self.context_norm.forward(context)
        added, attended = self.attention.forward(states, mask, context, weights)
        added, attention_factors = dropped(added, self.dropout, generator)
        hidden = hidden + added
        states, mlp_norm = self.mlp_norm.forward(hidden)
        added, inner = self.mlp.forward(states)
        added, mlp_factors = dropped(added, self.dropout, generator)
        return hidden + added, (norm, attended, attention_factors, mlp_norm, inner, mlp_factors, context_norm)

    def vjp(
        self, dhidden: Array, saved: tuple[Any, ...], dspan: Array | None = None
    ) -> tuple[Array, Array | None, dict[str, Array]]:
        """Return the gradients of a call.

        Parameters
        ----------
        dhidden : array (B, M, C)
            Gradient by the new states.
        saved : tuple
            What `forward` returned.
        dspan : array that broadcasts to (B, H, M), optional
            Gradient of another part of the loss by the span of each query.

        Returns
        -------
        dhidden : array (B, M, C)
            Gradient by the states.
        dcontext : array (B, N, context_size) or None
            Gradient by the context; None without one.
        gradients : dict of str to array
            Those by the parameters.
        """
        norm, attended, attention_factors, mlp_norm, inner, mlp_factors, context_norm = saved
        dstates, of_mlp = self.mlp.vjp(_times(dhidden, mlp_factors), inner)
        dstates, of_mlp_norm = self.mlp_norm.vjp(dstates, mlp_norm)
        dhidden = dhidden + dstates
        dstates, dcontext, of_attention = self.attention.vjp(_times(dhidden, attention_factors), attended, dspan)
        dstates, of_norm = self.attention_norm.vjp(dstates, norm)
        found = prefixed("attention_norm", of_norm) | prefixed("attention", of_attention)
        found |= prefixed("mlp_norm", of_mlp_norm) | prefixed("mlp", of_mlp)
        if self.context_norm is not None and dcontext is not None:
            dcontext, of_context_norm = self.context_norm.vjp(dcontext, context_norm)
            found |= prefixed("context_norm", of_context_norm)
        return dhidden + dstates, dcontext, found


class Network:
    """A model of sequences that knows its gradient.

    Parameters
    ----------
    design : Design
        What it is made of.
    dtype : str
        Of parameters and states: float32 or float64.
    seed : int or numpy.random.Generator
        Of the initial parameters.

    Attributes
    ----------
    parameters : dict of str to array
        Those of ``embedding``, of the blocks ``0`` and on, of ``norm``, ``pooling`` and ``output``. Change them in
        place: the parts hold the same arrays.

    Examples
    --------
    >>> import numpy as np
    >>> network = Network(Design("vectors", 3, 2, Rules(heads=2), hidden_size=8))
    >>> batch = Batch(np.ones((4, 5, 3), np.float32), np.array([5, 4, 5, 1]))
    >>> network.forward(batch)[0].shape
    (4, 2)
    """

    def __init__(self, design: Design, dtype: str = "float32", seed: Any = 0) -> None:
        self.design, self.dtype = design, np.dtype(dtype)
        generator, size, rules = np.random.default_rng(seed), design.hidden_size, design.rules
        self.embedding = _EMBEDDINGS[design.inputs](design.input_size, size, dtype, generator)
        gain = 1 / max(1, 2 * design.layers)  # so that the sum of all that blocks add starts no larger for many
        self.blocks = [
            Block(size, rules, dtype, generator, expansion=design.expansion, gain=gain, dropout=design.dropout)
            for _ in range(design.layers)
        ]
        self.norm = Norm(size, dtype)
        mean = Rules(rules.heads, "uniform")
        self.pooling = Pooling(size, mean if design.pooling == "mean" else rules, dtype, generator)
        self.output = Linear(size, design.outputs, dtype, generator, gain=0.0)  # all outputs start equal
        parts: dict[str, Any] = {"embedding": self.embedding}
        parts |= {str(n): block for n, block in enumerate(self.blocks)}
        self.parameters = gathered(parts | {"norm": self.norm, "pooling": self.pooling, "output": self.output})

    def __getstate__(self) -> dict[str, Any]:
        return {"design": self.design, "dtype": self.dtype.name, "parameters": self.parameters}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["design"], state["dtype"])  # type: ignore[misc]  # so that parts and whole share arrays
        for name, array in self.parameters.items():
            array[...] = state["parameters"][name]

    def forward(
        self, batch: Batch, *, generator: np.random.Generator | None = None, weights: bool = False
    ) -> tuple[Array, list[Any]]:
        """Return the outputs for sequences, and what `vjp` needs.

        Parameters
        ----------
        batch : Batch
            The sequences.
        generator : numpy.random.Generator, optional
            Draws what is dropped in training; without it nothing is.
        weights : bool
            Whether to keep the weights of attention; `attended` reads them.

        Returns
        -------
        array (B, outputs)
            The outputs.
        list
            What `vjp` takes.
        """
        hidden, embedded = self.embedding.forward(batch.tokens)
        if self.design.positions == "sinusoidal" and self.design.inputs != "features":
            size = QUIET if self.design.inputs == "ids" else 1.0  # not to drown what is there
            hidden = hidden + (size * sinusoids(hidden.shape[1], self.design.hidden_size)).astype(self.dtype)
        kept: list[Any] = [embedded]
        mask = batch.mask(self.design.window)
        for block in self.blocks:
            hidden, saved = block.forward(hidden, mask, generator=generator, weights=weights)
            kept.append(saved)
        states, norm = self.norm.forward(hidden)
        pooled, attended = self.pooling.forward(states, batch.padding, weights)
        pooled, factors = dropped(pooled, self.design.dropout, generator)
        outputs, _ = self.output.forward(pooled)
        return outputs, [*kept, (norm, attended, pooled, factors)]

    def vjp(self, doutputs: Array, kept: list[Any], dspan: Array | None = None) -> dict[str, Array]:
        """Return the gradients by the parameters.

        Parameters
        ----------
        doutputs : array (B, outputs)
            Gradient of a loss by the outputs.
        kept : list
            What `forward` returned.
        dspan : array that broadcasts to (B, H, L), optional
            Gradient of another part of the loss by the span of each query, the same in all blocks.

        Returns
        -------
        dict of str to array
            In the names, shapes and dtype of `parameters`.
        """
        norm, attended, pooled, factors = kept[-1]
        dpooled, found_output = self.output.vjp(doutputs, pooled)
        found = prefixed("output", found_output)
        dstates, found_pooling = self.pooling.vjp(_times(dpooled, factors), attended)
        found |= prefixed("pooling", found_pooling)
        dhidden, found_norm = self.norm.vjp(dstates, norm)
        found |= prefixed("norm", found_norm)
        for n in reversed(range(len(self.blocks))):
            dhidden, _, found_block = self.blocks[n].vjp(dhidden, kept[n + 1], dspan)
            found |= prefixed(str(n), found_block)
        found |= prefixed("embedding", self.embedding.vjp(dhidden, kept[0])[1])
        return {name: found[name] for name in self.parameters}

    def gradients(
        self,
        batch: Batch,
        targets: Array,
        shares: Array,
        loss: Loss,
        *,
        span_penalty: float = 0.0,
        generator: np.random.Generator | None = None,
    ) -> tuple[float, dict[str, Array]]:
        """Return the loss of sequences and its gradient by every parameter.

        Parameters
        ----------
        batch : Batch
            The sequences.
        targets : array (B, ...)
            What `loss` compares the outputs with.
        shares : float64 array (B,)
            Weight of each sequence; together 1 for a mean.
        loss : callable
            ``loss(outputs, targets, shares)``: the loss and its gradient by the outputs.
        span_penalty : float
            What is added to the loss for each position of the mean span, over blocks, heads and tokens.
        generator : numpy.random.Generator, optional
            Draws what is dropped.

        Returns
        -------
        loss : float
            With the penalty.
        gradients : dict of str to array
            In the names, shapes and dtype of `parameters`.
        """
        outputs, kept = self.forward(batch, generator=generator)
        value, doutputs = loss(outputs, targets, shares)
        dspan = None
        if span_penalty and self.blocks and self.design.rules.adaptive:
            each = span_penalty * shares / np.maximum(batch.lengths, 1) / (len(self.blocks) * self.design.rules.heads)
            real = np.arange(batch.tokens.shape[1]) < batch.lengths[:, None]
            dspan = (each[:, None] * real)[:, None]
            value += float(sum((span * dspan).sum(dtype=np.float64) for span in self.spans(kept)))
        return value, self.vjp(doutputs, kept, dspan)

    def spans(self, kept: list[Any]) -> list[Array]:
        """Return the span (B, H, L) of each query in each block, of what `forward` kept; none without them."""
        return [saved[1][1] for saved in kept[1:-1] if saved[1][1] is not None]

    def attended(self, kept: list[Any]) -> tuple[list[Array], Array]:
        """Return the weights (B, H, L, L) of each block and (B, H, L) of the pooling, of what `forward` kept."""
        return [saved[1][0].weights for saved in kept[1:-1]], kept[-1][1].weights[:, :, 0]


def gathered(parts: dict[str, Any]) -> dict[str, Array]:
    """Return the parameters of parts of a model in one dict.

    Parameters
    ----------
    parts : dict of str to part
        Anything with `parameters`, by name.

    Returns
    -------
    dict of str to array
        The very arrays, under ``part.name``.
    """
    found: dict[str, Array] = {}
    for name, part in parts.items():
        found |= prefixed(name, part.parameters)
    return found


@functools.lru_cache(maxsize=256)
def sinusoids(length: int, size: int) -> Array:
    """Return the states that stand for positions: sines and cosines of wavelengths from 2 pi to 20000 pi.

    Parameters
    ----------
    length : int
        Number of positions.
    size : int
        C.

    Returns
    -------
    array (length, size)
        From -1 to 1; not to be written.

    References
    ----------
    A. Vaswani et al. (2017), "Attention is all you need", section 3.5.

    Examples
    --------
    >>> sinusoids(2, 4).round(4).tolist()
    [[0.0, 1.0, 0.0, 1.0], [0.8415, 0.5403, 0.01, 1.0]]
    """
    angles = np.arange(length)[:, None] * 10000.0 ** (-(np.arange(size) // 2 * 2) / size)
    states = np.where(np.arange(size) % 2, np.cos(angles), np.sin(angles))
    states.flags.writeable = False  # it is kept
    return states


_EMBEDDINGS: dict[str, Any] = {"vectors": Linear, "ids": Table, "features": Features}


def _times(x: Array, factors: Array | None) -> Array:
    return x if factors is None else x * factors

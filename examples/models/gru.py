"""A recurrent network for comparison: gated recurrent units that read a sequence step by step, and their gradient.

It takes the place of `attn_numba.learning.Network` in training: the same batches, losses and optimizer. Sizes: `B`
sequences, `L` tokens of each, `D` numbers of a token, `C` of the state.

References
----------
K. Cho et al. (2014), "Learning phrase representations using RNN encoder-decoder for statistical machine translation",
section 2.3, with the reset gate after the product, as cuDNN and ``torch.nn.GRU`` have it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from attn_numba.learning import Batch, Linear
from attn_numba.learning.layers import prefixed

Array = NDArray[Any]


class Shape(NamedTuple):
    """Sizes of a network: `D`, `C`, and how many numbers come out for a sequence."""

    input_size: int
    hidden_size: int
    outputs: int

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        D, C, outputs = self
        return 3 * C * (D + C) + 4 * C + (C + 1) * outputs

    def multiply_adds(self, length: float) -> float:
        """Return the products with weights that a sequence of so many tokens takes."""
        D, C, outputs = self
        return 3 * C * (D + C) * length + C * outputs


class Steps(NamedTuple):
    """What a scan leaves, a step after another.

    Attributes
    ----------
    states : array (L + 1, B, C)
        Before the first step, 0, and after each.
    gates : array (L, B, 3 C)
        Reset gate, update gate and candidate of each step.
    inner : array (L, B, C)
        What the reset gate multiplies: the recurrent part of the candidate.
    """

    states: Array
    gates: Array
    inner: Array


class GRU:
    """Classify sequences by the state after their last token.

    Parameters
    ----------
    shape : Shape
        Its sizes.
    dtype : str
        Of parameters and states: float32 or float64.
    seed : int
        Of the initial parameters.

    Attributes
    ----------
    parameters : dict of str to array
        ``input (D, 3 C)``, ``recurrent (C, 3 C)`` and ``bias (3 C,)`` of reset gate, update gate and candidate in this
        order, ``inner_bias (C,)``, ``output.weight (C, outputs)`` and ``output.bias (outputs,)``. Change them in place.

    Examples
    --------
    >>> network = GRU(Shape(3, 8, 2))
    >>> outputs, _ = network.forward(Batch(np.ones((4, 5, 3), np.float32), np.array([5, 4, 5, 1])))
    >>> outputs.shape, sum(array.size for array in network.parameters.values()) == network.design.parameters
    ((4, 2), True)
    """

    def __init__(self, shape: Shape, dtype: str = "float32", seed: int = 0) -> None:
        self.design, self.dtype = shape, np.dtype(dtype)
        generator, (D, C, outputs) = np.random.default_rng(seed), shape
        squares = [np.linalg.qr(generator.standard_normal((C, C)))[0] for _ in range(3)]  # keep the length of a state
        self.output = Linear(C, outputs, dtype, generator, gain=0.0)
        self.parameters: dict[str, Array] = {
            "input": (generator.standard_normal((D, 3 * C)) * D**-0.5).astype(dtype),
            "recurrent": np.concatenate(squares, axis=1).astype(dtype),
            "bias": np.zeros(3 * C, dtype),
            "inner_bias": np.zeros(C, dtype),
            **prefixed("output", self.output.parameters),
        }

    def forward(self, batch: Batch, *, generator: object = None, weights: bool = False) -> tuple[Array, Any]:
        """Return the outputs (B, outputs) of sequences, and what `vjp` needs; nothing is drawn, no weights are kept."""
        p, (B, L), C = self.parameters, batch.tokens.shape[:2], self.design.hidden_size
        tokens = np.ascontiguousarray(batch.tokens.swapaxes(0, 1)).reshape(L * B, -1)
        projected = (tokens @ p["input"] + p["bias"]).reshape(L, B, 3 * C)
        steps = Steps(np.zeros((L + 1, B, C), self.dtype), projected, np.empty((L, B, C), self.dtype))
        _scan(p["recurrent"], p["inner_bias"], *steps)
        last = steps.states[batch.lengths, np.arange(B)]  # what follows the end of a sequence changes nothing
        return self.output.forward(last)[0], (steps, tokens, batch.lengths, last)

    def vjp(self, doutputs: Array, kept: Any) -> dict[str, Array]:
        """Return the gradients by the parameters from that by the outputs (B, outputs)."""
        (steps, tokens, lengths, last), p, C = kept, self.parameters, self.design.hidden_size
        dlast, of_output = self.output.vjp(doutputs, last)
        dgates, dinner = np.empty_like(steps.gates), np.empty_like(steps.inner)
        _scan_back(np.ascontiguousarray(p["recurrent"].T), *steps, dlast, lengths, dgates, dinner)
        dgates, dinner, before = dgates.reshape(-1, 3 * C), dinner.reshape(-1, C), steps.states[:-1].reshape(-1, C)
        return {
            "input": tokens.T @ dgates,
            "recurrent": np.concatenate([before.T @ dgates[:, : 2 * C], before.T @ dinner], axis=1),
            "bias": dgates.sum(axis=0),
            "inner_bias": dinner.sum(axis=0),
            **prefixed("output", of_output),
        }

    def gradients(
        self, batch: Batch, targets: Array, shares: Array, loss: Any, **_: Any
    ) -> tuple[float, dict[str, Array]]:
        """Return the loss of sequences and its gradients, as `attn_numba.learning.Network.gradients` does."""
        outputs, kept = self.forward(batch)
        value, doutputs = loss(outputs, targets, shares)
        return value, self.vjp(doutputs, kept)


@njit(cache=True, nogil=True, error_model="numpy")
def _scan(recurrent: Array, inner_bias: Array, states: Array, gates: Array, inner: Array) -> None:
    """Write states, gates and inner of each step; gates come in as what the tokens give to them.

    Shapes as in `Steps`, recurrent (C, 3 C), inner_bias (C,); all contiguous, of one dtype, and states[0] filled in.
    """
    L, B, C = inner.shape
    one = recurrent.dtype.type(1)
    products = np.empty((B, 3 * C), recurrent.dtype)
    for t in range(L):
        np.dot(states[t], recurrent, products)
        for b in range(B):
            for c in range(C):
                reset = one / (one + np.exp(-(gates[t, b, c] + products[b, c])))
                update = one / (one + np.exp(-(gates[t, b, C + c] + products[b, C + c])))
                turned = products[b, 2 * C + c] + inner_bias[c]
                # tanh(x) = 2 / (1 + exp(-2 x)) - 1, which takes a quarter of the time of the tanh of the C library
                candidate = (one + one) / (one + np.exp(-(one + one) * (gates[t, b, 2 * C + c] + reset * turned))) - one
                gates[t, b, c], gates[t, b, C + c], gates[t, b, 2 * C + c] = reset, update, candidate
                inner[t, b, c] = turned
                states[t + 1, b, c] = candidate + update * (states[t, b, c] - candidate)


@njit(cache=True, nogil=True, error_model="numpy")
def _scan_back(
    transposed: Array,
    states: Array,
    gates: Array,
    inner: Array,
    dlast: Array,
    lengths: Array,
    dgates: Array,
    dinner: Array,
) -> None:
    """Write the gradients by what the tokens give to the gates, and by inner, from that by the last states.

    Shapes as in `Steps`, transposed (3 C, C) the recurrent weights, dlast (B, C), lengths (B,); all contiguous.
    """
    L, B, C = inner.shape
    one = transposed.dtype.type(1)
    dstate = np.zeros_like(dlast)  # by the state after step t
    carried = np.empty_like(dlast)
    dproducts = np.empty((B, 3 * C), transposed.dtype)
    for t in range(L - 1, -1, -1):
        for b in range(B):
            if lengths[b] == t + 1:
                dstate[b] = dlast[b]
            for c in range(C):
                reset, update, candidate = gates[t, b, c], gates[t, b, C + c], gates[t, b, 2 * C + c]
                dcandidate = dstate[b, c] * (one - update) * (one - candidate * candidate)
                dupdate = dstate[b, c] * (states[t, b, c] - candidate) * update * (one - update)
                dreset = dcandidate * inner[t, b, c] * reset * (one - reset)
                dgates[t, b, c], dgates[t, b, C + c], dgates[t, b, 2 * C + c] = dreset, dupdate, dcandidate
                dproducts[b, c], dproducts[b, C + c] = dreset, dupdate
                dproducts[b, 2 * C + c] = dinner[t, b, c] = dcandidate * reset
                carried[b, c] = dstate[b, c] * update
        np.dot(dproducts, transposed, dstate)
        dstate += carried

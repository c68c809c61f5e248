"""Layers: attention as a part of a model, from hidden states to hidden states."""

from __future__ import annotations

from typing import Any

import numpy as np

from attn_numba.api import attention, attention_vjp
from attn_numba.problem import host_array, is_device_array
from attn_numba.rules import Dense, ReplaceExcluded
from attn_numba.rules.arguments import ACCUMULATORS
from attn_numba.rules.data import AnyArray, whole_number

__all__ = ["SelfAttention"]

FILL = -1e9  # the score of an excluded key, before the division by the hidden size


class SelfAttention:
    """Let every hidden state of a sequence attend to all of them; queries, keys and values are the hidden states.

    Parameters
    ----------
    hidden_size : int
        Size of a hidden state, at least 1.

    Raises
    ------
    TypeError
        If it is not an integer.
    ValueError
        If it is below 1.

    Notes
    -----
    ``scores = hidden @ hidden^T``; where the mask is 0 the score is replaced by -1e9; then *all* scores are divided by
    `hidden_size` (not by its root); ``weights = softmax(scores)`` over the keys; ``context = weights @ hidden``.

    An excluded key stays in the sum with a score of ``-1e9 / hidden_size``: its weight is 0 unless a row has no other
    key. A row with no key at all therefore gets uniform weights, where `attention` with a mask gives 0.

    References
    ----------
    Scaled dot-product attention: A. Vaswani et al. (2017), "Attention is all you need", equation 1, here without
    projections and with another divisor.

    Examples
    --------
    >>> import numpy as np
    >>> layer = SelfAttention(2)
    >>> hidden = np.array([[[2.0, 0.0], [0.0, 2.0], [9.0, 9.0]]])
    >>> context, weights = layer(hidden, mask=np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0]]))
    >>> weights.round(4)
    array([[[0.8808, 0.1192, 0.    ],
            [0.    , 1.    , 0.    ],
            [0.3333, 0.3333, 0.3333]]])
    >>> context.round(4)
    array([[[1.7616, 0.2384],
            [0.    , 2.    ],
            [3.6667, 3.6667]]])
    """

    def __init__(self, hidden_size: int) -> None:
        size = whole_number("SelfAttention", "hidden_size", hidden_size)
        if size < 1:
            raise ValueError(f"SelfAttention: hidden_size is {size}; needed at least 1")
        self.hidden_size = size

    def __repr__(self) -> str:
        return f"SelfAttention(hidden_size={self.hidden_size})"

    def forward(
        self, hidden: Any, mask: Any = None, return_weights: bool = True, *, backend: str = "auto"
    ) -> AnyArray | tuple[AnyArray, AnyArray]:
        """Return the context of each hidden state, and the weights that made it.

        Parameters
        ----------
        hidden : array (B, L, hidden_size)
            Hidden states: float64, float32, float16 or bfloat16.
        mask : array (B, L, L), (1, L, L) or (L, L), optional
            Numbers or truth values for (query, key): 0 excludes the key, anything else keeps it. Axes of size 1 of a
            mask with three axes are repeated, so (B, 1, L) excludes the same keys for all queries of a sequence. Two
            axes always mean (L, L), also where there are as many sequences as states.
        return_weights : bool
            Whether to return the weights too. Without them memory, apart from the mask's, grows with L and not with
            its square.
        backend : {"auto", "reference", "cpu", "cuda"}
            Who computes, as in `attention`.

        Returns
        -------
        context : array (B, L, hidden_size)
            In the dtype of `hidden`; alone, not in a tuple, if the weights are not asked for.
        weights : array (B, L, L)
            Rows sum to 1; float64 for float64, else float32.

        Raises
        ------
        TypeError
            If `hidden` is no array of a supported dtype, or `mask` not of real numbers or truth values.
        ValueError
            If a shape does not fit, or `mask` holds NaN.
        NotImplementedError
            For arrays on a GPU.
        """
        states = self._states(hidden)
        x = states[:, None]  # one head
        found = attention(x, x, x, return_weights=return_weights, backend=backend, **self._rules(states, mask))
        return (found.out[:, 0], found.weights[:, 0]) if return_weights else found[:, 0]

    __call__ = forward

    def vjp(self, hidden: Any, dout: Any, mask: Any = None, *, backend: str = "auto") -> AnyArray:
        """Return the gradient of a loss by the hidden states, from that by their contexts.

        Parameters
        ----------
        hidden : array (B, L, hidden_size)
            As `forward` got it.
        dout : array (B, L, hidden_size)
            Gradient of the loss by the context, in the dtype of `hidden`.
        mask : array, optional
            As `forward` got it.
        backend : {"auto", "reference", "cpu", "cuda"}
            Who computes, as in `attention_vjp`.

        Returns
        -------
        array (B, L, hidden_size)
            In the dtype of `hidden`: of each state as a query, as a key and as a value together.

        Raises
        ------
        TypeError
            As `forward`; if `dout` has another dtype than `hidden`.
        ValueError
            As `forward`; if the shape of `dout` is not that of `hidden`.
        NotImplementedError
            For arrays on a GPU, and for a backend that does not compute gradients.

        Notes
        -----
        An excluded key whose weight is not 0, in a row with no other key, has a gradient as a value: ``weights`` says
        how much of it is in the context. Its score is the constant -1e9, which has none.
        """
        states = self._states(hidden)
        if is_device_array(dout):
            raise NotImplementedError("dout is on a GPU; SelfAttention takes arrays in host memory")
        gradient = host_array(dout, "dout")
        if gradient.dtype != states.dtype:
            raise TypeError(f"dout has dtype {gradient.dtype.name}; hidden has {states.dtype.name}")
        if gradient.shape != states.shape:
            raise ValueError(f"dout has shape {gradient.shape}; needed that of hidden, {states.shape}")
        x = states[:, None]
        found = attention_vjp(x, x, x, gradient[:, None], backend=backend, **self._rules(states, mask))
        with np.errstate(all="ignore"):
            dq, dk, dv = (part[:, 0].astype(ACCUMULATORS[states.dtype.name]) for part in (found.q, found.k, found.v))
            return (dq + dk + dv).astype(states.dtype)

    def _rules(self, states: AnyArray, mask: Any) -> dict[str, Any]:
        """Return the rules of the call of attention."""
        modifiers = []
        if mask is not None:
            modifiers.append(ReplaceExcluded(_kept_keys(mask, *states.shape[:2]), FILL / self.hidden_size))
        return {"modifiers": modifiers, "scale": 1 / self.hidden_size}

    def _states(self, hidden: Any) -> AnyArray:
        if is_device_array(hidden):
            raise NotImplementedError("hidden is on a GPU; SelfAttention takes arrays in host memory")
        states = host_array(hidden, "hidden")
        if states.ndim != 3:
            cure = ": pass hidden[None] for one sequence" if states.ndim == 2 else ""
            raise ValueError(f"hidden has shape {states.shape}; needed 3 axes, (B, L, hidden_size){cure}")
        if states.shape[2] != self.hidden_size:
            raise ValueError(f"hidden has states of size {states.shape[2]}; the layer was made for {self.hidden_size}")
        return states


def _kept_keys(mask: Any, B: int, L: int) -> Dense:
    """Return the mask as a rule: which keys keep their score."""
    array = np.asarray(mask)
    if array.dtype.kind not in "biuf" and array.dtype.name != "bfloat16":
        what = f"mask is {type(mask).__name__} of dtype {array.dtype}"
        raise TypeError(f"{what}; needed numbers or truth values, 0 = excluded")
    needed = f"({B}, {L}, {L}), (1, {L}, {L}) or ({L}, {L})"
    if array.ndim == 2 and array.shape != (L, L):
        cure = ": pass mask[:, None, :] to exclude keys by sequence" if array.shape == (B, L) else ""
        raise ValueError(f"mask has shape {array.shape}; needed {needed}{cure}")
    fits = array.ndim in (2, 3) and all(n in (1, size) for n, size in zip(array.shape[::-1], (L, L, B), strict=False))
    if not fits:
        raise ValueError(f"mask has shape {array.shape}; needed {needed}")
    if array.dtype.kind not in "biu" and np.isnan(array).any():
        raise ValueError("mask holds NaN; needed numbers, 0 = excluded")
    return Dense((array != 0).reshape(1 if array.ndim == 2 else array.shape[0], 1, *array.shape[-2:]))

"""What a layer keeps of a forward call for its gradient, and the gradients it returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from attn_numba.problem import Problem
from attn_numba.rules import Softmax
from attn_numba.rules.data import AnyArray

__all__ = ["MultiHeadGradients", "MultiHeadSaved"]


class MultiHeadSaved(NamedTuple):
    """What a forward call of a layer keeps for its gradient.

    Parameters
    ----------
    q : array (B, H, M, D)
        Queries as attention got them: projected, and turned by their positions.
    k : array (B, Hk, N, D)
        Keys, likewise.
    v : array (B, Hk, N, E)
        Values, projected.
    out : array (B, H, M, E)
        What attention returned.
    lse : array (B, H, M) or None
        The logarithms of its sums; None for other normalizers than `Softmax`.
    """

    q: AnyArray
    k: AnyArray
    v: AnyArray
    out: AnyArray
    lse: AnyArray | None


class MultiHeadGradients:
    """What `MultiHeadAttention.vjp` returns: gradients by states, context, parameters, and by the arrays of rules.

    Parameters
    ----------
    hidden : array (B, M, hidden_size)
        Of the hidden states, in their dtype.
    context : array (B, N, context_size) or None
        Of the context; None if there was none, where `hidden` has the gradients of all three projections.
    parameters : dict of str to array
        Of the parameters, under their names, in their shapes and dtype.
    attention : Gradients
        Those of the attention between the projections.
    """

    def __init__(
        self, hidden: AnyArray, context: AnyArray | None, parameters: dict[str, AnyArray], attention: Any
    ) -> None:
        self.hidden = hidden
        self.context = context
        self.parameters = parameters
        self._attention = attention

    def of(self, rule: Any) -> Any:
        """Return the gradients by a rule's arrays, as those of `attention_vjp` do.

        Parameters
        ----------
        rule : rule with arrays
            The very object that the call was given.

        Returns
        -------
        array or named tuple of arrays
            In the shape the rule was given.

        Raises
        ------
        ValueError
            If it is no rule of the call, or one without gradients.
        """
        return self._attention.of(rule)

    def __repr__(self) -> str:
        shape = None if self.context is None else self.context.shape
        return f"MultiHeadGradients(hidden={self.hidden.shape}, context={shape}, parameters={[*self.parameters]})"


def check_saved(saved: object, call: Problem) -> MultiHeadSaved:
    """Return what a forward call kept.

    Raises
    ------
    TypeError
        If it is something else, or one of its arrays has another dtype than in this call.
    ValueError
        If it is of another call: a shape differs, or whether there is an lse.
    """
    if not isinstance(saved, MultiHeadSaved):
        raise TypeError(f"saved is {type(saved).__name__}; needed what forward(return_saved=True) returned, or None")
    z = call.sizes
    needed: dict[str, tuple[tuple[int, ...], Any]] = {
        "q": ((z.B, z.H, z.M, z.D), call.q.dtype),
        "k": ((z.B, z.Hk, z.N, z.D), call.q.dtype),
        "v": ((z.B, z.Hk, z.N, z.E), call.q.dtype),
        "out": ((z.B, z.H, z.M, z.E), call.q.dtype),
    }
    if isinstance(call.normalizer, Softmax):
        needed["lse"] = (z.B, z.H, z.M), call.accumulator
    for name, (shape, dtype) in needed.items():
        array = getattr(saved, name)
        if array is None:
            raise ValueError(f"saved is of another call: its {name} is None, and the normalizer is Softmax")
        if not isinstance(array, np.ndarray):
            raise TypeError(f"saved has {name} of type {type(array).__name__}; needed an array")
        if array.shape != shape:
            raise ValueError(f"saved is of another call: its {name} has shape {array.shape}; needed {shape}")
        if array.dtype != dtype:
            raise TypeError(f"saved is of another call: its {name} has dtype {array.dtype}; needed {dtype}")
    if "lse" not in needed and saved.lse is not None:
        kind = type(call.normalizer).__name__
        raise ValueError(f"saved is of another call: it has an lse, and the normalizer is {kind}")
    return saved

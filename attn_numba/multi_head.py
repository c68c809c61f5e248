"""Multi-head attention as a layer: projections of hidden states, attention, and a projection of what it finds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from attn_numba import files
from attn_numba.api import attention, attention_vjp
from attn_numba.layer_results import MultiHeadGradients, MultiHeadSaved, check_saved
from attn_numba.problem import Problem, check, host_array, is_device_array
from attn_numba.projections import (
    check_parameters,
    generator_of,
    in_heads,
    initial_parameters,
    parameter_dtype,
    project,
    project_vjp,
    side_by_side,
)
from attn_numba.rotations import check_base, check_pairs, positions_of, rotary, rotary_vjp
from attn_numba.rules import Softmax
from attn_numba.rules.arguments import ACCUMULATORS, check_offsets
from attn_numba.rules.data import AnyArray, whole_number

__all__ = ["MultiHeadAttention"]

PARTS = ("query", "key", "value", "output")


class MultiHeadAttention:
    """Let hidden states attend to each other, or to a context, by several heads, each with projections of its own.

    Parameters
    ----------
    hidden_size : int
        Size of a hidden state, of those that come in and of those that go out.
    heads : int
        Number of query heads, H.
    key_heads : int, optional
        Number of heads of keys and values, Hk, of which H is a multiple; H if not given.
    head_size : int, optional
        Size of a query and of a key, D; ``hidden_size / heads`` if not given.
    value_size : int, optional
        Size of a value, E; D if not given.
    context_size : int, optional
        Size of the states that keys and values are made of; `hidden_size` if not given.
    bias : bool
        Whether the four projections add a bias.
    rotary : {None, "halves", "neighbors"}
        Whether queries and keys are turned by their positions, and which numbers make a pair (`attn_numba.rotary`).
    base : float
        Base of the wavelengths of the rotation; above 0.
    dtype : dtype or str
        Of the parameters and of the states: float64, float32, float16 or bfloat16.
    seed : int or numpy.random.Generator
        Of the initial weights. Layers of one model take one generator, or else start alike.

    Attributes
    ----------
    parameters : dict of str to array
        ``query.weight`` (H D, hidden_size), ``key.weight`` (Hk D, context_size), ``value.weight`` (Hk E, context_size),
        ``output.weight`` (hidden_size, H E), and with `bias` ``query.bias`` (H D,) and so on. Head h owns the rows ``h
        D`` to ``(h + 1) D`` of the first three. The arrays may be written, and others of their shapes and dtype put in
        their places.

    Raises
    ------
    TypeError
        For arguments of the wrong kind.
    ValueError
        For sizes below 1 or that do not fit; for a rotation of an odd head size; for a dtype that is none of the four.

    Notes
    -----
    ``q = hidden @ query.weight^T + query.bias``, cut into heads; k and v of the context, or of the hidden states, in
    the same way; q and k turned by ``query_offset + i`` and ``key_offset + j``; ``out = attention(q, k, v)``, its heads
    side by side, ``@ output.weight^T + output.bias``. A query with no allowed key so becomes ``output.bias``.

    Weights start uniform in ``+-sqrt(6 / (inputs + outputs))`` of each matrix, drawn in float64 in the order query,
    key, value, output; biases start at 0.

    The products with weights are NumPy's, one for each sequence: a sequence has the same bits alone and among others,
    with one library and one number of its threads. They are computed in float64 for float64, else in float32.

    References
    ----------
    A. Vaswani et al. (2017), "Attention is all you need", section 3.2.2. Heads that share keys: J. Ainslie et al.
    (2023), "GQA: Training generalized multi-query transformer models from multi-head checkpoints". Initial weights: X.
    Glorot and Y. Bengio (2010), "Understanding the difficulty of training deep feedforward neural networks",
    equation 16.

    Examples
    --------
    >>> import numpy as np
    >>> import attn_numba as an
    >>> layer = an.MultiHeadAttention(16, 4, key_heads=2, rotary="halves", dtype="float64")
    >>> {name: array.shape for name, array in layer.parameters.items()}
    {'query.weight': (16, 16), 'key.weight': (8, 16), 'value.weight': (8, 16), 'output.weight': (16, 16)}
    >>> hidden = np.random.default_rng(1).standard_normal((2, 5, 16))
    >>> layer(hidden, mask=an.Causal()).shape
    (2, 5, 16)

    To other states, of another size:

    >>> layer = an.MultiHeadAttention(16, 4, context_size=6, dtype="float64")
    >>> layer(hidden, np.ones((2, 9, 6)), mask=an.Padding([9, 4])).shape
    (2, 5, 16)
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        *,
        key_heads: int | None = None,
        head_size: int | None = None,
        value_size: int | None = None,
        context_size: int | None = None,
        bias: bool = False,
        rotary: str | None = None,
        base: float = 10000.0,
        dtype: Any = "float32",
        seed: Any = 0,
    ) -> None:
        self.hidden_size = _size("hidden_size", hidden_size)
        self.heads = _size("heads", heads)
        self.key_heads = self.heads if key_heads is None else _size("key_heads", key_heads)
        if self.heads % self.key_heads:
            raise ValueError(
                f"MultiHeadAttention: key_heads is {self.key_heads}; heads is {self.heads}, not a multiple of it"
            )
        if head_size is None and self.hidden_size % self.heads:
            raise ValueError(
                f"MultiHeadAttention: hidden_size is {self.hidden_size}, not a multiple of heads, {self.heads}: pass "
                "head_size"
            )
        self.head_size = self.hidden_size // self.heads if head_size is None else _size("head_size", head_size)
        self.value_size = self.head_size if value_size is None else _size("value_size", value_size)
        self.context_size = self.hidden_size if context_size is None else _size("context_size", context_size)
        if not isinstance(bias, (bool, np.bool_)):
            raise TypeError(f"MultiHeadAttention: bias is {type(bias).__name__}; needed True or False")
        self.bias = bool(bias)
        self.rotary = None if rotary is None else check_pairs("MultiHeadAttention", "rotary", rotary)
        if self.rotary and self.head_size % 2:
            raise ValueError(f"MultiHeadAttention: head_size is {self.head_size}; rotary needs an even one")
        self.base = check_base("MultiHeadAttention", base)
        self.dtype = parameter_dtype("MultiHeadAttention", dtype)
        self.parameters = initial_parameters(self._shapes(), self.dtype, generator_of("MultiHeadAttention", seed))

    def __repr__(self) -> str:
        names = (
            "hidden_size", "heads", "key_heads", "head_size", "value_size", "context_size", "bias", "rotary", "base",
        )  # fmt: skip
        said = ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
        return f"MultiHeadAttention({said}, dtype={self.dtype.name!r})"

    @property
    def uses_positions(self) -> bool:
        """Whether a call needs to know where its queries and keys are, whatever its rules."""
        return self.rotary is not None

    def forward(
        self,
        hidden: Any,
        context: Any = None,
        *,
        mask: Any = None,
        modifiers: Any = (),
        score: Any = None,
        normalizer: Any = None,
        scale: float | None = None,
        query_offset: Any = None,
        key_offset: Any = 0,
        dropout: Any = None,
        return_weights: bool = False,
        return_saved: bool = False,
        backend: str = "auto",
    ) -> Any:
        """Return new hidden states, made of what the old ones attend to.

        Parameters
        ----------
        hidden : array (B, M, hidden_size)
            Hidden states, of the layer's dtype: what queries are made of, and without a context keys and values too.
        context : array (B, N, context_size), optional
            What keys and values are made of instead.
        mask, modifiers, score, normalizer, scale, query_offset, key_offset, dropout : optional
            The rules, as `attention` takes them, for `heads` query heads. Rotary positions use the offsets too.
        return_weights, return_saved : bool
            What to return beside the states.
        backend : {"auto", "reference", "cpu", "cuda"}
            Who computes the attention, as in `attention`.

        Returns
        -------
        out : array (B, M, hidden_size)
            In the dtype of `hidden`. With `return_weights` or `return_saved`, a tuple of (out, weights, saved), only
            those asked for:
        weights : array (B, H, M, N)
            Before dropout; float64 for float64, else float32.
        saved : MultiHeadSaved
            What `vjp` takes so that it need not compute it again.

        Raises
        ------
        TypeError
            For arguments of the wrong kind, states of another dtype than the layer's among them.
        ValueError
            For shapes and values that do not fit; where a rule or the rotation uses positions, ``M != N`` and
            `query_offset` is None; for parameters that are not as they were made.
        NotImplementedError
            For arrays on a GPU, and for what the backend does not offer.
        """
        rules: dict[str, Any] = {
            "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
            "query_offset": query_offset, "key_offset": key_offset, "dropout": dropout,
        }  # fmt: skip
        states, source, weights, call = self._checked(hidden, context, rules)
        attention(*self._smallest(3), backend=backend)
        q, k, v = self._projected(states, source, weights, call)
        streams = return_saved and isinstance(call.normalizer, Softmax)
        found = attention(q, k, v, return_lse=streams, return_weights=return_weights, backend=backend, **rules)
        out = found.out if streams or return_weights else found
        result: list[Any] = [project(side_by_side(out), weights, "output")]
        if return_weights:
            result.append(found.weights)
        if return_saved:
            result.append(MultiHeadSaved(q, k, v, out, found.lse if streams else None))
        return tuple(result) if len(result) > 1 else result[0]

    __call__ = forward

    def vjp(
        self,
        hidden: Any,
        dout: Any,
        context: Any = None,
        *,
        mask: Any = None,
        modifiers: Any = (),
        score: Any = None,
        normalizer: Any = None,
        scale: float | None = None,
        query_offset: Any = None,
        key_offset: Any = 0,
        dropout: Any = None,
        saved: MultiHeadSaved | None = None,
        backend: str = "auto",
    ) -> MultiHeadGradients:
        """Return the gradients of a loss by states, context, parameters and rules, from that by the layer's result.

        Parameters
        ----------
        hidden : array (B, M, hidden_size)
            As `forward` got it.
        dout : array (B, M, hidden_size)
            Gradient of the loss by the result of `forward`, in the dtype of `hidden`.
        context : array (B, N, context_size), optional
            As `forward` got it.
        mask, modifiers, score, normalizer, scale, query_offset, key_offset, dropout : optional
            As `forward` got them.
        saved : MultiHeadSaved, optional
            What `forward` kept, called with the same arguments and parameters; without it, it is computed again.
        backend : {"auto", "reference", "cpu", "cuda"}
            Who computes the attention and its gradient, as in `attention_vjp`.

        Returns
        -------
        MultiHeadGradients
            ``.hidden``, ``.context``, ``.parameters``, and ``.of(rule)`` for the arrays of a rule.

        Raises
        ------
        TypeError
            As `forward`; if `dout` or an array of `saved` has another dtype.
        ValueError
            As `forward`; if the shape of `dout` does not fit, or `saved` is of a call of other shapes.
        NotImplementedError
            As `forward`.

        Notes
        -----
        A state that no gradient reaches adds nothing to the gradients of the parameters, NaN and infinity included.
        """
        rules: dict[str, Any] = {
            "mask": mask, "modifiers": modifiers, "score": score, "normalizer": normalizer, "scale": scale,
            "query_offset": query_offset, "key_offset": key_offset, "dropout": dropout,
        }  # fmt: skip
        states, source, weights, call = self._checked(hidden, context, rules)
        gradient = _like_states(dout, "dout", self.dtype)
        if gradient.shape != states.shape:
            raise ValueError(f"dout has shape {gradient.shape}; needed that of the result, {states.shape}")
        attention_vjp(*self._smallest(4), backend=backend)
        kept = None if saved is None else check_saved(saved, call)
        if kept is None:
            q, k, v = self._projected(states, source, weights, call)
            if isinstance(call.normalizer, Softmax):
                kept = MultiHeadSaved(q, k, v, *attention(q, k, v, return_lse=True, backend=backend, **rules))
            else:
                kept = MultiHeadSaved(q, k, v, attention(q, k, v, backend=backend, **rules), None)
        return self._gradients(states, context is None, source, gradient, weights, call, kept, rules, backend)

    def save(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the parameters to a ``.safetensors`` file, whole or not at all.

        The file holds the arrays of `parameters` under their names, and nothing else: the layer that is to load them is
        made with the same sizes.

        Parameters
        ----------
        path : str or Path
            The file to write.
        overwrite : bool
            Whether a file that exists may be replaced.

        Raises
        ------
        TypeError, ValueError
            If the suffix is another one, or the parameters are not as they were made.
        FileExistsError
            If the file exists and `overwrite` is False.
        OSError
            If it cannot be written.
        ImportError
            If the package safetensors is not installed.
        """
        weights = self._weights()
        if Path(path).exists() and not overwrite:
            raise FileExistsError(f"{path} exists; it is replaced only with overwrite=True")
        files.write_arrays(files.check_output(path, overwrite, (".safetensors",)), weights, overwrite)

    def load(self, path: str | Path) -> None:
        """Take the parameters from a ``.safetensors`` file; a failed call leaves the layer as it was.

        Parameters
        ----------
        path : str or Path
            A file that `save` wrote, or another one with arrays of the same names, shapes and dtype.

        Raises
        ------
        TypeError
            If an array of the file has another dtype than the layer.
        ValueError
            If the file is damaged or of another kind, lacks a parameter, holds another array, or one of another shape.
        OSError
            If it cannot be opened.
        ImportError
            If the package safetensors is not installed.
        """
        if Path(path).suffix != ".safetensors":
            raise ValueError(f"{path}: unknown kind of file {Path(path).suffix!r}; needed .safetensors")
        found = files.read_arrays(path)
        shapes = self._shapes()
        check_parameters(found, shapes, self.dtype, f"{path}: ")
        self.parameters = {name: np.array(found[name], order="C") for name in shapes}  # read maps files, read-only

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        keys, values = self.key_heads * self.head_size, self.key_heads * self.value_size
        shapes: dict[str, tuple[int, ...]] = {
            "query.weight": (self.heads * self.head_size, self.hidden_size),
            "key.weight": (keys, self.context_size),
            "value.weight": (values, self.context_size),
            "output.weight": (self.hidden_size, self.heads * self.value_size),
        }
        biases = {f"{part}.bias": shapes[f"{part}.weight"][:1] for part in PARTS} if self.bias else {}
        return {**shapes, **biases}

    def _weights(self) -> dict[str, AnyArray]:
        """Return the parameters, checked: they are the user's to change."""
        if not isinstance(self.parameters, Mapping):
            raise TypeError(f"parameters is {type(self.parameters).__name__}; needed a dict of arrays")
        weights = {}
        for name, array in self.parameters.items():
            if is_device_array(array):
                raise NotImplementedError(f"{name} is on a GPU; MultiHeadAttention takes arrays in host memory")
            weights[name] = host_array(array, name)
        check_parameters(weights, self._shapes(), self.dtype)
        return weights

    def _checked(
        self, hidden: object, context: object, rules: dict[str, Any]
    ) -> tuple[AnyArray, AnyArray, dict[str, AnyArray], Problem]:
        """Return hidden states, what keys and values are made of, the parameters, and the call of attention to come.

        The call has its sizes, rules and offsets; its arrays are not made yet, so that no work precedes an error.
        """
        states = _states(hidden, "hidden", self.hidden_size, self.dtype)
        if context is None:
            if self.context_size != self.hidden_size:
                raise ValueError(
                    f"context is None, and the layer makes keys of states of size {self.context_size}, not of hidden's "
                    f"{self.hidden_size}: pass a context"
                )
            source = states
        else:
            source = _states(context, "context", self.context_size, self.dtype)
            if source.shape[0] != states.shape[0]:
                raise ValueError(f"context has {source.shape[0]} sequences; hidden has {states.shape[0]}")
        weights = self._weights()
        (B, M), N = states.shape[:2], source.shape[1]
        nothing = np.zeros((), self.dtype)
        q = np.broadcast_to(nothing, (B, self.heads, M, self.head_size))
        k = np.broadcast_to(nothing, (B, self.key_heads, N, self.head_size))
        v = np.broadcast_to(nothing, (B, self.key_heads, N, self.value_size))
        call = check(q, k, v, **rules)
        if self.uses_positions:  # the rules alone might not mind that the offset is unclear
            check_offsets(rules["query_offset"], rules["key_offset"], call.sizes, (self,))
        return states, source, weights, call

    def _smallest(self, count: int) -> tuple[AnyArray, ...]:
        """Return the arrays of a call with which a backend that cannot run is refused before there is work."""
        return (np.zeros((1, 1), self.dtype),) * count

    def _projected(
        self, states: AnyArray, source: AnyArray, weights: dict[str, AnyArray], call: Problem
    ) -> tuple[AnyArray, AnyArray, AnyArray]:
        """Return q, k and v as attention takes them, each rounded to the layer's dtype once."""
        z, exact = call.sizes, ACCUMULATORS[self.dtype.name]
        q = in_heads(project(states, weights, "query", exact), z.H)
        k = in_heads(project(source, weights, "key", exact), z.Hk)
        v = in_heads(project(source, weights, "value", exact), z.Hk)
        if self.rotary:
            q = rotary(q, positions_of(call.query_offset, z.M), base=self.base, pairs=self.rotary)
            k = rotary(k, positions_of(call.key_offset, z.N), base=self.base, pairs=self.rotary)
        with np.errstate(all="ignore"):
            return (
                q.astype(self.dtype, copy=False),
                k.astype(self.dtype, copy=False),
                v.astype(self.dtype, copy=False),
            )

    def _gradients(
        self,
        states: AnyArray,
        own: bool,
        source: AnyArray,
        dout: AnyArray,
        weights: dict[str, AnyArray],
        call: Problem,
        kept: MultiHeadSaved,
        rules: dict[str, Any],
        backend: str,
    ) -> MultiHeadGradients:
        z, exact = call.sizes, ACCUMULATORS[self.dtype.name]
        found: dict[str, AnyArray] = {}
        heads = in_heads(project_vjp(dout, side_by_side(kept.out), weights, "output", found), z.H)
        pair = None if kept.lse is None else (kept.out, kept.lse)
        inner = attention_vjp(
            kept.q, kept.k, kept.v, heads.astype(self.dtype, copy=False), saved=pair, backend=backend, **rules
        )
        dq, dk, dv = (x.astype(exact, copy=False) for x in (inner.q, inner.k, inner.v))
        if self.rotary:
            dq = rotary_vjp(dq, positions_of(call.query_offset, z.M), base=self.base, pairs=self.rotary)
            dk = rotary_vjp(dk, positions_of(call.key_offset, z.N), base=self.base, pairs=self.rotary)
        from_queries = project_vjp(side_by_side(dq), states, weights, "query", found)
        from_keys = project_vjp(side_by_side(dk), source, weights, "key", found)
        from_values = project_vjp(side_by_side(dv), source, weights, "value", found)
        with np.errstate(all="ignore"):
            below = from_keys + from_values
            dhidden = (from_queries + below if own else from_queries).astype(self.dtype, copy=False)
            dcontext = None if own else below.astype(self.dtype, copy=False)
            parameters = {name: found[name].astype(self.dtype, copy=False) for name in weights}
        return MultiHeadGradients(dhidden, dcontext, parameters, inner)


def _size(name: str, x: object) -> int:
    size = whole_number("MultiHeadAttention", name, x)
    if size < 1:
        raise ValueError(f"MultiHeadAttention: {name} is {size}; needed at least 1")
    return size


def _like_states(x: object, name: str, dtype: np.dtype[Any]) -> AnyArray:
    if is_device_array(x):
        raise NotImplementedError(f"{name} is on a GPU; MultiHeadAttention takes arrays in host memory")
    array = host_array(x, name)
    if array.dtype != dtype:
        raise TypeError(f"{name} has dtype {array.dtype.name}; the layer has {dtype.name}")
    return array


def _states(x: object, name: str, size: int, dtype: np.dtype[Any]) -> AnyArray:
    array = _like_states(x, name, dtype)
    if array.ndim != 3:
        cure = f": pass {name}[None] for one sequence" if array.ndim == 2 else ""
        raise ValueError(f"{name} has shape {array.shape}; needed 3 axes, (B, rows, {size}){cure}")
    if array.shape[2] != size:
        raise ValueError(f"{name} has states of size {array.shape[2]}; the layer was made for {size}")
    return array

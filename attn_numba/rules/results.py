"""What a call returns: the output alone, or a named tuple of what was asked for."""

from __future__ import annotations

import functools
from collections import namedtuple
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from attn_numba.rules.data import AnyArray


class Merged(NamedTuple):
    """What `merge` returns."""

    out: AnyArray  # (B, H, M, E)
    lse: AnyArray  # (B, H, M)


class TopKeys(NamedTuple):
    """What `top_keys` returns: the keys of largest weight of each query, the largest first.

    Parameters
    ----------
    indices : int64 array (B, H, M, count)
        Rows of k.
    weights : array (B, H, M, count)
        Their weights, 0 to 1.
    """

    indices: AnyArray
    weights: AnyArray


class Gradients:
    """What `attention_vjp` returns: gradients by the inputs, and by the arrays of rules.

    Parameters
    ----------
    q, k, v : arrays (B, H, M, D), (B, Hk, N, D), (B, Hk, N, E)
        Gradients by the inputs, in their shapes and dtype.
    learned : sequence of (rule, dict of str to array)
        For each rule of the call that has gradients, those by its arrays, by the names of its arguments.

    Examples
    --------
    >>> import numpy as np
    >>> from attn_numba import reference
    >>> from attn_numba.rules import Bias
    >>> bias = Bias(np.zeros((3, 1)))
    >>> gradients = reference.attention_vjp(*np.ones((4, 3, 2)), modifiers=bias)
    >>> gradients.v[0], gradients.of(bias).shape
    (array([1., 1.]), (3, 1))
    """

    def __init__(self, q: Any, k: Any, v: Any, learned: Iterable[tuple[Any, Mapping[str, Any]]] = ()) -> None:
        self.q, self.k, self.v = q, k, v
        self._learned = [(rule, dict(arrays)) for rule, arrays in learned if arrays]

    @property
    def learned(self) -> tuple[tuple[Any, dict[str, Any]], ...]:
        """Rules of the call that have gradients, and those by their arrays, by the names of their arguments."""
        return tuple((rule, dict(arrays)) for rule, arrays in self._learned)

    def of(self, rule: Any) -> Any:
        """Return the gradients by a rule's arrays.

        Parameters
        ----------
        rule : Bias, ALiBi, Temperature, AdaptiveSpan, Softmax with a sink, Bilinear or Additive
            The very object that the call was given.

        Returns
        -------
        array or named tuple of arrays
            In the shape the rule was given, summed over the axes along which it was broadcast; float64 for float64
            inputs, else float32. Of a rule with several arrays a named tuple, in the order in which it takes them:
            ``(Wq, Wk, w)`` of `Additive`.

        Raises
        ------
        ValueError
            If it is no rule of the call, or one without gradients.
        """
        for known, arrays in self._learned:
            if known is rule:
                found = tuple(arrays.values())
                return found[0] if len(found) == 1 else _named(tuple(arrays), found, "Gradients")
        name = type(rule).__name__
        there = ", ".join(type(known).__name__ for known, _ in self._learned)
        raise ValueError(
            f"rule is {name}, of which this call has no gradient; needed the very object of one of: {there}"
            if there
            else f"rule is {name}, but no rule of this call has an array with a gradient"
        )

    def __repr__(self) -> str:
        rules = "".join(f", {type(rule).__name__}" for rule, _ in self._learned)
        return f"Gradients(q, k, v{rules})"


class Learned:
    """Gradients by the arrays of rules as they are found; those of a rule that is met twice are added.

    Parameters
    ----------
    dtype : dtype
        Of the arrays that `Gradients` gets.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self._dtype = dtype
        self._rules: dict[int, tuple[Any, dict[str, AnyArray]]] = {}

    def add(self, rule: Any, arrays: Mapping[str, AnyArray]) -> None:
        """Add gradients by arrays of a rule, by name."""
        known = self._rules.setdefault(id(rule), (rule, {}))[1] if arrays else {}
        for name, array in arrays.items():
            known[name] = known[name] + array if name in known else array

    def found(self) -> list[tuple[Any, dict[str, AnyArray]]]:
        """Return what `Gradients` takes."""
        return [
            (rule, {name: np.asarray(array, self._dtype) for name, array in arrays.items()})
            for rule, arrays in self._rules.values()
        ]


def result_of(out: Any, lse: Any = None, weights: Any = None) -> Any:
    """Return the output alone, or a named tuple ``Attention`` of it and of what is not None."""
    found = {"out": out, "lse": lse, "weights": weights}
    fields = tuple(name for name, array in found.items() if array is not None)
    return out if fields == ("out",) else _named(fields, tuple(found[name] for name in fields))


def _named(fields: tuple[str, ...], arrays: tuple[Any, ...], name: str = "Attention") -> Any:
    return _kind(name, fields)(*arrays)


def _reduced(result: Any) -> tuple[Any, ...]:
    """Return how pickle makes the result again; by their one name it could not tell the kinds apart."""
    return _named, (result._fields, tuple(result), type(result).__name__)


@functools.cache
def _kind(name: str, fields: tuple[str, ...]) -> Any:
    kind: Any = namedtuple(name, fields)  # type: ignore[misc]  # the fields are known when it is called
    kind.__reduce__ = _reduced  # type: ignore[method-assign, assignment]
    return kind

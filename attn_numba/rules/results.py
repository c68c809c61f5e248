"""What a call returns: the output alone, or a named tuple of what was asked for."""

from __future__ import annotations

from collections import namedtuple
from typing import Any, NamedTuple

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


def result_of(out: Any, lse: Any = None, weights: Any = None) -> Any:
    """Return the output alone, or a named tuple ``Attention`` of it and of what is not None."""
    found = {"out": out, "lse": lse, "weights": weights}
    fields = tuple(name for name, array in found.items() if array is not None)
    return out if fields == ("out",) else _named(fields, tuple(found[name] for name in fields))


def _named(fields: tuple[str, ...], arrays: tuple[Any, ...]) -> Any:
    return _KINDS[fields](*arrays)


def _reduced(result: Any) -> tuple[Any, ...]:
    """Return how pickle makes the result again; by their one name it could not tell the kinds apart."""
    return _named, (result._fields, tuple(result))


_KINDS: dict[tuple[str, ...], Any] = {
    ("out", "lse"): namedtuple("Attention", ("out", "lse")),
    ("out", "weights"): namedtuple("Attention", ("out", "weights")),
    ("out", "lse", "weights"): namedtuple("Attention", ("out", "lse", "weights")),
}
for _kind in _KINDS.values():
    _kind.__reduce__ = _reduced

"""All ranks raise or none does: what each found out about its call, exchanged before there is work."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np

__all__ = ["agree", "described", "together"]

SEEN_BYTES = 2**16  # of an array whose numbers are compared between ranks; of a larger one, shape and dtype alone
KINDS = {kind.__name__: kind for kind in (TypeError, ValueError, NotImplementedError, MemoryError, RuntimeError)}

T = TypeVar("T")


def together(space: Any, work: Callable[[], T]) -> T:
    """Return what `work` returns, once it has come to an end without an exception on every rank.

    Raises
    ------
    Exception
        On every rank, if it raised on one: there the exception itself, elsewhere one like it that names the rank.
    """
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    _raise_together(space, failure, None)
    return result  # type: ignore[return-value]


def agree(space: Any, work: Callable[[], tuple[T, Mapping[str, Any]]]) -> tuple[T, list[Mapping[str, Any]]]:
    """Do the same for work that also returns facts of the call, by name, which must be the same on every rank.

    A name that ends in a question mark is of a fact that may differ.

    Returns
    -------
    T, list of dict
        What `work` returned first, and the facts of all ranks.

    Raises
    ------
    ValueError
        If facts differ; and what `together` raises.
    """
    result, failure, facts = None, None, None
    try:
        result, facts = work()
    except Exception as error:
        failure = error
    found = _raise_together(space, failure, facts)
    for rank, other in enumerate(found):
        for name, value in found[0].items():
            if not name.endswith("?") and other[name] != value:
                raise ValueError(
                    f"{name} differs between ranks: {_short(value)} on rank 0, {_short(other[name])} on rank {rank}"
                )
    return result, found  # type: ignore[return-value]


def _raise_together(space: Any, failure: Exception | None, facts: Any) -> list[Any]:
    said = None if failure is None else (_kind_of(failure), str(failure))
    entries = space.allgather((said, facts))
    failed = [(rank, *entry[0]) for rank, entry in enumerate(entries) if entry[0] is not None]
    if failure is not None:
        raise failure
    if failed:
        rank, name, message = failed[0]
        more = f" (and {len(failed) - 1} more ranks)" if len(failed) > 1 else ""
        raise KINDS[name](f"rank {rank}: {message}{more}")
    return [entry[1] for entry in entries]


def _kind_of(failure: Exception) -> str:
    """Return the name of the nearest kind of exception that the other ranks can raise too."""
    return next((kind.__name__ for kind in type(failure).__mro__ if kind.__name__ in KINDS), "RuntimeError")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


def described(x: Any) -> Any:
    """Return what tells a rule, or anything that rules are made of, from others, as plain values to be compared."""
    if x is None or isinstance(x, (bool, int, float, str)):
        return x
    if isinstance(x, np.ndarray | np.generic):
        array = np.asarray(x)
        numbers = zlib.crc32(np.ascontiguousarray(array).tobytes()) if array.nbytes <= SEEN_BYTES else "large"
        return ("array", array.shape, array.dtype.name, numbers)
    if isinstance(x, tuple | list):
        return tuple(described(item) for item in x)
    if hasattr(x, "masks"):
        return (type(x).__name__, *(described(mask) for mask in x.masks))
    if is_dataclass(x):
        return (type(x).__name__, *((f.name, described(getattr(x, f.name))) for f in fields(x)))
    if callable(x):
        code = getattr(x, "__code__", None)
        return ("function", getattr(x, "__qualname__", ""), None if code is None else zlib.crc32(code.co_code))
    return type(x).__name__

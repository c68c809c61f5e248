"""How many threads a call uses, and where the number comes from."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["set_threads", "thread_count", "threads"]

_local = threading.local()
_default: int | None = None


def _checked(n: object, name: str) -> int:
    if isinstance(n, bool) or not hasattr(n, "__index__"):
        raise TypeError(f"{name} is {type(n).__name__}; needed a whole number of threads")
    count = int(n.__index__())
    if count < 1:
        raise ValueError(f"{name} is {count}; needed at least 1")
    return count


@contextlib.contextmanager
def threads(n: int) -> Iterator[None]:
    """Let the calls that this thread makes inside the block use `n` threads each.

    Parameters
    ----------
    n : int
        Number of threads, at least 1.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is below 1.

    Examples
    --------
    >>> import attn_numba as an
    >>> with an.threads(1):
    ...     an.config_report()["threads"]["count"]
    (1, 'attn_numba.threads')
    """
    count = _checked(n, "n")
    before = getattr(_local, "count", None)
    _local.count = count
    try:
        yield
    finally:
        _local.count = before


def set_threads(n: int | None) -> None:
    """Set the number of threads that calls of this process use by default; None goes back to the environment's.

    Parameters
    ----------
    n : int or None
        Number of threads, at least 1.

    Raises
    ------
    TypeError
        If `n` is not an integer.
    ValueError
        If `n` is below 1.

    Examples
    --------
    >>> import attn_numba as an
    >>> an.set_threads(2)
    >>> an.config_report()["threads"]["count"]
    (2, 'attn_numba.set_threads')
    >>> an.set_threads(None)
    """
    global _default
    _default = None if n is None else _checked(n, "n")


def thread_count() -> tuple[int, str]:
    """Return how many threads a call made here and now uses, and where the number comes from."""
    count = getattr(_local, "count", None)
    if count is not None:
        return count, "attn_numba.threads"
    if _default is not None:
        return _default, "attn_numba.set_threads"
    return _from_environment()


@functools.cache
def _from_environment() -> tuple[int, str]:
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):  # job scripts and Dask set the second, which Numba ignores
        first = os.environ.get(name, "").split(",")[0].strip()
        if first.isdigit() and int(first) > 0:
            return int(first), name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    if quota < cores:
        return max(1, math.ceil(quota)), "cgroup quota"
    return cores, "processors this process may use"


def _cgroup_quota() -> float:
    """Return the processors that the container's quota amounts to, infinity if there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf

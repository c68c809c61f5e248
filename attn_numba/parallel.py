"""How many threads a call uses, and where the number comes from."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
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
    """Return how many threads a call made here and now uses, and where the number comes from.

    That is the number of `threads`, else of `set_threads`, else of the environment, else 1 in a task of Dask or joblib,
    for then tasks are what the cores are shared between; else what this process may use of the machine.
    """
    count = getattr(_local, "count", None)
    if count is not None:
        return count, "attn_numba.threads"
    if _default is not None:
        return _default, "attn_numba.set_threads"
    told = _from_environment()
    if told is not None:
        return told
    cores = _from_machine()
    task = _task() if cores[0] > 1 else None
    return cores if task is None else (1, task)


@functools.cache
def _from_environment() -> tuple[int, str] | None:
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):  # job scripts and Dask set the second, which Numba ignores
        first = os.environ.get(name, "").split(",")[0].strip()
        if first.isdigit() and int(first) > 0:
            return int(first), name
    return None


@functools.cache
def _from_machine() -> tuple[int, str]:
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


def _task() -> str | None:
    """Return what kind of task this thread is in the middle of, if any.

    Nothing is imported: who runs a task has loaded the library that does.
    """
    if _is_on_a_worker_of_dask() or _is_in_a_task_of_a_local_scheduler():
        return "a task of Dask"
    backend = getattr(sys.modules.get("joblib.parallel"), "get_active_backend", None)
    if backend is not None and backend()[0].nesting_level:
        return "a worker of joblib"
    return None


def _is_on_a_worker_of_dask() -> bool:
    get_worker = getattr(sys.modules.get("distributed.worker"), "get_worker", None)
    try:
        return get_worker is not None and get_worker() is not None
    except ValueError:  # no worker
        return False


def _is_in_a_task_of_a_local_scheduler() -> bool:
    """Whether Dask's own threads or processes called: they leave no mark but their function among the callers."""
    run = getattr(sys.modules.get("dask.local"), "execute_task", None)
    if run is None:
        return False
    frame = sys._getframe()
    while frame is not None and frame.f_code is not run.__code__:
        frame = frame.f_back  # type: ignore[assignment]
    return frame is not None

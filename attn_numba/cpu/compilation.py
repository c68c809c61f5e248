"""Compile workers, and keep compiled code on disk.

A worker is a compiled function of (state address, worker number); workers pull item numbers from the atomic counter
with which every state begins, so however many of them run, and whenever, all items are done.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

WORKER = types.void(types.intp, types.intp)


@functools.cache
def _sources_stamp() -> str:
    """Return one hash over the sources of this folder.

    Numba itself would not see a change in a file that a kernel calls into.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _SourcesCache(FunctionCache):
    """Numba's disk cache of one function, stale as soon as any source of this folder changes.

    A damaged entry is compiled anew.
    """

    def __init__(self, function):
        super().__init__(function)
        self._cache_file = IndexDataCacheFile(self._cache_path, self._impl.filename_base, _sources_stamp())

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a truncated or foreign file can raise anything when unpickled
            self._cache_file.flush()
            return None


def cache_folder() -> tuple[str | None, str]:
    """Return the folder that holds compiled code and why it is that one; (None, reason) where none can be written."""
    try:
        path = _SourcesCache(_sources_stamp.__wrapped__).cache_path
    except RuntimeError as error:
        return None, f"no folder can be written: {error}"
    named = os.environ.get("NUMBA_CACHE_DIR")
    return path, "NUMBA_CACHE_DIR" if named else "next to the package or in the user's cache"


@contextlib.contextmanager
def _fewer_collections() -> Iterator[None]:
    """Let Python look for garbage less often: Numba makes objects by the million that stay, a fifth of its time."""
    with _compiling:  # one at a time, as Numba's own lock has it, so that the usual thresholds come back
        before = gc.get_threshold()
        if before[0]:
            gc.set_threshold(*map(max, before, (50_000, 20, 20)))
        try:
            yield
        finally:
            gc.set_threshold(*before)


_compiling = threading.RLock()


@functools.cache
def compile_worker(function: Callable) -> int:
    """Compile (or load) a worker of (state address, worker number) and return its address."""
    worker = CFunc(function, (WORKER.args, WORKER.return_type), locals={}, options={"nopython": True, "nogil": True})
    with contextlib.suppress(RuntimeError):  # no folder can be written: compile for this process, keep nothing
        worker._cache = _SourcesCache(function)
    with _fewer_collections():
        worker.compile()
    _keep.append(worker)
    return int(worker.address)


_keep: list[object] = []  # compiled workers must outlive their addresses

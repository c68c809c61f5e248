"""Start one worker function on all cores, and keep compiled code on disk.

A worker is a compiled function of (state address, worker number); workers pull item numbers from the atomic counter with which every
state begins. `_on_pool` is the only function of the package that Numba compiles as parallel: it calls workers by address, so it is
compiled once for all kernels, and kernels compile serially.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import threading
from pathlib import Path

import numba
from numba import njit, prange, types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

import attn_numba
from attn_numba.cpu.tiles import call_worker

WORKER = types.void(types.intp, types.intp)


# -- Compiled code on disk -----------------------------------------------------------------------------------------------------


@functools.cache
def _sources_stamp() -> str:
    """One hash over the sources of this folder: Numba itself would not see a change in a file that a kernel calls into."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _SourcesCache(FunctionCache):
    """Numba's disk cache of one function, stale as soon as any source of this folder changes; a damaged entry is compiled anew."""

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
        path = _SourcesCache(_on_pool).cache_path
    except RuntimeError as error:
        return None, f"no folder can be written: {error}"
    return path, "NUMBA_CACHE_DIR" if os.environ.get("NUMBA_CACHE_DIR") else "next to the package or in the user's cache"


def _with_cache(compiled, function):
    try:
        compiled._cache = _SourcesCache(function)
    except RuntimeError:  # no folder can be written: compile in this process, keep nothing
        pass
    return compiled


@functools.cache
def compile_worker(function) -> int:
    """Compile (or load) a worker of (state address, worker number) and return its address."""
    worker = CFunc(function, (WORKER.args, WORKER.return_type), locals={}, options={"nopython": True, "nogil": True})
    _with_cache(worker, function)
    worker.compile()
    _keep.append(worker)
    return worker.address


_keep: list[object] = []  # compiled workers must outlive their addresses


# -- Threads -------------------------------------------------------------------------------------------------------------------


def _on_pool(worker, state, count):
    for number in prange(count):
        call_worker(worker, state, number)


@functools.cache
def _pool():
    function = _with_cache(njit(parallel=True, nogil=True)(_on_pool), _on_pool)
    function.compile((types.intp, types.intp, types.intp))
    return function


@functools.cache
def _layer_is_reentrant() -> bool:
    from numba.np.ufunc import parallel

    parallel._launch_threads()
    return bool(numba.threading_layer() != "workqueue")


def pool_layer() -> tuple[str, str]:
    """Return what several workers run on, and why."""
    if attn_numba._pool_is_inherited:
        return "Python threads", "Numba's pool may belong to a parent process"
    if not _layer_is_reentrant():
        return "Python threads", "Numba's workqueue layer cannot be entered twice"
    return numba.threading_layer(), "Numba's threading layer"


def pool_is_safe() -> bool:
    """Whether Numba's own threads may be entered in this process: not in a forked child, not with the workqueue layer.

    A forked child whose parent used the pool is killed when it enters it again; the workqueue layer aborts the process when two
    Python threads enter at once. There the same workers run on Python threads, which costs 0.1 to 0.4 ms a launch.
    """
    return not attn_numba._pool_is_inherited and _layer_is_reentrant()


_call = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)


@functools.cache
def _callable(worker: int):
    return _call(worker)  # ctypes releases the GIL during the call


def run(worker: int, state: int, count: int) -> None:
    """Run `count` workers on the state and return when all are done; one worker runs in the calling thread."""
    if count == 1:
        return _callable(worker)(state, 0)
    if pool_is_safe():
        return _pool()(worker, state, count)
    others = [threading.Thread(target=_callable(worker), args=(state, n)) for n in range(1, count)]
    for thread in others:
        thread.start()
    _callable(worker)(state, 0)
    for thread in others:
        thread.join()
    return None

"""Run one compiled worker on several cores, and keep compiled code on disk.

A worker is a compiled function of (state address, worker number); workers pull item numbers from the atomic counter
with which every state begins, so however many of them run, and whenever, all items are done.

Helpers are Python threads that sleep on a lock between calls. The calling thread works too, and does not wait for a
helper that has not begun when all items are done. Numba's own pool (OpenMP) wakes as fast, but a region there waits for
every thread, and one that another library's spinning threads keep off its core costs milliseconds: measured between two
NumPy matrix products on 2 cores, 5 ms for a call of 1.5 ms. It also ends a forked child that enters it, and its
fallback layer aborts when two threads enter at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from numba import types
from numba.core.caching import FunctionCache, IndexDataCacheFile
from numba.core.ccallback import CFunc

WORKER = types.void(types.intp, types.intp)


# --- compiled code on disk ---


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


@functools.cache
def compile_worker(function: Callable) -> int:
    """Compile (or load) a worker of (state address, worker number) and return its address."""
    worker = CFunc(function, (WORKER.args, WORKER.return_type), locals={}, options={"nopython": True, "nogil": True})
    with contextlib.suppress(RuntimeError):  # no folder can be written: compile for this process, keep nothing
        worker._cache = _SourcesCache(function)
    worker.compile()
    _keep.append(worker)
    return int(worker.address)


_keep: list[object] = []  # compiled workers must outlive their addresses


# --- threads ---


class _Ticket:
    """One worker of one launch: whoever takes it first, a helper or the launch itself, decides whether it runs."""

    __slots__ = ("done", "keep", "number", "state", "taken", "work")

    def __init__(self, work: Callable[[int, int], None], state: int, number: int, keep: object) -> None:
        self.work, self.state, self.number = work, state, number
        self.keep = (
            keep  # the memory that the worker uses lives as long as the ticket, also if the launch is interrupted
        )
        self.taken, self.done = threading.Lock(), threading.Lock()
        self.done.acquire()


class _Helper:
    """A thread that runs one ticket after the other."""

    __slots__ = ("ticket", "wake")

    def __init__(self) -> None:
        self.wake = threading.Lock()
        self.wake.acquire()
        self.ticket: _Ticket | None = None
        threading.Thread(target=self._serve, name="attn_numba", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self.wake.acquire()
            ticket, self.ticket = self.ticket, None
            if ticket is not None and ticket.taken.acquire(blocking=False):
                ticket.work(ticket.state, ticket.number)
                ticket.done.release()
            del ticket
            _idle.append(self)


_idle: list[_Helper] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # threads do not live on in a forked child


def _hand_out(ticket: _Ticket) -> _Ticket:
    try:
        helper = _idle.pop()
    except IndexError:
        helper = _Helper()
    helper.ticket = ticket
    helper.wake.release()
    return ticket


_call = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)


@functools.cache
def _callable(worker: int) -> Callable[[int, int], None]:
    return _call(worker)  # ctypes releases the interpreter's lock during the call


def run(worker: int, state: int, count: int, keep: object) -> None:
    """Run `count` workers on the state, one of them in the calling thread; return when all items are done.

    `keep` holds all memory that the workers use.
    """
    work = _callable(worker)
    tickets = [_hand_out(_Ticket(work, state, number, keep)) for number in range(1, count)]
    work(state, 0)
    for ticket in tickets:
        if not ticket.taken.acquire(blocking=False):  # a helper has it
            ticket.done.acquire()
